"""Lightning: a checkpoint callback with ModelCheckpoint's options, and the plug-in that brings its saves into a run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import everystep
from everystep.integrations.shared import drop, go_on_from, load_state, numbers

try:
    from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
    from lightning.pytorch.callbacks import ModelCheckpoint
except ImportError as error:
    raise everystep.Unsupported("Lightning is not installed here", do='pip install "everystep[lightning]"') from error

SCHEME = "everystep://"


class EverystepIO(CheckpointIO):
    """Takes Lightning's checkpoints into a run, in place of files: `Trainer(plugins=[EverystepIO(run)])`.

    A path is `everystep://RUN@STEP` (also `@latest`, `@best:val_loss`, `@TAG`), or the name of a file, which becomes a
    tag: `…/last.ckpt` is the tag `last`. `EverystepCheckpoint` brings this plug-in along by itself.

    Args:
        others: gets all other paths than `everystep://…`; None: they are names in the run.
    """

    def __init__(self, run: everystep.Run, others: CheckpointIO | None = None) -> None:
        self.run, self._others = run, others
        self.loaded: everystep.Checkpoint | None = None
        """What the last load came from."""
        self.places: list[Any] = []
        """The states of the train loaders in it."""
        self.removed: set[str] = set()
        """Paths of the run that a callback gave up, and that are still there."""
        self.references: list[Callable[[], set[str]]] = []
        """Of each callback: the paths that it still needs."""
        self._holding = False
        self._held: dict[str, Any] | None = None
        self._newest: everystep.Checkpoint | None = None
        self._given_up: set[str] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Saves, and waits until it is durable; a second path of the same step is one more name."""
        if not self._is_ours(path):
            self._others.save_checkpoint(checkpoint, path, storage_options)  # type: ignore[union-attr]
            return
        if storage_options is not None:
            raise everystep.UsageError(
                "storage_options= means nothing to everystep", where=str(path), do="leave it out"
            )
        if self._holding:
            self._held = checkpoint
            return
        step = int(checkpoint["global_step"])
        if self._newest is None and self.loaded is not None:
            go_on_from(self.run, self.loaded)
        if self._newest is None or self._newest.step != step:
            self._newest = self.run.save(step, state=checkpoint, reason=f"Lightning: {_name(path) or step}").wait()
        if self._newest is not None and not str(path).startswith(SCHEME):
            before = self.run.tags.get(_name(path))
            self._newest.tag(_name(path), move=True)
            self._give_up(before)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """The checkpoint's dict, its tensors in CPU memory. Nothing in it runs code, whatever `weights_only` says."""
        if not self._is_ours(path):
            other: dict[str, Any] = self._others.load_checkpoint(path, map_location, weights_only)  # type: ignore[union-attr]
            return other
        try:
            self.loaded = self.run.find(self._spec(str(path)))
        except everystep.NotFound as error:
            return self._load_file(path, error)
        found: dict[str, Any] = load_state(self.loaded)
        self.places = list(found.get("loops", {}).get("fit_loop", {}).get("state_dict", {}).get("combined_loader", []))
        return found

    def remove_checkpoint(self, path: Any) -> None:
        """Takes the name away; a checkpoint without one is dropped (the newest: once another is there)."""
        if not self._is_ours(path):
            self._others.remove_checkpoint(path)  # type: ignore[union-attr]
        elif str(path).startswith(SCHEME):
            self.removed.add(str(path))
        elif _name(path) in self.run.tags:
            checkpoint = self.run.tagged(_name(path))
            self.run.untag(_name(path))
            self._give_up(checkpoint)

    def _give_up(self, checkpoint: everystep.Checkpoint | None) -> None:
        """Drops what has lost its last name: now, or if it is the newest, once it is not."""
        if checkpoint is not None and not checkpoint.tags:
            self._given_up.add(checkpoint.id)
        drop(self.run, self._given_up)

    def teardown(self) -> None:
        """Nothing of the run ends here: whoever opened it closes it."""
        if self._others is not None:
            self._others.teardown()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Within it, what would be saved is only noted, whatever the number of paths; `take` gives it out, once."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False

    def take(self) -> dict[str, Any] | None:
        """What was held back."""
        held, self._held = self._held, None
        return held

    def _is_ours(self, path: Any) -> bool:
        return self._others is None or str(path).startswith(SCHEME)

    def _spec(self, path: str) -> str:
        if not path.startswith(SCHEME):
            return _name(path)
        name, mark, spec = path.removeprefix(SCHEME).rpartition("@")
        if not mark or name != self.run.name:
            raise everystep.UsageError(
                f"{path!r} is no checkpoint of the run {self.run.name!r}", do=f"{SCHEME}{self.run.name}@latest"
            )
        return spec

    def _load_file(self, path: Any, missing: everystep.NotFound) -> dict[str, Any]:
        """A path that is no name in the run may be a file of before."""
        self.loaded, self.places = None, []
        if str(path).startswith(SCHEME):
            raise missing
        try:
            found: dict[str, Any] = TorchCheckpointIO().load_checkpoint(path)
            return found
        except FileNotFoundError:
            raise missing from None


def _name(path: Any) -> str:
    return "" if str(path).startswith(SCHEME) else str(path).rpartition("/")[2].removesuffix(".ckpt")


class EverystepCheckpoint(ModelCheckpoint):
    """ModelCheckpoint that saves into a run: `Trainer(callbacks=[EverystepCheckpoint(run, monitor="val_loss")])`, and
    `trainer.fit(model, loader, ckpt_path=checkpoint.ckpt_path)` goes on exactly. The options are ModelCheckpoint's, and
    which checkpoints are saved and kept is decided by its own code.

    One step is saved once, however many names it would have had. Random states are kept, and put back; the place in the
    data is, too, if the loader is an `everystep.ResumableLoader(loader)`. Saving does not wait for the store.

    Args:
        run: of `everystep.open(…).run(…)`; whoever opened it closes it.
    """

    def __init__(
        self,
        run: everystep.Run,
        monitor: str | None = None,
        *,
        mode: str = "min",
        save_top_k: int = 1,
        save_last: bool | None = None,
        save_weights_only: bool = False,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        train_time_interval: Any | None = None,
        save_on_train_epoch_end: bool | None = None,
        save_on_exception: bool = False,
        verbose: bool = False,
    ) -> None:
        super().__init__(
            monitor=monitor, verbose=verbose, save_last=True if save_last else None, save_top_k=save_top_k,
            save_weights_only=save_weights_only, mode=mode, every_n_train_steps=every_n_train_steps,
            train_time_interval=train_time_interval, every_n_epochs=every_n_epochs,
            save_on_train_epoch_end=save_on_train_epoch_end, enable_version_counter=False,
            **({"save_on_exception": True} if save_on_exception else {}),
        )  # fmt: skip
        self.run = run
        self._io = EverystepIO(run)
        self._step = 0
        self._saved: everystep.Saved | None = None
        self._saved_step: int | None = None
        self._waiting: set[str] = set()
        self._seen: dict[str, float] = {}
        self._random: everystep.Checkpoint | None = None
        self._restored = False

    @property
    def ckpt_path(self) -> str | None:
        """For `trainer.fit(ckpt_path=…)`: the newest checkpoint; None in an empty run."""
        latest = self.run.latest
        return None if latest is None else self._path(latest.step)

    def format_checkpoint_name(
        self, metrics: Mapping[str, Any], filename: str | None = None, ver: int | None = None, prefix: str | None = None
    ) -> str:
        """A checkpoint's path is its run and step."""
        return self._path(self._step)

    def _path(self, step: int) -> str:
        return f"{SCHEME}{self.run.name}@{step}"

    # when Lightning asks for a save ---------------------------------------------------------------------------------

    @contextmanager
    def _asking(self, trainer: Any) -> Iterator[None]:
        self._step = int(trainer.global_step)
        with self._io.hold():
            yield

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Puts the plug-in in place: before Lightning looks for what to resume from."""
        strategy = trainer.strategy
        found = strategy.checkpoint_io
        if not isinstance(found, EverystepIO):
            found = strategy.checkpoint_io = EverystepIO(self.run, others=found)
        if found.run is not self.run:
            raise everystep.UsageError("two runs in one Trainer", do="give all callbacks and the plug-in the same run")
        self._io = found
        if self._needed not in found.references:
            found.references.append(self._needed)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        loaders = [loader for loader in _flat(trainer.train_dataloader) if _has_state(loader)]
        loaded, self._io.loaded = self._io.loaded, None
        if loaded is not None and trainer.ckpt_path:
            for loader, place in zip(loaders, self._io.places):
                if isinstance(loader, everystep.ResumableLoader):
                    loader.load_state_dict(place)
            if trainer.is_global_zero:
                self._go_on(loaded)
        for loader in loaders:
            if isinstance(loader, everystep.ResumableLoader):
                loader.before_batch(lambda: self._before_batch(trainer))

    def _go_on(self, loaded: everystep.Checkpoint) -> None:
        go_on_from(self.run, loaded)
        self._saved_step = loaded.step
        self._random = loaded
        self._set_random_state()
        self._random = loaded  # once more, behind what other callbacks do, where a loader says when
        if self._restored:  # a process that was killed may have left what it was about to drop
            self._drop({self._path(one.step) for one in self.run.checkpoints() if one.reason == self._reason})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._restored = True

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        with self._asking(trainer):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        with self._asking(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        with self._asking(trainer):
            super().on_validation_end(trainer, pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        with self._asking(trainer):
            super().on_exception(trainer, pl_module, exception)
        self._save(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        with self._asking(trainer):
            super().on_train_end(trainer, pl_module)
        self._save(trainer)
        self._settle()

    # when it is saved: as late as nothing has changed, so that validation and schedulers are behind it --------------

    def _before_batch(self, trainer: Any) -> None:
        """A loader is about to draw a batch."""
        self._save(trainer)
        self._set_random_state()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._save(trainer)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._save(trainer)
        self._random = None

    def _set_random_state(self) -> None:
        found, self._random = self._random, None
        left = found.set_random_state() if found is not None else []
        if left:
            text = f"run {self.run.name!r}: this continuation is not exact: {'; '.join(left)}"
            warnings.warn(text, everystep.EverystepWarning, stacklevel=2)

    def _save(self, trainer: Any) -> None:
        checkpoint = self._io.take()
        if checkpoint is None or checkpoint["global_step"] == self._saved_step:
            return
        if "lr_schedulers" in checkpoint:  # a plateau's step follows behind Lightning's hooks
            checkpoint["lr_schedulers"] = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
            checkpoint["optimizer_states"] = [trainer.strategy.optimizer_state(one) for one in trainer.optimizers]
        if self._saved is not None:
            self._saved.wait()  # never a gap in what Lightning believes is there
        self._drop(self._waiting)
        self._waiting, self._io.removed = self._io.removed, set()
        step = int(checkpoint["global_step"])
        self._saved = self.run.save(step, state=checkpoint, metrics=self._metrics(trainer), reason=self._reason)
        self._saved_step = step

    def _settle(self) -> None:
        """All is durable, and what was given up is gone."""
        if self._saved is not None:
            self._saved.wait()
        self._drop(self._waiting | self._io.removed)
        self._waiting, self._io.removed = set(), set()

    @property
    def _reason(self) -> str:
        return f"Lightning: {self.monitor or 'no monitor'}"

    def _metrics(self, trainer: Any) -> dict[str, float]:
        """Those of this step: Lightning goes on to show the values of steps before, which are left out."""
        found = {"epoch": float(trainer.current_epoch), **numbers(trainer.callback_metrics)}
        fresh = {n: v for n, v in found.items() if n in ("epoch", self.monitor) or self._seen.get(n) != v}
        self._seen = found
        return fresh

    def _needed(self) -> set[str]:
        if self.save_top_k == -1:
            return {self._path(one.step) for one in self.run.checkpoints()}
        return {*self.best_k_models, str(self.best_model_path), str(self.last_model_path)}

    def _drop(self, paths: set[str]) -> None:
        """What no callback refers to any more."""
        gone = paths - set().union(*(needed() for needed in self._io.references))
        if not gone:
            return
        steps = {int(path.rpartition("@")[2]) for path in gone}
        drop(self.run, {one.id for one in self.run.checkpoints() if one.step in steps})


def _has_state(loader: Any) -> bool:
    return all(callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict"))


def _flat(loaders: Any) -> list[Any]:
    """The train loaders in the order of Lightning."""
    if isinstance(loaders, Mapping):
        return [one for value in loaders.values() for one in _flat(value)]
    if isinstance(loaders, (list, tuple)):
        return [one for value in loaders for one in _flat(value)]
    return [] if loaders is None else [loaders]
