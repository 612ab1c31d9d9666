"""Threads that work is handed to."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")
S = TypeVar("S")
R = TypeVar("R")


class Pool:
    """Daemon threads, started as work comes; unlike an executor, it takes work while the interpreter shuts down.

    Args:
        workers: at most so many.
        begin: called by each thread before its first job.
    """

    def __init__(self, workers: int, name: str, begin: Callable[[], None] | None = None) -> None:
        self.workers, self._name, self._begin = workers, name, begin
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._closed = False

    def ready(self) -> None:
        """Starts all threads now: a thread takes on the priority of the one that starts it."""
        while len(self._threads) < self.workers:
            self._add_thread()

    def _add_thread(self) -> None:
        with self._lock:
            count = len(self._threads)
            if count < self.workers and not self._closed:
                thread = threading.Thread(target=self._work, name=f"{self._name}-{count}", daemon=True)
                self._threads.append(thread)
                thread.start()

    def _work(self) -> None:
        if self._begin is not None:
            self._begin()
        while (job := self._jobs.get()) is not None:
            job()
            job = None  # an idle thread holds nothing of what it did

    def start(self, function: Callable[[T], R], item: T) -> Task[R]:
        task: Task[R] = Task(function, item)
        self._jobs.put(task.run)
        if len(self._threads) < self.workers:
            self._add_thread()
        return task

    def map(self, function: Callable[[T], R], items: Iterable[T], window: int) -> Generator[R, None, None]:
        """Results in the order of the items, at most `window` of them under way or unread; the first error ends it."""
        pending: deque[Task[R]] = deque()
        try:
            for item in items:
                pending.append(self.start(function, item))
                if len(pending) >= window:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for task in pending:
                task.settle()

    def relay(
        self, first: Callable[[T], S], other: Pool, second: Callable[[S], R], items: Iterable[T], window: int
    ) -> Generator[R, None, None]:
        """What the other pool makes of what this one makes of each item: as it comes, not in order. At most `window`
        of them are under way or unread; the first error ends it."""
        done: queue.SimpleQueue[Task[R]] = queue.SimpleQueue()
        under_way = 0

        def finish(task: Task[Any]) -> None:
            task.run()
            done.put(task)

        def begin(item: T) -> None:
            task: Task[Any] = Task(first, item)
            task.run()
            if task.failed:
                done.put(task)
            else:
                other.start(finish, Task(second, task.result()))

        try:
            for item in items:
                if under_way >= window:
                    under_way -= 1
                    yield done.get().result()
                self.start(begin, item)
                under_way += 1
            while under_way:
                under_way -= 1
                yield done.get().result()
        finally:
            for _ in range(under_way):
                done.get()

    def close(self) -> None:
        """Ends the threads, once they have done what was asked of them."""
        with self._lock:  # whoever has just handed in work may be about to start one more
            self._closed = True
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()


class Task(Generic[R]):
    """One call on its way through a pool."""

    def __init__(self, function: Callable[[Any], R], item: Any) -> None:
        self._function, self._item = function, item
        self._done = threading.Event()
        self._value: Any = None
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._value = self._function(self._item)
        except BaseException as error:  # noqa: BLE001  handed to whoever asks for the result
            self._error = error
        self._done.set()

    def settle(self, seconds: float | None = None) -> bool:
        """Whether it has ended, after at most so many seconds."""
        return self._done.wait(seconds)

    def result(self) -> R:
        self._done.wait()
        if self._error is not None:
            raise self._error
        return cast(R, self._value)

    @property
    def failed(self) -> bool:
        """Whether it has ended with an error."""
        return self._error is not None
