"""What tests of the codecs share: bytes of every element type, bases for them, and every way there and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np

from everystep import codecs
from everystep.codecs import choice, delta, native, packed, packed_numpy, planes
from everystep.codecs.delta import UNGROUPED, Form
from everystep.schema.dtype import FOREIGN, ML_DTYPES, name_of, parse

Array = np.ndarray[Any, Any]
LEVEL, SAMPLE, WORTH = 1, 64 << 10, 0.97
BUILTIN = [name_of(np.dtype(char)) for char in np.typecodes["All"] if char not in "OSUVmM"]
OTHER = ["|S5", "<U3", "|V7", "<m8[ns]", "<M8[D]", ">f4", ">i8", ">f2", ">bfloat16"]
RECORD = name_of(np.dtype([("a", "<f4"), ("b", "<i2", (3,)), ("c", "|S1")]))
DTYPES = sorted({*BUILTIN, *OTHER, RECORD, *ML_DTYPES, *FOREIGN})
FLOATS = ["<f2", "bfloat16", "<f4", "<f8", "<c8", "float8_e4m3fn", "float8_e5m2"]
CHANGES = ["same", "few", "near", "scaled", "other", "negated", "zero", "random"]
KERNEL, NUMPY = "kernel", "NumPy"
FORMS = [NUMPY] if native.kernel is None else [KERNEL, NUMPY]
"""What can encode and decode here."""
ONE_OF_A_FORM = {delta.form_of(dtype, 0): dtype for dtype in [*DTYPES, *FLOATS, "<i2", "<i4", "<i8", "|u1"]}
"""An element type of each form: what packs and unpacks sees no more of it."""


def flat(values: Array) -> Array:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def made(dtype: str, count: int, seed: int) -> Array:
    """Bytes of `count` elements: numbers of a training where the type has them, else random bits."""
    chance = np.random.default_rng(seed)
    kind = parse(dtype)
    if dtype in FLOATS:
        return flat((chance.normal(size=count) * 0.02).astype(kind))
    return chance.integers(256, size=count * kind.itemsize, dtype=np.uint8)


def changed(data: Array, dtype: str, how: str, seed: int) -> Array:
    """A base for the data."""
    chance, base = np.random.default_rng(seed + 1), data.copy()
    if how == "few" and base.size:
        base[chance.integers(base.size, size=max(1, base.size // 500))] ^= 255
    elif how == "near" and base.size:
        width = delta.form_of(dtype, data.nbytes).width
        base[::width] += chance.integers(8, size=base[::width].size, dtype=np.uint8)
    elif how in ("scaled", "negated") and dtype in FLOATS:
        kind = parse(dtype)
        factor = 300 if how == "scaled" else -1
        with np.errstate(all="ignore"):
            base = flat(
                (data.view(kind).astype(np.complex64 if "c" in dtype[:2] else np.float32) * factor).astype(kind)
            )
    elif how == "other":
        base = made(dtype, max(1, data.nbytes // parse(dtype).itemsize), seed + 2)[: data.nbytes]
    elif how == "zero":
        base[:] = 0
    elif how == "random":
        base = chance.integers(256, size=data.nbytes, dtype=np.uint8)
    return base


def trained(dtype: str, count: int, step: float) -> tuple[Array, Array]:
    """Weights and what they were before an update of about `step` each."""
    chance = np.random.default_rng(7)
    before = chance.normal(size=count) * 0.02
    after = before + step * chance.normal(size=count)
    return flat(after.astype(parse(dtype))), flat(before.astype(parse(dtype)))


# both forms of the kernel --------------------------------------------------------------------------------------------


@contextmanager
def using(form: str) -> Iterator[None]:
    """Encodes and decodes by this form only."""
    with ExitStack() as stack:
        for module in (choice, packed, planes):
            stack.enter_context(mock.patch.object(module, "HAS_KERNEL", form == KERNEL))
        yield


def packed_by(by: str, data: Array, base: Array, form: Form) -> bytes:
    """As residuals, whether that pays or not."""
    if by == NUMPY:
        return packed_numpy.pack(packed_numpy.plan(data, base, form)[0], data, base)
    header, *_ = native.kernel.plan(data, base, form.width, int(form.signed_magnitude), form.shift)
    return _stored(lambda out: native.kernel.pack(header, data, base, out), data)


def sparse_by(by: str, data: Array, base: Array, form: Form) -> bytes:
    """The words that differ, however many they are."""
    count = data.nbytes // form.width
    if by == NUMPY:
        body = packed_numpy.pack_sparse(data, base, form, count)
        assert body is not None
        return body
    numbers = form.width, int(form.signed_magnitude), form.shift
    return _stored(lambda out: native.kernel.pack_sparse(data, base, *numbers, count, out), data)


def _stored(write: Any, data: Array) -> bytes:
    out = np.empty(16 * data.nbytes + (1 << 17), np.uint8)
    size = write(out)
    assert size is not None, "there is room for anything"
    return bytes(out[:size])


def forced(data: Array, base: Array, form: Form, forms: list[str]) -> list[tuple[int, bytes]]:
    """Packed and sparse, of every form that is there the same bytes."""
    found = [[packed_by(by, data, base, form), sparse_by(by, data, base, form)] for by in forms]
    assert all(each == found[0] for each in found)
    return list(zip((codecs.PACKED, codecs.SPARSE), found[0]))


def check_back(codec: int, stored: bytes, data: Array, base: Array | None) -> None:
    """Into new memory, into memory that is given, and over the base itself."""
    body = memoryview(stored)
    assert bytes(codecs.decode(codec, body, data.nbytes, base)) == bytes(data)
    out = np.full(data.nbytes, 0xA5, np.uint8)
    assert codecs.decode(codec, body, data.nbytes, base, out) is out and np.array_equal(out, data)
    if base is not None and base.nbytes == data.nbytes:
        over = base.copy()
        assert codecs.decode(codec, body, data.nbytes, over, over) is over and np.array_equal(over, data)


def encoded(data: Array, dtype: str, base: Array | None = None, level: int = LEVEL) -> tuple[int, bytes]:
    codec, pieces = codecs.encode(data, dtype, level, SAMPLE, WORTH, base=base)
    return codec, b"".join(pieces)


def check_trip(data: Array, dtype: str, base: Array | None, level: int = LEVEL, forms: list[str] = FORMS) -> None:
    """Encodes and decodes by the choice, and by each codec that would not have been chosen."""
    before = data.copy(), None if base is None else base.copy()
    for by in forms:
        with using(by):
            codec, stored = encoded(data, dtype, base, level)
            assert len(stored) <= data.nbytes
            check_back(codec, stored, data, base)
            alone = planes.encode(data, planes.form_of(dtype, data.nbytes), level, SAMPLE, WORTH)
            if alone is not None:
                check_back(codecs.PLANES, b"".join(alone), data, None)
    if base is not None and base.nbytes == data.nbytes:
        form = delta.form_of(dtype, data.nbytes)
        for each in {form, form._replace(shift=UNGROUPED)}:
            pieces = delta.encode(data, base, each, level, SAMPLE, WORTH)
            if pieces is not None:
                check_back(codecs.DELTA, b"".join(pieces), data, base)
        for codec, stored in forced(data, base, form, forms):
            for by in forms:
                with using(by):
                    check_back(codec, stored, data, base)
        assert np.array_equal(base, before[1])
    assert np.array_equal(data, before[0]), "the input was changed"
