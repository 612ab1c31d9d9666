"""Reads a pickle byte stream as data: a machine for the opcodes that build plain things; it looks nothing up and calls
nothing that the stream names. What a name of a class stands for is decided by a closed table (`pth_objects`)."""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

from everystep.errors import Damaged, Unsupported
from everystep.formats.content import Opaque

OPCODES_MAX = 1 << 24
"""Each opcode makes at most about 100 bytes: this bounds time and memory. A list of 16 million numbers still fits."""
NAME_MAX = 1000
STOP = ord(".")
_NO_DATA = {
    ord("i"): "INST", ord("o"): "OBJ", ord("P"): "PERSID", 0x82: "EXT1", 0x83: "EXT2", 0x84: "EXT4",
    0x97: "NEXT_BUFFER", 0x98: "READONLY_BUFFER", ord("I"): "INT", ord("L"): "LONG", ord("F"): "FLOAT",
    ord("S"): "STRING", ord("V"): "UNICODE", ord("g"): "GET", ord("p"): "PUT",
}  # fmt: skip
_DICTS = (dict, OrderedDict, Counter)


class Malformed(ValueError):
    """The stream asks for what no writer asks for. The machine says where."""


class Wrapped:
    """A value that the file has in another form: the text says what became of it."""

    __slots__ = ("text", "value")

    def __init__(self, value: Any, text: str) -> None:
        self.value, self.text = value, text


class Name:
    """A class or function that the stream names. Nothing is looked up."""

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    @property
    def text(self) -> str:
        return f"{self.module}.{self.name}"


class Builder(Protocol):
    """What the machine asks for whenever the stream wants more than containers and plain values."""

    def call(self, function: Any, args: Any) -> Any: ...

    def build(self, target: Any, state: Any) -> None: ...

    def persistent(self, id: Any) -> Any: ...

    def key(self, key: Any) -> Any: ...


class Machine:
    """One byte stream; `load` reads one pickle of it."""

    def __init__(self, data: memoryview, builder: Builder, where: str) -> None:
        self._data, self._builder, self._where = data, builder, where
        self._at = 0
        self._left = OPCODES_MAX

    def load(self, at: int) -> tuple[Any, int]:
        """The value that begins at `at`, and where its bytes end.

        Raises:
            Damaged: for a stream that no pickler writes.
            Unsupported: for opcodes that need the program which wrote them.
        """
        self._at = at
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        try:
            while (code := self._data[self._at]) != STOP:
                self._at += 1
                self._left -= 1
                if self._left < 0 or code in _NO_DATA:
                    raise self._refused(code)
                _OPCODES[code](self)
            (value,) = self._stack
        except (IndexError, KeyError, ValueError, TypeError, AttributeError, OverflowError, struct.error) as error:
            at = min(self._at, len(self._data))
            what = f"the pickle stream breaks off or makes no sense before byte {at}"
            raise Damaged(what, where=self._where, do="get the file again from where it came from") from error
        return value, self._at + 1

    def _refused(self, code: int) -> Unsupported:
        what = f"more than {OPCODES_MAX} opcodes" if self._left < 0 else f"the opcode {_NO_DATA[code]}"
        do = "load it where it was made with torch.load(), and save it again with torch.save(): numbers as arrays"
        return Unsupported(f"{what} in a pickle stream, before byte {self._at}", where=self._where, do=do)

    def _take(self, count: int) -> memoryview:
        start, self._at = self._at, self._at + count
        if not 0 <= count <= len(self._data) - start:
            raise Malformed("the stream ends")
        return self._data[start : self._at]

    def _number(self, width: int) -> int:
        return int.from_bytes(self._take(width), "little")

    def _line(self) -> str:
        head = bytes(self._data[self._at : self._at + NAME_MAX])
        end = head.index(b"\n")
        self._at += end + 1
        return head[:end].decode()

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    # stack and memo
    def _mark(self) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._since_mark()

    def _put(self, width: int) -> None:
        self._memo[self._number(width)] = self._stack[-1]

    def _memoize(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _get(self, width: int) -> None:
        self._push(self._memo[self._number(width)])

    def _frame(self) -> None:
        if self._number(8) > len(self._data) - self._at:
            raise Malformed("a frame goes beyond the stream")

    # plain values
    def _signed(self, width: int) -> None:
        self._push(int.from_bytes(self._take(width), "little", signed=True))

    def _bytes(self, width: int) -> None:
        self._push(bytes(self._take(self._number(width))))

    def _text(self, width: int) -> None:
        self._push(str(self._take(self._number(width)), "utf-8", "surrogatepass"))

    def _old_text(self, width: int) -> None:
        """The text of Python 2, which may be bytes."""
        data = bytes(self._take(self._number(width)))
        try:
            self._push(data.decode())
        except UnicodeDecodeError:
            self._push(data)

    # containers
    def _tuple(self, count: int) -> None:
        if len(self._stack) < count:
            raise Malformed("too few on the stack")
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        inner = target.value if isinstance(target, Wrapped) else target
        if type(inner) is list:
            inner.extend(items)
        elif not isinstance(target, Opaque):
            raise Malformed("not a list")

    def _append(self) -> None:
        item = self._stack.pop()
        self._extend([item])

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        inner = target.value if isinstance(target, Wrapped) else target
        if len(items) % 2 or not (type(inner) in _DICTS or isinstance(target, Opaque)):
            raise Malformed("not entries of a dict")
        if not isinstance(target, Opaque):
            for i in range(0, len(items), 2):
                inner[self._builder.key(items[i])] = items[i + 1]

    def _set_item(self) -> None:
        value = self._stack.pop()
        key = self._stack.pop()
        self._set_items([key, value])

    def _dict(self) -> None:
        items = self._since_mark()
        self._push({})
        self._set_items(items)

    def _frozen(self) -> None:
        self._push(Wrapped(self._since_mark(), "a frozenset is a list here"))

    # names: handed to the table as they are
    def _global(self) -> None:
        module = self._line()
        self._push(Name(module, self._line()))

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str or len(name) + len(module) > NAME_MAX:
            raise Malformed("not a name")
        self._push(Name(module, name))

    def _reduce(self) -> None:
        args = self._stack.pop()
        self._stack[-1] = self._builder.call(self._stack[-1], args)

    def _new_with_names(self) -> None:
        named, args = self._stack.pop(), self._stack.pop()
        if type(args) is not tuple or type(named) is not dict:
            raise Malformed("not arguments")
        self._stack[-1] = Opaque(self._stack[-1].text) if named else self._builder.call(self._stack[-1], args)

    def _build(self) -> None:
        state = self._stack.pop()
        self._builder.build(self._stack[-1], state)

    def _persistent(self) -> None:
        self._stack[-1] = self._builder.persistent(self._stack[-1])


_OPCODES: dict[int, Callable[[Machine], object]] = {
    0x80: lambda m: m._take(1) and None,  # the protocol: what matters are the opcodes
    0x95: Machine._frame,
    ord("("): Machine._mark,
    ord("0"): Machine._pop,
    ord("1"): lambda m: m._since_mark() and None,
    ord("2"): lambda m: m._push(m._stack[-1]),
    ord("q"): lambda m: m._put(1),
    ord("r"): lambda m: m._put(4),
    0x94: Machine._memoize,
    ord("h"): lambda m: m._get(1),
    ord("j"): lambda m: m._get(4),
    ord("N"): lambda m: m._push(None),
    0x88: lambda m: m._push(True),
    0x89: lambda m: m._push(False),
    ord("J"): lambda m: m._signed(4),
    ord("K"): lambda m: m._push(m._number(1)),
    ord("M"): lambda m: m._push(m._number(2)),
    0x8A: lambda m: m._signed(m._number(1)),
    0x8B: lambda m: m._signed(m._number(4)),
    ord("G"): lambda m: m._push(struct.unpack(">d", m._take(8))[0]),
    ord("T"): lambda m: m._old_text(4),
    ord("U"): lambda m: m._old_text(1),
    ord("X"): lambda m: m._text(4),
    0x8C: lambda m: m._text(1),
    0x8D: lambda m: m._text(8),
    ord("B"): lambda m: m._bytes(4),
    ord("C"): lambda m: m._bytes(1),
    0x8E: lambda m: m._bytes(8),
    0x96: lambda m: m._push(Wrapped(bytes(m._take(m._number(8))), "a bytearray is bytes here")),
    ord(")"): lambda m: m._push(()),
    ord("t"): lambda m: m._push(tuple(m._since_mark())),
    0x85: lambda m: m._tuple(1),
    0x86: lambda m: m._tuple(2),
    0x87: lambda m: m._tuple(3),
    ord("]"): lambda m: m._push([]),
    ord("l"): lambda m: m._push(m._since_mark()),
    ord("a"): Machine._append,
    ord("e"): lambda m: m._extend(m._since_mark()),
    ord("}"): lambda m: m._push({}),
    ord("d"): Machine._dict,
    ord("s"): Machine._set_item,
    ord("u"): lambda m: m._set_items(m._since_mark()),
    0x8F: lambda m: m._push(Wrapped([], "a set is a list here")),
    0x90: lambda m: m._extend(m._since_mark()),
    0x91: Machine._frozen,
    ord("c"): Machine._global,
    0x93: Machine._stack_global,
    ord("R"): Machine._reduce,
    0x81: Machine._reduce,
    0x92: Machine._new_with_names,
    ord("b"): Machine._build,
    ord("Q"): Machine._persistent,
}
