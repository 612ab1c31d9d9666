"""A mirror is the original byte for byte; only who mirrors it writes there, and nothing damaged gets there."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from _between import alike, empty_like, said_of
from _repack import Between, check, only, state_of, store_of, thin_out, whole
from _retention import Store, same

import everystep
from everystep import Conflict, Damaged, ReadOnly, UsageError
from everystep.errors import StorageError
from everystep.storage.faulty import FaultyStorage
from everystep.upkeep import mirror

CHANGES = ("put", "put_new", "delete")


@pytest.fixture(scope="module")
def said() -> Store:
    return said_of()


def mirrored(source: Store, target: Store, storage: Any = None, **how: Any) -> everystep.Mirrored:
    """As with a URL: whatever lies in the target is looked at by who mirrors, and no repository is opened there."""
    place = source.open()._place
    return mirror(place, target.storage if storage is None else storage, **{"prune": False, "dry_run": False, **how})


def identical(source: Store, target: Store) -> None:
    """Byte for byte, but for what belongs to each place alone."""
    own = {"place.json", "mirror.json"}
    mine, theirs = (
        {key: body for key, body in store.storage.objects.items() if key not in own} for store in (source, target)
    )
    assert theirs == mine
    assert "mirror.json" in target.storage.objects


def test_a_mirror_is_the_same_byte_for_byte(said: Store) -> None:
    source, target = said.copy(), empty_like(said)
    done = mirrored(source, target)
    assert (done.runs, done.packs) == (1, len(source.packs())) and done.nbytes == source.nbytes
    identical(source, target)
    alike(source, target)
    again = mirrored(source, target)
    assert (again.records, again.packs, again.nbytes) == (0, 0, 0)
    with source.open().run("a").track(rng=False) as run:
        run.resume()
        run.save(7, state=state_of(7)).wait()
    planned = mirrored(source, target, dry_run=True)
    assert planned.packs == 3 or planned.packs > 0
    assert mirrored(source, target).packs == planned.packs
    identical(source, target)


def test_nobody_else_writes_a_mirror(said: Store) -> None:
    target = empty_like(said)
    mirrored(said, target)
    before = dict(target.storage.objects)
    repo = target.open()
    assert repo.is_mirror and not said.open().is_mirror
    past = repo["a"]
    for write in (
        lambda: repo.run("a").track(rng=False).save(9, state=state_of(9)),
        lambda: repo.run("new").track(rng=False).save(9, state=state_of(9)),
        lambda: past.at(2).tag("x"),
        lambda: past.note("x"),
        lambda: past.forget(only(4), force=True),
        lambda: store_of(2).open().push(repo),
    ):
        with pytest.raises(ReadOnly, match="mirror"):
            write()  # type: ignore[no-untyped-call]
    past.prune()
    assert target.storage.objects == before
    assert same(past.at(2).load(), state_of(2)), "reading works"


def test_a_mirror_becomes_a_repository(said: Store) -> None:
    source, target = said.copy(), empty_like(said)
    mirrored(source, target)
    with pytest.raises(UsageError, match="no mirror"):
        source.open().promote()
    target.open().promote()
    with target.open().run("a").track(rng=False) as run:
        assert run.resume() == 4
        run.save(5, state=state_of(5)).wait()
    assert target.open().check().ok
    with pytest.raises(Conflict, match="no mirror of this repository"):
        source.open().mirror(target.open())


def test_a_mirror_of_something_else(said: Store) -> None:
    other = store_of(1)
    with pytest.raises(Conflict, match="no mirror"):
        said.open().mirror(other.open())
    target = empty_like(said)
    mirrored(said, target)
    with pytest.raises(Conflict, match="another repository"):
        other.open().mirror(target.open())


def test_an_original_that_was_set_back() -> None:
    source = store_of(2)
    old, target = source.copy(), empty_like(source)
    with source.open().run("a").track(rng=False) as run:
        run.resume()
        run.save(3, state=state_of(3)).wait()
    mirrored(source, target)
    before = dict(target.storage.objects)
    with pytest.raises(Conflict, match="has not"):
        old.open().mirror(target.open())
    with old.open().run("a").track(rng=False) as run:
        run.resume()
        for step in (30, 31, 32):
            run.save(step, state=state_of(step)).wait()
    with pytest.raises(Conflict):
        old.open().mirror(target.open())
    assert target.storage.objects == before


def test_records_come_behind_their_packs() -> None:
    """Killed anywhere, what the original has is whole in the mirror as soon as it is listed there; what the original
    had freed by then may be listed, and ends in a typed error. Mirrored again, it is the original."""
    source, number, fired, lost = store_of(6), 0, True, 0
    thin_out(source, [5, 6])
    kept = {checkpoint.id for checkpoint in source.open()["a"].checkpoints()}
    while fired:
        target = empty_like(source)
        faulty = FaultyStorage(target.storage, number, for_ever=True, verbs=CHANGES)
        with contextlib.suppress(StorageError):
            mirrored(source, target, faulty)
        fired = len(faulty.calls) > number
        if "format.json" in target.storage.objects:
            for checkpoint in target.open()["a"].checkpoints(all=True) if "a" in target.open() else []:
                try:
                    assert whole(checkpoint)
                except Damaged:
                    assert checkpoint.id not in kept
                    lost += 1
            with pytest.raises(ReadOnly):
                target.open().run("a", takeover=True).track(rng=False).save(9, state=state_of(9)).wait()
        mirrored(source, target)
        assert {key for key in target.storage.objects if "/log/" in key} == {
            key for key in source.storage.objects if "/log/" in key
        }
        check(target, [5, 6], attached=6)
        number += 1
    assert number > 20 and lost > 0


def test_nothing_damaged_is_mirrored() -> None:
    source = store_of(3)
    target = empty_like(source)
    mirrored(source, target)
    with source.open().run("a").track(rng=False) as run:
        run.resume()
        before = set(source.packs())
        run.save(4, state=state_of(4)).wait()
    slots = len([key for key in target.storage.objects if "/log/" in key])
    for key in sorted(set(source.packs()) - before):
        hurt = source.copy()
        body = bytearray(hurt.storage.objects[key])
        body[len(body) // 2] ^= 1
        hurt.storage.objects[key] = bytes(body)
        with pytest.raises(Damaged):
            hurt.open().mirror(target.open())
        assert len([key for key in target.storage.objects if "/log/" in key]) == slots
        check(target, [1, 2, 3])


def test_two_mirrors_beside_each_other() -> None:
    """One that began earlier is no sign that the original was set back."""
    for at in range(0, 12):
        source = store_of(3)
        target = empty_like(source)
        mirrored(source, target)

        def go_on(source: Store = source, target: Store = target) -> None:
            with source.open().run("a").track(rng=False) as run:
                run.save(run.resume() + 1, state=state_of(4)).wait()
            mirrored(source, target)

        beside = Between(target.storage, at, go_on, verbs=("get", "list", "put", "put_new"))
        mirror(source.open()._place, beside, prune=False, dry_run=False)
        mirrored(source, target)
        identical(source, target)


def test_volumes_come_along() -> None:
    source = store_of(12, volume_records=4)
    target = empty_like(source)
    assert [key for key in source.storage.objects if "/volumes/" in key]
    mirrored(source, target)
    identical(source, target)
    check(target, range(1, 13), attached=12)


def test_what_nothing_needs_goes_from_the_mirror_only_when_asked_to() -> None:
    source = store_of(6)
    target = empty_like(source)
    mirrored(source, target)
    thin_out(source, [5, 6])
    assert mirrored(source, target).removed == 0
    assert set(source.packs()) < set(target.packs())
    assert mirrored(source, target, prune=True).removed > 0
    identical(source, target)
    check(target, [5, 6], attached=6)


def test_a_collection_beside_a_mirror() -> None:
    for at in range(0, 40, 3):
        source = store_of(4)
        target = empty_like(source)
        between = Between(source.storage, at, lambda source=source: thin_out(source, [1, 4]), verbs=("get",))
        mirror(source.open(storage=between)._place, target.storage, prune=False, dry_run=False)
        assert target.open().check().ok
        assert all(whole(checkpoint) for checkpoint in target.open()["a"].checkpoints(all=True))
