"""The training loops: steps and batches that resume by themselves and save at their top."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from everystep import adapters, rules
from everystep.adapters import loader as loaders
from everystep.errors import UsageError

if TYPE_CHECKING:
    from everystep.run import Run


class _Loop:
    """What both loops share: when to save, stopping, signals."""

    def __init__(self, run: Run, rule: rules.AnyOf, strict: bool) -> None:
        self._run, self._rule = run, rule
        if rule.rules and not run._tracked:
            raise UsageError(
                "a loop that saves by itself needs to know what",
                do="run.track(model=…) before the loop; or leave save_every= out, and run.save(step, state=…) in it",
            )
        run.stopped = None
        self.step = run.resume(strict=strict)
        """Completed steps, and the one under way while the loop's body runs."""
        self._clock = run._vault.seam.monotonic
        self._saved_at = self._clock()
        self._saved_step = self.step if self.step else None
        self._bests = self._past_bests()
        self._running = False
        self._restore_signals = _watch_signals(run)

    def _past_bests(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for checkpoint in self._run.checkpoints() if self._rule.metrics() else []:
            self._note_bests(checkpoint.metrics, found)
        return found

    def _note_bests(self, metrics: Any, bests: dict[str, float]) -> None:
        for name, mode in self._rule.metrics().items():
            if name in metrics:
                value = float(rules.number(name, metrics[name]))
                if rules.better(value, bests.get(name), mode):
                    bests[name] = value

    def _top(self, epoch: int | None, epoch_ended: bool, last: bool) -> bool:
        """After a completed step: saves if due; answers whether the loop ends here."""
        run = self._run
        metrics = {**run._recorded.get(None, {}), **run._recorded.get(self.step, {})}
        seconds = self._clock() - self._saved_at
        reason = self._rule.due(rules.Moment(self.step, epoch, epoch_ended, seconds, metrics, self._bests))
        if last:
            reason = "the last step"
        if run.stopped is not None:
            reason = run.stopped
        self._note_bests(metrics, self._bests)
        if reason is not None and run._tracked and self._saved_step != self.step:
            run.save(self.step, reason=reason)
            self._saved_step, self._saved_at = self.step, self._clock()
        return last or run.stopped is not None

    def end(self) -> None:
        """Gives signals back to who had them."""
        self._restore_signals()
        self._restore_signals = lambda: None
        self._run._step = None


def _watch_signals(run: Run) -> Any:
    """SIGTERM and SIGINT end the loop at its next top; the handler keeps no run alive."""
    held = weakref.ref(run)

    def stop(name: str) -> None:
        found = held()
        if found is not None:
            found.stop(name)

    return run._vault.seam.on_signals(stop)


class Steps(_Loop):
    """Yields first … total; see `Run.steps`. It has resumed when it exists, before the first step is asked for."""

    def __init__(self, run: Run, total: int | None, rule: rules.AnyOf, strict: bool) -> None:
        if total is not None and (isinstance(total, bool) or not isinstance(total, int) or total < 0):
            raise UsageError(f"steps({total!r}): the total is a count of steps", do="run.steps(10_000, save_every=100)")
        self._total = total
        super().__init__(run, rule, strict)

    def __iter__(self) -> Iterator[int]:
        return self

    def __len__(self) -> int:
        if self._total is None:
            raise TypeError("a loop without an end has no length")
        return max(0, self._total - self.step)

    def __next__(self) -> int:
        last = self._total is not None and self.step >= self._total
        if (self._running and self._top(None, False, last)) or last:
            self._running = False
            self.end()
            raise StopIteration
        self._running = True
        self.step += 1
        self._run._step = self.step
        return self.step


class Batches(_Loop):
    """Yields the batches that are left; see `Run.batches`. Each is one step; `epoch` counts from 1."""

    def __init__(self, run: Run, loader: Iterable[Any], epochs: int, rule: rules.AnyOf, strict: bool) -> None:
        if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 0:
            raise UsageError(f"batches(epochs={epochs!r}): a count of passes over the data", do="epochs=10")
        self._source = loaders.source(loader)
        self._epochs = epochs
        super().__init__(run, rule, strict)
        where = run._restored_loop if self.step else {}
        self._done = int(where.get("epochs_done", 0))
        self._consumed = int(where.get("batch", 0))
        self._begun: dict[str, Any] | None = where.get("begun")
        if self.step and "epochs_done" not in where:
            raise UsageError(
                f"step {self.step} of run {run.name!r} was not saved by batches(), its place in the data is unknown",
                do="go on with run.steps(…), as it was saved",
            )
        if self._begun is not None and run.report is not None:
            run.report.inexact += self._source.compare(self._begun["source"])
        self._batches: Iterator[Any] | None = None
        self._mark()

    @property
    def epoch(self) -> int:
        """The epoch under way, from 1."""
        return min(self._done + 1, self._epochs)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._running:
            self._running = False
            self._consumed += 1
            ended = self._source.length is not None and self._consumed >= self._source.length
            if self._complete(ended):
                return self._stop()
        while self._done < self._epochs:
            batches = self._batches if self._batches is not None else self._start_epoch()
            try:
                batch = next(batches)
            except StopIteration:
                if self._complete(True):
                    return self._stop()
                continue
            self._running = True
            self.step += 1
            self._run._step = self.step
            return batch
        return self._stop()

    def _complete(self, ended: bool) -> bool:
        """Notes the position, then saves if due."""
        if ended:
            self._done, self._consumed, self._begun, self._batches = self._done + 1, 0, None, None
        self._mark()
        return self._top(self._done, ended, self._done >= self._epochs)

    def _stop(self) -> Any:
        self._batches = None
        self.end()
        raise StopIteration

    def _start_epoch(self) -> Iterator[Any]:
        """The same order as when the epoch began, from the first batch that was not consumed."""
        if self._begun is None:
            self._begun = {"random": adapters.random_state(), "source": self._source.state(self._done)}
            self._batches = self._source.start(self._done, 0)
        else:
            now = adapters.random_state()
            adapters.set_random_state(self._begun["random"])
            self._source.set_state(self._begun["source"])
            self._batches = self._source.start(self._done, self._consumed)
            adapters.set_random_state(now)
        self._mark()
        return self._batches

    def _mark(self) -> None:
        """Where in the data the run is; saved with every checkpoint."""
        self._run._loop = {"epochs_done": self._done, "batch": self._consumed, "begun": self._begun}
