"""Every bit and every length of every file of a small repository: the right bits or a typed error, never wrong data.

At a desk one bit of every byte; all of them with EVERYSTEP_THOROUGH=1.
"""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _seams import QuickSeam
from _thorough import THOROUGH

import everystep
from everystep.repository import Repository
from everystep.settings import DEFAULT
from everystep.storage import MemoryStorage
from everystep.vault import Place, RunVault

TAG = "chosen"
SHARDS = 12 if THOROUGH else 2
RECORDS = ("open", "first", "second", "tag", "close")
ROUTES: dict[str, Callable[[everystep.PastRun], Any]] = {
    "latest": lambda past: past.latest,
    "at 1": lambda past: past.at(1),
    "at 2": lambda past: past.at(2),
    "tagged": lambda past: past.tagged(TAG),
    "best": lambda past: past.best("loss"),
}


def state_of(step: int, salt: int = 0) -> dict[str, Any]:
    """A frozen leaf, which the second checkpoint refers to, and one that moves a little: it leans on the first's."""
    weights = np.random.default_rng(salt).normal(size=64).astype(np.float32)
    weights[:step] += 1
    return {"frozen": np.arange(6.0) + salt, "weights": weights, "count": step}


def equal(state: Any, step: int, salt: int = 0) -> bool:
    good = state_of(step, salt)
    return (
        type(state) is dict
        and list(state) == list(good)
        and state["count"] == step
        and all(
            state[n].dtype == good[n].dtype and state[n].tobytes() == good[n].tobytes() for n in good if n != "count"
        )
    )


class NoThreads(QuickSeam):
    """For runs that resume and save nothing."""

    def start(self, target: Callable[[], None], name: str) -> Any:
        return None


SEAM = NoThreads()


def repository(objects: dict[str, bytes]) -> Repository:
    storage = MemoryStorage("a copy")
    storage.objects = objects
    return Repository(Place(storage, SEAM, DEFAULT))


def write_run(storage: Any, name: str, salt: int = 0, seam: Any = None) -> None:
    run = Repository(Place(storage, seam or QuickSeam(), DEFAULT)).run(name).track(rng=False)
    for step in (1, 2):
        run.save(step, state=state_of(step, salt), metrics={"loss": float(step)}).wait()
    run.at(2).tag(TAG)
    run.close()


@dataclass
class Sound:
    """The repository as it should be, and what each checkpoint depends on."""

    objects: dict[str, bytes]
    ids: dict[str, str] = field(default_factory=dict)
    """What each route answers."""
    used: dict[int, dict[str, set[int]]] = field(default_factory=dict)
    """step -> file -> the bytes that its load depends on."""

    @property
    def folder(self) -> str:
        return "runs/a/"

    def record(self, kind: str) -> str:
        return f"{self.folder}log/{RECORDS.index(kind):020d}"

    def packs(self) -> list[str]:
        return [key for key in self.objects if "/packs/" in key]


@cache
def sound() -> Sound:
    storage = MemoryStorage("sound")
    write_run(storage, "a")
    made = Sound(dict(storage.objects))
    place = Place(storage, SEAM, DEFAULT)
    past = Repository(place)["a"]
    made.ids = {route: ask(past).id for route, ask in ROUTES.items()}
    vault = RunVault(place, "a")
    chunks = [
        vault.manifest(commit).views[0].spot(index) for commit in vault.history().commits.values() for index in (0, 1)
    ]
    assert chunks[2] == chunks[0] and chunks[3].base == chunks[1], "no reference, or nothing that leans on a base"
    for commit in vault.history().commits.values():
        made.used[commit.event.step] = _used(vault, commit)
    assert sum(map(len, made.objects.values())) <= 8192
    assert next(iter(made.objects)) == "format.json" and len(made.packs()) == 4
    assert made.ids["at 1"] == made.ids["best"] != made.ids["at 2"] == made.ids["tagged"] == made.ids["latest"]
    return made


def _used(vault: RunVault, commit: Any) -> dict[str, set[int]]:
    manifest = vault.manifest(commit)
    (view,) = manifest.views
    root = commit.event.root
    part = json.loads(vault.read_pages([root], "").split(b"\n")[1])[0]
    places = [(page.writer, page.number, page.offset, page.length) for page in (root, *view.placement.pages())]
    places.append((part[0] or root.writer, part[1] if part[0] else root.number, *part[2:4]))
    for index in range(len(view.layout.chunks)):
        spot: Any = view.spot(index)
        while spot is not None:
            places.append((*spot.pack, spot.offset, spot.length))
            spot = spot.base
    used: dict[str, set[int]] = {}
    for writer, number, offset, length in places:
        used.setdefault(f"{vault.folder}packs/{writer}/{number}", set()).update(range(offset, offset + length))
    return used


# the judge ---------------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """What somebody is told who asks: a checkpoint, or an error; and whether a warning came with it."""

    checkpoint: Any = None
    error: everystep.Error | None = None
    warned: bool = False


def asked(ask: Callable[[], Any]) -> Answer:
    """Errors that are not typed, and warnings of another kind, go up and fail the test."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            answer = Answer(checkpoint=ask())
        except everystep.Error as error:
            assert error.kind != "error" and error.what, repr(error)
            answer = Answer(error=error)
    assert all(warning.category is everystep.DamageWarning for warning in caught)
    answer.warned = bool(caught)
    return answer


@dataclass
class Verdict:
    """What a damaged repository answered, every answer found to be right or typed."""

    answers: dict[str, Answer] = field(default_factory=dict)
    loads: dict[str, Answer] = field(default_factory=dict)
    resumed: Answer = field(default_factory=Answer)

    @property
    def changed(self) -> bool:
        told = [*self.answers.values(), *self.loads.values(), self.resumed]
        return any(answer.error is not None or answer.warned for answer in told)

    def whole(self, route: str) -> bool:
        answer = self.answers[route]
        return answer.error is None and self.loads[answer.checkpoint.id].error is None


def judge(objects: dict[str, bytes], name: str = "a", salt: int = 0, ids: dict[str, str] | None = None) -> Verdict:
    """Asks for everything. Whatever comes must be right: the true checkpoint, or with a warning one that was saved."""
    ids = ids or sound().ids
    verdict = Verdict()
    opened = asked(lambda: repository(objects)[name])
    for route, ask in ROUTES.items():
        answer = verdict.answers[route] = opened if opened.error else asked(lambda ask=ask: ask(opened.checkpoint))
        if answer.error is not None:
            continue
        assert answer.checkpoint is not None, "an empty run where there was one"
        id = answer.checkpoint.id
        assert id == ids[route] or (answer.warned and route == "best" and id in ids.values()), route
        if id not in verdict.loads:
            load = verdict.loads[id] = asked(answer.checkpoint.load)
            assert load.error is not None or equal(load.checkpoint, answer.checkpoint.step, salt)
    verdict.resumed = resumed(objects, name, salt)
    return verdict


class Model:
    """Something to track."""

    def __init__(self) -> None:
        self.state: Any = None

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def resumed(objects: dict[str, bytes], name: str = "a", salt: int = 0) -> Answer:
    """`resume` goes on from the newest, or with a warning from one before it; never from nothing."""
    answer = (
        asked(repository(dict(objects)).run(name).resume) if readable(objects) else Answer(error=everystep.Error(""))
    )
    if answer.error is None:
        assert answer.checkpoint == 2 or (answer.checkpoint == 1 and answer.warned), "it lost steps in silence"
    return answer


def readable(objects: dict[str, bytes]) -> bool:
    return asked(lambda: repository(objects)).error is None


def findings(objects: dict[str, bytes]) -> bool:
    """Whether the check tells of damage."""
    answer = asked(lambda: repository(objects).check())
    return answer.error is not None or not answer.checkpoint.ok


def check_told(verdict: Verdict, objects: dict[str, bytes]) -> None:
    assert findings(objects) or not verdict.changed, "what can be loaded has changed, and the check is silent"


# every bit, every length -------------------------------------------------------------------------------------------


def flips() -> Iterator[tuple[str, int, int]]:
    for key, body in sound().objects.items():
        for at in range(len(body)):
            for bit in range(8) if THOROUGH else (at % 8,):
                yield key, at, bit


def check_used(verdict: Verdict, key: str, touched: Iterable[int]) -> None:
    """Checkpoints that do not use a damaged byte still load."""
    for step in (1, 2):
        hit = key in (sound().record("first" if step == 1 else "second"), "format.json")
        hit = hit or not sound().used[step].get(key, set()).isdisjoint(touched)
        assert hit or verdict.whole(f"at {step}"), f"step {step} does not use it and cannot be loaded"
        assert not hit or "/packs/" in key or not verdict.whole(f"at {step}"), "not every byte of a record is checked"


@pytest.mark.parametrize("shard", range(SHARDS))
def test_every_bit(shard: int) -> None:
    objects = dict(sound().objects)
    for key, at, bit in itertools.islice(flips(), shard, None, SHARDS):
        good = objects[key]
        objects[key] = good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :]
        verdict = judge(objects)
        check_used(verdict, key, [at])
        check_told(verdict, objects)
        objects[key] = good


@pytest.mark.parametrize("shard", range(2))
def test_every_length(shard: int) -> None:
    objects = dict(sound().objects)
    lengths = [(key, length) for key, body in objects.items() for length in range(len(body))]
    for key, length in lengths[shard::2]:
        good = objects[key]
        objects[key] = good[:length]
        verdict = judge(objects)
        check_used(verdict, key, range(length, len(good)))
        check_told(verdict, objects)
        objects[key] = good


@pytest.mark.parametrize("tail", [b"\0", b"\n", b"x" * 100, b"{}"], ids=len)
def test_bytes_too_many(tail: bytes) -> None:
    for key in sound().objects:
        objects = {**sound().objects, key: sound().objects[key] + tail}
        verdict = judge(objects)
        check_used(verdict, key, [])
        check_told(verdict, objects)


def test_the_judge_sees_nothing_wrong_where_nothing_is() -> None:
    verdict = judge(sound().objects)
    assert not verdict.changed and not findings(sound().objects)
    assert verdict.resumed.checkpoint == 2


def test_resume_puts_the_right_bits_in_place(tmp_path: Path) -> None:
    """A damaged newest checkpoint: the one before it comes into the objects that are tracked, with a warning."""
    run = everystep.open(str(tmp_path / "runs")).run("a").track(model=(model := Model()))
    for step in (1, 2):
        model.state = state_of(step)
        run.save(step).wait()
    run.close()
    packs = sorted(tmp_path.glob("runs/runs/a/packs/*/*"), key=lambda path: int(path.name))
    for pack in packs[-2:]:
        pack.write_bytes(bytes(pack.stat().st_size))
    model.state = None
    again = everystep.open(str(tmp_path / "runs")).run("a").track(model=model)
    with pytest.warns(everystep.DamageWarning, match="step 2"):
        assert again.resume() == 1
    assert equal(model.state, 1)
    model.state = state_of(2)
    assert equal(again.save(2).wait().load()["model"], 2)
    again.close()
    past = everystep.open(str(tmp_path / "runs"))["a"]
    assert past.latest.step == 2 and equal(past.at(2).load()["model"], 2)


# whole files -------------------------------------------------------------------------------------------------------


def test_files_swapped_pairwise() -> None:
    for one, other in itertools.combinations(sound().objects, 2):
        good = sound().objects
        objects = {**good, one: good[other], other: good[one]}
        check_told(judge(objects), objects)


def test_one_file_over_another() -> None:
    for one, other in itertools.permutations(sound().objects, 2):
        objects = {**sound().objects, one: sound().objects[other]}
        check_told(judge(objects), objects)


@pytest.mark.parametrize("body", [b"", b"\0", b"{}", b"null\n", b"[" * 5000, b'{"a":' * 5000], ids=lambda b: str(b[:5]))
def test_a_file_with_other_bytes(body: bytes) -> None:
    for key in sound().objects:
        objects = {**sound().objects, key: body}
        check_told(judge(objects), objects)


def test_a_file_of_zeros() -> None:
    for key, good in sound().objects.items():
        objects = {**sound().objects, key: bytes(len(good))}
        verdict = judge(objects)
        check_used(verdict, key, range(len(good)))
        check_told(verdict, objects)


def test_a_file_deleted() -> None:
    """All but the last record, whose loss leaves a log that is whole, and shorter: see the next test."""
    for key in sound().objects:
        if key != sound().record("close"):
            objects = {k: body for k, body in sound().objects.items() if k != key}
            verdict = judge(objects)
            check_used(verdict, key, range(1 << 16))
            check_told(verdict, objects)


def test_a_log_without_its_end_is_an_earlier_log() -> None:
    """Nothing inside a repository can tell; what was there before is still right."""
    objects = dict(sound().objects)
    for kind in reversed(RECORDS[2:]):
        del objects[sound().record(kind)]
        past = repository(objects)["a"]
        assert past.latest.step == (1 if kind == "second" else 2) and equal(past.latest.load(), past.latest.step)
        assert repository(objects).check().ok


GARBAGE = [
    "notes.txt", ".tmp-0123", "runs/readme", "runs/.tmp-1/x", "runs/with space/log/00000000000000000000",
    "runs/%FF/log/00000000000000000000", "runs/%ff/x", "runs/%/x", "runs/a/notes", "runs/a/other/folder/file",
    "runs/a/log/.tmp-0123", "runs/a/log/notes", "runs/a/log/5", "runs/a/log/-0000000000000000005",
    "runs/a/log/" + "9" * 20, "runs/a/log/" + "9" * 30, "runs/a/log/" + "0" * 29 + "5", "runs/a/log/" + "\u00b2" * 20,
    "runs/a/log/" + "\u0665" * 20, "runs/a/log/ 0000000000000000005", "runs/a/log/sub/00000000000000000005",
    "runs/a/log/0000000000000000000_", "runs/a/packs/stray", "runs/a/packs/x-1/0", "runs/a/packs/x-1/.tmp-9",
    "runs/a/save/1/0/1", "runs/a/save/x", "runs/caf\u00e9/log/00000000000000000000", "runs/\udcff/x",
]  # fmt: skip


@pytest.mark.parametrize("body", [b"", b"garbage", b'{"v":1}\nblake3 00\n'])
def test_garbage_beside_the_repository_changes_nothing(body: bytes) -> None:
    for key in GARBAGE:
        objects = {**sound().objects, key: body}
        verdict = judge(objects)
        assert not verdict.changed and not findings(objects), key
        assert repository(objects).runs() == ["a"], key


@pytest.mark.parametrize("slot", [5, 6, 7, 500, 2000, 10**9, 10**15 - 1])
def test_garbage_with_the_name_of_a_record(slot: int) -> None:
    """It may have been a newer checkpoint, so `latest` refuses; what is asked for by step loads. In bounded time."""
    for body in (b"", b"garbage", sound().objects[sound().record("second")]):
        objects = {**sound().objects, f"runs/a/log/{slot:020d}": body}
        verdict = judge(objects)
        check_told(verdict, objects)
        assert verdict.changed and verdict.whole("at 1") and verdict.whole("at 2")
        assert verdict.resumed.checkpoint == 2


@pytest.mark.parametrize("slot", [5, 6, 900, 5000, 10**9])
def test_life_goes_on_behind_a_damaged_end_of_the_log(slot: int) -> None:
    storage = MemoryStorage()
    storage.objects = {**sound().objects, f"runs/a/log/{slot:020d}": b"garbage"}

    def run() -> everystep.Run:
        return Repository(Place(storage, QuickSeam(), DEFAULT)).run("a").track(rng=False)

    first = run()
    with pytest.warns(everystep.DamageWarning):
        assert first.resume() == 2
    first.save(3, state=state_of(3)).wait()
    first.close()
    second = run()
    assert second.resume() == 3
    warnings.simplefilter("ignore", everystep.DamageWarning)
    assert [checkpoint.step for checkpoint in second.checkpoints()] == [1, 2, 3]


# two runs ----------------------------------------------------------------------------------------------------------


@cache
def two_runs() -> tuple[dict[str, bytes], dict[str, dict[str, str]]]:
    storage = MemoryStorage("two")
    write_run(storage, "a")
    write_run(storage, "b", salt=100)
    repo = repository(dict(storage.objects))
    return dict(storage.objects), {n: {r: ask(repo[n]).id for r, ask in ROUTES.items()} for n in "ab"}


def judge_both(objects: dict[str, bytes]) -> list[Verdict]:
    _, ids = two_runs()
    verdicts = [judge(objects, "a", 0, ids["a"]), judge(objects, "b", 100, ids["b"])]
    changed = any(verdict.changed for verdict in verdicts)
    assert findings(objects) or not changed
    return verdicts


@pytest.mark.parametrize("slot", range(len(RECORDS)))
def test_records_of_two_runs_swapped(slot: int) -> None:
    good, _ = two_runs()
    one, other = (f"runs/{name}/log/{slot:020d}" for name in "ab")
    verdicts = judge_both({**good, one: good[other], other: good[one]})
    assert all(verdict.changed for verdict in verdicts)
    for verdict in verdicts:  # only what that record says is lost
        assert verdict.whole("at 1") == (slot != 1) and verdict.whole("at 2") == (slot != 2)


@pytest.mark.parametrize("part", ["", "log/", "packs/"])
def test_folders_of_two_runs_swapped(part: str) -> None:
    good, _ = two_runs()
    swap = {f"runs/a/{part}": f"runs/b/{part}", f"runs/b/{part}": f"runs/a/{part}"}

    def moved(key: str) -> str:
        return next((swap[start] + key.removeprefix(start) for start in swap if key.startswith(start)), key)

    for verdict in judge_both({moved(key): body for key, body in good.items()}):
        assert not verdict.whole("at 1") if verdict.answers["at 1"].error is None else True
        assert verdict.resumed.error is not None


@pytest.mark.parametrize("records", range(1, len(RECORDS) + 1))
def test_a_renamed_run_is_not_taken_for_another(records: int) -> None:
    """However far it had come. No state of one run is ever loaded as another's."""
    good = sound().objects
    objects = {
        key.replace("runs/a/", "runs/z/"): body
        for key, body in good.items()
        if "/log/" not in key or int(key[-20:]) < records
    }
    repo = repository(objects)
    for ask in ROUTES.values():
        with pytest.raises(everystep.Damaged, match="another run"):
            ask(repo["z"])
    with pytest.raises(everystep.Damaged, match="another run"):
        repository(dict(objects)).run("z").resume()
    assert not repo.check().ok


def test_a_run_of_another_repository_is_refused() -> None:
    storage = MemoryStorage()
    write_run(storage, "b")
    objects = {**sound().objects, **{key: body for key, body in storage.objects.items() if key.startswith("runs/b/")}}
    with pytest.raises(everystep.Damaged, match="another run or repository"):
        repository(objects)["b"].at(1)
    assert not judge(objects).changed
    assert findings(objects)


def test_a_first_record_that_comes_back_is_welcome() -> None:
    """Written on behind a damaged record, and the record then brought back from a copy: both are whole."""
    for kind in RECORDS[:-1]:
        storage = MemoryStorage()
        storage.objects = {**sound().objects, sound().record(kind): b"damaged"}
        run = Repository(Place(storage, QuickSeam(), DEFAULT)).run("a").track(rng=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", everystep.DamageWarning)
            newest = run.resume()
            run.save(newest + 1, state=state_of(newest + 1)).wait()
        run.close()
        storage.objects[sound().record(kind)] = sound().objects[sound().record(kind)]
        repo = Repository(Place(storage, QuickSeam(), DEFAULT))
        assert repo.check().ok
        assert repo["a"].latest.step == newest + 1 and equal(repo["a"].at(1).load(), 1)


def test_the_last_record_that_comes_back_is_welcome() -> None:
    storage = MemoryStorage()
    storage.objects = {**sound().objects, sound().record("close"): b"damaged"}
    run = Repository(Place(storage, QuickSeam(), DEFAULT)).run("a").track(rng=False)
    with pytest.warns(everystep.DamageWarning):
        run.resume()
    id = run.save(3, state=state_of(3)).wait().id
    run.close()
    storage.objects[sound().record("close")] = sound().objects[sound().record("close")]
    repo = Repository(Place(storage, QuickSeam(), DEFAULT))
    assert repo.check().ok and repo["a"].latest.id == id and equal(repo["a"].at(3).load(), 3)


# real files --------------------------------------------------------------------------------------------------------


def test_folders_and_links_where_files_belong(tmp_path: Path) -> None:
    for number, key in enumerate(sound().objects):
        for kind in ("folder", "dangling", "loop"):
            root = tmp_path / f"{number}-{kind}"
            for other, body in sound().objects.items():
                (root / other).parent.mkdir(parents=True, exist_ok=True)
                (root / other).write_bytes(body)
            path = root / key
            path.unlink()
            path.mkdir() if kind == "folder" else path.symlink_to("nowhere" if kind == "dangling" else path.name)
            repo = asked(lambda root=root: everystep.open(str(root), seam=SEAM)["a"])
            for route, ask in ROUTES.items():
                answer = repo if repo.error else asked(lambda ask=ask, repo=repo: ask(repo.checkpoint))
                if answer.error is None:
                    load = asked(answer.checkpoint.load)
                    assert load.error is not None or equal(load.checkpoint, answer.checkpoint.step), route
            told = asked(lambda root=root: everystep.open(str(root), seam=SEAM).check())
            needless = key == "place.json" or (key == sound().record("close") and kind == "dangling")
            assert needless or told.error is not None or not told.checkpoint.ok, (key, kind)
