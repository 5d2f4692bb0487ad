"""What a launcher hands to CUDA, checked as CUDA would check it and kept instead of launched.

`Launch` is one call of a kernel behind Triton's own binder: a wrong number of arguments, an unknown keyword and a
missing constexpr have failed by then. `Launch.check` refuses what a driver would refuse, and what a kernel would take
for something else; each refusal is a sentence.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

# CUDA C++ programming guide, "Technical specifications per compute capability": the same from 5.0 on.
MAX_GRID = (2**31 - 1, 65_535, 65_535)
MAX_THREADS = 1024  # of a block
# Bytes of shared memory that a block may ask for, by major·10 + minor; the same table.
MAX_SHARED = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448, 120: 101_376}
CAPABILITIES = tuple(MAX_SHARED)
_HINT = re.compile(r"\bhint\((\w+), (\w+)\)")


class LaunchRefused(AssertionError):
    """CUDA would refuse this launch, or the kernel would read other memory than it was given."""


@dataclass(frozen=True)
class Launch:
    """One call of a kernel, as Triton would compile and launch it.

    Attributes:
        kernel: the JITFunction.
        arch: compute capability, major·10 + minor.
        grid: as the launcher gave it, one to three sizes.
        arguments: values by name, constants included.
        signature: Triton's type of each argument by name; "constexpr" for constants, a `None` or a 1 among them.
        constants: values of the constants by path of position, as ASTSource takes them.
        attributes: what Triton found out about arguments (divisibility by 16), as ASTSource takes it.
        options: the compiler's, num_warps and num_stages among them.
        device: that was current.
    """

    kernel: Any
    arch: int
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    signature: Mapping[str, str]
    constants: Mapping[tuple[int, ...], Any]
    attributes: Mapping[tuple[int, ...], Any]
    options: Any
    device: torch.device

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that a row of a table may have set: constants by name, warps and stages."""
        names = self.kernel.arg_names
        found = {names[path[0]]: value for path, value in self.constants.items()}
        return {**found, "num_warps": self.options.num_warps, "num_stages": self.options.num_stages}

    @property
    def build_key(self) -> tuple[Any, ...]:
        """Equal for two launches of one compiled kernel on one architecture."""
        settings = tuple((name, repr(value)) for name, value in self.settings.items())
        return (self.name, self.arch, tuple(self.signature.items()), settings, repr(sorted(self.attributes.items())))

    def check(self) -> None:
        """Refuse what cannot be launched.

        Raises:
            LaunchRefused: in one sentence, why.
        """
        self._check_grid()
        self._check_options()
        self._check_hints()
        for name, value in self.arguments.items():
            if isinstance(value, torch.Tensor) and value.device != self.device:
                raise LaunchRefused(f"{self.name}: {name} is on {value.device}, and {self.device} is current")
            if type(value).__name__ == "TensorDescriptor":
                if self.arch < 90:
                    raise LaunchRefused(f"{self.name}: {name} is a descriptor, which sm_{self.arch} does not have")
                check_descriptor(f"{self.name}: {name}", value)

    def _check_grid(self) -> None:
        if not 1 <= len(self.grid) <= 3:
            raise LaunchRefused(f"{self.name}: a grid has one to three sizes, got {self.grid}")
        for size, limit in zip(self.grid, MAX_GRID, strict=False):
            if type(size) is not int or not 1 <= size <= limit:
                raise LaunchRefused(f"{self.name}: grid {self.grid} has {size} where 1 to {limit} are allowed")

    def _check_options(self) -> None:
        warps, stages = self.options.num_warps, self.options.num_stages
        if warps < 1 or warps & (warps - 1) or 32 * warps > MAX_THREADS:
            raise LaunchRefused(f"{self.name}: num_warps must be a power of two up to {MAX_THREADS // 32}, got {warps}")
        if stages < 1:
            raise LaunchRefused(f"{self.name}: num_stages must be at least 1, got {stages}")

    def _check_hints(self) -> None:
        """`hint(number, ALIGN)` rounds a number down to what it is promised to be divided by: it must be."""
        for name, align in promises(self.kernel.fn):
            if self.arguments[name] % self.arguments[align]:
                raise LaunchRefused(
                    f"{self.name}: {name} is promised to be a multiple of {self.arguments[align]}, "
                    f"got {self.arguments[name]}"
                )


@cache
def promises(function: Any) -> list[tuple[str, str]]:
    """Arguments that a kernel takes to be multiples of a constant, and that constant, by name."""
    return _HINT.findall(inspect.getsource(function))


def check_descriptor(what: str, descriptor: Any) -> None:
    """Refuse what cuTensorMapEncodeTiled refuses (cuda.h, without interleaving), rank, sizes, strides and boxes.

    A tile wider than the 128 bytes of a swizzle is several boxes: Triton cuts it, at a multiple of 16 bytes.

    Args:
        what: the kernel and its argument, for the message.
        descriptor: Triton's TensorDescriptor: base, shape, strides and block_shape in elements, the last dimension the
            densest.

    Raises:
        LaunchRefused: in one sentence, why.
    """
    base, width = descriptor.base, descriptor.base.element_size()
    shape, strides, box = list(descriptor.shape), list(descriptor.strides), list(descriptor.block_shape)
    if not 1 <= len(shape) <= 5 or not len(shape) == len(strides) == len(box):
        raise LaunchRefused(f"{what} must have 1 to 5 dimensions, got shape {shape}, strides {strides}, box {box}")
    if base.data_ptr() % 16:
        raise LaunchRefused(f"{what} must begin at a multiple of 16 bytes, got {base.data_ptr() % 16} past one")
    if strides[-1] != 1:
        raise LaunchRefused(f"{what} must have dense rows, got a stride of {strides[-1]} elements")
    for size, stride in zip(shape, strides, strict=True):
        if not 0 < size <= 2**32:
            raise LaunchRefused(f"{what} must have sizes of 1 to 2^32, got {shape}")
        if stride != strides[-1] and ((stride * width) % 16 or not 0 <= stride * width < 2**40):
            raise LaunchRefused(f"{what} must have strides of 16·n bytes below 2^40, got {stride * width}")
    for outer, inner, size in zip(strides, strides[1:], shape[1:], strict=False):
        if outer < inner * size:
            raise LaunchRefused(f"{what} must have each stride span the dimension inside it, got {strides} for {shape}")
    # cuTensorMapEncodeTiled takes boxes of up to 256; the last dimension is cut to the width of a swizzle.
    if any(not 0 < side <= 256 for side in box[:-1]) or (box[-1] * width) % 16:
        raise LaunchRefused(f"{what} must have a box of 1 to 256 by 16·n bytes, got {box} of {width} bytes")
