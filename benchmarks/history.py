"""What the bytes of a history are made of: our codecs by the role of the arrays, next to their bound.

python -m benchmarks.history [gpt cnn ft_bf16 frozen lora emb] [--count 30] [--json]

Every checkpoint is kept. Each chunk is encoded against the previous checkpoint's, and alone again after as many
differences in a row as `base_depth_max` allows; a chunk that did not change is referenced. Sizes are stored bytes / raw
bytes, speeds raw bytes per second of one thread's processor time (benchmarks.codec measures them for their own sake).

`with a base` leaves out the chunks that start a row of differences. `bound` is for the same chunks the entropy of the
residual given the base's exponent or, where that is less, of the value alone (benchmarks.bound).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks import bound, results, sequences, timing
from benchmarks.chunks import Chunk, chunks
from benchmarks.results import Table, number
from benchmarks.sequences import Array, Sequence
from everystep import codecs
from everystep.settings import DEFAULT

RAW_BYTES_MIN = 1 << 20  # roles smaller than this are not shown


@dataclass
class Ours:
    """What a role costs with our codecs: bytes, seconds, and which codec took how many bytes."""

    raw: int = 0
    stored: int = 0
    raw_based: int = 0
    stored_based: int = 0
    bound: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: {"encode": 0.0, "decode": 0.0})
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


def measure_role(sequence: Sequence, role: str, count: int) -> Ours:
    found, before, depths = Ours(), list[Chunk](), list[int]()
    for index in range(count):
        now = list(chunks(sequence[index], sequence.roles, role))
        depths = depths or [0] * len(now)
        for at, chunk in enumerate(now):
            base = before[at].data if before else None
            found.raw += chunk.data.nbytes
            if base is not None and np.array_equal(base, chunk.data):
                found.kinds["same"] = found.kinds.get("same", 0) + chunk.data.nbytes
                found.raw_based += chunk.data.nbytes
                continue
            depths[at] = _encode(found, chunk, base if depths[at] < DEFAULT.base_depth_max else None, depths[at])
        before = now
    return found


def _encode(found: Ours, chunk: Chunk, base: Array | None, depth: int) -> int:
    """Adds one chunk; answers its depth."""
    data = chunk.data
    options = (DEFAULT.zstd_level, DEFAULT.sample_bytes, DEFAULT.worth_ratio)
    codec, pieces = found.timed("encode", lambda: codecs.encode(data, chunk.dtype, *options, base=base))
    stored = memoryview(b"".join(pieces))
    plain = found.timed("decode", lambda: codecs.decode(codec, stored, data.nbytes, base))
    if not np.array_equal(plain, data):
        raise SystemExit("a chunk did not come back as it was")
    found.encoded += data.nbytes
    found.stored += len(stored)
    name = codecs.NAMES[codec]
    found.kinds[name] = found.kinds.get(name, 0) + data.nbytes
    if base is not None:
        found.raw_based += data.nbytes
        found.stored_based += len(stored)
        found.bound += bound.of(data, base, chunk.dtype)
    return depth + 1 if codec in codecs.LEANING else 0


def measure(name: str, count: int) -> Iterator[dict[str, Any]]:
    sequence = sequences.load(name, count)
    sizes: dict[str, int] = {}
    for key, value in sequence[0].items():
        sizes[sequence.roles[key]] = sizes.get(sequence.roles[key], 0) + value.nbytes
    for role, size in sizes.items():
        if size < RAW_BYTES_MIN:
            continue
        timing.say(f"{name} {role}")
        ours = measure_role(sequence, role, count)
        yield {
            "sequence": name, "role": role, "checkpoint_bytes": size, "stored": ours.stored / ours.raw,
            "based": ours.stored_based / ours.raw_based if ours.raw_based else None,
            "bound": ours.bound / ours.raw_based if ours.raw_based else None,
            "kinds": {kind: part / ours.raw for kind, part in sorted(ours.kinds.items())},
            **{f"{what}_gb_s": ours.speed(what) for what in ours.seconds},
        }  # fmt: skip


def shown(row: dict[str, Any]) -> list[str]:
    above = row["based"] - row["bound"] if row["based"] is not None else None
    return [
        f"{row['sequence']} {row['role']}", f"{row['checkpoint_bytes'] / 1e6:.1f}", number(row["stored"], 4),
        number(row["based"], 4), number(row["bound"], 4), number(above, 4),
        " ".join(f"{kind} {100 * part:.0f}" for kind, part in row["kinds"].items()),
        *(number(row[f"{what}_gb_s"], 2) for what in ("encode", "decode")),
    ]  # fmt: skip


def tables(result: dict[str, Any]) -> list[Table]:
    head = (
        "", "MB", "stored / raw", "with a base", "bound", "above it", "% of raw by codec", "enc GB/s", "dec GB/s",
    )  # fmt: skip
    title = f"Stored / raw by role, n = {result['count']}"
    return [Table(title, head, [shown(row) for row in result["rows"]])]


def main(arguments: list[str] | None = None) -> None:
    parser = results.parser("benchmarks.history", __doc__)
    parser.add_argument("names", nargs="*", help="sequences; default: all")
    parser.add_argument("--count", type=int, default=sequences.COUNT, help="checkpoints of each sequence")
    given = parser.parse_args(arguments)
    unknown = {*given.names} - {*sequences.RECIPES}
    if unknown or not 1 <= given.count <= sequences.LONG_COUNT:
        parser.error(f"not known: {', '.join(sorted(unknown)) or given.count}")
    rows = [row for name in given.names or sequences.RECIPES for row in measure(name, given.count)]
    result = {"count": given.count, "rows": rows}
    given.record = given.record and not given.names
    results.publish("history", result, tables(result), given, results.command("benchmarks.history", arguments))


if __name__ == "__main__":
    main()
