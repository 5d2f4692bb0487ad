"""The ground of every op: Triton or its absence, launch settings by size and architecture, the ops' namespace.

An op's folder and this file are all that a copy of the op needs, with the folders that it imports.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._library.custom_ops import CustomOpDef
from torch.autograd import forward_ad

triton: Any
tl: Any
try:
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")
except ImportError:  # macOS and other machines without Triton run the reference definitions
    triton = tl = None

# torch has one registry of ops in a process: a copy of this package under another name needs a namespace of its own.
_PACKAGE = __name__.rpartition(".")[0]
NAMESPACE = "prx" if _PACKAGE == "prx_kernels" else re.sub(r"\W", "_", _PACKAGE)

# Interpreted kernels take tensors of any device, CPU ones too; Triton reads the variable when a kernel is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def jit(kernel: Callable[..., Any]) -> Any:
    """`triton.jit`, or the bare function where there is no Triton: it is then never launched."""
    return kernel if triton is None else triton.jit(kernel)


@jit
def hint(number, ALIGN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tell the compiler what the launcher checked. Triton's own argument hint knows 16 elements only, a row of
    16·odd bytes (C = 1000 in bf16) would be copied in 2-byte pieces."""
    return (number // ALIGN) * ALIGN


# --- launch settings ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Launch settings of a kernel: its tile (constexpr arguments by name), warps and pipeline stages."""

    tile: tuple[tuple[str, int], ...]
    num_warps: int = 4
    num_stages: int = 1

    @property
    def options(self) -> dict[str, int]:
        return {**dict(self.tile), "num_warps": self.num_warps, "num_stages": self.num_stages}


# The key of a row: the architecture (major·10 + minor; 0 is every other one) and the largest size it serves.
Table = dict[int, tuple[tuple[int, Config], ...]]

MAX_GRID_Y = 65_535  # programs in the second dimension of a grid, on every NVIDIA GPU; the first takes 2^31 - 1


def capability(device: torch.device) -> int:
    """Compute capability as major·10 + minor of an NVIDIA device; 0 for AMD, for the interpreter and for the CPU."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def tuned(table: Table, size: int, device: torch.device) -> Config:
    """The first row of the device's part of the table that serves `size`.

    Raises:
        ValueError: the size exceeds every row, or the table has none for this architecture.
    """
    arch = capability(device)
    rows = table.get(arch, table.get(0))  # a table of what few architectures have has no other row
    if rows is None:
        raise ValueError(f"the kernel runs on architectures {', '.join(map(str, table))}, got {arch}")
    for limit, config in rows:
        if size <= limit:
            return config
    raise ValueError(f"size {size} exceeds what the kernel supports, {rows[-1][0]}")


def alignment(*numbers: int) -> int:
    """Largest power of two up to 16 that divides every number: what a kernel may assume of its strides, in elements."""
    for power in (16, 8, 4, 2):
        if all(number % power == 0 for number in numbers):
            return power
    return 1


def element_width(x: Tensor) -> Tensor:
    """View x as integers of its element width, so that a copy is one kernel for all dtypes and exact for all bits."""
    return x.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Make x's device current: Triton launches on the current one, which need not hold the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


# --- ops ---------------------------------------------------------------------------------------------------------


def custom_op(name: str, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """A CUDA op in this package's namespace; its definition for the CPU, its fake and its backward follow it."""
    return torch.library.custom_op(f"{NAMESPACE}::{name}", mutates_args=mutates, device_types="cuda")


def on_cpu(op: CustomOpDef) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a CPU definition of an op.

    torch keeps Dynamo from tracing into it, and for that imports Dynamo in the first call: two to six seconds that a
    program which compiles nothing does without.
    """

    def register(definition: Callable[..., Any]) -> Callable[..., Any]:
        op.register_kernel("cpu")(definition)
        kept_from_dynamo = op._backend_fns["cpu"]

        @wraps(definition)
        def run(*args: Any, **kwargs: Any) -> Any:
            return (kept_from_dynamo if "torch._dynamo" in sys.modules else definition)(*args, **kwargs)

        op._backend_fns["cpu"] = run
        return definition

    return register


def check_no_tangent(name: str, *tensors: Tensor | None) -> None:
    """Refuse derivatives that an op has no rule for: forward-mode ones, and those of torch.func.

    The former torch would silently take to be zero, the latter it would refuse in words about its own insides.
    """
    if forward_ad._current_level >= 0:
        for x in tensors:
            dual: Any = None if x is None else forward_ad.unpack_dual(x)  # type: ignore[no-untyped-call]
            if dual is not None and dual.tangent is not None:
                raise NotImplementedError(
                    f"{name} has no forward-mode derivative here; the definitions in prx_kernels.reference have"
                )
    if torch.compiler.is_compiling() or _functorch.peek_interpreter_stack() is None:
        return
    if any(x is not None and _is_differentiated(x) for x in tensors):
        raise NotImplementedError(
            f"{name} has no derivative under torch.func (grad, vjp, jacrev, vmap of what requires a gradient); call "
            "backward or torch.autograd.grad, or take the definitions in prx_kernels.reference"
        )


def check_one_device(**tensors: Tensor | None) -> None:
    """Refuse tensors on several devices, by their names: a kernel would read whatever lies at that address."""
    found = {name: x.device for name, x in tensors.items() if x is not None}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in found.items())
        raise ValueError(f"tensors must lie on one device, got {listed}")


def _is_differentiated(x: Tensor) -> bool:
    """Whether a transform of torch.func around this tensor, or autograd beneath one, follows its derivatives."""
    wrapped = False
    while _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_gradtrackingtensor(x):
            return True
        x, wrapped = _functorch.get_unwrapped(x), True
    return wrapped and x.requires_grad and torch.is_grad_enabled()


def widened(x: Tensor) -> Tensor:
    """x in the dtype that sums are formed in."""
    return x if x.dtype == torch.float64 else x.float()
