"""Codecs give back what they took, for every element type and every base, and end in Damaged on anything else."""

from __future__ import annotations

import struct
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from _encodings import (
    CHANGES,
    DTYPES,
    FLOATS,
    FORMS,
    KERNEL,
    LEVEL,
    NUMPY,
    ONE_OF_A_FORM,
    SAMPLE,
    WORTH,
    changed,
    check_back,
    check_trip,
    encoded,
    flat,
    made,
    packed_by,
    sparse_by,
    trained,
    using,
)
from _thorough import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from everystep import codecs
from everystep.codecs import choice, delta
from everystep.schema.dtype import ML_DTYPES, parse

Array = np.ndarray[Any, Any]
MANY = settings(max_examples=examples(60), deadline=None)


# there and back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_comes_back_from_every_base(dtype: str, how: str) -> None:
    for count in (0, 1, 2, 3, 17, 1000, 70_001):
        data = made(dtype, count, count)
        # NumPy takes a step for each word of a block, and does the same for all types of one form
        short = count < 100 or dtype in ONE_OF_A_FORM.values()
        check_trip(data, dtype, changed(data, dtype, how, count), forms=FORMS if short else FORMS[:1])


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
    check_trip(data, dtype, changed(data, dtype, how, seed), forms=FORMS[seed % len(FORMS) :][:1])


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


@pytest.fixture(params=FORMS)
def by(request: pytest.FixtureRequest) -> Any:
    """The form of the kernel that encodes and decodes."""
    with using(request.param):
        yield request.param


DENSE = {KERNEL: codecs.PACKED, NUMPY: codecs.DELTA}


def share(data: Array, dtype: str, base: Array | None) -> tuple[int, float]:
    codec, stored = encoded(data, dtype, base)
    return codec, len(stored) / data.nbytes


@pytest.mark.parametrize("dtype, step, most", [("<f4", 1e-5, 0.60), ("bfloat16", 1e-4, 0.42), ("<f8", 1e-5, 0.78)])
def test_a_small_update_is_stored_as_a_difference(by: str, dtype: str, step: float, most: float) -> None:
    data, base = trained(dtype, 1 << 20, step)
    codec, ratio = share(data, dtype, base)
    assert codec == DENSE[by] and ratio < most
    alone, ratio_alone = share(data, dtype, None)
    assert alone == codecs.PLANES and ratio < 0.95 * ratio_alone


@pytest.mark.parametrize(
    "dtype, step, most", [("bfloat16", 3e-6, 0.055), ("bfloat16", 1e-7, 0.0045), ("<f4", 1e-10, 0.11)]
)
def test_a_few_changed_words_are_stored_alone(by: str, dtype: str, step: float, most: float) -> None:
    codec, ratio = share(*((pair := trained(dtype, 1 << 20, step))[0], dtype, pair[1]))
    assert codec == codecs.SPARSE and ratio < most


def test_packing_is_no_larger_than_planes_of_differences() -> None:
    for dtype, step in [("<f4", 1e-5), ("<f4", 1e-7), ("bfloat16", 1e-4), ("<f2", 1e-4)]:
        data, base = trained(dtype, 1 << 20, step)
        pieces = delta.encode(data, base, delta.form_of(dtype, data.nbytes), LEVEL, SAMPLE, WORTH)
        assert pieces is not None
        packed = packed_by(FORMS[0], data, base, delta.form_of(dtype, data.nbytes))
        assert len(packed) < 1.005 * sum(map(len, pieces)), (dtype, step)


def test_an_equal_base_costs_a_few_bytes(by: str) -> None:
    for dtype in ("<f4", "bfloat16", "<i8", "|u1", "float8_e4m3fn"):
        data = made(dtype, 1 << 20, 0)
        codec, stored = encoded(data, dtype, data.copy())
        assert codec == codecs.SPARSE and len(stored) < 24


def test_a_base_that_does_not_help_is_not_used(by: str) -> None:
    data, base = made("<f4", 1 << 18, 0), made("<f4", 1 << 18, 1)
    assert encoded(data, "<f4", base) == encoded(data, "<f4")
    assert encoded(np.zeros_like(data), "<f4", data) == encoded(np.zeros_like(data), "<f4")


def test_bytes_of_which_nothing_is_known_are_left_to_zstd(by: str) -> None:
    """Half of them changed, in a way that repeats: what packs words one by one cannot see that."""
    base = made("|u1", 1 << 20, 0)
    data = base + np.resize(made("|u1", 300, 1), base.size)
    codec, stored = encoded(data, "|V7", base)
    assert codec == codecs.DELTA and len(stored) < 0.05 * data.nbytes


def test_a_stricter_ratio_lets_fewer_bases_in(by: str) -> None:
    data, base = trained("<f4", 1 << 18, 1e-5)
    arguments = (data, "<f4", LEVEL, SAMPLE, WORTH)
    assert codecs.encode(*arguments, base=base)[0] == DENSE[by]
    assert codecs.encode(*arguments, base=base, base_ratio=0.5)[0] == codecs.PLANES
    data, base = trained("bfloat16", 1 << 18, 3e-6)
    arguments = (data, "bfloat16", LEVEL, SAMPLE, WORTH)
    assert codecs.encode(*arguments, base=base)[0] == codecs.SPARSE
    assert codecs.encode(*arguments, base=base, base_ratio=0.01)[0] == codecs.PLANES


def test_grouping_is_chosen_where_it_helps() -> None:
    data, base = trained("bfloat16", 1 << 20, 3e-6)
    form = choice.delta_form(data, base, "bfloat16", LEVEL, SAMPLE, 0.97)
    assert form is not None and form.grouped
    rows = np.repeat(np.random.default_rng(0).random(1 << 12) < 0.05, 256)  # a step that touched few rows
    base = flat(np.where(rows, data.view("<u2") + 3, data.view("<u2")).astype("<u2"))
    form = choice.delta_form(data, base, "bfloat16", LEVEL, SAMPLE, 0.97)
    assert form is not None and not form.grouped


def test_no_sample_means_no_compression(by: str) -> None:
    for count in (1000, 1 << 18):
        data = made("<f4", count, 0)
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
def test_nothing_gets_larger(by: str, dtype: str, kind: str) -> None:
    for seed in (0, 1, 5):
        data, base = adversarial(kind, seed)
        for against in (None, base):
            codec, stored = encoded(data, dtype, against)
            assert len(stored) <= data.nbytes
            check_back(codec, stored, data, against)
        for form in (delta.form_of(dtype, data.nbytes), delta.Form(4, True, delta.UNGROUPED)):
            pieces = delta.encode(data, base, form, LEVEL, SAMPLE, 2.0)
            assert pieces is None or sum(map(len, pieces)) < 1.001 * data.nbytes
        form = delta.form_of(dtype, data.nbytes)
        count = data.nbytes // form.width
        most = data.nbytes + 13 * count // 8 + 35_000  # codes that a sample misled: escape and symbol take 15 bits
        assert len(packed_by(by, data, base, form)) < most
        assert len(sparse_by(by, data, base, form)) < most + 6 * count


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
