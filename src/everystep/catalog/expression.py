"""The language of queries: comparisons of metrics and facts with and, or, not; turned into SQL with bound values."""

from __future__ import annotations

import ast
import difflib
from dataclasses import dataclass, field
from typing import Any

from everystep.errors import UsageError

# What a checkpoint has beside its metrics: name in a query -> column.
FACTS = {
    "step": "c.step",
    "time": "c.time",
    "term": "c.term",
    "id": "c.id",
    "parent": "c.parent",
    "reason": "c.reason",
    "thin": "c.thin",
    "raw_bytes": "c.raw_bytes",
    "stored_bytes": "c.stored_bytes",
    "stall_seconds": "c.stall_seconds",
}
_COMPARE = {
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "=", ast.NotEq: "<>",
}  # fmt: skip
_MIRROR = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "=": "=", "<>": "<>"}
_DEPTH_MAX = 50
_METRIC = "(SELECT m.value FROM metrics m WHERE m.run = c.run AND m.id = c.id AND m.name = ?)"
_TAGGED = "EXISTS (SELECT 1 FROM tags t WHERE t.run = c.run AND t.id = c.id AND t.name = ?)"


@dataclass
class Condition:
    """SQL over the tables of the catalog, its bound values, and the metrics that it asks for."""

    sql: str
    values: list[Any] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)


def parse(text: str) -> Condition:
    """A query such as `val_loss < 0.3 and step > 500`, `tag == "best" or not lr >= 1e-3`, `0.1 < val/loss < 0.2`.

    Names are metrics (with `/` and `.` inside, if they have them) or facts: step, time, term, id, parent, reason, thin,
    raw_bytes, stored_bytes, stall_seconds. A checkpoint without the metric never matches a comparison of it.

    Raises:
        UsageError: with the place in the text that is not understood.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _confused(text, f"not a condition: {getattr(error, 'msg', error)}") from error
    return _Translator(text).condition(tree.body, 0)


def _confused(text: str, why: str) -> UsageError:
    return UsageError(f"cannot read the query: {why}", where=text, do='for example "val_loss < 0.3 and step > 500"')


class _Translator:
    def __init__(self, text: str) -> None:
        self._text = text

    def condition(self, node: ast.expr, depth: int) -> Condition:
        if depth > _DEPTH_MAX:
            raise _confused(self._text[:200], "too deeply nested")
        if isinstance(node, ast.BoolOp):
            word = " AND " if isinstance(node.op, ast.And) else " OR "
            return self._join([self.condition(part, depth + 1) for part in node.values], word)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            inner = self.condition(node.operand, depth + 1)
            return Condition(f"NOT coalesce({inner.sql}, 0)", inner.values, inner.metrics)
        if isinstance(node, ast.Compare):
            return self._compare(node)
        if isinstance(node, ast.Name) and node.id == "thin":
            return Condition("c.thin")
        raise _confused(self._text, f"{ast.unparse(node)!r} is not a comparison")

    def _join(self, parts: list[Condition], word: str) -> Condition:
        return Condition(
            "(" + word.join(part.sql for part in parts) + ")",
            [value for part in parts for value in part.values],
            [name for part in parts for name in part.metrics],
        )

    def _compare(self, node: ast.Compare) -> Condition:
        sides = [node.left, *node.comparators]
        return self._join([self._pair(a, op, b) for a, op, b in zip(sides, node.ops, sides[1:])], " AND ")

    def _pair(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Condition:
        if isinstance(op, (ast.In, ast.NotIn)):
            return self._among(left, op, right)
        sign = _COMPARE.get(type(op))
        if sign is None:
            raise _confused(self._text, f"no comparison {type(op).__name__.lower()!r} here")
        if self._name(left) is None:
            left, right, sign = right, left, _MIRROR[sign]
        name = self._name(left)
        if name is None:
            raise _confused(self._text, f"{ast.unparse(left)!r} and {ast.unparse(right)!r} are no metric")
        if name in ("tag", "tags"):
            return self._tag(sign, self._value(right))
        a = self._side(left)
        b = self._side(right)
        return Condition(f"({a.sql} {sign} {b.sql})", a.values + b.values, a.metrics + b.metrics)

    def _among(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Condition:
        if not isinstance(right, (ast.List, ast.Tuple, ast.Set)):
            raise _confused(self._text, "after `in` comes a list, as in step in [100, 200]")
        equal = [self._pair(left, ast.Eq(), value) for value in right.elts]
        found = self._join(equal, " OR ") if equal else Condition("0")
        if isinstance(op, ast.NotIn):
            return Condition(f"NOT coalesce({found.sql}, 0)", found.values, found.metrics)
        return found

    def _tag(self, sign: str, value: Any) -> Condition:
        if sign not in ("=", "<>") or not isinstance(value, str):
            raise _confused(self._text, 'tags are compared with == or != and a text: tag == "best"')
        return Condition(f"{'NOT ' if sign == '<>' else ''}{_TAGGED}", [value])

    def _side(self, node: ast.expr) -> Condition:
        name = self._name(node)
        if name is None:
            return Condition("?", [self._value(node)])
        if name in FACTS:
            return Condition(FACTS[name])
        return Condition(_METRIC, [name], [name])

    def _name(self, node: ast.expr) -> str | None:
        """A metric's or fact's name; `val/loss` and `val.loss` are names, too."""
        if isinstance(node, ast.Name):
            return node.id
        if isinstance(node, ast.Attribute):
            stem = self._name(node.value)
            return f"{stem}.{node.attr}" if stem is not None else None
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            left, right = self._name(node.left), self._name(node.right)
            return f"{left}/{right}" if left is not None and right is not None else None
        return None

    def _value(self, node: ast.expr) -> Any:
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
            value = self._value(node.operand)
            return -value if isinstance(node.op, ast.USub) and not isinstance(value, str) else value
        if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float, str)):
            value = node.value
            if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 1 << 63:
                return float(value)
            return value
        raise _confused(self._text, f"{ast.unparse(node)!r} is neither a name nor a value")


def near(name: str, names: list[str]) -> list[str]:
    """Names like one that was not found."""
    return difflib.get_close_matches(name, [*names, *FACTS], 3)
