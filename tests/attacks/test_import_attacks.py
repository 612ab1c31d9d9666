"""Hostile folders: what an import reads beside the files of checkpoints."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from _attacks import imported, nothing_happens

from everystep import exchange, formats
from everystep.errors import NotFound
from everystep.exchange.facts import METRICS_MAX
from everystep.seam import Seam

pytestmark = pytest.mark.timeout(60)

TRAINER = {
    "lists in lists": "[" * 100_000,
    "a number of a million digits": '{"global_step": ' + "9" * 1_000_000 + "}",
    "a step without an end": '{"global_step": 1e999}',
    "a negative step": '{"global_step": -5}',
    "a step that is text": '{"global_step": "5; rm -rf /"}',
    "a history that is a number": '{"global_step": 5, "log_history": 7}',
    "a history of lists": '{"global_step": 5, "log_history": [[], {"step": []}, {"step": {"step": 5}}]}',
    "a million metrics": json.dumps(
        {"global_step": 5, "log_history": [{"step": 5, **{f"loss_{n}": 1.0 for n in range(10_000)}}]}
    ),
    "no JSON": "\0\xff" * 100,
}


@pytest.mark.parametrize("attack", TRAINER)
def test_what_a_trainer_says(attack: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    torch.save({"w": torch.ones(2)}, folder / "pytorch_model.bin")
    (folder / "trainer_state.json").write_text(TRAINER[attack], encoding="latin1")
    (got,) = imported(tmp_path)
    assert list(got.state) == ["w"] and len(got.metrics) <= METRICS_MAX + 1
    assert [one.step for one in exchange.survey(str(tmp_path)).found] in ([7], [5])


STATE_FILES = {
    "files above": 'model_checkpoint_path: "../../secret"\nall_model_checkpoint_paths: "/etc/passwd"\n',
    "a million names": 'model_checkpoint_path: "a"\n' + 'all_model_checkpoint_paths: "b"\n' * 30_000,
    "more than is looked at": 'model_checkpoint_path: "a"\n' * 100_000,
    "quotes": 'model_checkpoint_path: "' + '\\"' * 10_000 + "\n",
    "not text": "\0\xff\xfe" * 1000,
}


@pytest.mark.parametrize("attack", STATE_FILES)
def test_what_tensorflow_says_of_its_checkpoints(attack: str, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    formats.write(tmp_path / "secret.npz", {"w": np.full(2, 7.0)})
    formats.write(old / "step_5.npz", {"w": np.ones(2)})
    (old / "checkpoint").write_text(STATE_FILES[attack], encoding="latin1")
    (got,) = imported(old)
    assert got.state["w"].tolist() == [1, 1]


def test_data_files_that_claim_to_be_many(tmp_path: Path) -> None:
    formats.write(tmp_path / "step_5.npz", {"w": np.ones(2)})
    (tmp_path / "ckpt-1.index").write_bytes(b"nothing")
    (tmp_path / "ckpt-1.data-00000-of-99999").write_bytes(b"x")
    (tmp_path / "ckpt-2.data-00000-of-00001").write_bytes(b"x")
    (got,) = imported(tmp_path)
    assert got.metrics == {}
    why = {Path(one.path).name: one.why for one in exchange.survey(str(tmp_path)).skipped}
    assert "missing" in why["ckpt-1.index"] and "ckpt-2.index is not here" in why["ckpt-2.data-00000-of-00001"]


def test_names_of_files_are_never_more_than_names(tmp_path: Path) -> None:
    for name in (
        "step_1; touch ran.npz",
        "$(touch ran)-step_2.npz",
        "step_3\n.npz",
        "step_4' OR 1=1 --.npz",
        "-step_5.npz",
    ):
        formats.write(tmp_path / name, {"w": np.ones(2)})
    formats.write(tmp_path / f"{'9' * 200}.npz", {"w": np.ones(2)})
    assert len(imported(tmp_path)) == 5
    assert not list(tmp_path.glob("ran*"))


def test_links_and_pipes(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    for name, target in (("loop.npz", "loop.npz"), ("gone.npz", "nowhere"), ("up", ".."), ("self", ".")):
        os.symlink(target, old / name)
    os.mkfifo(old / "pipe.pth")
    with nothing_happens():
        seen = exchange.survey(str(old), Seam())
    assert not seen.found and {Path(one.path).name for one in seen.skipped} >= {"loop.npz", "gone.npz", "pipe.pth"}


def test_a_step_of_orbax_with_hostile_metrics(tmp_path: Path) -> None:
    step = tmp_path / "100"
    (step / "metrics").mkdir(parents=True)
    (step / "_CHECKPOINT_METADATA").write_text("[" * 100_000)
    (step / "metrics" / "metrics").write_text('{"loss": 1e999, "epoch": [[]]}')
    with nothing_happens():
        seen = exchange.survey(str(tmp_path), Seam())
        for _ in exchange.each(seen, Seam()):
            pass
    assert all(one.step == 100 for one in seen.found)


def test_an_empty_folder_says_so(tmp_path: Path) -> None:
    seen = exchange.survey(str(tmp_path), Seam())
    assert not seen.found and not seen.skipped
    with pytest.raises(NotFound):
        exchange.survey(str(tmp_path / "nowhere"), Seam())
