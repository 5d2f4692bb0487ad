"""One GPU's mixed precision: a bfloat16 copy of the float32 weights that the forward and backward passes use.

FSDP2 over one rank does the same in more work: it casts every weight anew in every forward, and copies every gradient
in float32 to reduce it with itself. Here the copy stays, the optimizer can write it, and gradients stay as they come.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_COPY = "_working_copy"


class WorkingCopy:
    """A module's weights in a half-precision dtype, put in their places for its forward and backward.

    Outside of that the module holds the float32 weights: its names, `state_dict()` and `parameters()` are theirs.
    Copies that were put back are renewed at the next forward, unless whoever changed the weights wrote them too
    (`written`). Gradients arrive at the float32 weights, in the copy's dtype from one backward, summed in float32 from
    several.

    Args:
        module: all of its parameters are float32 or of `dtype`. May still be on the meta device.
        dtype: of the copy.
        methods: names of methods beside `forward` that compute with the weights.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, methods: Iterable[str] = ()) -> None:
        self.module, self.dtype = module, dtype
        self._places: list[tuple[nn.Module, str]] = []
        self._weights: list[nn.Parameter] = []
        self._copies: list[nn.Parameter] = []
        self._in_place = self._is_fresh = False
        module.register_forward_pre_hook(lambda *_: self.put_in_place())
        for name in methods:
            self._wrap(name)
        setattr(module, _COPY, self)

    def put_in_place(self) -> None:
        """Let the module hold the copies, made or renewed where they are not up to date."""
        if self._in_place:
            return
        if not self._places:
            self._make()
        elif not self._is_fresh:
            torch._foreach_copy_([copy.detach() for copy in self._copies], [w.detach() for w in self._weights])
        self._set(self._copies)
        self._in_place, self._is_fresh = True, False

    def put_back(self) -> None:
        """Let the module hold its float32 weights again."""
        if self._in_place:
            self._set(self._weights)
            self._in_place = False

    def pairs(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each float32 weight with its copy, for an optimizer that writes both; none before the first forward."""
        for weight, copy in zip(self._weights, self._copies, strict=True):
            yield weight, copy.detach()

    def written(self) -> None:
        """The copies are up to date: whoever changed the weights wrote them too."""
        self._is_fresh = True

    def _make(self) -> None:
        for part in self.module.modules():
            for name, weight in part._parameters.items():
                if weight is not None:
                    self._places.append((part, name))
                    self._weights.append(weight)
        for weight in self._weights:
            copy = nn.Parameter(weight.detach().to(self.dtype), weight.requires_grad)
            if weight.requires_grad:
                weight.grad_dtype = None  # any: it comes in the copy's
                copy.register_post_accumulate_grad_hook(self._arrival(weight))
            self._copies.append(copy)

    def _set(self, parameters: list[nn.Parameter]) -> None:
        # Not by setattr: this is done in every step, and the checks of nn.Module are long.
        for (part, name), parameter in zip(self._places, parameters, strict=True):
            part._parameters[name] = parameter

    @staticmethod
    def _arrival(weight: nn.Parameter) -> Any:
        """What hands a copy's gradient on to its weight."""

        def arrive(copy: Tensor) -> None:
            grad, copy.grad = copy.grad, None
            if weight.grad is None or grad is None:
                weight.grad = grad
            elif weight.grad.dtype == weight.dtype:
                weight.grad += grad
            else:
                weight.grad = weight.grad.to(weight.dtype) + grad

        return arrive

    def _wrap(self, name: str) -> None:
        method = getattr(self.module, name)

        def with_copy(*arguments: Any, **keywords: Any) -> Any:
            self.put_in_place()
            return method(*arguments, **keywords)

        setattr(self.module, name, with_copy)


def copies_of(modules: Iterable[nn.Module]) -> list[WorkingCopy]:
    """The working copies of these modules and of what is inside of them."""
    found = [getattr(part, _COPY, None) for module in modules for part in module.modules()]
    return [copy for copy in found if copy is not None]
