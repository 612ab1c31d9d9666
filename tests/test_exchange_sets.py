"""Files that belong together, out and in: shards with an index, and folders in which formats are mixed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _exchange import Trained, imported, save, skipped, survey
from _formats import check
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_tensors

import everystep
from everystep import exchange, formats
from everystep.errors import Conflict, Damaged, NotFound, Unsupported, UsageError
from everystep.exchange.names import parse_file
from everystep.formats import shards
from everystep.formats.file import made, opened
from everystep.seam import REAL, Seam

INDEX = "model.safetensors.index.json"
LAYERS = {f"layer.{n}.weight": np.full((50, 10), n, "f4") for n in range(10)}  # of 2,000 bytes each


# several files of one -----------------------------------------------------------------------------------------------


def test_a_file_beside_another_is_in_the_same_folder(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"first")
    (tmp_path / "b").write_bytes(b"second")
    (tmp_path / "empty").touch()
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "c").write_bytes(b"third")
    with opened(str(tmp_path / "a"), REAL) as source:
        beside = source.beside("b")
        assert beside.bytes_at(0, 6).tobytes() == b"second" and source.beside("b") is beside
        assert beside.beside("a").head() == b"first" and source.beside("empty").head() == b""
        for name in ("", ".", "..", "../x", "inner/c", "/etc/passwd", "a\0", "inner\\c", "x" * 300):
            with pytest.raises(Damaged, match="outside of its folder"):
                source.beside(name)
        with pytest.raises(NotFound):
            source.beside("missing")
    with opened(b"bytes alone", REAL) as source, pytest.raises(Unsupported):
        source.beside("b")


def test_files_beside_each_other_get_their_names_together(tmp_path: Path) -> None:
    with made(str(tmp_path / "index"), REAL, False) as target:
        target.write(b"i")
        target.beside("part").write(b"pp")
        assert target.nbytes_in_all == 3 and all(p.name.startswith(".tmp-") for p in tmp_path.iterdir())
        for name in ("..", "a/b", ""):
            with pytest.raises(UsageError):
                target.beside(name)
        with pytest.raises(UsageError, match="two files of one name"):
            target.beside("part")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"index": b"i", "part": b"pp"}
    with pytest.raises(Conflict), made(str(tmp_path / "other"), REAL, False) as target:
        target.beside("part")
    assert {p.name for p in tmp_path.iterdir()} == {"index", "part"}


def test_large_states_become_shards(tmp_path: Path) -> None:
    state = {**LAYERS, "huge": np.zeros(2000)}
    written = formats.write(tmp_path / "model.safetensors", state, max_shard_size="5KB", metadata={"by": "us"})
    files = sorted(path.name for path in tmp_path.iterdir())
    assert written.path == str(tmp_path / INDEX) and written.nbytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert files == [*(f"model-{n:05d}-of-00006.safetensors" for n in range(1, 7)), INDEX]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 10 * 2000 + 16000 and index["weight_map"]["huge"] == files[5]
    loaded: dict[str, Any] = {}
    for file in files[:-1]:
        part = load_file(tmp_path / file)  # the package's own reader
        assert {index["weight_map"][name] for name in part} == {file}
        loaded |= part
    check({name: state[name] for name in sorted(state)}, dict(sorted(loaded.items())))
    for source in (written.path, tmp_path):  # the index, or the folder
        content = formats.read(source)
        assert content.format == "shards" and content.metadata["by"] == "us"
        check(state, content.state)
    with pytest.raises(Conflict):
        formats.write(tmp_path / "model.safetensors", state, max_shard_size="5KB")
    small = formats.write(tmp_path / "small.safetensors", LAYERS, max_shard_size="5GB")
    assert small.path == str(tmp_path / "small.safetensors")
    check(LAYERS, formats.read(small.path).state)


def test_a_nested_state_in_shards(tmp_path: Path) -> None:
    x = np.arange(600.0)
    state = {"model": {"w": x, "tie": x}, "optimizer": [np.ones(500), (1, None)], "lr": 0.1}
    path = formats.write(tmp_path / INDEX, state, max_shard_size=5000).path
    got = formats.read(path).state
    check(state, got)
    assert got["model"]["w"] is got["model"]["tie"] and len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("5GiB", 5 * 2**30), ("1.5 MB", 1_500_000), ("300", 300), ("2kib", 2048), (7, 7)],
)
def test_sizes_of_shards(text: Any, size: int) -> None:
    assert shards.bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5XB", "-1", 0, -5, True, 2.5, "5GBs", None])
def test_what_is_no_size(text: Any) -> None:
    with pytest.raises(UsageError):
        shards.bytes_of(text)


def test_metadata_beside_a_state(tmp_path: Path) -> None:
    state = {"w": np.ones(2)}
    for name in ("x.safetensors", INDEX, "x.pb"):
        path = formats.write(tmp_path / name, state, metadata={"author": "é", "step": "5"}).path
        content = formats.read(path)
        assert (content.metadata["author"], content.metadata["step"]) == ("é", "5")
        check(state, content.state)
    for name in ("x.npz", "x.pth", "x.params"):
        with pytest.raises(UsageError, match="no place for metadata"):
            formats.write(tmp_path / name, state, metadata={"a": "b"})
    for wrong in ({"a": 1}, {1: "a"}, {"everystep": "x"}):
        with pytest.raises(UsageError):
            formats.write(tmp_path / "y.safetensors", state, metadata=wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no shards"):
        formats.write(tmp_path / "y.npz", state, max_shard_size="5GB")


def test_a_checkpoint_becomes_shards_and_comes_back(tmp_path: Path) -> None:
    work = Trained()
    work.step()
    repo = everystep.open(str(tmp_path / "repo"))
    with repo.run("a") as run:
        run.track(model=work.model, optimizer=work.optimizer, rng=False)
        run.save(30, metrics={"val_loss": 0.5})
    checkpoint = repo["a"].at(30)
    (tmp_path / "out").mkdir()
    written = checkpoint.export(str(tmp_path / "out" / "model.safetensors"), max_shard_size=200)
    assert written.path.endswith(INDEX) and len(list((tmp_path / "out").iterdir())) > 3
    report = repo.import_from(str(tmp_path / "out"), "b")
    assert [(one.step, one.metrics) for one in report.brought] == [(30, {"val_loss": 0.5})] and not report.skipped
    assert report.file_bytes == written.nbytes
    check(checkpoint.load(), repo["b"].at(30).load())


# folders -------------------------------------------------------------------------------------------------------------


def hugging_face(folder: Path, step: int, weights: dict[str, Any]) -> None:
    """A checkpoint-N as the Trainer of transformers writes it, in shards with an index."""
    folder.mkdir(parents=True)
    names = sorted(weights)
    places = {}
    for number, part in enumerate((names[:4], names[4:]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_tensors({name: weights[name] for name in part}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": places}))
    save({"state": {}, "param_groups": []}, folder / "optimizer.pt")
    save({"last_epoch": step}, folder / "scheduler.pt")
    save({"python": (3, (1, 2), None), "cpu": torch.get_rng_state()}, folder / "rng_state.pth")
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    rows = [{"loss": 3.0, "step": step // 2}, {"loss": 2.0, "step": step}, {"eval_loss": 1 / step, "step": step}]
    state = {"global_step": step, "epoch": step / 10, "best_metric": 0.1, "log_history": rows}
    (folder / "trainer_state.json").write_text(json.dumps(state))


def test_folders_of_transformers_with_an_index(tmp_path: Path) -> None:
    kept = {}
    for step in (10, 20):
        kept[step] = {f"l.{n}": torch.randn(3) for n in range(6)}
        hugging_face(tmp_path / f"checkpoint-{step}", step, kept[step])
    found = survey(tmp_path)
    assert [(one.step, one.epoch, one.metrics["eval_loss"], one.metrics["loss"]) for one in found.found] == [
        (10, 1, 0.1, 2.0), (20, 2, 0.05, 2.0),
    ]  # fmt: skip
    whole = tmp_path / "checkpoint-20"
    aside = ("config.json", "tokenizer", "trainer_state.json")
    parts = [path for path in whole.iterdir() if not any(name in path.name for name in aside)]
    assert found.found[1].nbytes == sum(path.stat().st_size for path in parts)
    assert {kind for kind, _ in skipped(tmp_path).values()} == {exchange.UNKNOWN}
    assert all("holds no state" in why for _, why in skipped(tmp_path).values())
    for step, got in imported(tmp_path).items():
        assert sorted(got.state) == ["model", "optimizer", "rng_state", "scheduler"]
        assert {name: array.tobytes() for name, array in got.state["model"].items()} == {
            name: tensor.numpy().tobytes() for name, tensor in kept[step].items()
        }


def test_a_missing_shard_is_said(tmp_path: Path) -> None:
    hugging_face(tmp_path / "checkpoint-10", 10, {f"l.{n}": torch.randn(3) for n in range(6)})
    (tmp_path / "checkpoint-10" / "model-00002-of-00002.safetensors").unlink()
    left = skipped(tmp_path)
    for name in (INDEX, "model-00001-of-00002.safetensors"):
        kind, why = left[f"checkpoint-10/{name}"]
        assert kind == exchange.UNPLACED and "model-00002-of-00002.safetensors" in why


def test_shards_whose_index_is_damaged_are_told_by_their_names(tmp_path: Path) -> None:
    weights = {f"l.{n}": torch.randn(3) for n in range(6)}
    hugging_face(tmp_path / "checkpoint-10", 10, weights)
    (tmp_path / "checkpoint-10" / INDEX).write_text('{"weight_map": ')
    assert skipped(tmp_path)[f"checkpoint-10/{INDEX}"][0] == exchange.DAMAGED
    assert sorted(imported(tmp_path)[10].state["model"]) == sorted(weights)


def test_any_mix_of_formats_is_one_run(tmp_path: Path) -> None:
    def weights(step: int) -> dict[str, Any]:
        return {"w": np.full((4, 3), step, "f4")}

    save({"global_step": 1, "model": {"w": torch.ones(4, 3)}, "val_loss": 0.9}, tmp_path / "a.pth")
    save_file(weights(2), tmp_path / "step_2.safetensors")
    np.savez(tmp_path / "step_3.npz", **weights(3))
    formats.write(tmp_path / "x.pb", weights(4), metadata={"step": "4", "metrics": '{"val_loss": 0.4}'})
    formats.write(tmp_path / "step_5.params", weights(5))
    (tmp_path / "step_6").mkdir()
    formats.write(tmp_path / "step_6" / "model.safetensors", weights(6), max_shard_size=48)
    (tmp_path / "log.txt").write_text("a log")
    found = survey(tmp_path)
    assert [(one.step, one.metrics) for one in found.found] == [
        (1, {"val_loss": 0.9}), (2, {}), (3, {}), (4, {"val_loss": 0.4}), (5, {}), (6, {}),
    ]  # fmt: skip
    for step, got in imported(tmp_path).items():
        state = got.state["model"] if step == 1 else got.state
        check(weights(step), {"w": state["w"]})
    assert list(skipped(tmp_path)) == ["log.txt"]


def test_a_package_that_is_missing_is_said_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(seam: Seam, path: str) -> Any:
        raise Unsupported("Orbax's folders need TensorStore", where=path, do='pip install "everystep[orbax]"')

    monkeypatch.setattr(formats.FOLDERS["orbax"], "read_folder", lacks)
    (tmp_path / "old" / "100" / "metrics").mkdir(parents=True)
    (tmp_path / "old" / "100" / "_CHECKPOINT_METADATA").write_text("{}")
    (tmp_path / "old" / "100" / "metrics" / "metrics").write_text('{"val_loss": 0.5}')
    (tmp_path / "old" / "200.orbax-checkpoint-tmp-1").mkdir()
    save_file({"w": np.ones(2)}, tmp_path / "old" / "step_5.safetensors")
    (one, two) = survey(tmp_path / "old").found
    assert (one.step, two.step, two.metrics) == (5, 100, {"val_loss": 0.5})
    report = everystep.open(str(tmp_path / "repo")).import_from(str(tmp_path / "old"), "a")
    assert [brought.step for brought in report.brought] == [5]
    unfinished, left = sorted(report.skipped, key=lambda one: "TensorStore" in one.why)
    assert left.kind == exchange.UNKNOWN and left.why.endswith('pip install "everystep[orbax]"')
    assert "not finished" in unfinished.why


NAMES: list[tuple[str, int | None, int | None, dict[str, float]]] = [
    ("weights.05-0.12.hdf5", None, 5, {"val_loss": 0.12}),
    ("model.03-1.25.keras", None, 3, {"val_loss": 1.25}),
    ("weights-improvement-10-0.87.weights.h5", None, 10, {"val_loss": 0.87}),
    ("cp_07_-0.50.keras", None, 7, {"val_loss": -0.5}),
    ("epoch_04-0.5.keras", None, 4, {"val_loss": 0.5}),
    ("model.03.keras", 3, None, {}),
    ("resnet-0007.params", None, 7, {}),
    ("resnet50_v1-0100.params", None, 100, {}),
    ("model-epoch3batch120.params", 120, 3, {}),
    ("net_epoch_4.params", None, 4, {}),
    ("resnet-0007.pth", 7, None, {}),
    ("ssd-2-0.5.pth", None, None, {}),
]


@pytest.mark.parametrize(("name", "step", "epoch", "metrics"), NAMES)
def test_conventions_of_names(name: str, step: int | None, epoch: int | None, metrics: dict[str, float]) -> None:
    named = parse_file(name)
    assert (named.step, named.epoch, named.metrics) == (step, epoch, metrics)
