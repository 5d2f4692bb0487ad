"""A case's numbers, forward and backward, and how near they must be to its definition's."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .backward import gradients
from .cases import Case
from .inputs import Inputs, differentiable

Dtypes = tuple[torch.dtype, torch.dtype]
# Float32 sums of a few hundred products in another order than the definition's, in units of the last place.
FLOAT32_ULPS = 16


def results(
    case: Case,
    size: str,
    dtypes: Dtypes,
    *,
    layout: str = "dense",
    device: str = "cpu",
    exact: bool = False,
    traced: bool = False,
) -> list[Tensor]:
    """What the op gives, and the gradients of its tensors; `traced`: as where a compiler records the backward."""
    make = Inputs(*dtypes, layout=layout, device=device, exact=exact)
    made = [x for x in tree_leaves(case.call(make, *case.sizes[size])) if isinstance(x, Tensor)]
    outputs = differentiable(made)
    incoming = [make.incoming(x) for x in outputs]
    if not outputs:
        return made
    if traced:
        with patch.object(torch.compiler, "is_compiling", lambda: True):
            found: Any = gradients(outputs, incoming, make.leaves)
    else:
        found = torch.autograd.grad(outputs, make.leaves, incoming)
    return [x.detach() for x in (*made, *found)]


def check(
    case: Case,
    size: str,
    dtypes: Dtypes,
    *,
    layout: str = "dense",
    device: str = "cpu",
    traced: bool = False,
    launching: AbstractContextManager[Any] | None = None,
) -> None:
    """Hold an op on `device` to its definition on the CPU.

    Integers and bits are equal. Numbers are off the same op in float64 at most twice as far as the definition in the
    op's dtype, and a rounding of the largest number.

    Args:
        launching: where the op's kernels run in place of its definition, if that is not told by the device.
    """
    with nullcontext() if launching is None else launching:
        actual = results(case, size, dtypes, layout=layout, device=device, traced=traced)
    formula = results(case, size, dtypes, layout=layout)
    exact = results(case, size, dtypes, layout=layout, exact=True)
    assert len(actual) == len(formula) == len(exact)
    for number, (one, plain, truth) in enumerate(zip(actual, formula, exact, strict=True)):
        what = f"{case}, {size}, {layout}, {dtypes}: tensor {number}"
        assert (one.shape, one.dtype) == (plain.shape, plain.dtype), what
        check_near(what, one.cpu(), plain, truth)


def check_near(what: str, actual: Tensor, formula: Tensor, exact: Tensor) -> None:
    if not (actual.is_floating_point() or actual.is_complex()) or actual.dtype.itemsize == 1:
        assert torch.equal(actual, formula), what
        return
    if not actual.numel() or bool(exact.isnan().all()):
        assert torch.equal(actual.isnan(), formula.isnan()), what
        return
    wide = torch.complex128 if actual.is_complex() else torch.float64
    error, plain = (float((x.to(wide) - exact.to(wide)).abs().max()) for x in (actual, formula))
    ulps = 1 if actual.dtype.itemsize == 2 else FLOAT32_ULPS
    allowed = 2 * plain + ulps * torch.finfo(actual.dtype).eps * float(exact.abs().max())
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g} (definition {plain:.3g})"
