"""What was not made by `encode` ends in Damaged, or in bytes of the right length: in bounded time and memory."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import tracemalloc
from typing import Any

import numpy as np
import pytest
import zstandard
from _encodings import FORMS, KERNEL, LEVEL, ONE_OF_A_FORM, SAMPLE, WORTH, forced, made, trained, using
from _thorough import examples, some_of
from hypothesis import given, settings
from hypothesis import strategies as st

from everystep import codecs
from everystep.codecs import codes, delta
from everystep.codecs.delta import UNGROUPED, Form
from everystep.errors import Damaged
from everystep.schema.dtype import parse

Array = np.ndarray[Any, Any]
MANY = settings(max_examples=examples(60), deadline=None)


def small(dtype: str = "<f4", grouped: bool = True) -> tuple[bytes, Array, Array]:
    data, base = trained(dtype, 2500, 1e-6)
    form = delta.form_of(dtype, data.nbytes)
    pieces = delta.encode(data, base, form if grouped else form._replace(shift=delta.UNGROUPED), LEVEL, SAMPLE, WORTH)
    assert pieces is not None
    return b"".join(pieces), data, base


CASES = [("<f4", True), ("<f4", False), ("bfloat16", True), ("float8_e5m2", True), ("<f8", True)]


def outcome(codec: int, stored: bytes, nbytes: int, base: Array | None, forms: list[str] = FORMS) -> bytes | None:
    """What decoding gives, always of the right length; None for Damaged. Any other end fails the test.

    Both forms of the kernel must end alike, and so must decoding over the base itself.
    """
    ways = [(by, False) for by in forms[: 1 if codec in (codecs.RAW, codecs.DELTA) else None]] + [(forms[0], True)]
    ends = [_outcome(by, codec, stored, nbytes, base, over) for by, over in ways]
    assert all(end == ends[0] for end in ends)
    return ends[0]


def _outcome(by: str, codec: int, stored: bytes, nbytes: int, base: Array | None, over: bool) -> bytes | None:
    before = None if base is None else base.copy()
    fits = over and before is not None and before.nbytes == nbytes
    tracemalloc.start()
    try:
        with using(by):
            found = codecs.decode(codec, memoryview(stored), nbytes, before, before if fits else None)
    except Damaged:
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # NumPy decodes words of one byte as words of eight
        assert peak < (64 if codec in (codecs.PACKED, codecs.SPARSE) else 24) * nbytes + (4 << 20), (
            f"{peak} for {nbytes}"
        )
    assert found.dtype == np.uint8 and found.nbytes == nbytes
    return bytes(found)


@pytest.mark.parametrize("dtype, grouped", CASES)
def test_every_truncation_is_found(dtype: str, grouped: bool) -> None:
    stored, data, base = small(dtype, grouped)
    assert outcome(codecs.DELTA, stored, data.nbytes, base) == bytes(data)
    for end in some_of(range(len(stored))):
        assert outcome(codecs.DELTA, stored[:end], data.nbytes, base) is None, end
    assert outcome(codecs.DELTA, stored + b"\0", data.nbytes, base) is None


@pytest.mark.parametrize("dtype, grouped", CASES)
def test_flipped_bits_end_in_damage_or_in_bytes_of_that_length(dtype: str, grouped: bool) -> None:
    stored, data, base = small(dtype, grouped)
    chance = random.Random(0)
    table = 3 + 5 * parse(dtype).itemsize
    flips = [*range(8 * table), *(chance.randrange(8 * len(stored)) for _ in range(examples(1500)))]
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


# packed and sparse ---------------------------------------------------------------------------------------------------

FEW, MORE = 60, 2500  # words: NumPy takes a step for each of a block
CODED = [dtype for form, dtype in ONE_OF_A_FORM.items()]


def coded(dtype: str, count: int) -> tuple[Array, Array, list[tuple[int, bytes]]]:
    """Data, base, and both encodings, with some escapes in them."""
    data = made(dtype, count, 1)
    form = delta.form_of(dtype, data.nbytes)
    base = data.copy()
    words = base.view(f"<u{form.width}")
    chance = np.random.default_rng(2)
    words[chance.random(words.size) < 0.4] += 3
    base[chance.integers(0, base.size, 3)] ^= 0xC3
    words[-1] = ~data.view(words.dtype)[-1]
    return data, base, forced(data, base, form, FORMS)


@pytest.mark.parametrize("dtype", CODED)
def test_every_truncation_of_codes_is_found(dtype: str) -> None:
    for count in (FEW, MORE):
        data, base, found = coded(dtype, count)
        for codec, stored in found:
            assert outcome(codec, stored, data.nbytes, base) == bytes(data)
            for end in some_of(range(0, len(stored), 1 if count == FEW else 7)):
                assert outcome(codec, stored[:end], data.nbytes, base) is None, end
            assert outcome(codec, stored + b"\0", data.nbytes, base) is None


@pytest.mark.parametrize("dtype", CODED)
def test_flipped_bits_in_codes_end_in_damage_or_in_bytes_of_that_length(dtype: str) -> None:
    chance = random.Random(0)
    for count, most, forms in ((FEW, 250, FORMS), (MORE, 40, FORMS), (MORE, 1000, FORMS[:1])):
        data, base, found = coded(dtype, count)
        for codec, stored in found:
            bits = stretches(stored, codec, data.nbytes)[2] if most == 40 else len(stored)  # few: of the header
            flips = chance.sample(range(8 * bits), min(examples(most), 8 * bits))
            ends = []
            for flip in flips:
                broken = bytearray(stored)
                broken[flip // 8] ^= 1 << flip % 8
                ends.append(outcome(codec, bytes(broken), data.nbytes, base, forms))
            assert ends.count(None) > len(flips) // 20
            # those that say nothing: what fills a byte up, and codes that no word has
            assert ends.count(bytes(data)) < len(flips) // 2


def stretches(stored: bytes, codec: int, nbytes: int) -> tuple[int, int, int]:
    """Where the numbers of changes begin (only in the sparse form), the lengths of blocks, and the blocks."""
    found, at = codes.read(memoryview(stored), sparse=codec == codecs.SPARSE)
    if codec == codecs.PACKED:
        return at, at, at + 2 * -(-(nbytes // found.form.width) // 1024)
    sizes = np.frombuffer(stored, "<u4", len(found.lengths) // 2, at)
    lengths = at + sizes.nbytes
    return at, lengths, lengths + 2 * -(-int(sizes.sum()) // 512)


def with_numbers(stored: bytes, layout: str, at: int, *numbers: int) -> bytes:
    broken = bytearray(stored)
    struct.pack_into(layout, broken, at, *numbers)
    return bytes(broken)


@pytest.mark.parametrize("dtype", CODED)
def test_lengths_of_blocks_that_lie_are_found(dtype: str) -> None:
    data, base, found = coded(dtype, MORE)
    for codec, stored in found:
        _, lengths, blocks = stretches(stored, codec, data.nbytes)
        assert blocks - lengths >= 4
        for at in (lengths, blocks - 2):
            (length,) = struct.unpack_from("<H", stored, at)
            for lie in {0, 1, length - 1, length + 1, 0xFFFF} - {length}:
                assert outcome(codec, with_numbers(stored, "<H", at, lie), data.nbytes, base) is None
        first, second = struct.unpack_from("<HH", stored, lengths)
        for moved in (-1, 1):  # the sum stays what it was
            lie = with_numbers(stored, "<HH", lengths, first + moved, second - moved)
            assert outcome(codec, lie, data.nbytes, base) is None


@pytest.mark.parametrize("form", ONE_OF_A_FORM, ids=str)
def test_blocks_that_are_read_side_by_side_are_each_checked(form: Form) -> None:
    """So many bytes that the kernel takes four at once."""
    data, base = (made("|u1", 24 * 1024 * form.width, seed) for seed in (1, 2))
    (codec, stored), _ = forced(data, base, form, FORMS)
    _, lengths, blocks = stretches(stored, codec, data.nbytes)
    assert len(stored) - blocks > 20 << 10
    for at in range(lengths, lengths + 8, 2):
        first, second = struct.unpack_from("<HH", stored, at)
        for moved in (-1, 1):
            lie = with_numbers(stored, "<HH", at, first + moved, second - moved)
            assert outcome(codec, lie, data.nbytes, base) is None


@pytest.mark.parametrize("dtype", CODED)
def test_numbers_of_changes_that_lie_are_found(dtype: str) -> None:
    data, base, ((_, _), (codec, stored)) = coded(dtype, MORE)
    sizes, lengths, _ = stretches(stored, codec, data.nbytes)
    for at in {sizes, lengths - 4}:
        (size,) = struct.unpack_from("<I", stored, at)
        for lie in (data.nbytes, 0x7FFFFFFF, 0xFFFFFFFF):
            assert outcome(codec, with_numbers(stored, "<I", at, lie), data.nbytes, base) is None
        for lie in {0, 1, size - 1, size + 1, size + 600} - {
            size
        }:  # perhaps what fills the last byte reads as a change
            assert outcome(codec, with_numbers(stored, "<I", at, lie), data.nbytes, base) != bytes(data)
    if lengths - sizes > 4:  # one that is counted in another context
        first, second = struct.unpack_from("<II", stored, sizes)
        for lie in ((first + 1, second - 1), (first + second, 0), (0, first + second)):
            assert outcome(codec, with_numbers(stored, "<II", sizes, *lie), data.nbytes, base) != bytes(data)


@pytest.mark.parametrize("dtype", CODED)
def test_a_base_that_is_not_the_one_ends_in_damage_or_in_bytes_of_that_length(dtype: str) -> None:
    data, base, found = coded(dtype, MORE)
    width = delta.form_of(dtype, data.nbytes).width
    for codec, stored in found:
        for other in (base ^ 1, base ^ 64, np.zeros_like(base), made("|u1", base.nbytes, 5)):
            assert outcome(codec, stored, data.nbytes, other) != bytes(data)
        for other in (base[:-width], base[: base.nbytes // 2 // width * width], np.concatenate([base, base])):
            end = outcome(codec, stored, other.nbytes, other)
            assert end is None or (codec == codecs.SPARSE and other.nbytes > base.nbytes)
        for wrong in (base[:-width], base[:-1], np.concatenate([base, base]), base[:0], None):
            assert outcome(codec, stored, data.nbytes, wrong) is None


@pytest.mark.parametrize("width", [2, 4, 8])
def test_a_length_that_is_no_whole_number_of_words_is_damage(width: int) -> None:
    form = Form(width, False, UNGROUPED)
    base = np.arange(64 * width, dtype=np.uint8)
    for codec, stored in forced(base ^ 1, base, form, FORMS):
        assert outcome(codec, stored, base.nbytes - 1, base[:-1]) is None


# headers by hand -----------------------------------------------------------------------------------------------------


def half_bytes(first: int, count: int, lengths: list[int]) -> bytes:
    """A code: the escape's length, then those of the symbols from the first on."""
    halves = [*lengths, 0]
    return bytes([first, count, *(low | high << 4 for low, high in zip(halves[0::2], halves[1::2]))])


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_a_symbol_that_words_of_that_width_do_not_have_is_damage(width: int) -> None:
    """One word, its symbol escaped: the escape's code is 1, that of symbol 0 is 0."""
    head = struct.pack("<BBBH", width, 0, UNGROUPED, 0) + half_bytes(0, 1, [1, 1])
    base = np.zeros(width, np.uint8)
    for symbol in range(128):
        low = max(symbol // 2 - 1, 0)
        body = (1 | symbol << 1).to_bytes(-(-(8 + low) // 8), "little")
        end = outcome(codecs.PACKED, head + struct.pack("<H", len(body)) + body, width, base)
        residual = (symbol - 2 * low) << low
        expected = (residual >> 1 ^ -(residual & 1)) % 256**width
        assert end == (expected.to_bytes(width, "little") if symbol < 16 * width else None), symbol


def test_codes_that_are_none_are_damage() -> None:
    base = np.zeros(4, np.uint8)
    rest = struct.pack("<H", 1) + b"\0"

    def ends(code: bytes, head: tuple[int, ...] = (1, 0, UNGROUPED, 0)) -> bytes | None:
        return outcome(codecs.PACKED, struct.pack("<BBBH", *head) + code + rest, 4, base)

    good = half_bytes(0, 1, [1, 1])
    assert ends(good) == bytes(4)
    assert ends(half_bytes(0, 3, [2, 1, 0, 2])) == bytes(4), "a length of 0: no code of its own"
    assert ends(half_bytes(0, 2, [0, 1, 1])) == bytes(4), "nothing can be escaped"
    wrong = {
        "not complete": half_bytes(0, 1, [2, 1]),
        "more than complete": half_bytes(0, 2, [1, 1, 1]),
        "none": half_bytes(0, 1, [0, 0]),
        "the escape alone": half_bytes(0, 0, [1]),
        "too long a code": half_bytes(0, 3, [1, 1, 0, 9]),
        "too long an escape": half_bytes(0, 2, [9, 1, 1]),
        "symbols that a byte does not have": half_bytes(15, 2, [1, 2, 2]),
        "symbols that nothing has": half_bytes(255, 255, [1] * 256),
        "cut": half_bytes(0, 2, [1, 2, 2])[:-1],
    }
    for what, code in wrong.items():
        assert ends(code) is None, what
    for head in ((3, 0, UNGROUPED, 0), (0, 0, UNGROUPED, 0), (1, 2, UNGROUPED, 0), (1, 4, UNGROUPED, 0), (1, 0, 8, 0)):
        assert ends(good, head) is None, head
    assert ends(good + b"\0" + good, (1, 1, 0, 1)) == bytes(4)
    assert ends(good + b"\0" + good + b"\0" + good, (1, 1, 0, 2)) is None, "a key twice"
    assert ends(good + b"\1" + good + b"\0" + good, (1, 1, 0, 2)) is None, "keys out of order"
    assert ends(good + b"".join(bytes([key]) + good for key in range(256)), (1, 1, 0, 256)) == bytes(4)
    for keys in (255, 257, 0xFFFF):
        assert ends(good + b"".join(bytes([key % 256]) + good for key in range(256)), (1, 1, 0, keys)) is None, keys


def a_code(symbols: int) -> st.SearchStrategy[bytes]:
    """Codes as they are built, for symbols that may not exist, and some that are none."""

    def write(counts: list[int]) -> bytes:
        lengths = codes.build(np.array([*counts, *[0] * (codes.SYMBOLS - len(counts))]))
        used = np.flatnonzero(lengths[: codes.SYMBOLS]).tolist()
        first, count = used[0], used[-1] - used[0] + 1
        return half_bytes(first, count, [int(lengths[codes.ESCAPE]), *lengths[first : first + count].tolist()])

    counts = st.lists(st.sampled_from([0, 0, 1, 2, 10, 1000]), min_size=1, max_size=symbols)
    return st.one_of(*[counts.map(write)] * 9, st.binary(min_size=3, max_size=20))


@st.composite
def hostile(draw: st.DrawFn) -> tuple[int, bytes, int]:
    """(codec, stored, words): a header that may be right, tables that may add up, and any bits."""
    codec = draw(st.sampled_from([codecs.PACKED, codecs.SPARSE]))
    sparse = codec == codecs.SPARSE
    width = draw(st.sampled_from([1, 2, 4, 8]))
    shift = draw(st.sampled_from([0, 7, 8 * width - 1, UNGROUPED, UNGROUPED]))
    keys = draw(st.lists(st.integers(0, 255), max_size=4, unique=True).map(sorted))
    head = struct.pack("<BBBH", width, draw(st.integers(0, 1)) | 2 * sparse, shift, len(keys))
    for number in range(1 + len(keys)):
        head += bytes(keys[number - 1 : number]) if number else b""
        head += draw(a_code(64)) if sparse else b""
        head += draw(a_code(draw(st.sampled_from([16 * width, 16 * width, 128]))))
    words = draw(st.sampled_from([0, 1, 2, 40, 150, 1025]))
    body = draw(st.binary(min_size=words // 4, max_size=2 * words + 2))
    changed = words
    if sparse:
        sizes = draw(st.lists(st.integers(0, words // 2 + 1), min_size=1 + len(keys), max_size=1 + len(keys)))
        sizes[0] = draw(st.sampled_from([sizes[0], sizes[0], 0xFFFFFFFF]))
        head += struct.pack(f"<{len(sizes)}I", *sizes)
        changed = sum(sizes)
    blocks = min(-(-changed // (512 if sparse else 1024)), 8)
    lengths = [len(body) // blocks] * blocks if blocks else []
    if blocks:
        lengths[-1] += len(body) % blocks
    return codec, head + struct.pack(f"<{blocks}H", *lengths) + body, words * width


@settings(max_examples=examples(300), deadline=None)
@given(hostile(), st.integers(0, 3))
def test_garbage_in_codes_ends_in_damage_or_in_bytes_of_that_length(case: tuple[int, bytes, int], seed: int) -> None:
    codec, stored, nbytes = case
    outcome(codec, stored, nbytes, made("|u1", nbytes, seed) if seed else np.zeros(nbytes, np.uint8))


# memory that tracemalloc does not see -------------------------------------------------------------------------------

CHILD = """
import resource, struct, sys
import numpy as np
from everystep import codecs
from everystep.errors import Damaged
nbytes = 64 << 20
base = np.zeros(nbytes, np.uint8)
one = bytes([0, 1, 0x11])  # symbol 0 and the escape, of a bit each
head = struct.pack("<BBBH", 1, 2, 255, 0) + one + one
hostile = [(codecs.SPARSE, head + struct.pack("<I", n) + bytes(1000)) for n in (4100, nbytes, 2 ** 32 - 1)]
many = struct.pack("<BBBH", 1, 3, 0, 256) + one + one + b"".join(bytes([key]) + one + one for key in range(256))
hostile.append((codecs.SPARSE, many + struct.pack("<I", nbytes // 257) * 257 + bytes(1000)))
hostile.append((codecs.PACKED, struct.pack("<BBBH", 1, 0, 255, 0) + one + bytes(1000)))
out = np.ones(nbytes, np.uint8)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20),) * 2)
for codec, stored in hostile:
    try:
        codecs.decode(codec, memoryview(stored), nbytes, base, out)
    except Damaged:
        continue
    sys.exit("decoded what is none")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits a program's memory as Linux does")
@pytest.mark.parametrize("by", FORMS)
def test_what_is_declared_takes_no_memory(by: str) -> None:
    """Sixteen MiB beside the chunk of 64 and its base, whatever a thousand stored bytes promise."""
    environment = {**os.environ, "EVERYSTEP_KERNEL": "1" if by == KERNEL else "0"}
    done = subprocess.run([sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
