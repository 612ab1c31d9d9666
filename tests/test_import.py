"""Old folders become runs through the door, and checkpoints become files of others."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import everystep
from everystep.errors import Conflict, NotFound, UsageError


def plain_loop(folder: Path, count: int = 20) -> list[dict[str, Any]]:
    """What an ordinary torch loop leaves behind: one file per epoch, of 25 steps each."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    states = []
    for epoch in range(1, count + 1):
        optimizer.zero_grad()
        loss = (model(torch.randn(8, 64)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        state = {
            "epoch": epoch,
            "model_state_dict": {name: value.clone() for name, value in model.state_dict().items()},
            "optimizer_state_dict": optimizer.state_dict(),
            "loss": float(loss.detach()),
        }
        torch.save(state, folder / f"checkpoint_{epoch}_{25 * epoch}.pth")
        states.append(torch.load(folder / f"checkpoint_{epoch}_{25 * epoch}.pth", weights_only=True))
    return states


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def test_twenty_files_become_a_run_and_files_again(tmp_path: Path) -> None:
    states = plain_loop(tmp_path / "old")
    before = {path: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    repo = everystep.open(str(tmp_path / "runs"))
    seen: list[tuple[int, int]] = []
    report = repo.import_from(str(tmp_path / "old"), "gpt", progress=lambda n, of, path: seen.append((n, of)))
    assert {path: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before
    assert seen == [(n, 20) for n in range(21)]
    assert [b.step for b in report.brought] == [25 * n for n in range(1, 21)] and report.skipped == []
    assert report.file_bytes == sum(map(len, before.values())) > report.stored_bytes > 0
    past = repo["gpt"]
    assert [c.step for c in past.checkpoints()] == [25 * n for n in range(1, 21)]
    for state, checkpoint in zip(states, past.checkpoints()):
        assert checkpoint.metrics["loss"] == state["loss"] and checkpoint.metrics["epoch"] == state["epoch"]
        out = tmp_path / f"{checkpoint.step}.pth"
        checkpoint.export(str(out))
        assert equal(torch.load(out, weights_only=True), state)
    assert past.best("loss").step == 25 * (1 + int(np.argmin([state["loss"] for state in states])))
    assert past.at(500).export(str(tmp_path / "w.pth"), only="model_state_dict").nbytes > 0
    weights = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    weights.load_state_dict(torch.load(tmp_path / "w.pth", weights_only=True))
    assert repo.check().ok
    past.forget(keep_full=everystep.last(2))
    past.prune(now=True)
    assert past.at(25).thin and equal(
        past.at(25).load(only="model_state_dict", like="torch"), states[0]["model_state_dict"]
    )


def test_an_import_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
    plain_loop(tmp_path / "old", 4)
    last = tmp_path / "old" / "checkpoint_4_100.pth"
    kept = last.read_bytes()
    last.unlink()
    repo = everystep.open(str(tmp_path / "runs"))
    look = repo.import_from(str(tmp_path / "old"), dry_run=True)
    assert [b.step for b in look.brought] == [25, 50, 75] and not repo.exists
    assert repo.import_from(str(tmp_path / "old")).run == "old"
    last.write_bytes(kept)
    again = repo.import_from(str(tmp_path / "old"))
    assert [b.step for b in again.brought] == [100]
    assert sorted(s.why for s in again.skipped) == [f"step {n} is in the run already" for n in (25, 50, 75)]
    assert [c.step for c in repo["old"].checkpoints()] == [25, 50, 75, 100], "one line"


def test_damaged_files_are_listed_and_the_rest_comes_in(tmp_path: Path) -> None:
    plain_loop(tmp_path / "old", 3)
    hurt = tmp_path / "old" / "checkpoint_2_50.pth"
    data = bytearray(hurt.read_bytes())
    data[len(data) // 2] ^= 1
    hurt.write_bytes(data)
    (tmp_path / "old" / "train.log").write_text("loss 3\n")
    repo = everystep.open(str(tmp_path / "runs"))
    report = repo.import_from(str(tmp_path / "old"))
    assert [b.step for b in report.brought] == [25, 75]
    assert {Path(s.path).name: s.kind for s in report.skipped} == {"train.log": "unknown", hurt.name: "damaged"}


def test_what_cannot_be_imported_or_exported_says_so(tmp_path: Path) -> None:
    repo = everystep.open(str(tmp_path / "runs"))
    (tmp_path / "old").mkdir()
    for path in ("old", "nowhere"):
        with pytest.raises(NotFound):
            repo.import_from(str(tmp_path / path))
    assert not repo.exists
    with repo.run("a") as run:
        run.save(1, state={"w": np.arange(4.0)}).wait()
    target = tmp_path / "w.safetensors"
    repo["a"].at(1).export(str(target))
    with pytest.raises(Conflict):
        repo["a"].at(1).export(str(target))
    repo["a"].at(1).export(str(target), overwrite=True)
    with pytest.raises(UsageError):
        repo["a"].at(1).export(str(tmp_path / "w.xyz"))
    with pytest.raises(NotFound):
        repo["a"].at(1).export(str(tmp_path / "x.npz"), only="wieghts")
    assert not (tmp_path / "x.npz").exists()
    repo["a"].at(1).export(str(tmp_path / "x.npz"), only="w")


def test_a_lightning_folder_becomes_a_run_and_files_again(tmp_path: Path) -> None:
    folder = tmp_path / "lightning_logs" / "checkpoints"
    folder.mkdir(parents=True)
    torch.manual_seed(1)
    written = {}
    for epoch in range(20):
        state = {
            "epoch": epoch,
            "global_step": 50 * (epoch + 1),
            "pytorch-lightning_version": "2.5.0",
            "state_dict": {"net.weight": torch.randn(16, 16), "net.half": torch.randn(8).bfloat16()},
            "optimizer_states": [{"state": {0: {"step": torch.tensor(float(epoch)), "exp_avg": torch.randn(16, 16)}}}],
            "lr_schedulers": [{"last_epoch": epoch, "_last_lr": [1e-3 / (epoch + 1)]}],
            "hyper_parameters": {"lr": 1e-3},
        }
        written[50 * (epoch + 1)] = (state, 1 / (epoch + 1))
        torch.save(state, folder / f"epoch={epoch}-step={50 * (epoch + 1)}-val_loss={1 / (epoch + 1):.4f}.ckpt")
    repo = everystep.open(str(tmp_path / "runs"))
    report = repo.import_from(str(folder), "lit")
    assert [b.step for b in report.brought] == list(written) and report.skipped == []
    for step, (state, loss) in written.items():
        checkpoint = repo["lit"].at(step)
        assert checkpoint.metrics["val_loss"] == round(loss, 4) and checkpoint.metrics["epoch"] == state["epoch"]
        checkpoint.export(str(tmp_path / f"{step}.ckpt"))
        assert equal(torch.load(tmp_path / f"{step}.ckpt", weights_only=True), state)
    assert repo["lit"].best("val_loss").step == 1000


def test_a_folder_of_deltas_becomes_a_run_of_weights(tmp_path: Path) -> None:
    folder = tmp_path / "deltas"
    folder.mkdir()
    torch.manual_seed(2)
    weights = {"fc.weight": torch.randn(32, 32), "fc.bias": torch.randn(32)}
    torch.save(weights, folder / "weights_epoch_0.pth")
    summed = {0: weights}
    for epoch in range(1, 20):
        delta = {name: 1e-3 * torch.randn_like(value) for name, value in weights.items()}
        torch.save(delta, folder / f"delta_weights_epoch_{epoch}.pth")
        weights = {name: value + delta[name] for name, value in weights.items()}
        summed[epoch] = weights
    repo = everystep.open(str(tmp_path / "runs"))
    report = repo.import_from(str(folder))
    assert [b.step for b in report.brought] == list(range(20))
    assert all("sum of deltas" in b.notes[0] for b in report.brought[1:])
    for epoch, state in summed.items():
        out = tmp_path / f"{epoch}.pth"
        repo["deltas"].at(epoch).export(str(out))
        assert equal(torch.load(out, weights_only=True), state)

    (folder / "weights_epoch_0.pth").unlink()
    with pytest.raises(NotFound) as caught:
        repo.import_from(str(folder), "baseless")
    assert "weights" in str(caught.value) and "baseless" not in repo
