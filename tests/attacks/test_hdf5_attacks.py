"""Hostile HDF5 files: nothing leads to another file, nothing grows beyond its bounds, nothing false comes back."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from _attacks import every_damage_is_an_error, nothing_happens, refused
from _formats import check

from everystep import formats
from everystep.errors import Damaged, StorageError, Unsupported
from everystep.seam import Files, Seam

pytestmark = pytest.mark.timeout(120)
ZEROS = zlib.compress(bytes(300 << 20))
"""300 MiB in 300 KiB."""


def file(fill: Callable[[Any], Any], **options: Any) -> bytes:
    out = io.BytesIO()
    with h5py.File(out, "w", **options) as made:
        fill(made)
    return out.getvalue()


def raw_chunk(made: Any, data: bytes, **options: Any) -> None:
    """A packed dataset whose one chunk is these bytes."""
    one = made.create_dataset("x", (1000,), "u1", chunks=(1000,), compression="gzip", **options)
    one.id.write_direct_chunk((0,), data)


def patched(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) == 1 and len(old) == len(new)
    return data.replace(old, new)


def endless_text(count: int) -> bytes:
    def fill(made: Any) -> None:
        made.create_dataset("x", data=np.array(["a" * 100_000], object), dtype=h5py.string_dtype())
        made.create_dataset("y", (count,), h5py.string_dtype())[:] = ""

    data = bytearray(file(fill))
    with h5py.File(io.BytesIO(data)) as f:
        one, many = f["x"].id.get_offset(), f["y"].id.get_offset()
    data[many : many + 16 * count] = data[one : one + 16] * count
    return bytes(data)


def of_shape(count: int, kind: str = "u1", **options: Any) -> bytes:
    return file(lambda f: f.create_dataset("x", (count,), kind, **options))


def one_chunk(data: bytes, **options: Any) -> bytes:
    return file(lambda f: raw_chunk(f, data, **options))


NOISE = zlib.compress(np.random.default_rng(0).bytes(1000))
TRUE = file(lambda f: f.create_dataset("x", data=np.array([True] * 9)))
ATTACKS: dict[str, tuple[Callable[[], bytes], str]] = {
    "shape without bytes": (lambda: of_shape(1 << 40, "f8", chunks=(1 << 20,)), "unsupported"),
    "shape never written": (lambda: of_shape(1 << 45), "unsupported|damaged"),
    "chunks of nothing": (lambda: of_shape(1 << 29, chunks=(1,)), "unsupported"),
    "unpacks to more": (lambda: one_chunk(ZEROS), "damaged"),
    "unpacks to more, shuffled": (lambda: one_chunk(ZEROS, shuffle=True), "damaged"),
    "unpacks to less": (lambda: one_chunk(zlib.compress(bytes(999))), "damaged"),
    "packed garbage": (lambda: one_chunk(b"\xff" * 500), "damaged"),
    "cut off": (lambda: one_chunk(NOISE[:-50]), "damaged"),
    "texts without end": (lambda: endless_text(100_000), "unsupported"),
    "no superblock": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(500), "unsupported"),
    "a strange superblock": (lambda: b"\x89HDF\r\n\x1a\n" + b"\xff" * 500, "damaged"),
    "truth values": (lambda: patched(TRUE, b"\1" * 9, b"\2" * 9), "damaged"),
}


@pytest.mark.parametrize("make, kind", ATTACKS.values(), ids=ATTACKS)
def test_attacks_are_refused(make: Callable[[], bytes], kind: str, tmp_path: Path) -> None:
    refused(make(), kind, tmp_path / "old", "weights.h5")


def test_nothing_leads_to_another_file(tmp_path: Path) -> None:
    """Whatever lies there stays unread: the file, a raw file, and what a virtual dataset is made of."""
    secret = tmp_path / "secret.h5"
    secret.write_bytes(file(lambda f: f.create_dataset("x", data=np.arange(4.0))))
    (tmp_path / "raw").write_bytes(b"secret!!")

    def fill(made: Any) -> None:
        made["link"] = h5py.ExternalLink(str(secret), "/x")
        made.create_dataset("raw", (8,), "u1", external=[(str(tmp_path / "raw"), 0, 8)])
        layout = h5py.VirtualLayout((4,), "f8", maxshape=(None,))
        layout[: h5py.h5s.UNLIMITED : 1] = h5py.VirtualSource(str(secret), "x", (4,), maxshape=(None,))[
            : h5py.h5s.UNLIMITED : 1
        ]
        made.create_virtual_dataset("virtual", layout)
        made["good"] = np.ones(2)

    data = file(fill)
    secret.unlink()
    (tmp_path / "raw").unlink()
    with nothing_happens():
        content = formats.read(data)
    assert {one.path for one in content.not_understood} == {"link", "raw", "virtual"}
    check({"good": np.ones(2)}, content.understood())


def test_filters_are_not_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The library loads a program for a filter that it does not know: it is never asked to."""
    data = bytearray(file(lambda f: f.create_dataset("x", data=np.zeros(100), chunks=(100,), compression="lzf")))
    at = data.index((32000).to_bytes(2, "little"))
    data[at : at + 2] = (32100).to_bytes(2, "little")
    with nothing_happens():
        content = formats.read(bytes(data))
    assert [one.class_name for one in content.not_understood] == ["HDF5 dataset packed by filter 32100"]


@pytest.mark.parametrize("depth", [10, 63, 65, 3000])
def test_groups_in_groups_end(depth: int) -> None:
    def fill(made: Any) -> None:
        at = made
        for _ in range(depth):
            at = at.create_group("g")
        at["x"] = np.ones(1)

    with nothing_happens():
        content = formats.read(file(fill))
    assert bool(content.not_understood) == (depth > 64)


def test_groups_that_share_groups_are_walked_once() -> None:
    """Thirty groups, each twice in the one before: a thousand million paths."""

    def fill(made: Any) -> None:
        at = made
        for _ in range(30):
            inner = at.create_group("a")
            at["b"] = inner
            at = inner

    with nothing_happens():
        assert len(formats.read(file(fill)).not_understood) == 30


def test_datasets_in_one_place_are_refused(tmp_path: Path) -> None:
    """Forty times the same bytes, which are more than the file then."""

    def fill(made: Any) -> None:
        made["big"] = np.zeros(100_003, "u1")
        for number in range(40):
            made[f"small{number}"] = np.zeros(7919, "u1")

    data = file(fill)
    with h5py.File(io.BytesIO(data)) as f:
        places = {name: f[name].id.get_offset() for name in f}
    data = data.replace((7919).to_bytes(8, "little"), (100_003).to_bytes(8, "little"))
    for place in places.values():
        data = data.replace(place.to_bytes(8, "little"), places["big"].to_bytes(8, "little"))
    assert "overlaps" in refused(data, "damaged", tmp_path / "old", "x.h5").what


# ---------------------------------------------------------------------------------------- cuts and flipped bits


def small(**options: Any) -> bytes:
    def fill(made: Any) -> None:
        made["g/a"] = np.arange(6, dtype="f4").reshape(2, 3)
        made["g/b"] = made["g/a"]
        made.create_dataset("c", data=np.arange(50, dtype="i2"), chunks=(20,), compression="gzip", shuffle=True)
        made.create_dataset("f", data=np.arange(30, dtype="u1"), chunks=(8,), fletcher32=True)
        made["text"] = "some"
        made["texts"] = np.array(["a", "bc"], h5py.string_dtype())
        for number in range(12):
            made[f"many/{number}"] = np.array(number)
            made["many"].attrs[f"a{number}"] = number
        made["g"].attrs["note"] = "é"
        made["g/a"].attrs["list"] = [1, 2, 3]

    return file(fill, **options)


@pytest.mark.parametrize("version", ["earliest", "latest"])
def test_damage_is_an_error_or_stays_within_its_arrays(version: str) -> None:
    data = small(libver=version)
    every_damage_is_an_error(data, formats.read, lambda got: True, tries=600, checked=False)


def test_damage_of_ours(tmp_path: Path) -> None:
    state = {"w": np.arange(6.0).reshape(2, 3), "n": {"step": 7, "betas": (0.9, 0.999)}, "f": np.array([True])}
    data = Path(formats.write(tmp_path / "x.h5", state).path).read_bytes()
    with nothing_happens(mib=256):
        every_damage_is_an_error(data, formats.read, lambda got: True, tries=600, checked=False)


def test_a_false_table_of_a_nested_state() -> None:
    for table in (b"{", b'{"format":1,"nodes":[["leaf",0]],"values":[],"leaves":[["gone","<f4","array"]]}'):
        data = file(lambda f, table=table: f.create_dataset("__everystep__", data=np.frombuffer(table, "u1")))
        with pytest.raises(Damaged):
            formats.read(data)
    with pytest.raises(Damaged, match="no array of bytes"):
        formats.read(file(lambda f: f.create_dataset("__everystep__", data=np.ones(3))))
    with pytest.raises(Unsupported, match="newer"):
        table = b'{"format":9,"nodes":[],"values":[],"leaves":[]}'
        formats.read(file(lambda f: f.create_dataset("__everystep__", data=np.frombuffer(table, "u1"))))


class Failing(Files):
    def read(self, fd: int, into: memoryview, offset: int) -> int:
        if offset:
            raise OSError(5, "injected")
        return super().read(fd, into, offset)


def test_an_error_of_the_disk_is_that_error(tmp_path: Path) -> None:
    """It passes by the library, which knows no errors but its own."""
    (tmp_path / "x.h5").write_bytes(small())
    with pytest.raises(StorageError, match="injected"):
        formats.read(tmp_path / "x.h5", format="hdf5", seam=Seam(Failing()))
