"""Muon's kernels against their definitions, on any device: under the interpreter on the CPU, and on a GPU."""

from __future__ import annotations

import torch

from prx_kernels import reference
from prx_kernels.muon import kernels

SIZES = ((1, 1), (3, 40), (16, 128), (33, 65), (70, 64))
MU, LR, DECAY, RATIO = 0.95, 0.02, 0.1, 1.7


def normal(*shape: int, seed: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def assert_as_near(made: torch.Tensor, formula: torch.Tensor, exact: torch.Tensor) -> None:
    """At most twice the error of the same formula in PyTorch, and a rounding: float32 entries are of size one."""
    error, allowed = (made.double() - exact).abs().max(), (formula.double() - exact).abs().max()
    assert error <= 2 * allowed + torch.finfo(made.dtype).eps, f"{error} against {allowed}"


def check_momentum(
    shape: tuple[int, int], grad: torch.dtype, buffer: torch.dtype, out: torch.dtype, device: str
) -> None:
    for nesterov in (True, False):
        g = normal(*shape, seed=0, dtype=grad, device=device)
        b = normal(*shape, seed=1, dtype=buffer, device=device)
        exact = reference.momentum_update(g.double(), b.double(), MU, nesterov=nesterov)
        formula = [
            x.to(dtype)
            for x, dtype in zip(reference.momentum_update(g, b, MU, nesterov=nesterov), (buffer, out), strict=True)
        ]
        made = torch.empty(shape, dtype=out, device=device)
        alone = b.clone()
        kernels.launch_momentum([g], [b], [made], MU, nesterov)
        assert_as_near(b, formula[0], exact[0])
        assert_as_near(made, formula[1], exact[1])
        kernels.launch_momentum([g], [alone], [], MU, nesterov)
        assert torch.equal(alone, b)


def check_apply(shape: tuple[int, int], param: torch.dtype, update: torch.dtype, device: str) -> None:
    p = normal(*shape, seed=2, dtype=param, device=device)
    u = normal(*shape, seed=3, dtype=update, device=device)
    exact = reference.decayed_update(p.double(), u.double(), LR, RATIO, DECAY)
    formula = reference.decayed_update(p, u, LR, RATIO, DECAY).to(param)
    kernels.launch_apply([p], [u], [RATIO], torch.full((), LR, device=device), DECAY)
    assert_as_near(p, formula, exact)


def check_not_finite(device: str) -> None:
    """An entry that is not finite leaves momentum and weight as they are, to the bit, and shows in the update."""
    for bad in (float("nan"), float("inf"), -float("inf")):
        g, b = (normal(40, 70, seed=seed, dtype=torch.float32, device=device) for seed in (0, 1))
        g[7, 5] = bad
        old, made = b.clone(), torch.zeros_like(b)
        kernels.launch_momentum([g], [b], [made], MU, True)
        assert b[7, 5] == old[7, 5]
        assert made[7, 5].isnan()
        assert int(made.isfinite().sum()) == made.numel() - 1
        assert int((b != old).sum()) == made.numel() - 1
        p = old.clone()
        made[7, 5] = bad
        kernels.launch_apply([p], [made], [RATIO], torch.full((), LR, device=device), DECAY)
        assert p[7, 5] == old[7, 5]
        assert int((p != old).sum()) == made.numel() - 1


def check_layouts(device: str) -> None:
    """Rows cut out of a larger tensor at an odd address, transposed matrices, and several matrices in one call."""
    for transposed in (False, True):
        flat = normal(4 * (33 * 65 + 1), seed=4, dtype=torch.float32, device=device)
        parts = [flat[i * (33 * 65 + 1) + 1 :][: 33 * 65].view(65, 33) for i in range(4)]
        g, b, out, p = (part.mT if transposed else part for part in parts)
        expected = reference.momentum_update(g, b, MU, nesterov=True)
        weights = reference.decayed_update(p, expected[1], LR, RATIO, DECAY)
        outside = flat[:: 33 * 65 + 1].clone()
        kernels.launch_momentum([g, g[:0]], [b, b[:0]], [out, out[:0]], MU, True)
        kernels.launch_apply([p, p[:0]], [out, out[:0]], [RATIO, 1.0], torch.full((), LR, device=device), DECAY)
        for made, wanted in ((b, expected[0]), (out, expected[1]), (p, weights)):
            torch.testing.assert_close(made, wanted, rtol=1e-6, atol=1e-6)
        assert torch.equal(flat[:: 33 * 65 + 1], outside)
