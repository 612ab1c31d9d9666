"""Writes inputs for decoders.c, made of real encodings: python tests/fuzz/seeds.py FOLDER."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from everystep.codecs import packed_numpy
from everystep.codecs.delta import UNGROUPED, Form

Array = np.ndarray[Any, Any]
HEAD = struct.Struct("<BBBBHH")
DECODE, DECODE_SPARSE, ROUND_TRIP = 0, 1, 2
DENSE, PLACES, LONG = 0, 1, 2
FORMS = [
    Form(1, True, 0), Form(1, False, UNGROUPED), Form(2, True, 7), Form(2, True, 10), Form(2, False, UNGROUPED),
    Form(4, True, 23), Form(4, False, UNGROUPED), Form(8, True, 52), Form(8, False, UNGROUPED), Form(8, False, 56),
]  # fmt: skip
COUNTS = [1, 3, 1023, 1024, 1025, 4 * 1024, 5 * 1024 + 17]
CHANGES = ["none", "few", "half", "low", "all"]


def base_of(form: Form, count: int, chance: np.random.Generator) -> Array:
    """A pattern of words that, repeated, is the base: floats of many sizes, or counters."""
    period = min(count, 300)
    if form.signed_magnitude:
        values = chance.normal(size=period) * np.exp(chance.normal(size=period))
        wide = {2: "<f2", 4: "<f4", 8: "<f8"}.get(form.width)
        return values.astype(wide).view(np.uint8) if wide else (64 * values).astype(np.int8).view(np.uint8)
    return np.cumsum(chance.integers(0, 5, period)).astype(f"<u{form.width}").view(np.uint8)


def changed(base: Array, form: Form, how: str, chance: np.random.Generator) -> Array:
    data = base.copy()
    words = data.view(f"<u{form.width}")
    if how in ("few", "half"):
        where = np.flatnonzero(chance.random(words.size) < (0.02 if how == "few" else 0.5))
        words[where] += chance.integers(1, 9, where.size).astype(words.dtype)
    elif how == "low":
        data[:: form.width] ^= chance.integers(0, 256, words.size, np.uint8)
    elif how == "all":
        data[:] = chance.integers(0, 256, data.size, np.uint8)
    return data


def made() -> Iterator[tuple[str, bytes]]:
    """(name, input) of every kind, width and length."""
    for form in FORMS:
        flags = (form.width.bit_length() - 1) | form.signed_magnitude << 2
        for count in COUNTS:
            for how in CHANGES:
                chance = np.random.default_rng([count, CHANGES.index(how), *map(int, form)])
                pattern = base_of(form, count, chance)
                base = np.resize(pattern, count * form.width)
                data = changed(base, form, how, chance)
                tail = struct.pack("<HH", base.nbytes, pattern.nbytes) + pattern.tobytes()
                name = f"{form.width}-{int(form.signed_magnitude)}-{form.shift}-{count}-{how}"
                header = packed_numpy.plan(data, base, form)[0]
                yield (
                    f"packed-{name}",
                    bytes([DECODE, flags, form.shift, 0]) + tail + packed_numpy.pack(header, data, base),
                )
                sparse = packed_numpy.pack_sparse(data, base, form, count)
                assert sparse is not None
                yield f"sparse-{name}", bytes([DECODE_SPARSE, flags, form.shift, 0]) + tail + sparse
                differ = (data ^ base).tobytes()
                yield f"dense-{name}", bytes([ROUND_TRIP, flags, form.shift, DENSE]) + tail + differ[:6000]
                places = np.flatnonzero(data != base)[:2000]
                triples = b"".join(struct.pack("<HB", at, differ[at]) for at in places.tolist())
                yield f"places-{name}", bytes([ROUND_TRIP, flags, form.shift, PLACES]) + tail + triples


def unforeseen() -> Iterator[tuple[str, bytes]]:
    """Long ones, of which a sample sees the first words of each 1024, that stand still: all others are escaped."""
    for form in FORMS:
        chance = np.random.default_rng(form)
        pattern = base_of(form, 1024, chance)
        differ = chance.integers(0, 256, 1024 * form.width, np.uint8)
        differ[: 128 * form.width] = 0
        head = bytes([ROUND_TRIP, (form.width.bit_length() - 1) | form.signed_magnitude << 2, form.shift, LONG])
        ninth = 66_060 * form.width // 9  # of so many, packing looks at fewer than 128 in each 1024
        tail = struct.pack("<HH", ninth, pattern.nbytes) + pattern.tobytes()
        yield f"long-{form.width}-{int(form.signed_magnitude)}-{form.shift}", head + tail + differ.tobytes()


def write(folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, body in chain(made(), unforeseen()):
        paths.append(folder / name)
        paths[-1].write_bytes(body)
    return paths


if __name__ == "__main__":
    print(len(write(Path(sys.argv[1]))), "seeds")
