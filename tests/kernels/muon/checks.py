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
    kernels.launch_apply([p], [u], [], [RATIO], torch.full((), LR, device=device), DECAY)
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
        kernels.launch_apply([p], [made], [], [RATIO], torch.full((), LR, device=device), DECAY)
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
        kernels.launch_apply([p, p[:0]], [out, out[:0]], [], [RATIO, 1.0], torch.full((), LR, device=device), DECAY)
        for made, wanted in ((b, expected[0]), (out, expected[1]), (p, weights)):
            torch.testing.assert_close(made, wanted, rtol=1e-6, atol=1e-6)
        assert torch.equal(flat[:: 33 * 65 + 1], outside)


def check_squares(device: str) -> None:
    """Tensors of several sizes and dtypes, empty ones, and several that make one sum, of one dtype."""
    sizes = ((3, 40), (0, 5), (1, 1), (70, 600), (33, 65))
    mixed = [normal(*shape, seed=i, dtype=(torch.float32, torch.bfloat16)[i % 2], device=device)
             for i, shape in enumerate(sizes)]  # fmt: skip
    alike = [x.float() for x in mixed]
    for tensors, counts in ((mixed, [1] * 5), (alike, [2, 0, 3]), (alike, [5])):
        out = torch.empty(len(counts), device=device)
        kernels.launch_squares(tensors, counts, out)
        parts = [sum(x.double().square().sum() for x in chosen) for chosen in split(tensors, counts)]
        torch.testing.assert_close(out.double(), torch.tensor(parts, device=device).double(), rtol=1e-6, atol=0)


def split(tensors: list[torch.Tensor], counts: list[int]) -> list[list[torch.Tensor]]:
    at = [sum(counts[:i]) for i in range(len(counts) + 1)]
    return [tensors[a:b] for a, b in zip(at, at[1:], strict=False)]


def check_copy(source: torch.dtype, dtype: torch.dtype, device: str) -> None:
    sources = [normal(size, seed=size, dtype=source, device=device) for size in (4096, 7, 1, 40, 70_000)]
    counts, scales = [2, 3], torch.tensor([0.5, -3.0], device=device)
    outs, squares = [torch.empty(x.shape, dtype=dtype, device=device) for x in sources], torch.empty(2, device=device)
    kernels.launch_copy(sources, outs, counts, scales, squares)
    for i, chosen in enumerate(split(list(zip(sources, outs, strict=True)), counts)):
        for x, out in chosen:
            assert torch.equal(out, (x.float() * scales[i]).to(dtype))
        exact = sum(out.double().square().sum() for _, out in chosen)
        torch.testing.assert_close(squares[i].double(), exact, rtol=1e-6, atol=0)


def check_scales(device: str) -> None:
    """To the bit, at both ends of the range and where there is no number; an update is never longer than its bound."""
    grads = torch.tensor([0.0, 1e-44, 1e-12, 0.9, 1.0, 4.0, 1e9, 1e38, torch.inf, torch.nan], device=device)
    buffers, factor = grads.flip(0).nan_to_num(0.0, 0.0, 0.0), torch.tensor(0.3, device=device)
    for given, nesterov in ((None, True), (factor, False)):
        made = kernels.launch_scales(grads, buffers, MU, nesterov, given)
        bounds = reference.update_bounds(grads, buffers, MU, nesterov=nesterov, factor=given)
        assert made.nan_to_num(-1.0).tolist() == reference.bounding_scales(bounds).nan_to_num(-1.0).tolist()
        reached = (bounds * made)[1:-2]
        assert ((reached >= 2**8) & (reached < 2**9) | (bounds[1:-2] < 2.0**-100)).all()


def check_momentum_of_a_step(half: torch.dtype, device: str) -> None:
    """Clipped gradients, updates scaled into half precision, and both sums of squares, in one launch for two sizes."""
    grads, buffers = ([normal(*shape, seed=seed + i, dtype=torch.float32, device=device) * 1e-6
                       for i, shape in enumerate(((70, 600), (33, 64)))] for seed in (0, 5))  # fmt: skip
    factor, scales = torch.tensor(0.37, device=device), torch.tensor([2.0**20, 2.0**18], device=device)
    exact = [reference.momentum_update(g.double(), b.double(), MU, nesterov=True, factor=factor)
             for g, b in zip(grads, buffers, strict=True)]  # fmt: skip
    outs = [torch.empty(g.shape, dtype=half, device=device) for g in grads]
    squares = torch.empty(2, 2, device=device)
    kernels.launch_momentum(grads, buffers, outs, MU, True, factor, scales, squares)
    for i, (new, update) in enumerate(exact):
        torch.testing.assert_close(buffers[i].double(), new, rtol=1e-6, atol=1e-13)
        error = (outs[i].double() - update * scales[i]).abs()
        assert (error <= torch.finfo(half).eps * (update * scales[i]).abs() + 1e-6).all()
        for made, of in zip(squares[:, i], (outs[i], buffers[i]), strict=True):
            torch.testing.assert_close(made.double(), of.double().square().sum(), rtol=1e-6, atol=0)


def check_apply_of_a_step(copy: torch.dtype, device: str) -> None:
    """Scaled updates, a copy in another dtype, and which update is not finite."""
    params, updates = ([normal(*shape, seed=seed + i, dtype=dtype, device=device)
                        for i, shape in enumerate(((70, 600), (33, 64), (5, 3)))]
                       for seed, dtype in ((0, torch.float32), (5, torch.float16)))  # fmt: skip
    updates[1].fill_(torch.inf)
    scales, ratios, lr = (
        torch.tensor([0.25, 1.0, 3.0], device=device),
        [1.7, 1.0, 0.2],
        torch.full((), LR, device=device),
    )
    expected = [reference.decayed_update(p, u, LR, ratio, DECAY, scale)
                for p, u, ratio, scale in zip(params, updates, ratios, scales, strict=True)]  # fmt: skip
    copies, bad = [torch.empty(p.shape, dtype=copy, device=device) for p in params], torch.empty(3, device=device)
    kernels.launch_apply(params, updates, copies, ratios, lr, DECAY, scales, bad)
    for p, c, wanted in zip(params, copies, expected, strict=True):
        torch.testing.assert_close(p, wanted, rtol=1e-6, atol=1e-6)
        assert torch.equal(c, p.to(copy))
    assert bad.tolist() == [0.0, 1.0, 0.0]
