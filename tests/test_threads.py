"""Pools: work that comes back in order, or as it comes; what fails; how many threads there are."""

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from everystep.seam import Pool


@pytest.fixture
def pools() -> Iterator[tuple[Pool, Pool]]:
    with closing(Pool(4, "first")) as first, closing(Pool(2, "second")) as second:
        yield first, second


def test_a_thread_is_started_for_each_job_up_to_the_number_of_workers() -> None:
    def names() -> list[str]:
        return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("some-"))

    with closing(Pool(3, "some")) as pool:
        assert names() == []
        pool.start(int, "1").result()
        assert names() == ["some-0"]
        assert list(pool.map(int, "12345678", 4)) == [1, 2, 3, 4, 5, 6, 7, 8]
        assert names() == ["some-0", "some-1", "some-2"]
    assert names() == []


def test_all_threads_can_be_started_first() -> None:
    begun: list[str] = []
    with closing(Pool(3, "some", lambda: begun.append(threading.current_thread().name))) as pool:
        pool.ready()
        pool.ready()
    assert sorted(begun) == ["some-0", "some-1", "some-2"]


def test_a_relay_waits_for_none_that_is_late(pools: tuple[Pool, Pool]) -> None:
    first, second = pools
    others = threading.Semaphore(0)

    def fetch(item: int) -> int:
        if item == 0:
            for _ in range(9):
                assert others.acquire(timeout=30), "the others wait for the first"
        return item

    def decode(item: int) -> int:
        others.release()
        return item * item

    found = list(first.relay(fetch, second, decode, range(10), 10))
    assert found[-1] == 0 and sorted(found) == [n * n for n in range(10)]


def test_no_more_than_the_window_is_under_way(pools: tuple[Pool, Pool]) -> None:
    first, second = pools
    lock, taken, most = threading.Lock(), 0, 0

    def items() -> Iterator[int]:
        nonlocal taken, most
        for item in range(50):
            with lock:
                taken += 1
                most = max(most, taken - len(found))
            yield item

    found: list[int] = []
    for one in first.relay(lambda item: item, second, lambda item: item, items(), 5):
        found.append(one)
    assert sorted(found) == list(range(50)) and most <= 6


@pytest.mark.parametrize("at", ["first", "second"])
def test_the_first_error_ends_a_relay_once_what_is_under_way_has_ended(pools: tuple[Pool, Pool], at: str) -> None:
    first, second = pools
    ended: list[int] = []

    def step(here: str, item: int) -> int:
        if here == at and item == 3:
            raise ValueError("three")
        if here == "second":
            ended.append(item)
        return item

    with pytest.raises(ValueError, match="three"):
        list(first.relay(lambda item: step("first", item), second, lambda item: step("second", item), range(100), 8))
    count = len(ended)
    assert count < 100
    assert list(second.map(int, "1", 1)) == [1] and len(ended) == count, "the pools go on, and nothing was left behind"


def test_a_relay_that_is_left_settles_what_it_began(pools: tuple[Pool, Pool]) -> None:
    first, second = pools
    ended: list[int] = []
    with closing(first.relay(lambda item: item, second, lambda item: ended.append(item), range(100), 8)) as relay:
        next(relay)
    count = len(ended)
    assert 8 <= count <= 9
    second.start(int, "1").result()
    assert len(ended) == count


def test_a_pool_may_be_closed_while_its_last_thread_is_being_started() -> None:
    """Its job is done by another by then."""
    for _ in range(200):
        with closing(Pool(4, "first")) as first, closing(Pool(8, "second")) as second:
            assert sorted(first.relay(int, second, int, "12345678", 8)) == [1, 2, 3, 4, 5, 6, 7, 8]
