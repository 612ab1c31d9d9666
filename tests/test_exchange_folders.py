"""What a look at old folders finds: steps, epochs and metrics, what belongs together, and what is left out and why."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _exchange import OnlyReading, Trained, imported, plain_loop, save, skipped, survey, weights
from _formats import check, raw
from safetensors.torch import save_file

import everystep
from everystep import exchange
from everystep.errors import NotFound, StorageError
from everystep.exchange.names import parse, stem_of
from everystep.seam import Files, Seam


def steps(path: Path) -> list[int]:
    return [found.step for found in survey(path).found]


# a plain loop --------------------------------------------------------------------------------------------------------


def test_twenty_files_of_a_plain_loop_become_one_run(tmp_path: Path) -> None:
    old = tmp_path / "old"
    kept = plain_loop(old, 20)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in old.iterdir()}
    found = survey(old)
    assert [one.step for one in found.found] == [one.epoch for one in found.found] == list(range(20))
    assert found.steps_from == "content: epoch (20 files)" and not found.skipped
    assert found.nbytes == sum(path.stat().st_size for path in old.iterdir())
    run = everystep.open(str(tmp_path / "repo")).run("old")
    for one, got in exchange.each(found, Seam()):
        assert isinstance(got, exchange.Imported) and not got.not_understood
        run.save(one.step, state=got.state, metrics=got.metrics)
    run.close()
    past = everystep.open(str(tmp_path / "repo"))["old"]
    assert [checkpoint.step for checkpoint in past.checkpoints()] == list(range(20))
    for epoch, expected in enumerate(kept):
        check(expected, past.at(epoch).load())
        assert past.at(epoch).metrics == {"loss": expected["loss"].item()}
    roles = {leaf.path: leaf.role for leaf in past.at(3).leaves()}
    assert roles["model_state_dict/a.weight"] == "weights"
    assert roles["optimizer_state_dict/state/[0]/exp_avg"] == "optimizer"
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in old.iterdir()} == before


def test_a_look_leaves_arrays_where_they_are(tmp_path: Path) -> None:
    for epoch in range(3):
        save(
            {"epoch": epoch, "loss": torch.tensor(0.5), "model": {"w": torch.randn(1 << 20)}}, tmp_path / f"{epoch}.pth"
        )
    save_file({"w": torch.randn(1 << 20)}, tmp_path / "step_3.safetensors")
    np.savez(tmp_path / "step_4.npz", w=np.zeros(1 << 20), loss=0.25)
    files = OnlyReading()
    found = exchange.survey(str(tmp_path), Seam(files))
    assert [(one.step, one.metrics.get("loss")) for one in found.found] == [
        (0, 0.5), (1, 0.5), (2, 0.5), (3, None), (4, 0.25),
    ]  # fmt: skip
    assert files.read_bytes < found.nbytes / 100


def test_a_single_file_is_a_run_of_one_checkpoint(tmp_path: Path) -> None:
    plain_loop(tmp_path, 2)
    (one,) = survey(tmp_path / "checkpoint_1.pth").found
    assert (one.step, one.epoch) == (1, 1) and one.path == str(tmp_path / "checkpoint_1.pth")
    save(weights(1.0), tmp_path / "model.pth")
    (one,) = survey(tmp_path / "model.pth").found
    assert (one.step, one.how) == (0, "nothing says a step")
    with pytest.raises(NotFound):
        survey(tmp_path / "none.pth")


# names ---------------------------------------------------------------------------------------------------------------

NAMES: list[tuple[str, int | None, int | None, dict[str, float]]] = [
    ("checkpoint_5_500.pth", 500, 5, {}),
    ("checkpoint_epoch_5_500.pth", 500, 5, {}),
    ("checkpoint-epoch5-step500.pt", 500, 5, {}),
    ("weights_epoch_7.pth", None, 7, {}),
    ("delta_weights_epoch_7.pth", None, 7, {}),
    ("epoch7.pt", None, 7, {}),
    ("ep-07.pt", None, 7, {}),
    ("10_epochs.pth", None, 10, {}),
    ("checkpoint_5_epoch_7.pth", None, 7, {}),
    ("epoch_5_of_10.pth", None, 5, {}),
    ("epoch=3-step=400.ckpt", 400, 3, {}),
    ("epoch=3-val_loss=0.12.ckpt", None, 3, {"val_loss": 0.12}),
    ("epoch=3-val_loss=0.12-v1.ckpt", None, 3, {"val_loss": 0.12}),
    ("sample-mnist-epoch=02-val_loss=0.32-top1=0.5.ckpt", None, 2, {"val_loss": 0.32, "top1": 0.5}),
    ("step=7-loss=1e-05.ckpt", 7, None, {"loss": 1e-05}),
    ("step=7-score=-2.5-seed=3.ckpt", 7, None, {"score": -2.5}),
    ("ckpt-1000", 1000, None, {}),
    ("ckpt500.pt", 500, None, {}),
    ("model_00012.pth", 12, None, {}),
    ("model.500.pth", 500, None, {}),
    ("iter_1000.pth", 1000, None, {}),
    ("iter-100k.pt", 100_000, None, {}),
    ("step=10k.pt", 10_000, None, {}),
    ("global_step1234.pt", 1234, None, {}),
    ("gpt2_step_1000.bin", 1000, None, {}),
    ("500.pth", 500, None, {}),
    ("000500.pth.tar", 500, None, {}),
    ("unet_256_epoch10_loss0.034.pth", None, 10, {"loss": 0.034}),
    ("resnet50_epoch_7_val_acc_0.93.pth", None, 7, {"val_acc": 0.93}),
    ("epoch_003-acc_93.5.pth", None, 3, {"acc": 93.5}),
    ("loss_-0.25_epoch_4.pth", None, 4, {"loss": -0.25}),
    ("model_2026_01_15_epoch_3.pth", None, 3, {}),
    ("model_20260115_103000.pth", None, None, {}),
    ("ckpt_1700000000.pt", None, None, {}),
    ("resnet50.pth", None, None, {}),
    ("model_v2.pth", None, None, {}),
    ("model_best.pth.tar", None, None, {}),
    ("model-00001-of-00004.safetensors", None, None, {}),
    ("rng_state_0.pth", None, None, {}),
    ("fold_3_seed_1.pth", None, None, {}),
    ("model_" + "9" * 30 + ".pth", None, None, {}),
]


@pytest.mark.parametrize(("name", "step", "epoch", "metrics"), NAMES, ids=[name for name, *_ in NAMES])
def test_names_say_steps_epochs_and_metrics(
    name: str, step: int | None, epoch: int | None, metrics: dict[str, float]
) -> None:
    said = parse(stem_of(name))
    assert (said.step, said.epoch, said.metrics) == (step, epoch, metrics)


def test_numbers_at_the_end_of_any_name_count_where_they_change(tmp_path: Path) -> None:
    for number in (5, 10, 20):
        save(weights(number), tmp_path / f"unet_256_{number}.pth")
    save(weights(7.0), tmp_path / "vit_patch16_224.pth")
    assert steps(tmp_path) == [5, 10, 20]
    assert skipped(tmp_path) == {
        "vit_patch16_224.pth": (exchange.UNPLACED, skipped(tmp_path)["vit_patch16_224.pth"][1])
    }


def test_steps_come_from_contents_before_names(tmp_path: Path) -> None:
    save({"global_step": 1200, "epoch": 2, "model": weights(1)}, tmp_path / "step_7.pth")
    save({"meta": {"iter": 2400, "epoch": 4}, "state_dict": weights(2)}, tmp_path / "epoch_9.pth")
    save(
        {"extra_state": {"train_iterator": {"epoch": 6}}, "optimizer_history": [{"num_updates": 3600}]},
        tmp_path / "c.pt",
    )
    save({"iter_num": torch.tensor(4800), "model": weights(3)}, tmp_path / "ckpt.pt")
    save({"trainer": {"iteration": np.int64(6000)}, "epoch": 10}, tmp_path / "ignite.pt")
    found = survey(tmp_path).found
    assert [(one.step, one.epoch, one.how) for one in found] == [
        (1200, 2, "content: global_step"),
        (2400, 4, "content: meta/iter"),
        (3600, 6, "content: optimizer_history/num_updates"),
        (4800, None, "content: iter_num"),
        (6000, 10, "content: trainer/iteration"),
    ]
    assert [one.metrics.get("epoch") for one in found] == [2, 4, 6, None, 10]


def test_metrics_are_scalars_with_the_names_of_metrics(tmp_path: Path) -> None:
    state = {
        "step": 5, "loss": torch.tensor(0.5, dtype=torch.bfloat16), "best_acc1": np.float32(0.25), "val_f1": 0.75,
        "perplexity": float("nan"), "metrics": {"dist": 2, "val": {"loss": 0.125}}, "val": {"loss": 1.0, "name": "x"},
        "lr": 0.1, "loss_scale": 3.0, "is_best": True, "train_losses": [1.0, 2.0], "loss_fn": "mse",
        "losses": torch.ones(5), "epoch": 1, "model": weights(1),
    }  # fmt: skip
    save(state, tmp_path / "a-val_loss=0.5-dist=9.pth")
    (one,) = survey(tmp_path).found
    assert one.metrics.pop("perplexity") != one.metrics.get("perplexity")
    assert one.metrics == {
        "loss": 0.5, "best_acc1": 0.25, "val_f1": 0.75, "dist": 2.0, "val/loss": 1.0, "val_loss": 0.5, "epoch": 1.0,
    }  # fmt: skip


# one scale of steps --------------------------------------------------------------------------------------------------


def test_epochs_among_steps_are_placed_where_the_others_say(tmp_path: Path) -> None:
    for name in ("checkpoint_5_500.pth", "checkpoint_6_600.pth", "weights_epoch_7.pth", "initial.pth"):
        save(weights(len(name)), tmp_path / name)
    found = survey(tmp_path).found
    assert [(one.step, one.epoch) for one in found] == [(0, None), (500, 5), (600, 6), (700, 7)]
    assert found[-1].how == "epoch 7, at 100 steps an epoch as in the other files"


def test_an_epoch_that_cannot_be_placed_among_steps_is_said(tmp_path: Path) -> None:
    for name in ("checkpoint_5_500.pth", "checkpoint_6_777.pth", "weights_epoch_9.pth"):
        save(weights(len(name)), tmp_path / name)
    assert steps(tmp_path) == [500, 777]
    kind, why = skipped(tmp_path)["weights_epoch_9.pth"]
    assert kind == exchange.UNPLACED and "only its epoch (9)" in why


def test_steps_that_begin_anew_with_each_epoch_are_not_taken_for_all(tmp_path: Path) -> None:
    for epoch in range(3):
        save({"epoch": epoch, "iter": 99, "model": weights(epoch)}, tmp_path / f"e{epoch}.pth")
    found = survey(tmp_path).found
    assert [(one.step, one.how, one.metrics) for one in found] == [
        (epoch, "content: epoch", {"step_in_epoch": 99.0}) for epoch in range(3)
    ]
    save({"epoch": 1, "iter": 50, "model": weights(9)}, tmp_path / "half.pth")
    found = survey(tmp_path).found
    assert [(one.step, one.epoch, one.metrics["step_in_epoch"]) for one in found] == [
        (1, 0, 99), (2, 1, 50), (3, 1, 99), (4, 2, 99),
    ]  # fmt: skip


def test_what_all_contents_say_alike_is_no_step(tmp_path: Path) -> None:
    for epoch in range(3):
        save({"epoch": 100, "model": weights(epoch)}, tmp_path / f"model_epoch_{epoch}.pth")
    assert steps(tmp_path) == [0, 1, 2]


# two files of one step -----------------------------------------------------------------------------------------------


def test_the_same_content_is_taken_once(tmp_path: Path) -> None:
    kept = plain_loop(tmp_path, 3)
    shutil.copy(tmp_path / "checkpoint_2.pth", tmp_path / "best.pth")
    torch.save(kept[1], tmp_path / "again.pth")  # other bytes, the same state
    assert [Path(one.path).name for one in survey(tmp_path).found] == [f"checkpoint_{n}.pth" for n in range(3)]
    assert {name: kind for name, (kind, _) in skipped(tmp_path).items()} == dict.fromkeys(
        ("best.pth", "again.pth"), exchange.SAME
    )


def test_another_content_for_a_step_is_said_and_left_out(tmp_path: Path) -> None:
    kept = plain_loop(tmp_path, 2)
    kept[1]["model_state_dict"]["a.bias"][0] += 1
    torch.save(kept[1], tmp_path / "z.pth")
    found = survey(tmp_path)
    assert [Path(one.path).name for one in found.found] == ["checkpoint_0.pth", "checkpoint_1.pth"]
    ((kind, why),) = skipped(tmp_path).values()
    assert kind == exchange.CONFLICT and "another content for step 1" in why and "checkpoint_1.pth" in why


def test_a_copy_may_differ_in_what_is_no_array(tmp_path: Path) -> None:
    for name, note in (("epoch=1-step=5.ckpt", "a"), ("last.ckpt", "b"), ("other.ckpt", "c")):
        save({"global_step": 5, "epoch": 1, "note": note, "state_dict": weights(1)}, tmp_path / name)
    left = skipped(tmp_path)
    assert left["last.ckpt"][0] == exchange.SAME and "other values in it differ" in left["last.ckpt"][1]
    assert left["other.ckpt"][0] == exchange.CONFLICT


def test_a_damaged_file_does_not_take_the_step_of_a_whole_one(tmp_path: Path) -> None:
    kept = plain_loop(tmp_path, 2)
    broken = bytearray((tmp_path / "checkpoint_1.pth").read_bytes())
    broken[broken.index(raw(kept[1]["model_state_dict"]["a.weight"]))] ^= 1
    (tmp_path / "checkpoint_01.pth").write_bytes(broken)
    assert [Path(one.path).name for one in survey(tmp_path).found] == ["checkpoint_0.pth", "checkpoint_1.pth"]
    assert skipped(tmp_path)["checkpoint_01.pth"][0] == exchange.DAMAGED


# layouts of other programs -------------------------------------------------------------------------------------------


class Unknown:
    """Stands for what only its program can build."""


def lightning(folder: Path, epochs: int) -> None:
    work = Trained()
    for epoch in range(epochs):
        score = work.step()
        watched = {"monitor": "val_loss", "best_model_score": score / 2, "current_score": score, "best_k_models": {}}
        state = {
            "epoch": epoch, "global_step": 100 * (epoch + 1), "pytorch-lightning_version": "2.2.0",
            "state_dict": work.model.state_dict(), "loops": {"fit_loop": {"state_dict": {}}},
            "callbacks": {"ModelCheckpoint{'monitor': 'val_loss', 'mode': 'min'}": watched},
            "optimizer_states": [work.optimizer.state_dict()], "lr_schedulers": [], "hparams_name": "kwargs",
            "hyper_parameters": {"lr": 0.01, "loss": Unknown(), "layers": [3, 4]},
        }  # fmt: skip
        save(state, folder / "checkpoints" / f"epoch={epoch}-step={100 * (epoch + 1)}-val_loss={score:.2f}.ckpt")
    shutil.copy(
        folder / "checkpoints" / f"epoch={epoch}-step={100 * (epoch + 1)}-val_loss={score:.2f}.ckpt",
        folder / "last.ckpt",
    )
    (folder / "hparams.yaml").write_text("lr: 0.01\n")
    (folder / "metrics.csv").write_text("epoch,val_loss\n0,1\n")


def test_a_folder_of_lightning(tmp_path: Path) -> None:
    lightning(tmp_path, 3)
    found = survey(tmp_path)
    assert [(one.step, one.epoch, one.how) for one in found.found] == [
        (100 * (epoch + 1), epoch, "content: global_step") for epoch in range(3)
    ]
    assert {name: kind for name, (kind, _) in skipped(tmp_path).items()} == {
        "hparams.yaml": exchange.UNKNOWN, "metrics.csv": exchange.UNKNOWN, "last.ckpt": exchange.SAME,
    }  # fmt: skip
    for step, got in imported(tmp_path).items():
        assert got.not_understood == ["hyper_parameters/loss: test_exchange_folders.Unknown"]
        state = got.state
        assert (state["global_step"], state["hyper_parameters"]) == (step, {"lr": 0.01, "layers": [3, 4]})
        (callback,) = state["callbacks"].values()
        assert got.metrics["val_loss"] == float(callback["current_score"])  # exact, not the two digits of the name
        assert got.metrics["best_val_loss"] == float(callback["best_model_score"])
        assert state["optimizer_states"][0]["state"][0]["exp_avg"].shape == (3, 4)


def test_folders_of_transformers_are_one_checkpoint_each(tmp_path: Path) -> None:
    work = Trained()
    expected: dict[int, Any] = {}
    for step in (500, 1000):
        loss, folder = work.step().item(), tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        state = {name: value.clone() for name, value in work.model.state_dict().items()}
        names = sorted(state)
        for number, part in enumerate((names[:5], names[5:]), 1):
            save_file(
                {name: state[name] for name in part},
                folder / f"model-0000{number}-of-00002.safetensors",
                {"format": "pt"},
            )
        save(work.optimizer.state_dict(), folder / "optimizer.pt")
        save({"last_epoch": step}, folder / "scheduler.pt")
        for rank in range(2):
            save({"cpu": torch.get_rng_state(), "rank": rank}, folder / f"rng_state_{rank}.pth")
        save(Unknown(), folder / "training_args.bin")
        rows = [{"loss": 9.0, "step": step - 1}, {"loss": loss, "learning_rate": 0.1, "step": step}]
        (folder / "trainer_state.json").write_text(
            json.dumps({"global_step": step, "epoch": step / 400, "log_history": rows})
        )
        expected[step] = torch.load(folder / "optimizer.pt", weights_only=True), state, loss
    found = survey(tmp_path)
    assert [(one.step, len(one.pieces)) for one in found.found] == [(500, 6), (1000, 6)]
    assert {name.partition("/")[2]: kind for name, (kind, _) in skipped(tmp_path).items()} == {
        "training_args.bin": exchange.UNKNOWN
    }
    for step, got in imported(tmp_path).items():
        optimizer, state, loss = expected[step]
        assert got.metrics == {"epoch": step / 400, "loss": loss}
        check(optimizer, got.state["optimizer"])
        assert {name: value.tobytes() for name, value in got.state["model"].items()} == {
            name: raw(value) for name, value in state.items()
        }
        assert [got.state[f"rng_state_{rank}"]["rank"] for rank in range(2)] == [0, 1]
        assert got.state["scheduler"] == {"last_epoch": step}


def test_a_shard_that_is_missing_is_said(tmp_path: Path) -> None:
    for number in (1, 3):
        save_file({f"w{number}": torch.ones(2)}, tmp_path / f"model-0000{number}-of-00003.safetensors")
    assert not survey(tmp_path).found
    assert all("a shard of 3, of which 2 are here" in why for _, why in skipped(tmp_path).values())


def test_networks_side_by_side_are_one_state(tmp_path: Path) -> None:
    for step in (5, 10):
        for net in "GD":
            save(weights(step, f"{net}.w"), tmp_path / f"{step}_net_{net}.pth")
    assert {step: set(got.state) for step, got in imported(tmp_path).items()} == {
        step: {"net_G", "net_D"} for step in (5, 10)
    }


def test_an_optimizer_beside_its_model_is_one_state(tmp_path: Path) -> None:
    work = Trained()
    for epoch in range(2):
        work.step()
        save(work.model.state_dict(), tmp_path / f"model_epoch_{epoch}.pth")
        save(work.optimizer.state_dict(), tmp_path / f"optimizer_epoch_{epoch}.pth")
    for got in imported(tmp_path).values():
        assert list(got.state) == ["model", "optimizer"] and set(got.state["optimizer"]) == {"state", "param_groups"}


def test_what_single_ranks_saved_is_not_taken_for_the_whole(tmp_path: Path) -> None:
    for rank in range(2):
        save(weights(rank), tmp_path / f"step_5_rank_{rank}.pt")
    assert not survey(tmp_path).found
    assert all("2 ranks" in why for _, why in skipped(tmp_path).values())


# junk ----------------------------------------------------------------------------------------------------------------


def test_every_file_that_is_not_taken_is_listed_with_its_reason(tmp_path: Path) -> None:
    kept = plain_loop(tmp_path, 3)
    whole = (tmp_path / "checkpoint_1.pth").read_bytes()
    (tmp_path / "checkpoint_1.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "events.out").write_bytes(os.urandom(300))
    (tmp_path / "notes.txt").write_text("loss was fine")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "array.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "broken.safetensors").write_bytes((50).to_bytes(8, "little") + b'{"a":' + b" " * 60)
    (tmp_path / "trainer_state.json").write_text("{")
    (tmp_path / "model.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    save({}, tmp_path / "nothing.pth")
    save(Trained().model, tmp_path / "whole_model.pth")
    save(weights(1), tmp_path / "weights.pth")
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    (tmp_path / "gone.pth").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.pth")
    assert steps(tmp_path) == [0, 2]
    left = skipped(tmp_path)
    assert {name: kind for name, (kind, _) in left.items()} == {
        "checkpoint_1.pth": exchange.DAMAGED, "events.out": exchange.UNKNOWN, "notes.txt": exchange.UNKNOWN,
        "empty.pth": exchange.DAMAGED, "array.npy": exchange.UNKNOWN, "broken.safetensors": exchange.DAMAGED,
        "trainer_state.json": exchange.DAMAGED, "model.h5": exchange.UNKNOWN, "nothing.pth": exchange.UNKNOWN,
        "whole_model.pth": exchange.UNKNOWN, "weights.pth": exchange.UNPLACED, "deep/deeper": exchange.UNKNOWN,
        "gone.pth": exchange.UNKNOWN, "pipe.pth": exchange.DAMAGED,
    }  # fmt: skip
    assert "ModuleDict" in left["whole_model.pth"][1] and "rename it" in left["weights.pth"][1]
    for epoch, got in imported(tmp_path).items():
        check(kept[epoch], got.state)


def test_a_file_or_folder_that_cannot_be_read_is_one_of_those(tmp_path: Path) -> None:
    plain_loop(tmp_path / "old", 3)
    (tmp_path / "old" / "closed").mkdir()

    class Failing(Files):
        def open_read(self, path: str) -> int:
            if path.endswith("checkpoint_1.pth"):
                raise PermissionError(13, "Permission denied")
            return super().open_read(path)

        def names(self, path: str) -> list[tuple[str, bool]]:
            if path.endswith("closed"):
                raise PermissionError(13, "Permission denied")
            return super().names(path)

    found = exchange.survey(str(tmp_path / "old"), Seam(Failing()))
    assert [one.step for one in found.found] == [0, 2]
    assert [Path(one.path).name for one in found.skipped if "Permission denied" in one.why] == [
        "checkpoint_1.pth",
        "closed",
    ]
    with pytest.raises(StorageError):
        exchange.survey(str(tmp_path / "old" / "closed"), Seam(Failing()))


def test_no_damage_makes_the_look_itself_fail(tmp_path: Path) -> None:
    old = tmp_path / "old"
    plain_loop(old, 1)
    state = {"step": 3, "loss": 0.5, "w": np.ones(3), "deep": [{"n": np.float32(2)}]}
    exchange.export(state, old / "a.npz")
    exchange.export(state, old / "a.safetensors", step=4, metrics={"loss": 0.25})
    np.savez(old / "plain.npz", step=5, loss=0.5, w=np.ones(3))
    (old / "trainer_state.json").write_text('{"global_step": 6, "epoch": 1.5, "log_history": [{"loss": 1, "step": 6}]}')
    whole = {path: path.read_bytes() for path in old.iterdir()}
    chance = random.Random(0)
    for _ in range(100):
        for path, data in whole.items():
            # Most of a small file is structure, and most of that lies at its ends.
            broken, span = bytearray(data), min(len(data), 600)
            broken[chance.choice((1, -1)) * chance.randrange(1, span)] = chance.randrange(256)
            path.write_bytes(broken[: chance.choice((len(data), len(data), chance.randrange(len(data))))])
        found = survey(old)
        there = {piece.path for one in found.found for piece in one.pieces} | {one.path for one in found.skipped}
        assert there >= {str(path) for path in whole if path.suffix != ".json"}
        for _, got in exchange.each(found, Seam(OnlyReading())):
            assert isinstance(got, (exchange.Imported, everystep.Error))
