"""Numbers, addresses and the checksum in HDF5's structures."""

from __future__ import annotations

NOWHERE = (1 << 64) - 1


class Malformed(ValueError):
    """What no library writes; the walk through the file says so, with its name."""


def number(data: memoryview, at: int, size: int) -> int:
    """A number of so many bytes, the lowest first.

    Raises:
        Malformed: if it is cut off.
    """
    if not 0 <= at <= at + size <= len(data):
        raise Malformed("a structure that is cut off")
    return int.from_bytes(data[at : at + size], "little")


def part(data: memoryview, at: int, size: int) -> memoryview:
    if not 0 <= at <= at + size <= len(data):
        raise Malformed("a structure that is cut off")
    return data[at : at + size]


def begins(data: memoryview, word: bytes) -> bool:
    return data[: len(word)].tobytes() == word


def lookup3(data: memoryview) -> int:
    """HDF5's checksum of its own structures."""
    a = b = c = (0xDEADBEEF + len(data)) & 0xFFFFFFFF
    at = 0
    while len(data) - at > 12:
        a, b, c = (a + number(data, at, 4), b + number(data, at + 4, 4), c + number(data, at + 8, 4))
        a, b, c = _mixed(a, b, c)
        at += 12
    rest = data[at:].tobytes().ljust(12, b"\0")
    if len(data):
        a, b, c = (n + int.from_bytes(rest[i : i + 4], "little") for n, i in ((a, 0), (b, 4), (c, 8)))
        for amount, which in ((14, 0), (11, 1), (25, 2), (16, 0), (4, 1), (14, 2), (24, 0)):
            if which == 0:
                c = ((c ^ b) - _turned(b, amount)) & 0xFFFFFFFF
            elif which == 1:
                a = ((a ^ c) - _turned(c, amount)) & 0xFFFFFFFF
            else:
                b = ((b ^ a) - _turned(a, amount)) & 0xFFFFFFFF
    return c & 0xFFFFFFFF


def _mixed(a: int, b: int, c: int) -> tuple[int, int, int]:
    for first, second, third in ((4, 6, 8), (16, 19, 4)):
        a = ((a - c) ^ _turned(c, first)) & 0xFFFFFFFF
        c = (c + b) & 0xFFFFFFFF
        b = ((b - a) ^ _turned(a, second)) & 0xFFFFFFFF
        a = (a + c) & 0xFFFFFFFF
        c = ((c - b) ^ _turned(b, third)) & 0xFFFFFFFF
        b = (b + a) & 0xFFFFFFFF
    return a, b, c


def _turned(value: int, amount: int) -> int:
    value &= 0xFFFFFFFF
    return (value << amount | value >> (32 - amount)) & 0xFFFFFFFF
