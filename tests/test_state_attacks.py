"""What a state may not hold is refused; false tables end in Damaged, in bounded time; leaves fill their chunks."""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import enum
import functools
import io
import itertools
import math
import sys
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from everystep import adapters
from everystep.adapters import numpy as numpy_adapter
from everystep.errors import Damaged, Error, Mismatch, NotFound, Unsupported
from everystep.schema import Box, Leaf, Part, Roled, Tree, flatten, lay_out, paths_of, plain, select, unflatten
from everystep.schema.dtype import name_of, parse
from everystep.schema.layout import ALIGN

MANY = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))


@contextlib.contextmanager
def bounded(seconds: float = 2.0, mib: float = 64.0) -> Iterator[None]:
    tracemalloc.start()
    begin = time.perf_counter()
    try:
        yield
        assert time.perf_counter() - begin < seconds
        assert tracemalloc.get_traced_memory()[1] < mib * 2**20
    finally:
        tracemalloc.stop()


def everything(tree: Tree, types: Any = ()) -> None:
    """All that a reader does with a table."""
    for path, start, end in itertools.islice(paths_of(tree), 100):
        assert start < end
        with contextlib.suppress(NotFound):
            select(tree, path)
    with contextlib.suppress(NotFound):
        select(tree, "model/weight")

    def leaf(index: int) -> Any:
        return numpy_adapter.build(tree.leaves[index], np.zeros(8, np.uint8))

    unflatten(tree, leaf, adapters.compose, types)


# ------------------------------------------------------------------------------------------------ what is refused


class Point(NamedTuple):
    x: int
    y: int


@dataclasses.dataclass
class Plain:
    a: int


class Colour(enum.Enum):
    RED = 1


class Odd(Point):
    pass


@dataclasses.dataclass
class Both(dict):
    a: int = 1


class Sub(np.float64):
    pass


def refused() -> list[Any]:
    loop: list[Any] = []
    loop.append(loop)
    extra, odd = Plain(1), Odd(1, 2)
    extra.more = odd.more = 1  # type: ignore[attr-defined]
    nested: Any = 1
    for _ in range(5000):
        nested = (nested,)
    return [
        lambda: 1, print, len, int, Plain, Point, io.StringIO(), sys.stdin, {1}, frozenset(), object(), Colour.RED,
        math, loop, nested, extra, odd, Both(), Sub(1), range(3), bytearray(b"1"), memoryview(b"1"), ..., type,
        ValueError(), collections.defaultdict(int), collections.deque(), (n for n in ()), np.dtype("f4"),
        np.char.array(["a"]),
        np.ma.array([1], mask=[True]), np.ma.masked, np.zeros((1, 1)).view(np.matrix), np.rec.array([(1,)], "i4,"),
        {np.int64(1): 1}, {Colour.RED: 1}, {frozenset(): 1}, {nested: 1}, {(1, (2, {3}.union)): 1},
        Part(np.ma.array([1], mask=[True]), (0,), (1,)), Part(np.zeros(3), (1,), (3,)), Part(np.zeros(3), (0, 0), (3,)),
        functools.reduce(lambda value, _: Roled("rng", value), range(5000), 1),
    ]  # fmt: skip


@pytest.mark.parametrize("value", refused(), ids=lambda value: type(value).__name__)
def test_what_would_need_code_is_refused_with_its_path(value):
    with pytest.raises(Unsupported) as caught:
        flatten({"model": [0, value]}, adapters.describe)
    assert caught.value.where.startswith("model/[1]")
    assert caught.value.do
    with pytest.raises(Unsupported) as caught:
        flatten(value, adapters.describe)
    assert caught.value.do


# ------------------------------------------------------------------------------------------------ mutations

words = ["value", "leaf", "list", "tuple", "dict", "ordered", "counter", "namedtuple", "dataclass", "composite"]
atoms = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 6), st.floats(), st.text(max_size=3), st.sampled_from(words),
    st.sampled_from([2**31, 2**63, 10**18, -(10**18), "i", "f", "c", "s", "b", "t", "0x", "ff" * 8, "Plain"]),
    st.sampled_from(["Point", "<f4", "|V0", "a", "x", "y"]),
    st.integers(9000, 9900).map(lambda n: 3**n),
)  # fmt: skip
jsons = st.recursive(
    atoms,
    lambda j: (
        st.lists(j, max_size=4) | st.dictionaries(st.sampled_from(["i", "f", "c", "s", "b", "t", "x"]), j, max_size=2)
    ),
    max_leaves=8,
)
ORIGINAL = flatten(
    {
        "model": {"weight": np.zeros(2, "<f4"), 5: [1, (2.5, None)], (1, b"k"): "text", 10**30: np.float64(1)},
        "s": np.zeros((), [("a", "<f4"), ("b", "<f4")]), "t": np.zeros(1, "M8[25s]"), "u": np.str_("ab"),
        "v": "x" * 5000,
    },
    adapters.describe,
)  # fmt: skip


def spots(node: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) at which something can be put."""
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
    return [spot for key in keys for spot in [(node, key), *spots(node[key])]]


@st.composite
def mutants(draw):
    table = msgspec.json.decode(msgspec.json.encode([ORIGINAL.nodes, ORIGINAL.values, ORIGINAL.leaves]))
    for _ in range(draw(st.integers(1, 4))):
        container, key = draw(st.sampled_from(spots(table)))
        how = draw(st.integers(0, 4))
        if how == 0 and len(container) > 1 and container is not table:
            del container[key]
        elif how == 1 and isinstance(container, list) and container is not table:
            container.insert(key, copy.deepcopy(draw(st.sampled_from(container))))
        elif how == 2:
            other, at = draw(st.sampled_from(spots(table)))
            container[key] = copy.deepcopy(other[at])
        else:
            container[key] = draw(jsons)
    return table


def leaves_of(rows: Any) -> list[Leaf]:
    """As the manifest reads them: the types of the columns are checked there."""
    try:
        return msgspec.convert(rows, list[Leaf])
    except (msgspec.ValidationError, OverflowError):
        return ORIGINAL.leaves


@MANY
@given(mutants())
def test_mutated_tables_end_in_damaged(table):
    nodes, values, rows = table
    tree = Tree(
        nodes if isinstance(nodes, list) else [nodes], values if isinstance(values, list) else [], leaves_of(rows)
    )
    with contextlib.suppress(Damaged, Unsupported):
        everything(tree)


@MANY
@given(st.lists(jsons | st.tuples(st.sampled_from(words), jsons).map(list), max_size=6), st.lists(jsons, max_size=3))
def test_random_tables_end_in_damaged(nodes, values):
    with contextlib.suppress(Damaged, Mismatch):
        everything(Tree(nodes, values, ORIGINAL.leaves), [Plain, Point])


@MANY
@given(jsons)
def test_random_plain_values_end_in_damaged(node):
    with contextlib.suppress(Damaged):
        plain.decode(node)


NAMES = [name_of(np.dtype(spec)) for spec in ("<f4", "|V5", "M8[25s]", "bool")] + [
    "bfloat16",
    ">int4",
    "torch.complex32",
]
NAMES += [name_of(np.dtype([("a", "<f4", (2,)), ("b", [("c", "U3")])], align=True))]


@MANY
@given(st.sampled_from(NAMES), st.lists(st.tuples(st.integers(0), st.text(max_size=2)), min_size=1, max_size=3))
def test_mutated_dtype_names_end_in_damaged(name, edits):
    for where, text in edits:
        at = where % (len(name) + 1)
        name = name[:at] + text + name[at + len(text) % 2 :]
    with contextlib.suppress(Damaged):
        dtype = parse(name)
        assert not dtype.hasobject


@MANY
@given(st.fixed_dictionaries(
    {"names": jsons | st.just(["a"]), "formats": jsons | st.just(["<f4"]), "offsets": jsons | st.just([0])},
    optional={"titles": jsons | st.just([None]), "itemsize": atoms, "aligned": atoms, "record": jsons, "x": atoms},
))  # fmt: skip
def test_random_structured_dtypes_end_in_damaged(spec):
    with contextlib.suppress(ValueError):  # an integer that JSON cannot hold
        text = msgspec.json.encode(spec).decode()
        with contextlib.suppress(Damaged):
            parse(text)


# ------------------------------------------------------------------------------------------------ attacks


def nested(kind: Any, depth: int) -> list[Any]:
    return [kind] * depth + [["value", 0]]


def shaped(**changes: Any) -> str:
    spec = {"names": ["a"], "formats": ["<f4"], "offsets": [0], "titles": [None], "itemsize": 8, "aligned": False}
    return msgspec.json.encode({**spec, **changes}).decode()


def deep(inner: Any, depth: int) -> Any:
    return functools.reduce(lambda body, _: {"t": [body]}, range(depth), inner)


@pytest.mark.parametrize(
    "nodes",
    [
        [],
        [["value", 0], ["value", 0]],
        [["list", 1], ["value", 0], ["value", 0]],
        [["list", 10**18]],
        [["list", 2]] * 100_000,
        [["list", -1]],
        [["list", True], ["value", 0]],
        [["list", 10**5000]],
        [["value", 10**5000]],
        [["value", -1]],
        [["leaf", 99]],
        [["leaf", 0, 0]],
        nested(["list", 1], 102),
        nested(["list", 1], 100_000),
        nested(["dict", ["k" * 1000]], 100_000),
        [["dict", ["a", "a"]], ["value", 0], ["value", 0]],
        [["dict", [1, True]], ["value", 0], ["value", 0]],
        [["dict", [deep(1, 900)]], ["value", 0]],
        [["dict", [[1]]], ["value", 0]],
        [["dict", {"a": 1}], ["value", 0]],
        [["dataclass", "P", ["a", "a"]], ["value", 0], ["value", 0]],
        [["dataclass", ["P"], ["a"]], ["value", 0]],
        [["dataclass", "P", [["a"]]], ["value", 0]],
        [["dataclass", "P", "a"], ["value", 0]],
        [["composite", "unknown", ["a"]], ["value", 0]],
        ["value", 0],
        [None],
        [[]],
        [[["list"], 0]],
        [functools.reduce(lambda body, _: [body], range(50_000), 0)],
    ],
    ids=range(30),
)
def test_false_tables_are_damaged(nodes):
    with bounded(), pytest.raises(Damaged):
        everything(Tree(nodes, [1], ORIGINAL.leaves))


def test_long_keys_in_deep_trees_do_not_multiply():
    nodes: list[Any] = [["dict", ["k" * 1_000_000]]] * 90 + [["list", 20_000]] + [["value", 0]] * 20_000
    with bounded(seconds=20, mib=64):
        assert sum(1 for _ in paths_of(Tree(nodes, [1], []))) == 20_091
    with bounded(seconds=20, mib=64), pytest.raises(NotFound):
        select(Tree(nodes, [1], []), "k" * 100_000)


@pytest.mark.parametrize(
    "node",
    [
        [], [1], {}, {"i": 5}, {"i": "zz"}, {"f": "00"}, {"f": None}, {"c": "00"}, {"s": "ff"},
        {"b": "é"}, {"b": "a"}, {"t": "ab"}, {"t": {"a": 1}}, {"t": 10**5000}, {"z": 1}, {"i": "1", "f": "2"},
        deep(1, 101), deep(1, 100_000), {"f": [10**5000]}, {"t" * 10**6: 1}, {1: 2},
    ],
    ids=range(21),
)  # fmt: skip
def test_false_plain_values_are_damaged(node):
    with bounded(), pytest.raises(Damaged) as caught:
        plain.decode(node)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "name",
    [
        5, None, b"<f4", "", "O", "|O", "object", "T", "float32", "f4", "=f4", "|i4", "<b1", "<V2", "<f1", "<i4,<i4",
        "(2,)f4", "|V9999999999", "<U999999999", "<M8[]", "<M8[xs]", "<M8[1s]", "<M8[9999999999s]", "<f4\n", "{}", "[]",
        "{" * 10**6, '{"names":' * 10**6, "x" * 10**7, ">torch.complex32", "<f16:64", "\ud800", "{\ud800}",
        shaped(itemsize=10**18), shaped(itemsize=2**31), shaped(itemsize=-1), shaped(itemsize=3), shaped(itemsize=None),
        shaped(offsets=[10**18]), shaped(offsets=[-4]), shaped(offsets=["0"]), shaped(offsets=[]),
        shaped(names=["a", "a"]), shaped(names=[None]), shaped(names=[["a"]]), shaped(names=5), shaped(titles=[[]]),
        shaped(titles=[5]), shaped(titles=["a"]), shaped(titles=[]), shaped(aligned="yes"),
        shaped(aligned=True, offsets=[1]),
        shaped(extra=1), shaped(formats=[["<f4", [10**9]]]), shaped(formats=[["<f4", [10**30]]]),
        shaped(formats=[["<f4", [-1]]]),
        shaped(formats=[["<f4", [1.5]]]), shaped(formats=[["<f4", "12"]]), shaped(formats=[["|V0", [2**31 - 1] * 30]]),
        shaped(formats=[["<f4", [1] * 100]]), shaped(formats=["O"]), shaped(formats=[["<f4"]]), shaped(formats=[]),
        shaped(formats=[functools.reduce(lambda body, _: [body, [1]], range(40), "<f4")]),
        shaped(names=["a"]).replace('"<f4"', '[["<f4",[1]],' * 20000 + "[1]" + "]" * 20000),
    ],
    ids=range(65),
)  # fmt: skip
def test_false_dtype_names_are_damaged(name):
    with bounded(), pytest.raises((Damaged, Unsupported)) as caught:
        parse(name)
    assert len(str(caught.value)) < 500
    assert type(caught.value) is Damaged or name == "<f16:64"


@pytest.mark.parametrize(
    "shape",
    [
        (3,), (-1,), (2, -1), (1.0,), (2.0,), ("2",), (None,), (10**18,), (2**63,), (10**30,), (2, 0), (2**62, 4),
        (1,) * 65, (2**70, 0),
    ],
    ids=str,
)  # fmt: skip
def test_false_shapes_are_damaged(shape):
    for kind in ("array", "scalar"):
        with bounded(), pytest.raises(Damaged):
            numpy_adapter.build(Leaf("p", "<f4", shape, "other", kind), np.zeros(8, np.uint8))


def test_damaged_text_and_scalars_say_so():
    for leaf, body in (
        (Leaf("p", "|u1", (2,), "other", "str"), b"\xff\xfe"),
        (Leaf("p", "<U1", (), "other", "scalar"), b"\xff" * 4),
        (Leaf("p", "<f4", (1,), "other", "scalar"), b"\xff" * 4),
    ):
        with pytest.raises(Damaged, match="where: p"):
            numpy_adapter.build(leaf, np.frombuffer(body, np.uint8))


def test_elements_without_bytes_cost_none():
    leaf = Leaf("p", "|V0", (2**31, 2**31), "other")
    with bounded():
        assert numpy_adapter.build(leaf, np.zeros(0, np.uint8)).nbytes == 0
        lay_out([leaf], 64, 64)
    with pytest.raises(Damaged):
        numpy_adapter.build(leaf, np.zeros(8, np.uint8))
    with bounded(), pytest.raises(Damaged):
        numpy_adapter.build(Leaf("p", "|V0", (2**64,), "other"), np.zeros(0, np.uint8))


def test_a_box_of_a_million_axes_fits_nothing():
    with bounded():
        assert not Box.whole((2**62,) * 100_000).fits((2**62,) * 100_000)
        assert not Box((0,), (1,), flat=True).fits((2**62,) * 100_000)


@pytest.mark.skipif(np.finfo(np.longdouble).nmant != 63, reason="this machine's long double fills its bytes")
def test_a_long_double_scalar_has_one_form():
    for fill in (0x11, 0xEE):
        for kind, width in (("g", 1), ("G", 2)):
            scalar = np.full(16 * width, fill, np.uint8).view(kind)[0]
            tree, target = flatten(scalar, adapters.describe), np.zeros(16 * width, np.uint8)
            adapters.copy(tree.payloads[0], target)
            assert target.tobytes() == (bytes([fill]) * 10 + bytes(6)) * width


def test_long_doubles_of_another_machine_are_refused(monkeypatch):
    name = name_of(np.dtype(np.longdouble))
    for bits in (52, 105, 112):
        monkeypatch.setattr("everystep.schema.dtype._LONG_BITS", bits)
        with pytest.raises(Unsupported, match="another kind of machine"):
            parse("<f16")
        with contextlib.suppress(Error):
            assert name_of(np.dtype(np.longdouble)) != name


# ------------------------------------------------------------------------------------------------ layout

DTYPES = ["|u1", "<f4", ">c16", "|V3", "|V0", "|V100", "bfloat16", name_of(np.dtype([("a", "i1"), ("b", "f8")]))]


@st.composite
def leaves(draw):
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=3)))
    boxes = []
    for _ in range(draw(st.integers(0, 2))):
        part = tuple(draw(st.integers(0, n)) for n in shape)
        boxes.append(Box(tuple(draw(st.integers(0, n - m)) for n, m in zip(shape, part)), part))
    if draw(st.booleans()):
        boxes.append(Box((0,), (math.prod(shape),), flat=True))
    assert all(box.fits(shape) for box in boxes)
    role = draw(st.sampled_from(["weights", "optimizer", "other"]))
    return Leaf("p", draw(st.sampled_from(DTYPES)), shape, role, "array", tuple(boxes))


@settings(max_examples=1000, deadline=None)
@given(st.lists(leaves(), max_size=12), st.integers(1, 300), st.integers(0, 400))
def test_chunks_tile_streams_and_hold_regions(rows, limit, small):
    layout = lay_out(rows, limit, small)
    boxes = [(i, box) for i, leaf in enumerate(rows) for box in leaf.boxes or (Box.whole(leaf.shape),)]
    assert [(region.leaf, region.box) for region in layout.regions] == boxes
    filled = [0] * len(layout.streams)
    for region in layout.regions:
        leaf, stream = rows[region.leaf], layout.streams[region.stream]
        assert (stream.role, stream.dtype, stream.itemsize) == (leaf.role, leaf.dtype, parse(leaf.dtype).itemsize)
        assert region.nbytes == region.box.size * stream.itemsize
        assert region.start == filled[region.stream], "regions lie one behind the other, without gap or overlap"
        filled[region.stream] += region.nbytes
        held = [layout.chunks[index] for index in layout.chunks_of(region)]
        assert all(chunk.stream == region.stream for chunk in held)
        covered = [set(range(chunk.start, chunk.start + chunk.nbytes)) for chunk in held]
        wanted = set(range(region.start, region.start + region.nbytes))
        assert wanted <= set().union(*covered)
        assert all(part & wanted for part in covered), "a chunk is named that holds nothing of the region"
    assert filled == [stream.nbytes for stream in layout.streams]
    check_chunks(layout, limit)
    check_sharing(rows, layout, small)


def check_chunks(layout, limit):
    tiled = [0] * len(layout.streams)
    for chunk in layout.chunks:
        stream = layout.streams[chunk.stream]
        assert chunk.start == tiled[chunk.stream]
        assert 0 < chunk.nbytes <= limit
        assert stream.itemsize > limit or chunk.nbytes % stream.itemsize == 0
        tiled[chunk.stream] += chunk.nbytes
    assert tiled == [stream.nbytes for stream in layout.streams]
    assert [chunk.stream for chunk in layout.chunks] == sorted(chunk.stream for chunk in layout.chunks)
    end = 0
    for stream in layout.streams:
        assert stream.offset % ALIGN == 0
        assert stream.offset >= end
        end = stream.offset + stream.nbytes
    assert end <= layout.nbytes < end + ALIGN


def check_sharing(rows, layout, small):
    shared: dict[Any, set[int]] = {}
    alone = [region.stream for region in layout.regions if region.nbytes >= small]
    assert len(set(alone)) == len(alone), "a large box has a stream of its own"
    for region in layout.regions:
        if region.nbytes < small:
            assert region.stream not in alone
            shared.setdefault((rows[region.leaf].role, rows[region.leaf].dtype), set()).add(region.stream)
    assert all(len(streams) == 1 for streams in shared.values())
