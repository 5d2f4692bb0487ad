"""Tensors for an op's cases: of any dtype, in every way that strides can lie, real ones or fake ones of a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# --- layouts -----------------------------------------------------------------------------------------------------


def _transposed(x: Tensor) -> Tensor:
    """The last two dimensions the other way round in memory."""
    return x.mT.contiguous().mT if x.ndim > 1 else x


def _outer(x: Tensor) -> Tensor:
    """The first two dimensions the other way round in memory: rows dense, samples interleaved."""
    return x.transpose(0, 1).contiguous().transpose(0, 1) if x.ndim > 1 else x


def _expanded(x: Tensor) -> Tensor:
    """The first entry for all: stride 0."""
    return x[:1].expand_as(x) if x.ndim else x


def _offset(x: Tensor) -> Tensor:
    """Dense, but one element behind an address of the allocator."""
    return torch.cat((x.new_zeros(1), x.reshape(-1)))[1:].view(x.shape)


def _padded(x: Tensor) -> Tensor:
    """Rows as a slice of rows longer by 16 elements: 16-byte strides, gaps between rows."""
    return torch.cat((x, x.new_zeros(*x.shape[:-1], 16)), dim=-1)[..., : x.shape[-1]] if x.ndim else x


def _sliced(x: Tensor) -> Tensor:
    """Rows as a slice of rows longer by three elements, the first left out: no address or stride of 16 bytes."""
    if not x.ndim:
        return x
    edge = x.new_zeros(*x.shape[:-1], 1)
    return torch.cat((edge, x, edge, edge), dim=-1)[..., 1:-2]


def _gaps(x: Tensor) -> Tensor:
    """Every second element."""
    return torch.stack((x, x), dim=-1)[..., 0]


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else _transposed(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda x: x,
    "transposed": _transposed,
    "outer": _outer,
    "expanded": _expanded,
    "offset": _offset,
    "padded": _padded,
    "sliced": _sliced,
    "gaps": _gaps,
    "channels_last": _channels_last,
}


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of x (of its first entry, where `layout` is expanded) in other strides; as it is where it is empty."""
    return LAYOUTS[layout](x) if x.numel() else x


# --- values ------------------------------------------------------------------------------------------------------


class Inputs:
    """Makes the tensors of a case and remembers those that get a gradient.

    Args:
        dtype: of what the case calls its tensors.
        other: of what goes with them: modulation, pictures, momentum, indices.
        layout: a name in LAYOUTS, for all of them.
        device: where.
        real: values drawn from a fixed seed, the same on every device; else memory as it is, as fake tensors have it.
        exact: the same values in float64, for the truth that results are held to.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        other: torch.dtype | None = None,
        *,
        layout: str = "dense",
        device: str = "cuda",
        real: bool = True,
        exact: bool = False,
    ) -> None:
        self.dtype, self.other = dtype, dtype if other is None else other
        self.layout, self.device, self.real, self.exact = layout, device, real, exact
        self.leaves: list[Tensor] = []
        self._generator = torch.Generator().manual_seed(0) if real else None

    @property
    def computed(self) -> torch.dtype:
        """In which a case that may choose should compute: float64 where the truth is wanted."""
        return torch.float64 if self.exact else self.dtype

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, grad: bool = True, scale: float = 1.0) -> Tensor:
        """A tensor of normal numbers, or of integers; it gets a gradient if it can have one, unless `grad` is False."""
        dtype = self.dtype if dtype is None else dtype
        x = lay_out(self._drawn(shape, dtype, scale), self.layout)
        if grad and (dtype.is_complex or (dtype.is_floating_point and dtype.itemsize > 1)):
            x = x.detach().requires_grad_()
            self.leaves.append(x)
        return x

    def _drawn(self, shape: tuple[int, ...], dtype: torch.dtype, scale: float) -> Tensor:
        if self._generator is None:
            return torch.empty(shape, dtype=dtype, device=self.device)
        if dtype.is_floating_point or dtype.is_complex:
            wide = torch.complex64 if dtype.is_complex else torch.float32
            x = (torch.randn(shape, generator=self._generator, dtype=wide) * scale).to(dtype)
        else:
            high = 2 if dtype == torch.bool else 100
            x = torch.randint(0, high, shape, generator=self._generator).to(dtype)
        return (x.double() if self.exact and dtype.is_floating_point else x).to(self.device)

    def keep(self, batch: int, tokens: int, kept: int) -> Tensor:
        """(batch, kept) indices below `tokens`, unique in a row; int64 where that is the other dtype, else int32."""
        dtype = torch.int64 if self.other == torch.int64 else torch.int32
        if self._generator is None:
            return lay_out(torch.empty((batch, kept), dtype=dtype, device=self.device), self.layout)
        order = torch.rand((batch, tokens), generator=self._generator).argsort(dim=1)[:, :kept]
        return lay_out(order.to(self.device, dtype), self.layout)

    def ids(self, batch: int) -> Tensor:
        """Global sample ids; both words of their counters are used."""
        ids = torch.arange(batch, device=self.device) * (2**33 + 1)
        return lay_out(ids, self.layout)

    def seed(self) -> Tensor:
        return torch.full((), 2**40 + 7, dtype=torch.int64, device=self.device)

    def levels(self, batch: int) -> Tensor:
        """Noise levels t in (0, 1), float32."""
        levels = (torch.arange(batch, device=self.device, dtype=torch.float32) + 1) / (batch + 1)
        return lay_out(levels, self.layout)

    def incoming(self, output: Tensor) -> Tensor:
        """A gradient for an output, laid out as the inputs are: quarters, which every dtype holds exactly."""
        shape = tuple(output.shape)
        if self._generator is None:
            return lay_out(torch.empty(shape, dtype=output.dtype, device=self.device), self.layout)
        quarters = torch.randint(-8, 9, shape, generator=self._generator) / 4
        return lay_out(quarters.to(self.device, output.dtype), self.layout)


def differentiable(results: Any) -> list[Tensor]:
    """The tensors among a case's results that depend on something that gets a gradient."""
    return [x for x in torch.utils._pytree.tree_leaves(results) if isinstance(x, Tensor) and x.requires_grad]
