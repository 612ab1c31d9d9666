"""Makes a golden repository of this format: python tests/golden/make.py FOLDER RUN…

format-1 has the runs tiny, kinds, deltas and ranks, of a writer that knew no codec but RAW, PLANES and DELTA;
format-1-packed has packed, of one with the kernel.
"""

from __future__ import annotations

import collections
import itertools
import json
import random
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
from blake3 import blake3

import everystep
from everystep.seam import Process, Seam
from everystep.storage.probe import YES, Finding
from everystep.vault.place import _Known

# A chunk is 4096 bytes at most, nothing is compressed and nothing leans on a base: the bytes depend on no version of
# zstd, and on no estimate of what pays.
PLAIN = everystep.Settings(
    chunk_bytes_max=4096, small_leaf_bytes=1024, sample_bytes=0, worth_ratio=0.0, base_depth_max=0
)
SMALL = everystep.Settings(chunk_bytes_max=4096, small_leaf_bytes=1024, sample_bytes=256)
RANKS = 2
KINDS = "größe/1.x"


def fixed_fingerprint(seam: Seam) -> dict[str, Any]:
    """Instead of the surroundings, which differ from machine to machine."""
    return {"everystep": "0.1.0"}


class FixedSeam(Seam):
    """An outside without chance: the clock stands still, and random tokens count 1, 2, 3 …"""

    def __init__(self) -> None:
        super().__init__()
        self._count = itertools.count(1)

    def now(self) -> float:
        return 1_700_000_000.0

    def monotonic(self) -> float:
        return 0.0

    def token(self, size: int) -> str:
        return f"{next(self._count):0{2 * size}x}"

    def process(self) -> Process:
        return Process("example", "", "", 1, "1")


class RunningSeam(FixedSeam):
    """The same, but waiting comes to an end."""

    def monotonic(self) -> float:
        return Seam.monotonic(self)


def opened(place: str, settings: everystep.Settings) -> everystep.Repository:
    """Without place.json: it is about one place, and to find out what it says takes tokens from what is written."""
    repository = everystep.open(place, settings=settings, seam=FixedSeam())
    known = _Known("everystep place", place, Finding(YES), 0.0, "")
    repository._place.finding, repository._place._kept = known.finding, known
    return repository


def tiny_state(step: int) -> dict[str, Any]:
    """One leaf of three chunks, of which the first changes, a small one of the optimizer, and a plain value."""
    w = np.arange(3000, dtype="<f4")
    w[:4] = step
    return {"w": w, "opt": {"m": np.full(4, 0.5 * step, "<f4")}, "epoch": step}


def make_tiny(place: str) -> dict[str, bytes]:
    """The example of docs/format.md: two checkpoints, a tag. Made in memory, where no token is drawn for a file."""
    repo = opened(f"memory://{place}", PLAIN)
    run = repo.run("tiny", config={"lr": 0.1})
    run.track(rng=False)
    run.attach("note.txt", b"a small file")
    run.save(1, state=tiny_state(1), metrics={"loss": 0.5}).wait()
    run.record(step=2, loss=0.375)
    run.save(3, state=tiny_state(3), metrics={"loss": 0.25}).wait().tag("best")
    run.close()
    return dict(repo._place.storage.objects)


Point = collections.namedtuple("Point", "x y")
STRUCTURED = np.dtype(
    {"names": ["a", "ü", "\ud800"], "formats": ["<f4", (">u2", (2,)), "S3"], "offsets": [0, 8, 12], "itemsize": 16}
)


def kinds_state(step: int) -> dict[Any, Any]:
    """Every kind of node, plain value and element type that NumPy alone has, and each form of the codec."""
    smooth = (np.arange(2048) / 512 + step).astype("<f8")
    return {
        "wide": {name: smooth.astype(name) for name in ("<f2", "<f4", "<f8", "<c8", "<c16", "<i2", "<u4", "<i8")},
        "bfloat16": smooth.astype(ml_dtypes.bfloat16),
        "noise": np.frombuffer(np.random.PCG64(step).random_raw(600).astype("<u8").tobytes(), "<f4"),
        "swapped": smooth[:5].astype(">f8"),
        "record": np.zeros(2, STRUCTURED),
        "recarray": np.asarray(np.rec.fromarrays([[1, 2], [3.5, 4.5]], names="n,v")),
        "ml": {
            name: np.arange(3).astype(getattr(ml_dtypes, name)) for name in ("float8_e4m3fn", "float8_e5m2", "int4")
        },
        "times": np.array(["2020-01-01", "NaT"], "M8[D]"),
        "text": np.array(["a", "üb"]),
        "empty": np.zeros((0, 3), "<i2"),
        "nothing": np.zeros(3, "V0"),
        "scalars": [np.float32(1.5), np.longlong(-3), np.str_("x\0"), np.bool_(True)],
        "plain": [None, True, 1 << 80, -0.0, float("nan"), 1j, "\ud800", b"\xff", ()],
        "long": ["x" * 5000, b"y" * 5000],
        ("a", 1, 2.5): collections.OrderedDict({"a/b": 1, "%": 2, "[0]": 3, "": 4}),
        "counter": collections.Counter({"x": step}),
        "point": Point(np.full(2, step, "<i4"), None),
        "tied": [smooth, smooth],
    }


def torch_state(step: int) -> dict[str, Any]:
    import torch

    x = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4) + step
    return {
        "model": {"w": x.bfloat16(), "view": x.transpose(0, 2), "bias": torch.tensor(float(step))},
        "sparse": torch.eye(3).to_sparse(),
        "quantized": torch.quantize_per_tensor(x, 0.5, 10, torch.quint8),
        "constants": [torch.float16, torch.device("cuda", 1), torch.Size([2, 3])],
        "complex": torch.view_as_complex(x[..., :2].contiguous()).conj(),
    }


def make_kinds(folder: str) -> None:
    import torch

    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    run = opened(folder, SMALL).run(KINDS)
    for step in (1, 2):
        run.save(step, state={"numpy": kinds_state(step), "torch": torch_state(step)}, metrics={"loss": 1e-7}).wait()
    run.close()


DELTAS = 11


def delta_states() -> Iterator[dict[str, Any]]:
    """Leaves that change a little at each step, leaves that change at some, and one that never does."""
    random = np.random.Generator(np.random.PCG64(7))
    wide = (random.normal(size=3000) * np.exp(3 * random.normal(size=3000))).astype("<f4")
    floats = random.normal(size=400)
    integers = np.cumsum(random.integers(0, 5, 400))
    table = random.integers(0, 256, 1200, "u1")
    for step in range(1, DELTAS + 1):
        floats *= 1 + 1e-4 * random.normal(size=400)
        integers[:: 1 + step] += step % 3
        if step in (2, 3, 4, 10):
            wide += (1e-5 * random.normal(size=3000)).astype("<f4")
            table[random.integers(0, 1200, 20)] ^= 1
        yield {
            "wide": wide.copy(),
            "floats": {name: floats.astype(name) for name in ("<f2", "<f8")},
            "bfloat16": floats.astype(ml_dtypes.bfloat16),
            "float8": (np.repeat(floats, 3) + step).astype(ml_dtypes.float8_e4m3fn),
            "integers": {name: integers.astype(name) for name in ("<i2", "<u4", "<i8", ">i4")},
            "table": table.copy(),
            "still": np.arange(300, dtype="<f4"),
            "optimizer": {"m": (floats * 0.1).astype("<f4")},
            "step": step,
        }


def save_each(folder: str, name: str, states: Iterable[dict[str, Any]]) -> None:
    """A run with a checkpoint of each of these, in chunks that hold one leaf."""
    settings = replace(SMALL, chunk_bytes_max=32768, small_leaf_bytes=1000)
    run = opened(folder, settings).run(name)
    run.track(rng=False)
    for step, state in enumerate(states, 1):
        run.save(step, state=state).wait()
    run.close()


def make_deltas(folder: str) -> None:
    """Chains of checkpoints that lean on each other, longer than a chain may be."""
    save_each(folder, "deltas", delta_states())


PACKED = 3


def packed_states() -> Iterator[dict[str, Any]]:
    """Words of every width: some of which all move a little, and some of which few do."""
    random = np.random.Generator(np.random.PCG64(11))
    floats = random.normal(size=5000) * np.exp(random.normal(size=5000))
    integers = np.cumsum(random.integers(0, 40, 2500))
    few = {
        "bfloat16": floats[:4000].astype(ml_dtypes.bfloat16).view("<u2"),
        "<f8": floats[:3000].view("<u8").copy(),
        "float8": floats[:3000].astype(ml_dtypes.float8_e4m3fn).view("u1"),
        "<i4": integers.astype("<u4"),
    }
    types = {"bfloat16": ml_dtypes.bfloat16, "float8": ml_dtypes.float8_e4m3fn}
    for step in range(1, PACKED + 1):
        floats *= 1 + 1e-4 * random.normal(size=5000)
        floats[random.integers(0, 5000, 20)] *= -8
        coarse = floats * np.exp(0.05 * random.normal(size=5000))
        integers += random.integers(0, 3, 2500)
        for words in few.values():
            where = random.random(words.size) < 0.12
            words[where] += random.integers(1, 4, where.sum()).astype(words.dtype)
        yield {
            "all": {
                "<f4": floats.astype("<f4"),
                "<f2": coarse[:1500].astype("<f2"),
                "<f8": floats[:1100].copy(),
                "float8": coarse[:2000].astype(ml_dtypes.float8_e5m2),
                "<i8": integers[:1500].copy(),
                "<i2": integers[:1100].astype("<i2"),
            },
            "few": {name: words.view(types.get(name, name)).copy() for name, words in few.items()},
            "step": step,
        }


def make_packed(folder: str) -> None:
    """Chunks in codes for each exponent, of the whole and of what changed."""
    save_each(folder, "packed", packed_states())


def rank_state(step: int, rank: int) -> dict[str, Any]:
    """A leaf in two boxes, one that each rank has whole, and one of this rank alone."""
    half = np.full((4, 300), 10 * step + rank, "<f4")
    return {
        "split": everystep.Part(half, (4 * rank, 0), (8, 300)),
        "same": np.arange(5) * step,
        f"own{rank}": np.arange(rank + 1),
    }


def make_ranks(folder: str) -> None:
    repo = everystep.open(folder, settings=replace(SMALL, rank_deadline_seconds=30), seam=RunningSeam())
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            run = repo.run("ranks", rank=rank, ranks=RANKS, launch="together")
            run.track(rng=False)
            for step in (1, 2):
                run.save(step, state=rank_state(step, rank)).wait()
            run.close()
        except BaseException as error:  # noqa: BLE001  a thread's error must reach the caller
            errors.append(error)

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def told(value: Any, path: str = "") -> Iterator[str]:
    """A loaded state line by line: every array by its type, shape and the BLAKE3 of its bytes."""
    if isinstance(value, dict) or type(value) in (list, tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        yield f"{path} = {'dict' if isinstance(value, dict) else type(value).__name__} of {len(value)}"
        for key, child in pairs:
            yield from told(child, f"{path}[{key!a}]")
    elif isinstance(value, (np.str_, np.bytes_)):
        wide = isinstance(value, np.str_)
        body = value.encode("utf-32-le", "surrogatepass") if wide else bytes(value)
        yield f"{path} = {f'<U{len(value)}' if wide else f'|S{len(value)}'} () {blake3(body).hexdigest()}"
    elif isinstance(value, (np.ndarray, np.generic)):
        array = np.asarray(value)
        name = array.dtype.name if array.dtype.str[1] == "V" else array.dtype.str
        yield f"{path} = {name} {array.shape} {blake3(array.tobytes()).hexdigest()}"
    elif isinstance(value, (str, bytes)) and len(value) > 100:
        yield f"{path} = {type(value).__name__} {blake3(ascii(value).encode()).hexdigest()}"
    else:
        yield f"{path} = {type(value).__name__} {value!a}"


def listing(folder: str) -> dict[str, dict[str, list[str]]]:
    """run -> step -> what is loaded."""
    repo = everystep.open(folder)
    return {
        name: {str(one.step): [f"metrics {one.metrics}", *told(one.load())] for one in repo[name].checkpoints()}
        for name in repo
    }


def store_tiny(folder: str) -> None:
    for key, body in make_tiny(folder).items():
        Path(folder, key).parent.mkdir(parents=True, exist_ok=True)
        Path(folder, key).write_bytes(body)


RUNS = {"tiny": store_tiny, "kinds": make_kinds, "deltas": make_deltas, "ranks": make_ranks, "packed": make_packed}


def main(folder: Path, *names: str) -> None:
    if folder.exists():
        sys.exit(f"{folder} is there already: a golden repository is never changed; a new format gets a new one")
    with mock.patch("everystep.run.fingerprint", fixed_fingerprint):
        for name in names:
            RUNS[name](str(folder))
    text = json.dumps(listing(str(folder)), indent=1, ensure_ascii=False)
    folder.with_suffix(".json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
