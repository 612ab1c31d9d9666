"""The packed and the sparse form in NumPy: the same bytes as the kernel's, and the same words from them, slower.

A chunk's blocks are decoded side by side, each step for all of them at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from everystep.codecs import codes, delta, planes
from everystep.codecs.codes import ESCAPE, GAP_WIDTH, KEYS, SYMBOLS, Codes
from everystep.codecs.delta import Form
from everystep.codecs.planes import WORDS
from everystep.errors import Damaged

Array = np.ndarray[Any, Any]
BLOCK = 1024  # words of one stream
CHANGES = BLOCK // 2  # changed words of one stream in the sparse form
_SAMPLE_MIN = 1 << 13  # so many words are all looked at; of more the first of each block,
_SAMPLE_SHARE = 64  # so that one in so many is seen, and never less than that
_CONTEXT_MIN = 64  # keys seen less often share a context
_U64 = np.uint64


def plan(data: Array, base: Array, form: Form) -> tuple[bytes, float, float, float]:
    """(header, bytes as residuals, bytes as planes of their own, share of words that differ), by a sample."""
    words = WORDS[form.width]
    count = data.nbytes // form.width
    new, old = (_sample(each.view(words)) for each in (data, base))
    residuals = delta.residual(new, old, form).astype(_U64)
    found, bits = _contexts(codes.symbol_of(residuals)[0], _keys(old, form), form)
    half = _sample(data.view(words), every=2)  # for what stands alone every other word says enough
    turned = planes.turned(half, (form.width, form.signed_magnitude))
    alone = sum(_entropy_bits(np.bincount(row, minlength=256)) for row in planes.split(turned))
    scale = count / new.size / 8 if new.size else 0.0
    header = codes.write(found, sparse=False)
    packed = bits * scale + len(header) + 2 * -(-count // BLOCK)
    changed = float((residuals > 0).mean()) if new.size else 0.0
    return header, packed, alone * count / max(half.size, 1) / 8, changed


def pack(header: bytes, data: Array, base: Array) -> bytes:
    """Header, the length of each block in bytes, and the blocks."""
    found, _ = codes.read(memoryview(header), sparse=False)
    words = delta.residual(data, base, found.form).astype(_U64)
    contexts = found.of_key[_keys(base, found.form)]
    body, sizes = _streams(found, [(words, contexts)], BLOCK)
    return header + sizes.astype("<u2").tobytes() + body


def unpack(stored: memoryview, base: Array, out: Array) -> None:
    """The inverse, into `out`, which may be `base`.

    Raises:
        Damaged: if the stored bytes cannot be what `pack` made.
    """
    found, at = codes.read(stored, sparse=False)
    form = found.form
    if out.nbytes % form.width:
        raise Damaged("words of another width")
    count = out.nbytes // form.width
    blocks = -(-count // BLOCK)
    streams = _Streams(found, stored[at + 2 * blocks :], _table(stored[at:], blocks, "<u2"))
    contexts = np.zeros(blocks * BLOCK, np.int64)
    contexts[:count] = found.of_key[_keys(base, form)]
    columns = np.ascontiguousarray(contexts.reshape(blocks, BLOCK).T)
    words = np.zeros((BLOCK, blocks), _U64)
    for step in range(min(BLOCK, count)):
        lanes = blocks - (step >= count - (blocks - 1) * BLOCK)
        words[step, :lanes] = streams.next(columns[step, :lanes], form.width, lanes)
    streams.check()
    residuals = words.T.reshape(-1)[:count].astype(WORDS[form.width])
    out[:] = delta.apply(delta.pieces(residuals), base, form).view(np.uint8)


def pack_sparse(data: Array, base: Array, form: Form, most: int) -> bytes | None:
    """Header, the number of changes in each context, the length of each block of them in bytes, and the blocks.

    Changes stand in the order of their contexts, each with the number of words of its context that stand still before.
    """
    words = WORDS[form.width]
    changed = np.flatnonzero(data.view(words) != base.view(words))
    if changed.size > most:
        return None
    keys = _keys(base, form)
    counts = np.bincount(keys[changed], minlength=KEYS)
    of_key = _numbered(counts >= _CONTEXT_MIN if form.grouped else np.zeros(KEYS, bool))
    order = np.argsort(of_key[keys[changed]], kind="stable")
    changed = changed[order]
    contexts = of_key[keys[changed]]
    residuals = delta.residual(data.view(words)[changed], base.view(words)[changed], form).astype(_U64)
    firsts = np.flatnonzero(np.diff(contexts, prepend=-1))
    ranks = _ranks(of_key[keys])[changed]
    gaps = np.diff(ranks, prepend=-1) - 1
    gaps[firsts] = ranks[firsts]
    gaps = gaps.astype(_U64)
    sizes = np.bincount(contexts, minlength=of_key.max() + 1)
    built, start = [], 0
    for size in sizes.tolist():
        for values in (gaps, residuals):
            symbols = codes.symbol_of(values[start : start + size])[0]
            built.append(codes.build(np.bincount(symbols, minlength=SYMBOLS)))
        start += size
    found = Codes(form, of_key, np.array(built))
    body, lengths = _streams(found, [(gaps, 2 * contexts), (residuals, 2 * contexts + 1)], CHANGES)
    head = codes.write(found, sparse=True)
    return b"".join([head, sizes.astype("<u4").tobytes(), lengths.astype("<u2").tobytes(), body])


def unpack_sparse(stored: memoryview, base: Array, out: Array) -> None:
    """The inverse, into `out`, which may be `base`.

    Raises:
        Damaged: if the stored bytes cannot be what `pack_sparse` made.
    """
    found, at = codes.read(stored, sparse=True)
    form = found.form
    if out.nbytes % form.width:
        raise Damaged("words of another width")
    count, number = out.nbytes // form.width, len(found.lengths) // 2
    sizes = _table(stored[at:], number, "<u4")
    changed = int(sizes.sum())
    if changed > count:
        raise Damaged("more changes than words")
    blocks, at = -(-changed // CHANGES), at + 4 * number
    streams = _Streams(found, stored[at + 2 * blocks :], _table(stored[at:], blocks, "<u2"))
    contexts = np.zeros(blocks * CHANGES, np.int64)
    contexts[:changed] = np.repeat(np.arange(number), sizes)
    columns = np.ascontiguousarray(contexts.reshape(blocks, CHANGES).T)
    steps = np.zeros((2, CHANGES, blocks), _U64)
    for step in range(min(CHANGES, changed)):
        lanes = blocks - (step >= changed - (blocks - 1) * CHANGES)
        for part, width in ((0, GAP_WIDTH), (1, form.width)):
            steps[part, step, :lanes] = streams.next(2 * columns[step, :lanes] + part, width, lanes)
    streams.check()
    gaps, residuals = (each.T.reshape(-1)[:changed] for each in steps)
    where = _places(gaps, sizes, found.of_key[_keys(base, form)])
    old = base.view(WORDS[form.width])
    new = delta.apply(delta.pieces(residuals.astype(old.dtype)), old[where].view(np.uint8), form)
    if out is not base:
        out[:] = base
    out.view(old.dtype)[where] = new.view(old.dtype)


def _ranks(contexts: Array) -> Array:
    """How many words of its own context stand before each."""
    order = np.argsort(contexts, kind="stable")
    sizes = np.bincount(contexts)
    ranks = np.empty(contexts.size, np.int64)
    ranks[order] = np.arange(contexts.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return ranks


def _places(gaps: Array, sizes: Array, contexts: Array) -> Array:
    """Where the words are whose turn it is, in the order of their contexts."""
    order = np.argsort(contexts, kind="stable")
    room = np.bincount(contexts, minlength=sizes.size)
    starts, places, at = np.cumsum(room) - room, [], 0
    for context, size in enumerate(sizes.tolist()):
        # A gap of four bytes at most, and less than 2 ** 32 of them: no sum overflows.
        ranks = np.cumsum(gaps[at : at + size].astype(np.int64) + 1) - 1
        if size and ranks[-1] >= room[context]:
            raise Damaged("a change behind the end")
        places.append(order[starts[context] + ranks])
        at += size
    return np.concatenate(places)


def _table(stored: memoryview, count: int, dtype: str) -> Array:
    nbytes = count * np.dtype(dtype).itemsize
    if len(stored) < nbytes:
        raise Damaged("a chunk that ends early")
    return np.frombuffer(stored[:nbytes], dtype).astype(np.int64)


# contexts ----------------------------------------------------------------------------------------------------------


def _sample(words: Array, every: int = 1) -> Array:
    seen = max(words.size // _SAMPLE_SHARE, _SAMPLE_MIN)
    if words.size <= seen:
        return words[::every]
    step, end = -(-seen // -(-words.size // BLOCK)), words.size - words.size % BLOCK
    whole = words[:end].reshape(-1, BLOCK)[:, :step:every].reshape(-1)
    return np.concatenate([whole, words[end:][:step:every]])


def _keys(base: Array, form: Form) -> Array:
    if not form.grouped:
        return np.zeros(base.nbytes // form.width, np.uint8)
    return delta.exponents(base, form)


def _contexts(symbols: Array, keys: Array, form: Form) -> tuple[Codes, float]:
    """The codes of all contexts, and the bits that the symbols take in them."""
    counts = np.bincount(keys.astype(np.int64) * SYMBOLS + symbols, minlength=KEYS * SYMBOLS).reshape(KEYS, SYMBOLS)
    own = counts.sum(1) >= _CONTEXT_MIN if form.grouped else np.zeros(KEYS, bool)
    groups = [counts[~own].sum(0), *counts[own]]
    built = [codes.build(group) for group in groups]
    bits = 0.0
    for group, lengths in zip(groups, built):
        each = np.where(lengths[:SYMBOLS] > 0, lengths[:SYMBOLS], int(lengths[ESCAPE]) + 7).astype(np.int64)
        bits += float((group * (each + codes.low_of(np.arange(SYMBOLS)))).sum())
    return Codes(form, _numbered(own), np.array(built)), bits


def _numbered(own: Array) -> Array:
    """The context of each key: 0 for those without one of their own."""
    return np.where(own, np.cumsum(own), 0)


def _entropy_bits(counts: Array) -> float:
    seen = counts[counts > 0].astype(np.float64)
    total = seen.sum()
    return min(float((seen * np.log2(total / seen)).sum()), 8 * float(total))


# streams of bits, least significant first --------------------------------------------------------------------------


def _streams(found: Codes, items: list[tuple[Array, Array]], size: int) -> tuple[bytes, Array]:
    """Blocks of `size` words, and the length of each.

    Args:
        items: what is stored of each word one after the other: values, and the numbers of their codes.
    """
    table = np.array([codes.assign(lengths) for lengths in found.lengths])
    count = len(items[0][0])
    values, widths = np.zeros((count, 2 * len(items)), _U64), np.zeros((count, 2 * len(items)), np.int64)
    for i, (item, contexts) in enumerate(items):
        symbols, low = codes.symbol_of(item)
        length = found.lengths[contexts, symbols].astype(np.int64)
        escaped = length == 0
        escape, behind = table[contexts, ESCAPE], found.lengths[contexts, ESCAPE].astype(np.int64)
        values[:, 2 * i] = np.where(
            escaped, escape | symbols.astype(_U64) << behind.astype(_U64), table[contexts, symbols]
        )
        widths[:, 2 * i] = np.where(escaped, behind + 7, length)
        values[:, 2 * i + 1] = item & ((_U64(1) << low.astype(_U64)) - _U64(1))
        widths[:, 2 * i + 1] = low
    ends = np.cumsum(widths.sum(1))
    firsts = np.arange(0, count, size)
    before = ends[firsts] - widths[firsts].sum(1) if count else np.zeros(0, np.int64)
    sizes = (np.append(before[1:], ends[-1:]) - before + 7) // 8
    shift = 8 * (np.cumsum(sizes) - sizes) - before
    flat = widths.reshape(-1)
    at = np.cumsum(flat) - flat + np.repeat(np.repeat(shift, size)[:count], widths.shape[1])
    return _scattered(values.reshape(-1), at, int(sizes.sum())), sizes


def _scattered(values: Array, at: Array, nbytes: int) -> bytes:
    """The bits of each value from bit `at` on; no two overlap, so that adding them up is the same as or."""
    words = -(-nbytes // 4) + 3
    shift, index = (at & 31).astype(_U64), at >> 5
    out = np.zeros(words)
    mask = _U64(0xFFFFFFFF)
    pieces = (values << shift) & mask, (values >> (_U64(32) - shift)) & mask, (values >> _U64(32)) >> (_U64(32) - shift)
    for number, piece in enumerate(pieces):
        out += np.bincount(index + number, weights=piece.astype(np.float64), minlength=words)
    return out.astype(np.uint32).astype("<u4").tobytes()[:nbytes]


class _Streams:
    """Blocks that are read side by side, a value of each at a time."""

    def __init__(self, found: Codes, stored: memoryview, sizes: Array) -> None:
        if int(sizes.sum()) != len(stored):
            raise Damaged("a chunk of another length")
        self._starts, self._sizes = 8 * (np.cumsum(sizes) - sizes), sizes
        self._at = self._starts.copy()
        self._symbols = np.array([codes.decoder(lengths) for lengths in found.lengths])
        self._lengths = found.lengths.astype(np.int64)
        padded = np.zeros(len(stored) + 16, np.uint8)
        padded[: len(stored)] = np.frombuffer(stored, np.uint8)
        self._bytes: Array = np.ndarray((len(stored) + 9,), "<u8", padded, strides=(1,))
        self._limit = len(stored) + 8

    def next(self, contexts: Array, width: int, lanes: int) -> Array:
        """The next value of each of the first so many blocks, uint64."""
        at = self._at[:lanes]
        symbols = self._symbols[contexts, self._bits(at, 8)].astype(np.int64)
        at += self._lengths[contexts, symbols]
        escaped = np.flatnonzero(symbols == ESCAPE)
        if escaped.size:
            symbols[escaped] = self._bits(at[escaped], 7)
            at[escaped] += 7
            if (symbols[escaped] >= codes.symbols_of(width)).any():
                raise Damaged("a symbol that does not exist")
        low = codes.low_of(symbols)
        first = np.minimum(low, 32)
        values = self._bits(at, first) | self._bits(at + 32, low - first) << _U64(32)
        at += low
        made: Array = values | (symbols - 2 * low).astype(_U64) << low.astype(_U64)
        return made

    def _bits(self, at: Array, count: Any) -> Array:
        found = self._bytes[np.minimum(at >> 3, self._limit)] >> (at & 7).astype(_U64)
        cut: Array = found & ((_U64(1) << np.asarray(count).astype(_U64)) - _U64(1))
        return cut

    def check(self) -> None:
        """
        Raises:
            Damaged: if a block did not end where it should.
        """
        if ((self._at - self._starts + 7) // 8 != self._sizes).any():
            raise Damaged("a block of another length")
