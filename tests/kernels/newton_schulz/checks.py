"""Kernel against definition, on the device given: the interpreter runs these on the CPU, a GPU on itself."""

from __future__ import annotations

import mmap

import torch

from prx_kernels import reference
from prx_kernels.launch import Config
from prx_kernels.newton_schulz import norm_kernels
from prx_kernels.newton_schulz import symmetric_kernels as kernels

# (batch, n, k): one, ragged, one past a tile, several tiles; k below and above one stage.
SHAPES = [(1, 1, 1), (2, 17, 33), (1, 65, 40), (3, 64, 64), (2, 70, 40)]
# Rows of 16·k bytes, which descriptors need; n ends inside a tile.
ALIGNED = [(1, 8, 8), (3, 72, 40), (2, 200, 136), (1, 256, 72)]
SCALES = [(1.0, 0.0, 0.0), (0.5, -1.25, 0.0), (-2.0, 0.75, 3.0)]  # alpha, beta, gamma


def operands(batch: int, n: int, k: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    """A, B with a product that is not symmetric, and C: a mirrored triangle shows in every element."""
    generator = torch.Generator().manual_seed(batch + 10 * n + 1000 * k)
    a, b = (torch.randn(batch, n, k, generator=generator).to(device, dtype) for _ in range(2))
    c = torch.randn(batch, n, n, generator=generator).to(device, dtype)
    return a, b, (c + c.mT) / 2


def check_close(actual: torch.Tensor, tensors: tuple[torch.Tensor, ...], scales: tuple[float, ...]) -> None:
    """Error against float64 at most twice that of the definition, and the result exactly symmetric."""
    alpha, beta, gamma = scales
    truth = reference.sym_gemm(*(x.double() for x in tensors), alpha=alpha, beta=beta, gamma=gamma)
    allowed = (reference.sym_gemm(*tensors, alpha=alpha, beta=beta, gamma=gamma).double() - truth).abs().max()
    # One rounding of the largest value: sums in another order may round the other way.
    rounding = torch.finfo(actual.dtype).eps * truth.abs().max()
    error = (actual.double() - truth).abs().max()
    assert error <= 2 * allowed + rounding, (tuple(actual.shape), actual.dtype, error, allowed)
    assert torch.equal(actual, actual.mT)


def check_product(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    """Through the launcher, as a caller would, with the layouts that callers have."""
    tensors = operands(*shape, dtype, device)
    for scales in SCALES:
        c = tensors[2] if scales[1] else None
        out = torch.empty_like(tensors[2])
        kernels.sym_gemm(tensors[0], tensors[1], c, *scales, out)
        check_close(out, tensors, scales)
    factors = torch.tensor([0.5, 2.0, 3.0][: shape[0]], device=device)
    kernels.sym_gemm(*tensors, *SCALES[2], out, factors)
    for i, factor in enumerate(factors.tolist()):
        one = tuple(x[i : i + 1] for x in tensors)
        check_close(out[i : i + 1], one, (SCALES[2][0] * factor**2, *SCALES[2][1:]))
    for a, b, c in layouts(*tensors):
        wide = torch.full((shape[0], shape[1], shape[1] + 3), 7.0, dtype=dtype, device=device)
        out = wide[:, :, : shape[1]]
        kernels.sym_gemm(a, b, c, *SCALES[2], out)
        check_close(out, (a, b, c), SCALES[2])
        assert (wide[:, :, shape[1] :] == 7.0).all(), "written outside of out"
        columns = torch.empty_like(tensors[2]).mT
        kernels.sym_gemm(a, b, c, *SCALES[2], columns)
        check_close(columns, (a, b, c), SCALES[2])


def layouts(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Both operands by columns, one of them, gaps between rows and inside rows, one matrix for the whole batch."""

    def by_columns(x: torch.Tensor) -> torch.Tensor:
        return x.mT.contiguous().mT

    def gaps(x: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.stack((x, x), dim=dim).select(dim, 0)

    return [
        (by_columns(a), by_columns(b), by_columns(c)),
        (by_columns(a), b, c),
        (gaps(a, 2), gaps(b, 1), gaps(c, 2)),
        (gaps(a, 3), gaps(b, 3), gaps(c, 3)),
        (a[:1].expand_as(a), b, c[:1].expand_as(c)),
    ]


def check_config(shape: tuple[int, int, int], dtype: torch.dtype, device: str, config: Config, tma: bool) -> None:
    """One row of a table, with operands by rows and by columns, at whatever size."""
    a, b, c = operands(*shape, dtype, device)
    launch = kernels._launch_tma if tma else kernels._launch_pointer
    for transposed in (False, True):
        stored = [x.mT.contiguous() if transposed else x for x in (a, b)]
        for addend, scales in ((c, SCALES[2]), (None, SCALES[0])):
            out = torch.empty_like(c)
            factor = None if addend is not None else torch.full((shape[0],), 2.0, device=device)
            launch(*stored, addend, out, *scales, transposed, config, factor)
            check_close(out, (a, b, c), (scales[0] if factor is None else 4.0 * scales[0], *scales[1:]))


def check_addresses_beyond_32_bits(device: str) -> None:
    """Offsets of 2³¹ elements: between matrices, between rows, in every operand. Only touched pages take memory."""
    a, b, c = operands(3, 16, 16, torch.float16, device)
    far = [pages(2**31 + 256, device) for _ in range(4)]
    placed = [x.as_strided((3, 16, 16), (2**30, 16, 1)) for x in far]
    for place, x in zip(placed, (a, b, c), strict=False):
        place.copy_(x)
    kernels.sym_gemm(*placed[:3], *SCALES[2], placed[3])
    check_close(placed[3], (a, b, c), SCALES[2])
    a, b, c = operands(1, 33, 33, torch.float16, device)  # two tiles a side
    placed = [x.as_strided((1, 33, 33), (2**31, 2**26, 1)) for x in far]
    for place, x in zip(placed, (a, b, c), strict=False):
        place.copy_(x)
    kernels.sym_gemm(*placed[:3], *SCALES[2], placed[3])
    check_close(placed[3], (a, b, c), SCALES[2])


def pages(count: int, device: str) -> torch.Tensor:
    """`count` float16 numbers; on the CPU pages that the system makes when they are touched."""
    if device != "cpu":
        return torch.empty(count, dtype=torch.float16, device=device)
    return torch.frombuffer(mmap.mmap(-1, 2 * count), dtype=torch.float16)


def check_norm(shape: tuple[int, int, int], source: torch.dtype, dtype: torch.dtype, device: str) -> None:
    """Ordinary, huge, tiny, zero and broken matrices in one batch; each has the quotient that it has alone."""
    generator = torch.Generator().manual_seed(sum(shape))
    G = torch.randn(shape, generator=generator).to(device, source)
    limit = torch.finfo(source).max
    for i, scale in enumerate((1.0, limit / 8, 1e-4, 0.0, float("nan"), float("inf"))):
        G[i] = (G[i].double() * scale).to(source) if scale else 0
    out = torch.empty(shape, dtype=dtype, device=device)
    norm_kernels.unit_norm(G, 1e-7, out)
    truth = reference.unit_norm(G.double(), torch.float64, eps=1e-7)
    error = (out[:4].double() - truth[:4]).abs().max()
    # A few roundings in float32 (two quotients, a root, sums of up to 2¹⁶ terms in pieces), then one to dtype.
    assert error <= torch.finfo(dtype).eps / 2 * truth[:4].abs().max() + 8 * torch.finfo(torch.float32).eps
    assert out[4:].isnan().all(dim=2).all(dim=1).tolist() == [True, False] or out[4:].isnan().all()
    for i in range(shape[0]):
        alone = torch.empty((1, *shape[1:]), dtype=dtype, device=device)
        norm_kernels.unit_norm(G[i : i + 1].clone(), 1e-7, alone)
        assert torch.equal(alone[0], out[i]) or alone.isnan().any()
