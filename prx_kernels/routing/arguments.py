"""Where a routed block takes what it is given: an argument of its forward, or a tensor that it keeps itself."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from .entries import Span, Where, at, attributes_of, take, with_value


class Argument:
    """Where a block's forward takes an argument: by name, and at a position where it may come without the name."""

    def __init__(self, name: str | None, position: int | None) -> None:
        self.name, self.position = name, position

    def __str__(self) -> str:
        return f"argument {self.name!r}" if self.name is not None else f"argument {self.position}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Argument) and (self.name, self.position) == (other.name, other.position)

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def find(cls, block: nn.Module, which: int | str) -> Argument:
        """The argument of this name or position.

        Raises:
            ValueError: the block has none.
        """
        found = cls.look_for(block, which)
        if found is None:
            names = [p.name for p in _parameters(block) if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
            raise ValueError(f"{type(block).__name__} has no argument {which!r}; its arguments are {', '.join(names)}")
        return found

    @classmethod
    def look_for(cls, block: nn.Module, which: int | str) -> Argument | None:
        parameters = _parameters(block)
        kinds = {p.kind for p in parameters}
        by_position = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        names = by_position + [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        if isinstance(which, int) and 0 <= which < len(by_position):
            return cls(by_position[which], which)
        if isinstance(which, int) and which >= 0 and inspect.Parameter.VAR_POSITIONAL in kinds:
            return cls(None, which)
        if which in by_position:
            return cls(str(which), by_position.index(str(which)))
        if isinstance(which, str) and (which in names or inspect.Parameter.VAR_KEYWORD in kinds):
            return cls(which, None)
        return None

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.name is not None and self.name in kwargs:
            return kwargs[self.name]
        return args[self.position] if self.position is not None and self.position < len(args) else None

    def write(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.name is not None and self.name in kwargs:
            return args, {**kwargs, self.name: value}
        assert self.position is not None
        return (*args[: self.position], value, *args[self.position + 1 :]), kwargs


class Table:
    """One entry of `per_token`: an argument, or by its path a tensor (a module with tensors) that the block keeps."""

    def __init__(self, argument: Argument | None, path: str, where: Where) -> None:
        self.argument, self.path, self.where = argument, path, where

    @classmethod
    def find(cls, block: nn.Module, which: int | str, where: Where) -> Table:
        first, _, rest = str(which).partition(".")
        if isinstance(which, str) and first in attributes_of(block):
            found = Argument.look_for(block, which) if not rest else None
            if found is None or found.name not in {p.name for p in _parameters(block)}:
                return cls(None, which, where)
        return cls(Argument.find(block, which), "", where)

    def routed(
        self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], keep: Any, span: Span, shared: bool
    ) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """Block and arguments with the entries of the kept tokens only."""
        if self.argument is None:
            name = f"tensor {self.path!r} of {type(block).__name__}"
            routed = take(owned(block, self.path), self.where, keep, span, shared, name)
            return with_value(block, self.path, routed), args, kwargs
        value = self.argument.read(args, kwargs)
        if value is not None:
            routed = take(value, self.where, keep, span, shared, str(self.argument))
            args, kwargs = self.argument.write(args, kwargs, routed)
        return block, args, kwargs


def owned(block: Any, path: str) -> Any:
    """What a block keeps at a path such as "attn.rope" or "tables.0"."""
    for name in path.split("."):
        block = at(block, name)
    return block


def own_forward(block: nn.Module) -> Any:
    """The forward that a block has without its route, unbound."""
    return getattr(type(block), "_own_forward", None) or type(block).forward


def bound(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names; those in *args and **kwargs by position and name."""
    found: dict[str, Any] = {}
    signature = inspect.Signature(_parameters(block))
    for name, value in signature.bind_partial(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            found.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            found.update({str(len(found) + i): entry for i, entry in enumerate(value)})
        else:
            found[name] = value
    return found


def _parameters(block: nn.Module) -> list[inspect.Parameter]:
    """Of the block's own forward, without self. A compiled block's class may have no forward but its module's."""
    return list(inspect.signature(own_forward(block)).parameters.values())[1:]
