"""CRC32C, as TensorFlow's files have it, in NumPy: whole rows of words are folded onto each other."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
_POLYNOMIAL = 0x82F63B78
_MASK_DELTA = 0xA282EAD8
_ONES = 0xFFFFFFFF
_ROWS = (1 << 14, 1 << 7)
"""Words in a row: first so many that NumPy's calls cost nothing and that stay in the cache, then few."""


def crc32c(data: Any, before: int = 0) -> int:
    """The checksum of bytes, or of all bytes where `before` is that of those in front."""
    raw = data if isinstance(data, np.ndarray) else np.frombuffer(memoryview(data).cast("B"), np.uint8)
    register, tail = before ^ _ONES, len(raw) % 4
    words = raw[: len(raw) - tail].view("<u4")
    for size in _ROWS:
        if len(words) >= 4 * size:
            words, register = _folded(words, register, size), 0
    register = _one_by_one(words.tobytes(), register)
    return _one_by_one(raw[len(raw) - tail :].tobytes(), register) ^ _ONES


def mask(crc: int) -> int:
    """What stands in files in place of a checksum."""
    return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & _ONES


def _one_by_one(data: bytes, register: int) -> int:
    table = _bytes_table()
    for byte in data:
        register = table[(register ^ byte) & 0xFF] ^ (register >> 8)
    return register


def _folded(words: Array, register: int, size: int) -> Array:
    """One row with the checksum of all. A checksum is linear: the words before a row may be multiplied by as many zeros
    as the row is long, and added to it."""
    low, high = _tables(size)
    state, index, one, other = (np.zeros(size, np.int64) for _ in range(4))
    first = len(words) % size
    if first:  # with zeros in front, which change nothing
        state[size - first :] = words[:first]
        state[size - first] ^= register
    for row in words[first:].reshape(-1, size):
        np.bitwise_and(state, 0xFFFF, out=index)
        np.take(low, index, out=one, mode="clip")
        np.right_shift(state, 16, out=index)
        np.take(high, index, out=other, mode="clip")
        np.bitwise_xor(one, other, out=one)
        np.bitwise_xor(one, row, out=state)
        if not first:
            state[0] ^= register
            first = size
    return state.astype("<u4")


def _times(row: Array, columns: Array) -> Array:
    """Each word times a matrix of bits, given by its columns."""
    made = np.zeros(len(row), np.uint32)
    for bit in range(32):
        made ^= (row >> np.uint32(bit) & np.uint32(1)) * columns[bit]
    return made


@cache
def _zeros(power: int) -> Array:
    """The matrix that 2**power words of zeros apply to the register."""
    if power:
        half = _zeros(power - 1)
        return _times(half, half)
    table = _bytes_table()
    columns = [1 << bit for bit in range(32)]
    for _ in range(4):
        columns = [table[word & 0xFF] ^ (word >> 8) for word in columns]
    return np.array(columns, np.uint32)


@cache
def _tables(size: int) -> tuple[Array, Array]:
    """What so many words of zeros make of the lower and of the upper half of a word."""
    columns, halves = _zeros(size.bit_length() - 1), np.arange(1 << 16, dtype=np.uint32)
    low, high = (_times(halves << np.uint32(shift), columns).astype(np.int64) for shift in (0, 16))
    return low, high


@cache
def _bytes_table() -> list[int]:
    table = []
    for word in range(256):
        for _ in range(8):
            word = (word >> 1) ^ (_POLYNOMIAL if word & 1 else 0)
        table.append(word)
    return table
