"""How small a history of real checkpoints gets: our codecs and other ways, by the role of the arrays.

python -m benchmarks.history [gpt cnn ft_bf16 frozen lora emb] [--count 30] [--peers zstd,xor,float,zipnn] [--json]

Every checkpoint is kept. Ours encodes each chunk against the previous checkpoint's, alone again after 8 differences in
a row; a chunk that did not change is referenced. Differences of the others begin anew after 8, too. Sizes are stored
bytes / raw bytes. Speeds are raw bytes per second of one thread's processor time.

`ours, with a base` leaves out the chunks that start a row of differences. `order-0` is the entropy of the same chunks,
one by one: of the residual given the base's exponent or, where that is less, of the value alone. Codes that follow the
parts of a leaf, or runs, come below it.
"""

from __future__ import annotations

import argparse
import gzip
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zstandard

from benchmarks import sequences, timing
from benchmarks.sequences import Array, Sequence
from everystep import codecs
from everystep.codecs import delta, planes
from everystep.schema.dtype import name_of
from everystep.settings import DEFAULT

DEPTH_MAX = 8
RAW_BYTES_MIN = 1 << 20  # roles smaller than this are not shown

# ours --------------------------------------------------------------------------------------------------------------


@dataclass
class Ours:
    """What a role costs with our codecs: bytes, seconds, and which codec took how many bytes."""

    raw: int = 0
    stored: int = 0
    raw_based: int = 0
    stored_based: int = 0
    entropy: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: {"encode": 0.0, "decode": 0.0, "memcpy": 0.0})
    encoded: int = 0
    """Raw bytes of chunks that were encoded, not referenced."""
    kinds: dict[str, int] = field(default_factory=dict)

    def timed(self, what: str, call: Callable[[], Any]) -> Any:
        begun = time.thread_time()
        result = call()
        self.seconds[what] += time.thread_time() - begun
        return result

    def speed(self, what: str) -> float | None:
        return self.encoded / self.seconds[what] / 1e9 if self.seconds[what] else None


@dataclass
class Chunk:
    dtype: str
    data: Array


def chunks(checkpoint: dict[str, Array], roles: dict[str, str], role: str) -> Iterator[Chunk]:
    """As a save lays them out: large leaves for themselves, small ones of one type together."""
    small: dict[str, list[Array]] = {}
    for name, value in checkpoint.items():
        if roles[name] != role:
            continue
        flat, dtype = np.ascontiguousarray(value).reshape(-1).view(np.uint8), name_of(value.dtype)
        if flat.nbytes < DEFAULT.small_leaf_bytes:
            small.setdefault(dtype, []).append(flat)
        else:
            yield from _cut(dtype, flat)
    for dtype, flats in small.items():
        yield from _cut(dtype, np.concatenate(flats))


def _cut(dtype: str, flat: Array) -> Iterator[Chunk]:
    size = DEFAULT.chunk_bytes_max
    return (Chunk(dtype, np.array(flat[start : start + size])) for start in range(0, flat.nbytes, size))


def measure_ours(sequence: Sequence, role: str, count: int) -> Ours:
    found, before, depths = Ours(), list[Chunk](), list[int]()
    for number in range(count):
        now = list(chunks(sequence[number], sequence.roles, role))
        depths = depths or [0] * len(now)
        for index, chunk in enumerate(now):
            base = before[index].data if before else None
            found.raw += chunk.data.nbytes
            if base is not None and np.array_equal(base, chunk.data):
                found.kinds["same"] = found.kinds.get("same", 0) + chunk.data.nbytes
                found.raw_based += chunk.data.nbytes
                continue
            depths[index] = _encode(found, chunk, base if depths[index] < DEPTH_MAX else None, depths[index])
        before = now
    return found


def _encode(found: Ours, chunk: Chunk, base: Array | None, depth: int) -> int:
    """Adds one chunk; answers its depth."""
    data, copied = chunk.data, np.ones_like(chunk.data)
    options = (DEFAULT.zstd_level, DEFAULT.sample_bytes, DEFAULT.worth_ratio)
    codec, pieces = found.timed("encode", lambda: codecs.encode(data, chunk.dtype, *options, base=base))
    stored = memoryview(b"".join(pieces))
    plain = found.timed("decode", lambda: codecs.decode(codec, stored, data.nbytes, base))
    found.timed("memcpy", lambda: np.copyto(copied, data))
    if not np.array_equal(plain, data):
        raise SystemExit("a chunk did not come back as it was")
    found.encoded += data.nbytes
    found.stored += len(stored)
    name = codecs.NAMES[codec]
    found.kinds[name] = found.kinds.get(name, 0) + data.nbytes
    if base is not None:
        found.raw_based += data.nbytes
        found.stored_based += len(stored)
        found.entropy += min(entropy_of_residual(chunk, base), entropy_alone(chunk), data.nbytes)
    return depth + 1 if codec == codecs.DELTA else 0


def entropy_of_residual(chunk: Chunk, base: Array) -> float:
    """Bytes: of sign, bit length and three more bits given the base's exponent; the bits below count in full."""
    form = delta.form_of(chunk.dtype, chunk.data.nbytes)
    words = delta.residual(chunk.data, base, form)
    key = delta.exponents(base, form).astype(np.int64) if form.grouped else np.zeros(words.size, np.int64)
    length = np.frexp(words.astype(np.float64))[1].astype(np.int64)
    below = np.maximum(length - 4, 0)
    symbol = (length << 4) + (words >> below.astype(words.dtype)).astype(np.int64)
    cells = np.bincount((key << 11) + np.minimum(symbol, 2047))
    return (_bits(cells) - _bits(np.bincount(key)) + float(below.sum())) / 8


def entropy_alone(chunk: Chunk) -> float:
    """Bytes: of the exponent and up to three more bits; the bits below count in full."""
    form = planes.form_of(chunk.dtype, chunk.data.nbytes)
    words = planes.turned(chunk.data, form)
    below = max(0, 8 * form[0] - 11)
    return (_bits(np.bincount((words >> below).astype(np.int64))) + below * words.size) / 8


def _bits(cells: Array) -> float:
    seen = cells[cells > 0].astype(np.float64)
    return float((seen * np.log2(seen.sum() / seen)).sum())


# other ways --------------------------------------------------------------------------------------------------------

Way = Callable[[Array, "Array | None"], int]
"""(a role's arrays end to end, those of the checkpoint before or None) -> stored bytes"""


def zstd_alone(now: Array, before: Array | None) -> int:
    return len(zstandard.ZstdCompressor(level=3).compress(memoryview(now.view(np.uint8))))


def xor_planes(now: Array, before: Array | None) -> int:
    words = now.view(f"u{now.itemsize}")
    if before is not None:
        words = words ^ before.view(words.dtype)
    compressor = zstandard.ZstdCompressor(level=3)
    return sum(len(compressor.compress(memoryview(row))) for row in planes.split(words))


class FloatDifference:
    """Differences of floats under gzip; restored by adding them up again, as its reader has to."""

    def __init__(self) -> None:
        self._restored: Array | None = None
        self.wrong = self.all = 0

    def __call__(self, now: Array, before: Array | None) -> int:
        with np.errstate(all="ignore"):
            stored = now if before is None or self._restored is None else now - before
            self._restored = now.copy() if stored is now else self._restored + stored
        bits = f"u{now.itemsize}"
        self.wrong += int((self._restored.view(bits) != now.view(bits)).sum())
        self.all += now.size
        return len(gzip.compress(memoryview(np.ascontiguousarray(stored).view(np.uint8)), 6))


class ZipNN:
    """zipnn 0.5, one thread, its own difference (XOR) to the checkpoint before."""

    def __init__(self) -> None:
        import zipnn

        self._make = zipnn.ZipNN

    def __call__(self, now: Array, before: Array | None) -> int:
        name = {"float32": "float32", "float16": "float16", "bfloat16": "bfloat16"}[now.dtype.name]
        options = {"bytearray_dtype": name, "input_format": "byte", "threads": 1}
        data = bytearray(now.view(np.uint8))  # its own copy: compress() changes its input
        if before is None:
            return len(self._make(**options).compress(data))
        base = bytearray(before.view(np.uint8))
        return len(self._make(**options, delta_compressed_type="byte").compress(data, delta_second_data=base))


# Ways that take one role's arrays. What keeps whole files (restic, borg) cannot tell roles apart: benchmarks.whole.
WAYS: dict[str, Callable[[], Way]] = {
    "zstd": lambda: zstd_alone,
    "xor": lambda: xor_planes,
    "float": FloatDifference,
    "zipnn": ZipNN,
}
HEADS = {"zstd": "zstd-3", "xor": "XOR, planes, zstd-3", "float": "float -, gzip-6 (wrong)", "zipnn": "zipnn delta"}


def measure_way(way: Way, sequence: Sequence, role: str, count: int) -> float:
    raw = stored = 0
    before: Array | None = None
    for number in range(count):
        checkpoint = sequence[number]
        names = [name for name in checkpoint if sequence.roles[name] == role]
        now = np.concatenate([checkpoint[name].reshape(-1) for name in names])
        raw += now.nbytes
        stored += way(now, before if number % (DEPTH_MAX + 1) else None)
        before = now
    return stored / raw


# the table ---------------------------------------------------------------------------------------------------------


def available(names: list[str]) -> list[str]:
    found = []
    for name in names:
        try:
            WAYS[name]()
            found.append(name)
        except ImportError:
            timing.say(f"{name} is not installed: pip install 'everystep[bench]'")
    return found


def measure(name: str, count: int, ways: list[str]) -> Iterator[dict[str, Any]]:
    sequence = sequences.load(name)
    sizes: dict[str, int] = {}
    for key, value in sequence[0].items():
        sizes[sequence.roles[key]] = sizes.get(sequence.roles[key], 0) + value.nbytes
    for role, size in sizes.items():
        if size < RAW_BYTES_MIN:
            continue
        timing.say(f"{name} {role}")
        ours = measure_ours(sequence, role, count)
        row: dict[str, Any] = {
            "sequence": name, "role": role, "checkpoint_bytes": size, "stored": ours.stored / ours.raw,
            "based": ours.stored_based / ours.raw_based if ours.raw_based else None,
            "order_0": ours.entropy / ours.raw_based if ours.raw_based else None,
            "kinds": {kind: part / ours.raw for kind, part in sorted(ours.kinds.items())},
            **{f"{what}_gb_s": ours.speed(what) for what in ours.seconds},
            "ways": {},
        }  # fmt: skip
        for each in ways:
            way = WAYS[each]()
            row["ways"][each] = {"stored": measure_way(way, sequence, role, count)}
            if isinstance(way, FloatDifference):
                row["ways"][each]["wrong"] = way.wrong / way.all
        yield row


def shown(row: dict[str, Any], ways: list[str]) -> list[str]:
    def number(value: float | None, digits: int = 4) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    others = []
    for way in ways:
        found = row["ways"][way]
        wrong = f" ({100 * found['wrong']:.1f} %)" if "wrong" in found else ""
        others.append(number(found["stored"]) + wrong)
    kinds = " ".join(f"{kind} {100 * part:.0f}" for kind, part in row["kinds"].items())
    return [
        f"{row['sequence']} {row['role']}", f"{row['checkpoint_bytes'] / 1e6:.1f}", *others, number(row["stored"]),
        number(row["based"]), number(row["order_0"]), kinds,
        *(number(row[f"{what}_gb_s"], 2) for what in ("encode", "decode", "memcpy")),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(sequences.RECIPES))
    parser.add_argument("--count", type=int, default=sequences.COUNT, help="checkpoints of each sequence")
    parser.add_argument("--peers", default=",".join(WAYS), help="none, or any of " + ", ".join(WAYS))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    unknown = {*args.names} - {*sequences.RECIPES} or {*args.peers.split(",")} - {*WAYS, "none"}
    if unknown or not 1 <= args.count <= sequences.COUNT:
        parser.error(f"not known: {', '.join(sorted(unknown)) or args.count}")
    ways = available([way for way in args.peers.split(",") if way != "none"])
    rows = [row for name in args.names for row in measure(name, args.count, ways)]
    head = [
        "sequence, role", "MB", *(HEADS[way] for way in ways), "ours", "ours, with a base", "order-0",
        "% of raw by codec", "enc GB/s", "dec GB/s", "memcpy",
    ]  # fmt: skip
    text = timing.table(head, [shown(row, ways) for row in rows])
    timing.show("stored / raw of a history, by role", text, {"count": args.count, "rows": rows}, args.json)


if __name__ == "__main__":
    main()
