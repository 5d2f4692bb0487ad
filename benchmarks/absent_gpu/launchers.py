"""The launchers of `prx_kernels` on fake tensors: they run as on the GPU, up to what Triton would compile and launch.

Triton's own binder specialises the arguments, so each call holds exactly what would be built; `builds` builds it.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor
from triton.runtime.jit import JITFunction

from prx_kernels.launch import NAMESPACE


@dataclass(frozen=True)
class Call:
    """A launch of a Triton kernel that was bound and not launched."""

    kernel: Any
    grid: tuple[int, ...]
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    options: Any
    attributes: dict[Any, Any]
    build_key: tuple[str, str]
    """The kernel's name, and all that makes another build of it."""

    @property
    def name(self) -> str:
        name: str = self.kernel.__name__
        return name

    def constant(self, name: str) -> Any:
        """The value of a constexpr argument."""
        return self.constants[(self.kernel.arg_names.index(name),)]


def is_ours(name: str) -> bool:
    """Whether an op ("namespace::name") is of `prx_kernels` and has a launcher."""
    return name.startswith(f"{NAMESPACE}::") and "cuda" in OPDEFS[name]._backend_fns


def launched(name: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, list[Call]]:
    """What an op gives, and the launches that it would make, by its CUDA side on fake tensors."""
    with intercepted() as calls:
        out = OPDEFS[name]._backend_fns["cuda"](*arguments, **keywords)
    return out, calls


@contextmanager
def intercepted() -> Iterator[list[Call]]:
    """Within this context Triton kernels are bound and noted instead of launched; fake tensors have addresses."""
    calls: list[Call] = []
    run = JITFunction.run

    def bind(self: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        made: list[Call] = []
        bound = dict(zip(self.arg_names, arguments, strict=False)) | keywords

        def compile_(fn: Any, key: Any, signature: Any, device: int, constants: Any, options: Any, attrs: Any,
                     *_: Any) -> None:  # fmt: skip
            made.append(
                Call(fn, _evaluated(grid, bound), signature, constants, options, attrs, (fn.__name__, str(key)))
            )

        with patch.object(JITFunction, "_do_compile", compile_):
            run(self, *arguments, grid=grid, warmup=True, **keywords)
        calls.extend(made)

    with patch.object(JITFunction, "run", bind), patch.object(FakeTensor, "data_ptr", _address, create=True):
        yield calls


def _evaluated(grid: Any, bound: dict[str, Any]) -> tuple[int, ...]:
    sizes: tuple[int, ...] = tuple(grid(bound) if callable(grid) else grid)
    if not 1 <= len(sizes) <= 3 or any(not 1 <= n <= most for n, most in zip(sizes, MAX_GRID, strict=False)):
        raise ValueError(f"a grid of {sizes} programs is outside of CUDA's limits, {MAX_GRID}")
    return sizes


MAX_GRID = (2**31 - 1, 65_535, 65_535)
"""CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"."""

# --- addresses -------------------------------------------------------------------------------------------------------

_ADDRESSES: dict[int, int] = {}
_NEXT = [1 << 40]


def _address(x: Tensor) -> int:
    """An address for a fake tensor: storages do not overlap and begin at multiples of 512 bytes, as torch's do."""
    storage = x.untyped_storage()
    key = storage._cdata
    if key not in _ADDRESSES:
        _ADDRESSES[key] = _NEXT[0]
        _NEXT[0] += (storage.nbytes() // 512 + 1) * 512
        weakref.finalize(storage, _ADDRESSES.pop, key, None)
    return _ADDRESSES[key] + int(x.storage_offset()) * x.element_size()
