"""The training loops: steps and batches that resume by themselves and save at their top."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from everystep import adapters, rules
from everystep.adapters import loader as loaders
from everystep.errors import UsageError
from everystep.metrics import measure

if TYPE_CHECKING:
    from everystep.run import Run

_END: Any = object()


class Loop:
    """What both loops share: when to save, stopping, signals."""

    def __init__(self, run: Run, rule: rules.AnyOf, strict: bool) -> None:
        self._run, self._rule = run, rule
        self._modes = rule.metrics()
        self._forget_signals: Callable[[], None] | None = None
        if rule.rules and not run._tracked:
            raise UsageError(
                "a loop that saves by itself needs to know what",
                do="run.track(model=…) before the loop; or leave save_every= out, and run.save(step, state=…) in it",
            )
        self.step = run.resume(strict=strict)
        """Completed steps, and the one under way while the loop's body runs."""
        run._enter(self)
        self._clock = run._vault.seam.monotonic
        self._saved_at = self._clock()
        self._saved_step = self.step if self.step else None
        self._bests = self._past_bests()
        self._running = False
        self._by_hand: int | None = None
        self._lost: tuple[str, int] | None = None
        """Why the loop ended after which step, where it could not save that step itself."""

    def __iter__(self) -> Iterator[Any]:
        """However the loop is left, by its end, a break or an error: signals are given back at once."""
        try:
            while (value := self._next()) is not _END:
                yield value
        finally:
            self.end()

    def __next__(self) -> Any:
        value = self._next()
        if value is _END:
            raise StopIteration
        return value

    @property
    def rule(self) -> rules.AnyOf:
        """When it saves."""
        return self._rule

    def extent(self) -> tuple[int | None, int | None]:
        """Steps in all, and of an epoch, as far as they are known."""
        return None, None

    def _next(self) -> Any:
        """Saves what is due of the step before, and answers what the next one works on, or _END."""
        raise NotImplementedError

    def _position(self) -> dict[str, Any]:
        """Where in the data the run is; saved with every checkpoint."""
        return {}

    def _begin_step(self) -> None:
        if self._forget_signals is None:
            self._forget_signals = _watch_signals(self._run)
        self._running = True
        self.step += 1
        self._run._step = self.step

    def _past_bests(self) -> dict[str, float]:
        """The best of each metric that a rule asks for, up to here: what an uninterrupted loop would remember."""
        found: dict[str, float] = {}
        for name in self._modes:
            for step, value in self._run.series(name):
                if step <= self.step:
                    self._note_best(name, value, found)
        return found

    def _note_best(self, name: str, value: Any, bests: dict[str, float]) -> None:
        measured = measure(name, value)
        if measured is not None and rules.better(measured, bests.get(name), self._modes[name]):
            bests[name] = measured

    def _top(self, epoch: int | None, epoch_ended: bool, last: bool) -> bool:
        """After a completed step: saves if due; answers whether the loop ends here."""
        run = self._run
        run._tracking.reseed(self.step)
        metrics = run._recorded.at(self.step)
        seconds = self._clock() - self._saved_at
        reason = self._rule.due(rules.Moment(self.step, epoch, epoch_ended, seconds, metrics, dict(self._bests)))
        for name in self._modes.keys() & metrics.keys():
            self._note_best(name, metrics[name], self._bests)
        if last:
            reason = "the last step"
        if run.stopped is not None:
            reason = run.stopped
        ends = last or run.stopped is not None
        if run.stopped is not None and not run._tracked:
            self._lost = run.stopped, self.step
        if reason is not None and run._tracked and self._saved_step != self.step:
            saved = run._save(self.step, None, {}, reason, may_skip=run._when_busy == "skip" and not ends)
            if not saved.skipped:
                self._saved_step, self._saved_at = self.step, self._clock()
        return ends

    def end(self) -> None:
        """Gives signals back to who had them."""
        if self._forget_signals is not None:
            self._forget_signals()
            self._forget_signals = None
        if self._run._step == self.step:
            self._run._step = None

    def leave(self) -> None:
        """The end, for good: also gives back what the loop holds."""
        self.end()

    def note_saved(self, step: int) -> None:
        """A save has begun, whoever asked for it."""
        self._by_hand = step

    def tell_lost(self) -> None:
        """Once nobody can save behind the loop any more: that a signal has cost the steps since the last save."""
        lost, self._lost = self._lost, None
        if lost is None or (self._by_hand is not None and self._by_hand >= lost[1]):
            return
        kept = f"what is saved is step {self._by_hand}" if self._by_hand is not None else "nothing was saved in it"
        self._run._warn(
            f"{lost[0]} ended the loop after step {lost[1]}, which is not saved: a loop saves what is tracked, and "
            f"nothing is; {kept}. Behind the loop: if run.stopped: run.save(step, state=…); or let the loop save, with "
            "run.track(train=(get, put))"
        )


def _watch_signals(run: Run) -> Callable[[], None]:
    """SIGTERM and SIGINT end the loop at its next top; the handler keeps no run alive."""
    held = weakref.ref(run)

    def stop(name: str) -> None:
        found = held()
        if found is not None:
            found.stop(name)

    return run._vault.seam.on_signals(stop)


class Steps(Loop):
    """Yields first … total; see `Run.steps`. It has resumed when it exists, before the first step is asked for."""

    def __init__(self, run: Run, total: int | None, rule: rules.AnyOf, strict: bool) -> None:
        if total is not None and (isinstance(total, bool) or not isinstance(total, int) or total < 0):
            raise UsageError(f"steps({total!r}): the total is a count of steps", do="run.steps(10_000, save_every=100)")
        self._total = total
        super().__init__(run, rule, strict)

    def extent(self) -> tuple[int | None, int | None]:
        return self._total, None

    def __len__(self) -> int:
        if self._total is None:
            raise TypeError("a loop without an end has no length")
        return max(0, self._total - self.step)

    def _next(self) -> Any:
        last = self._total is not None and self.step >= self._total
        running, self._running = self._running, False
        if (running and self._top(None, False, last)) or last:
            self.leave()
            return _END
        self._begin_step()
        return self.step


class Batches(Loop):
    """Yields the batches that are left; see `Run.batches`. Each is one step; `epoch` counts from 1."""

    def __init__(self, run: Run, loader: Iterable[Any], epochs: int, rule: rules.AnyOf, strict: bool) -> None:
        if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 0:
            raise UsageError(f"batches(epochs={epochs!r}): a count of passes over the data", do="epochs=10")
        if any(target is loader for target in run._tracked.values()):
            raise UsageError(
                "the loader is tracked, and batches() keeps its position as well: it would skip twice",
                do="leave it out of track(), or iterate it yourself inside run.steps(…)",
            )
        self._source = loaders.source(loader)
        self._epochs = epochs
        self._done = self._consumed = 0
        self._begun: dict[str, Any] | None = None
        self._batches: Iterator[Any] | None = None
        self._ahead: Any = _END
        super().__init__(run, rule, strict)
        self._kept: dict[str, Any] | None = None
        if self.step:
            self._go_to(run._restored_position)

    def _go_to(self, where: dict[str, Any]) -> None:
        if "epochs_done" not in where:
            raise UsageError(
                f"step {self.step} of run {self._run.name!r} was not saved by batches(), its place in the data is "
                "unknown",
                do="go on with run.steps(…), as it was saved",
            )
        self._done, self._consumed = where["epochs_done"], where["batch"]
        self._begun, self._kept = where["begun"], where["source"]
        self._run._say_inexact(self._source.compare(self._kept))

    def extent(self) -> tuple[int | None, int | None]:
        length = self._source.length
        return (length * self._epochs if length is not None else None), length

    @property
    def epoch(self) -> int:
        """The epoch under way, from 1."""
        return min(self._done + 1, self._epochs)

    def _next(self) -> Any:
        if self._running:
            self._running = False
            self._consumed += 1
            if self._complete(self._at_end()):
                return self._stop()
        while self._done < self._epochs:
            batches = self._batches if self._batches is not None else self._start_epoch()
            batch, self._ahead = self._ahead, _END
            if batch is _END:
                batch = next(batches, _END)
            if batch is not _END:
                self._begin_step()
                return batch
            if self._complete(True):
                return self._stop()
        return self._stop()

    def _at_end(self) -> bool:
        """Whether the epoch is over. Its iterator is run to its end, for what it may do there."""
        if self._batches is None or self._source.length is None or self._consumed < self._source.length:
            return False
        self._ahead = next(self._batches, _END)
        return self._ahead is _END

    def _complete(self, ended: bool) -> bool:
        """Notes the position, then saves if due."""
        if ended:
            self._done, self._consumed, self._begun, self._batches = self._done + 1, 0, None, None
        return self._top(self._done, ended, self._done >= self._epochs)

    def _stop(self) -> Any:
        self.leave()
        return _END

    def leave(self) -> None:
        self.end()
        self._batches = None
        self._source.close()

    def _start_epoch(self) -> Iterator[Any]:
        """The same order as when the epoch began, from the first batch that was not consumed."""
        kept, self._kept = self._kept, None
        if self._begun is None:
            if kept is not None:
                self._source.set_generators(kept["generators"])
            self._begun = self._source.begin()
            self._batches = self._source.start(self._begun, self._done, 0)
            return self._batches
        now = adapters.random_state()
        self._batches = self._source.start(self._begun, self._done, self._consumed)
        if kept is not None:
            self._source.set_generators(kept["generators"])
            self._run._say_inexact(self._source.check(kept, self._consumed))
        adapters.set_random_state(now)
        return self._batches

    def _position(self) -> dict[str, Any]:
        return {
            "epochs_done": self._done,
            "batch": self._consumed,
            "begun": self._begun,
            "source": self._source.state(self._consumed),
        }
