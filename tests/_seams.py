"""Other outsides for tests: a clock that nobody waits for, and work done where it is asked for."""

from collections.abc import Callable
from typing import Any

from everystep.seam import Files, Pool, Process, Seam, Task

HOUR = 3600.0


class InlinePool(Pool):
    """Does the work at once, on the thread that asks for it."""

    def __init__(self) -> None:
        super().__init__(0, "")

    def start(self, function: Callable[[Any], Any], item: Any) -> Task[Any]:
        task: Task[Any] = Task(function, item)
        task.run()
        return task


class QuickSeam(Seam):
    """Sleeping moves the clock on and takes no time; whoever sleeps for a day hangs, and is told so."""

    def __init__(self, files: Files | None = None, pid: int = 1) -> None:
        super().__init__(files)
        self.slept = 0.0
        self.told: list[str] = []
        self._pid = pid

    def now(self) -> float:
        return 1_700_000_000.0 + self.slept

    def monotonic(self) -> float:
        return self.slept

    def sleep(self, seconds: float) -> None:
        self.slept += seconds
        assert self.slept < 24 * HOUR, "waits for ever"

    def pool(self, workers: int, name: str, begin: Callable[[], None] | None = None) -> Any:
        return InlinePool()

    def process(self) -> Process:
        return Process("host", "machine", "boot", self._pid, str(self._pid))

    def is_gone(self, other: Process) -> bool:
        return True

    def ask(self, *command: str, seconds: float = 3.0) -> str | None:
        return None

    def tell(self, line: str) -> None:
        self.told.append(line)

    def at_exit(self, function: Callable[[], None]) -> Callable[[], None]:
        return lambda: None
