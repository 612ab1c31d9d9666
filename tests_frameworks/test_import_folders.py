"""Folders that the frameworks themselves wrote: `everystep import` finds every step and metric, and every array."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import everystep

pytestmark = pytest.mark.filterwarnings("ignore")


FRAMEWORKS = ("torch", "tensorflow", "keras", "jax", "flax", "orbax", "lightning", "transformers", "mxnet", "h5py")
COMMAND = f"""
import sys
from everystep.cli import main
try:
    main()
finally:
    assert not set({FRAMEWORKS}) & set(sys.modules), sorted(sys.modules)
"""


def imported(folder: Path, repo: Path) -> dict[str, Any]:
    """What the command says, in a process of its own, which imports no framework."""
    command = [sys.executable, "-c", COMMAND, "-r", str(repo), "import", str(folder), "--run", "old", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ}, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def at(repo: Path, step: int) -> Any:
    return everystep.open(str(repo))["old"].at(step).load()


def arrays(state: Any) -> Iterator[np.ndarray[Any, Any]]:
    if isinstance(state, dict):
        for value in state.values():
            yield from arrays(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from arrays(value)
    elif isinstance(state, np.ndarray):
        yield state


def holds(state: Any, wanted: list[Any]) -> None:
    """Every one of these arrays is in the state, bit for bit."""
    there = {(a.shape, a.dtype.str, a.tobytes()) for a in arrays(state)}
    for array in wanted:
        assert (array.shape, array.dtype.str, array.tobytes()) in there


def test_lightning(tmp_path: Path) -> None:
    import lightning
    import torch
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint

    class Net(lightning.LightningModule):
        def __init__(self, width: int = 3) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.layer = torch.nn.Linear(4, width)

        def training_step(self, batch: Any, index: int) -> Any:
            return self.layer(batch[0]).pow(2).mean()

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_loss", self.layer(batch[0]).pow(2).mean())

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    class Seen(Callback):
        def __init__(self) -> None:
            self.kept: dict[int, tuple[int, float, Any]] = {}

        def on_validation_end(self, trainer: Any, module: Any) -> None:
            if not trainer.sanity_checking:
                state = {name: value.clone() for name, value in module.state_dict().items()}
                self.kept[trainer.global_step] = (
                    trainer.current_epoch, trainer.callback_metrics["val_loss"].item(), state,
                )  # fmt: skip

    torch.manual_seed(1)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(20, 4)), batch_size=4)
    seen = Seen()
    keep = ModelCheckpoint(
        tmp_path / "old", "{epoch}-{step}-{val_loss:.2f}", monitor="val_loss", save_top_k=-1, save_last=True
    )
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[seen, keep],
    )  # fmt: skip
    trainer.fit(Net(), data, data)
    document = imported(tmp_path / "old", tmp_path / "repo")
    assert {one["step"]: one["epoch"] for one in document["brought"]} == {s: e for s, (e, _, _) in seen.kept.items()}
    for one in document["brought"]:
        epoch, loss, weights = seen.kept[one["step"]]
        assert one["metrics"]["val_loss"] == loss and one["metrics"]["epoch"] == epoch
        state = at(tmp_path / "repo", one["step"])
        assert {name: array.tobytes() for name, array in state["state_dict"].items()} == {
            name: tensor.numpy().tobytes() for name, tensor in weights.items()
        }
        assert state["optimizer_states"][0]["state"][0]["exp_avg"].shape == (3, 4)
        assert state["lr_schedulers"][0]["last_epoch"] == epoch + 1 and state["hyper_parameters"] == {"width": 3}
        assert state["global_step"] == one["step"] and "ModelCheckpoint" in " ".join(state["callbacks"])
    (left,) = document["skipped"]
    assert left["path"].endswith("last.ckpt") and left["kind"] == "same"


def test_transformers(tmp_path: Path) -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    class Rows(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 24

        def __getitem__(self, index: int) -> dict[str, Any]:
            ids = (torch.arange(8) * (index + 1)) % 32
            return {"input_ids": ids, "labels": ids}

    class Seen(TrainerCallback):
        def __init__(self) -> None:
            self.kept: dict[int, Any] = {}

        def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
            self.kept[state.global_step] = {name: value.clone() for name, value in model.state_dict().items()}

    torch.manual_seed(1)
    seen = Seen()
    config = GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "old"), max_steps=6, save_strategy="steps", save_steps=2, eval_strategy="steps",
        eval_steps=2, logging_steps=1, per_device_train_batch_size=8, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(GPT2LMHeadModel(config), arguments, train_dataset=Rows(), eval_dataset=Rows(), callbacks=[seen])
    trainer.train()
    last = tmp_path / "old" / "checkpoint-6"
    (last / "model.safetensors").unlink()
    trainer.model.save_pretrained(last, max_shard_size="2KB")
    assert len(list(last.glob("model-*.safetensors"))) > 1 and (last / "model.safetensors.index.json").exists()
    rows = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    losses = {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}
    document = imported(tmp_path / "old", tmp_path / "repo")
    assert [one["step"] for one in document["brought"]] == [2, 4, 6]
    for one in document["brought"]:
        step = one["step"]
        assert (one["metrics"]["eval_loss"], one["metrics"]["loss"]) == (rows[step], losses[step])
        assert one["metrics"]["epoch"] == pytest.approx(step / 3)
        state = at(tmp_path / "repo", step)
        assert {"model", "optimizer", "scheduler", "rng_state"} <= set(state)
        for name, array in state["model"].items():
            assert array.tobytes() == seen.kept[step][name].numpy().tobytes(), name
        assert set(seen.kept[step]) - set(state["model"]) <= {"lm_head.weight"}, "but for the tied one, all are there"
    why = {Path(left["path"]).name: left["why"] for left in document["skipped"]}
    assert "TrainingArguments" in why.pop("training_args.bin")
    assert all("holds no state" in text for text in why.values())


def keras_model() -> Any:
    import keras

    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation="relu"), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(0.01), "mse")
    return model


@pytest.mark.parametrize("ending", [".keras", ".weights.h5", ".h5"])
def test_keras(ending: str, tmp_path: Path) -> None:
    import keras

    model, kept = keras_model(), {}
    history: dict[int, float] = {}

    def note(epoch: int, logs: Any) -> None:
        kept[epoch + 1] = [np.array(weight) for weight in model.get_weights()]
        history[epoch + 1] = logs["val_loss"]

    (tmp_path / "old").mkdir()
    save = keras.callbacks.ModelCheckpoint(
        str(tmp_path / "old" / ("cp.{epoch:02d}-{val_loss:.2f}" + ending)),
        save_weights_only=ending == ".weights.h5",
    )
    x, y = np.random.default_rng(0).normal(size=(32, 4)), np.ones((32, 1))
    watch = keras.callbacks.LambdaCallback(on_epoch_end=note)
    model.fit(x, y, batch_size=8, epochs=3, validation_split=0.25, verbose=0, callbacks=[watch, save])
    document = imported(tmp_path / "old", tmp_path / "repo")
    assert not document["skipped"], document["skipped"]
    brought = {one["epoch"]: one for one in document["brought"]}
    assert sorted(brought) == [1, 2, 3]
    steps = [brought[epoch]["step"] for epoch in (1, 2, 3)]
    assert steps in ([3, 6, 9], [1, 2, 3]), (
        "the updates that the optimizer made, where the file has it; else the epochs"
    )
    for epoch, one in brought.items():
        assert one["metrics"]["val_loss"] == round(history[epoch], 2)
        holds(at(tmp_path / "repo", one["step"]), kept[epoch])
    if ending == ".keras":  # the model itself came along
        checkpoint = everystep.open(str(tmp_path / "repo"))["old"].latest
        assert checkpoint is not None
        again = keras.models.load_model(checkpoint.export(str(tmp_path / "again.keras")).path)
        for weight, expected in zip(again.get_weights(), kept[3], strict=True):
            assert np.array(weight).tobytes() == expected.tobytes()
        assert int(again.optimizer.iterations) == 9


def test_keras_without_optimizer_counts_epochs(tmp_path: Path) -> None:
    model = keras_model()
    for epoch in (1, 2):
        model.save_weights(tmp_path / f"weights.{epoch:02d}-0.5{epoch}.weights.h5")
    document = imported(tmp_path, tmp_path / "repo")
    assert [(one["epoch"], one["metrics"]["val_loss"]) for one in document["brought"]] == [(1, 0.51), (2, 0.52)]


@pytest.mark.parametrize("numbered", ["by save", "by step"])
def test_a_checkpoint_manager_of_tensorflow(numbered: str, tmp_path: Path) -> None:
    import tensorflow as tf

    class Net(tf.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.w = tf.Variable(tf.zeros((4, 3)))
            self.b = [tf.Variable(tf.ones(3)), tf.Variable(tf.zeros(2, tf.int64))]

    net, step = Net(), tf.Variable(0, dtype=tf.int64)
    checkpoint = tf.train.Checkpoint(step=step, net=net)
    manager = tf.train.CheckpointManager(checkpoint, str(tmp_path / "old"), max_to_keep=3)
    kept = {}
    for number in range(1, 5):
        step.assign(number * 25)
        net.w.assign_add(tf.random.stateless_normal((4, 3), (number, 0)))
        kept[number * 25] = net.w.numpy()
        manager.save(checkpoint_number=None if numbered == "by save" else number * 25)
    document = imported(tmp_path / "old", tmp_path / "repo")
    assert [one["step"] for one in document["brought"]] == [50, 75, 100]
    assert not document["skipped"], document["skipped"]
    for one in document["brought"]:
        state = at(tmp_path / "repo", one["step"])
        holds(state, [kept[one["step"]], np.ones(3, "f4"), np.zeros(2, "i8")])
        assert int(state["step"]) == one["step"]
    assert (tmp_path / "old" / "checkpoint").exists()


def test_a_checkpoint_manager_of_orbax(tmp_path: Path) -> None:
    import jax.numpy as jnp
    import orbax.checkpoint as ocp

    kept = {}
    options = ocp.CheckpointManagerOptions(max_to_keep=3, best_fn=lambda metrics: metrics["val_loss"], best_mode="min")
    with ocp.CheckpointManager(tmp_path / "old", options=options) as manager:
        for step in (10, 20, 30, 40):
            state = {"params": {"w": jnp.full((4, 3), step, jnp.bfloat16)}, "count": jnp.int32(step)}
            kept[step] = np.asarray(state["params"]["w"])
            manager.save(step, args=ocp.args.StandardSave(state), metrics={"val_loss": 1 / step})
        manager.wait_until_finished()
    document = imported(tmp_path / "old", tmp_path / "repo")
    assert [(one["step"], one["metrics"]["val_loss"]) for one in document["brought"]] == [
        (step, 1 / step) for step in (20, 30, 40)
    ]
    for step in (20, 30, 40):
        holds(at(tmp_path / "repo", step), [kept[step]])


def test_a_folder_of_all_kinds(tmp_path: Path) -> None:
    """One run from files of five programs."""
    import tensorflow as tf
    import torch
    from safetensors.numpy import save_file

    old = tmp_path / "old"
    old.mkdir()
    torch.save({"global_step": 1, "model": {"w": torch.ones(3)}}, old / "torch.pth")
    save_file({"w": np.full(3, 2.0)}, old / "step_2.safetensors")
    model = keras_model()
    model.save(old / "model_step_3.keras")
    checkpoint = tf.train.Checkpoint(step=tf.Variable(4), w=tf.Variable(tf.fill((3,), 4.0)))
    checkpoint.write(str(old / "tf_step_4"))
    tf.saved_model.save(tf.train.Checkpoint(w=tf.Variable(tf.fill((3,), 5.0))), str(old / "export_step_5"))
    document = imported(old, tmp_path / "repo")
    assert [one["step"] for one in document["brought"]] == [1, 2, 3, 4, 5], document["skipped"]
    holds(at(tmp_path / "repo", 3), [np.array(weight) for weight in model.get_weights()])
    holds(at(tmp_path / "repo", 5), [np.full(3, 5.0, "f4")])


def test_shards_that_are_written_here_load_in_transformers(tmp_path: Path) -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(2)
    config = GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    with everystep.open(str(tmp_path / "repo")).run("a") as run:
        run.track(model=model, rng=False)
        run.save(5)
    (tmp_path / "out").mkdir()
    checkpoint = everystep.open(str(tmp_path / "repo"))["a"].at(5)
    written = checkpoint.export(str(tmp_path / "out" / "model.safetensors"), only="model", max_shard_size="4KB")
    assert written.path.endswith("model.safetensors.index.json") and len(list((tmp_path / "out").iterdir())) > 3
    config.save_pretrained(tmp_path / "out")
    loaded, info = GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = model.state_dict()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name]), name
