"""One copy of the state into a reused buffer: after this, training may change what it likes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from everystep import adapters
from everystep.save.arena import PIECE_BYTES, Array, Copier
from everystep.save.frozen import FrozenLeaf
from everystep.schema import Box, Layout, Tree
from everystep.schema.layout import ALIGN, Region


@dataclass(frozen=True)
class Snapshot:
    """A state at one moment, owned by nobody else: the tables, how the leaves lie, and their bytes."""

    tree: Tree
    layout: Layout
    data: Array
    """The arena's buffer."""
    streams: Sequence[Array]
    frozen: Mapping[int, FrozenLeaf] = field(default_factory=dict)
    """By stream, the leaves that were not copied this time."""

    in_place = False

    def chunk(self, index: int) -> Array:
        chunk = self.layout.chunks[index]
        return self.streams[chunk.stream][chunk.start : chunk.start + chunk.nbytes]

    def hash_of(self, index: int) -> bytes | None:
        """A chunk's hash, where it is known from the save before."""
        chunk = self.layout.chunks[index]
        leaf = self.frozen.get(chunk.stream)
        return leaf.hashes.get(chunk.start) if leaf is not None else None

    def note_hash(self, index: int, hash: bytes) -> None:
        """For the saves to come."""
        chunk = self.layout.chunks[index]
        leaf = self.frozen.get(chunk.stream)
        if leaf is not None:
            leaf.hashes[chunk.start] = hash


def arena_bytes(layout: Layout, frozen: Container[int]) -> int:
    """What the state takes of an arena."""
    return sum(_aligned(stream.nbytes) for index, stream in enumerate(layout.streams) if index not in frozen)


def copy_state(tree: Tree, layout: Layout, data: Array, copier: Copier, frozen: Mapping[int, FrozenLeaf]) -> Snapshot:
    """Copies each leaf into a buffer of `arena_bytes`, in the order in which they are stored."""
    streams: list[Array] = []
    at = 0
    for index, stream in enumerate(layout.streams):
        if index in frozen:
            streams.append(frozen[index].data)
        else:
            streams.append(data[at : at + stream.nbytes])
            at += _aligned(stream.nbytes)
    large: list[tuple[Array, Array]] = []
    for region in layout.regions:
        if region.stream in frozen:
            continue
        target = streams[region.stream][region.start : region.start + region.nbytes]
        payload = _held(tree, region)
        source = adapters.view(payload)
        if source is None:
            adapters.copy(payload, target)
        elif region.nbytes < PIECE_BYTES:
            np.copyto(target, source)
        else:
            large.append((target, source))
    copier.copy(large)
    return Snapshot(tree, layout, data, streams, frozen)


def _held(tree: Tree, region: Region) -> Any:
    """The array that lies in a region: the leaf's, or of a leaf that is held in several boxes the one in this."""
    payload = tree.payloads[region.leaf]
    return payload if len(tree.leaves[region.leaf].boxes) < 2 else adapters.piece(payload, region.box)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


@dataclass(frozen=True)
class StateInPlace(Snapshot):
    """A state that is read where it lies, while training waits: for what not even one copy has room."""

    payloads: Mapping[tuple[int, Box], Any] = field(default_factory=dict)
    """By leaf and box."""
    regions: Mapping[int, Sequence[Region]] = field(default_factory=dict)
    """Of each stream, in their order."""

    in_place = True

    def chunk(self, index: int) -> Array:
        chunk = self.layout.chunks[index]
        regions, stop = self.regions[chunk.stream], chunk.start + chunk.nbytes
        at = bisect_right(regions, chunk.start, key=lambda region: region.start) - 1
        pieces = []
        while at < len(regions) and (region := regions[at]).start < stop:
            first, last = max(chunk.start - region.start, 0), min(stop - region.start, region.nbytes)
            if first < last:
                pieces.append(_bytes(self.payloads[region.leaf, region.box], region.nbytes, first, last))
            at += 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def leave_in_place(tree: Tree, layout: Layout) -> StateInPlace:
    regions: dict[int, list[Region]] = {}
    for region in layout.regions:
        regions.setdefault(region.stream, []).append(region)
    payloads = {(region.leaf, region.box): _held(tree, region) for region in layout.regions}
    return StateInPlace(tree, layout, np.empty(0, np.uint8), (), {}, payloads, regions)


def _bytes(payload: Any, nbytes: int, start: int, stop: int) -> Array:
    """A range of an array's bytes: a view, or a copy of no more than that where the array can be cut."""
    source = adapters.view(payload)
    if source is None:
        part = adapters.cut(payload, start, stop)
        source = np.empty(nbytes if part is None else stop - start, np.uint8)
        adapters.copy(payload if part is None else part, source)
        return source[start:stop] if part is None else source
    return source[start:stop]
