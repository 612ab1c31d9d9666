"""Files that are pieces of one checkpoint, put together: shards, an optimizer beside its model, two networks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import replace

from everystep.exchange.candidate import Candidate
from everystep.exchange.facts import Facts
from everystep.exchange.found import UNPLACED, Piece, Skipped

_Answer = tuple[list[Candidate], list[Skipped]]


def join(candidates: list[Candidate]) -> _Answer:
    """Pieces become one candidate each; what is a part of something that is not there is skipped."""
    joined: list[Candidate] = []
    skipped: list[Skipped] = []
    for step in (_without_ranks, _shards, _pieces):
        groups: dict[Hashable, list[Candidate]] = defaultdict(list)
        for candidate in candidates:
            groups[_key(candidate)].append(candidate)
        joined = []
        for group in groups.values():
            kept, left = step(group)
            joined += kept
            skipped += left
        candidates = joined
    return joined, skipped


def _key(candidate: Candidate) -> Hashable:
    """Equal for what lies in one folder under the same numbers."""
    named = candidate.named
    return candidate.folder, named.step, named.epoch, named.initial, candidate.is_delta


def _without_ranks(group: list[Candidate]) -> _Answer:
    ranks = {candidate.named.rank for candidate in group if candidate.named.rank}
    if len(ranks) < 2:
        return group, []
    why = (
        f"a part that one of {len(ranks)} ranks saved: gather a whole state_dict where it was trained, and import that"
    )
    split = [candidate for candidate in group if candidate.named.rank]
    return [c for c in group if not c.named.rank], [left for c in split for left in c.skip(why, UNPLACED)]


def _shards(group: list[Candidate]) -> _Answer:
    kept = [candidate for candidate in group if candidate.named.shard is None]
    skipped: list[Skipped] = []
    sets: dict[Hashable, list[Candidate]] = defaultdict(list)
    for candidate in group:
        if candidate.named.shard is not None:
            sets[candidate.named.label, candidate.named.shard[1], _ending(candidate.path)].append(candidate)
    for (*_, count, _), parts in ((key, value) for key, value in sets.items() if isinstance(key, tuple)):
        parts.sort(key=lambda candidate: candidate.named.shard or (0, 0))
        there = [part.named.shard[0] for part in parts if part.named.shard]
        if there == list(range(1, count + 1)) or there == list(range(count)):
            kept.append(_one(parts, [Piece(part.named.piece, part.path, n) for n, part in enumerate(parts, 1)]))
            continue
        why = f"a shard of {count}, of which {len(set(there))} are here: put all of them into this folder"
        skipped += [left for part in parts for left in part.skip(why, UNPLACED)]
    return kept, skipped


def _ending(path: str) -> str:
    return path.rpartition(".")[2]


def _pieces(group: list[Candidate]) -> _Answer:
    """One whole file at most, and pieces of different names."""
    pieces = [candidate for candidate in group if candidate.named.piece]
    whole = sorted(
        (candidate for candidate in group if not candidate.named.piece), key=lambda candidate: candidate.path
    )
    names = [candidate.named.piece for candidate in pieces]
    if not pieces or len(group) < 2 or len(set(names)) < len(names) or pieces[0].is_delta:
        return group, []
    files = [Piece("", piece.path, piece.shard) for candidate in whole[:1] for piece in candidate.pieces]
    files += [
        Piece(candidate.named.piece, piece.path, piece.shard) for candidate in pieces for piece in candidate.pieces
    ]
    return [_one([*whole[:1], *pieces], files), *whole[1:]], []


def _one(parts: list[Candidate], pieces: list[Piece]) -> Candidate:
    """The first part, with what the others know beside it."""
    facts = [part.facts for part in parts]
    step = next((found for found in facts if found.step is not None), Facts())
    keys = tuple(key for found in facts for key in found.keys)
    merged = Facts(
        step.step, step.step_key, step.total, next((f.epoch for f in facts if f.epoch is not None), None),
        {name: value for found in reversed(facts) for name, value in found.metrics.items()}, facts[0].delta, keys,
    )  # fmt: skip
    return replace(parts[0], facts=merged, nbytes=sum(part.nbytes for part in parts), pieces=tuple(pieces))
