"""Several files of one step: the same content again, or different ones, of which nobody here can say which counts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from everystep import adapters
from everystep.errors import Error
from everystep.exchange.found import CONFLICT, DAMAGED, DELTA, SAME, STATE, Found, Imported, Piece, Skipped
from everystep.exchange.meanings import COPIES
from everystep.exchange.names import parse, stem_of
from everystep.exchange.take import contents
from everystep.schema import Tree, flatten
from everystep.seam import Seam


def settle(found: Sequence[Found], seam: Seam) -> tuple[list[Found], list[Skipped]]:
    """One file a step, the first of each. Where there are several they are read whole, two at a time."""
    groups: dict[int, list[Found]] = defaultdict(list)
    for one in found:
        groups[one.step].append(one)
    kept: list[Found] = []
    skipped: list[Skipped] = []
    for step in sorted(groups):
        states = [one for one in groups[step] if one.role == STATE]
        first, left = _one(states or groups[step], seam)
        skipped += left
        kept += [first] if first is not None else []
        for delta in groups[step] if states else ():
            if delta.role == DELTA:
                skipped += _skip(delta, f"the weights of step {step} are there themselves: {states[0].path}", SAME)
    return kept, skipped


def _one(group: list[Found], seam: Seam) -> tuple[Found | None, list[Skipped]]:
    if len(group) == 1:
        return group[0], []
    first: tuple[Found, Imported] | None = None
    different: list[Found] = []
    skipped: list[Skipped] = []
    for one in group:
        try:
            state = contents(one, seam)
        except Error as error:
            skipped += _skip(one, error.what, DAMAGED)
            continue
        if first is None:
            first = one, state
        elif _same(first[1], state):
            skipped += _skip(one, f"the same content as {first[0].path}", SAME)
        elif _is_copy(one) and _same_arrays(first[1], state):
            skipped += _skip(one, f"a copy with the same arrays as {first[0].path}, other values in it differ", SAME)
        else:
            different.append(one)
        del state
    if first is None or not different:
        return first[0] if first else None, skipped
    if first[0].role == DELTA:
        why = f"{len(different) + 1} deltas of step {first[0].step} that differ: leave one of them in this folder"
        return None, [*skipped, *(left for one in (first[0], *different) for left in _skip(one, why, CONFLICT))]
    why = f"another content for step {first[0].step}, which {first[0].path} has: import it into a run of its own"
    return first[0], [*skipped, *(left for one in different for left in _skip(one, why, CONFLICT))]


def _skip(found: Found, why: str, kind: str) -> list[Skipped]:
    return [Skipped(piece.path, why, kind) for piece in found.pieces or (Piece("", found.path),)]


def _same(first: Imported, second: Imported) -> bool:
    """Whether two states agree in structure and every bit, and in what of them was not understood."""
    one, other = flatten(first.state, adapters.describe), flatten(second.state, adapters.describe)
    alike = (one.nodes, one.values, first.not_understood) == (other.nodes, other.values, second.not_understood)
    return alike and _same_leaves(one, other)


def _is_copy(found: Found) -> bool:
    return any(word in COPIES for word in parse(stem_of(found.path.rpartition("/")[2])).words)


def _same_arrays(first: Imported, second: Imported) -> bool:
    one, other = flatten(first.state, adapters.describe), flatten(second.state, adapters.describe)
    return bool(one.leaves) and _same_leaves(one, other)


def _same_leaves(one: Tree, other: Tree) -> bool:
    return one.leaves == other.leaves and all(
        np.array_equal(_bytes(a), _bytes(b)) for a, b in zip(one.payloads, other.payloads)
    )


def _bytes(payload: Any) -> Any:
    data = adapters.view(payload)
    if data is None:
        data = np.empty(payload.payload.nbytes, np.uint8)
        adapters.copy(payload, data)
    return data
