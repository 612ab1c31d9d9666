"""Old files into a run, checkpoints into files of others: nothing runs, every bit comes along, files appear whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from _exchange import OnlyReading, Trained, imported, plain_loop, save, skipped, survey, weights
from _formats import check, random_tensor, raw
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import everystep
from everystep import exchange
from everystep.errors import Conflict, Damaged, NotFound, StorageFull, Unsupported, UsageError
from everystep.seam import Files, Seam

# import --------------------------------------------------------------------------------------------------------------


class Hostile:
    """A pickle that would run a command in whoever loads it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


class Evaluated(Hostile):
    def __reduce__(self) -> Any:
        return eval, (f"open({str(self.mark)!r}, 'w')",)


WATCH = """
import sys
from pathlib import Path
from everystep import exchange
from everystep.seam import Seam
seen = []
sys.addaudithook(lambda event, args: seen.append(event))
found = exchange.survey(sys.argv[1])
for one, got in exchange.each(found):
    print(one.step, *got.not_understood)
for one in found.skipped:
    print(Path(one.path).name, one.why)
never = {"os.system", "subprocess.Popen", "pickle.find_class", "os.exec", "os.posix_spawn", "socket.connect"}
sys.exit("it ran: " + ", ".join(never & set(seen)) if never & set(seen) else 0)
"""


def test_nothing_in_a_file_runs_and_what_would_have_is_listed(tmp_path: Path) -> None:
    old, mark = tmp_path / "old", tmp_path / "mark"
    for step, way in ((1, True), (2, False)):
        state = {"step": step, "model": weights(step), "a": Hostile(mark), "deep": [{"b": Evaluated(mark)}]}
        old.mkdir(exist_ok=True)
        torch.save(state, old / f"{step}.pth", _use_new_zipfile_serialization=way)
    save(Hostile(mark), old / "whole.pth")
    done = subprocess.run([sys.executable, "-c", WATCH, str(old)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    system = "posix.system" if os.name == "posix" else "nt.system"
    listed = f"a: {system} deep/[0]/b: __builtin__.eval"
    assert done.stdout.splitlines() == [
        f"1 {listed}",
        f"2 {listed}",
        f"whole.pth the file is one object of the class {system}, which only its program can build",
    ]
    assert not mark.exists()
    for step, got in imported(old).items():
        check({"step": step, "model": weights(step), "deep": [{}]}, got.state)


def test_what_only_code_could_build_is_listed_and_the_rest_comes_in(tmp_path: Path) -> None:
    save({"epoch": 3, "model": Trained().model, "optimizer": Trained().optimizer.state_dict()}, tmp_path / "a.pth")
    got = imported(tmp_path)[3]
    assert got.not_understood == ["model: torch.nn.modules.container.ModuleDict"]
    assert got.state.keys() == {"epoch", "optimizer"}


def test_what_has_another_form_now_is_noted(tmp_path: Path) -> None:
    save({"step": 1, "shape": torch.Size([2, 3]), "seen": {1, 2}}, tmp_path / "a.pth")
    assert imported(tmp_path)[1].notes == ["shape: a torch.Size is a tuple here", "seen: a set is a list here"]


def test_a_file_that_is_damaged_in_its_arrays_is_an_error_of_its_own(tmp_path: Path) -> None:
    kept = plain_loop(tmp_path, 4)
    path = tmp_path / "checkpoint_2.pth"
    data = bytearray(path.read_bytes())
    data[data.index(raw(kept[2]["model_state_dict"]["a.weight"]))] ^= 1
    path.write_bytes(data)
    answers = {one.step: got for one, got in exchange.each(survey(tmp_path), Seam(OnlyReading()))}
    error = answers.pop(2)
    assert isinstance(error, Damaged) and "checkpoint_2.pth" in error.where
    for epoch, got in answers.items():
        assert isinstance(got, exchange.Imported)
        check(kept[epoch], got.state)


@pytest.mark.parametrize("kind", ["states", "deltas"])
def test_memory_holds_two_states_however_many_files_there_are(tmp_path: Path, kind: str) -> None:
    mib = 8
    for number in range(10):
        name = "delta_weights_epoch_{}.pth" if kind == "deltas" and number else "weights_epoch_{}.pth"
        state = {f"w{n}": torch.full(((mib << 20) // 4 // 8,), float(number)) for n in range(8)}
        save(state, tmp_path / name.format(number))
    tracemalloc.start()
    try:
        total = 0.0
        for _, got in exchange.each(survey(tmp_path), Seam()):
            assert isinstance(got, exchange.Imported)
            total += float(got.state["w0"][0])
        peak = tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()
    assert total == (sum(range(10)) if kind == "states" else sum(sum(range(n + 1)) for n in range(10)))
    assert peak < mib * 2.5, f"{peak:.1f} MiB for states of {mib} MiB"


# export --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def work() -> Trained:
    made = Trained()
    made.step()
    return made


def opened(folder: Path, *, step: int = 7, **saved: Any) -> Any:
    """A checkpoint, as the door opens it."""
    repo = everystep.open(str(folder))
    run = repo.run("r")
    if "state" not in saved:
        run.track(**saved)
    checkpoint = run.save(step, state=saved.get("state"), metrics={"val_loss": 0.5}).wait()
    run.close()
    return checkpoint._open()  # type: ignore[union-attr]


def same_weights(model: nn.Module, got: dict[str, torch.Tensor]) -> None:
    expected = model.state_dict()
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert (got[name].dtype, got[name].shape, raw(got[name])) == (value.dtype, value.shape, raw(value)), name


@pytest.mark.parametrize("ending", ["pth", "pt", "ckpt"])
def test_a_model_goes_to_torch_and_back_bit_for_bit(tmp_path: Path, work: Trained, ending: str) -> None:
    source = opened(tmp_path / "repo", model=work.model, optimizer=work.optimizer)
    written = exchange.export(source, tmp_path / f"model.{ending}", only="model")
    assert written.nbytes == (tmp_path / f"model.{ending}").stat().st_size
    got = torch.load(tmp_path / f"model.{ending}", weights_only=True)
    same_weights(work.model, got)
    fresh = Trained(1).model
    fresh.load_state_dict(got)
    same_weights(fresh, work.model.state_dict())


def test_a_whole_checkpoint_goes_to_torch(tmp_path: Path, work: Trained) -> None:
    source = opened(tmp_path / "repo", model=work.model, optimizer=work.optimizer)
    exchange.export(source, tmp_path / "all.pth")
    got = torch.load(tmp_path / "all.pth", weights_only=True)
    assert set(got) == {"model", "optimizer", "rng"}
    same_weights(work.model, got["model"])
    assert torch.equal(got["rng"]["torch"], torch.get_rng_state())


@pytest.mark.parametrize("ending", ["pth", "npz", "safetensors"])
def test_every_format_gives_the_state_back_when_it_is_imported(tmp_path: Path, ending: str) -> None:
    torch.manual_seed(0)
    state = {
        "model": {"fc.weight": torch.randn(3, 2), "half": random_tensor(torch.bfloat16, 5), "a/b": torch.tensor(2.5)},
        "optimizer": {"state": {0: {"m": torch.randn(3, 2), "step": 3}}, "param_groups": [{"betas": (0.9, 0.99)}]},
        "epoch": 4, "note": None, "empty": [], "mask": torch.tensor([True, False]),
        "eight": random_tensor(torch.float8_e5m2, 3), "big": 2**70, "nan": float("nan"),
    }  # fmt: skip
    path = tmp_path / f"state_step_9.{ending}"
    exchange.export(opened(tmp_path / "repo", state=state, step=9), path, step=9, metrics={"val_loss": 0.5})
    (found,) = survey(path).found
    assert (found.step, found.epoch) == (9, 4)
    got = exchange.read(found, None, Seam(OnlyReading()))
    check(state, got.state)
    run = everystep.open(str(tmp_path / "other")).run("r")
    check(state, run.save(9, state=got.state).wait().load())  # type: ignore[union-attr]
    run.close()


def test_other_readers_find_what_is_in_a_safetensors_file(tmp_path: Path, work: Trained) -> None:
    source = opened(tmp_path / "repo", model=work.model, optimizer=work.optimizer)
    path = tmp_path / "model.safetensors"
    written = exchange.export(source, path, only="model", step=7, metrics={"val_loss": 0.5})
    got = load_file(path)
    aliases = {name: value for name, value in work.model.state_dict().items() if name not in got}
    assert set(aliases) == {"tied.weight", "tied.bias"}  # the format wants a tied array once
    assert {note.path for note in written.changed} == set(aliases)
    expected = work.model.state_dict()
    assert {name: raw(value) for name, value in got.items()} == {name: raw(expected[name]) for name in got}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["step"], json.loads(metadata["metrics"])) == ("pt", "7", {"val_loss": 0.5})
    (found,) = survey(path).found
    assert (found.step, found.how, found.metrics) == (7, "content: step", {"val_loss": 0.5})
    state = exchange.read(found, None, Seam()).state
    assert state["tied.weight"] is state["a.weight"]
    same_weights(work.model, {name: torch.from_numpy(v.view(np.uint8) if v.dtype == ml_dtypes.bfloat16 else v)
                              .view(torch.bfloat16) if v.dtype == ml_dtypes.bfloat16 else torch.from_numpy(v)
                              for name, v in state.items()})  # fmt: skip


def test_nested_states_have_flat_names_for_other_readers(tmp_path: Path) -> None:
    state = {"model": {"fc.weight": np.ones(2, np.float32)}, "opt": [{"m": np.zeros(3, ml_dtypes.bfloat16)}], "lr": 0.1}
    written = exchange.export(state, tmp_path / "s.safetensors")
    assert {name: (tuple(v.shape), v.dtype) for name, v in load_file(tmp_path / "s.safetensors").items()} == {
        "model/fc.weight": ((2,), torch.float32), "opt/[0]/m": ((3,), torch.bfloat16),
    }  # fmt: skip
    assert [note.text for note in written.changed] == ["1 plain values are in the metadata only"]
    exchange.export(state, tmp_path / "s.npz", only="model")
    with np.load(tmp_path / "s.npz") as archive:
        assert archive["fc.weight"].tolist() == [1.0, 1.0]


def test_a_state_in_memory_goes_out_too_tensors_and_all(tmp_path: Path, work: Trained) -> None:
    exchange.export({"model": work.model.state_dict(), "step": 3}, tmp_path / "a.pth", only="model")
    same_weights(work.model, torch.load(tmp_path / "a.pth", weights_only=True))
    view = {"turned": torch.arange(6.0).reshape(2, 3).T, "real": torch.tensor([1 + 2j]).conj(), "text": "x" * 9000}
    exchange.export(view, tmp_path / "b.pth")
    got = torch.load(tmp_path / "b.pth", weights_only=True)
    assert (
        torch.equal(got["turned"], view["turned"]) and got["real"].tolist() == [1 - 2j] and got["text"] == view["text"]
    )


def test_paths_and_names_are_checked_before_anything_is_read(tmp_path: Path, work: Trained) -> None:
    source = opened(tmp_path / "repo", model=work.model)
    with pytest.raises(UsageError, match=r"known endings: \.pth, \.pt,.*\.npz.*\.safetensors"):
        exchange.export(source, tmp_path / "model.onnx")
    with pytest.raises(UsageError, match="unknown format 'gguf'"):
        exchange.export(source, tmp_path / "model.onnx", format="gguf")
    with pytest.raises(NotFound, match="no path 'modell'"):
        exchange.export(source, tmp_path / "model.pth", only="modell")
    with pytest.raises(NotFound):
        exchange.export(source, tmp_path / "none" / "model.pth")
    exchange.export(source, tmp_path / "model.weights", only="model/a.weight", format="pth")
    assert torch.equal(torch.load(tmp_path / "model.weights", weights_only=True), work.model["a"].weight)
    assert {path.name for path in tmp_path.iterdir()} == {"repo", "model.weights"}


def test_an_existing_file_stays_unless_told_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    exchange.export(weights(1), path)
    before = path.read_bytes()
    with pytest.raises(Conflict, match="a file of this name"):
        exchange.export(weights(2), path)
    assert path.read_bytes() == before
    exchange.export(weights(2), path, overwrite=True)
    assert load_file(path)["fc.weight"].tolist() == [2.0] * 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(
    ("state", "name", "where"),
    [
        ({"model": {"names": np.array(["a", "bc"])}}, "a.pth", "model/names"),
        ({"big": 2**3000}, "a.pth", "big"),
        ({"at": np.array("2026-01-01", "M8[D]")}, "a.pth", "at"),
    ],
)
def test_what_a_format_cannot_hold_is_said_with_its_path(tmp_path: Path, state: Any, name: str, where: str) -> None:
    with pytest.raises(Unsupported) as caught:
        exchange.export(state, tmp_path / name)
    assert caught.value.where == where and caught.value.do
    assert not list(tmp_path.iterdir())


class FailsAt(Files):
    """Operation number `at` that changes something fails."""

    def __init__(self, at: int) -> None:
        self.left = at

    def _count(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise OSError(28, "No space left on device")

    def create(self, path: str) -> int:
        self._count()
        return super().create(path)

    def write(self, fd: int, data: memoryview) -> int:
        self._count()
        return super().write(fd, data)

    def fsync(self, fd: int) -> None:
        self._count()
        super().fsync(fd)

    def rename(self, source: str, target: str) -> None:
        self._count()
        super().rename(source, target)

    def link(self, source: str, target: str) -> None:
        self._count()
        super().link(source, target)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("ending", ["pth", "npz", "safetensors"])
def test_an_export_that_fails_leaves_what_was_there(tmp_path: Path, ending: str, overwrite: bool) -> None:
    path = tmp_path / f"a.{ending}"
    if overwrite:
        exchange.export(weights(1), path)
    before = path.read_bytes() if overwrite else b""
    for at in range(1, 200):
        seam = Seam(FailsAt(at))
        try:
            exchange.export(weights(2), path, overwrite=overwrite, seam=seam)
        except StorageFull:
            assert (path.read_bytes() if path.exists() else b"") == before, f"operation {at}"
            assert not [entry for entry in tmp_path.iterdir() if entry != path], f"operation {at}"
            continue
        break
    assert at > 4 and path.read_bytes() != before
    check(weights(2), imported(path)[0].state)


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path) -> None:
    source = opened(tmp_path / "repo", state={"w": np.random.default_rng(0).normal(size=1 << 16)})
    for pack in (tmp_path / "repo" / "runs").rglob("packs/*/*"):
        data = bytearray(pack.read_bytes())
        data[len(data) // 3] ^= 1
        pack.chmod(0o600)
        pack.write_bytes(data)
    with pytest.raises(Damaged):
        exchange.export(source, tmp_path / "a.pth")
    assert not (tmp_path / "a.pth").exists() and not skipped(tmp_path / "repo").get("a.pth")
