"""A record of a run's log: a numbered list of events, chained to the record before it."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from everystep.errors import Damaged, NewerFormat, UsageError
from everystep.settings import FORMAT
from everystep.vault.lines import digest, pack_lines, parse_json, unpack_lines


class PackRange(NamedTuple):
    """Packs `first` … `last` of one writer."""

    writer: str
    first: int
    last: int


class Where(msgspec.Struct, array_like=True, frozen=True):
    """Bytes of a manifest page: which pack, where in it, how encoded, and the BLAKE3 of the plain bytes."""

    writer: str
    number: int
    offset: int
    length: int
    nbytes: int
    codec: int
    blake3: str


class Cost(msgspec.Struct, frozen=True):
    """What a save cost: seconds of each stage; bytes of the state and bytes newly stored."""

    stall_seconds: float = 0.0
    queue_seconds: float = 0.0
    encode_seconds: float = 0.0
    write_seconds: float = 0.0
    raw_bytes: int = 0
    stored_bytes: int = 0


class Open(msgspec.Struct, tag="open", frozen=True):
    """A process takes the run: from here on lower terms may not write."""

    nonce: str
    launch: str
    ranks: int
    process: dict[str, Any]
    environment: dict[str, Any]
    continues: str | None
    reason: str


class Close(msgspec.Struct, tag="close", frozen=True):
    """The owner ended as it should: the run is free."""

    nonce: str


class Commit(msgspec.Struct, tag="commit", frozen=True):
    """A checkpoint. `nonce` and `ordinal` name the save, so that a repeated one is committed once."""

    id: str
    step: int
    parent: str | None
    root: Where
    logical: str
    metrics: dict[str, Any]
    packs: list[PackRange]
    nonce: str
    ordinal: int
    cost: Cost = Cost()
    ranks: int = 1
    reason: str = ""
    optimizer: list[PackRange] = []
    """Those of `packs` that only the optimizer state needs."""


class Abandon(msgspec.Struct, tag="abandon", frozen=True):
    """A save that ended without a checkpoint of its own: the ranks that did not deliver, or the checkpoint `instead` of
    it that holds the same already. `again`: it leaned on what was freed, and all ranks write it once more."""

    nonce: str
    ordinal: int
    step: int
    missing: list[int]
    instead: str | None = None
    again: bool = False


class Retire(msgspec.Struct, tag="retire", frozen=True):
    """Checkpoints leave the live set. For `undo_seconds` of the store's own clock they can be brought back."""

    ids: list[str]
    reason: str = ""
    undo_seconds: float = 0.0


class Thin(msgspec.Struct, tag="thin", frozen=True):
    """Checkpoints keep their weights, and lose their optimizer state."""

    ids: list[str]
    reason: str = ""
    undo_seconds: float = 0.0


class Restore(msgspec.Struct, tag="restore", frozen=True):
    """Takes `retire` and `thin` of checkpoints back."""

    ids: list[str]


class Rewind(msgspec.Struct, tag="rewind", frozen=True):
    """The run goes on from this checkpoint; what came after it stays, as a line of its own."""

    id: str


class Start(msgspec.Struct, tag="start", frozen=True):
    """The run began with the state of another run's checkpoint, or with part of it."""

    run: str
    id: str
    step: int
    only: list[str]


class Tag(msgspec.Struct, tag="tag", frozen=True):
    """`id` None takes the tag away."""

    name: str
    id: str | None


class Metrics(msgspec.Struct, tag="metrics", frozen=True):
    """Metrics of a checkpoint that came after its save."""

    id: str
    metrics: dict[str, Any]


class Series(msgspec.Struct, tag="series", frozen=True):
    """Metrics of steps: columns of equal length; None where a step had no such metric."""

    steps: list[int]
    columns: dict[str, list[Any]]


class Config(msgspec.Struct, tag="config", frozen=True):
    """Keys that the run's configuration gained or changed."""

    changes: dict[str, Any]


class Attach(msgspec.Struct, tag="attach", frozen=True):
    name: str
    where: list[Where]
    nbytes: int


class Note(msgspec.Struct, tag="note", frozen=True):
    text: str
    id: str | None = None


class Copy(msgspec.Struct, tag="copy", frozen=True):
    """A checkpoint was committed before, in a run of another repository: when, and by whom. `after` is the nearest one
    before it that is here, where its parent is not."""

    id: str
    repository: str
    run: str
    time: float
    author: str
    after: str | None = None


class Moved(NamedTuple):
    """Where a checkpoint lies now, and what it needs there: in place of `root`, `packs`, `optimizer` of its commit."""

    id: str
    root: Where
    packs: list[PackRange]
    optimizer: list[PackRange]


class Rewrite(msgspec.Struct, tag="rewrite", frozen=True):
    """Checkpoints lie elsewhere now. What they hold, and its hash, is the same."""

    moved: list[Moved]


class Gc(msgspec.Struct, tag="gc", frozen=True):
    condemned: list[PackRange]


class Unknown(NamedTuple):
    """An event of a newer everystep: readers skip it, writers and collectors refuse."""

    type: str


_EVENTS: tuple[type[Any], ...] = (
    Open, Close, Commit, Abandon, Retire, Thin, Restore, Rewind, Start, Tag, Metrics, Series, Config, Attach, Note,
    Copy, Rewrite, Gc,
)  # fmt: skip
_BY_TAG = {kind.__struct_config__.tag: kind for kind in _EVENTS}


class _Body(msgspec.Struct, frozen=True):
    v: int
    seq: int
    prev: str
    term: int
    nonce: str
    time: float
    author: str
    events: list[msgspec.Raw]


class _Kind(msgspec.Struct):
    type: str


class Record(NamedTuple):
    """`prev` is the BLAKE3 of the previous record's first line; `own` that of this one's."""

    seq: int
    prev: str
    term: int
    nonce: str
    time: float
    author: str
    events: list[Any]
    own: str


def pack_record(seq: int, prev: str, term: int, nonce: str, time: float, author: str, events: list[Any]) -> bytes:
    """
    Raises:
        UsageError: for an event that no record can hold.
    """
    try:
        raw = [msgspec.Raw(msgspec.json.encode(event)) for event in events]
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise UsageError(f"this cannot be written into a record: {error}", do="give plain values") from error
    return pack_lines(_Body(FORMAT, seq, prev, term, nonce, time, author, raw))


def unpack_record(data: bytes | memoryview, seq: int, where: str) -> Record:
    """
    Raises:
        Damaged: if the bytes are not a whole record for this slot.
        NewerFormat: if a later everystep wrote it.
    """
    body = unpack_lines(data, _Body, where)
    if body.v > FORMAT:
        raise NewerFormat(
            f"a record of format {body.v}; this everystep reads up to {FORMAT}",
            where=where,
            do="update everystep: pip install -U everystep",
        )
    if body.seq != seq:
        raise Damaged(f"record {body.seq} lies in slot {seq}", where=where, do="run fsck: two files were swapped")
    events = [_event(raw, where) for raw in body.events]
    return Record(seq, body.prev, body.term, body.nonce, body.time, body.author, events, digest(data))


def _event(raw: msgspec.Raw, where: str) -> Any:
    kind = _BY_TAG.get(parse_json(memoryview(raw), _Kind, where).type)
    if kind is None:
        return Unknown(parse_json(memoryview(raw), _Kind, where).type)
    return parse_json(memoryview(raw), kind, where)
