"""Orbax's own folders, read without Orbax; and what is damaged or made to harm ends in a typed error."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from _jax import same, saved
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import everystep
from everystep import formats
from everystep.errors import Damaged, Error, Unsupported
from everystep.formats import orbax
from everystep.seam import REAL

PARAMS = {"dense": {"kernel": jnp.arange(12.0).reshape(3, 4), "bias": jnp.ones(4, jnp.bfloat16)}}


def state() -> dict[str, Any]:
    return {
        "params": PARAMS,
        "opt_state": optax.chain(optax.clip(1.0), optax.adamw(1e-3)).init(PARAMS),
        "step": 7,
        "rate": 0.25,
        "lists": [jnp.zeros(3, jnp.int8), (np.arange(5), jnp.asarray(2.5))],
        "empty": {"dict": {}, "list": [], "none": None},
        "a/b": jnp.ones((2, 1)),
        "flags": jnp.array([True, False]),
        "complex": jnp.ones(2, jnp.complex64) * 1j,
        "raw key": jax.random.PRNGKey(3),
    }


def save(path: Path, item: Any, **options: Any) -> Path:
    """As Orbax saves one pytree."""
    if options:
        handler = ocp.PyTreeCheckpointHandler(**options)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(path, args=ocp.args.PyTreeSave(item))
    else:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, item)
    return path


def check(content: formats.Content, tree: dict[str, Any]) -> None:
    """The neutral state holds just the leaves of a tree, bit for bit."""
    given = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    found = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(content.state)}
    assert found.keys() == given.keys()
    for name, leaf in given.items():
        if isinstance(leaf, (int, float, str)):
            assert type(found[name]) is type(leaf) and found[name] == leaf, name
        else:
            array = np.asarray(leaf)
            assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
            assert found[name].tobytes() == array.tobytes(), name


def _name(path: Any) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)


FORMS = {
    "standard": {},
    "ocdbt, zarr3": {"use_ocdbt": True, "use_zarr3": True},
    "zarr": {"use_ocdbt": False, "use_zarr3": False},
    "zarr3": {"use_ocdbt": False, "use_zarr3": True},
}


@pytest.mark.parametrize("form", FORMS)
def test_what_orbax_writes_is_read_bit_for_bit(form: str, tmp_path: Path) -> None:
    tree = state()
    if not FORMS[form].get("use_ocdbt", True):
        del tree["a/b"]  # a name that would be a folder in a folder
    path = save(tmp_path / "checkpoint_12", tree, **FORMS[form])
    assert formats.folder_of(str(path)) == "orbax"
    content = formats.read(path)
    check(content, tree)
    assert not content.not_understood and content.metadata["step"] == "12"
    assert content.state["empty"] == {"dict": {}, "list": [], "none": None}


def test_it_goes_on_in_the_classes_of_its_program(tmp_path: Path) -> None:
    tree = {"params": PARAMS, "opt_state": state()["opt_state"], "step": 7}
    content = formats.read(save(tmp_path / "c", tree))
    same(saved(tmp_path, content.state).load(like=tree), tree)


def test_random_keys_are_their_bits(tmp_path: Path) -> None:
    tree = {"key": jax.random.key(5), "more": {"keys": jax.random.split(jax.random.key(6, impl="rbg"), 3)}}
    content = formats.read(save(tmp_path / "c", tree))
    assert content.state["key"].tolist() == jax.random.key_data(tree["key"]).tolist()
    assert {note.path: note.text for note in content.changed} == {
        "key": "random keys of threefry2x32 are their bits", "more/keys": "random keys of rbg are their bits"
    }  # fmt: skip
    same(saved(tmp_path, content.state).load(like=tree), tree)


def test_text_is_read(tmp_path: Path) -> None:
    tree = {"name": "größe", "inner": {"note": "two\nlines"}, "w": jnp.ones(2)}
    check(formats.read(save(tmp_path / "c", tree, use_ocdbt=True)), tree)


def test_steps_of_a_manager_with_metrics_and_items(tmp_path: Path) -> None:
    options = ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics["loss"], step_prefix="step")
    with ocp.CheckpointManager(tmp_path / "many", options=options) as manager:
        for step in (10, 20):
            items = ocp.args.Composite(
                state=ocp.args.StandardSave({"w": jnp.arange(3.0) * step}),
                config=ocp.args.JsonSave({"layers": [1, 2], "name": "x"}),
            )
            manager.save(step, args=items, metrics={"loss": 1 / step, "accuracy": 0.5})
        manager.wait_until_finished()
    assert formats.folder_of(str(tmp_path / "many")) == ""
    for step in (10, 20):
        content = formats.read(tmp_path / "many" / f"step_{step}")
        assert content.state["config"] == {"layers": [1, 2], "name": "x"}
        assert content.state["state"]["w"].tolist() == [0, step, 2 * step]
        assert content.metadata["step"] == str(step)
        assert json.loads(content.metadata["metrics"]) == {"loss": 1 / step, "accuracy": 0.5}
        assert orbax.facts_of_folder(REAL, str(tmp_path / "many" / f"step_{step}" / "state"))["step"] == str(step)
    report = everystep.open(str(tmp_path / "repo")).import_from(str(tmp_path / "many"), run="old")
    assert [(one.step, one.metrics) for one in report.brought] == [
        (step, {"loss": 1 / step, "accuracy": 0.5}) for step in (10, 20)
    ]


def test_the_default_item_is_the_state_itself(tmp_path: Path) -> None:
    with ocp.CheckpointManager(tmp_path / "many") as manager:
        manager.save(3, args=ocp.args.StandardSave({"w": jnp.arange(3.0)}), metrics={"loss": 2.0})
        manager.wait_until_finished()
    content = formats.read(tmp_path / "many" / "3")
    assert content.state["w"].tolist() == [0, 1, 2] and content.metadata["step"] == "3"


def test_arrays_over_devices_are_whole(tmp_path: Path) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_orbax
test_orbax.save_sharded(test_orbax.Path({str(tmp_path / "c")!r}))
"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], env={**_environ(), **flags}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert formats.read(tmp_path / "c").state["w"].tolist() == np.arange(32.0).reshape(8, 4).tolist()


def _environ() -> dict[str, str]:
    import os

    return dict(os.environ)


def save_sharded(path: Path) -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("x", "y"))
    array = jax.device_put(np.arange(32.0, dtype="f4").reshape(8, 4), NamedSharding(mesh, PartitionSpec("x", "y")))
    assert len(array.addressable_shards) == 4
    save(path, {"w": array})


# harm --------------------------------------------------------------------------------------------------------------


def altered(path: Path, change: Any) -> None:
    about = json.loads((path / "_METADATA").read_text())
    change(about, about["tree_metadata"])
    (path / "_METADATA").write_text(json.dumps(about))


def entry(*keys: tuple[Any, Any], kind: Any = "jax.Array") -> dict[str, Any]:
    return {
        "key_metadata": [{"key": key, "key_type": number} for key, number in keys],
        "value_metadata": {"value_type": kind, "skip_deserialize": False},
    }


ALTERED = {
    "an array that is missing": lambda about, tree: tree.update(x=entry(("gone", 2))),
    "a leaf that is a container": lambda about, tree: tree.update(x=entry(("w", 2), ("inner", 2), kind="None")),
    "a list that is a dict": lambda about, tree: tree.update(x=entry(("0", 1), kind="None")),
    "twice": lambda about, tree: tree.update(x=entry(("w", 2))),
    "keys without end": lambda about, tree: tree.update(x=entry(*[("k", 2)] * 5000)),
    "a key that is a number": lambda about, tree: tree.update(x=entry((5, 2))),
    "a kind of key that is new": lambda about, tree: tree.update(x=entry(("k", 3))),
    "a kind of value that is a table": lambda about, tree: tree.update(x=entry(("k", 2), kind={})),
    "an entry that is a text": lambda about, tree: tree.update(x="entry"),
    "no tree": lambda about, tree: about.pop("tree_metadata"),
    "text that is missing": lambda about, tree: tree.update(x=entry(("k", 2), kind="string")),
    "a scalar that is none": lambda about, tree: tree.update(x=entry(("w", 2), kind="scalar")) or tree.pop("('w',)"),
    "another store": lambda about, tree: about.update(use_ocdbt=False),
    "another driver": lambda about, tree: about.update(use_zarr3=True),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("orbax") / "c", {"w": jnp.arange(300.0), "b": jnp.ones(3)})


def copied(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "c"))


@pytest.mark.parametrize("name", ALTERED)
def test_a_tree_that_lies_is_damage(name: str, whole: Path, tmp_path: Path) -> None:
    path = copied(whole, tmp_path)
    altered(path, ALTERED[name])
    with pytest.raises(Damaged):
        formats.read(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"tree_metadata": []}'])
def test_a_tree_that_is_no_json_is_damage(text: str, whole: Path, tmp_path: Path) -> None:
    path = copied(whole, tmp_path)
    (path / "_METADATA").write_text(text)
    with pytest.raises(Damaged):
        formats.read(path)


def test_a_name_never_leads_out_of_the_folder(tmp_path: Path) -> None:
    save(tmp_path / "secret", {"w": jnp.ones(3)}, use_ocdbt=False)
    path = save(tmp_path / "c", {"v": jnp.ones(3)}, use_ocdbt=False)
    for keys in ([("../secret/w", 2)], [("", 2)], [("/etc", 2)], [("", 2), ("", 2), ("/secret/w", 2)], [("v\0", 2)]):
        altered(path, lambda about, tree, keys=keys: (tree.clear(), tree.update(x=entry(*keys))))
        with pytest.raises(Damaged):
            formats.read(path)


def test_an_array_larger_than_its_files_can_be_is_refused_before_it_has_memory(tmp_path: Path) -> None:
    path = save(tmp_path / "c", {"w": jnp.ones(3)}, use_ocdbt=False)
    about = json.loads((path / "w" / ".zarray").read_text())
    for shape, chunks in (([1 << 50], [1 << 50]), ([1 << 50], [3]), ([3], [1 << 50])):
        (path / "w" / ".zarray").write_text(json.dumps({**about, "shape": shape, "chunks": chunks}))
        with pytest.raises(Damaged, match="more than the files can hold"):
            formats.read(path)


def test_a_harmed_file_is_a_typed_error_or_changes_nothing(whole: Path, tmp_path: Path) -> None:
    """But for a bit within an array's bytes, of which the format keeps no checksum."""
    expected = formats.read(whole).state["w"].tolist()
    names = [file.relative_to(whole) for file in sorted(whole.rglob("*")) if file.is_file()]
    assert len(names) > 6
    for number, name in enumerate(names):
        for harm in ("gone", "cut", "flipped"):
            path = Path(shutil.copytree(whole, tmp_path / f"{number}{harm}"))
            data = bytearray((path / name).read_bytes())
            if harm == "gone":
                (path / name).unlink()
            elif harm == "cut":
                (path / name).write_bytes(data[: len(data) // 2])
            else:
                data[len(data) // 2] ^= 0x55
                (path / name).write_bytes(data)
            try:
                found = formats.read(path).state
            except Error:
                continue
            assert found["w"].shape == (300,) and found["w"].dtype == np.float32, (name, harm)
            assert found["w"].tolist() == expected or (harm == "flipped" and "d" in name.parts), (name, harm)


def test_a_save_that_never_ended_is_no_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path / "c", {"w": jnp.ones(3)})
    unfinished = path.rename(tmp_path / "5.orbax-checkpoint-tmp-17")
    assert formats.folder_of(str(unfinished)) == ""


def test_without_tensorstore_the_command_is_named(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(Unsupported, match=r'pip install "everystep\[orbax\]"'):
        formats.read(whole)
