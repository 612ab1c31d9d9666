"""The tables: what each run's log says, as far as it has been absorbed, in one SQLite file per repository."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from everystep.catalog.expression import Condition, near
from everystep.errors import UsageError
from everystep.seam import Seam

P = ParamSpec("P")
R = TypeVar("R")
SCHEMA = 2
_TABLES = """
CREATE TABLE runs (run TEXT PRIMARY KEY, slots INTEGER NOT NULL, head TEXT NOT NULL) STRICT;
CREATE TABLE checkpoints (
    run TEXT NOT NULL, id TEXT NOT NULL, slot INTEGER NOT NULL, step INTEGER NOT NULL, time REAL NOT NULL,
    parent TEXT, term INTEGER NOT NULL, reason TEXT NOT NULL, thin INTEGER NOT NULL, raw_bytes INTEGER NOT NULL,
    stored_bytes INTEGER NOT NULL, stall_seconds REAL NOT NULL, PRIMARY KEY (run, id)) STRICT, WITHOUT ROWID;
CREATE INDEX by_step ON checkpoints (run, step);
CREATE TABLE metrics (run TEXT NOT NULL, id TEXT NOT NULL, name TEXT NOT NULL, value ANY,
    PRIMARY KEY (run, id, name)) STRICT, WITHOUT ROWID;
CREATE INDEX by_value ON metrics (run, name, value);
CREATE TABLE tags (run TEXT NOT NULL, name TEXT NOT NULL, id TEXT NOT NULL, PRIMARY KEY (run, name))
    STRICT, WITHOUT ROWID;
"""
_COLUMNS = (
    "id", "slot", "step", "time", "parent", "term", "reason", "thin", "raw_bytes", "stored_bytes", "stall_seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A live checkpoint in the catalog."""

    id: str
    slot: int
    step: int
    time: float
    parent: str | None
    term: int
    reason: str
    thin: bool
    raw_bytes: int
    stored_bytes: int
    stall_seconds: float
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Absorbed:
    """How far a run's log has been read: slots, and the head's hash."""

    slots: int
    head: str


class Lost(Exception):
    """The tables cannot be used now: locked for long, on a full or broken disk. What they hold can be made anew."""


def _guarded(method: Callable[P, R]) -> Callable[P, R]:
    @wraps(method)
    def call(*given: P.args, **named: P.kwargs) -> R:
        try:
            return method(*given, **named)
        except sqlite3.Error as error:
            raise Lost(str(error)) from error

    return call


class Catalog:
    """One repository's tables. Several processes may share the file; what is broken is made anew.

    Args:
        path: of the file, or ":memory:" for tables that live with this object.

    Raises:
        Lost: from each method, where the file cannot be used.
    """

    @_guarded
    def __init__(self, path: str, seam: Seam) -> None:
        self.path, self._lock = path, seam.lock()
        self._connection = self._open(path, seam)

    def _open(self, path: str, seam: Seam) -> sqlite3.Connection:
        try:
            return _connect(path)
        except sqlite3.DatabaseError as error:
            # Broken or of another schema, not locked or out of reach: those are sqlite3.OperationalError.
            if path == ":memory:" or type(error) is not sqlite3.DatabaseError:
                raise
            for name in (path, f"{path}-wal", f"{path}-shm"):
                _remove(seam, name)
            return _connect(path)

    @_guarded
    def recall(self, run: str) -> Absorbed | None:
        """What the last `absorb` left of a run."""
        with self._lock:
            row = self._connection.execute("SELECT slots, head FROM runs WHERE run = ?", (run,)).fetchone()
        return Absorbed(*row) if row else None

    @_guarded
    def absorb(self, run: str, seen: Absorbed, changed: Iterable[Entry], gone: Iterable[str], tags: dict[str, str],
               *, anew: bool = False) -> None:  # fmt: skip
        """Takes in what a log has gained.

        Args:
            changed: checkpoints that are new, or live again, or have other metrics than before.
            gone: ids of checkpoints that are not live any more.
            tags: all of them, name -> id.
            anew: forget the run first.
        """
        with self._lock, self._connection as db:
            if anew:
                for table in ("checkpoints", "metrics"):
                    db.execute(f"DELETE FROM {table} WHERE run = ?", (run,))
            dead = [(run, id) for id in gone]
            for table in ("checkpoints", "metrics"):
                db.executemany(f"DELETE FROM {table} WHERE run = ? AND id = ?", dead)
            entries = list(changed)
            marks = ", ".join("?" * (len(_COLUMNS) + 1))
            db.executemany(
                f"INSERT OR REPLACE INTO checkpoints (run, {', '.join(_COLUMNS)}) VALUES ({marks})",
                [(run, *(_plain(getattr(entry, name)) for name in _COLUMNS)) for entry in entries],
            )
            db.executemany(
                "INSERT OR REPLACE INTO metrics VALUES (?, ?, ?, ?)",
                [(run, e.id, name, _plain(value)) for e in entries for name, value in e.metrics.items()],
            )
            db.execute("DELETE FROM tags WHERE run = ?", (run,))
            db.executemany("INSERT INTO tags VALUES (?, ?, ?)", [(run, name, id) for name, id in tags.items()])
            db.execute("INSERT OR REPLACE INTO runs VALUES (?, ?, ?)", (run, seen.slots, seen.head))

    @_guarded
    def query(self, run: str, condition: Condition, ids: Sequence[str] | None = None) -> list[str]:
        """Ids of the run's live checkpoints that meet a condition, by step.

        Raises:
            UsageError: for a metric that no checkpoint of the run has.
        """
        with self._lock:
            known = {
                row[0] for row in self._connection.execute("SELECT DISTINCT name FROM metrics WHERE run = ?", (run,))
            }
            missing = [name for name in condition.metrics if name not in known]
            if missing:
                hint = near(missing[0], sorted(known)) or sorted(known)[:5]
                raise UsageError(
                    f"no checkpoint of run {run!r} has a metric {missing[0]!r}",
                    do=f"there is: {', '.join(hint)}" if hint else "none has a metric yet",
                )
            sql = f"SELECT c.id FROM checkpoints c WHERE c.run = ? AND {condition.sql} ORDER BY c.step, c.slot"
            rows = self._connection.execute(sql, [run, *condition.values]).fetchall()
        wanted = None if ids is None else set(ids)
        return [row[0] for row in rows if wanted is None or row[0] in wanted]

    @_guarded
    def rank(self, run: str, metric: str, mode: str, limit: int) -> list[str]:
        """Ids of the live checkpoints with the best values of a metric, best first; the earlier of equals first."""
        order = "ASC" if mode == "min" else "DESC"
        sql = (
            "SELECT m.id FROM metrics m JOIN checkpoints c USING (run, id) WHERE m.run = ? AND m.name = ? "
            f"AND typeof(m.value) IN ('integer', 'real') ORDER BY m.value {order}, c.slot LIMIT ?"
        )
        with self._lock:
            return [row[0] for row in self._connection.execute(sql, (run, metric, limit))]

    @_guarded
    def count(self, run: str) -> int:
        """How many live checkpoints it knows of a run."""
        with self._lock:
            row = self._connection.execute("SELECT count(*) FROM checkpoints WHERE run = ?", (run,)).fetchone()
        return int(row[0])

    @_guarded
    def holds(self, run: str, entries: Sequence[Entry]) -> bool:
        """Whether all these are there, just as given."""
        ids = json.dumps([entry.id for entry in entries])
        among = "run = ? AND id IN (SELECT value FROM json_each(?))"
        rows: dict[str, tuple[Any, ...]] = {}
        metrics: dict[str, dict[str, Any]] = {entry.id: {} for entry in entries}
        with self._lock:
            sql = f"SELECT {', '.join(_COLUMNS)} FROM checkpoints WHERE {among}"
            rows.update((row[0], row) for row in self._connection.execute(sql, (run, ids)))
            sql = f"SELECT id, name, value FROM metrics WHERE {among}"
            for id, name, value in self._connection.execute(sql, (run, ids)):
                metrics[id][name] = value
        return all(
            rows.get(entry.id) == tuple(_plain(getattr(entry, name)) for name in _COLUMNS)
            and metrics[entry.id] == {name: _plain(value) for name, value in entry.metrics.items()}
            for entry in entries
        )

    def close(self) -> None:
        with self._lock:
            self._connection.close()


def _remove(seam: Seam, path: str) -> None:
    try:
        seam.files.unlink(path)
    except FileNotFoundError:
        return


def _connect(path: str) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=5.0, check_same_thread=False)
    try:
        if path != ":memory:":
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, SCHEMA):
            raise sqlite3.DatabaseError(f"a catalog of schema {version}")
        if version == 0:
            with db:
                db.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {SCHEMA}; COMMIT;")
        db.execute("SELECT count(*) FROM runs").fetchone()
    except sqlite3.DatabaseError:
        db.close()
        raise
    return db


def _plain(value: Any) -> Any:
    """NaN has no order in SQL: it is kept as no value, so that it never matches and never wins."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, int) and abs(value) >= 1 << 63:
        return float(value)
    return value
