"""Checkpoints as protocol buffers, against the code that the real compiler makes of the .proto file."""

from __future__ import annotations

import importlib.util
import io
import json
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from _formats import NUMPY, PLAIN, check
from google.protobuf.proto import parse_length_prefixed, serialize_length_prefixed
from grpc_tools import protoc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_formats import states

import everystep
from everystep import formats
from everystep.errors import NotFound, Unsupported
from everystep.exchange import stream
from everystep.formats import protobuf, wire
from everystep.formats.file import made, opened
from everystep.formats.protobuf_read import Reading
from everystep.schema import Leaf
from everystep.seam import REAL

PROTO = Path(protobuf.__file__).parent / "checkpoint.proto"
MANY = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
STATE: dict[Any, Any] = {
    "model": {"w": np.arange(12.0).reshape(3, 4), "b": np.ones(3, ml_dtypes.bfloat16), "none": np.zeros((0, 4))},
    "optimizer": {"lr": 1e-3, "step": 7, "betas": (0.9, 0.999), "state": {0: {"exp_avg": np.full(3, -0.0, "f4")}}},
    (1, "a"): [np.float32(2.5), np.array(3), None, True, 2**70, 1 - 2j, b"ab", "x" * 9000],
}


@pytest.fixture(scope="session")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The module that the protocol buffer compiler makes."""
    folder = tmp_path_factory.mktemp("generated")
    assert protoc.main(["protoc", f"-I{PROTO.parent}", f"--python_out={folder}", PROTO.name]) == 0
    spec = importlib.util.spec_from_file_location("checkpoint_pb2", folder / "checkpoint_pb2.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def records(generated: Any, data: bytes) -> list[Any]:
    source = io.BytesIO(data)
    found = []
    while source.tell() < len(data):
        found.append(parse_length_prefixed(generated.Record, source))
    return found


def file_of(records: list[Any], crc: bool = True) -> bytes:
    """The file of these records; the last one's checksum is put right."""
    out = io.BytesIO()
    for record in records:
        if crc and record.WhichOneof("kind") == "end":
            record.end.crc32 = zlib.crc32(out.getvalue())
        serialize_length_prefixed(record, out)
    return out.getvalue()


def written(state: Any, **more: Any) -> bytes:
    sink = Sink()
    protobuf.write(state, sink, **more)  # type: ignore[arg-type]
    return sink.getvalue()


class Sink(io.BytesIO):
    name = "sink"


def plain_of(value: Any) -> Any:
    """A Value as a person would read it who has the .proto alone."""
    kind = value.WhichOneof("kind")
    if kind == "none":
        return None
    return json.loads(value.plain) if kind == "plain" else getattr(value, kind)


def nested(nodes: list[Any], arrays: list[Any]) -> Any:
    """The state, put together from the messages alone."""
    left = iter(nodes)

    def build(node: Any) -> Any:
        kind = node.WhichOneof("kind")
        if kind == "leaf":
            return arrays[node.leaf]
        if kind == "value":
            return plain_of(node.value)
        children = [next_child(left) for _ in range(node.container.size)]
        if node.container.kind in (4, 5):
            return [child for _, child in children]
        return {key if isinstance(key, (str, int)) else json.dumps(key): child for key, child in children}

    def next_child(left: Any) -> tuple[Any, Any]:
        node = next(left)
        return plain_of(node.key) if node.HasField("key") else None, build(node)

    return build(next(left))


# ------------------------------------------------------------------------------------- what is written, elsewhere read


def test_generated_code_reads_what_is_written(generated: Any) -> None:
    data = written(
        STATE, metadata={"step": "1200", "metrics": '{"loss": 0.25, "n": 3}', "who": "me"}, roles={"model/w": "weights"}
    )
    found = records(generated, data)
    assert [record.WhichOneof("kind") for record in found[:2]] == ["header", "structure"]
    header, end = found[0].header, found[-1].end
    assert (header.format, header.version, header.step, dict(header.metadata)) == (
        "everystep-checkpoint", 1, 1200, {"who": "me"},
    )  # fmt: skip
    assert (header.metrics["loss"].real, header.metrics["n"].integer) == (0.25, 3)
    last = io.BytesIO()
    serialize_length_prefixed(found[-1], last)
    assert end.crc32 == zlib.crc32(data[: -len(last.getvalue())])
    leaves = [record.leaf for record in found if record.WhichOneof("kind") == "leaf"]
    bodies: list[bytes] = []
    for record in found:
        if record.WhichOneof("kind") == "leaf":
            bodies.append(b"")
        elif record.WhichOneof("kind") == "piece":
            bodies[-1] += record.piece.data
    assert [leaf.nbytes for leaf in leaves] == [len(body) for body in bodies]
    assert (end.leaves, end.nbytes) == (len(leaves), sum(map(len, bodies)))
    by_path = {leaf.path: (leaf, body) for leaf, body in zip(leaves, bodies)}
    leaf, body = by_path["model/w"]
    assert (leaf.dtype, list(leaf.shape), leaf.role) == ("<f8", [3, 4], "weights")
    np.testing.assert_array_equal(np.frombuffer(body, "<f8").reshape(3, 4), STATE["model"]["w"])
    assert (by_path["model/b"][0].dtype, by_path["model/b"][1]) == ("bfloat16", STATE["model"]["b"].tobytes())
    nodes = [node for record in found if record.WhichOneof("kind") == "structure" for node in record.structure.nodes]
    state = nested(nodes, bodies)
    assert state["optimizer"] == {
        "lr": 1e-3, "step": 7, "betas": [0.9, 0.999], "state": {0: {"exp_avg": np.full(3, -0.0, "f4").tobytes()}},
    }  # fmt: skip
    assert state['{"t": [1, "a"]}'][2:7] == [
        None,
        True,
        {"i": hex(2**70)},
        {"c": struct.pack(">dd", 1, -2).hex()},
        b"ab",
    ]


@MANY
@given(state=states)
def test_written_again_by_generated_code_it_is_the_same_state(generated: Any, state: Any) -> None:
    data = written({"state": state})
    found = records(generated, data)
    assert sum(record.WhichOneof("kind") == "end" for record in found) == 1
    content = formats.read(file_of(found))
    check({"state": state}, content.state)
    check({"state": state}, formats.read(data).state)


def test_all_that_numpy_and_python_have_comes_back() -> None:
    for value in (*PLAIN, *(v for v in NUMPY if not isinstance(v, (np.str_, np.bytes_)))):
        check({"v": value}, formats.read(written({"v": value})).state)
    x = np.arange(4.0)
    got = formats.read(written({"a": x, "b": [x, x[::2]]})).state
    assert got["a"] is got["b"][0] and got["a"].flags.writeable
    assert np.array_equal(got["b"][1], x[::2]) and not np.shares_memory(got["b"][1], x)
    with pytest.raises(Unsupported, match="deep"):
        written({"deep": object()})


# ------------------------------------------------------------------------------------- what others write, read here


def other(generated: Any, *leaves: tuple[str, Any], pieces: int = 5, nodes: Any = ()) -> bytes:
    """A file as a program of somebody else writes it, in pieces of a few bytes."""
    made = generated.Record
    out = [made(header={"format": "everystep-checkpoint", "version": 1, "step": 9, "metadata": {"by": "other"}})]
    out[0].header.metrics["acc"].real = 0.5
    if nodes:
        out.append(made(structure={"nodes": nodes}))
    for path, array in leaves:
        body = array.tobytes()
        out.append(made(leaf={"path": path, "dtype": array.dtype.str, "shape": array.shape, "nbytes": len(body)}))
        out += [made(piece={"data": body[at : at + pieces]}) for at in range(0, len(body), pieces)]
    out.append(made(end={"leaves": len(leaves), "nbytes": sum(array.nbytes for _, array in leaves)}))
    return file_of(out)


def test_messages_of_generated_code_are_read(generated: Any) -> None:
    w, b = np.arange(6, dtype="<f4").reshape(2, 3), np.arange(3, dtype=">i2")
    content = formats.read(other(generated, ("w", w), ("b", b), ("empty", np.zeros((0, 2)))))
    check({"w": w, "b": b, "empty": np.zeros((0, 2))}, content.state)
    assert content.format == "protobuf" and content.metadata == {"by": "other", "step": "9", "metrics": '{"acc": 0.5}'}
    nodes = [
        {"container": {"kind": "DICT", "size": 2}},
        {"key": {"text": "net"}, "container": {"kind": "LIST", "size": 2}},
        {"leaf": 0},
        {"leaf": 0},
        {"key": {"integer": -3}, "container": {"kind": "NAMED_TUPLE", "size": 1, "name": "Point"}},
        {"key": {"text": "x"}, "value": {"real": float("nan")}},
    ]
    state = formats.read(other(generated, ("w", w), nodes=nodes)).state
    assert state["net"][0] is state["net"][1] and np.isnan(state[-3].x)
    check(w, state["net"][0])


def test_fields_of_later_versions_are_passed_over(generated: Any) -> None:
    found = records(generated, other(generated, ("w", np.ones(3))))
    unknown = wire.number(99, 5) + wire.message(98, b"abc") + wire.double(97, 0.5) + wire.fixed32(96, 1)
    out = b""
    for record in found:
        kind = record.WhichOneof("kind")
        if kind == "end":
            record.end.crc32 = zlib.crc32(out)
        getattr(record, kind).MergeFromString(unknown)
        body = record.SerializeToString() + unknown
        out += wire.varint(len(body)) + body
    check({"w": np.ones(3)}, formats.read(out).state)


# ------------------------------------------------------------------------------------- streams


def test_neither_who_writes_nor_who_reads_holds_the_whole(tmp_path: Path) -> None:
    """48 MiB of leaves pass through a tenth of that."""
    size, count = 12 << 20, 4
    path = str(tmp_path / "x.pb")
    leaf = Leaf("", "|u1", (size,), "weights")
    big = np.memmap(tmp_path / "raw", np.uint8, "w+", shape=(size,))
    big[::4096] = 7
    big.flush()
    tracemalloc.start()
    try:
        with made(path, REAL, False) as target:
            writer = protobuf.Writer(target)
            writer.header({})
            for number in range(count):
                writer.leaf(Leaf(f"l{number}", leaf.dtype, leaf.shape, leaf.role), "weights")
                for start in range(0, size, protobuf.PIECE_BYTES):
                    writer.piece(big[start : start + protobuf.PIECE_BYTES])
            writer.end()
        seen = [0] * count
        with opened(path, REAL) as source:
            reading = Reading(source, lambda leaf, nbytes: False)
            for number, start, data in reading.pieces():
                assert start == seen[number]
                seen[number] += len(data)
        assert tracemalloc.get_traced_memory()[1] < 6 << 20
    finally:
        tracemalloc.stop()
    assert seen == [size] * count and [one.role for one in reading.leaves] == ["weights"] * count
    got = formats.read(path).state
    assert all(np.array_equal(got[f"l{number}"], big) for number in range(count))


def test_a_long_structure_is_split(generated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protobuf, "STRUCTURE_BYTES", 100)
    state = {f"key {n}": [n, {"x": (n,)}] for n in range(50)}
    data = written(state)
    assert sum(record.WhichOneof("kind") == "structure" for record in records(generated, data)) > 10
    check(state, formats.read(data).state)


def test_an_outline_leaves_long_arrays_where_they_are(tmp_path: Path) -> None:
    state = {"w": np.zeros(1 << 20), "loss": np.float32(0.5), "nested": {"step": np.array(7)}}
    path = formats.write(tmp_path / "x.pb", state).path
    with opened(path, REAL) as source:
        taken = source.bytes_at
        sizes: list[int] = []
        source.bytes_at = lambda start, count: sizes.append(count) or taken(start, count)  # type: ignore
        tree, held, _ = protobuf.outline(source, lambda leaf: not leaf.shape)
    assert [tree.leaves[at].path for at in held] == ["loss", "nested/step"] and held[1] == np.float32(0.5)
    assert sum(sizes) < 1 << 20  # of 8 MiB


# ------------------------------------------------------------------------------------- through the door


def test_a_checkpoint_out_and_in_again_with_step_metrics_and_roles(generated: Any, tmp_path: Path) -> None:
    import torch

    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    repo = everystep.open(str(tmp_path / "repo"))
    with repo.run("a") as run:
        run.track(model=model, optimizer=optimizer, rng=False)
        run.save(12, metrics={"val_loss": 0.5, "odd": float("inf")})
    checkpoint = repo["a"].at(12)
    path = checkpoint.export(str(tmp_path / "out.pb")).path
    leaves = [r.leaf for r in records(generated, Path(path).read_bytes()) if r.WhichOneof("kind") == "leaf"]
    assert {leaf.role for leaf in leaves} == {"weights", "optimizer"}
    assert {leaf.path: leaf.role for leaf in leaves}["model/weight"] == "weights"
    report = repo.import_from(path, "b")
    assert [(one.step, one.metrics) for one in report.brought] == [(12, {"val_loss": 0.5, "odd": float("inf")})]
    check(checkpoint.load(), repo["b"].at(12).load())
    part = checkpoint.export(str(tmp_path / "model.pb"), only="model").path
    found = {
        r.leaf.path: r.leaf.role for r in records(generated, Path(part).read_bytes()) if r.WhichOneof("kind") == "leaf"
    }
    assert found == {"weight": "weights", "bias": "weights"}


def test_other_protocol_buffers_are_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "saved_model.pb").write_bytes(b"\x08\x01\x12\x9c\x01" + b"graph" * 40)
    with pytest.raises(Unsupported, match="no checkpoint of everystep"):
        formats.read(tmp_path / "saved_model.pb")


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**64 - 1))
def test_numbers_on_the_wire(signed: int, plain: int) -> None:
    assert wire.unzigzag(wire.zigzag(signed)) == signed and wire.zigzag(signed) < 2**64
    assert wire.read_varint(memoryview(wire.varint(plain)), 0) == (plain, len(wire.varint(plain)))
    assert wire.signed(wire.read_varint(memoryview(wire.varint(signed)), 0)[0]) == signed


def test_a_checkpoint_goes_out_leaf_by_leaf(tmp_path: Path) -> None:
    """24 MiB of leaves, a few at a time; what comes out is what a state in memory becomes."""
    x = np.arange(1 << 20, dtype="f4")
    state = {"l": [x + n for n in range(6)], "tie": x, "n": {"again": x, "t": (1, "x" * 9000), "s": np.float32(2)}}
    repo = everystep.open(str(tmp_path / "repo"))
    with repo.run("a") as run:
        run.save(1, state=state, metrics={"loss": 0.5})
    checkpoint = repo["a"].at(1)
    monkey = pytest.MonkeyPatch()
    monkey.setattr(stream, "BATCH_BYTES", 1 << 20)
    tracemalloc.start()
    try:
        path = checkpoint.export(str(tmp_path / "x.pb")).path
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()
        monkey.undo()
    got = formats.read(path).state
    check(state, got)
    assert got["tie"] is got["n"]["again"]
    whole = formats.write(tmp_path / "y.pb", checkpoint.load(), metadata={"step": "1", "metrics": '{"loss": 0.5}'}).path
    assert Path(path).read_bytes() == Path(whole).read_bytes()
    with pytest.raises(NotFound):
        checkpoint.export(str(tmp_path / "z.pb"), only="nothing")
    assert not (tmp_path / "z.pb").exists()
