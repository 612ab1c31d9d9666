"""A run with all that a log can say, a copy of it to hold beside, and storages that count."""

from __future__ import annotations

from typing import Any

from _repack import file_of, state_of
from _retention import DAY, Store, same

from everystep.storage.faulty import FaultyStorage


class Counting(FaultyStorage):
    """Counts the bytes of packs that are read and written."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.read = self.written = 0

    def get(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        found = super().get(key, start, stop)
        self.read += len(found) if "/packs/" in key else 0
        return found

    def put(self, key: str, data: Any) -> None:
        super().put(key, data)
        self.written += self.inner.stat(key).nbytes if "/packs/" in key else 0


def empty_like(store: Store) -> Store:
    return Store(**store.settings)


def alike(source: Store, target: Store) -> None:
    """All that the source says of its run, the target says, too."""
    one, other = source.open()["a"], target.open()["a"]
    for what in ("config", "notes", "origins", "attachments", "metric_names"):
        assert getattr(one, what) == getattr(other, what), what
    assert {name: held.id for name, held in one.tags.items()} == {name: held.id for name, held in other.tags.items()}
    assert [c.id for c in one.checkpoints()] == [c.id for c in other.checkpoints()]
    assert [c.id for c in one.checkpoints(all=True)] == [c.id for c in other.checkpoints(all=True)]
    for mine, theirs in zip(one.checkpoints(all=True), other.checkpoints(all=True)):
        for what in ("step", "parent", "time", "reason", "metrics", "tags", "notes", "thin", "environment", "ranks"):
            assert repr(getattr(mine, what)) == repr(getattr(theirs, what)), what  # with NaN
        assert same(mine.load(), theirs.load())
    for name in one.metric_names:
        assert repr(one.series(name)) == repr(other.series(name))
    for name in one.attachments:
        assert one.attachment(name) == other.attachment(name)
    assert target.open().check().ok


def said_of() -> Store:
    """Six steps with all that a log can say beside them."""
    store = Store(chunk_bytes_max=1 << 14, pack_bytes_max=1 << 17, base_depth_max=8)
    with store.open().run("a", config={"lr": 0.1, "betas": (0.9, 0.99)}).track(rng=False) as run:
        run.attach("notes.txt", file_of(1))
        for step in range(1, 5):
            run.record(step=10 * step, loss=1 / step, nan=float("nan"))
            run.save(step, state=state_of(step), metrics={"val_loss": 1 / step, "nan": float("nan")}).wait()
    store.clock.seconds += DAY
    with store.open().run("a").track(rng=False) as run:
        run.rewind(2)
        for step in (3, 4):
            run.save(step, state=state_of(step), metrics={"val_loss": 0.8 / step}, reason="again").wait()
    past = store.open()["a"]
    past.at(2).tag("two").record(late=7.5, text="x", nan=float("nan"))
    past.latest.tag("end").note("the end")  # type: ignore[union-attr]
    past.note("of the run")
    past.note("of the run")
    return store
