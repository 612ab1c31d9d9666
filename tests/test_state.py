"""The state list goes in and comes out bit for bit: through flat buffers and JSON, as the store keeps it."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import struct
from typing import Any, NamedTuple

import ml_dtypes
import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from everystep import adapters
from everystep.adapters import numpy as numpy_adapter
from everystep.errors import Mismatch, NotFound, Unsupported
from everystep.schema import Composite, Fields, Leaf, Part, Roled, Tree, flatten, paths_of, select, unflatten
from everystep.schema.dtype import ML_DTYPES, name_of, parse

MANY = settings(max_examples=1200, deadline=None, suppress_health_check=list(HealthCheck))


class Point(NamedTuple):
    x: Any
    y: Any = 0


@dataclasses.dataclass
class Plain:
    a: Any
    b: Any = 1


@dataclasses.dataclass(frozen=True)
class Frozen:
    a: Any

    @functools.cached_property
    def twice(self) -> Any:
        return [self.a, self.a]


@dataclasses.dataclass(slots=True, repr=False)
class Slotted:
    a: Any
    late: Any = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        assert not isinstance(self.a, str) or self.a != "from disk", "a load runs no code"


TYPES = (Point, Plain, Frozen, Slotted)


# ------------------------------------------------------------------------------------------------ harness


def pack(state: Any, garbage: int = 0xAA) -> tuple[bytes, bytes, bytes, list[bytes]]:
    """What the store would keep: nodes, values and leaves as JSON, and every leaf's bytes from a dirty buffer."""
    tree = flatten(state, adapters.describe)
    buffers = []
    for leaf, payload in zip(tree.leaves, tree.payloads):
        count = math.prod(leaf.boxes[0].shape if leaf.boxes else leaf.shape)
        buffer = np.full(count * parse(leaf.dtype).itemsize, garbage, np.uint8)
        adapters.copy(payload, buffer)
        buffers.append(buffer.tobytes())
    encode = msgspec.json.encode
    return encode(tree.nodes), encode(tree.values), encode(tree.leaves), buffers


def unpack(packed: tuple[bytes, bytes, bytes, list[bytes]], types: Any = TYPES, path: str = "") -> Any:
    nodes, values, leaves, buffers = packed
    decode = msgspec.json.decode
    tree = Tree(decode(nodes), decode(values), decode(leaves, type=list[Leaf]))
    built: dict[int, Any] = {}

    def leaf(index: int) -> Any:
        if index not in built:
            data = np.frombuffer(bytearray(buffers[index]), np.uint8)
            built[index] = numpy_adapter.build(tree.leaves[index], data)
        return built[index]

    return unflatten(select(tree, path), leaf, adapters.compose, types)


def raw(array: np.ndarray) -> bytes:
    """An array's bytes in C order with all padding, read through its strides rather than by the code under test."""

    class Bytes:
        __array_interface__ = {  # noqa: RUF012
            "data": array.__array_interface__["data"], "typestr": "|u1", "version": 3,
            "shape": (*array.shape, array.dtype.itemsize), "strides": (*array.strides, 1),
        }  # fmt: skip
        owner = array

    return np.asarray(Bytes()).tobytes() if array.nbytes else b""


def fields_of(dtype: np.dtype) -> Any:
    """Everything that makes a dtype what it is, field by field."""
    kind = np.dtype(dtype.str).type if dtype.kind in "iu" else dtype.type  # np.longlong is another name of np.int64
    head = (dtype.str, kind, dtype.itemsize, dtype.isalignedstruct, dtype.name)
    if dtype.subdtype:
        return (*head, fields_of(dtype.subdtype[0]), dtype.subdtype[1])
    fields = [(dtype.fields or {})[name] for name in dtype.names or ()]
    return (*head, dtype.names, [(fields_of(field[0]), *field[1:]) for field in fields])


def same_dtype(a: np.dtype, b: np.dtype) -> None:
    assert a == b
    assert fields_of(a) == fields_of(b)


def same(a: Any, b: Any) -> None:
    """Exactly the same: types, order, bytes of arrays and numbers."""
    if isinstance(a, np.ndarray):
        assert type(b) is np.ndarray
        assert a.shape == b.shape
        same_dtype(a.dtype, b.dtype)
        assert raw(a) == raw(b)
        return
    assert type(a) is type(b)
    if isinstance(a, (np.str_, np.bytes_)):
        assert str.__eq__(a, b) if isinstance(a, str) else bytes.__eq__(a, b)
        assert len(a) == len(b)
    elif isinstance(a, (np.longdouble, np.clongdouble)) and np.finfo(a.dtype).nmant == 63:
        # NumPy copies the 80 bits of such a scalar, and leaves to chance what lies behind them.
        for x, y in ((a.real, b.real), (a.imag, b.imag)):
            assert x.tobytes()[:10] == y.tobytes()[:10]
    elif isinstance(a, np.generic):
        same(np.asarray(a), np.asarray(b))
    elif isinstance(a, float):
        assert struct.pack("d", a) == struct.pack("d", b)
    elif isinstance(a, complex):
        assert struct.pack("dd", a.real, a.imag) == struct.pack("dd", b.real, b.imag)
    elif isinstance(a, dict):
        assert len(a) == len(b)
        for (key, value), (other, found) in zip(a.items(), b.items()):
            same(key, other)
            same(value, found)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for value, found in zip(a, b):
            same(value, found)
    elif dataclasses.is_dataclass(a):
        for field in dataclasses.fields(a):
            assert hasattr(a, field.name) == hasattr(b, field.name)
            if hasattr(a, field.name):
                same(getattr(a, field.name), getattr(b, field.name))
    else:
        assert a == b


def round_trip(state: Any) -> Any:
    packed = pack(state)
    assert packed == pack(state, 0x55), "what the buffer held before shows in the bytes"
    back = unpack(packed)
    same(state, back)
    assert pack(back) == packed, "equal states have unequal bytes"
    leaves = msgspec.json.decode(packed[2], type=list[Leaf])
    paths = [path for path, _, _ in paths_of(Tree(msgspec.json.decode(packed[0]), [], leaves))]
    assert len(set(paths)) == len(paths)
    assert {leaf.path for leaf in leaves} <= set(paths)
    return back


# ------------------------------------------------------------------------------------------------ dtypes

UNITS = ("Y", "M", "W", "D", "h", "m", "s", "ms", "us", "ns", "ps", "fs", "as")
REFUSED = ("O", "T")


def numpy_dtypes() -> list[np.dtype]:
    """Every dtype that NumPy itself lists, in both byte orders; flexible ones at a few sizes, times in all units."""
    listed = [np.dtype(char) for char in np.typecodes["All"]] + [np.dtype(t) for t in np.sctypeDict.values()]
    classes = [getattr(np.dtypes, name) for name in getattr(getattr(np, "dtypes", None), "__all__", ())]
    listed += [np.dtype(kind.type) for kind in classes if issubclass(kind.type, np.generic)]
    out = [dtype for dtype in listed if dtype.kind not in "SUVmM" and dtype.char not in REFUSED]
    assert {dtype.kind for dtype in listed} - {dtype.kind for dtype in out} - set(REFUSED) <= set("SUVmM")
    out += [np.dtype(f"{kind}{size}") for kind in "SUV" for size in (0, 1, 5)]
    out += [np.dtype(kind) for kind in ("m8", "M8")]
    out += [np.dtype(f"{k}8[{n}{u}]") for k in "mM" for n in ("", "7", "25", "2147483647") for u in UNITS]
    return list({(d.str, d.char): d for base in out for d in (base, base.newbyteorder(">"))}.values())


def ml_names() -> list[str]:
    found = {name: getattr(ml_dtypes, name) for name in dir(ml_dtypes)}
    return [name for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, np.generic)]


SIMPLE = numpy_dtypes() + [np.dtype(getattr(ml_dtypes, n)).newbyteorder(o) for n in ml_names() for o in "=>"]


def array_of(dtype: np.dtype, shape: tuple[int, ...], seed: int, offset: int = 0) -> np.ndarray:
    body = np.random.default_rng(seed).bytes(math.prod(shape) * dtype.itemsize + offset)
    return np.ndarray(shape, dtype, bytearray(body), offset)


def test_every_type_of_ml_dtypes_is_listed():
    assert set(ml_names()) <= set(ML_DTYPES), "add the new type to ML_DTYPES"


@pytest.mark.parametrize("dtype", SIMPLE, ids=lambda dtype: f"{dtype.str}-{dtype.name}")
def test_every_dtype_comes_back_bit_for_bit(dtype):
    same_dtype(dtype, parse(name_of(dtype)))
    for seed, shape in enumerate([(), (3,), (2, 3), (0,), (0, 3), (2, 0, 1)]):
        array = array_of(dtype, shape, seed)
        round_trip(
            {"a": array, "t": array.T, "r": array[::-1] if shape else array, "b": np.broadcast_to(array, (2, *shape))}
        )
    if dtype.kind not in "U" and dtype.isnative:  # random bytes are no text, and a scalar of it cannot be made
        scalar = array_of(dtype, (), 5)[()]
        assert type(round_trip([scalar])[0]) is type(scalar)
        kind = flatten(scalar, adapters.describe).leaves[0].kind
        assert kind == "scalar" or np.dtype(kind[-1]) == np.dtype(dtype.str) == dtype


def test_objects_and_strings_of_any_width_are_refused():
    refused = [np.dtype("O"), np.dtype([("a", "f4"), ("b", "O")]), np.dtype([("a", [("b", "O", (2,))])])]
    refused += [np.dtypes.StringDType()] if hasattr(getattr(np, "dtypes", None), "StringDType") else []
    for dtype in refused:
        for array in (np.zeros((2,), dtype), np.zeros((0,), dtype)):
            with pytest.raises(Unsupported) as caught:
                pack({"deep": [array]})
            assert "deep/[0]" in str(caught.value)
            assert "do:" in str(caught.value)


STRUCTURED = [
    np.dtype([("a", "i1"), ("b", "<f8"), ("c", ">i2", (2, 3))]),
    np.dtype([("a", "i1"), ("b", "f8"), ("c", [("x", "u1"), ("y", "g")])], align=True),
    np.dtype({"names": ["b", "a"], "formats": [">u4", "M8[25s]"], "offsets": [12, 1], "itemsize": 21}),
    np.dtype({"names": ["a", "b"], "formats": ["<f4", "<i4"], "offsets": [0, 0], "itemsize": 4}),  # a union
    np.dtype({"names": ["a", "b"], "formats": ["i4", "f4"], "titles": ["A title", None], "offsets": [0, 4]}),
    np.dtype([("w", ml_dtypes.bfloat16), ("v", np.dtype(ml_dtypes.bfloat16).newbyteorder(">")), ("i", ml_dtypes.int4)]),
    np.dtype([("", "S0"), ("naïve/%", "V3"), ("\ud800", "U2"), ("z", "f4", (0,)), ("one", "f4", (1,))]),
    np.dtype([("p", [("q", [("r", "G", (2,))], (3,))])]),
    np.dtype([]),
    np.dtype({"names": [], "formats": [], "offsets": [], "itemsize": 8}),
    np.dtype((np.record, [("a", "i1"), ("b", "i8")])),
    np.zeros(1, np.dtype([("a", "i1"), ("b", "f8"), ("c", "i2")], align=True))[["a", "c"]].dtype,
]


@pytest.mark.parametrize("dtype", STRUCTURED, ids=str)
def test_structured_dtypes_come_back_with_padding_and_titles(dtype):
    same_dtype(dtype, parse(name_of(dtype)))
    array = array_of(dtype, (4, 3), 1)
    round_trip(
        [array, array[::2], array.T, array[:, 1], array[0, 0:1], array_of(dtype, (), 2), array_of(dtype, (0, 3), 3)]
    )
    if dtype.itemsize:
        assert type(round_trip([array[1, 1]])[0]) is dtype.type


def test_one_field_of_a_structured_array_is_an_array_with_gaps():
    array = array_of(np.dtype([("a", "i1"), ("b", "<f8"), ("c", "<g")]), (5, 2), 1)
    round_trip([array["b"], array["c"][::-1], array[["a", "c"]][1:, ::2]])


def test_what_a_name_cannot_hold_is_refused():
    class Mine(np.void):
        pass

    for dtype in (
        np.dtype("f8", metadata={"unit": "m"}),
        np.dtype([("a", np.dtype("f8", metadata={"unit": "m"}))]),
        np.dtype((np.int32, [("low", "<i2"), ("high", "<i2")])),
        np.dtype((Mine, [("a", "i4")])),
        np.dtype({"names": ["a"], "formats": ["i4"], "titles": [5]}),
        functools.reduce(lambda d, _: np.dtype([("a", d)]), range(40), np.dtype("f4")),
    ):
        with pytest.raises(Unsupported, match="where: x"):
            flatten({"x": np.zeros(1, dtype)}, adapters.describe)


# ------------------------------------------------------------------------------------------------ hypothesis

any_text = st.text(st.characters(exclude_categories=()), max_size=5)
floats = st.one_of(st.integers(0, 2**64 - 1).map(lambda n: struct.unpack("d", struct.pack("Q", n))[0]), st.floats())
floats |= st.sampled_from([-0.0, math.inf, struct.unpack(">d", bytes.fromhex("7ff0000000000001"))[0]])
ints = st.integers() | st.sampled_from([2**53, -(2**53), 2**63]) | st.integers(9000, 9900).map(lambda n: -(3**n))
plains = st.one_of(
    st.none(), st.booleans(), ints, floats, st.builds(complex, floats, floats), any_text, st.binary(max_size=5),
    st.sampled_from(["", "/", "%", "[", "[0]", "%5B", "\ud83d\ude00", "a/b", "x" * 5000, b"y" * 5000]),
    st.just("é\udfff" * 4097),
)  # fmt: skip
keys = st.recursive(plains, lambda k: st.lists(k, max_size=3).map(tuple), max_leaves=4)


@st.composite
def dtypes(draw, depth=0):
    simple = st.sampled_from(SIMPLE)
    if depth == 2 or draw(st.integers(0, 2)):
        return draw(simple)
    names = draw(st.lists(any_text, max_size=4, unique=True))
    formats = [draw(dtypes(depth + 1)) for _ in names]
    formats = [
        np.dtype((d, tuple(draw(st.lists(st.integers(0, 2), max_size=2))))) if d.itemsize else d for d in formats
    ]
    names = [name or f"f{i}" for i, name in enumerate(names)]
    how = draw(st.sampled_from(["packed", "aligned", "offsets"]))
    spec: dict[str, Any] = {"names": names, "formats": formats}
    if len(set(names)) < len(names):
        return draw(simple)
    if how == "offsets":
        spec["offsets"] = [draw(st.integers(0, 20)) for _ in names]
        ends = [offset + d.itemsize for offset, d in zip(spec["offsets"], formats)]
        spec["itemsize"] = max(ends, default=0) + draw(st.integers(0, 5))
    if draw(st.booleans()):
        spec["titles"] = [None if draw(st.booleans()) else f"\ud800title {i}" for i in range(len(names))]
    return np.dtype(spec, align=how == "aligned")


@st.composite
def arrays(draw):
    dtype = draw(dtypes())
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    array = array_of(dtype, tuple(2 * n for n in shape), draw(st.integers(0, 2**32)), draw(st.sampled_from([0, 0, 1])))
    cuts = [(slice(None), slice(None, None, -1), slice(1, None, 2), slice(0, None, 2), slice(1, 0)) for _ in shape]
    array = array[(*(draw(st.sampled_from(cut)) for cut in cuts), ...)]
    array = array.transpose(draw(st.permutations(range(array.ndim))))
    if draw(st.integers(0, 4)) == 0:
        array = np.broadcast_to(array, (2, *array.shape))
    array.flags.writeable = False
    return array


@st.composite
def scalars(draw):
    dtype = draw(dtypes())
    if dtype.kind == "U":
        return np.str_(draw(any_text) + draw(st.sampled_from(["", "\0"])))
    return np.bytes_(draw(st.binary(max_size=3)) + b"\0") if dtype.kind == "S" else array_of(dtype, (), 1)[()]


def containers(inner: Any) -> Any:
    names = st.dictionaries(st.text(max_size=3), inner, max_size=3)
    dicts = st.lists(st.tuples(keys, inner), max_size=4)
    return st.one_of(
        st.lists(inner, max_size=4), st.lists(inner, max_size=4).map(tuple),
        dicts.map(dict), dicts.map(collections.OrderedDict), names.map(collections.Counter),
        st.builds(Point, inner, inner), st.builds(Plain, inner, inner), st.builds(Frozen, inner),
        st.builds(Slotted, inner),
        st.dictionaries(st.text(max_size=3), inner, max_size=3).map(lambda d: Fields("Lost", d.items())),
    )  # fmt: skip


states = st.recursive(st.one_of(plains, plains, arrays(), scalars()), containers, max_leaves=10)


@MANY
@given(states)
def test_any_state_comes_back(state):
    round_trip(state)


@MANY
@given(arrays())
def test_any_array_comes_back(array):
    same_dtype(array.dtype, parse(name_of(array.dtype)))
    round_trip({"array": array})


@settings(MANY, max_examples=500)
@given(plains, st.dictionaries(keys, plains, max_size=4))
def test_any_plain_value_and_key_comes_back(value, mapping):
    round_trip([value, mapping, tuple(mapping)])


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(keys, states, max_size=4), st.data())
def test_a_part_is_found_by_its_path(state, data):
    packed = pack(state)
    tree = Tree(msgspec.json.decode(packed[0]), [], [])
    paths = list(paths_of(tree))
    path, start, _ = data.draw(st.sampled_from(paths))
    assert select(tree, path).nodes[0] is tree.nodes[start]
    texts = [path for path, start, _ in paths if start and path.count("/") == 0]
    assert len(texts) == len(state)
    for text, value in zip(texts, state.values()):
        same(value, unpack(packed, path=text))


# ------------------------------------------------------------------------------------------------ one by one


def test_one_array_under_two_names_is_saved_once():
    array = np.arange(16.0).reshape(4, 4)
    state = {"a": array, "b": [array], "view": array[:], "t": array.T, "row": array[0], "bits": array.view("<i8")}
    tree = flatten(state, adapters.describe)
    assert [leaf.path for leaf in tree.leaves] == ["a", "t", "row", "bits"]
    back = round_trip(state)
    assert back["a"] is back["b"][0] is back["view"]
    assert not np.shares_memory(back["a"], back["t"])


def test_empty_arrays_are_not_tied():
    base = np.zeros((3, 4))
    back = round_trip([base[:0], base[:0], base[0:0].T])
    assert back[0] is not back[1]
    assert len(flatten([base[:0], base[:0]], adapters.describe).leaves) == 2


def test_a_file_in_memory_comes_back_as_an_array(tmp_path):
    mapped = np.memmap(tmp_path / "m", np.float32, "w+", shape=(4, 3))
    mapped[:] = 7
    assert type(round_trip([mapped, mapped[::2]])[0]) is np.ndarray


def test_scalars_keep_their_class_and_length():
    for value in (
        np.longlong(-1), np.ulonglong(3), np.intc(1), np.int64(-5), np.str_("a\0"), np.str_(""), np.bytes_(b""),
        np.bytes_(b"\0"), np.void(b"\0ab"), np.void(b""), np.datetime64("NaT", "25s"), np.timedelta64(3), np.True_,
        np.float16(-0.0), np.longdouble("1.1"), np.clongdouble(1j), ml_dtypes.bfloat16(3), ml_dtypes.int4(-8),
        np.str_("\ud800"), np.rec.array([(1, 2.0)], dtype="i4,f8")[0],
    ):  # fmt: skip
        round_trip([value])


def test_padding_of_a_record_scalar_is_kept():
    dtype = np.dtype([("a", "i1"), ("b", "i8")], align=True)
    for fill in (0x11, 0xEE):
        round_trip([np.full(16, fill, np.uint8).view(dtype)[0]])


def test_classes_come_back_if_given_else_fields():
    state = [Point(1, [2]), Plain(1, 2), Frozen(3), Slotted(4)]
    assert state[2].twice == [3, 3]  # a cached value is no field and does not hinder
    packed = pack(state)
    back = unpack(packed)
    assert back == [Point(1, [2]), Plain(1, 2), Frozen(3), back[3]]
    assert not hasattr(back[3], "late")
    lost = unpack(packed, types=())
    assert [type(part) for part in lost] == [Fields] * 4
    assert (lost[0].x, lost[0].y, lost[3].a) == (1, [2], 4)
    lost[0].x = 9
    lost[1] = lost[1].copy()
    assert unpack(pack(lost))[:2] == [Point(9, [2]), Plain(1, 2)]
    assert unpack((packed[0], packed[1].replace(b"4", b'"from disk"'), *packed[2:]))[3].a == "from disk"
    with pytest.raises(AttributeError):
        lost[0].z = 1
    with pytest.raises(AttributeError, match="Point has no field 'z'"):
        _ = lost[0].z


def test_a_class_with_other_fields_is_a_mismatch():
    for kind, fields in ((Plain, ["a", "c"]), (Plain, ["__class__"]), (Point, ["y", "x"]), (Point, ["x"]), (int, [])):
        tree = Tree([["dataclass", kind.__qualname__, fields], *[["value", 0]] * len(fields)], [1], [])
        with pytest.raises(Mismatch):
            unflatten(tree, list, Composite, [kind])


def test_parts_name_their_box():
    part = Part(np.arange(6.0).reshape(2, 3), (np.int64(2), 0), (np.int64(4), 3))
    leaf = flatten([part], adapters.describe).leaves[0]
    assert (leaf.shape, leaf.boxes[0].start, leaf.boxes[0].shape) == ((4, 3), (2, 0), (2, 3))
    msgspec.json.encode(leaf)
    assert pack([part])[3] == [part.array.tobytes()]


def test_roles_reach_what_lies_below():
    tree = flatten({"a": Roled("weights", [np.zeros(1), Roled("rng", np.ones(1))]), "b": np.ones(2)}, adapters.describe)
    assert [leaf.role for leaf in tree.leaves] == ["weights", "rng", "other"]


def test_paths_are_unique_readable_and_hold_no_stray_slash():
    nan = [float("nan"), float("nan"), struct.unpack("d", struct.pack("Q", 0xFFF8000000000001))[0]]
    keys = ["", "%", "a/b", "[0]", 0, "0", 1.5, None, b"/", ("/", 1), "\ud800", "k" * 1500, "k" * 1501, 10**5000]
    tree = flatten(dict.fromkeys([*keys, *nan], 0), adapters.describe)
    paths = [path for path, _, _ in paths_of(tree)][1:]
    assert paths[:11] == [
        "%", "%25", "a%2Fb", "%5B0]", "[0]", "0", "[1.5]", "[None]", "[b'%2F']", "[('%2F', 1)]", "%uD800",
    ]  # fmt: skip
    assert paths[11] == "k" * 1000 + "…"
    assert paths[12] == paths[11] + "%#2"
    assert paths[-3:] == ["[nan]", "[nan]%#2", "[nan]%#3"]
    assert len(set(paths)) == len(paths)


def test_a_wrong_path_names_the_nearest():
    tree = flatten({"model": {"fc1": {"weight": 1, "bias": 2}}, "step": 3}, adapters.describe)
    for wrong, near in (("model/fc1/wieght", "model/fc1/weight"), ("fc1/bias", "model/fc1/bias"), ("Step", "step")):
        with pytest.raises(NotFound, match=f"nearest: .*{near}"):
            select(tree, wrong)
    with pytest.raises(NotFound, match="no parts"):
        select(flatten(1, adapters.describe), "a")


def test_generators_come_back_and_go_on():
    for kind in (np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64):
        one, two = np.random.Generator(kind(1)), np.random.Generator(kind(2))
        one.standard_normal(3)
        two.bit_generator.state = round_trip(numpy_adapter.capture(one, "g", {}))
        assert one.standard_normal(9).tobytes() == two.standard_normal(9).tobytes()
