"""What lies on disk: a reader that knows docs/format.md alone agrees with ours, and no byte changes unnoticed."""

from __future__ import annotations

import ast
import dataclasses
import json
import random
import shutil
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import _encodings as encodings
import ml_dtypes
import numpy as np
import pytest
import torch
import zstandard
from _encodings import FORMS, KERNEL, ONE_OF_A_FORM, forced, packed_by, using
from _thorough import examples
from blake3 import blake3
from golden import make
from independent_reader import Run, decode

import everystep
from everystep import codecs
from everystep.codecs import delta
from everystep.codecs.delta import Form
from everystep.schema.dtype import parse
from everystep.vault import Spot
from everystep.vault.lines import pack_lines
from everystep.vault.record import Abandon, Restore, Retire

HERE = Path(__file__).parent
READER = HERE / "independent_reader.py"
GOLDEN = HERE / "golden" / "format-1"
GOLDEN_PACKED = HERE / "golden" / "format-1-packed"
SMALL = make.SMALL
# What the reader raises where something is not as it should be: it says less than we do.
REFUSALS = (ValueError, TypeError, LookupError, OSError, struct.error, zstandard.ZstdError)


# the reader stands alone ---------------------------------------------------------------------------------------------


def test_the_reader_is_short_and_imports_nothing_of_everystep() -> None:
    text = READER.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 300
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None
            names.add(node.module.split(".")[0])
        elif isinstance(node, ast.Name):
            assert node.id not in ("__import__", "eval", "exec", "compile", "importlib")
    assert names - sys.stdlib_module_names == {"numpy", "ml_dtypes", "zstandard", "blake3"}


# golden repositories -------------------------------------------------------------------------------------------------


def test_the_bytes_of_this_format_are_the_golden_ones(tmp_path: Path) -> None:
    """A change that fails here changes the format: readers of older versions must be thought of first."""
    with mock.patch("everystep.run.fingerprint", make.fixed_fingerprint):
        made = make.make_tiny(str(tmp_path))
    golden = {
        path.relative_to(GOLDEN).as_posix(): path.read_bytes()
        for path in [GOLDEN / "format.json", *sorted((GOLDEN / "runs" / "tiny").rglob("*"))]
        if path.is_file()
    }
    assert sorted(made) == sorted(golden)
    assert made == golden


@pytest.mark.parametrize("by", FORMS)
@pytest.mark.parametrize(
    "golden, runs",
    [(GOLDEN, {"tiny", "ranks", "deltas", make.KINDS}), (GOLDEN_PACKED, {"packed"})],
    ids=["1", "1-packed"],
)
def test_golden_repositories_load_with_the_very_same_values(golden: Path, runs: set[str], by: str) -> None:
    expected = json.loads(golden.with_suffix(".json").read_text(encoding="utf-8"))
    with using(by):
        assert make.listing(str(golden)) == expected
    assert set(expected) == runs


def test_golden_values_are_those_that_the_program_makes() -> None:
    repo = everystep.open(str(GOLDEN))
    for step in (1, 2):
        loaded = repo[make.KINDS].at(step).load(only="numpy")
        assert list(make.told(loaded)) == list(make.told(_without_classes(make.kinds_state(step))))
        tensors = repo[make.KINDS].at(step).load(only="torch", like="saved")
        for name, tensor in make.torch_state(step)["model"].items():
            assert torch.equal(tensors["model"][name], tensor)
        assert torch.equal(tensors["sparse"].to_dense(), make.torch_state(step)["sparse"].to_dense())
        assert torch.equal(tensors["quantized"].int_repr(), make.torch_state(step)["quantized"].int_repr())
        assert tensors["constants"] == make.torch_state(step)["constants"]
    for step in (1, 3):
        assert list(make.told(repo["tiny"].at(step).load())) == list(make.told(make.tiny_state(step)))
    assert repo["tiny"].attachment("note.txt") == b"a small file"
    assert repo["tiny"].config == {"lr": 0.1}
    assert repo["tiny"].tagged("best").step == 3
    assert repo["tiny"].series("loss") == [(1, 0.5), (2, 0.375), (3, 0.25)]
    assert repo.check().ok


def _without_classes(value: Any) -> Any:
    """Named tuples as mappings, as they come back where nobody gives their class."""
    if hasattr(value, "_asdict"):
        return {name: _without_classes(child) for name, child in value._asdict().items()}
    if isinstance(value, dict):
        return {key: _without_classes(child) for key, child in value.items()}
    return [_without_classes(child) for child in value] if type(value) is list else value


def test_golden_deltas_have_every_form_and_chains_of_every_length() -> None:
    past = everystep.open(str(GOLDEN))["deltas"]
    heads, kinds, depths = set(), set(), set()
    for one in past.checkpoints():
        for spot in spots_of(one):
            depths.add(spot.depth)
            if spot.codec == codecs.DELTA:
                with open(pack_of(GOLDEN, "deltas", spot), "rb") as pack:
                    pack.seek(spot.offset)
                    stored = pack.read(spot.length)
                heads.add((stored[0], stored[1], stored[2] < 255))
                kinds.update(stored[3 : 3 + 5 * stored[0] : 5])
    assert depths == set(range(9)), "what its writer kept to"
    assert {width for width, _, _ in heads} == {1, 2, 4, 8} and kinds == {0, 1, 2}
    assert {(ordered, grouped) for _, ordered, grouped in heads} >= {(0, False), (1, True)}


def test_golden_codes_have_every_width_with_and_without_contexts() -> None:
    past, found = everystep.open(str(GOLDEN_PACKED))["packed"], set()
    for one in past.checkpoints():
        for spot in spots_of(one):
            if spot.codec in (codecs.PACKED, codecs.SPARSE):
                body = pack_of(GOLDEN_PACKED, "packed", spot).read_bytes()[spot.offset :]
                width, flags, shift, contexts = struct.unpack_from("<BBBH", body)
                found.add((spot.codec, spot.depth, width, flags & 1, shift < 255, contexts > 0))
    for codec, widths in ((codecs.PACKED, {1, 2, 4, 8}), (codecs.SPARSE, {1, 2, 4, 8})):
        assert {width for each, _, width, *_ in found if each == codec} == widths
        assert {tuple(rest) for each, _, _, *rest in found if each == codec} >= {(1, True, True), (0, False, False)}
    assert {depth for _, depth, *_ in found} == {1, 2}


@pytest.mark.parametrize("by", FORMS)
def test_the_golden_codes_are_what_is_written_now(tmp_path: Path, by: str) -> None:
    """Whatever form of the kernel runs, what is logical is the same; and the very bytes where it is the one in C."""
    with using(by), mock.patch("everystep.run.fingerprint", make.fixed_fingerprint):
        make.make_packed(str(tmp_path / "repo"))
        assert list(make.listing(str(tmp_path / "repo"))["packed"].values()) == list(
            make.listing(str(GOLDEN_PACKED))["packed"].values()
        )
    written, golden = Run(tmp_path / "repo", "packed").live, Run(GOLDEN_PACKED, "packed").live
    assert [one["logical"] for one in written] == [one["logical"] for one in golden]
    for one, other in zip(
        *(everystep.open(str(each))["packed"].checkpoints() for each in (tmp_path / "repo", GOLDEN_PACKED))
    ):
        for new, old in zip(spots_of(one), spots_of(other), strict=True):
            if by == KERNEL or codecs.SPARSE == new.codec == old.codec:
                assert stored(tmp_path / "repo", new) == stored(GOLDEN_PACKED, old)


def stored(folder: Path, spot: Spot) -> tuple[int, bytes]:
    """The codec of a chunk, and its bytes where they come from no zstd, of which there are several versions."""
    body = pack_of(folder, "packed", spot).read_bytes()[spot.offset : spot.offset + spot.length]
    return spot.codec, body if spot.codec in (codecs.RAW, codecs.PACKED, codecs.SPARSE) else b""


@pytest.mark.parametrize("run", ["tiny", "ranks", "deltas", make.KINDS, "packed"])
def test_the_reader_reads_the_golden_repositories(run: str) -> None:
    agree(GOLDEN_PACKED if run == "packed" else GOLDEN, run)


# the reader and ours agree -------------------------------------------------------------------------------------------


def agree(folder: Path, name: str) -> None:
    """Every checkpoint of a run: the whole state, each leaf, and attachments."""
    past, other = everystep.open(str(folder))[name], Run(folder, name)
    found = past.checkpoints(all=True)
    assert [one.id for one in found] == [commit["id"] for commit in other.live]
    for one in found:
        state, arrays = other.load(other.commits[one.id])
        opened = one._open()
        assert list(make.told(state)) == list(make.told(opened.build("")))
        assert set(arrays) == {leaf.path for view in opened.manifest.views for leaf in view.tree.leaves}
        for path, array in arrays.items():
            assert list(make.told(array)) == list(make.told(opened.build(path)))
    for attached in past.attachments:
        assert b"".join(map(other.read, other.attached[attached])) == past.attachment(attached)


def spots_of(one: Any) -> list[Spot]:
    """Where every chunk of a checkpoint lies, with what it leans on."""
    return [view.spot(index) for view in one._open().manifest.views for index in range(len(view.spots))]


def pack_of(folder: Path, run: str, spot: Spot) -> Path:
    return folder / "runs" / run / "packs" / spot.pack.writer / str(spot.pack.number)


def save_all(folder: Path, *states: Any, name: str = "run", settings: Any = SMALL, **metrics: Any) -> None:
    run = everystep.open(str(folder), settings=settings).run(name)
    for step, state in enumerate(states, 1):
        run.save(step, state=state, metrics=metrics).wait()
    run.close()


def _numpy_arrays() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    names = "?bhilqBHILQefdFD"
    return {
        "kinds": {char: rng.integers(0, 2, (3, 5)).astype(char) for char in names},
        "swapped": {char: rng.integers(0, 9, 7).astype(np.dtype(char).newbyteorder(">")) for char in "hiqefdFD"},
        "long": [rng.normal(size=3).astype("g"), (rng.normal(size=3) * 1j).astype("G")],
        "ml": {
            name: rng.integers(0, 2, 9).astype(getattr(ml_dtypes, name))
            for name in ("bfloat16", "float8_e4m3b11fnuz", "float8_e8m0fnu", "float6_e2m3fn", "float4_e2m1fn", "uint2")
        },
        "swapped ml": rng.normal(size=4).astype(np.dtype(ml_dtypes.bfloat16).newbyteorder(">")),
        "times": [np.array([1, 2], "m8[25us]"), np.array(["NaT"], ">M8[ns]"), np.zeros(2, "M8")],
        "text": [np.array([["ab", "ü"]]), np.array([b"a", b"bc"]), np.zeros((2, 0), "U3"), np.zeros(2, "V5")],
        "views": [np.arange(60).reshape(3, 4, 5)[::-1, ::2, 1:], np.asfortranarray(rng.normal(size=(30, 40)))],
        "shapes": [np.array(5), np.zeros((0,)), np.zeros((2, 0, 3), "f4"), np.zeros((1,) * 8)],
    }


def _structured() -> dict[str, Any]:
    nested = np.dtype([("x", "<f4", (2, 2)), ("in", [("y", "i1"), ("z", ml_dtypes.bfloat16)])], align=True)
    titled = np.dtype({"names": ["a", "b"], "titles": ["the a", "\ud800"], "formats": ["u1", ">c8"]})
    holes = np.dtype({"names": ["n", "\udcff"], "formats": ["<u2", "S3"], "offsets": [1, 8], "itemsize": 13})
    dtypes = {"nested": nested, "titled": titled, "holes": holes, "record": np.dtype((np.record, [("a", "<i4")]))}
    return {name: np.frombuffer(bytes(range(4 * d.itemsize)), d) for name, d in dtypes.items()}


def _trees() -> dict[Any, Any]:
    deep: Any = np.arange(3)
    for _ in range(40):
        deep = [deep]
    return {
        "deep": deep,
        "keys": {"": 1, "%": 2, "a/b": 3, "[0]": 4, "é": 5, "\udc80": 6, 0: 7, -1.5: 8, None: 9, (1, ("x",)): 10},
        "nan": {float("nan"): np.arange(2), float("-nan"): np.arange(3), (float("nan"),): np.arange(4)},
        "plain": [0, -1, 2**53, -(2**200), 1e-320, float("inf"), -0.0, complex(0, -0.0), b"", "", "\0", True],
        "empty": [{}, [], ()],
        "text": ["ü" * 3000, "\ud800" * 5000, bytes(range(256)) * 20],
        "tied": (lambda a: {"one": a, "two": [a, a], "part": a[:2]})(np.arange(500)),
    }


def _large() -> dict[str, Any]:
    """Chunks of items that do not divide them, items larger than a chunk, many small leaves of several roles."""
    rng = np.random.default_rng(1)
    return {
        "model": {f"w{i}": rng.normal(size=200 + i).astype("f4") for i in range(40)},
        "optimizer": {f"m{i}": np.zeros(200 + i, "f4") for i in range(40)},
        "odd": rng.integers(0, 255, 3000, "u1").view("S3").reshape(10, -1),
        "wide": rng.integers(0, 255, 5 * 5000, "u1").view("V5000"),
        "big": np.arange(100_000, dtype="<f8"),
    }


def _torch_tensors() -> dict[str, Any]:
    torch.manual_seed(0)
    x = torch.randn(6, 5, 4)
    bits = torch.randint(0, 1 << 15, (100,), dtype=torch.int16)
    return {
        "bfloat16": bits.view(torch.bfloat16),
        "half": bits.view(torch.float16),
        "views": [x.transpose(0, 2), x[::2, 1], x.expand(2, 6, 5, 4), x.flatten()[3:7], torch.tensor(3)],
        "lazy": [torch.view_as_complex(x[..., :2].contiguous()).conj(), torch.randn(4, dtype=torch.complex64).imag],
        "integers": {str(t): bits.to(t) for t in (torch.bool, torch.uint8, torch.int64, torch.uint16, torch.uint32)},
        "float8": x.flatten().to(torch.float8_e4m3fn),
        "sparse": [x[0].relu().to_sparse(), x[0].relu().to_sparse_csr()],
        "others": [torch.bfloat16, torch.Size([3]), torch.device("cpu"), torch.strided, torch.nn.Parameter(x)],
        "empty": torch.zeros(0, 4),
        "tied": {"one": x, "two": x},
    }


STATES = {f.__name__.strip("_"): f for f in (_numpy_arrays, _structured, _trees, _large, _torch_tensors)}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
@pytest.mark.parametrize("settings", [everystep.Settings(), SMALL], ids=["default", "small"])
def test_states_of_every_sort(tmp_path: Path, state: Callable[[], Any], settings: everystep.Settings) -> None:
    made = state()
    save_all(tmp_path, made, settings=settings)
    agree(tmp_path, "run")
    if state is not _torch_tensors:
        assert list(make.told(everystep.open(str(tmp_path))["run"].at(1).load())) == list(make.told(made))


@pytest.mark.parametrize("state", [np.arange(5), [], {}, 7, None, "x", (1, {"a": np.ones(2)})], ids=repr)
def test_a_state_need_not_be_a_dict(tmp_path: Path, state: Any) -> None:
    if state is None:
        with pytest.raises(everystep.UsageError):
            save_all(tmp_path, state)
    else:
        save_all(tmp_path, state)
        agree(tmp_path, "run")


def test_checkpoints_that_refer_to_earlier_ones(tmp_path: Path) -> None:
    w = np.arange(20_000, dtype="<f4")
    states = []
    for step in range(6):
        w[100 * step] += 1
        states.append({"w": w.copy(), "still": np.arange(3000), "step": min(step, 3)})
    save_all(tmp_path, *states)
    agree(tmp_path, "run")
    packs = {place[0] for one in Run(tmp_path, "run").commits.values() for place in one["packs"]}
    stored = sum(path.stat().st_size for path in (tmp_path / "runs" / "run" / "packs").rglob("*") if path.is_file())
    assert len(packs) == 1 and stored < 6 * w.nbytes / 2, "later checkpoints refer to chunks of the first"


def test_tables_of_more_than_one_page(tmp_path: Path) -> None:
    w = np.zeros((5000, 4096), "u1")
    w[:, :2] = np.arange(5000, dtype="<u2").view("u1").reshape(-1, 2)
    again = w.copy()
    again[0] = 1
    save_all(tmp_path, w, again)
    agree(tmp_path, "run")


@pytest.mark.parametrize("name", ["a", "größe/1.x", ".hidden", "..", "a b%2F~", "\ud800", "x" * 180])
def test_names_of_runs(tmp_path: Path, name: str) -> None:
    save_all(tmp_path, np.arange(3), name=name)
    agree(tmp_path, name)


METRICS = {"a": 1e-7, "b": 1e16, "c": 1.5e-5, "d": 1e300, "e": -0.0, "f": float("nan"), "g": 1 << 70, "h": None}


def test_metrics_whose_numbers_json_writers_write_differently(tmp_path: Path) -> None:
    save_all(tmp_path, np.arange(3), **METRICS, text='"parts":[{"rank":\n\x7fé\u2028', odd="\udc80", flag=True)
    agree(tmp_path, "run")


def test_several_ranks(tmp_path: Path) -> None:
    make.make_ranks(str(tmp_path))
    agree(tmp_path, "ranks")


def test_boxes_of_many_ranks_that_overlap(tmp_path: Path) -> None:
    whole = np.arange(7 * 6 * 5, dtype="<i4").reshape(7, 6, 5)
    cuts = [np.s_[0:4, :, 0:3], np.s_[0:4, :, 2:5], np.s_[4:7, 0:6, :]]
    _save_by_ranks(
        tmp_path,
        lambda rank, step: {
            "w": everystep.Part(whole[cuts[rank]] + step, [cut.start or 0 for cut in cuts[rank]], whole.shape),
            "none": everystep.Part(whole[:0], (0, 0, 0), (0, 6, 5)),
            "rank": {str(rank): rank},
        },
        ranks=3,
    )
    agree(tmp_path, "run")
    other = Run(tmp_path, "run")
    for commit in other.live:
        assert np.array_equal(other.load(commit)[0]["state"]["w"], whole + commit["step"])


def test_deltas_of_many_ranks_and_a_step_that_is_saved_twice(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    start, moves = rng.normal(size=(2, 3000)), 1e-4 * rng.normal(size=(2, 3000))
    _save_by_ranks(
        tmp_path,
        lambda rank, step: {"w": everystep.Part((start + step * moves)[rank : rank + 1], (rank, 0), (2, 3000))},
        ranks=2,
        steps=(1, 2, 2, 3),
    )
    agree(tmp_path, "run")
    found = everystep.open(str(tmp_path))["run"].checkpoints()
    assert [one.step for one in found] == [1, 2, 3]
    for rank in range(2):
        assert {view.spot(0).depth for view in [one._open().manifest.views[rank] for one in found]} == {0, 1, 2}
    abandoned = [event for event in events_of(tmp_path) if event["type"] == "abandon"]
    assert [(event["step"], event["missing"], event["instead"]) for event in abandoned] == [(2, [], found[1].id)]


def events_of(folder: Path) -> list[dict[str, Any]]:
    records = sorted((folder / "runs" / "run" / "log").iterdir())
    return [event for path in records for event in json.loads(path.read_bytes().partition(b"\n")[0])["events"]]


def _save_by_ranks(folder: Path, state: Callable[[int, int], Any], ranks: int, steps: Sequence[int] = (1, 2)) -> None:
    patient = dataclasses.replace(SMALL, rank_deadline_seconds=30, poll_seconds=0.01)
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            run = everystep.open(str(folder), settings=patient).run("run", rank=rank, ranks=ranks, launch="one")
            run.track(rng=False)
            for step in steps:
                run.save(step, state=state(rank, step)).wait()
            run.close()
        except BaseException as error:  # noqa: BLE001  a thread's error must fail the test
            errors.append(error)

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_attachments_and_everything_else_that_a_log_holds(tmp_path: Path) -> None:
    repo = everystep.open(str(tmp_path), settings=SMALL)
    for term in range(3):
        with repo.run("run", config={"term": term}) as run:
            run.attach("empty", b"")
            run.attach("large", bytes(range(256)) * 40_000)
            start = run.resume()
            for step in range(start + 1, start + 3):
                run.record(step=step, loss=1 / step)
                saved = run.save(step, state={"w": np.full(3, step)}).wait()
            saved.tag(f"end{term}").record(late=1.5)
            repo["run"].note(f"term {term}")
    agree(tmp_path, "run")
    assert [one.step for one in repo["run"].checkpoints()] == [1, 2, 3, 4, 5, 6]


def test_retired_and_restored_checkpoints(tmp_path: Path) -> None:
    save_all(tmp_path, *(np.full(3, step) for step in range(5)))
    past = everystep.open(str(tmp_path))["run"]
    ids = [one.id for one in past.checkpoints()]
    log = past._vault.log
    log.append(lambda history: [Retire(ids[2:], "test")], "test")
    log.append(lambda history: [Restore([ids[3]]), Abandon("nobody", 1, 9, [0])], "test")
    agree(tmp_path, "run")
    assert Run(tmp_path, "run").live[-1]["step"] == 4
    assert [one.step for one in past.checkpoints()] == [1, 2, 4]


def test_a_run_that_trains_a_module_by_batches(tmp_path: Path) -> None:
    _train(tmp_path, stop_at=5)
    _train(tmp_path, stop_at=None)
    agree(tmp_path, "run")
    state, arrays = Run(tmp_path, "run").load(Run(tmp_path, "run").live[-1])
    assert {"model", "optimizer", "rng", "loop"} <= set(state)
    assert set(state["optimizer"]) >= {"state", "groups", "shapes"}
    assert "optimizer/state/model.0.weight/exp_avg" in arrays


def _train(folder: Path, stop_at: int | None) -> None:
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.1), torch.nn.Linear(8, 1)).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    data = torch.utils.data.TensorDataset(torch.randn(16, 4, dtype=torch.bfloat16))
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
    with everystep.open(str(folder)).run("run") as run:
        run.track(model=model, optimizer=optimizer, scheduler=scheduler)
        for (x,) in run.batches(loader, epochs=2, save_on=everystep.every(1)):
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            run.record(loss=loss)
            if run.step == stop_at:
                run.stop()


# chunks that lean on others ------------------------------------------------------------------------------------------


def _drifting(steps: int) -> Iterator[dict[str, Any]]:
    """Weights that move at each step, some that move at every third, and some that never do."""
    rng = np.random.default_rng(3)
    fast, slow = rng.normal(size=3000).astype("<f4"), rng.normal(size=600)
    for step in range(steps):
        fast += (1e-4 * rng.normal(size=3000)).astype("<f4")
        slow += 1e-5 * rng.normal(size=600) * (step % 3 == 0)
        half = fast[:700].astype(ml_dtypes.bfloat16)
        yield {"fast": fast.copy(), "slow": slow.copy(), "half": half, "still": np.arange(700), "count": step}


@pytest.mark.parametrize("most", [0, 1, 2, 8])
def test_chains_of_deltas_among_references(tmp_path: Path, most: int) -> None:
    save_all(tmp_path, *_drifting(13), settings=dataclasses.replace(SMALL, base_depth_max=most))
    agree(tmp_path, "run")
    found = [spots_of(one) for one in everystep.open(str(tmp_path))["run"].checkpoints()]
    assert [max(spot.depth for spot in spots) for spots in found[: most + 1]] == list(range(most + 1))
    assert max(spot.depth for spots in found for spot in spots) == most
    for spot in [spot for spots in found for spot in spots]:
        assert [link.depth for link in spot.links()] == list(range(spot.depth, -1, -1))
        assert [link.codec in codecs.LEANING for link in spot.links()] == [True] * spot.depth + [False]
    before = {(spot.pack, spot.offset) for spot in found[0]}
    for spots in found[1:]:
        places = {(spot.pack, spot.offset) for spot in spots}
        assert places & before and places - before, "some chunks are those of the checkpoint before, and some are new"
        before = places


def test_a_run_that_is_resumed_keeps_the_chains_of_what_it_refers_to(tmp_path: Path) -> None:
    states = list(_drifting(8))
    for part in (states[:4], states[4:]):
        with everystep.open(str(tmp_path), settings=SMALL).run("run") as run:
            for step, state in enumerate(part, run.resume() + 1):
                run.save(step, state=state).wait()
    agree(tmp_path, "run")
    checkpoints = everystep.open(str(tmp_path))["run"].checkpoints()
    last, first = (spots_of(one) for one in checkpoints[3:5])
    shared = [spot for spot in first if spot in last]
    assert len(shared) < len(first) and max(spot.depth for spot in shared) > 0


def _hurt(load: Callable[[Any], Any], what: Any, *kinds: type[Exception]) -> bool:
    try:
        load(what)
    except kinds:
        return True
    return False


def test_a_damaged_base_hurts_exactly_what_leans_on_it(tmp_path: Path) -> None:
    save_all(tmp_path, *_drifting(11), settings=SMALL)
    repo, other = everystep.open(str(tmp_path)), Run(tmp_path, "run")
    found = {one.step: one._open() for one in repo["run"].checkpoints()}
    leaning: dict[Spot, set[tuple[int, str]]] = {}
    for step, opened in found.items():
        (view,) = opened.manifest.views
        for region in view.layout.regions:
            for index in view.layout.chunks_of(region):
                for link in view.spot(index).links():
                    leaning.setdefault(link, set()).add((step, view.tree.leaves[region.leaf].path))
    leaves = {(step, leaf.path) for step, opened in found.items() for leaf in opened.tree.leaves}
    for spot in random.Random(1).sample(sorted(leaning), examples(16)):
        path = pack_of(tmp_path, "run", spot)
        body, end = path.read_bytes(), spot.offset + spot.length
        path.write_bytes(body[: spot.offset] + bytes(255 - byte for byte in body[spot.offset : end]) + body[end:])
        hurt = {(step, leaf) for step, leaf in leaves if _hurt(found[step].build, leaf, everystep.Damaged)}
        assert hurt == leaning[spot]
        steps = {step for step, _ in hurt}
        assert {one["step"] for one in other.live if _hurt(other.load, one, *REFUSALS)} == steps
        assert {checked.step for checked in repo.check().checked if not checked.whole} == steps
        path.write_bytes(body)
    assert repo.check().ok


def test_the_reader_decodes_the_example_of_codes() -> None:
    text = (HERE.parent / "docs" / "format.md").read_text(encoding="utf-8")
    block = text.split("against a base of integers of two bytes, are 14 bytes:", 1)[1].split("```")[1]
    body = bytes.fromhex("".join(line.split("  ")[0] for line in block.splitlines()))
    base = np.array([7, 0, 65535, 100], "<u2")
    data = (base + np.array([2, 65535, 0, 0], "<u2")).tobytes()
    assert len(body) == 14 and decode(codecs.PACKED, body, 8, base.tobytes()) == data
    assert bytes(codecs.decode(codecs.PACKED, memoryview(body), 8, base.view(np.uint8))) == data
    for by in FORMS:
        made = packed_by(by, np.frombuffer(data, np.uint8), base.view(np.uint8), Form(2, False, 255))
        assert made == body


@pytest.mark.parametrize("count", [0, 1, 5, 511, 512, 513, 1023, 1024, 1025, 5000, 70_001])
@pytest.mark.parametrize("form", ONE_OF_A_FORM, ids=str)
def test_the_reader_decodes_codes_of_every_form(form: Form, count: int) -> None:
    chance = np.random.default_rng(count)
    base = chance.integers(0, 256, count * form.width, "u1")
    data = base.copy()
    words = data.view(f"<u{form.width}")
    for share, bits in ((0.0, 1), (0.05, 4), (0.5, 6), (1.0, 8 * form.width - 1)):
        where = np.flatnonzero(chance.random(count) < share)
        words[where] += chance.integers(0, 1 << bits, where.size).astype(words.dtype)
        for codec, body in forced(data, base, form, FORMS):
            assert decode(codec, body, data.nbytes, base.tobytes()) == data.tobytes()


@pytest.mark.parametrize("dtype", ONE_OF_A_FORM.values())
def test_the_reader_refuses_damaged_codes_or_reads_as_ours_does(dtype: str) -> None:
    data = encodings.made(dtype, 100, 1)
    base = encodings.changed(data, dtype, "near", 1)
    chance = random.Random(1)
    for codec, body in forced(data, base, delta.form_of(dtype, data.nbytes), FORMS):
        ends = set()
        for flip in chance.sample(range(8 * len(body)), min(examples(200), 8 * len(body))):
            broken = bytearray(body)
            broken[flip // 8] ^= 1 << flip % 8
            ours = theirs = None
            with suppress(everystep.Damaged):
                ours = bytes(codecs.decode(codec, memoryview(broken), data.nbytes, base))
            with suppress(*REFUSALS):
                theirs = decode(codec, bytes(broken), data.nbytes, base.tobytes())
            assert ours == theirs, flip
            ends.add(ours is None)
        assert ends == {True, False}


@pytest.mark.parametrize("count", [1, 5, 70_001])
@pytest.mark.parametrize("grouped", [False, True], ids=["plain", "grouped"])
@pytest.mark.parametrize("dtype", ["<f2", "bfloat16", "<f4", "<f8", "float8_e5m2", "<i2", "<u4", "<i8", "|u1"])
def test_the_reader_decodes_every_form_of_delta(dtype: str, grouped: bool, count: int) -> None:
    """More words than the encoder takes at a time, of bits that mean anything, moved a little and a lot."""
    form = delta.form_of(dtype, count * parse(dtype).itemsize)
    rng = np.random.default_rng(count)
    base = rng.integers(0, 256, count * form.width, "u1")
    data = base.copy()
    data[:: form.width] += rng.integers(0, 4, count, "u1")
    data[:: 7 * form.width] = 255
    shift = max(8 * form.width - 9, 0) if grouped and form.shift == delta.UNGROUPED else form.shift
    form = form._replace(shift=shift if grouped else delta.UNGROUPED)
    pieces = delta.encode(data, base, form, 1, 256, 1.0)
    if pieces is None:
        assert form.width == 1 or count < 9, "nothing to gain"
        return
    assert decode(codecs.DELTA, b"".join(map(bytes, pieces)), data.nbytes, base.tobytes()) == data.tobytes()


# what a reader refuses -----------------------------------------------------------------------------------------------


def test_no_changed_byte_gives_other_values(tmp_path: Path) -> None:
    """Any byte of any file: the reader refuses, or the byte was not needed and the values are the same."""
    shutil.copytree(GOLDEN, tmp_path / "repo")
    files = [tmp_path / "repo" / "format.json"]
    files += sorted(path for path in (tmp_path / "repo" / "runs" / "tiny").rglob("*") if path.is_file())
    truth, refused = _all_values(tmp_path / "repo"), set()
    chance = random.Random(5)
    for path in files:
        body = path.read_bytes()
        for at in sorted(chance.sample(range(len(body)), min(examples(25), len(body)))):
            path.write_bytes(body[:at] + bytes([body[at] ^ (1 << chance.randrange(8))]) + body[at + 1 :])
            try:
                assert _all_values(tmp_path / "repo") == truth
            except REFUSALS:
                refused.add(path)
        path.write_bytes(body)
    assert refused == set(files)


def _all_values(folder: Path) -> list[list[str]]:
    run = Run(folder, "tiny")
    return [list(make.told(run.load(commit)[0])) for commit in run.commits.values()]


def test_swapped_records_runs_and_packs_are_seen(tmp_path: Path) -> None:
    save_all(tmp_path, np.arange(3), np.arange(4), name="one")
    save_all(tmp_path, np.arange(3), np.arange(4), name="two")
    one, two = tmp_path / "runs" / "one", tmp_path / "runs" / "two"
    one.rename(tmp_path / "runs" / "three")
    with pytest.raises(ValueError):
        Run(tmp_path, "three")
    (tmp_path / "runs" / "three").rename(one)
    first, second = (two / "log" / f"{slot:020d}" for slot in (1, 2))
    body = first.read_bytes()
    first.write_bytes(second.read_bytes())
    with pytest.raises(ValueError):
        Run(tmp_path, "two")
    first.write_bytes(body)
    second.unlink()
    with pytest.raises(ValueError):
        Run(tmp_path, "two")


def _add_record(folder: Path, slot: int, **changes: Any) -> None:
    log = folder / "runs" / "run" / "log"
    before = (log / f"{slot - 1:020d}").read_bytes().partition(b"\n")[0]
    record = {**json.loads(before), "seq": slot, "prev": blake3(before).hexdigest(), "events": [], **changes}
    (log / f"{slot:020d}").write_bytes(pack_lines(record))


def test_readers_skip_events_and_fields_that_they_do_not_know(tmp_path: Path) -> None:
    save_all(tmp_path, np.arange(3))
    slot = len(list((tmp_path / "runs" / "run" / "log").iterdir()))
    known = {"type": "tag", "name": "t", "id": None, "colour": "blue"}
    _add_record(tmp_path, slot, events=[{"type": "not yet invented", "id": 5}, known], signed_by="nobody")
    agree(tmp_path, "run")
    with pytest.raises(everystep.RunTakenOver, match="not yet invented"):
        save_all(tmp_path, np.arange(4))


def test_a_fenced_or_repeated_commit_counts_for_nothing(tmp_path: Path) -> None:
    save_all(tmp_path, np.arange(3))
    other = Run(tmp_path, "run")
    slot = len(list((tmp_path / "runs" / "run" / "log").iterdir()))
    commit = other.live[-1]
    _add_record(tmp_path, slot, term=5)
    fenced = {**commit, "id": "fenced", "ordinal": 7}
    _add_record(tmp_path, slot + 1, term=4, events=[fenced])
    _add_record(tmp_path, slot + 2, term=5, events=[{**commit, "id": "repeated"}])
    assert list(Run(tmp_path, "run").commits) == [commit["id"]]
    with pytest.warns(everystep.DamageWarning):
        assert [one.id for one in everystep.open(str(tmp_path))["run"].checkpoints(all=True)] == [commit["id"]]


def test_a_record_behind_a_damaged_one_chains_to_nothing(tmp_path: Path) -> None:
    save_all(tmp_path, np.arange(3))
    slot = len(list((tmp_path / "runs" / "run" / "log").iterdir()))
    damaged = tmp_path / "runs" / "run" / "log" / f"{slot - 1:020d}"
    body = damaged.read_bytes()
    damaged.write_bytes(body.replace(b"close", b"clove"))
    with pytest.warns(everystep.DamageWarning), everystep.open(str(tmp_path)).run("run") as run:
        run.resume()
        run.save(5, state=np.arange(5)).wait()
    with pytest.raises(ValueError):
        Run(tmp_path, "run")
    damaged.write_bytes(body)
    agree(tmp_path, "run")
    assert Run(tmp_path, "run").live[-1]["step"] == 5


@pytest.mark.parametrize("change", [{"version": 2}, {"features": ["encrypted"]}, {"format": "other"}])
def test_another_format_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    save_all(tmp_path, np.arange(3))
    body = json.loads((tmp_path / "format.json").read_bytes().partition(b"\n")[0])
    (tmp_path / "format.json").write_bytes(pack_lines({**body, **change}))
    with pytest.raises(ValueError):
        Run(tmp_path, "run")
    with pytest.raises(everystep.ForeignRepository):
        everystep.open(str(tmp_path))


@pytest.mark.parametrize("bytes_max", [4095, (1 << 30) + 1, 5000.0, True, float("nan")])
def test_chunks_that_no_reader_would_take_are_not_written(tmp_path: Path, bytes_max: Any) -> None:
    with pytest.raises(everystep.UsageError, match="chunk_bytes_max"):
        everystep.open(str(tmp_path), settings=everystep.Settings(chunk_bytes_max=bytes_max))


@pytest.mark.parametrize("shape, dtype", [((10**13,), "u1"), ((10**6,) * 3, "V0"), ((1 << 62, 2), "f8")])
def test_a_shape_takes_no_memory_before_somebody_holds_it(tmp_path: Path, shape: tuple[int, ...], dtype: str) -> None:
    part = everystep.Part(np.zeros((1,) * len(shape), dtype), (0,) * len(shape), shape)
    save_all(tmp_path, {"w": part})
    with pytest.raises(everystep.Damaged, match="the ranks hold 1 of"):
        everystep.open(str(tmp_path))["run"].at(1).load()


# forged placements ---------------------------------------------------------------------------------------------------

NO_BASE = 0xFFFFFFFF
ROW = struct.Struct("<IQIBBI")


@dataclasses.dataclass
class Forged:
    """A part's placement with its tables unrolled: [pack, offset, length, codec, depth, base] of each chunk."""

    packs: list[list[Any]]
    spots: list[list[int]]
    bases: list[list[int]]
    hashes: list[bytes]

    @property
    def deep(self) -> list[int]:
        """A chunk with more than one base behind it."""
        return next(row for row in self.spots if row[4] > 1)

    @property
    def base(self) -> list[int]:
        """The base of that chunk."""
        return self.bases[self.deep[5]]


def _rewrite_commit(folder: Path, **changes: Any) -> None:
    """Puts another event into the last commit's record; what came after it is dropped."""
    *_, record, last = sorted((folder / "runs" / "run" / "log").iterdir())
    last.unlink()
    body = json.loads(record.read_bytes().partition(b"\n")[0])
    body["events"][-1].update(changes)
    record.write_bytes(pack_lines(body))


def _forge(folder: Path, change: Callable[[Forged], None]) -> None:
    """Places the newest checkpoint anew, as `change` leaves it: all hashes are right, and what is logical stays."""
    run = Run(folder, "run")
    commit = run.live[-1]
    root, places = run.read(commit["root"]).split(b"\n")
    (where,) = json.loads(places)
    logical, body = run.read(where, commit["root"]).split(b"\n")
    part = json.loads(body)
    for name in set(part) - {"packs"}:
        part[name] = [page if page[0] else [*commit["root"][:2], *page[2:]] for page in part[name]]
    tables = [b"".join(map(run.read, part[name])) for name in ("spots", "bases", "base_hashes")]
    spots, bases = ([list(row) for row in ROW.iter_unpack(table)] for table in tables[:2])
    forged = Forged(part["packs"], spots, bases, [tables[2][at : at + 32] for at in range(0, len(tables[2]), 32)])
    change(forged)
    writer, pack = "f" * 32 + "-1", bytearray(b"EVERYSTEP-PACK-1")

    def add(body: bytes) -> list[Any]:
        place = [writer, 0, len(pack), len(body), len(body), 0, blake3(body).hexdigest()]
        pack.extend(body)
        return place

    part["spots"] = [add(b"".join(ROW.pack(*row) for row in forged.spots))]
    part["bases"] = [add(b"".join(ROW.pack(*row) for row in forged.bases))]
    part["base_hashes"] = [add(b"".join(forged.hashes))]
    place = add(logical + b"\n" + json.dumps(part).encode())
    place = add(root + b"\n" + json.dumps([place]).encode())
    path = folder / "runs" / "run" / "packs" / writer / "0"
    path.parent.mkdir()
    path.write_bytes(pack)
    _rewrite_commit(folder, root=place, packs=[*commit["packs"], [writer, 0, 0]])


def _put(row: list[Any], at: int | slice, value: Any) -> None:
    row[at] = value


def _deepen(forged: Forged, depth: int) -> None:
    """Chains of this length behind chunks with one base: all links but the first are that base once more."""
    leaning = [row for row in forged.spots if row[4] == 1]
    for row in leaning:
        base = row[5]
        for at in range(1, depth):
            forged.bases.append([*forged.bases[base][:4], at, base if at == 1 else len(forged.bases) - 1])
            forged.hashes.append(forged.hashes[base])
        row[4:] = [depth, len(forged.bases) - 1]
    assert leaning


@pytest.mark.parametrize("change", [lambda forged: None, lambda forged: _deepen(forged, 64)], ids=["same", "64 deep"])
def test_a_placement_may_be_written_anew(tmp_path: Path, change: Callable[[Forged], None]) -> None:
    *before, last = _drifting(4)
    save_all(tmp_path, *before, last, settings=SMALL)
    logical = Run(tmp_path, "run").live[-1]["logical"]
    _forge(tmp_path, change)
    agree(tmp_path, "run")
    assert Run(tmp_path, "run").live[-1]["logical"] == logical
    assert list(make.told(everystep.open(str(tmp_path))["run"].at(4).load())) == list(make.told(last))


HOSTILE: dict[str, Callable[[Forged], Any]] = {
    "a base that leans on itself": lambda forged: _put(forged.base, 5, forged.deep[5]),
    "a base that is the chunk itself": lambda forged: _put(forged.base, slice(4), forged.deep[:4]),
    "a longer chain than it is": lambda forged: _put(forged.deep, 4, forged.deep[4] + 1),
    "a shorter chain than it is": lambda forged: _put(forged.deep, 4, 1),
    "a chain of 65": lambda forged: _deepen(forged, 65),
    "a chain of 255": lambda forged: _deepen(forged, 255),
    "a depth without a base": lambda forged: _put(forged.deep, 5, NO_BASE),
    "a base without a depth": lambda forged: _put(forged.deep, 4, 0),
    "a base that is not listed": lambda forged: _put(forged.deep, 5, len(forged.bases)),
    "a delta that leans on nothing": lambda forged: _put(forged.deep, slice(4, 6), [0, NO_BASE]),
    "a base in a pack that is not listed": lambda forged: _put(forged.base, 0, len(forged.packs)),
    "a base in a pack that is not there": lambda forged: _put(forged.packs[forged.base[0]], 1, 10**9),
    "a base behind the end of its pack": lambda forged: _put(forged.base, 1, 1 << 62),
    "a base of another length": lambda forged: _put(forged.base, slice(4), forged.spots[-1][:4]),
    "a base of an unknown codec": lambda forged: _put(forged.base, 3, 77),
    "a base without a hash": lambda forged: forged.hashes.pop(),
    "a hash without a base": lambda forged: forged.hashes.append(bytes(32)),
    "a chunk without a place": lambda forged: forged.spots.pop(),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_chain_is_damage(tmp_path: Path, change: Callable[[Forged], Any]) -> None:
    save_all(tmp_path, *_drifting(4), settings=SMALL)
    _forge(tmp_path, change)
    repo, other = everystep.open(str(tmp_path)), Run(tmp_path, "run")
    with pytest.raises(everystep.Damaged):
        repo["run"].at(4).load()
    with pytest.raises(REFUSALS):
        other.load(other.live[-1])
    assert [checked.step for checked in repo.check().checked if not checked.whole] == [4]
    for commit in other.live[:-1]:
        loaded = repo["run"].at(commit["step"]).load()
        assert list(make.told(loaded)) == list(make.told(other.load(commit)[0]["state"]))


def test_a_base_of_another_hash_is_damage_that_a_load_does_not_need_to_see(tmp_path: Path) -> None:
    """The chunk's own hash vouches for its bytes. What would be written against such a base is another matter."""
    *before, last = _drifting(4)
    save_all(tmp_path, *before, last, settings=SMALL)
    _forge(tmp_path, lambda forged: _put(forged.hashes, forged.deep[5], bytes(32)))
    repo = everystep.open(str(tmp_path))
    checkpoint = repo["run"].at(4)
    assert list(make.told(checkpoint.load())) == list(make.told(last))
    assert [checked.step for checked in repo.check().checked if not checked.whole] == [4]
    view = checkpoint._vault.manifest(checkpoint._commit).views[0]
    deepest = max(range(len(view.layout.chunks)), key=lambda index: view.spot(index).depth)
    with pytest.raises(everystep.Damaged, match="a chunk is not what was saved"):
        checkpoint._vault.read_chunk(view.spot(deepest), view.layout.chunks[deepest].nbytes)


@pytest.mark.parametrize(
    "change",
    [{"step": 9}, {"parent": None}, {"metrics": {"loss": 0.5}}, {"id": "0" * 16}, {"logical": "0" * 64}],
    ids=lambda change: next(iter(change)),
)
def test_a_commit_that_says_other_than_its_root(tmp_path: Path, change: dict[str, Any]) -> None:
    save_all(tmp_path, np.arange(3), np.arange(4), loss=0.25)
    _rewrite_commit(tmp_path, **change)
    other = Run(tmp_path, "run")
    with pytest.raises(everystep.Damaged, match="not the one that was committed"):
        everystep.open(str(tmp_path))["run"].checkpoints()[-1].load()
    with pytest.raises(ValueError):
        other.load(other.live[-1])
