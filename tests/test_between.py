"""Push, pull, mirror: what goes to another repository is there once, whole, checked, and no more of it than need be."""

from __future__ import annotations

import contextlib
import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _between import Counting, alike, empty_like, said_of
from _ranks import QUICK, RANKS, whole_of
from _ranks import state_of as rank_state
from _repack import Between, check, file_of, made_of, only, state_of, store_of, thin_out, whole
from _retention import Store, based, same
from independent_reader import Run as Independent
from test_faults import STORAGE_FAULTS

import everystep
from everystep import Carried, Damaged, EverystepWarning, NotFound, Repository, RunTakenOver, UsageError
from everystep.errors import StorageError
from everystep.seam import Seam
from everystep.storage import MemoryStorage
from everystep.storage.faulty import FaultyStorage
from everystep.vault import Place
from everystep.vault.names import pack_key, record_key
from everystep.vault.record import Commit, unpack_record

CHANGES = ("put", "put_new", "delete")


def pushed(source: Store, target: Store, which: Any = None, **how: Any) -> Carried:
    (found,) = source.open().push(target.open(), which, **how)
    return found


def commits_of(store: Store) -> dict[str, int]:
    """id -> how often a record commits it."""
    found: dict[str, int] = {}
    slots = range(store.open()["a"]._history().slots)
    for slot in slots:
        for event in unpack_record(store.storage.get(record_key("runs/a/", slot)), slot, "").events:
            if isinstance(event, Commit):
                found[event.id] = found.get(event.id, 0) + 1
    return found


@pytest.fixture(scope="module")
def said() -> Store:
    return said_of()


# push --------------------------------------------------------------------------------------------------------------


def test_a_push_brings_all_that_the_run_says(said: Store) -> None:
    target = empty_like(said)
    done = pushed(said, target)
    assert (done.sent, done.there, done.gone) == ([1, 2, 3, 4, 3, 4], 0, 0) and done.said > 0
    alike(said, target)
    before = dict(target.storage.objects)
    again = pushed(said, target)
    assert (again.sent, again.there, again.sent_bytes, again.said) == ([], 6, 0, 0)
    assert target.storage.objects == before, "nothing new: nothing is written, not even a term"
    assert said.open()["a"].sessions()[0]["environment"] == target.open()["a"].sessions()[0]["environment"]


def test_deltas_go_as_they_are() -> None:
    source = store_of(6)
    target = empty_like(source)
    done = pushed(source, target)
    ours, theirs = (store.open()["a"].checkpoints(all=True) for store in (source, target))
    assert sorted(based(ours)) == sorted(based(theirs)) and max(based(theirs)) > 1
    assert done.sent_bytes == pytest.approx(target.nbytes, rel=0.01)
    assert target.nbytes < source.nbytes, (
        "nothing is stored twice or encoded anew; of attached files the last alone goes"
    )


def test_only_what_is_new_is_sent() -> None:
    source, target = store_of(3), Store(**store_of(0).settings)
    pushed(source, target)
    before = source.nbytes
    with source.open().run("a").track(rng=False) as run:
        run.resume()
        for step in (4, 5):
            run.attach("notes.txt", file_of(step))
            run.save(step, state=state_of(step)).wait()
    new = source.nbytes - before
    counting = Counting(target.storage)
    (done,) = source.open().push(target.open(storage=counting))
    assert done.sent == [4, 5] and done.there == 3
    assert 0.85 * new < counting.written < new, "of the two attached files only the last is needed"
    check(target, [1, 2, 3, 4, 5], attached=5)


def test_what_is_shared_with_an_earlier_checkpoint_is_read_from_its_manifest_alone() -> None:
    """A new process knows nothing: it looks up what the target has, and what it leans on."""
    for keep in (None, everystep.last(20)):
        source = Store(chunk_bytes_max=1 << 14, pack_bytes_max=1 << 17)
        target = empty_like(source)
        run = source.open().run("a", keep=keep).track(rng=False)
        for step in range(1, 12):
            run.save(step, state=state_of(step)).wait()
            pushed(source, target)
        run.close()
        check(target, range(1, 12))
        assert target.nbytes < 1.05 * source.nbytes


def test_a_chain_that_comes_back_to_the_same_bytes() -> None:
    """a, b against a, then a against b: one of the two a stands alone in the target."""
    source = Store(chunk_bytes_max=1 << 14, base_depth_max=8)
    base = np.random.default_rng(0).standard_normal(8000).astype(np.float32)
    other = base.copy()
    other[::100] += 1
    states = [{"w": w, "n": n} for n, w in enumerate((base, other, base, other, base))]
    with source.open().run("a").track(rng=False) as run:
        for step, state in enumerate(states):
            run.save(step, state=state).wait()
    for which in (None, "a@2", "a@4"):
        target = empty_like(source)
        pushed(source, target, which)
        for checkpoint in target.open()["a"].checkpoints(all=True):
            assert same(checkpoint.load(), states[checkpoint.step])
        assert target.open().check().ok


def test_thinned_and_dropped_checkpoints() -> None:
    source = made_of()  # 3 is thin, 1 can be brought back, 2 and 4 are gone
    target = empty_like(source)
    done = pushed(source, target)
    assert done.sent == [3, 5, 6]
    alike(source, target)
    past = target.open()["a"]
    assert past.at(3).thin and not past.dropped, "what is not there cannot be brought back"
    past.prune(now=True)
    past.repack(dead=0.0)
    check(target, [3, 5, 6], attached=6)
    source.open()["a"].undo()
    assert pushed(source, target).sent == [1]
    thin_out(target, [5, 6])
    assert pushed(source, target).sent == [], "what was dropped there stays dropped"
    check(target, [5, 6], attached=6)


def test_some_now_and_the_rest_later(said: Store) -> None:
    target = empty_like(said)
    assert pushed(said, target, "a@best:val_loss").sent == [4]
    assert pushed(said, target, ["a@two", "a@1"]).sent == [1, 2]
    past = target.open()["a"]
    assert past.latest is not None and past.latest.step == 4, "what came last is not the newest"
    last = pushed(said, target, keep=everystep.last(2))
    assert (last.sent, last.there) == ([3], 1)
    latest = target.open()["a"].latest
    assert latest is not None and latest.tags == ["end"]
    pushed(said, target)
    theirs = target.open()["a"]
    assert theirs.latest == said.open()["a"].latest
    assert {c.id for c in theirs.checkpoints(all=True)} == {c.id for c in said.open()["a"].checkpoints(all=True)}


def test_a_line_goes_on_over_what_was_dropped() -> None:
    source = store_of(6)
    thin_out(source, [1, 3, 6])
    target = empty_like(source)
    pushed(source, target)
    assert [c.step for c in target.open()["a"].checkpoints()] == [1, 3, 6]
    assert target.open()["a"].parents() == source.open()["a"].parents()
    for order in (["a@6", "a@1", "a@3"], ["a@3", "a@6", "a@1"]):
        piecewise = empty_like(source)
        for which in order:
            pushed(source, piecewise, which)
        assert [c.step for c in piecewise.open()["a"].checkpoints()] == [1, 3, 6], "what comes later has its place"


def test_metrics_of_what_was_dropped_stay_in_the_series() -> None:
    source = Store()
    with source.open().run("a").track(rng=False) as run:
        for step in range(1, 6):
            run.save(step, state={"w": np.full(9, step)}, metrics={"loss": 1 / step}).wait()
    source.open()["a"].forget(only(5), force=True)
    target = empty_like(source)
    pushed(source, target)
    assert target.open()["a"].series("loss") == source.open()["a"].series("loss") != []


def test_the_target_goes_on_by_itself() -> None:
    source, target = store_of(2), Store(**store_of(0).settings)
    pushed(source, target)
    with target.open().run("a").track(rng=False) as run:
        assert run.resume() == 2
        run.save(3, state=state_of(3)).wait()
    with source.open().run("a").track(rng=False) as run:
        run.resume()
        run.save(10, state=state_of(10)).wait()
    target.open()["a"].at(3).tag("mine")
    source.open()["a"].at(10).tag("mine")
    assert pushed(source, target).sent == [10]
    past = target.open()["a"]
    assert past.latest is not None and past.latest.step == 3, "the line that goes on there stays the current one"
    assert past.tagged("mine").step == 3
    (back,) = source.open().pull(target.open())
    assert back.sent == [3]
    found = source.open()["a"].checkpoints(all=True)
    assert sorted(c.step for c in found) == [1, 2, 3, 10] and all(whole(c) for c in found)


def test_tags_move_with_the_source(said: Store) -> None:
    source = store_of(3)
    target = empty_like(source)
    source.open()["a"].at(1).tag("best")
    pushed(source, target)
    source.open()["a"].at(2).tag("best", move=True)
    assert pushed(source, target).said == 1
    assert target.open()["a"].tagged("best").step == 2


def test_runs_and_places_that_there_are_not(said: Store) -> None:
    repo, target = said.open(), empty_like(said).open()
    with pytest.raises(NotFound, match="no run 'b'"):
        repo.push(target, "b")
    with pytest.raises(NotFound, match="no checkpoint"):
        repo.push(target, "a@999")
    with pytest.raises(NotFound, match="no repository"):
        repo.pull(target)
    with pytest.raises(UsageError, match="same place"):
        repo.push(repo)
    assert not target.exists
    planned = repo.push(target, dry_run=True)
    assert planned[0].sent == [1, 2, 3, 4, 3, 4] and planned[0].sent_bytes > 0 and not target.exists
    (renamed,) = repo.push(target, "a@1", as_run="other")
    assert renamed.target_run == "other" and target.runs() == ["other"]


def test_all_ranks_of_a_checkpoint() -> None:
    storage = MemoryStorage()
    settings = everystep.Settings(**QUICK)

    def save(rank: int) -> None:
        run = Repository(Place(storage, Seam(), settings)).run("a", rank=rank, ranks=RANKS, launch="x").track(rng=False)
        for step in (1, 2):
            run.save(step, state=rank_state(rank, step)).wait(30)
        run.close()

    with ThreadPoolExecutor(RANKS) as pool:
        list(pool.map(save, range(RANKS)))
    source, target = (Repository(Place(s, Seam(), settings)) for s in (storage, MemoryStorage()))
    source.push(target)
    for mine, theirs in zip(source["a"].checkpoints(), target["a"].checkpoints(), strict=True):
        assert theirs.ranks == RANKS and same(mine.load(), theirs.load())
        assert same(theirs.load()["params"]["wide"], whole_of(theirs.step)["params"]["wide"])
    assert target.check().ok


# damage and races --------------------------------------------------------------------------------------------------


def test_nothing_damaged_is_sent() -> None:
    source = store_of(4)
    for number in range(0, len(source.packs()), 2):
        hurt, target = source.copy(), empty_like(source)
        key = sorted(hurt.packs())[number]
        body = bytearray(hurt.storage.objects[key])
        body[len(body) // 2] ^= 1
        hurt.storage.objects[key] = bytes(body)
        try:
            pushed(hurt, target)
        except Damaged as error:
            assert error.where
        assert all(whole(checkpoint) for checkpoint in _checkpoints(target))
        assert not target.open().exists or target.open().check().ok
        bad = {f.checkpoint for f in hurt.open().check().findings}
        assert not bad & {checkpoint.id for checkpoint in _checkpoints(target)}


def _checkpoints(store: Store) -> list[everystep.Checkpoint]:
    repo = store.open()
    return repo["a"].checkpoints(all=True) if "a" in repo else []


def test_a_log_there_that_cannot_be_read() -> None:
    source = store_of(3)
    target = empty_like(source)
    pushed(source, target, "a@1")
    key = record_key("runs/a/", 1)
    kept = target.storage.objects[key]
    target.storage.objects[key] = kept[:30] + b"?" + kept[31:]
    before = set(target.packs())
    with pytest.raises(Damaged, match="not known what is there"):
        pushed(source, target)
    assert set(target.packs()) == before
    target.storage.objects[key] = kept
    pushed(source, target)
    check(target, [1, 2, 3], attached=3)


def test_another_process_takes_the_run_there() -> None:
    source, fenced = store_of(4), 0
    for at in range(0, 30, 3):
        target = empty_like(source)
        pushed(source, target, "a@1")

        def take(target: Store = target) -> None:
            with target.open().run("a", takeover=True).track(rng=False) as run:
                run.resume()
                run.save(50, state=state_of(50)).wait()

        between = Between(target.storage, at, take)
        try:
            source.open().push(target.open(storage=between))
        except RunTakenOver:
            fenced += 1
        if between.fired:
            done = target.open()["a"].checkpoints(all=True)
            assert all(whole(checkpoint) for checkpoint in done)
            assert all(count == 1 for count in commits_of(target).values())
    assert fenced >= 3


@pytest.mark.parametrize("takeover", [False, True])
def test_a_process_that_may_be_writing_there_is_waited_for(takeover: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    source = store_of(1, takeover_seconds=5.0)
    target = empty_like(source)
    run = target.open().run("a").track(rng=False)
    run.save(7, state=state_of(7)).wait()
    repo = target.open()
    seam: Any = repo._place.seam
    monkeypatch.setattr(seam, "is_gone", lambda other: False)
    with pytest.warns(EverystepWarning, match="shares no checkpoint with run 'a'"):
        source.open().push(repo, takeover=takeover)
    assert seam.slept == 0 if takeover else seam.slept >= 5
    with pytest.raises(RunTakenOver):
        run.save(8, state=state_of(8)).wait()
    with contextlib.suppress(RunTakenOver):
        run.close()
    assert sorted(c.step for c in _checkpoints(target)) == [1, 7]


@pytest.mark.parametrize("what", ["prune", "repack", "thin"])
def test_the_source_drops_and_moves_what_is_being_sent(what: str) -> None:
    for at in range(0, 60, 4):
        source = store_of(4)
        target = empty_like(source)

        def change(source: Store = source) -> None:
            past = source.open()["a"]
            past.forget(only(*((1, 3, 4) if what == "prune" else (1, 2, 3, 4))), only(1, 4), force=True, undo_seconds=0)
            past.prune(now=True)
            if what == "repack":
                past.repack(dead=0.0)

        between = Between(source.storage, at, change, verbs=("get",))
        (done,) = source.open(storage=between).push(target.open())
        assert 3 <= len(done.sent) + done.gone <= 4, "what was dropped before it was looked at is not missed"
        assert all(whole(checkpoint) for checkpoint in _checkpoints(target))
        assert target.open().check().ok


def test_the_target_frees_what_was_to_be_referred_to() -> None:
    source = store_of(5)
    for at in range(12):
        target = empty_like(source)
        pushed(source, target, ["a@1", "a@2", "a@3"])

        def free(target: Store = target) -> None:
            thin_out(target, [1])

        between = Between(target.storage, at, free)
        source.open().push(target.open(storage=between))
        found = [checkpoint.step for checkpoint in _checkpoints(target)]
        assert found[0] == 1 and found[-1] == 5 and (between.fired or found == [1, 2, 3, 4, 5])
        assert all(whole(checkpoint) for checkpoint in _checkpoints(target))
        assert target.open().check().ok


@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "for ever"])
@pytest.mark.parametrize("fault", ["I/O error", "full after the fact", "timeout", "lost acknowledgement"])
def test_every_operation_on_the_target_fails(fault: str, for_ever: bool) -> None:
    """Killed there (for ever) or failing once: pushed again, all is there once, and nothing is left over."""
    error, applied = STORAGE_FAULTS[fault]
    source, number, fired = _small(), 0, True
    while fired:
        target = empty_like(source)
        faulty = FaultyStorage(target.storage, number, error, for_ever=for_ever, applied=applied)
        with contextlib.suppress(StorageError):
            source.open().push(target.open(storage=faulty))
        fired = len(faulty.calls) > number
        _check_small(target)
        pushed(source, target)
        alike(source, target)
        assert set(commits_of(target).values()) == {1}
        target.open()["a"].prune()
        assert set(target.packs()) == target.read_by() | _manifests(target)
        number += 1
    assert number > 20


@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "for ever"])
def test_every_operation_on_the_source_fails(for_ever: bool) -> None:
    error, applied = STORAGE_FAULTS["I/O error"]
    source, number, fired = _small(), 0, True
    while fired:
        target = empty_like(source)
        faulty = FaultyStorage(source.storage, number, error, for_ever=for_ever, applied=applied)
        with contextlib.suppress(StorageError):
            source.open(storage=faulty).push(target.open())
        fired = len(faulty.calls) > number
        _check_small(target)
        pushed(source, target)
        alike(source, target)
        assert set(commits_of(target).values()) == {1}
        number += 1
    assert number > 20


@functools.cache
def _small() -> Store:
    store = Store(chunk_bytes_max=1 << 14)
    with store.open().run("a", config={"lr": 1}).track(rng=False) as run:
        run.attach("f", b"12345")
        for step in (1, 2, 3):
            run.record(step=step, loss=1 / step)
            run.save(step, state={"w": np.arange(4000, dtype=np.float32) * step, "f": np.arange(500)}).wait()
    store.open()["a"].at(2).tag("two")
    return store


def _check_small(target: Store) -> None:
    for checkpoint in _checkpoints(target):
        assert checkpoint.load()["w"].tobytes() == (np.arange(4000, dtype=np.float32) * checkpoint.step).tobytes()
    assert not target.open().exists or target.open().check().ok


def _manifests(store: Store) -> set[str]:
    history = store.open()["a"]._history()
    found = {pack for id in history.live for pack in history.commits[id].needs()}
    return {pack_key("runs/a/", pack) for pack in found}


# pull --------------------------------------------------------------------------------------------------------------


def test_a_pull_of_one_checkpoint_reads_that_alone() -> None:
    source = store_of(12)
    needs = _stored(source, 9)
    counting = Counting(source.storage)
    target = empty_like(source)
    (done,) = target.open().pull(source.open(storage=counting), "a@9")
    assert done.sent == [9]
    check(target, [9])
    files = 30_100
    assert counting.read <= needs + files, "each chunk once, each base once, the manifest, the attached file"
    assert counting.read < 0.5 * source.nbytes


def _stored(store: Store, step: int) -> int:
    """Stored bytes of a checkpoint with its bases and its manifest, with what lies between them and is not worth a
    request of its own."""
    checkpoint = store.open()["a"].at(step)
    counting = Counting(store.storage)
    store.open(storage=counting)["a"].find(checkpoint.id).load()
    return counting.read


def test_a_pull_of_one_leaf_reads_that_alone() -> None:
    source = Store(chunk_bytes_max=1 << 16, small_leaf_bytes=1 << 12, pack_bytes_max=1 << 20, base_depth_max=3)
    drawn = np.random.default_rng(0)
    head, body = (drawn.standard_normal(n).astype(np.float32) for n in (20_000, 300_000))
    with source.open().run("big").track(rng=False) as run:
        for step in range(1, 5):
            params = {"head": {"w": head + np.float32(1e-4 * step), "b": np.zeros(3)}, "body": body + step}
            run.save(step, state={"params": params, "opt_state": {"m": body * step}}, metrics={"loss": 1 / step}).wait()
    counting = Counting(source.storage)
    target = empty_like(source)
    (done,) = target.open().pull(source.open(storage=counting), "big@latest", only="params/head")
    assert (done.target_run, done.sent) == ("big.params.head", [4])
    past = target.open()["big.params.head"]
    assert same(past.at(4).load(), {"params": {"head": {"w": head + np.float32(4e-4), "b": np.zeros(3)}}})
    assert past.at(4).metrics == {"loss": 0.25} and past.origins[0]["only"] == ["params/head"]
    assert {leaf.path: leaf.role for leaf in past.at(4).leaves()} == {
        "params/head/w": "weights", "params/head/b": "weights",
    }  # fmt: skip
    view = source.open()["big"].at(4)._open().manifest.views[0]
    depth = max(int(d) for d in view.spots["depth"])
    assert counting.read < (depth + 1) * head.nbytes + (1 << 18), f"{counting.read} of {source.nbytes}"
    (again,) = target.open().pull(source.open(), "big@latest", only="params/head")
    assert (again.sent, again.there) == ([], 1)
    (more,) = target.open().pull(source.open(), ["big@1", "big@2"], only=["params/head"])
    assert more.sent == [1, 2] and target.open().check().ok


def test_a_leaf_of_two_lines_with_one_step() -> None:
    source, target = Store(), Store()
    with source.open().run("r").track(rng=False) as run:
        for step, value in ((1, 1.0), (2, 2.0), (1, None), (2, 3.0), (1, None), (2, 2.0)):
            if value is None:
                run.rewind(step)
            else:
                run.save(step, state={"w": np.full(4, value), "m": np.zeros(4)}).wait()
    (done,) = target.open().pull(source.open(), "r", only="w")
    assert done.sent == [1, 2, 2, 2]
    found = target.open()["r.w"].checkpoints(all=True)
    assert [one.load()["w"][0] for one in found] == [1.0, 2.0, 3.0, 2.0]


def test_a_pull_through_folders(tmp_path: Path) -> None:
    repo = everystep.open(str(tmp_path / "one"))
    with repo.run("a").track(rng=False) as run:
        for step in (1, 2):
            run.save(step, state=state_of(step)).wait()
    told: list[tuple[Any, ...]] = []
    other = everystep.open(str(tmp_path / "two"))
    other.pull(str(tmp_path / "one"), progress=lambda *what: told.append(what))
    assert all(whole(checkpoint) for checkpoint in other["a"].checkpoints())
    assert told[-1][:3] == ("a", 2, 2) and told[-1][3] > 0
    assert repo._place.identity() != other._place.identity()
    with other.run("a").track(rng=False) as run:
        assert run.resume() == 2
        run.save(3, state=state_of(3)).wait()
    assert other.check().ok


def test_a_reader_that_knows_nothing_of_us_reads_what_was_pushed(tmp_path: Path) -> None:
    source = made_of()
    repo = Store(str(tmp_path), **source.settings).open()
    source.open().push(repo)
    run = Independent(tmp_path, "a")
    assert [commit["step"] for commit in run.live] == [3, 5, 6]
    for commit in run.live:
        if commit["step"] != 3:  # thin: it does not know of that
            state, _ = run.load(commit)
            assert same(state["state"], state_of(commit["step"]))
    assert b"".join(run.read(place) for place in run.attached["notes.txt"]) == file_of(6)
    assert repo["a"].at(3).thin
