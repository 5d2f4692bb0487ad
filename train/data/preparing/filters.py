"""Conditions on the columns of a row, as `status == 'ok' and score > 5`: read by Python's parser, never run as code.

There are names of columns, texts, numbers, lists of them, comparisons, `in`, `and`, `or`, `not`, `is None`, the four
operations and `%`, `len(…)` and `lower(…)`; nothing else. As in SQL, a comparison with an empty cell does not hold.
"""

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from train.errors import UserError, nearest

_LONGEST = 10_000
"""Characters of a condition."""
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: dict[str, Callable[[Any], Any]] = {"len": len, "lower": lambda text: text.lower()}


class Filter:
    """A condition on columns.

    Raises:
        UserError: what is no condition, or holds something that conditions do not have.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        if len(text) > _LONGEST:
            raise UserError(f"--filter has {len(text):,} characters; at most {_LONGEST:,} are read")
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            said = getattr(error, "msg", None) or error
            raise UserError(f"--filter {text!r} is no condition ({said}); write as in status == 'ok'") from None
        names: dict[str, None] = {}
        try:
            self._check(self._tree, names)
        except RecursionError:
            raise UserError("--filter is nested too deep; write a shorter condition") from None
        self.columns = tuple(names)
        """The columns that it needs."""

    def check_columns(self, columns: Sequence[str], place: str) -> None:
        """Raises UserError for a column that the data at `place` do not have."""
        for name in self.columns:
            if name not in columns:
                near = nearest(name, columns)
                raise UserError(
                    f"{place} has no column {name!r} (--filter); its columns are {', '.join(columns)}{near}"
                )

    def holds(self, cells: Mapping[str, Any], key: str) -> bool:
        """Whether a row is kept. Raises UserError, naming the row by `key`, for values that cannot be compared."""
        try:
            return bool(self._value(self._tree, cells))
        except (TypeError, ZeroDivisionError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(f"--filter {self.text!r} cannot be worked out for {key}: {error}") from None

    def _check(self, node: ast.AST, names: dict[str, None]) -> None:
        match node:
            case ast.Name(id=name):
                names[name] = None
            case ast.Constant(value=str() | int() | float() | bool() | None):
                pass
            case ast.List(elts=parts) | ast.Tuple(elts=parts) | ast.Set(elts=parts) | ast.BoolOp(values=parts):
                for part in parts:
                    self._check(part, names)
            case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=inner):
                self._check(inner, names)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                self._check(left, names)
                self._check(right, names)
            case ast.Compare(left=left, ops=ops, comparators=rights) if all(map(_known, ops, rights)):
                for part in (left, *rights):
                    self._check(part, names)
            case ast.Call(func=ast.Name(id=name), args=[inner], keywords=[]) if name in _FUNCTIONS:
                self._check(inner, names)
            case _:
                shown = ast.unparse(node) if isinstance(node, ast.expr) else type(node).__name__
                raise UserError(
                    f"--filter cannot have {shown!r}; there are columns, texts, numbers, comparisons, in, and, or, "
                    "not, is None, + - * / %, len() and lower()"
                )

    def _value(self, node: ast.AST, cells: Mapping[str, Any]) -> Any:
        match node:
            case ast.Name(id=name):
                return cells.get(name)
            case ast.Constant(value=value):
                return value
            case ast.List(elts=parts) | ast.Tuple(elts=parts) | ast.Set(elts=parts):
                return [self._value(part, cells) for part in parts]
            case ast.BoolOp(op=ast.And(), values=parts):
                return all(self._value(part, cells) for part in parts)
            case ast.BoolOp(values=parts):
                return any(self._value(part, cells) for part in parts)
            case ast.UnaryOp(op=ast.Not(), operand=inner):
                return not self._value(inner, cells)
            case ast.UnaryOp(operand=inner):
                value = self._value(inner, cells)
                return None if value is None else -value
            case ast.BinOp(left=left, op=op, right=right):
                first, second = self._value(left, cells), self._value(right, cells)
                if first is None or second is None:
                    return None
                joined = isinstance(first, str) and isinstance(second, str) and isinstance(op, ast.Add)
                # "%" of a text formats, and "*" may fill the memory.
                if not joined and not (isinstance(first, int | float) and isinstance(second, int | float)):
                    raise TypeError("only numbers are reckoned with; texts can be joined, by +")
                return _ARITHMETIC[type(op)](first, second)
            case ast.Compare(left=left, ops=ops, comparators=rights):
                return self._compared(left, ops, rights, cells)
            case ast.Call(func=ast.Name(id=name), args=[inner]):
                value = self._value(inner, cells)
                return None if value is None else _FUNCTIONS[name](value)
        raise AssertionError(ast.dump(node))

    def _compared(
        self, left: ast.expr, ops: Sequence[ast.cmpop], rights: Sequence[ast.expr], cells: Mapping[str, Any]
    ) -> bool:
        first = self._value(left, cells)
        for op, right in zip(ops, rights, strict=True):
            second = self._value(right, cells)
            if isinstance(op, ast.Is | ast.IsNot):
                held = (first is None) == isinstance(op, ast.Is)
            else:
                held = first is not None and second is not None and _COMPARE[type(op)](first, second)
            if not held:
                return False
            first = second
        return True


def _known(op: ast.cmpop, right: ast.expr) -> bool:
    """Whether a comparison is one of ours: `is` goes with None only."""
    if isinstance(op, ast.Is | ast.IsNot):
        return isinstance(right, ast.Constant) and right.value is None
    return type(op) in _COMPARE
