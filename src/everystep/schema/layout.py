"""How the boxes of a rank lie in streams, and streams in chunks: computed from the leaves alone, never stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import msgspec

from everystep.schema.box import Box
from everystep.schema.dtype import parse
from everystep.schema.tree import Leaf

ALIGN = 64


@dataclass(frozen=True)
class Stream:
    """Bytes of one (role, dtype): one large box, or all small boxes one behind the other."""

    role: str
    dtype: str
    nbytes: int
    offset: int
    """Where the stream begins in the arena."""
    itemsize: int


class Region(msgspec.Struct, frozen=True, gc=False):
    """Where one box of a leaf lies."""

    leaf: int
    box: Box
    stream: int
    start: int
    """First byte within the stream."""
    nbytes: int


class Chunk(msgspec.Struct, frozen=True, gc=False):
    """A contiguous range of a stream."""

    stream: int
    start: int
    nbytes: int


@dataclass(frozen=True)
class Layout:
    streams: tuple[Stream, ...]
    regions: tuple[Region, ...]
    chunks: tuple[Chunk, ...]
    nbytes: int
    """Size of the arena that holds all streams."""

    @cached_property
    def first_chunk(self) -> tuple[int, ...]:
        """Index of each stream's first chunk."""
        first = [0] * len(self.streams)
        for index in range(len(self.chunks) - 1, -1, -1):
            first[self.chunks[index].stream] = index
        return tuple(first)

    def chunks_of(self, region: Region) -> range:
        """Indices of the chunks that hold a region's bytes."""
        if region.nbytes == 0:
            return range(0)
        first = self.first_chunk[region.stream]
        unit = self.chunks[first].nbytes
        return range(first + region.start // unit, first + (region.start + region.nbytes - 1) // unit + 1)


def lay_out(leaves: Sequence[Leaf], chunk_bytes_max: int, small_leaf_bytes: int) -> Layout:
    """Boxes of `small_leaf_bytes` and more have a stream of their own; smaller ones share one per (role, dtype)."""
    shared: dict[tuple[str, str], int] = {}
    itemsizes: dict[str, int] = {}
    sizes: list[int] = []
    kinds: list[tuple[str, str, int]] = []
    regions: list[Region] = []
    for index, leaf in enumerate(leaves):
        if leaf.dtype not in itemsizes:
            itemsizes[leaf.dtype] = parse(leaf.dtype).itemsize
        itemsize = itemsizes[leaf.dtype]
        for box in leaf.boxes or (Box.whole(leaf.shape),):
            nbytes = box.size * itemsize
            key = (leaf.role, leaf.dtype)
            if nbytes >= small_leaf_bytes or key not in shared:
                stream = len(sizes)
                sizes.append(0)
                kinds.append((leaf.role, leaf.dtype, itemsize))
                if nbytes < small_leaf_bytes:
                    shared[key] = stream
            else:
                stream = shared[key]
            regions.append(Region(index, box, stream, sizes[stream], nbytes))
            sizes[stream] += nbytes
    return _cut(sizes, kinds, regions, chunk_bytes_max)


def _cut(sizes: list[int], kinds: list[tuple[str, str, int]], regions: list[Region], chunk_bytes_max: int) -> Layout:
    streams: list[Stream] = []
    chunks: list[Chunk] = []
    offset = 0
    for index, (nbytes, (role, dtype, itemsize)) in enumerate(zip(sizes, kinds)):
        streams.append(Stream(role, dtype, nbytes, offset, itemsize))
        unit = chunk_bytes_max - chunk_bytes_max % itemsize if 0 < itemsize <= chunk_bytes_max else chunk_bytes_max
        chunks.extend(Chunk(index, start, min(unit, nbytes - start)) for start in range(0, nbytes, unit))
        offset += -(-nbytes // ALIGN) * ALIGN
    return Layout(tuple(streams), tuple(regions), tuple(chunks), offset)
