"""Symbols of residuals and their codes, as the kernel has them: lengths from counts, tables from lengths, the header.

A residual r is `top << low | low bits`: `low` is its bit length less 2 (at least 0), so that `top` is 0 or 1 for these
two numbers and else 2 or 3. Its symbol is `2 * low + top`; the low bits are stored as they are. Codes are Huffman's,
cut to 8 bits; symbols rarer than 1 in 256 are escaped.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from everystep.codecs.delta import UNGROUPED, Form
from everystep.codecs.planes import WORDS
from everystep.errors import Damaged

Array = np.ndarray[Any, Any]
SYMBOLS = 128
ESCAPE = SYMBOLS  # its place behind the symbols
CODE_BITS = 8
KEYS = 256
GAP_WIDTH = 4  # of the numbers of words that stand still, in the sparse form
_HEAD = struct.Struct("<BBBH")  # width, 1 if sign and magnitude + 2 if sparse, shift, keys with a context of their own
_SPARSE = 2


@dataclass(frozen=True)
class Codes:
    """The contexts of a chunk: 0 takes all keys that have none of their own.

    Of the sparse form each has two codes, of gaps and of residuals: those of context c stand at 2 c and 2 c + 1.
    """

    form: Form
    of_key: Array
    """The context of each key, shape (256,)."""
    lengths: Array
    """Of each code's symbols, and last of the escape: shape (codes, 129), 0 where it is escaped."""


def build(counts: Array) -> Array:
    """Lengths, shape (129,), of the codes for symbols that were counted, shape (128,)."""
    total = int(counts.sum())
    kept = [(int(n), s) for s, n in enumerate(counts) if n and int(n) << CODE_BITS >= total][: (1 << CODE_BITS) - 1]
    rare = total - sum(n for n, _ in kept)
    kept = [*(kept or [(1, 0)]), (rare or 1, ESCAPE)]
    kept.sort(key=lambda pair: pair[0])
    lengths = np.zeros(SYMBOLS + 1, np.uint8)
    for (_, symbol), length in zip(kept, _limited(_huffman([n for n, _ in kept]))):
        lengths[symbol] = length
    return lengths


def _huffman(counts: list[int]) -> list[int]:
    """Code lengths for ascending counts, by two queues."""
    n = len(counts)
    weights, parents = list(counts), [0] * (2 * n - 1)
    leaf, node = 0, n
    for made in range(n, 2 * n - 1):
        weights.append(0)
        for _ in range(2):
            if leaf < n and (node == made or weights[leaf] <= weights[node]):
                least, leaf = leaf, leaf + 1
            else:
                least, node = node, node + 1
            weights[made] += weights[least]
            parents[least] = made
    depths = [0] * (2 * n - 1)
    for i in range(2 * n - 3, -1, -1):
        depths[i] = depths[parents[i]] + 1
    return depths[:n]


def _limited(lengths: list[int]) -> list[int]:
    """Cut to 8 bits, and complete again: one symbol of the longest other length goes a bit deeper."""
    numbers = [0] * (CODE_BITS + 1)
    for length in lengths:
        numbers[min(length, CODE_BITS)] += 1
    total = sum(number << (CODE_BITS - i) for i, number in enumerate(numbers) if i)
    while total > 1 << CODE_BITS:
        i = max(j for j in range(1, CODE_BITS) if numbers[j])
        numbers[CODE_BITS] -= 1
        numbers[i] -= 1
        numbers[i + 1] += 2
        total -= 1
    return [length for length in range(CODE_BITS, 0, -1) for _ in range(numbers[length])]


def assign(lengths: Array) -> Array:
    """The code of each symbol, least significant bit first: canonical, by length and then by symbol.

    Raises:
        Damaged: if the lengths are not those of a complete code.
    """
    codes, number = np.zeros(SYMBOLS + 1, np.uint64), 0
    for length in range(1, CODE_BITS + 1):
        for symbol in np.flatnonzero(lengths == length):
            codes[symbol] = int(f"{number:0{length}b}"[::-1], 2)
            number += 1
            if number > 1 << length:
                raise Damaged("codes that are not complete")
        number <<= 1
    if number != 2 << CODE_BITS:
        raise Damaged("codes that are not complete")
    return codes


def decoder(lengths: Array) -> Array:
    """The symbol, or the escape, for each of the 256 next eight bits."""
    table, codes = np.zeros(1 << CODE_BITS, np.uint8), assign(lengths)
    for symbol in np.flatnonzero(lengths):
        table[int(codes[symbol]) :: 1 << int(lengths[symbol])] = symbol
    return table


# the header --------------------------------------------------------------------------------------------------------


def write(codes: Codes, *, sparse: bool) -> bytes:
    each = 2 if sparse else 1
    keys = np.flatnonzero(codes.of_key).tolist()
    flags = codes.form.signed_magnitude | (_SPARSE if sparse else 0)
    out = [_HEAD.pack(codes.form.width, flags, codes.form.shift, len(keys))]
    for number, lengths in enumerate(codes.lengths.tolist()):
        if number >= each and number % each == 0:
            out.append(bytes([keys[number // each - 1]]))
        used = [s for s in range(SYMBOLS) if lengths[s]]
        first, count = used[0], used[-1] - used[0] + 1
        halves = [lengths[ESCAPE], *lengths[first : first + count], 0]
        out.append(bytes([first, count, *(low | high << 4 for low, high in zip(halves[0::2], halves[1::2]))]))
    return b"".join(out)


def read(stored: memoryview, *, sparse: bool) -> tuple[Codes, int]:
    """The codes, and where the header ends.

    Raises:
        Damaged: if it is none.
    """
    each, at = 2 if sparse else 1, _HEAD.size
    try:
        width, flags, shift, keyed = _HEAD.unpack_from(stored)
        known = width in WORDS and flags >> 1 == int(sparse) and (shift < 8 * width or shift == UNGROUPED)
        if not known or keyed > KEYS:
            raise Damaged("a header that makes no sense")
        of_key, lengths, last = np.zeros(KEYS, np.int64), np.zeros((each * (keyed + 1), SYMBOLS + 1), np.uint8), -1
        for number in range(len(lengths)):
            if number >= each and number % each == 0:
                if stored[at] <= last:
                    raise Damaged("keys out of order")
                last = stored[at]
                of_key[last] = number // each
                at += 1
            at += _read_code(stored[at:], lengths[number], GAP_WIDTH if sparse and number % 2 == 0 else width)
    except (struct.error, IndexError) as error:
        raise Damaged("a chunk that ends within its header") from error
    return Codes(Form(width, bool(flags & 1), shift), of_key, lengths), at


def _read_code(stored: memoryview, lengths: Array, width: int) -> int:
    """Fills in the lengths; how many bytes they take."""
    first, count = stored[0], stored[1]
    if first + count > symbols_of(width):
        raise Damaged("symbols that do not exist")
    size = 2 + (count + 2) // 2
    if len(stored) < size:
        raise Damaged("a chunk that ends within its header")
    pairs = np.frombuffer(stored[2:size], np.uint8)
    halves = np.stack([pairs & 15, pairs >> 4], 1).reshape(-1)[: 1 + count]
    if halves.max() > CODE_BITS:
        raise Damaged("codes that are too long")
    lengths[ESCAPE] = halves[0]
    lengths[first : first + count] = halves[1:]
    return size


# symbols -----------------------------------------------------------------------------------------------------------


def symbols_of(width: int) -> int:
    """How many symbols words of so many bytes have."""
    return 16 * width


def low_of(symbols: Array) -> Array:
    """How many low bits follow each symbol."""
    return np.maximum((symbols >> 1).astype(np.int64) - 1, 0)


def symbol_of(residuals: Array) -> tuple[Array, Array]:
    """(symbol, number of low bits) of each, uint64."""
    low = np.maximum(_bit_length(residuals) - 2, 0)
    return 2 * low + (residuals >> low.astype(np.uint64)).astype(np.int64), low


def _bit_length(words: Array) -> Array:
    high = np.frexp((words >> np.uint64(32)).astype(np.float64))[1].astype(np.int64)
    below = np.frexp((words & np.uint64(0xFFFFFFFF)).astype(np.float64))[1].astype(np.int64)
    return np.where(high > 0, high + 32, below)
