"""Transformers: a TrainerCallback that saves into a run when the Trainer would, in place of checkpoint folders."""

from __future__ import annotations

import dataclasses
import json
from contextlib import ExitStack
from typing import Any

import everystep
from everystep.integrations.shared import drop, go_on_from, load_state, numbers

try:
    import torch
    from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerState
except ImportError as error:
    do = 'pip install "everystep[transformers]"'
    raise everystep.Unsupported("Transformers is not installed here", do=do) from error

_BETWEEN_EPOCHS, _IN_EPOCH = "between epochs", "in an epoch"


class EverystepCallback(TrainerCallback):
    """Saves when `TrainingArguments` say so (`save_strategy`, `save_steps`), keeps what `save_total_limit` and
    `load_best_model_at_end` keep, and takes the save out of the Trainer's hands: no `checkpoint-N` folder is written.

        callback = EverystepCallback(run)
        trainer = Trainer(model, args, train_dataset=data, callbacks=[callback])
        trainer.train(resume_from_checkpoint=callback.resume_from(trainer))     # None in an empty run

    A save is made once the evaluation of its step is done, at the beginning of the next step or epoch. Give this
    callback last. `save_strategy="best"` is refused: the Trainer decides that where no callback is asked.

    Args:
        run: whoever opened it closes it.
        save_steps: save every so many steps although `save_strategy` is "no".
    """

    def __init__(self, run: everystep.Run, *, save_steps: int | None = None) -> None:
        self.run, self.save_steps = run, save_steps
        self._trainer: Any = None
        self._resumed: everystep.Checkpoint | None = None
        self._random: everystep.Checkpoint | None = None
        self._folders = ExitStack()
        self._due = False
        self._saved: everystep.Saved | None = None
        self._saved_step = -1
        self._steps: list[int] = []
        self._best: int | None = None
        self._waiting: set[int] = set()
        self._metrics: dict[str, float] = {}
        self._metrics_step = -1

    # resume ---------------------------------------------------------------------------------------------------------

    def resume_from(self, trainer: Any, checkpoint: str = "latest") -> str | None:
        """For `trainer.train(resume_from_checkpoint=…)`: a folder as the Trainer reads it, made from the run, removed
        when the first step begins; None in an empty run.

        Args:
            trainer: the one that has this callback; its gradient scaler and other callbacks' states are kept as well.
            checkpoint: a step, "latest", "best:eval_loss", a tag.
        """
        self._trainer = trainer
        if self.run.latest is None:
            return None
        self._resumed = self._random = self.run.find(checkpoint)
        self._best = load_state(self._resumed, "best_step")
        return self._materialise(self._resumed)

    def _materialise(self, checkpoint: everystep.Checkpoint) -> str:
        """A `checkpoint-N` without its name: removed with `_folders`."""
        folder = self._folders.enter_context(checkpoint.scratch_folder())
        state = load_state(checkpoint)
        files = {"model": "pytorch_model.bin", "optimizer": "optimizer.pt", "lr_scheduler": "scheduler.pt"}
        for name, file in {**files, "scaler": "scaler.pt"}.items():
            if state.get(name) is not None:
                torch.save(state[name], f"{folder}/{file}")
        TrainerState(**json.loads(state["trainer_state"])).save_to_json(f"{folder}/trainer_state.json")
        return folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if str(getattr(args.save_strategy, "value", args.save_strategy)) == "best":
            raise everystep.UsageError(
                'save_strategy="best" saves where no callback is asked',
                do='save_strategy="steps" or "epoch"; the best one is kept with metric_for_best_model, and found with '
                'run.best("eval_loss")',
            )
        resumed, self._resumed = self._resumed, None
        self._due, self._saved, self._waiting = False, None, set()
        self._saved_step = -1
        if resumed is not None:
            go_on_from(self.run, resumed)
            self._saved_step = resumed.step
        self._steps = [one.step for one in self.run.checkpoints()] if resumed is not None else []

    # when the Trainer would save ------------------------------------------------------------------------------------

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        own = self.save_steps is not None and state.global_step % self.save_steps == 0
        self._due = self._due or control.should_save or own
        control.should_save = False
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self._due = self._due or control.should_save
        control.should_save = False
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "train_runtime" in (logs or {}):  # the Trainer's last words, before it may load the best weights
            self._save(args, state, control, _IN_EPOCH if state.epoch % 1 else _BETWEEN_EPOCHS, kwargs)
            self._settle()
            self._offer_best(args, state)
        else:
            self._note(state, logs or {})

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self._note(state, metrics or {})

    def _note(self, state: Any, values: dict[str, Any]) -> None:
        if self._metrics_step != state.global_step:
            self._metrics, self._metrics_step = {}, state.global_step
        self._metrics.update(numbers(values))

    # when it is saved -----------------------------------------------------------------------------------------------

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._save(args, state, control, _BETWEEN_EPOCHS, kwargs)
        self._set_random_state(_BETWEEN_EPOCHS)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._save(args, state, control, _IN_EPOCH, kwargs)
        self._set_random_state(_IN_EPOCH)
        self._random = None
        self._folders.close()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._folders.close()
        if state.best_model_checkpoint is not None and self._best is not None:
            state.best_model_checkpoint = f"everystep://{self.run.name}@{self._best}"

    def _set_random_state(self, where: str) -> None:
        """Where the Trainer stands when it has taken the next batch: there it was saved, there it is put back."""
        if self._random is not None and load_state(self._random, "where") == where:
            self._random.set_random_state()

    def _save(self, args: Any, state: Any, control: Any, where: str, objects: dict[str, Any]) -> None:
        if not self._due:
            return
        self._due = False
        step = int(state.global_step)
        if not state.is_world_process_zero or step == self._saved_step:
            return
        if self._saved is not None:
            self._saved.wait()
        self._drop(self._waiting)
        self._steps.append(step)
        best = state.best_global_step
        self._best = best if best in self._steps else self._best
        trainer_state = self._trainer_state(state, control)
        content = {
            "model": objects["model"].state_dict(),
            "optimizer": None if args.save_only_model else objects["optimizer"].state_dict(),
            "lr_scheduler": None if args.save_only_model else objects["lr_scheduler"].state_dict(),
            "scaler": None if self._scaler is None or args.save_only_model else self._scaler.state_dict(),
            "trainer_state": json.dumps(trainer_state, sort_keys=True),
            "best_step": self._best,
            "where": where,
        }
        metrics = self._metrics if self._metrics_step == step else {}
        self._saved = self.run.save(step, state=content, metrics=metrics, reason="Transformers")
        self._saved_step = step
        self._waiting = self._beyond(args.save_total_limit)

    @property
    def _scaler(self) -> Any:
        return getattr(getattr(self._trainer, "accelerator", None), "scaler", None)

    def _trainer_state(self, state: Any, control: Any) -> dict[str, Any]:
        """What the Trainer writes to trainer_state.json."""
        callbacks = []
        if self._trainer is not None:
            self._trainer.store_flos()
            callbacks = self._trainer.callback_handler.callbacks
        states: dict[str, Any] = {}
        for one in (*callbacks, control):
            if isinstance(one, ExportableState):
                name = type(one).__name__
                states[name] = [*_listed(states[name]), one.state()] if name in states else one.state()
        found = dataclasses.asdict(state)
        found["stateful_callbacks"] = {**found["stateful_callbacks"], **states}
        found["best_model_checkpoint"] = None
        # The last words, which come before the last save here, are no part of its state.
        found["log_history"] = [row for row in found["log_history"] if "train_runtime" not in row]
        return found

    # what is kept ---------------------------------------------------------------------------------------------------

    def _beyond(self, limit: int | None) -> set[int]:
        """What save_total_limit leaves behind: the oldest that are neither the newest nor the best."""
        if limit is None or limit <= 0 or len(self._steps) <= limit:
            return set()
        protected = {self._steps[-1]} | ({self._best} & set(self._steps))
        excess = len(self._steps) - max(limit, len(protected))
        gone = [step for step in self._steps if step not in protected][: max(excess, 0)]
        self._steps = [step for step in self._steps if step not in gone]
        return set(gone)

    def _drop(self, steps: set[int]) -> None:
        if steps:
            drop(self.run, {one.id for one in self.run.checkpoints() if one.step in steps})

    def _settle(self) -> None:
        if self._saved is not None:
            self._saved.wait()
        self._drop(self._waiting)
        self._waiting = set()

    def _offer_best(self, args: Any, state: Any) -> None:
        """The folder that load_best_model_at_end reads."""
        if args.load_best_model_at_end and self._best is not None:
            state.best_model_checkpoint = self._materialise(self.run.at(self._best))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
