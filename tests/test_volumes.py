"""Volumes: a log that is opened through them says what its records say, whatever becomes of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from _thorough import examples
from hypothesis import given
from hypothesis import settings as given_settings
from hypothesis import strategies as st

from everystep.errors import AlreadyExists, Damaged, Error, ReadOnly, StorageError, StorageFull, UnknownOutcome
from everystep.repository import Repository
from everystep.seam import Seam
from everystep.settings import Settings
from everystep.storage import MemoryStorage
from everystep.storage.faulty import FaultyStorage
from everystep.vault import History, Place, RunVault
from everystep.vault.lines import digest, pack_lines
from everystep.vault.log import OpenTerm
from everystep.vault.names import Span, record_key, volume_key, volume_span
from everystep.vault.record import (
    Abandon,
    Attach,
    Close,
    Commit,
    Config,
    Gc,
    Metrics,
    Moved,
    Note,
    Open,
    PackRange,
    Restore,
    Retire,
    Rewind,
    Rewrite,
    Series,
    Start,
    Tag,
    Thin,
    Where,
    pack_record,
    unpack_record,
)
from everystep.vault.volumes import Shelf, cover, pack_volume, unpack_volume

FOLDER = "runs/r/"
FEW = Settings(volume_records=4)


def vault_on(storage: Any, settings: Settings = FEW, *, in_full: bool = False) -> RunVault:
    vault = RunVault(Place(storage, Seam(), settings), "r")
    vault.log_in_full = in_full
    return vault


def seen(storage: Any, settings: Settings = FEW) -> History:
    return vault_on(storage, settings).history()


def in_full(storage: Any) -> History:
    return vault_on(storage, in_full=True).history()


class Author:
    """Writes records of every kind, drawn by chance, about what is there."""

    def __init__(self, storage: Any, seed: int, settings: Settings = FEW) -> None:
        self.vault, self.chance = vault_on(storage, settings), random.Random(seed)
        self.ids: list[str] = []
        self.ordinal = 0

    def hex(self, size: int) -> str:
        return self.chance.randbytes(size).hex()

    def place(self, writer: str) -> Where:
        return Where(writer, self.chance.randrange(9), 16, 100, 120, 1, self.hex(32))

    def commit(self, history: History) -> Commit:
        self.ids.append(self.hex(8))
        self.ordinal += 1
        parent = history.latest.event.id if history.latest else None
        writer, number = f"{self.hex(16)}-{history.term}", 3 * self.ordinal
        packs, optimizer = [PackRange(writer, number, number + 2)], [PackRange(writer, number, number)]
        metrics = {"loss": self.chance.random()}
        return Commit(
            self.ids[-1], self.ordinal, parent, self.place(writer), self.hex(32), metrics, packs, history.nonce,
            self.ordinal, optimizer=optimizer,
        )  # fmt: skip

    def event(self, history: History) -> Any:
        some = self.chance.sample(self.ids, min(len(self.ids), 2)) or ["0" * 16]
        one, writer = some[0], f"{self.hex(16)}-0"
        made: list[Callable[[], Any]] = [
            lambda: OpenTerm(Open(self.hex(16), "L", 1, {}, {}, one, "start"), history.term + 1),
            lambda: Close(history.nonce),
            lambda: Abandon(history.nonce, self.chance.randrange(99), 1, [2], again=True),
            lambda: Retire(some, "rules", 60.0),
            lambda: Thin(some, "rules", 60.0),
            lambda: Restore(some),
            lambda: Rewind(one),
            lambda: Start("other", one, 3, ["model"]),
            lambda: Tag(f"t{self.chance.randrange(3)}", self.chance.choice([one, None])),
            lambda: Metrics(one, {"late": self.chance.random()}),
            lambda: Series([1, 2], {"loss": [self.chance.random(), None]}),
            lambda: Config({"lr": self.chance.random()}),
            lambda: Attach("file", [self.place(writer)], 120),
            lambda: Note("text", one),
            lambda: Rewrite([Moved(one, self.place(writer), [PackRange(writer, 0, 3)], [])]),
            lambda: Gc([PackRange(f"{self.hex(16)}-1", 0, 2)]),
        ]
        return self.commit(history) if self.chance.random() < 0.4 else self.chance.choice(made)()

    def write(self, records: int) -> None:
        for _ in range(records):
            self.vault.log.append(
                lambda history: [self.event(history) for _ in range(self.chance.randrange(1, 4))], "a"
            )


def written(records: int, seed: int = 0, settings: Settings = FEW) -> MemoryStorage:
    storage = MemoryStorage()
    Author(storage, seed, settings).write(records)
    return storage


def volumes_of(storage: MemoryStorage) -> list[str]:
    return [key for key in storage.objects if "/volumes/" in key]


# what they say -------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.integers(0, 90), st.sampled_from([2, 3, 4, 10]))
@given_settings(max_examples=examples(200), deadline=None)
def test_any_log_is_the_same_through_any_of_its_volumes(seed: int, records: int, count: int) -> None:
    settings, chance = Settings(volume_records=count), random.Random(seed)
    storage = written(records, seed, settings)
    whole = in_full(storage)
    assert seen(storage, settings) == whole
    for key in volumes_of(storage):
        fate = chance.choice(["stays", "stays", "is gone", "has another bit", "ends early"])
        body = bytearray(storage.objects[key])
        if fate == "is gone":
            storage.delete(key)
        elif fate == "has another bit":
            body[chance.randrange(len(body))] ^= 1 << chance.randrange(8)
            storage.objects[key] = bytes(body)
        elif fate == "ends early":
            storage.objects[key] = bytes(body[: chance.randrange(len(body))])
    assert seen(storage, settings) == whole
    goes_on = Author(storage, seed + 1, settings)
    goes_on.write(3)
    assert seen(storage, settings) == in_full(storage) == goes_on.vault.log.history


def test_each_is_written_with_the_record_that_fills_it() -> None:
    storage = MemoryStorage()
    author = Author(storage, 1)
    expected = set()
    for slot in range(0, 400):
        author.write(1)
        for count in (4, 40, 400):
            if (slot + 1) % count == 0:
                expected.add(Span(slot + 1 - count, count))
        assert {volume_span(key.rpartition("/")[2]) for key in volumes_of(storage)} == expected
    assert sorted(span.length for span in expected) == [4] * 100 + [40] * 10 + [400]


def test_a_commit_costs_one_put_and_a_full_volume_one_more() -> None:
    storage = FaultyStorage(MemoryStorage())
    author = Author(storage, 1)
    author.write(40)
    costs = []
    for _ in range(40):
        storage.calls.clear()
        author.write(1)
        costs.append([verb for verb, _ in storage.calls])
    plain, filled, tenth = ["put_new"], ["put_new"] * 2, ["put_new"] * 2 + ["get"] * 10 + ["put_new"]
    assert costs == ([plain] * 3 + [filled]) * 9 + [plain] * 3 + [tenth]


def test_none_are_written_where_none_are_wanted() -> None:
    assert not volumes_of(written(50, settings=Settings(volume_records=0)))


def test_opening_reads_few_objects() -> None:
    """Ten of 40 in one of 400, ten of 4 in one of 40, one of 4, three records; and that there is no further one."""
    storage = FaultyStorage(written(400 + 40 + 4 + 3))
    history = seen(storage)
    assert history.slots == 447
    gets = [key for verb, key in storage.calls if verb == "get"]
    assert [key.rpartition("/")[2] for key in gets if "/volumes/" in key] == [
        f"{first:020d}-{count}" for first, count in ((0, 400), (400, 40), (440, 4))
    ]
    records = [int(key.rpartition("/")[2]) for key in gets if "/log/" in key]
    assert records == [443, 444, 445, 446, 447], "the last of the volumes is looked up in the log"
    assert len([verb for verb, _ in storage.calls if verb == "list"]) == 2


# what is not believed ------------------------------------------------------------------------------------------------


def records_of(storage: MemoryStorage, span: Span) -> list[bytes]:
    return [storage.objects[record_key(FOLDER, slot)] for slot in span.slots]


def forged(records: list[bytes], at: int, author: str) -> list[bytes]:
    """The same chain, but from one record on written by another."""
    made: list[bytes] = []
    for slot, data in enumerate(records):
        if slot < at:
            made.append(data)
            continue
        old = unpack_record(data, slot, "")
        prev = digest(made[-1]) if made else old.prev
        made.append(pack_record(slot, prev, old.term, old.nonce, old.time, author, old.events))
    return made


@pytest.mark.parametrize("at", [0, 5, 39])
def test_a_chain_that_the_log_does_not_end_with(at: int) -> None:
    """A volume of another history of the same run, whole in itself: a log that was rolled back and written anew."""
    storage = written(50)
    whole = in_full(storage)
    span = Span(0, 40)
    storage.objects[volume_key(FOLDER, span)] = pack_volume(span, forged(records_of(storage, span), at, "eve"), FEW)
    assert seen(storage) == whole and not any(one.author == "eve" for one in seen(storage).commits.values())
    for first in range(0, 40, 4):
        small = Span(first, 4)
        records = forged(records_of(storage, span), at, "eve")[first : first + 4]
        storage.objects[volume_key(FOLDER, small)] = pack_volume(small, records, FEW)
    assert seen(storage) == whole
    assert len(Repository(Place(storage, Seam(), FEW)).check(data=False).findings) >= 1


def test_a_log_that_was_rolled_back() -> None:
    """Its last records are gone, and the volume that held them is not: what is written next stands."""
    storage = written(42)
    for slot in range(30, 42):
        storage.delete(record_key(FOLDER, slot))
    assert seen(storage) == in_full(storage) and seen(storage).slots == 30
    Author(storage, 5).write(30)
    assert seen(storage) == in_full(storage) and seen(storage).slots == 60


def test_the_log_of_another_run_is_refused_through_volumes_too() -> None:
    storage = written(50)
    for key in list(storage.objects):
        if key.startswith(FOLDER):
            storage.objects[key.replace("runs/r/", "runs/s/")] = storage.objects.pop(key)
    vault = RunVault(Place(storage, Seam(), FEW), "s")
    with pytest.raises(Damaged, match="another run or repository"):
        vault.history()


def test_a_volume_under_another_name() -> None:
    storage = written(50)
    whole = in_full(storage)
    storage.objects[volume_key(FOLDER, Span(4, 4))] = storage.objects[volume_key(FOLDER, Span(0, 4))]
    storage.delete(volume_key(FOLDER, Span(0, 40)))
    assert seen(storage) == whole


def test_a_volume_of_a_later_everystep_is_left_alone() -> None:
    storage = written(50)
    whole = in_full(storage)
    for key in volumes_of(storage):
        span = volume_span(key.rpartition("/")[2])
        assert span is not None
        body = storage.objects[key]
        storage.objects[key] = body.replace(b'{"v":1,', b'{"v":2,', 1)
        line = storage.objects[key].partition(b"\n")[0]
        rest = storage.objects[key].split(b"\n", 2)[2]
        storage.objects[key] = line + b"\nblake3 " + digest(line).encode() + b"\n" + rest
    assert seen(storage) == whole
    assert Repository(Place(storage, Seam(), FEW)).check(data=False).ok is False  # its checkpoints have no packs
    found = Repository(Place(storage, Seam(), FEW)).check(data=False).findings
    assert not [one for one in found if "volume" in one.what]


def test_what_is_no_volume() -> None:
    span, where = Span(0, 4), "here"
    records = records_of(written(4), span)
    good = pack_volume(span, records, FEW)
    assert unpack_volume(memoryview(good), span, where).unpack(where)[1] == records[-1]
    for bad in (
        b"",
        b"\n",
        b"\n\n",
        good[:-1],
        good + b"x",
        good.replace(b"blake3 ", b"blake2 "),
        pack_lines({"v": 1}),
    ):
        with pytest.raises(Damaged):
            unpack_volume(memoryview(bad), span, where).unpack(where)
    for other in (Span(0, 3), Span(1, 4)):
        with pytest.raises(Damaged):
            unpack_volume(memoryview(good), other, where)
    for broken in (records[::-1], records[:3], [records[0], *records[2:], records[3]], []):
        with pytest.raises(Damaged):
            pack_volume(span, broken, FEW)
    assert volume_span("x") is None and volume_span(f"{0:020d}-0") is None and volume_span(f"{10**19:020d}-4") is None


def test_which_are_read() -> None:
    there = [Span(0, 4), Span(4, 4), Span(0, 40), Span(40, 4), Span(48, 4), Span(50, 400)]
    assert cover(there, 0) == [Span(0, 40), Span(40, 4), Span(48, 4)]
    assert cover(there, 1) == [Span(4, 4), Span(40, 4), Span(48, 4)]
    assert cover(there, 49) == [Span(50, 400)] and cover([], 0) == []


# what becomes of them ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [StorageFull, ReadOnly, UnknownOutcome, StorageError, AlreadyExists])
def test_a_volume_that_cannot_be_written_is_done_without(error: type[Error]) -> None:
    """The record is durable, and so is the commit; the next larger one is made of the records."""

    class NoVolumes(MemoryStorage):
        refuses = True

        def put_new(self, key: str, data: bytes) -> None:
            if "/volumes/" in key and self.refuses:
                raise error("no", where=key)
            super().put_new(key, data)

    storage = NoVolumes()
    author = Author(storage, 3)
    author.write(39)
    assert not volumes_of(storage) and seen(storage) == in_full(storage)
    storage.refuses = False
    author.write(1)
    assert volumes_of(storage) == [volume_key(FOLDER, Span(36, 4)), volume_key(FOLDER, Span(0, 40))]
    assert seen(storage) == in_full(storage)


@pytest.mark.parametrize("applied", [False, True])
def test_any_one_request_may_fail(applied: bool) -> None:
    """Whichever it is, and whether it took effect or not: the log and its volumes say the same afterwards."""
    settings = Settings(volume_records=3, retry_seconds=0.0)
    for number in range(200):
        storage = MemoryStorage()
        faulty = FaultyStorage(storage, applied=applied)
        author = Author(faulty, 1, settings)
        author.write(20)
        faulty.fail_at = len(faulty.calls) + number
        for _ in range(41):
            try:
                author.write(1)
            except UnknownOutcome:
                continue  # of a request that is not made again
        assert seen(storage, settings) == in_full(storage) and in_full(storage).slots >= 60
        spans = {volume_span(key.rpartition("/")[2]) for key in volumes_of(storage)}
        assert Span(0, 30) in spans or Span(30, 30) in spans
        if len(faulty.calls) <= faulty.fail_at:
            break
    else:
        pytest.fail("no end of requests")


def test_who_opened_the_log_in_between_fills_the_volume_too() -> None:
    storage = MemoryStorage()
    for seed in range(20):
        Author(storage, seed).write(3)
    assert len([key for key in volumes_of(storage) if key.endswith("-4")]) == 15
    assert seen(storage) == in_full(storage)


def test_records_that_are_lost_are_found_in_a_volume_and_fsck_says_so() -> None:
    storage = written(50)
    whole = in_full(storage)
    storage.delete(record_key(FOLDER, 7))
    body = storage.objects[record_key(FOLDER, 21)]
    storage.objects[record_key(FOLDER, 21)] = body[:-9] + b"\n"
    assert seen(storage) == whole, "what the volumes hold is all there was"
    assert sorted(in_full(storage).damaged) == [7, 21]
    found = [one.what for one in Repository(Place(storage, Seam(), FEW)).check(data=False).findings]
    assert [what for what in found if what.startswith("record 7: the record is missing; volume")]
    assert [what for what in found if what.startswith("record 21: ") and f"volume {0:020d}-40 holds it" in what]


def test_fsck_finds_a_volume_that_is_damaged() -> None:
    storage = written(50)
    key = volume_key(FOLDER, Span(4, 4))
    storage.objects[key] = storage.objects[key][:-1]
    findings = Repository(Place(storage, Seam(), FEW)).check(data=False).findings
    assert [one.what for one in findings if one.where.endswith(key)] == ["not the volume that belongs here"]


def test_a_volume_grows_no_larger_than_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("everystep.vault.volumes.NBYTES_MAX", 20_000)
    storage = written(80, seed=2)
    sizes = {key.rpartition("-")[2] for key in volumes_of(storage)}
    assert sizes == {"4"} and seen(storage) == in_full(storage)


def test_a_shelf_that_cannot_be_read_is_as_good_as_empty() -> None:
    storage = written(50)

    class Denied(FaultyStorage):
        def get(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
            if "/volumes/" in key:
                raise StorageError("not for you", where=key)
            return super().get(key, start, stop)

    assert seen(Denied(storage)) == in_full(storage)
    assert Shelf(Denied(storage), FOLDER, Seam(), FEW).believed(0) == []
