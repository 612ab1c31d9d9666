"""PyTorch state through the adapter: out to bytes and back, without storage."""

from __future__ import annotations

import copy as copying
import json
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from everystep import adapters
from everystep.adapters import torch as torch_adapter
from everystep.errors import Damaged, Mismatch, Unsupported
from everystep.schema import Composite, Leaf, LoadReport, Roled, Tree, flatten, unflatten
from everystep.schema.dtype import parse

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


# ---------------------------------------------------------------- out and back


def leaf_bytes(tree: Tree) -> list[np.ndarray[Any, Any]]:
    out = []
    for leaf, payload in zip(tree.leaves, tree.payloads):
        data = np.full(math.prod(leaf.shape) * parse(leaf.dtype).itemsize, 0xA5, np.uint8)
        adapters.copy(payload, data)
        out.append(data)
    return out


def rebuild(tree: Tree) -> Any:
    """The state again, from what would lie on disk only: nodes and values as JSON, leaves as flat bytes."""
    nodes, values = json.loads(json.dumps([tree.nodes, tree.values]))
    built = [
        adapters.adapter_for_kind(leaf.kind).build(leaf, data) for leaf, data in zip(tree.leaves, leaf_bytes(tree))
    ]
    bare = Tree(nodes, values, tree.leaves)
    return unflatten(bare, built.__getitem__, adapters.compose)


def through(state: Any) -> Any:
    return rebuild(flatten(state, adapters.describe))


def picture(state: Any) -> Any:
    """All of a state in comparable form, bit for bit."""
    tree = flatten(state, adapters.describe)
    leaves = [
        (leaf.path, leaf.dtype, leaf.shape, leaf.role, leaf.kind, data.tobytes())
        for leaf, data in zip(tree.leaves, leaf_bytes(tree))
    ]
    return tree.nodes, tree.values, leaves


def capture_all(tracked: dict[str, Any]) -> dict[str, Any]:
    return {name: adapters.capture(target, name, tracked) for name, target in tracked.items()}


def apply_all(tracked: dict[str, Any], state: dict[str, Any]) -> LoadReport:
    report = LoadReport()
    for place in [adapters.apply(target, state[name], name, tracked, report) for name, target in tracked.items()]:
        place()
    return report


def raw(tensor: torch.Tensor) -> bytes:
    data = np.empty(tensor.numel() * tensor.dtype.itemsize, np.uint8)
    torch_adapter.copy(tensor.detach(), data)
    return data.tobytes()


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape and raw(first) == raw(second)


# ---------------------------------------------------------------- element types

ALL_DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
QUANTIZED = {"qint8", "quint8", "qint32", "quint4x2", "quint2x4"}
ORDINARY = [dtype for dtype in ALL_DTYPES if str(dtype)[6:] not in QUANTIZED]


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Every bit pattern there is, NaN payloads too."""
    count = math.prod(shape) * dtype.itemsize
    data = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    return data.view(dtype).view(shape)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_every_dtype_of_torch_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    if str(dtype)[6:] in QUANTIZED:
        found = quantized(dtype)
        back = through({"x": found})["x"]
        assert back.dtype == dtype and back.is_quantized
        return
    for tensor in (
        random_tensor(dtype, (3, 5)),
        random_tensor(dtype, (3, 5)).t(),
        random_tensor(dtype, (6, 5))[1::2, 1:4],
        random_tensor(dtype, ()),
        random_tensor(dtype, (1,)).expand(4),
        torch.empty((0, 3), dtype=dtype),
    ):
        back = through({"x": tensor})["x"]
        expected = tensor.view(torch.uint8) if tensor.shape == (3, 5) else None
        assert same(back, tensor) and back.shape == tensor.shape
        assert expected is None or torch.equal(back.view(torch.uint8), expected)


@pytest.mark.parametrize("dtype", ORDINARY, ids=str)
def test_numpy_can_read_every_leaf_of_torch(dtype: torch.dtype) -> None:
    (leaf,) = flatten(torch.empty(2, dtype=dtype), adapters.describe).leaves
    assert parse(leaf.dtype).itemsize == dtype.itemsize


def test_strided_bytes_are_those_of_the_contiguous_tensor() -> None:
    whole = torch.arange(24, dtype=torch.int32).view(2, 3, 4)
    for view in (whole.permute(2, 0, 1), whole[:, ::2, 1:3], whole[:, 1, 0], whole.transpose(0, 2)):
        assert raw(view) == view.contiguous().numpy().tobytes()


def test_a_dtype_without_a_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(torch_adapter.DISK_NAMES, torch.float16)
    with pytest.raises(Unsupported, match=r"(?s)torch.float16.*where: a/b"):
        through({"a": {"b": torch.zeros(2, dtype=torch.float16)}})


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_strided_view_comes_back(data: st.DataObject) -> None:
    dims = data.draw(st.lists(st.integers(0, 4), max_size=4))
    dtype = data.draw(st.sampled_from(ORDINARY))
    whole, order = random_tensor(dtype, tuple(dims)), np.arange(math.prod(dims)).reshape(dims)
    tensor = whole
    for axis, size in enumerate(dims):
        if data.draw(st.booleans()):
            cut = (slice(None),) * axis + (slice(size // 2, None, 2),)
            tensor, order = tensor[cut], order[cut]
    axes = data.draw(st.permutations(range(len(dims))))
    tensor, order = tensor.permute(axes), order.transpose(axes)
    elements = whole.reshape(-1).view(torch.uint8).numpy().reshape(-1, dtype.itemsize)
    back = through([tensor])[0]
    assert back.shape == tensor.shape and back.dtype == tensor.dtype
    assert raw(tensor) == raw(back) == elements[order.ravel()].tobytes()


def test_nan_payloads_and_lazy_bits() -> None:
    nan = torch.tensor([0x7F800001, -1, 0x7FC12345], dtype=torch.int32).view(torch.float32)
    assert torch.equal(through(nan).view(torch.int32), nan.view(torch.int32))
    assert torch.equal(
        through(nan.expand(2, 3).t()).view(torch.int32), nan.expand(2, 3).t().contiguous().view(torch.int32)
    )
    for dtype in (torch.complex64, torch.complex128, torch.complex32):
        value = torch.tensor([[1 + 2j, 3 - 4j], [0.5j, -7]], dtype=dtype)
        assert value.conj().is_conj() and value.conj().imag.is_neg()
        back = through([value, value.conj(), value.conj().imag, value.conj().t()])
        assert not back[1].is_conj() and not back[2].is_neg()
        for found, expected in zip(back, (value, value.conj(), value.conj().imag, value.conj().t())):
            assert found.tolist() == expected.tolist() and found.dtype == expected.dtype
        assert back[0].data_ptr() != back[1].data_ptr()


def test_build_takes_the_bytes_without_a_copy() -> None:
    data = np.zeros(24, np.uint8)
    built = torch_adapter.build(Leaf("x", "<f4", (2, 3), "weights", "torch.tensor"), data)
    data[:4] = np.frombuffer(np.float32(2.5).tobytes(), np.uint8)
    assert built[0, 0].item() == 2.5


@pytest.mark.parametrize(
    ("name", "shape", "size"),
    [("<f4", (2, 3), 23), ("<f4", (-2, -3), 24), (">f4", (6,), 24), ("<U2", (3,), 24), ("<f4", (0, 2**62, 8), 0)],
)
def test_bytes_that_do_not_fit_are_damage(name: str, shape: tuple[int, ...], size: int) -> None:
    with pytest.raises(Damaged):
        torch_adapter.build(Leaf("x", name, shape, "weights", "torch.tensor"), np.zeros(size, np.uint8))


# ---------------------------------------------------------------- identity


def test_two_names_of_one_memory_are_saved_once_and_come_back_as_one() -> None:
    weight = nn.Parameter(torch.randn(4, 4))
    state = {"a": weight, "b": weight.detach(), "c": weight.data, "d": weight[:], "row": weight[0], "t": weight.t()}
    tree = flatten(state, adapters.describe)
    assert [leaf.path for leaf in tree.leaves] == ["a", "row", "t"]
    back = rebuild(tree)
    assert back["a"] is back["b"] is back["c"] is back["d"]
    assert same(back["row"], weight[0]) and same(back["t"], weight.t())


def test_empty_tensors_are_never_one() -> None:
    empty = torch.empty(0, 3)
    back = through([empty, empty, torch.empty(3, 0)])
    assert back[0] is not back[1] and [tuple(one.shape) for one in back] == [(0, 3), (0, 3), (3, 0)]


def test_a_view_keeps_only_its_own_elements() -> None:
    tree = flatten(torch.randn(1000, 1000)[3, :5], adapters.describe)
    assert tree.leaves[0].shape == (5,) and leaf_bytes(tree)[0].nbytes == 20
    assert rebuild(tree).untyped_storage().nbytes() == 20


# ---------------------------------------------------------------- quantised and sparse


def quantized(dtype: torch.dtype) -> torch.Tensor:
    values = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    if str(dtype)[6:] in ("quint4x2", "quint2x4"):
        return torch.quantize_per_channel(values, torch.rand(5) + 0.1, torch.rand(5), 0, dtype)
    return torch.quantize_per_tensor(values, 0.1, 3, dtype)


@pytest.mark.parametrize("name", sorted(QUANTIZED))
def test_quantized_per_tensor_and_packed(name: str) -> None:
    value = quantized(getattr(torch, name))
    back = through({"q": value})["q"]
    assert back.qscheme() == value.qscheme() and back.shape == value.shape
    assert bytes(back.untyped_storage()) == bytes(value.untyped_storage())
    assert torch.equal(back.dequantize(), value.dequantize())


@pytest.mark.parametrize("name", ["qint8", "quint8", "qint32"])
def test_quantized_per_channel_and_views(name: str) -> None:
    values, dtype = torch.randn(5, 7), getattr(torch, name)
    channel = torch.quantize_per_channel(values, torch.rand(7).double() + 0.1, torch.arange(7), 1, dtype)
    floats = torch.quantize_per_channel(values, torch.rand(5) + 0.1, torch.rand(5), 0, torch.quint8)
    whole = torch.quantize_per_tensor(values, 0.25, 2, dtype)
    for value in (channel, channel[1:3], whole.t(), whole[1::2, 2:], floats):
        tree = flatten(value, adapters.describe)
        back = rebuild(tree)
        assert torch.equal(back.int_repr(), value.int_repr()) and back.qscheme() == value.qscheme()
        if value.qscheme() == torch.per_tensor_affine:
            assert (back.q_scale(), back.q_zero_point()) == (value.q_scale(), value.q_zero_point())
        else:
            assert same(back.q_per_channel_scales(), value.q_per_channel_scales())
            assert same(back.q_per_channel_zero_points(), value.q_per_channel_zero_points())
            assert back.q_per_channel_axis() == value.q_per_channel_axis()


def test_a_quantized_tensor_without_a_scheme_is_refused() -> None:
    with pytest.raises(Unsupported, match=r"(?s)scheme unknown.*where: q"):
        through({"q": torch.empty(4, dtype=torch.qint8)})


def sparse_tensors() -> Iterator[torch.Tensor]:
    dense = torch.zeros(4, 6)
    dense[0, 1], dense[3, 5], dense[2, 0] = 1.5, -2.0, float("nan")
    yield dense.to_sparse()
    yield torch.sparse_coo_tensor(torch.tensor([[1, 1, 0], [2, 2, 0]]), torch.tensor([1.0, 2.0, 3.0]), (2, 3))
    yield torch.sparse_coo_tensor(torch.tensor([[2, 0]]), torch.randn(2, 3), (4, 3))
    yield torch.sparse_coo_tensor(torch.empty(2, 0, dtype=torch.int64), torch.empty(0), (3, 4))
    yield dense.to_sparse_csr()
    yield dense.to_sparse_csc()
    yield dense.to_sparse_bsr((2, 3))
    yield dense.to_sparse_bsc((2, 2))
    yield torch.sparse_csr_tensor(
        torch.tensor([0, 1, 2], dtype=torch.int32),
        torch.tensor([1, 0], dtype=torch.int32),
        torch.tensor([1, 2]),
        (2, 2),
    )


def sparse_parts(value: torch.Tensor) -> list[torch.Tensor]:
    if value.layout == torch.sparse_coo:
        return [value._indices(), value._values()]
    if value.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [value.crow_indices(), value.col_indices(), value.values()]
    return [value.ccol_indices(), value.row_indices(), value.values()]


@pytest.mark.parametrize("value", list(sparse_tensors()), ids=lambda value: str(value.layout))
def test_sparse(value: torch.Tensor) -> None:
    back = through({"s": value})["s"]
    assert back.layout == value.layout and back.shape == value.shape and back.dtype == value.dtype
    assert all(same(*pair) for pair in zip(sparse_parts(back), sparse_parts(value)))
    if value.layout == torch.sparse_coo:
        assert back.is_coalesced() == value.is_coalesced()


# ---------------------------------------------------------------- constants, damage, refusals


def test_dtypes_sizes_devices_and_layouts_as_values() -> None:
    state = {
        "dtypes": list(ALL_DTYPES),
        "sizes": [torch.Size([2, 3]), torch.Size([])],
        "devices": [torch.device("cpu"), torch.device("cuda", 1), torch.device("meta")],
        "layouts": [torch.strided, torch.sparse_coo, torch.sparse_bsc],
        "formats": [torch.channels_last, torch.preserve_format],
        "schemes": [torch.per_tensor_affine, torch.per_channel_affine],
    }
    back = through(state)
    assert back == state and type(back["sizes"][0]) is torch.Size


ONE = torch.ones(1)
COO = {"layout": "sparse_coo", "shape": [2], "indices": torch.tensor([[1]]), "values": ONE, "coalesced": True}
CSR = {
    "layout": "sparse_csr", "shape": [2, 2], "compressed": torch.tensor([0, 1, 1]), "plain": torch.tensor([0]),
    "values": ONE,
}  # fmt: skip
QINT = {
    "dtype": "qint8", "scheme": "per_tensor_affine", "shape": [4], "scale": 1.0, "zero_point": 0,
    "int_repr": torch.zeros(4, dtype=torch.int8),
}  # fmt: skip


def test_the_parts_that_the_next_test_spoils_are_good() -> None:
    assert [adapters.compose(Composite("torch.sparse", parts)).shape for parts in (COO, CSR)] == [(2,), (2, 2)]
    assert adapters.compose(Composite("torch.quantized", QINT)).shape == (4,)


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("torch.constant", {"name": "load"}),
        ("torch.constant", {"name": "__dict__"}),
        ("torch.constant", {"name": ["float32"]}),
        ("torch.constant", {}),
        ("torch.device", {"type": "file:///etc/passwd", "index": None}),
        ("torch.device", {"type": "cuda:1", "index": None}),
        ("torch.device", {"type": "cpu", "index": "x"}),
        ("torch.size", {"sizes": ["a"]}),
        ("torch.size", {"sizes": 3}),
        ("torch.layer", {}),
        ("torch.sparse", {"layout": "strided", "shape": [2], "values": ONE}),
        ("torch.sparse", COO | {"indices": torch.tensor([[7]])}),
        ("torch.sparse", COO | {"shape": [-2]}),
        ("torch.sparse", CSR | {"compressed": torch.tensor([0, 1, 9])}),
        ("torch.quantized", QINT | {"shape": [1 << 40]}),
        ("torch.quantized", QINT | {"shape": [3]}),
        ("torch.quantized", QINT | {"dtype": "float32"}),
        ("torch.quantized", QINT | {"scheme": "per_channel_affine", "axis": 9}),
        ("torch.quantized", QINT | {"int_repr": 5}),
    ],
)
def test_composites_that_no_save_makes_are_damage(kind: str, parts: dict[str, Any]) -> None:
    with pytest.raises(Damaged):
        adapters.compose(Composite(kind, parts))


class Special(torch.Tensor):
    pass


def freed() -> torch.Tensor:
    tensor = torch.randn(8)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.empty(3, device="meta"), "meta"),
        (lambda: nn.parameter.UninitializedParameter(), "forward pass"),
        (lambda: nn.parameter.UninitializedBuffer(), "forward pass"),
        (lambda: torch.randn(3).as_subclass(Special), "Special"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "nested"),
        (lambda: torch.randn(3, 3).to_mkldnn(), "to_dense"),
        (freed, "freed"),
        (lambda: lambda: 1, "running code"),
        (lambda: object(), "running code"),
        (lambda: nn.Linear(2, 2), "running code"),
        (lambda: {1, 2}, "sorted list"),
    ],
)
def test_what_has_no_form_is_refused_by_path(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(Unsupported, match=f"(?s){words}") as caught:
        through({"outer": [{"inner": make()}]})
    assert caught.value.where == "outer/[0]/inner" and caught.value.do


def test_an_open_file_is_refused_by_path(tmp_path: Path) -> None:
    with (tmp_path / "x").open("w") as file, pytest.raises(Unsupported, match="where: log"):
        through({"log": file})


def test_buffers_and_parameters_are_ordinary() -> None:
    back = through([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)])
    assert all(type(one) is torch.Tensor and not one.requires_grad for one in back)
    if hasattr(nn, "Buffer"):
        assert through(nn.Buffer(torch.ones(2))).tolist() == [1, 1]
    with torch.inference_mode():
        inference = torch.arange(3)
    assert through(inference).tolist() == [0, 1, 2]


# ---------------------------------------------------------------- modules


class Net(nn.Module):
    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(6, 8, dtype=dtype)
        self.norm = nn.BatchNorm1d(8, dtype=dtype)
        self.last = nn.Linear(8, 6, bias=False, dtype=dtype)
        self.register_buffer("offset", torch.randn(6, dtype=dtype))
        self.register_buffer("mask", torch.ones(6, dtype=dtype), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.norm(self.first(x)))) + self.offset * self.mask


def roles(state: Any) -> dict[str, str]:
    return {leaf.path: leaf.role for leaf in flatten(state, adapters.describe).leaves}


def test_a_module_is_captured_by_name_and_role() -> None:
    found = roles({"model": adapters.capture(Net(), "model", {})})
    assert found == {
        "model/first.weight": "weights",
        "model/first.bias": "weights",
        "model/norm.weight": "weights",
        "model/norm.bias": "weights",
        "model/norm.running_mean": "buffer",
        "model/norm.running_var": "buffer",
        "model/norm.num_batches_tracked": "buffer",
        "model/last.weight": "weights",
        "model/offset": "buffer",
    }
    assert torch_adapter.not_captured(Net(), "model") == ["model.mask: non-persistent buffer"]


def test_a_module_is_filled_in_place_and_only_when_placed() -> None:
    source, target = Net(1), Net(2)
    target.first.weight.requires_grad_(False)
    before = {id(value) for value in [*target.parameters(), *target.buffers()]}
    pointers = [value.data_ptr() for value in target.parameters()]
    state = through(capture_all({"model": source}))
    report = LoadReport()
    place = adapters.apply(target, state["model"], "model", {"model": target}, report)
    assert report.complete and "model/first.weight" in report.loaded and len(report.loaded) == 9
    assert not same(target.first.weight, source.first.weight)
    place()
    assert before == {id(value) for value in [*target.parameters(), *target.buffers()]}
    assert pointers == [value.data_ptr() for value in target.parameters()]
    assert not target.first.weight.requires_grad and target.first.bias.requires_grad
    assert picture(capture_all({"model": source})) == picture(capture_all({"model": target}))


def test_the_report_of_a_module() -> None:
    target, state = Net(2), through(capture_all({"model": Net(1)}))["model"]
    kept = {name: value.clone() for name, value in target.state_dict().items()}
    state["extra"] = state.pop("first.bias")
    state["last.weight"] = state["last.weight"][:, :3]
    state["offset"] = state["offset"].double()
    report = apply_all({"model": target}, {"model": state})
    assert report.missing == ["model/first.bias"] and report.unexpected == ["model/extra"]
    assert sorted(report.reshaped) == ["model/last.weight", "model/offset"]
    assert all(same(target.state_dict()[name], kept[name]) for name in ("first.bias", "last.weight", "offset"))
    assert same(target.first.weight, state["first.weight"])


def test_arrays_of_numpy_fill_modules() -> None:
    source, target = Net(1), Net(2)
    arrays = {name: value.numpy() for name, value in source.state_dict().items()}
    arrays["first.weight"] = np.asfortranarray(arrays["first.weight"])
    arrays["last.weight"] = arrays["last.weight"].astype(">f4")
    arrays["norm.num_batches_tracked"] = np.int64(0)
    arrays["offset"].flags.writeable = False
    assert apply_all({"model": target}, {"model": arrays}).complete
    assert picture(capture_all({"m": source})) == picture(capture_all({"m": target}))
    half = Net(3, torch.bfloat16)
    as_numpy = {
        name: adapters.numpy_adapter.as_array(leaf, data)
        for name, leaf, data in (
            (leaf.path, leaf, data)
            for tree in [flatten(dict(half.state_dict()), adapters.describe)]
            for leaf, data in zip(tree.leaves, leaf_bytes(tree))
        )
    }
    other = Net(4, torch.bfloat16)
    assert apply_all({"model": other}, {"model": as_numpy}).complete
    assert same(other.first.weight, half.first.weight)


def test_tied_weights_stay_tied() -> None:
    def tied(seed: int) -> nn.ModuleDict:
        torch.manual_seed(seed)
        model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
        model["head"].weight = model["embed"].weight
        return model

    source, target = tied(1), tied(2)
    tree = flatten(capture_all({"model": source}), adapters.describe)
    assert len(tree.leaves) == 1
    report = apply_all({"model": target}, rebuild(tree))
    assert report.exact and target["head"].weight is target["embed"].weight
    assert same(target["head"].weight, source["embed"].weight)

    loose = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    report = apply_all({"model": loose}, rebuild(tree))
    assert report.complete and not report.exact and "head.weight" in report.inexact[0]
    report = apply_all({"model": target}, {"model": {name: one.clone() for name, one in source.state_dict().items()}})
    assert report.complete
    report = apply_all(
        {"model": target}, {"model": {"embed.weight": torch.zeros(5, 3), "head.weight": torch.ones(5, 3)}}
    )
    assert report.reshaped == ["model/head.weight"], "one memory cannot take two values"


class Wrapper(nn.Module):
    """A model with a wrapped part deep inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.trunk = nn.Linear(6, 6)
        self.deep = nn.ModuleList([inner])


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        torch.compile,
        lambda model: torch.compile(nn.DataParallel(model)),
        lambda model: nn.DataParallel(torch.compile(model)),
        lambda model: nn.DataParallel(nn.DataParallel(model)),
        checkpoint_wrapper,
    ],
)
def test_prefixes_of_wrappers_are_dropped(wrap: Callable[[nn.Module], nn.Module]) -> None:
    bare = list(adapters.capture(Net(), "model", {}))
    assert list(adapters.capture(wrap(Net()), "model", {})) == bare
    deep = list(adapters.capture(Wrapper(Net()), "model", {}))
    assert list(adapters.capture(Wrapper(wrap(Net())), "model", {})) == deep
    for source, target in ((wrap(Net(1)), Net(2)), (Net(1), wrap(Net(2))), (Wrapper(wrap(Net(1))), Wrapper(Net(2)))):
        optimizers = [torch.optim.Adam(one.parameters()) for one in (source, target)]
        train_once(source, optimizers[0])
        state = through(capture_all({"model": source, "opt": optimizers[0]}))
        report = apply_all({"model": target, "opt": optimizers[1]}, state)
        assert report.exact, report
        assert all(same(*pair) for pair in zip(source.parameters(), target.parameters()))


def train_once(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    sum(param.square().sum() for param in model.parameters()).backward()
    optimizer.step()


def test_raw_state_dicts_with_prefixes_load() -> None:
    source, target = Net(1), Net(2)
    prefixed = {f"module._orig_mod.{name}": value for name, value in source.state_dict().items()}
    assert apply_all({"model": target}, {"model": prefixed}).exact
    assert same(source.first.weight, target.first.weight)


def test_names_that_only_look_like_prefixes_are_kept() -> None:
    model = nn.ModuleDict({"module": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    assert list(adapters.capture(model, "m", {})) == ["module.weight", "module.bias", "head.weight", "head.bias"]
    clash = nn.ModuleDict({"a": nn.Linear(1, 1, bias=False)})
    clash["_orig_mod"] = nn.ModuleDict({"a": nn.Linear(1, 1, bias=False)})
    assert len(adapters.capture(clash, "m", {})) == 2


def test_distributed_data_parallel_and_dtensor(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert torch_adapter.world() == (0, 1)
        source, target = nn.parallel.DistributedDataParallel(Net(1)), Net(2)
        assert apply_all({"model": target}, through(capture_all({"model": source}))).exact
        assert same(source.module.first.weight, target.first.weight)
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        tensor = torch.distributed.tensor
        alone = tensor.distribute_tensor(torch.randn(4), mesh)
        assert torch.equal(through({"w": alone})["w"], alone.full_tensor())
        unfinished = tensor.DTensor.from_local(torch.ones(4), mesh, [tensor.Partial()])
        with pytest.raises(Unsupported, match=r"(?s)a sum.*where: w.*redistribute"):
            through({"w": unfinished})
    finally:
        torch.distributed.destroy_process_group()
    assert torch_adapter.world() is None


def test_lazy_modules_are_refused() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    for act in (
        lambda: adapters.capture(model, "model", {}),
        lambda: adapters.apply(model, {"0.weight": torch.ones(3, 2)}, "model", {}, LoadReport()),
    ):
        with pytest.raises(Unsupported, match=r"(?s)deferred.*where: model/0.weight.*forward pass"):
            act()
    model(torch.ones(1, 2))
    assert list(adapters.capture(model, "model", {})) == ["0.weight", "0.bias"]


def test_wrappers_that_shard_are_refused() -> None:
    sharded = type("FullyShardedDataParallel", (nn.Sequential,), {})(nn.Linear(2, 2))
    with pytest.raises(Unsupported, match=r"(?s)other ranks.*where: model/0"):
        adapters.capture(nn.Sequential(sharded), "model", {})


class Extra(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.seen: Any = {"count": 0, "at": torch.zeros(1)}

    def get_extra_state(self) -> Any:
        return self.seen

    def set_extra_state(self, state: Any) -> None:
        self.seen = state


def test_extra_state_goes_through_load_state_dict() -> None:
    source, target = nn.DataParallel(nn.Sequential(Extra())), nn.Sequential(Extra())
    source.module[0].seen = {"count": 7, "at": torch.ones(1)}
    captured = capture_all({"model": source})
    assert roles(captured)["model/0._extra_state/at"] == "other"
    report = apply_all({"model": target}, through(captured))
    assert report.exact and target[0].seen["count"] == 7 and target[0].seen["at"].item() == 1
    source.module[0].seen = {"hook": lambda: 1}
    with pytest.raises(Unsupported, match=r"where: model/0\._extra_state/hook"):
        through(capture_all({"model": source}))


def renaming() -> nn.Module:
    model = nn.Linear(2, 2)

    def save(module: nn.Module, state: Any, prefix: str, _: Any) -> None:
        state[prefix + "w"] = state.pop(prefix + "weight")

    def load(module: nn.Module, state: Any, prefix: str, *_: Any) -> None:
        state[prefix + "weight"] = state.pop(prefix + "w")

    model.register_state_dict_post_hook(save)
    model.register_load_state_dict_pre_hook(load)
    return model


def test_hooks_that_rename() -> None:
    source, target = renaming(), renaming()
    captured = capture_all({"model": source})
    assert roles(captured) == {"model/bias": "weights", "model/w": "weights"}
    assert apply_all({"model": target}, through(captured)).exact
    assert same(source.weight, target.weight)


def test_parametrized_and_spectral_norm_modules() -> None:
    for make in (
        lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
        lambda: torch.nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)),
        lambda: torch.nn.utils.spectral_norm(nn.Linear(3, 4)),
    ):
        source, target = make(), make()
        source(torch.randn(2, 3))
        assert apply_all({"m": target}, through(capture_all({"m": source}))).exact
        assert picture(capture_all({"m": source})) == picture(capture_all({"m": target}))


def test_dynamically_quantized_modules() -> None:
    quantize = getattr(getattr(torch.ao, "quantization", None), "quantize_dynamic", None)
    if quantize is None:
        pytest.skip("this torch has no eager quantisation")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source, target = (quantize(nn.Sequential(nn.Linear(4, 4)), {nn.Linear}) for _ in range(2))
    state = through(capture_all({"m": source}))
    assert apply_all({"m": target}, state).exact
    x = torch.randn(3, 4)
    assert same(source(x), target(x))


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {"net": self.inner.state_dict(), 3: "three"}

    def load_state_dict(self, state: Any) -> None:  # type: ignore[override]
        assert state[3] == "three"
        self.inner.load_state_dict(state["net"])


def test_a_module_with_a_format_of_its_own_goes_the_generic_way() -> None:
    source, target = Own(), Own()
    assert apply_all({"m": target}, through(capture_all({"m": source}))).complete
    assert same(source.inner.weight, target.inner.weight)


def test_something_else_than_a_module_is_a_mismatch() -> None:
    with pytest.raises(Mismatch, match="where: model"):
        adapters.apply(Net(), [1, 2], "model", {}, LoadReport())


# ---------------------------------------------------------------- optimizers

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "Adadelta": {"lr": 0.5},
    "Adafactor": {"lr": 0.05},
    "Adagrad": {"lr": 0.05, "initial_accumulator_value": 0.1},
    "Adam": {"lr": 0.01, "amsgrad": True},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
    "Adamax": {"lr": 0.01},
    "ASGD": {"lr": 0.01, "t0": 2.0},
    "LBFGS": {"lr": 0.1, "max_iter": 3, "history_size": 4, "line_search_fn": "strong_wolfe"},
    "Muon": {"lr": 0.01},
    "NAdam": {"lr": 0.01},
    "RAdam": {"lr": 0.01},
    "RMSprop": {"lr": 0.01, "momentum": 0.9, "centered": True},
    "Rprop": {"lr": 0.01},
    "SGD": {"lr": 0.05, "momentum": 0.9, "nesterov": True},
    "SparseAdam": {"lr": 0.01},
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *OPTIMIZERS.items(),
    ("Adam", {"lr": 0.01, "fused": True}),
    ("Adam", {"lr": 0.01, "foreach": True}),
    ("Adam", {"lr": lambda: torch.tensor(0.01), "foreach": False}),
    ("AdamW", {"lr": lambda: torch.tensor(0.01, dtype=torch.float64), "foreach": False, "maximize": True}),
    ("SGD", {"lr": 0.05}),
    ("SGD", {"lr": lambda: torch.tensor(0.05), "momentum": 0.9}),
]
X = torch.randn(16, 6, generator=torch.Generator().manual_seed(5))


def test_every_optimizer_of_torch_is_listed() -> None:
    kinds = {
        name
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    }
    assert kinds == set(OPTIMIZERS)


class Job:
    """A model, its optimizer, and one step."""

    def __init__(self, name: str, options: dict[str, Any], seed: int) -> None:
        torch.manual_seed(seed)
        self.model: nn.Module
        if name == "SparseAdam":
            self.model = nn.Sequential(nn.Embedding(12, 4, sparse=True))
        elif name == "Muon":
            self.model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 6, bias=False))
        else:
            self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 6))
        options = {key: value() if callable(value) else value for key, value in options.items()}
        self.optimizer = getattr(torch.optim, name)(self.model.parameters(), **options)
        self.tracked = {"model": self.model, "optimizer": self.optimizer}
        self.count = 0

    def step(self, count: int) -> None:
        x = torch.tensor([count % 5, 3, 7]) if isinstance(self.model[0], nn.Embedding) else X * (1 + count / 10)

        def closure() -> torch.Tensor:
            self.optimizer.zero_grad()
            loss = (self.model(x) - 0.5).square().mean()
            loss.backward()
            return loss

        self.optimizer.step(closure)


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=lambda value: value if isinstance(value, str) else "")
def test_every_optimizer_goes_on_as_if_never_interrupted(name: str, options: dict[str, Any], used: bool) -> None:
    first, second = Job(name, options, 1), Job(name, options, 2)
    for count in range(3):
        first.step(count)
    if used:
        second.step(99)
    for group in second.optimizer.param_groups:
        if not isinstance(group["lr"], torch.Tensor):
            group["lr"] = 77.0
    saved = capture_all(first.tracked)
    state = through(saved)
    report = apply_all(second.tracked, state)
    assert report.exact, report
    assert picture(capture_all(first.tracked)) == picture(capture_all(second.tracked))
    for count in range(3, 6):
        first.step(count)
        second.step(count)
    assert all(same(*pair) for pair in zip(first.model.parameters(), second.model.parameters()))
    assert picture(capture_all(first.tracked)) == picture(capture_all(second.tracked))


def test_the_form_of_an_optimizer() -> None:
    job = Job("Adam", {"lr": 0.01, "betas": (0.8, 0.9)}, 1)
    job.step(0)
    captured = capture_all(job.tracked)
    assert set(roles({"o": captured["optimizer"]}).values()) == {"optimizer"}
    value = captured["optimizer"].value
    assert list(value["state"]) == [f"model.{name}" for name, _ in job.model.named_parameters()]
    assert set(value["state"]["model.0.weight"]) == {"step", "exp_avg", "exp_avg_sq"}
    (group,) = value["groups"]
    assert group["betas"] == (0.8, 0.9) and group["params"] == list(value["state"])


def test_parameters_of_no_tracked_module_are_named_by_position() -> None:
    job = Job("Adam", {"lr": 0.01}, 1)
    job.step(0)
    alone = capture_all({"optimizer": job.optimizer})
    assert list(alone["optimizer"].value["state"]) == [f"group0.param{number}" for number in range(6)]
    other = Job("Adam", {"lr": 0.01}, 2)
    assert apply_all({"optimizer": other.optimizer}, through(alone)).exact
    again = Job("Adam", {"lr": 0.01}, 2)
    assert apply_all(again.tracked, {**through(alone), "model": through(capture_all(job.tracked))["model"]}).exact
    assert picture(capture_all(again.tracked)) == picture(capture_all(job.tracked))
    report = apply_all({"optimizer": other.optimizer}, {"optimizer": through(capture_all(job.tracked))["optimizer"]})
    assert report.missing[0] == "optimizer/state/group0.param0"
    assert report.unexpected[0] == "optimizer/state/model.0.weight"


def test_tied_parameters_have_one_state() -> None:
    def make(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
        model["b"].weight = model["a"].weight
        return {"model": model, "opt": torch.optim.Adam(model.parameters())}

    source, target = make(1), make(2)
    train_once(source["model"], source["opt"])
    captured = capture_all(source)
    assert list(captured["opt"].value["state"]) == ["model.a.weight", "model.a.bias", "model.b.bias"]
    assert apply_all(target, through(captured)).exact
    assert picture(capture_all(source)) == picture(capture_all(target))


def grouped(model: nn.Module, order: list[list[str]], **options: Any) -> torch.optim.Optimizer:
    named = dict(model.named_parameters())
    groups = [{"params": [named[name] for name in names], "lr": 0.01 * (1 + len(names))} for names in order]
    return torch.optim.AdamW(groups, **options)


def test_reordered_parameters_and_groups_are_found_by_name() -> None:
    decay, plain = ["first.weight", "last.weight"], ["first.bias", "norm.weight", "norm.bias"]
    source, target = Net(1), Net(2)
    optimizers = grouped(source, [decay, plain]), grouped(target, [plain[::-1], decay[::-1]])
    for number, group in enumerate(optimizers[0].param_groups):
        group["lr"], group["weight_decay"] = 0.1 + number, 0.5 * number
    for _ in range(2):
        train_once(source, optimizers[0])
    state = through(capture_all({"model": source, "opt": optimizers[0]}))
    assert apply_all({"model": target, "opt": optimizers[1]}, state).exact
    assert [group["lr"] for group in optimizers[1].param_groups] == [1.1, 0.1]
    for one, other in zip(source.parameters(), target.parameters()):
        mine, theirs = optimizers[0].state[one], optimizers[1].state[other]
        assert all(same(mine[key], theirs[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    for model, optimizer in ((source, optimizers[0]), (target, optimizers[1])):
        optimizer.zero_grad()
        train_once(model, optimizer)
    assert all(same(*pair) for pair in zip(source.parameters(), target.parameters()))


def test_lbfgs_in_another_order_is_not_loaded() -> None:
    def make(order: int) -> dict[str, Any]:
        model = nn.Linear(3, 3)
        return {"model": model, "opt": torch.optim.LBFGS(list(model.parameters())[::order])}

    source, target = make(1), make(-1)
    source["opt"].step(lambda: source["model"](torch.ones(1, 3)).square().sum())
    report = apply_all(target, through(capture_all(source)))
    assert report.reshaped == ["opt/groups/[0]/params"]


def test_the_report_of_an_optimizer_with_other_groups() -> None:
    source, target = Net(1), Net(2)
    names = [name for name, _ in source.named_parameters()]
    mine = grouped(source, [names[:2], names[2:4]])
    theirs = grouped(target, [names[:1], names[1:3], names[4:]])
    train_once(source, mine)
    state = through(capture_all({"model": source, "opt": mine}))
    report = LoadReport()
    place = adapters.apply(theirs, state["opt"], "opt", {"model": target}, report)
    assert report.missing == [f"opt/state/model.{names[4]}", "opt/groups/[2]"]
    assert report.unexpected == [f"opt/state/model.{names[3]}"]
    assert report.reshaped == ["opt/groups/[0]/params", "opt/groups/[1]/params"]
    assert not theirs.state
    place()
    assert len(theirs.state) == 3 and theirs.param_groups[0]["lr"] == 0.02


def test_state_of_a_parameter_of_another_shape_is_not_loaded() -> None:
    source, target = nn.Linear(3, 4), nn.Linear(3, 5)
    mine, theirs = torch.optim.Adam(source.parameters()), torch.optim.Adam(target.parameters())
    train_once(source, mine)
    report = apply_all({"m": target, "o": theirs}, through(capture_all({"m": source, "o": mine})))
    assert report.reshaped == ["m/weight", "m/bias", "o/state/m.weight", "o/state/m.bias"]
    assert not theirs.state
    train_once(target, theirs)


def test_options_that_the_checkpoint_lacks_are_said() -> None:
    job = Job("Adam", {"lr": 0.01}, 1)
    state = through(capture_all(job.tracked))
    del state["optimizer"]["groups"][0]["eps"]
    state["optimizer"]["groups"][0]["initial_lr"] = 0.5
    other = Job("Adam", {"lr": 0.02, "eps": 0.125}, 2)
    report = apply_all(other.tracked, state)
    assert report.complete and not report.exact and "optimizer/groups/[0]/eps" in report.inexact[0]
    (group,) = other.optimizer.param_groups
    assert (group["eps"], group["lr"], group["initial_lr"]) == (0.125, 0.01, 0.5)


def test_state_that_was_there_and_is_not_in_the_checkpoint_goes() -> None:
    source, target = Job("Adam", {"lr": 0.01}, 1), Job("Adam", {"lr": 0.01}, 2)
    target.step(0)
    assert apply_all(target.tracked, through(capture_all(source.tracked))).exact
    assert not target.optimizer.state


def test_state_tensors_that_fit_are_filled_in_place() -> None:
    source = Job("Adam", {"lr": lambda: torch.tensor(0.5), "foreach": False}, 1)
    target = Job("Adam", {"lr": lambda: torch.tensor(0.25), "foreach": False}, 2)
    source.step(0)
    target.step(1)
    param = target.model[0].weight
    moment, rate = target.optimizer.state[param]["exp_avg"], target.optimizer.param_groups[0]["lr"]
    assert apply_all(target.tracked, through(capture_all(source.tracked))).exact
    assert target.optimizer.state[param]["exp_avg"] is moment and target.optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.5 and same(moment, source.optimizer.state[source.model[0].weight]["exp_avg"])


def test_one_tensor_as_an_option_of_two_groups_stays_one() -> None:
    def make(value: float) -> dict[str, Any]:
        model, rate = nn.Linear(2, 2), torch.tensor(value)
        groups = [{"params": [param], "lr": rate} for param in model.parameters()]
        return {"m": model, "o": torch.optim.SGD(groups, lr=rate)}

    source, target = make(0.5), make(0.1)
    assert apply_all(target, through(capture_all(source))).exact
    first, second = target["o"].param_groups
    assert first["lr"] is second["lr"] and first["lr"].item() == 0.5
    apart = make(0.3)
    apart["o"].param_groups[1]["lr"] = torch.tensor(0.7)
    shared = make(0.1)
    apply_all(shared, through(capture_all(apart)))
    assert [round(group["lr"].item(), 4) for group in shared["o"].param_groups] == [0.3, 0.7]


def test_optimizer_state_takes_the_strides_of_its_parameter() -> None:
    def make(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
        return {"m": model, "o": torch.optim.Adam(model.parameters())}

    source, target = make(1), make(2)
    train_once(source["m"], source["o"])
    assert apply_all(target, through(capture_all(source))).exact
    mine, theirs = (one["o"].state[one["m"].weight]["exp_avg"] for one in (source, target))
    assert mine.stride() == theirs.stride() != mine.contiguous().stride() and same(mine, theirs)


class Wide(torch.optim.Optimizer):
    """Keeps float32 state for parameters of any type, and state that belongs to no parameter."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.state["total"] = self.state.get("total", 0) + 1
        for group in self.param_groups:
            for param in group["params"]:
                entry = self.state[param]
                master = entry.setdefault("master", param.detach().float().clone())
                master.mul_(0.999).sub_(param.grad.float(), alpha=group["lr"])
                param.copy_(master)


def test_float32_state_of_bfloat16_parameters_is_not_cast() -> None:
    source, target = Net(1, torch.bfloat16), Net(2, torch.bfloat16)
    mine, theirs = Wide(source.parameters(), 0.01), Wide(target.parameters(), 0.01)
    for _ in range(3):
        train_once(source, mine)
    state = through(capture_all({"model": source, "opt": mine}))
    assert apply_all({"model": target, "opt": theirs}, state).exact
    assert theirs.state["total"] == 3
    for one, other in zip(source.parameters(), target.parameters()):
        assert theirs.state[other]["master"].dtype == torch.float32
        assert same(mine.state[one]["master"], theirs.state[other]["master"])
    raw_state = through({"opt": copying.deepcopy(mine.state_dict())})
    again = Wide(Net(3, torch.bfloat16).parameters(), 0.5)
    assert apply_all({"opt": again}, raw_state).complete
    kept = [again.state[param]["master"] for param in again.param_groups[0]["params"]]
    assert [raw(one) for one in kept] == [raw(mine.state[param]["master"]) for param in source.parameters()]


class Lookahead(torch.optim.SGD):
    """An optimizer with a format of its own."""

    slow = 0

    def state_dict(self) -> dict[str, Any]:
        return {"inner": super().state_dict(), "slow": self.slow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state["inner"])
        self.slow = state["slow"]


def test_an_optimizer_with_its_own_format_keeps_it() -> None:
    source, target = Net(1), Net(2)
    mine, theirs = (Lookahead(model.parameters(), lr=0.1, momentum=0.9) for model in (source, target))
    train_once(source, mine)
    mine.slow = 5
    captured = capture_all({"opt": mine})
    assert set(roles(captured).values()) == {"optimizer"}
    assert apply_all({"opt": theirs}, through(captured)).complete
    assert theirs.slow == 5 and picture(theirs.state_dict()) == picture(mine.state_dict())


def test_hooks_of_an_optimizer_are_called() -> None:
    source, target = (Net(seed, torch.bfloat16) for seed in (1, 2))
    mine, theirs = (torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (source, target))
    train_once(source, mine)
    calls: list[str] = []
    for one in (mine, theirs):
        one.register_state_dict_post_hook(lambda *_: calls.append("save"))
        one.register_load_state_dict_post_hook(lambda *_: calls.append("load"))
    report = apply_all({"opt": theirs}, through(capture_all({"opt": mine})))
    assert calls == ["save", "load"] and report.complete
    assert not report.exact, "torch's own load casts state to the type of the parameters"
    assert picture(mine.state_dict()) == picture(theirs.state_dict())


def test_named_parameters_and_functions_as_options() -> None:
    source, target = Net(1), Net(2)
    mine = torch.optim.SGD(source.named_parameters(), lr=0.1, momentum=0.9)
    theirs = torch.optim.SGD(list(target.named_parameters())[::-1], lr=0.2, momentum=0.9)
    train_once(source, mine)
    assert apply_all({"m": target, "o": theirs}, through(capture_all({"m": source, "o": mine}))).exact
    if "param_names" in theirs.param_groups[0]:
        assert theirs.param_groups[0]["param_names"] == [name for name, _ in target.named_parameters()][::-1]
    mine.param_groups[0]["schedule"] = lambda step: step
    with pytest.raises(Unsupported, match=r"where: o/groups/\[0\]/schedule"):
        through(capture_all({"m": source, "o": mine}))


def test_names_that_fall_together_are_refused() -> None:
    left, right = nn.ModuleDict({"b": nn.Linear(2, 2)}), nn.Linear(2, 2)
    optimizer = torch.optim.SGD([*left.parameters(), *right.parameters()], lr=0.1)
    with pytest.raises(Unsupported, match=r"a\.b\.weight"):
        adapters.capture(optimizer, "o", {"a": left, "a.b": right})


@pytest.mark.parametrize("state", [3, {}, {"state": {}, "groups": [{}]}, {"state": [], "groups": 3}])
def test_something_else_than_an_optimizer_is_a_mismatch(state: Any) -> None:
    with pytest.raises(Mismatch, match="where: o"):
        adapters.apply(torch.optim.SGD(Net().parameters(), lr=1.0), state, "o", {}, LoadReport())


def test_state_of_parameters_in_no_group_is_said() -> None:
    job = Job("Adam", {"lr": 0.1}, 1)
    job.step(0)
    assert torch_adapter.not_captured(job.optimizer, "o") == []
    job.optimizer.param_groups[0]["params"].pop()
    assert "o: state of 1 parameters" in torch_adapter.not_captured(job.optimizer, "o")[0]
    assert len(capture_all(job.tracked)["optimizer"].value["state"]) == 5


# ---------------------------------------------------------------- schedulers, scalers, generators

schedule = torch.optim.lr_scheduler
SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: schedule.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: schedule.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: schedule.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: schedule.MultiStepLR(o, [2, 4, 4], 0.5),
    "ConstantLR": lambda o: schedule.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: schedule.LinearLR(o, 0.1, 1.0, 5),
    "ExponentialLR": lambda o: schedule.ExponentialLR(o, 0.8),
    "SequentialLR": lambda o: schedule.SequentialLR(
        o, [schedule.ConstantLR(o, 0.1, 2), schedule.ExponentialLR(o, 0.7)], [2]
    ),
    "PolynomialLR": lambda o: schedule.PolynomialLR(o, 9, 2.0),
    "CosineAnnealingLR": lambda o: schedule.CosineAnnealingLR(o, 7),
    "ChainedScheduler": lambda o: schedule.ChainedScheduler(
        [schedule.ConstantLR(o, 0.1, 4), schedule.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "ReduceLROnPlateau": lambda o: schedule.ReduceLROnPlateau(o, patience=0, threshold=10.0),
    "CyclicLR": lambda o: schedule.CyclicLR(o, 0.01, 0.1, 3, mode="exp_range", gamma=0.9),
    "CosineAnnealingWarmRestarts": lambda o: schedule.CosineAnnealingWarmRestarts(o, 2, 2),
    "OneCycleLR": lambda o: schedule.OneCycleLR(o, 0.2, total_steps=12),
}


def test_every_scheduler_of_torch_is_listed() -> None:
    base = schedule.LRScheduler
    kinds = {
        name
        for name, kind in vars(schedule).items()
        if isinstance(kind, type) and issubclass(kind, base) and not name.startswith("_") and kind is not base
    }
    assert kinds == set(SCHEDULERS)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
def test_every_scheduler_goes_on_as_if_never_interrupted(name: str, rate: Any) -> None:
    def job(seed: int) -> tuple[Job, Any]:
        made = Job("SGD", {"lr": lambda: copying.deepcopy(rate), "momentum": 0.9}, seed)
        made.tracked["scheduler"] = SCHEDULERS[name](made.optimizer)
        return made, made.tracked["scheduler"]

    def step(made: Job, scheduler: Any, count: int) -> None:
        made.step(count)
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))

    first, second = job(1), job(2)
    for count in range(3):
        step(*first, count)
    report = apply_all(second[0].tracked, through(capture_all(first[0].tracked)))
    assert report.exact, report
    assert picture(capture_all(first[0].tracked)) == picture(capture_all(second[0].tracked))
    for count in range(3, 6):
        step(*first, count)
        step(*second, count)
        assert first[0].optimizer.param_groups[0]["lr"] == second[0].optimizer.param_groups[0]["lr"]
    assert picture(capture_all(first[0].tracked)) == picture(capture_all(second[0].tracked))


def test_grad_scaler() -> None:
    def make(seed: int, scale: float) -> tuple[Job, Any]:
        made = Job("SGD", {"lr": 0.1}, seed)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
        made.tracked["scaler"] = scaler
        return made, scaler

    def step(made: Job, scaler: Any) -> None:
        made.optimizer.zero_grad()
        scaler.scale(made.model(X).square().mean()).backward()
        scaler.step(made.optimizer)
        scaler.update()

    first, second = make(1, 64.0), make(2, 8.0)
    for _ in range(3):
        step(*first)
    assert apply_all(second[0].tracked, through(capture_all(first[0].tracked))).exact
    for one in (first, second):
        step(*one)
    assert first[1].get_scale() == second[1].get_scale() == 256.0
    assert picture(capture_all(first[0].tracked)) == picture(capture_all(second[0].tracked))


def test_generators() -> None:
    source, target = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    torch.rand(5, generator=source)
    captured = capture_all({"g": source})
    assert roles(captured) == {"g": "rng"}
    assert apply_all({"g": target}, through(captured)).exact
    assert torch.equal(torch.rand(9, generator=source), torch.rand(9, generator=target))
    assert apply_all({"g": target}, {"g": torch.zeros(3, dtype=torch.uint8)}).reshaped == ["g"]


def test_the_random_state_of_torch() -> None:
    torch.manual_seed(3)
    torch.rand(7)
    state = through({"rng": Roled("rng", torch_adapter.random_state())})["rng"]
    assert set(state) <= set(torch_adapter.RANDOM)
    expected = torch.rand(5)
    torch.manual_seed(9)
    assert torch_adapter.set_random_state(state) == []
    assert torch.equal(torch.rand(5), expected)
    assert torch_adapter.set_random_state({"torch": np.asarray(state["torch"])}) == []
    assert torch.equal(torch.rand(5), expected)
    (said,) = torch_adapter.set_random_state({"torch": torch.zeros(3, dtype=torch.uint8)})
    assert said.startswith("random state of torch: ")


def test_random_state_of_devices_that_are_not_here_is_said() -> None:
    count = torch.cuda.device_count() + 1
    (said,) = torch_adapter.set_random_state({"torch.cuda": [torch.zeros(16, dtype=torch.uint8)] * count})[:1]
    assert f"saved with {count} GPUs, {count - 1} here" in said
    if not torch.backends.mps.is_available():
        assert "torch.mps" in torch_adapter.set_random_state({"torch.mps": torch.zeros(1)})[0]


def test_fence_and_the_door_of_the_room() -> None:
    adapters.fence()
    assert all(adapters.adapter_for_kind(kind) is torch_adapter for kind in torch_adapter.KINDS)
    assert torch_adapter.owns(Net()) and torch_adapter.owns(torch.Generator()) and not torch_adapter.owns(torch.ones(1))
    with pytest.raises(Unsupported, match="cannot track"):
        adapters.check_trackable(torch.ones(1), "x")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_tensors_come_to_the_host_and_state_goes_back() -> None:
    tensor = torch.randn(64, 3, device="cuda")
    assert torch.equal(through(tensor), tensor.cpu()) and torch.equal(through(tensor.t()), tensor.t().cpu())
    model = Net(1).cuda()
    optimizer = torch.optim.Adam(model.parameters())
    train_once(model, optimizer)
    state = through(capture_all({"m": model, "o": optimizer}))
    other = Net(2).cuda()
    fresh = torch.optim.Adam(other.parameters())
    assert apply_all({"m": other, "o": fresh}, state).exact
    assert fresh.state[other.first.weight]["exp_avg"].is_cuda and not fresh.state[other.first.weight]["step"].is_cuda
    for one, opt in ((model, optimizer), (other, fresh)):
        opt.zero_grad()
        train_once(one, opt)
    assert all(same(*pair) for pair in zip(model.parameters(), other.parameters()))
