"""What the names in a .pth stream stand for: a closed table of names and data. Any other name becomes an `Opaque`."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from everystep.errors import Unsupported
from everystep.formats import pth_numpy
from everystep.formats.content import Opaque
from everystep.formats.pth_numpy import NumpyArray, NumpyDtype
from everystep.formats.pth_stream import Malformed, Name, Wrapped
from everystep.schema.dtype import ML_DTYPES

DTYPES: dict[str, np.dtype[Any]] = {
    **{name: np.dtype(name) for name in (
        "float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8",
        "bool", "complex64", "complex128",
    )},
    **{name: ML_DTYPES[name] for name in (
        "bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "complex32",
    ) if name in ML_DTYPES},
}  # fmt: skip
"""Element types of torch, by torch's names."""
STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "LongStorage": "int64",
    "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8",
    "BoolStorage": "bool", "BFloat16Storage": "bfloat16", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128", "UntypedStorage": "uint8", "QInt8Storage": "int8", "QUInt8Storage": "uint8",
    "QInt32Storage": "int32", "QUInt4x2Storage": "uint8", "QUInt2x4Storage": "uint8",
}  # fmt: skip
_STORAGE_MODULES = ("torch", "torch.cuda", "torch.storage")
_OTHER_DTYPES = {
    "quint8", "qint8", "qint32", "quint4x2", "quint2x4", "float4_e2m1fn_x2", "bits8", "bits16", "bits1x8", "bits2x4",
    "bits4x2", "complex32", *(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)),
}  # fmt: skip
_LAYOUTS = ("strided", "sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc")
_SCHEMES = ("per_tensor_affine", "per_channel_affine", "per_channel_affine_float_qparams")
_CONSTANTS = frozenset((*DTYPES, *_OTHER_DTYPES, *_LAYOUTS, *_SCHEMES))
_TENSOR_CLASSES = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
_KEY_PARTS_MAX, _KEY_TEXT_MAX = 64, 1 << 16
_SIZE_MAX = 1 << 62


class Storage:
    """Bytes that tensors lie in: a record of the file, or a part of one (`start` and `size` in elements)."""

    __slots__ = ("dtype", "key", "kind", "size", "start", "whole")

    def __init__(self, kind: str, key: str, whole: int, start: int, size: int) -> None:
        self.kind, self.key, self.whole, self.start, self.size = kind, key, whole, start, size
        self.dtype = DTYPES[STORAGES[kind]]


class Tensor:
    """A tensor that was described, not read yet: only what is reachable in the end costs memory."""

    __slots__ = ("conj", "dtype", "neg", "offset", "shape", "storage", "strides")

    def __init__(self, storage: Any, offset: Any, shape: Any, strides: Any, dtype: np.dtype[Any], extra: Any) -> None:
        shape, strides = _plain(shape), _plain(strides)
        if type(storage) is not Storage or not (type(shape) is type(strides) is tuple and len(shape) == len(strides)):
            raise Malformed("not a tensor")
        if any(type(n) is not int or not 0 <= n < _SIZE_MAX for n in (offset, *shape, *strides)):
            raise Malformed("a shape, stride or offset that no tensor has")
        extra = {} if extra is None else extra
        if type(extra) is not dict or not extra.keys() <= {"conj", "neg"}:
            raise Malformed("unknown metadata of a tensor")
        self.storage, self.offset, self.shape, self.strides, self.dtype = storage, offset, shape, strides, dtype
        self.conj, self.neg = bool(extra.get("conj")), bool(extra.get("neg"))


class Objects:
    """Answers the machine. `storages` are those that the stream named, `changed_keys` what became of some keys."""

    def __init__(self, stream_bytes: int) -> None:
        self.storages: dict[str, Storage] = {}
        self.changed_keys: list[str] = []
        # What is built by the table may use one part of the stream many times: in all, a few streams at most.
        self._budget = 4 * stream_bytes + (1 << 20)

    def call(self, function: Any, args: Any) -> Any:
        if isinstance(function, Opaque):
            return function
        if type(function) is not Name or type(args) is not tuple:
            raise Malformed("not a call")
        maker = _MAKERS.get((_module(function.module), function.name))
        return Opaque(function.text) if maker is None else maker(self, *args)

    def build(self, target: Any, state: Any) -> None:
        if isinstance(target, Opaque) or type(target) is OrderedDict:
            return  # attributes of what is not built, and of a dict: `_metadata` of a state_dict
        if type(target) is NumpyDtype:
            target.build(state)
        elif type(target) is NumpyArray:
            self.spend(state[4])
            target.build(state)
        elif type(target) is Wrapped and type(target.value) is dict and type(state) is dict:
            self.spend(state)
            target.value.update(state)
        else:
            raise Malformed("state for what takes none")

    def persistent(self, id: Any) -> Any:
        if type(id) is not tuple or not id or id[0] not in ("storage", "module"):
            raise Malformed("not an id of a storage")
        if id[0] == "module":
            return id[1]  # old files keep the source text beside a class
        _, kind, key, _, size, *part = id
        if type(kind) is not Name or kind.module not in _STORAGE_MODULES or kind.name not in STORAGES:
            raise Malformed("not a storage")
        start, whole = 0, size
        if part and part[0] is not None:
            _, start, size = part[0]  # files of 2017: a storage that is a part of another
        if type(key) is not str or any(type(n) is not int or not 0 <= n < _SIZE_MAX for n in (whole, start, size)):
            raise Malformed("not an id of a storage")
        if start + size > whole:
            raise Malformed("a part outside its storage")
        storage = Storage(kind.name, key, whole, start, size)
        self.storages.setdefault(key, storage)
        return storage

    def key(self, key: Any) -> Any:
        """A dict key: only what hashes in bounded time and has few twins of equal hash."""
        self._parts = 0
        return self._key(key)

    def _key(self, key: Any) -> Any:
        self._parts += 1
        kind = type(key)
        if self._parts > _KEY_PARTS_MAX or (kind in (str, bytes) and len(key) > _KEY_TEXT_MAX):
            raise Unsupported("a dict key of many parts or bytes", do="save this dict with short text as keys")
        if key is None or kind in (bool, float, str, bytes) or (kind is int and -1 << 63 <= key < 1 << 64):
            return key
        if kind is tuple:
            return tuple(map(self._key, key))
        if kind is Wrapped:
            self.changed_keys.append(key.text)
            return self._key(key.value)
        if kind is Name:
            return Opaque(key.text)  # becomes its name when the state is put together
        raise Unsupported(f"a dict key of type {getattr(key, 'class_name', kind.__name__)}", do="save text as keys")

    def spend(self, built_from: Any) -> None:
        self._budget -= 64 + (128 if isinstance(built_from, dict) else 16) * len(built_from)
        if self._budget < 0:
            raise Malformed("builds far more than the stream holds")


def constant(name: Name) -> str | None:
    """The text for a constant of torch (a dtype, a layout); None for any other name."""
    return name.text if name.module == "torch" and name.name in _CONSTANTS else None


def _module(name: str) -> str:
    """One name for what Python 2 and 3, and NumPy 1 and 2, call differently."""
    name = {"__builtin__": "builtins", "copy_reg": "copyreg", "pathlib._local": "pathlib"}.get(name, name)
    return f"numpy._core{name[10:]}" if name.startswith("numpy.core.") else name


def _plain(value: Any) -> Any:
    return value.value if type(value) is Wrapped else value


# ---------------------------------------------------------------------------------------------------------- torch


def _tensor(self: Objects, storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Any:
    return Tensor(storage, offset, shape, strides, storage.dtype, rest[2] if len(rest) > 2 else None)


def _tensor_v3(self: Objects, storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Any:
    _, _, dtype, *extra = rest
    if type(dtype) is not Name or constant(dtype) is None:
        raise Malformed("not a dtype")
    if dtype.name not in DTYPES:
        return Opaque(f"torch.Tensor of {dtype.text}")
    return Tensor(storage, offset, shape, strides, DTYPES[dtype.name], extra[0] if extra else None)


def _parameter(self: Objects, data: Any, *rest: Any) -> Any:
    if type(data) not in (Tensor, Wrapped, Opaque):
        raise Malformed("not a tensor")
    return data


def _parameter_with_state(self: Objects, data: Any, grad: Any, hooks: Any, state: Any) -> Any:
    _parameter(self, data)
    return Wrapped(data, "a tensor's own attributes are left out") if state else data


def _from_type(self: Objects, function: Any, kind: Any, args: Any, state: Any) -> Any:
    if kind.text not in _TENSOR_CLASSES:
        return Opaque(kind.text)
    return _parameter_with_state(self, self.call(function, args), None, None, state)


def _quantized(self: Objects, storage: Any, offset: Any, shape: Any, strides: Any, quantizer: Any, *rest: Any) -> Any:
    if storage.kind not in ("QInt8Storage", "QUInt8Storage", "QInt32Storage"):
        return Opaque(f"quantised torch.Tensor in a {storage.kind}")
    scheme, scale, zero_point, *axis = quantizer
    parts: dict[str, Any] = {"dtype": storage.kind.removesuffix("Storage").lower(), "scheme": scheme.name}
    parts |= {"shape": list(_plain(shape)), "scale": scale, "zero_point": zero_point}
    if axis:
        parts["axis"] = axis[0]
    parts["int_repr"] = Tensor(storage, offset, shape, strides, storage.dtype, None)
    return Wrapped(parts, "a quantised tensor is a dict of its parts here")


def _sparse(self: Objects, layout: Any, data: Any) -> Any:
    name = layout if type(layout) is str else layout.name
    if name not in _LAYOUTS[1:]:
        raise Malformed("not a layout")
    if name == "sparse_coo":
        indices, values, shape, *coalesced = data
        parts = {"indices": indices, "values": values, "coalesced": bool(coalesced and coalesced[0])}
    else:
        compressed, plain, values, shape = data
        parts = {"compressed": compressed, "plain": plain, "values": values}
    whole = {"layout": name, "shape": list(_plain(shape)), **parts}
    return Wrapped(whole, "a sparse tensor is a dict of its parts here")


def _size(self: Objects, sizes: Any = ()) -> Any:
    if type(sizes) not in (tuple, list) or any(type(n) is not int for n in sizes):
        raise Malformed("not a size")
    self.spend(sizes)
    return Wrapped(tuple(sizes), "a torch.Size is a tuple here")


def _device(self: Objects, kind: Any, index: Any = None) -> Any:
    text = _joined(self, kind)
    return Wrapped(text if index is None else f"{text}:{int(index)}", "a torch.device is text here")


# ------------------------------------------------------------------------------------------------- Python and NumPy


def _joined(self: Objects, *parts: Any) -> str:
    for part in parts:
        if type(part) is not str:
            raise Malformed("not text")
        self.spend(part)
    return "/".join(parts)


def _path(self: Objects, *parts: Any) -> Any:
    text = _joined(self, *parts)
    return Wrapped(text[1:] if text.startswith("//") else text, "a path is text here")


def _encode(self: Objects, text: str, encoding: str = "utf-8") -> bytes:
    """How protocol 2 spells bytes."""
    if type(text) is not str or encoding not in ("latin1", "latin-1", "utf-8"):
        raise Malformed("not bytes")
    self.spend(text)
    return text.encode(encoding)


def _bytes(self: Objects, data: Any = b"", encoding: str = "") -> bytes:
    made = _encode(self, data, encoding) if type(data) is str else data
    if type(made) is not bytes:
        raise Malformed("not bytes")
    return made


def _array(self: Objects, data: Any, *rest: Any) -> Any:
    data = _plain(data)
    self.spend(data)
    return pth_numpy.array(data, *rest)


def _complex(self: Objects, real: Any, imag: Any) -> complex:
    if type(real) is not float or type(imag) is not float:
        raise Malformed("not a complex number")
    return complex(real, imag)


def _scalar(self: Objects, dtype: Any, data: Any = b"") -> Any:
    self.spend(data if type(data) is bytes else b"")
    return pth_numpy.scalar(data, dtype)


def _reconstruct(self: Objects, kind: Any, *rest: Any) -> Any:
    return NumpyArray() if kind.text == "numpy.ndarray" else Opaque(kind.text)


def _dict(kind: type, text: str = "") -> Callable[..., Any]:
    """Dicts that come empty, or with all their entries (as pairs in Python 2)."""

    def make(self: Objects, *args: Any) -> Any:
        made = kind()
        given = args[0] if args and type(args[0]) in (list, tuple, dict) else ()
        self.spend(given)
        for key, value in given.items() if type(given) is dict else given:
            made[self.key(key)] = value
        return Wrapped(made, text) if text else made

    return make


def _listed(text: str) -> Callable[..., Any]:
    def make(self: Objects, items: Any = (), *rest: Any) -> Any:
        if type(items) not in (list, tuple):
            raise Malformed("not a list")
        self.spend(items)
        return Wrapped(list(items), text)

    return make


_NAMESPACE = _dict(dict, "a namespace is a dict here")
_ATTRIBUTES = _dict(dict, "a dict with attributes is a dict here")
_MAKERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter_with_state,
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _parameter,
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): lambda self, *rest: Opaque("torch.Tensor without data"),
    ("torch._utils", "_rebuild_qtensor"): _quantized,
    ("torch._utils", "_rebuild_sparse_tensor"): _sparse,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("torch", "Size"): _size,
    ("torch", "device"): _device,
    ("torch.serialization", "_get_layout"): lambda self, name: _joined(self, name).removeprefix("torch."),
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy._core.numeric", "_frombuffer"): _array,
    ("numpy", "dtype"): lambda self, code, *rest: NumpyDtype(code),
    ("_codecs", "encode"): _encode,
    ("builtins", "bytes"): _bytes,
    ("builtins", "bytearray"): lambda self, *args: Wrapped(_bytes(self, *args), "a bytearray is bytes here"),
    ("builtins", "complex"): _complex,
    ("builtins", "set"): _listed("a set is a list here"),
    ("builtins", "frozenset"): _listed("a frozenset is a list here"),
    ("collections", "deque"): _listed("a deque is a list here"),
    ("collections", "OrderedDict"): _dict(OrderedDict),
    ("collections", "Counter"): _dict(Counter),
    ("collections", "defaultdict"): _dict(dict, "a defaultdict is a dict here"),
    ("argparse", "Namespace"): _NAMESPACE,
    ("types", "SimpleNamespace"): _NAMESPACE,
    ("pytorch_lightning.utilities.parsing", "AttributeDict"): _ATTRIBUTES,
    ("lightning.pytorch.utilities.parsing", "AttributeDict"): _ATTRIBUTES,
    ("lightning_fabric.utilities.data", "AttributeDict"): _ATTRIBUTES,
    ("lightning.fabric.utilities.data", "AttributeDict"): _ATTRIBUTES,
    **{("pathlib", name): _path for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")},
}
