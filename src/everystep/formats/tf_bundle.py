"""TensorFlow's checkpoints (`ckpt-7.index` with `ckpt-7.data-00000-of-00001`) and the variables of a SavedModel, read
and written without TensorFlow."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Iterable
from typing import Any

import msgspec
import numpy as np

from everystep.errors import Error, UsageError
from everystep.formats import named, wire
from everystep.formats.content import Content, Note, Opaque
from everystep.formats.file import Array, Source, Target, is_whole
from everystep.formats.lists import shaped
from everystep.formats.tf_bundle_crc import crc32c, mask
from everystep.formats.tf_bundle_proto import (
    ATTRIBUTES,
    BOOL,
    DTYPES,
    GRAPH,
    NUMBERS,
    OTHERS,
    QUANTIZED,
    SLOTS,
    STRING,
    VALUE,
    Entry,
    entry,
    entry_of,
    escaped,
    full_names,
    graph_of,
    header,
    header_of,
    plain,
    slice_key,
)
from everystep.formats.tf_bundle_table import entries, is_table, table
from everystep.schema import join
from everystep.seam import Seam

EXTENSIONS: tuple[str, ...] = (".index",)
VARIABLES = "variables/variables"
"""Where the checkpoint lies in the folder of a SavedModel."""
_TABLE = f"__{named.KEY}__"
_ITEM = re.compile(r"\[(\d+)\]")
_CRC_MAX = 1 << 27
_CHECKSUM = 4
_DEPTH_MAX = 128


def located(seam: Seam, path: str) -> str:
    """The index of a checkpoint that is called by what its files have in common, as TensorFlow calls it."""
    index = f"{path}{EXTENSIONS[0]}"
    return path if _is_there(seam, path) or not _is_there(seam, index) else index


def _is_there(seam: Seam, path: str) -> bool:
    try:
        seam.files.size(path)
    except OSError:
        return False
    return True


def owns(source: Source) -> bool:
    return is_table(source)


def read(source: Source) -> Content:
    """The tensors by the names of their objects, nested; as they were where the file was written by `write`.

    The index says where the tensors are; its name says how the files with them are called, which lie beside it. Every
    tensor is checked against its CRC. What the program called each variable is in the metadata, under `names`.

    Raises:
        Damaged: for what no writer of the format makes.
        NotFound: if a file with tensors is missing.
        Unsupported: for an index without its other files.
    """
    work = _Reading(source)
    values = {key: work.value(key) for key in work.keys}
    graph, own = values.pop(GRAPH, None), values.pop(_TABLE, None)
    opaque = tuple(value for value in values.values() if isinstance(value, Opaque))
    if own is not None and not opaque:
        if not isinstance(own, np.ndarray) or own.dtype != np.uint8:
            raise source.damaged("the table of the state is no array of bytes")
        return Content(_own(own.tobytes(), values, source), "tf_bundle")
    paths = _paths(list(values))
    for key, value in values.items():
        if isinstance(value, Opaque):
            value.path = _shown(paths[key])
    changed = tuple(Note(_shown(paths[key]), text) for key, text in work.changed.items())
    metadata = _names(graph, paths, source) if type(graph) is bytes else {}
    return Content(_nested(values, paths), "tf_bundle", opaque, changed, metadata)


class _Reading:
    """The tensors of one checkpoint."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._prefix = source.name.rpartition("/")[2].removesuffix(EXTENSIONS[0])
        self._raw: dict[bytes, bytes] = dict(entries(source))
        self._header = self._parsed(b"", header_of)
        self.keys = [self._text(key) for key in self._raw if key and key[0]]
        self.changed: dict[str, str] = {}
        self._left: dict[int, int] = {}
        self._made: dict[tuple[Any, ...], Any] = {}

    def value(self, key: str) -> Any:
        """A tensor; text as bytes, in lists."""
        found = self._parsed(key.encode(), entry_of)
        if found.dtype in QUANTIZED:
            self.changed[key] = f"{QUANTIZED[found.dtype]} is an array of plain integers here"
        if found.dtype != STRING and found.dtype not in DTYPES:
            return Opaque(f"tensorflow {OTHERS.get(found.dtype, f'dtype {found.dtype}')}", key)
        place = (found.shard, found.offset, found.size, found.dtype, found.shape)
        if found.size and place in self._made:
            return self._made[place]
        value = self._sliced(key, found) if found.slices else self._whole(key, found)
        if found.size:
            self._made[place] = value
        return value

    def _whole(self, key: str, found: Entry) -> Any:
        if found.dtype == STRING:
            return self._texts(key, found)
        dtype = DTYPES[found.dtype]
        if found.count * dtype.itemsize != found.size:
            raise self._damaged(key, "its shape does not fit its bytes")
        data = self._bytes(key, found)
        if mask(crc32c(data)) != found.crc:
            raise self._damaged(key, "its bytes are not those that were written (CRC)")
        if self._header.big_endian:
            dtype = dtype.newbyteorder(">")
        try:
            array: Array = np.ndarray(found.shape, dtype, data if len(data) else bytearray(1))
        except (ValueError, MemoryError) as error:
            raise self._damaged(key, "no array can have its shape") from error
        if found.dtype == BOOL and not is_whole(array):
            raise self._damaged(key, "it has truth values that are neither 0 nor 1")
        return array

    def _bytes(self, key: str, found: Entry) -> Array:
        number = self._header.shards
        if found.shard >= number:
            raise self._damaged(key, f"it is in file {found.shard} of {number}")
        shard = self._source.beside(f"{self._prefix}.data-{found.shard:05}-of-{number:05}")
        left = self._left.setdefault(found.shard, shard.size) - found.size
        if left < 0:
            raise self._damaged(key, "its bytes overlap others, or are more than there are")
        self._left[found.shard] = left
        return shard.bytes_at(found.offset, found.size)

    def _texts(self, key: str, found: Entry) -> Any:
        """Lengths, their checksum, and the bytes of all."""
        if found.count > found.size:
            raise self._damaged(key, "its shape does not fit its bytes")
        data = self._bytes(key, found)
        view, at = memoryview(data), 0
        lengths: list[int] = []
        try:
            for _ in range(found.count):
                length, at = wire.read_varint(view, at)
                lengths.append(length)
        except ValueError as error:
            raise self._damaged(key, f"the lengths of its texts make no sense: {error}") from error
        widths = (4 if length >> 32 == 0 else 8 for length in lengths)
        crc = crc32c(b"".join(length.to_bytes(width, "little") for length, width in zip(lengths, widths)))
        begin = at + _CHECKSUM
        if sum(lengths) != found.size - begin or int.from_bytes(view[at:begin], "little") != mask(crc):
            raise self._damaged(key, "the lengths of its texts are not those that were written")
        if mask(crc32c(data[at:], crc)) != found.crc:
            raise self._damaged(key, "its bytes are not those that were written (CRC)")
        texts = []
        for length in lengths:
            texts.append(view[begin : begin + length].tobytes())
            begin += length
        return shaped(texts, found.shape)

    def _sliced(self, key: str, found: Entry) -> Any:
        """A tensor that was saved in parts, as those of partitioned variables are."""
        if found.dtype == STRING or any(len(part) != len(found.shape) for part in found.slices):
            raise self._damaged(key, "its slices make no sense")
        parts = []
        for axes in found.slices:
            boxes = [(0, n) if length < 0 else (start, length) for (start, length), n in zip(axes, found.shape)]
            part = self._parsed(slice_key(key.encode(), axes), entry_of)
            inside = all(0 <= start <= start + length <= n for (start, length), n in zip(boxes, found.shape))
            if not inside or part.dtype != found.dtype or part.shape != tuple(length for _, length in boxes):
                raise self._damaged(key, "its slices make no sense")
            parts.append((boxes, self._whole(key, part)))
        if sum(array.size for _, array in parts) != found.count:
            raise self._damaged(key, "slices of it are missing, or overlap")
        try:
            whole: Array = np.empty(found.shape, DTYPES[found.dtype])
        except (ValueError, MemoryError) as error:
            raise self._damaged(key, "no array can have its shape") from error
        covered = np.zeros(found.shape, np.bool_)
        for boxes, array in parts:
            place = tuple(slice(start, start + length) for start, length in boxes)
            whole[place] = array
            covered[place] = True
        if not covered.all():
            raise self._damaged(key, "slices of it are missing, or overlap")
        return whole

    def _parsed(self, key: bytes, parse: Any) -> Any:
        try:
            return parse(self._raw[key])
        except KeyError:
            what = "the index has no header" if not key else f"a part of {self._shown(key)} is missing"
            raise self._source.damaged(what) from None
        except ValueError as error:
            raise self._source.damaged(f"an entry of the index makes no sense: {self._shown(key)}: {error}") from error

    def _text(self, key: bytes) -> str:
        try:
            return key.decode()
        except UnicodeDecodeError as error:
            raise self._source.damaged(f"a name that is no text: {self._shown(key)}") from error

    def _shown(self, key: bytes) -> str:
        return repr(key[:200].decode("utf-8", "replace"))

    def _damaged(self, key: str, what: str) -> Error:
        return self._source.damaged(f"{key[:200]!r}: {what}")


# names ---------------------------------------------------------------------------------------------------------------


def _paths(keys: list[str]) -> dict[str, tuple[str, ...]]:
    """The place of each tensor in the state: as its objects nest, slots below their optimizer. Where two come out
    alike, or one within another, all stay flat under their own names."""
    paths = {key: _path(key) for key in keys}
    return {key: (key,) for key in keys} if _clash(paths.values()) else paths


def _clash(paths: Collection[tuple[str, ...]]) -> bool:
    if any(len(path) > _DEPTH_MAX for path in paths):
        return True
    taken = set(paths)
    return len(taken) < len(paths) or any(path[:size] in taken for path in paths for size in range(len(path)))


def _path(key: str) -> tuple[str, ...]:
    parts = key.split("/")
    if ATTRIBUTES in parts:
        at = parts.index(ATTRIBUTES)
        parts, attribute = parts[:at], parts[at + 1 :]
        if SLOTS in parts:
            at = parts.index(SLOTS)
            parts = [*parts[at + 1 :], *parts[:at]]
        parts += [] if attribute == [VALUE] else attribute
        parts = [plain(part) for part in parts]
    return tuple(parts)


def _shown(path: tuple[str, ...]) -> str:
    return functools.reduce(join, path, "")


def _nested(values: dict[str, Any], paths: dict[str, tuple[str, ...]]) -> Any:
    state: dict[str, Any] = {}
    for key, value in values.items():
        at = state
        for name in paths[key][:-1]:
            at = at.setdefault(name, {})
        at[paths[key][-1]] = value
    return state


def _names(graph: bytes, paths: dict[str, tuple[str, ...]], source: Source) -> dict[str, str]:
    """What the program called its variables, by their paths, where that is something else."""
    try:
        found = {_shown(paths[key]): name for key, name in full_names(graph) if key in paths and name}
    except ValueError as error:
        raise source.damaged(f"the graph of its objects makes no sense: {error}") from error
    other = {path: name for path, name in found.items() if path != name}
    return {"names": json.dumps(other)} if other else {}


def _objects(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The objects that lead to each array: items of lists are numbered as TensorFlow numbers them."""
    paths = {name: tuple(_local(part) for part in name.split("/")) for name in names}
    if _clash(paths.values()):
        return {name: tuple(name.split("/")) for name in paths}  # a dict with 0 and "0", say
    return paths


def _keys(names: Iterable[str]) -> dict[str, str]:
    return {name: f"{'/'.join(map(escaped, path))}/{ATTRIBUTES}/{VALUE}" for name, path in _objects(names).items()}


def _local(part: str) -> str:
    item = _ITEM.fullmatch(part)
    return item[1] if item else part.replace("%2F", "/").replace("%5B", "[").replace("%25", "%")


def _own(body: bytes, values: dict[str, Any], source: Source) -> Any:
    try:
        known = msgspec.json.decode(body, type=named.Table)
        keys = _keys([name for name, _, _ in known.leaves])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise source.damaged(f"the table of the state makes no sense: {error}") from error
    arrays = {name: values[key] for name, key in keys.items() if isinstance(values.get(key), np.ndarray)}
    try:
        return named.put_together(body, arrays, source.name)
    except Error as error:
        error.where = error.where or source.name
        raise


# writing -------------------------------------------------------------------------------------------------------------


def write(state: Any, target: Target) -> list[Note]:
    """An index, and beside it one file with all tensors. `tf.train.Checkpoint` finds its objects by the names of the
    state: dicts, and lists by number. A tied array is one object.

    Raises:
        UsageError: for a name that does not end as the name of an index does.
    """
    name = target.name.rpartition("/")[2]
    if not name.endswith(EXTENSIONS) or name in EXTENSIONS:
        do = f"call it {name or 'ckpt'}{EXTENSIONS[0]}"
        raise UsageError("a checkpoint of TensorFlow begins with its index", where=target.name, do=do)
    parts = named.take_apart(state, lambda dtype: dtype.newbyteorder("<") in NUMBERS)
    data = target.beside(f"{name.removesuffix(EXTENSIONS[0])}.data-00000-of-00001")
    keys = _keys(list(parts.arrays))
    index = {"": header(1)}
    for of, array in parts.arrays.items():
        whole = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
        index[keys[of]] = _put(whole.reshape(-1).view(np.uint8), NUMBERS[whole.dtype], whole.shape, data)
    index[_TABLE] = _put(np.frombuffer(parts.table, np.uint8), NUMBERS[np.dtype("u1")], (len(parts.table),), data)
    held = {of: keys[parts.aliases.get(of, of)] for of in (*parts.arrays, *parts.aliases)}
    graph = graph_of((path, held[of]) for of, path in _objects(held).items())
    index[GRAPH] = _put_text(graph, data)
    target.write(table(sorted((key.encode(), body) for key, body in index.items())))
    return [*parts.changed, *(Note(of, f"the same object as {kept}") for of, kept in parts.aliases.items())]


def _put(raw: Array, dtype: int, shape: tuple[int, ...], data: Target) -> bytes:
    offset, crc = data.nbytes, 0
    for at in range(0, len(raw), _CRC_MAX):
        crc = crc32c(raw[at : at + _CRC_MAX], crc)
    data.write(raw)
    return entry(Entry(dtype, shape, 0, offset, len(raw), mask(crc)))


def _put_text(text: bytes, data: Target) -> bytes:
    crc = crc32c(len(text).to_bytes(4, "little"))
    between = mask(crc).to_bytes(4, "little")
    body = wire.varint(len(text)) + between + text
    offset = data.nbytes
    data.write(body)
    return entry(Entry(STRING, (), 0, offset, len(body), mask(crc32c(between + text, crc))))


# beside the files ----------------------------------------------------------------------------------------------------

_LINE = re.compile(r'\s*(\w+)\s*:\s*(?:"((?:[^"\\\n]|\\.)*)"|\'((?:[^\'\\\n]|\\.)*)\'|[-+.\w]+)\s*')
_ESCAPE = re.compile(r"\\(?:([0-7]{1,3})|x([0-9a-fA-F]{1,2})|(.))", re.DOTALL)
_LETTERS = {"n": "\n", "t": "\t", "r": "\r"}


def state_of(text: str) -> list[str]:
    """The checkpoints that a file called `checkpoint` names, oldest first: prefixes, as they stand there.

    Raises:
        ValueError: if it is no such file (a `Malformed`).
    """
    found: list[str] = []
    newest = ""
    for line in filter(str.strip, text.splitlines()):
        parsed = _LINE.fullmatch(line)
        if parsed is None:
            raise wire.Malformed(f"not a line of a checkpoint's list: {line[:80]!r}")
        body = parsed[2] if parsed[2] is not None else parsed[3]
        if parsed[1] in ("model_checkpoint_path", "all_model_checkpoint_paths"):
            if body is None:
                raise wire.Malformed(f"not a path: {line[:80]!r}")
            path = _unescaped(body)
            if parsed[1] == "model_checkpoint_path":
                newest = path
            else:
                found.append(path)
    return found if not newest or newest in found else [*found, newest]


def _unescaped(body: str) -> str:
    """Bytes beyond ASCII stand as octal numbers, each by itself."""

    def one(match: re.Match[str]) -> str:
        octal, hexadecimal, letter = match.groups()
        if letter is not None:
            return _LETTERS.get(letter, str(letter))
        return chr(int(octal, 8) & 0xFF if octal else int(hexadecimal, 16))

    if body.isascii():
        return _ESCAPE.sub(one, body).encode("latin1").decode("utf-8", "replace")
    return _ESCAPE.sub(one, body)
