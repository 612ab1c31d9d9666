"""Repack: what is needed of packs that are mostly dead lies elsewhere afterwards, and is the same bit for bit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from _ranks import QUICK, RANKS, whole_of
from _ranks import state_of as rank_state
from _repack import (
    WIDE,
    Between,
    check,
    events_of,
    file_of,
    only,
    packs_of,
    state_of,
    store_of,
    thin_out,
    unnamed,
    whole,
)
from _retention import DAY, Store, based, same
from independent_reader import Run

import everystep
from everystep import Damaged, NotFound, UsageError
from everystep.seam import Seam
from everystep.storage import MemoryStorage
from everystep.upkeep.usage import Uses, held, needed_of
from everystep.vault import PackName, Place
from everystep.vault.history import History, unroll
from everystep.vault.manifest import NO_BASE
from everystep.vault.names import pack_key, record_key
from everystep.vault.record import Moved, PackRange, Record, Rewrite, Where, unpack_record


def test_a_frozen_leaf_no_longer_holds_what_lies_beside_it() -> None:
    store = store_of(8)
    past = thin_out(store, [6, 7, 8])
    before, stats = store.nbytes, past.stats()
    assert stats.dead_bytes > 120_000
    told: list[tuple[int, int]] = []
    moved = past.repack(progress=lambda *done: told.append(done))
    assert moved.packs >= 2 and moved.checkpoints == 3
    assert store.nbytes == moved.held_bytes == before + moved.written_bytes - moved.freed_bytes
    assert before - store.nbytes > 0.9 * stats.dead_bytes
    assert told == sorted(told) and {total for _, total in told} == {told[-1][0]}
    check(store, [6, 7, 8], attached=8)
    assert set(store.packs()) == store.read_by(), "what is left is what loads read, and no more"
    after = past.stats()
    assert after.dead_bytes < 0.1 * stats.dead_bytes and after.total_bytes < stats.total_bytes
    assert after.logical_bytes == stats.logical_bytes and after.roles == stats.roles
    again = past.repack()
    assert (again.packs, again.checkpoints, again.written_bytes, again.freed_bytes) == (0, 0, 0, 0)
    assert again.held_bytes == store.nbytes


def test_what_a_checkpoint_is_stays_as_it_was() -> None:
    store = store_of(6)
    past = store.open()["a"]
    past.at(5).tag("good").note("a word").record(loss=0.5)
    thin_out(store, [1, 5, 6], [5, 6])
    before, old = past._history(), store.open()["a"]
    slots, commits = before.slots, {id: one.event for id, one in old._history().commits.items()}
    places = {c.id: [view.spots.tobytes() for view in c._open().manifest.views] for c in past.checkpoints()}
    hashes = {c.id: [view.hashes.tobytes() for view in c._open().manifest.views] for c in past.checkpoints()}
    assert past.repack(dead=0.2).checkpoints == 3
    new = store.open()["a"]
    for checkpoint in new.checkpoints():
        event, was = new._history().commits[checkpoint.id].event, commits[checkpoint.id]
        assert event.root != was.root and event.packs != was.packs
        assert msgspec.structs.replace(event, root=was.root, packs=was.packs, optimizer=was.optimizer) == was
        assert [view.hashes.tobytes() for view in checkpoint._open().manifest.views] == hashes[checkpoint.id]
        assert [view.spots.tobytes() for view in checkpoint._open().manifest.views] != places[checkpoint.id]
    good = new.tagged("good")
    assert (good.step, good.notes, good.metrics, new.at(1).thin) == (5, ["a word"], {"loss": 0.5}, True)
    assert [c.id for c in new.query("loss < 1")] == [good.id]
    vault = new._vault
    record = unpack_record(vault.storage.get(record_key(vault.folder, slots)), slots, "")
    assert [type(event) for event in record.events] == [Rewrite]
    assert record.term == new._history().term == 1, "nobody's run was taken over"


def test_a_base_that_a_later_checkpoint_leans_on() -> None:
    store = store_of(7)
    past = thin_out(store, [7])
    deep = list(based(past.checkpoints()))
    assert max(deep) >= 3
    dead = past.stats().dead_bytes
    assert dead > 3 * 120_000
    moved = past.repack()
    assert moved.freed_bytes - moved.written_bytes > 0.9 * dead
    check(store, [7], attached=7)
    assert list(based(store.open()["a"].checkpoints())) == deep, "deltas are copied, not encoded anew"
    assert set(store.packs()) == store.read_by()


def test_a_base_behind_a_base_that_stays_where_it_is() -> None:
    """The middle of a chain lies in a pack of which most is needed, its end in one of which little is."""
    store = Store(**{**WIDE, "pack_bytes_max": 1 << 19})
    early, late = np.random.default_rng(4).standard_normal((2, 30_000))
    state = {step: {**state_of(step), "late": late if step >= 6 else early} for step in range(1, 8)}
    with store.open().run("a").track(rng=False) as run:
        for step in range(1, 8):
            run.save(step, state=state[step]).wait()
    past = thin_out(store, [7])
    view = past.at(7)._open().manifest.views[0]
    chains = [[link.pack for link in view.spot(index).links()] for index in range(len(view.spots))]
    longest = max(chains, key=len)
    past.repack()
    moved = [pack not in packs_of(past) for pack in longest]
    assert len(longest) >= 4 and moved[:2] == [False, False] and any(moved[2:])
    assert same(store.open()["a"].at(7).load(), state[7]) and store.open().check().ok
    assert set(store.packs()) == store.read_by()


def test_dropping_any_of_what_was_repacked_leaves_every_other_whole() -> None:
    made = store_of(8)
    thin_out(made, [3, 5, 6, 8]).repack()
    for step in (3, 5, 6):
        store = made.copy()
        thin_out(store, [one for one in (3, 5, 6, 8) if one != step])
        check(store, [one for one in (3, 5, 6, 8) if one != step], attached=8)
        assert store.open()["a"].repack(dead=0.3).held_bytes == store.nbytes
        check(store, [one for one in (3, 5, 6, 8) if one != step], attached=8)
        assert set(store.packs()) == store.read_by()


def test_optimizer_state_stays_apart_so_that_thinning_frees_it() -> None:
    store = store_of(6, base_ratio=0.0)
    past = thin_out(store, [4, 5, 6])
    assert past.repack(dead=0.2).checkpoints == 3
    alone = packs_of(past, optimizer=True)
    assert any(pack.writer.endswith("-0") for pack in alone)
    thin_out(store, [4, 5, 6], [6])
    check(store, [4, 5, 6], attached=6)
    assert set(store.packs()) == store.read_by()
    thin_out(store, [4, 5, 6], [5])
    assert [c.thin for c in past.checkpoints()] == [True, True, False]


def test_a_thinned_checkpoint_is_moved_without_what_it_has_lost() -> None:
    store = store_of(6)
    past = thin_out(store, [2, 6], [6])
    assert past.repack().checkpoints == 2
    check(store, [2, 6], attached=6)
    assert set(store.packs()) == store.read_by()
    now = past._history().commits[past.at(2).id]
    assert now.needs() & past._history().condemned and not now.needs(thin=True) & past._history().condemned
    with pytest.raises(NotFound, match="nothing that was dropped can be brought back"):
        past.undo()


@pytest.mark.parametrize("full", [None, [6]], ids=["dropped", "thinned"])
def test_what_can_be_brought_back_is_moved_as_well(full: list[int] | None) -> None:
    store = store_of(6)
    thin_out(store, [3, 5, 6])
    past = thin_out(store, [3, 5, 6] if full else [6], full, undo_seconds=7 * DAY)
    thin = full is not None
    assert past.repack().checkpoints == 3
    check(store, [3, 5, 6] if thin else [6], attached=6)
    late = store.copy()
    assert sorted(c.step for c in past.undo()) == [3, 5]
    check(store, [3, 5, 6], attached=6)
    assert not any(c.thin for c in past.checkpoints())
    assert set(store.packs()) == store.read_by()
    late.clock.seconds += 7 * DAY
    assert late.open()["a"].prune().packs > 0
    check(late, [3, 5, 6] if thin else [6], attached=6)
    assert set(late.packs()) == late.read_by() and not late.open()["a"].dropped


def test_thinned_then_dropped_then_moved_then_brought_back_twice() -> None:
    store = store_of(6)
    thin_out(store, [3, 6])
    thin_out(store, [3, 6], [6], undo_seconds=7 * DAY)
    past = thin_out(store, [6], undo_seconds=7 * DAY)
    assert list(held(past._vault, past._history()).values()) == [False, False]
    assert past.repack().checkpoints == 2
    past.undo()
    assert past.at(3).thin and whole(past.at(3))
    past.undo()
    assert not past.at(3).thin
    check(store, [3, 6], attached=6)


def test_what_was_freed_before_its_time_is_not_looked_for() -> None:
    store = store_of(6)
    thin_out(store, [3, 6])
    past = thin_out(store, [3, 6], [6], undo_seconds=7 * DAY)
    past.prune(now=True)
    assert held(past._vault, past._history()) == {past.at(3).id: True, past.at(6).id: False}
    assert past.repack().checkpoints == 2
    check(store, [3, 6], attached=6)


def test_a_file_that_was_replaced_frees_the_pack_that_held_it() -> None:
    store = Store(**WIDE)
    with store.open().run("a").track(rng=False) as run:
        for step in (1, 2, 3):
            run.attach("big", np.random.default_rng(step).bytes(200_000))
            run.attach(f"kept{step}", file_of(step))
            run.save(step, state={"params": {"w": np.arange(10.0) + step}}).wait()
    past = store.open()["a"]
    assert past.prune().packs == 0
    moved = past.repack()
    assert moved.freed_bytes - moved.written_bytes > 390_000
    fresh = store.open()["a"]
    assert fresh.attachments == ["big", "kept1", "kept2", "kept3"]
    assert fresh.attachment("big") == np.random.default_rng(3).bytes(200_000)
    assert all(fresh.attachment(f"kept{step}") == file_of(step) for step in (1, 2, 3))
    assert store.open().check().ok and set(store.packs()) == store.read_by()


def test_files_that_came_with_no_checkpoint_of_their_own() -> None:
    """The step was saved before, so their packs are in no commit; moved or replaced, they are freed all the same."""
    store = Store(**WIDE)
    with store.open().run("a").track(rng=False) as run:
        for number in (1, 2, 3):
            run.attach("big", np.random.default_rng(number).bytes(90_000))
            run.attach("small", file_of(1))
            run.save(1, state=state_of(1)).wait()
        past = store.open()["a"]
        assert past.prune().packs == 1, "of the second, nothing is needed any more"
        moved = past.repack()
        assert moved.packs == 1 and moved.freed_bytes - moved.written_bytes > 89_000
        assert set(store.packs()) == store.read_by()
        run.save(2, state=state_of(2)).wait()
    fresh = store.open()["a"]
    assert fresh.attachment("big") == np.random.default_rng(3).bytes(90_000)
    assert fresh.attachment("small") == file_of(1) and all(map(whole, fresh.checkpoints()))


def test_ranks() -> None:
    storage = MemoryStorage()

    def opened() -> everystep.Repository:
        settings = everystep.Settings(chunk_bytes_max=1 << 16, small_leaf_bytes=1 << 12, base_ratio=0.0, **QUICK)
        return everystep.Repository(Place(storage, Seam(), settings))

    runs = [opened().run("a", rank=rank, ranks=RANKS, launch="x").track(rng=False) for rank in range(RANKS)]

    def together(step: int) -> None:
        with ThreadPoolExecutor(RANKS) as pool:
            list(pool.map(lambda rank: save(rank, step), range(RANKS)))

    def save(rank: int, step: int) -> None:
        state = {**rank_state(rank, step), f"frozen{rank}": np.random.default_rng(rank).standard_normal(50_000)}
        runs[rank].save(step, state=state).wait()

    for step in (1, 2, 3, 4):
        together(step)
    beside = opened()["a"]
    beside.forget(only(4), force=True, undo_seconds=0)
    beside.prune()
    moved = beside.repack(dead=0)
    assert moved.checkpoints == 1 and moved.freed_bytes > moved.written_bytes
    together(5)
    for rank in range(RANKS):
        runs[rank].close()
    for step in (4, 5):
        found = opened()["a"].at(step).load()
        expected = whole_of(step)
        assert found["count"] == step and set(found["params"]) == set(expected["params"])
        for rank in range(RANKS):
            assert same(found[f"frozen{rank}"], np.random.default_rng(rank).standard_normal(50_000))
        assert all(same(found["params"][name], expected["params"][name]) for name in expected["params"])
    assert opened().check().ok


def test_the_independent_reader_loads_what_was_moved(tmp_path: Path) -> None:
    store = store_of(6)
    thin_out(store, [2, 5, 6]).repack()
    for key in store.storage.list(""):
        path = tmp_path / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(store.storage.get(key))
    run = Run(tmp_path, "a")
    assert [commit["step"] for commit in run.live] == [2, 5, 6]
    for commit in run.live:
        state, _ = run.load(commit)
        assert same(state["state"], state_of(commit["step"]))
    assert b"".join(run.read(place) for place in run.attached["notes.txt"]) == file_of(6)


def test_a_share_of_dead_bytes(tmp_path: Path) -> None:
    store = store_of(4)
    past = thin_out(store, [3, 4])
    for dead in (-0.1, 1, 1.5, float("nan")):
        with pytest.raises(UsageError, match="is not a share"):
            past.repack(dead=dead)
    slots = past._history().slots
    assert past.repack(dead=0.999).packs == 0 and past._history().slots == slots
    assert past.repack(dead=0.5).packs > 0


def test_manifests_are_not_written_for_less_than_they_come_to() -> None:
    """Many checkpoints refer to one page in a pack of which else little is left."""
    store = Store(**WIDE)
    with store.open().run("a").track(rng=False) as run:
        for step in range(1, 12):
            run.save(step, state={f"leaf{n}": np.full(3, step) for n in range(30)}).wait()
    past = thin_out(store, range(2, 12))
    assert past.stats().dead_bytes > 0 and past.repack(dead=0).packs == 0


def test_many_packs_pay_together_for_one_manifest() -> None:
    store = Store(chunk_bytes_max=4096, small_leaf_bytes=1024, pack_bytes_max=10_000, base_ratio=0.0)
    frozen = np.random.default_rng(0).standard_normal((30, 1000)).astype(np.float32)

    def state(step: int) -> dict[str, Any]:
        new = np.random.default_rng(step).standard_normal((30, 1000)).astype(np.float32)
        leaves = {f"{name}{n}": row[n] for n in range(30) for name, row in (("new", new), ("frozen", frozen))}
        return {**leaves, "plain": np.random.default_rng(1).random(1000).tolist()}

    with store.open().run("a").track(rng=False) as run:
        for step in (1, 2):
            run.save(step, state=state(step)).wait()
    past = thin_out(store, [2])
    manifest = past.stats().manifest_bytes
    assert manifest > 2 * 4096, "more than any pack gives back"
    moved = past.repack(dead=0.3)
    assert moved.packs > 20 and moved.freed_bytes - moved.written_bytes > 20 * 3000
    assert same(store.open()["a"].at(2).load(), state(2))


# damage ------------------------------------------------------------------------------------------------------------


def test_a_chunk_that_is_not_what_was_saved_is_not_copied() -> None:
    store = store_of(6)
    past = thin_out(store, [4, 5, 6])
    view = past.at(6)._open().manifest.views[0]
    frozen = next(r for r in view.layout.regions if view.tree.leaves[r.leaf].path.endswith("frozen"))
    spot = view.spot(view.layout.chunks_of(frozen)[0])
    key = pack_key("runs/a/", spot.pack)
    good = store.storage.objects[key]
    store.storage.objects[key] = good[: spot.offset] + bytes([good[spot.offset] ^ 1]) + good[spot.offset + 1 :]
    slots = past._history().slots
    for opened in (past, store.open()["a"]):
        with pytest.raises(Damaged):
            opened.repack()
    assert not unnamed(store) and not any(isinstance(e, Rewrite) for e in events_of(store, slots))
    store.storage.objects[key] = good
    assert past.repack().checkpoints == 3
    check(store, [4, 5, 6], attached=6)


def test_a_pack_that_vanishes_is_damage() -> None:
    made = store_of(6)
    thin_out(made, [4, 5, 6])
    number, fired, damaged = 0, True, 0
    while fired:
        store = made.copy()

        def vanish(store: Store = store, number: int = number) -> None:
            packs = sorted(store.packs())
            store.storage.delete(packs[number % len(packs)])

        between = Between(store.storage, number, vanish, ("get",))
        try:
            store.open(storage=between)["a"].repack()
        except Damaged as error:
            damaged += 1
            assert error.do and not unnamed(store)
        fired = between.fired
        number += 1
    assert 5 < damaged < number


def test_a_log_that_cannot_be_read_moves_nothing() -> None:
    store = store_of(6)
    thin_out(store, [4, 5, 6])
    key = record_key("runs/a/", 2)
    store.storage.objects[key] = store.storage.objects[key][:-9]
    with pytest.raises(Damaged, match="part of the log cannot be read"):
        store.open()["a"].repack()


def test_spots_that_lead_nowhere_are_damage() -> None:
    view = store_of(6).open()["a"].at(6)._open().manifest.views[0]
    assert needed_of(view, thin=False).bases.all() and len(view.bases) > 0
    leaning = np.flatnonzero(view.spots["base"] != NO_BASE)[0]
    for field, value in (("pack", 99), ("depth", 65), ("depth", 0), ("base", NO_BASE), ("base", 99)):
        spots = view.spots.copy()
        spots[field][leaning] = value
        with pytest.raises(Damaged, match="points to a pack or base"):
            needed_of(replace(view, spots=spots), thin=False)
    bases = view.bases.copy()
    bases["depth"][bases["depth"] == 0] = 1
    bases["base"] = 0
    with pytest.raises(Damaged, match="points to a pack or base"):
        needed_of(replace(view, bases=bases), thin=True)


# the fold ----------------------------------------------------------------------------------------------------------


def _fold(store: Store, *events: Any) -> History:
    history = store.open()["a"]._history()
    history.take(Record(history.slots, history.head, history.term, "n", 0.0, "a", list(events), "own"))
    return history


def test_the_fold_of_a_rewrite() -> None:
    store = thin_store = store_of(3)
    past = store.open()["a"]
    here = Where("new-0", 0, 16, 1, 1, 0, "00")
    ranges = [PackRange("new-0", 0, 4)]
    id = past.at(2).id
    history = _fold(store, Rewrite([Moved(id, here, ranges, ranges[:0]), Moved("nobody", here, ranges, [])]))
    event = history.commits[id].event
    assert (event.root, event.packs, event.optimizer) == (here, ranges, [])
    assert list(history.commits) == list(past._history().commits) and "nobody" not in history.live
    assert unroll(ranges) <= history.ever and not history.damaged
    assert [one.event.step for one in history.line()] == [1, 2, 3]
    thin_out(thin_store, [1, 3])
    gone = _fold(thin_store, Rewrite([Moved(id, here, ranges, [])]))
    assert gone.commits[id].event.root != here, "what was freed stays so"
    impossible = _fold(store_of(3), Rewrite([Moved(id, here, [PackRange("new-0", 3, 1)], [])]))
    assert not impossible.damaged or impossible.commits


def test_uses_count_each_place_once() -> None:
    uses = Uses()
    one = Where("a-1", 0, 16, 100, 100, 0, "")
    other = Where("a-1", 1, 16, 50, 50, 0, "")
    assert uses.live_bytes() == {} and uses.of_packs({PackName("a-1", 0)}) == {}
    for _ in range(3):
        assert uses.add_pages([one, one, other]) == 250
    assert uses.live_bytes() == {PackName("a-1", 0): 100, PackName("a-1", 1): 50}
    assert uses.dead_bytes({PackName("a-1", 0): 200, PackName("b-1", 0): 9}) == {PackName("a-1", 0): 84}
    assert uses.of_packs({PackName("a-1", 0)}) == {(PackName("a-1", 0), 16): True}
