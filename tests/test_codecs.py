"""Codecs give back what they took, for every element type and every base, and end in Damaged on anything else."""

from __future__ import annotations

import random
import struct
import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from everystep import codecs
from everystep.codecs import choice, delta, planes
from everystep.errors import Damaged
from everystep.schema.dtype import FOREIGN, ML_DTYPES, name_of, parse

Array = np.ndarray[Any, Any]
LEVEL, SAMPLE, WORTH = 1, 64 << 10, 0.97
MANY = settings(max_examples=60, deadline=None)
BUILTIN = [name_of(np.dtype(char)) for char in np.typecodes["All"] if char not in "OSUVmM"]
OTHER = ["|S5", "<U3", "|V7", "<m8[ns]", "<M8[D]", ">f4", ">i8", ">f2", ">bfloat16"]
RECORD = name_of(np.dtype([("a", "<f4"), ("b", "<i2", (3,)), ("c", "|S1")]))
DTYPES = sorted({*BUILTIN, *OTHER, RECORD, *ML_DTYPES, *FOREIGN})
FLOATS = ["<f2", "bfloat16", "<f4", "<f8", "<c8", "float8_e4m3fn", "float8_e5m2"]
CHANGES = ["same", "few", "near", "scaled", "other", "negated", "zero", "random"]


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


def encoded(data: Array, dtype: str, base: Array | None = None, level: int = LEVEL) -> tuple[int, bytes]:
    codec, pieces = codecs.encode(data, dtype, level, SAMPLE, WORTH, base=base)
    return codec, b"".join(pieces)


def check_trip(data: Array, dtype: str, base: Array | None, level: int = LEVEL) -> int:
    """Encodes and decodes by the choice, and by each codec that would not have been chosen."""
    before = data.copy(), None if base is None else base.copy()
    codec, stored = encoded(data, dtype, base, level)
    assert len(stored) <= data.nbytes
    assert bytes(codecs.decode(codec, memoryview(stored), data.nbytes, base)) == bytes(data)
    alone = planes.encode(data, planes.form_of(dtype, data.nbytes), level, SAMPLE, WORTH)
    if alone is not None:
        assert bytes(planes.decode(memoryview(b"".join(alone)), data.nbytes)) == bytes(data)
    if base is not None and base.nbytes == data.nbytes:
        form = delta.form_of(dtype, data.nbytes)
        for each in {form, form._replace(shift=delta.UNGROUPED)}:
            pieces = delta.encode(data, base, each, level, SAMPLE, WORTH)
            if pieces is not None:
                stored_delta = memoryview(b"".join(pieces))
                assert bytes(delta.decode(stored_delta, base, data.nbytes)) == bytes(data)
        assert np.array_equal(base, before[1])
    assert np.array_equal(data, before[0]), "the input was changed"
    return codec


# there and back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_comes_back_from_every_base(dtype: str, how: str) -> None:
    for count in (0, 1, 2, 3, 17, 1000, 70_001):
        data = made(dtype, count, count)
        check_trip(data, dtype, changed(data, dtype, how, count))


@MANY
@given(st.sampled_from(DTYPES), st.data())
def test_any_bits_come_back(dtype: str, draw: st.DataObject) -> None:
    itemsize = parse(dtype).itemsize
    data = np.frombuffer(draw.draw(st.binary(max_size=80 * itemsize)), np.uint8)
    data = data[: data.nbytes // itemsize * itemsize]
    base = np.frombuffer(draw.draw(st.binary(min_size=data.nbytes, max_size=data.nbytes)), np.uint8)
    check_trip(data, dtype, base)


@MANY
@given(st.sampled_from(FLOATS), st.integers(0, 300_000), st.sampled_from(CHANGES), st.integers(0, 1 << 32))
def test_any_length_and_base_come_back(dtype: str, count: int, how: str, seed: int) -> None:
    data = made(dtype, count, seed)
    check_trip(data, dtype, changed(data, dtype, how, seed))


@pytest.mark.parametrize("dtype", ["<f2", "bfloat16", "<f4", "<f8"])
def test_special_values_come_back_from_each_other(dtype: str) -> None:
    words = np.dtype(f"u{parse(dtype).itemsize}")
    bits, sign = 8 * words.itemsize, 1 << (8 * words.itemsize - 1)
    mantissa = {"<f2": 10, "bfloat16": 7, "<f4": 23, "<f8": 52}[dtype]
    infinite = ((1 << (bits - 1 - mantissa)) - 1) << mantissa
    payloads = [infinite + 1, infinite + (1 << (mantissa - 1)), infinite + (1 << mantissa) - 1]
    plus = [0, 1, 2, (1 << mantissa) - 1, 1 << mantissa, infinite - 1, infinite, *payloads]
    every = np.array([value | turn for value in plus for turn in (0, sign)], words)
    data, base = (flat(each) for each in np.meshgrid(every, every))
    check_trip(data, dtype, base)
    check_trip(np.tile(data, 300), dtype, np.tile(base, 300))


@pytest.mark.parametrize("dtype", ["<f2", "bfloat16"])
def test_every_pattern_of_two_bytes_comes_back(dtype: str) -> None:
    every = np.arange(1 << 16, dtype="<u2")
    for seed in range(3):
        check_trip(flat(every), dtype, flat(np.random.default_rng(seed).permutation(every)))


@pytest.mark.parametrize("dtype", sorted(name for name in ML_DTYPES if "float8" in name))
def test_every_pair_of_bytes_comes_back(dtype: str) -> None:
    data, base = (flat(each) for each in np.meshgrid(*2 * [np.arange(256, dtype=np.uint8)]))
    check_trip(data, dtype, base)


@pytest.mark.parametrize("dtype", ["<f4", "<i8", "|b1"])
@pytest.mark.parametrize("level", [1, 3, 9])
def test_levels_come_back(dtype: str, level: int) -> None:
    data = made(dtype, 50_000, level)
    check_trip(data, dtype, changed(data, dtype, "near", level), level)


def test_a_length_that_is_no_whole_number_of_elements_comes_back() -> None:
    data = made("<f4", 5000, 0)[:-3]
    check_trip(data, "<f4", changed(data, "<f4", "few", 0))


def test_input_may_be_read_only_and_unaligned() -> None:
    for dtype in ("<f4", "<f8", "bfloat16"):
        data, base = (np.frombuffer(b"\1" + made(dtype, 40_000, seed).tobytes(), np.uint8, offset=1) for seed in (1, 2))
        check_trip(data, dtype, base)


# what is chosen, and how small it gets -----------------------------------------------------------------------------


def trained(dtype: str, count: int, step: float) -> tuple[Array, Array]:
    """Weights and what they were before an update of about `step` each."""
    chance = np.random.default_rng(7)
    before = chance.normal(size=count) * 0.02
    after = before + step * chance.normal(size=count)
    return flat(after.astype(parse(dtype))), flat(before.astype(parse(dtype)))


def share(data: Array, dtype: str, base: Array | None) -> tuple[int, float]:
    codec, stored = encoded(data, dtype, base)
    return codec, len(stored) / data.nbytes


@pytest.mark.parametrize("dtype, step, most", [("<f4", 1e-5, 0.60), ("bfloat16", 3e-6, 0.06), ("<f8", 1e-5, 0.78)])
def test_a_small_update_is_stored_as_a_delta(dtype: str, step: float, most: float) -> None:
    data, base = trained(dtype, 1 << 20, step)
    codec, ratio = share(data, dtype, base)
    assert codec == codecs.DELTA and ratio < most
    alone, ratio_alone = share(data, dtype, None)
    assert alone == codecs.PLANES and ratio < 0.95 * ratio_alone


def test_an_equal_base_costs_a_few_bytes() -> None:
    data = made("<f4", 1 << 20, 0)
    codec, stored = encoded(data, "<f4", data.copy())
    assert codec == codecs.DELTA and len(stored) < 64


def test_a_base_that_does_not_help_is_not_used() -> None:
    data, base = made("<f4", 1 << 18, 0), made("<f4", 1 << 18, 1)
    assert encoded(data, "<f4", base) == encoded(data, "<f4")
    assert encoded(np.zeros_like(data), "<f4", data) == encoded(np.zeros_like(data), "<f4")


def test_a_stricter_ratio_lets_fewer_bases_in() -> None:
    data, base = trained("<f4", 1 << 18, 1e-5)
    arguments = (data, "<f4", LEVEL, SAMPLE, WORTH)
    assert codecs.encode(*arguments, base=base)[0] == codecs.DELTA
    assert codecs.encode(*arguments, base=base, base_ratio=0.5)[0] == codecs.PLANES


def test_grouping_is_chosen_where_it_helps() -> None:
    data, base = trained("bfloat16", 1 << 20, 3e-6)
    form = choice.delta_form(data, base, "bfloat16", LEVEL, SAMPLE, 0.97)
    assert form is not None and form.grouped
    rows = np.repeat(np.random.default_rng(0).random(1 << 12) < 0.05, 256)  # a step that touched few rows
    base = flat(np.where(rows, data.view("<u2") + 3, data.view("<u2")).astype("<u2"))
    form = choice.delta_form(data, base, "bfloat16", LEVEL, SAMPLE, 0.97)
    assert form is not None and not form.grouped


def test_no_sample_means_no_compression() -> None:
    data = made("<f4", 1000, 0)
    assert codecs.encode(data, "<f4", LEVEL, 0, WORTH, base=data.copy())[0] == codecs.RAW


def adversarial(kind: str, seed: int) -> tuple[Array, Array]:
    chance = np.random.default_rng(seed)
    data, base = (chance.integers(256, size=(1 << 20) + 8 * seed, dtype=np.uint8) for _ in range(2))
    if kind == "samples lie":  # what is looked at is zero, the rest random
        for start in np.linspace(0, data.size - (8 << 10), 8).astype(int):
            data[start : start + (8 << 10)] = base[start : start + (8 << 10)] = 0
    elif kind == "specials":
        data = np.tile(np.frombuffer(struct.pack("<ffff", np.nan, -0.0, np.inf, 1e-45), np.uint8), 1 << 16)
        base = base[: data.size]
    elif kind == "all groups":
        base = np.arange(data.size, dtype=np.uint64).view(np.uint8)[: data.size]
    return data, base


@pytest.mark.parametrize("kind", ["random", "samples lie", "specials", "all groups"])
@pytest.mark.parametrize("dtype", ["<f4", "bfloat16", "<f8", "<i4", "float8_e4m3fn", "|u1"])
def test_nothing_gets_larger(dtype: str, kind: str) -> None:
    for seed in (0, 1, 5):
        data, base = adversarial(kind, seed)
        for against in (None, base):
            _, stored = encoded(data, dtype, against)
            assert len(stored) <= data.nbytes
        for form in (delta.form_of(dtype, data.nbytes), delta.Form(4, True, delta.UNGROUPED)):
            pieces = delta.encode(data, base, form, LEVEL, SAMPLE, 2.0)
            assert pieces is None or sum(map(len, pieces)) < 1.001 * data.nbytes


# damage ------------------------------------------------------------------------------------------------------------


def small(dtype: str = "<f4", grouped: bool = True) -> tuple[bytes, Array, Array]:
    data, base = trained(dtype, 2500, 1e-6)
    form = delta.form_of(dtype, data.nbytes)
    pieces = delta.encode(data, base, form if grouped else form._replace(shift=delta.UNGROUPED), LEVEL, SAMPLE, WORTH)
    assert pieces is not None
    return b"".join(pieces), data, base


CASES = [("<f4", True), ("<f4", False), ("bfloat16", True), ("float8_e5m2", True), ("<f8", True)]


def outcome(codec: int, stored: bytes, nbytes: int, base: Array | None) -> bytes | None:
    """What decoding gives, always of the right length; None for Damaged. Any other end fails the test."""
    tracemalloc.start()
    try:
        found = codecs.decode(codec, memoryview(stored), nbytes, base)
    except Damaged:
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 24 * nbytes + (1 << 20), f"{peak} bytes of memory for {nbytes}"
    assert found.dtype == np.uint8 and found.nbytes == nbytes
    return bytes(found)


@pytest.mark.parametrize("dtype, grouped", CASES)
def test_every_truncation_is_found(dtype: str, grouped: bool) -> None:
    stored, data, base = small(dtype, grouped)
    assert outcome(codecs.DELTA, stored, data.nbytes, base) == bytes(data)
    for end in range(len(stored)):
        assert outcome(codecs.DELTA, stored[:end], data.nbytes, base) is None, end
    assert outcome(codecs.DELTA, stored + b"\0", data.nbytes, base) is None


@pytest.mark.parametrize("dtype, grouped", CASES)
def test_flipped_bits_end_in_damage_or_in_bytes_of_that_length(dtype: str, grouped: bool) -> None:
    stored, data, base = small(dtype, grouped)
    chance = random.Random(0)
    table = 3 + 5 * parse(dtype).itemsize
    flips = [*range(8 * table), *(chance.randrange(8 * len(stored)) for _ in range(1500))]
    damaged = 0
    for flip in flips:
        broken = bytearray(stored)
        broken[flip // 8] ^= 1 << flip % 8
        damaged += outcome(codecs.DELTA, bytes(broken), data.nbytes, base) is None
    assert damaged > table  # sizes and kinds that changed


@MANY
@given(st.binary(max_size=300), st.sampled_from([0, 1, 2, 7, 64, 4096, 1 << 20]), st.sampled_from(list(codecs.NAMES)))
def test_garbage_ends_in_damage_or_in_bytes_of_that_length(stored: bytes, nbytes: int, codec: int) -> None:
    outcome(codec, stored, nbytes, np.zeros(nbytes, np.uint8))


@MANY
@given(
    st.sampled_from([0, 1, 2, 3, 4, 8, 16, 255]), st.integers(0, 2), st.integers(0, 255),
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0, 1, 2, 1000, 0xFFFFFFFF])), max_size=9),
    st.binary(max_size=40),
)  # fmt: skip
def test_garbage_tables_end_in_damage(
    width: int, kind: int, shift: int, table: list[tuple[int, int]], rest: bytes
) -> None:
    head = struct.pack("<BBB", width, kind, shift) + b"".join(struct.pack("<BI", *row) for row in table)
    for nbytes in (0, 8, 4000):
        outcome(codecs.DELTA, head + rest, nbytes, np.arange(nbytes).astype(np.uint8))


def bomb(size: int, declare: bool = True) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=declare).compress(bytes(size))


@pytest.mark.parametrize(
    "frame", [bomb(1 << 28), bomb(1 << 28, declare=False), bomb(1000, declare=False), b"", b"\x28"]
)
def test_a_frame_of_another_size_is_damage(frame: bytes) -> None:
    base = np.zeros(1000, np.uint8)
    one = struct.pack("<BBB", 1, 0, delta.UNGROUPED) + struct.pack("<BI", 1, len(frame)) + frame
    assert outcome(codecs.DELTA, one, 1000, base) is None
    one = struct.pack("<BBH", 1, 0, 1) + struct.pack("<BI", 1, len(frame)) + frame
    assert outcome(codecs.PLANES, one, 1000, None) is None


def test_a_frame_that_holds_more_than_it_says_is_damage() -> None:
    frame = bytearray(bomb(1 << 20))
    size = zstandard.get_frame_parameters(bytes(frame)).content_size
    at = bytes(frame).index(struct.pack("<I", size))
    frame[at : at + 4] = struct.pack("<I", 1 << 17)
    stored = struct.pack("<BBB", 1, 0, delta.UNGROUPED) + struct.pack("<BI", 1, len(frame)) + bytes(frame)
    assert outcome(codecs.DELTA, stored, 1 << 17, np.zeros(1 << 17, np.uint8)) is None


def test_a_base_of_another_length_is_damage() -> None:
    stored, data, base = small()
    for wrong in (base[:-4], base[:-1], np.concatenate([base, base]), base[:0]):
        with pytest.raises(Damaged, match="base"):
            codecs.decode(codecs.DELTA, memoryview(stored), data.nbytes, wrong)
    with pytest.raises(Damaged, match="base"):
        codecs.decode(codecs.DELTA, memoryview(stored), data.nbytes)


def test_a_base_of_other_bytes_gives_other_bytes() -> None:
    stored, data, base = small()
    found = codecs.decode(codecs.DELTA, memoryview(stored), data.nbytes, base ^ 1)
    assert found.nbytes == data.nbytes and bytes(found) != bytes(data)


def test_unknown_codecs_are_damage() -> None:
    with pytest.raises(Damaged, match="unknown codec"):
        codecs.decode(max(codecs.NAMES) + 1, memoryview(b""), 0)


def test_a_base_of_another_length_is_not_used() -> None:
    data = made("<f4", 1000, 0)
    assert encoded(data, "<f4", data[:-4]) == encoded(data, "<f4")


def test_the_element_types_are_all_known_to_numpy_or_ml_dtypes() -> None:
    """A new float of ml_dtypes has to be given a form here, and not be taken for bytes by oversight."""
    floats = [name for name in dir(ml_dtypes) if name.startswith(("float8", "bfloat"))]
    assert floats
    for name in floats:
        form = delta.form_of(name, 8)
        assert form.grouped != (name == "float8_e8m0fnu"), name
