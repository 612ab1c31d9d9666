"""An object store that is simulated, and a time that passes only while everybody waits.

The code under test is the real one: it sees a seam whose threads take turns, one at a time, in the order of a virtual
clock. A request costs the time that the model says and nothing else does, so that what is measured are requests, bytes
and round trips, the same at every run with the same seed.
"""

from __future__ import annotations

import heapq
import random
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from everystep.errors import Unreachable
from everystep.seam import Pool, Process, Seam, Task
from everystep.storage import MemoryStorage, Stat

STACK_BYTES = 512 << 10
EPOCH = 1_700_000_000.0


class Over(BaseException):
    """The simulation has ended: unwinds the threads that still wait."""


class Stuck(Exception):
    """Everybody waits, and for each other."""


class Turn:
    """One thread, and when it runs next."""

    def __init__(self) -> None:
        self._go = threading.Semaphore(0)
        self.ticket = 0
        self.ended = False
        self.joining: list[Turn] = []
        self.error: BaseException | None = None

    def go(self) -> None:
        self._go.release()

    def await_turn(self) -> None:
        self._go.acquire()


class World(Seam):
    """The outside, simulated. `run` starts what is given side by side, and ends when all of it has ended."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.chance = random.Random(seed)
        self.time = 0.0
        self.told: list[str] = []
        self._order = 0
        self._waiting: list[tuple[float, int, Turn, int]] = []
        self._driver = self._current = Turn()
        self._over = self._stuck = False
        self._turns: dict[Turn, threading.Thread] = {}

    def run(self, works: Iterable[Callable[[], object]]) -> list[BaseException | None]:
        """What each of them raised, if anything.

        Raises:
            Stuck: if they would wait for ever.
        """
        turns = [self._spawn(work) for work in works]
        for turn in turns:
            self.join(turn)
        return [turn.error for turn in turns]

    def join(self, turn: Turn) -> None:
        while not turn.ended:
            turn.joining.append(self._current)
            self.park()

    def end(self) -> None:
        """Unwinds every thread that still waits. Who is left may go on alone."""
        self._over = True
        for turn, thread in list(self._turns.items()):
            turn.go()
            thread.join()
        self._turns.clear()
        self._waiting.clear()
        self._over = self._stuck = False
        self._current = self._driver

    # turns ---------------------------------------------------------------------------------------------------------

    def _spawn(self, work: Callable[[], object]) -> Turn:
        turn = Turn()

        def body() -> None:
            turn.await_turn()
            try:
                if not self._over:
                    work()
            except Over:
                return
            except BaseException as error:  # noqa: BLE001  for whoever asks
                turn.error = error
            turn.ended = True
            self._turns.pop(turn, None)
            for other in turn.joining:
                self.wake(other)
            if not self._over:
                self._hand_over(self._next())

        before = threading.stack_size(STACK_BYTES)
        try:
            self._turns[turn] = thread = threading.Thread(target=body, daemon=True)
            thread.start()
        finally:
            threading.stack_size(before)
        self.wake(turn)
        return turn

    def wake(self, turn: Turn, seconds: float = 0.0) -> None:
        """Lets a thread run after so many seconds, unless something else wakes it before."""
        self._order += 1
        heapq.heappush(self._waiting, (self.time + seconds, self._order, turn, turn.ticket))

    def _next(self) -> Turn:
        while self._waiting:
            time, _, turn, ticket = heapq.heappop(self._waiting)
            if ticket == turn.ticket and not turn.ended:
                self.time = max(self.time, time)
                turn.ticket += 1
                return turn
        self._stuck = True
        return self._driver

    def _hand_over(self, turn: Turn) -> None:
        self._current = turn
        turn.go()

    def park(self) -> None:
        """Gives the turn to the next one; back when somebody has woken this thread."""
        if self._over:
            raise Over
        me, following = self._current, self._next()
        if following is not me:
            self._hand_over(following)
            me.await_turn()
        if self._over:
            raise Over
        if self._stuck:
            raise Stuck("everybody waits for what will never happen")

    @property
    def current(self) -> Turn:
        return self._current

    # the seam ------------------------------------------------------------------------------------------------------

    def now(self) -> float:
        return EPOCH + self.time

    def monotonic(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.wake(self._current, seconds)
        self.park()

    def token(self, size: int) -> str:
        return self.chance.randbytes(size).hex()

    def start(self, target: Callable[[], None], name: str) -> Any:
        return Started(self, self._spawn(target))

    def pool(self, workers: int, name: str, begin: Callable[[], None] | None = None) -> Any:
        # What only computes takes no virtual time: it is done where it is asked for.
        return Inline() if name in ("everystep-copy", "everystep-encode") else Workers(self, workers)

    def condition(self) -> Any:
        return Condition(self)

    def lock(self) -> Any:
        return Lock(self)

    def step_back(self, nice: int) -> None:
        return

    def memory(self) -> int | None:
        return None

    def process(self) -> Process:
        return Process("simulated", "machine", "boot", 1, "1")

    def is_gone(self, other: Process) -> bool:
        return False

    def ask(self, *command: str, seconds: float = 3.0) -> str | None:
        return None

    def cache_folder(self) -> str | None:
        return None

    def tell(self, line: str) -> None:
        self.told.append(line)

    def at_exit(self, function: Callable[[], None]) -> Callable[[], None]:
        return lambda: None


class Started:
    """What a thread's starter holds."""

    def __init__(self, world: World, turn: Turn) -> None:
        self._world, self._turn = world, turn

    def join(self) -> None:
        self._world.join(self._turn)


class Lock:
    """Reentrant, like the seam's own."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._owner: Turn | None = None
        self._depth = 0
        self._queue: deque[Turn] = deque()

    def __enter__(self) -> Lock:
        me = self._world.current
        if self._owner is None:
            self._owner = me
        while self._owner is not me:
            self._queue.append(me)
            self._world.park()
        self._depth += 1
        return self

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = self._queue.popleft() if self._queue else None
            if self._owner is not None:
                self._world.wake(self._owner)


class Condition(Lock):
    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._sleepers: list[Turn] = []

    def wait(self, timeout: float | None = None) -> bool:
        me, depth = self._world.current, self._depth
        self._sleepers.append(me)
        self._depth = 1
        self.__exit__()
        if timeout is not None:
            self._world.wake(me, timeout)
        self._world.park()
        woken = me not in self._sleepers
        if not woken:
            self._sleepers.remove(me)
        self.__enter__()
        self._depth = depth
        return woken

    def wait_for(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        end = None if timeout is None else self._world.time + timeout
        while not predicate():
            left = None if end is None else end - self._world.time
            if left is not None and left <= 0:
                return False
            self.wait(left)
        return True

    def notify_all(self) -> None:
        sleepers, self._sleepers = self._sleepers, []
        for turn in sleepers:
            self._world.wake(turn)


class Inline(Pool):
    """Does the work at once, on the thread that asks for it."""

    def __init__(self) -> None:
        super().__init__(0, "")

    def start(self, function: Callable[[Any], Any], item: Any) -> Task[Any]:
        task: Task[Any] = Task(function, item)
        task.run()
        return task


class Job(Task[Any]):
    """One call on its way through a pool; who asks for its result waits in virtual time."""

    def __init__(self, world: World, function: Callable[[Any], Any], item: Any) -> None:
        super().__init__(function, item)
        self._world, self._asking = world, list[Turn]()

    def run(self) -> None:
        super().run()
        for turn in self._asking:
            self._world.wake(turn)

    def settle(self) -> None:
        while not self._done.is_set():
            self._asking.append(self._world.current)
            self._world.park()

    def result(self) -> Any:
        self.settle()
        return super().result()


class Workers(Pool):
    """Threads of the simulation that take jobs; they end when there is nothing to do, and others begin."""

    def __init__(self, world: World, workers: int) -> None:
        super().__init__(0, "")
        self.workers, self._world, self._busy = workers, world, 0
        self._queue: deque[Job] = deque()

    def start(self, function: Callable[[Any], Any], item: Any) -> Job:
        job = Job(self._world, function, item)
        self._queue.append(job)
        if self._busy < self.workers:
            self._busy += 1
            self._world.start(self._take, "worker")
        return job

    def _take(self) -> None:
        while self._queue:
            self._queue.popleft().run()
        self._busy -= 1

    def relay(
        self, first: Callable[[Any], Any], other: Pool, second: Callable[[Any], Any], items: Iterable[Any], window: int
    ) -> Generator[Any, None, None]:
        """In order, which is one way of coming: so that whoever waits does so in virtual time."""
        yield from other.map(second, self.map(first, items, self.workers), window)

    def close(self) -> None:
        return


# the store -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """S3 as its makers describe it, and as people measure it from the same region."""

    writes_per_second: int = 3500
    reads_per_second: int = 5500
    """Of one prefix, and the repository is one: beyond them a request is answered with 503."""
    read_seconds: float = 0.020
    write_seconds: float = 0.040
    list_seconds: float = 0.060
    spread: float = 0.4
    """Of the logarithm of the time: a tenth of the requests takes 1.7 times the middle one."""
    slow_share: float = 0.001
    slow_seconds: float = 1.0
    bytes_per_second: float = 80e6
    """Of one request."""
    page: int = 1000
    """Keys of one answer to a listing."""


@dataclass
class Bill:
    """What was asked of the store."""

    requests: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    bytes_in: int = 0
    """From the store."""
    bytes_out: int = 0
    by_second: Counter[tuple[str, int]] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return sum(self.requests.values())

    @property
    def busiest(self) -> int:
        """Requests in the busiest second."""
        seconds: Counter[int] = Counter()
        for (_, second), count in self.by_second.items():
            seconds[second] += count
        return max(seconds.values(), default=0)


class SimulatedStorage:
    """Objects in memory behind the latency, the limits and the tails of an object store. Refuses with `Unreachable`, as
    the real one does, where it is asked too often: put a `RetryingStorage` around it."""

    fan_out = 32

    def __init__(self, world: World, model: Model | None = None) -> None:
        self.url = self.identity = "simulated://bucket"
        self.world, self.model = world, model or Model()
        self.inner = MemoryStorage("simulated", world)
        self.bill = Bill()

    def new_bill(self) -> Bill:
        """What was asked until now; from here on it counts anew."""
        bill, self.bill = self.bill, Bill()
        return bill

    def get(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        return self._ask("GET", lambda: self.inner.get(key, start, stop), lambda data: len(data))

    def put(self, key: str, data: Iterable[Any]) -> None:
        body = b"".join(data)
        self._ask("PUT", lambda: self.inner.put(key, [body]), up=len(body))

    def put_new(self, key: str, data: bytes) -> None:
        self._ask("PUT", lambda: self.inner.put_new(key, data), up=len(data))

    def list(self, prefix: str, deep: bool = True, after: str = "") -> Iterator[str]:
        entries: list[str] = self._ask("LIST", lambda: list(self.inner.list(prefix, deep, after)))
        for number, entry in enumerate(entries):
            if number and number % self.model.page == 0:
                self._ask("LIST", lambda: None)
            yield entry

    def delete(self, key: str) -> None:
        self._ask("DELETE", lambda: self.inner.delete(key))

    def stat(self, key: str) -> Stat:
        return self._ask("HEAD", lambda: self.inner.stat(key))

    def _ask(
        self, verb: str, act: Callable[[], Any], down: Callable[[Any], int] = lambda answer: 0, up: int = 0
    ) -> Any:
        model, bill = self.model, self.bill
        writes = verb in ("PUT", "DELETE")
        second = ("write" if writes else "read", int(self.world.time))
        bill.requests[verb] += 1
        bill.by_second[second] += 1
        seconds = self._seconds(
            {"LIST": model.list_seconds}.get(verb, model.write_seconds if writes else model.read_seconds)
        )
        if bill.by_second[second] > (model.writes_per_second if writes else model.reads_per_second):
            bill.refused += 1
            self.world.sleep(seconds / 2)
            raise Unreachable("503 Slow Down", where=self.url)
        bill.bytes_out += up
        self.world.sleep(seconds / 2 + up / model.bytes_per_second)
        try:
            answer = act()
        except BaseException:
            self.world.sleep(seconds / 2)
            raise
        nbytes = down(answer)
        bill.bytes_in += nbytes
        self.world.sleep(seconds / 2 + nbytes / model.bytes_per_second)
        return answer

    def _seconds(self, middle: float) -> float:
        chance = self.world.chance
        if chance.random() < self.model.slow_share:
            return self.model.slow_seconds
        return middle * chance.lognormvariate(0.0, self.model.spread)
