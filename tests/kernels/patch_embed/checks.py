"""Kernel against definition, on the device given: the interpreter runs these on the CPU, a GPU on itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prx_kernels import reference
from prx_kernels.noise import kernels as noise_kernels
from prx_kernels.patch_embed import launch
from prx_kernels.patch_embed.launch import Noise
from prx_kernels.pixel_loss import kernels as loss_kernels


@dataclass(frozen=True)
class Case:
    patch: int
    batch: int
    height: int
    width: int
    bottleneck: int
    channels: int = 3


# Ragged in every dimension: height and width that differ, patches that are no power of two, few and single tokens,
# features that end inside a tile (588, 243), a bottleneck of several tiles of columns, other channels than three.
CASES = [
    Case(8, 2, 16, 24, 144),
    Case(14, 1, 28, 42, 48),
    Case(16, 3, 16, 48, 48),
    Case(9, 2, 18, 27, 32),
    Case(32, 1, 32, 64, 16, channels=1),
    Case(8, 5, 8, 8, 32, channels=4),
]


def picture(case: Case, kind: str, device: str) -> Tensor:
    """A picture of a dtype ("fp32" …), or float32 "channels_last", "sliced" (odd strides), "expanded" (one for all)."""
    generator = torch.Generator().manual_seed(case.patch)
    shape = (case.batch, case.channels, case.height, case.width)
    if kind == "uint8":
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)
    x = torch.randn(shape, generator=generator).to(device)
    if kind == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if kind == "sliced":
        wide = torch.zeros(shape[0] + 1, shape[1], shape[2] + 3, shape[3] + 5, device=device)
        wide[1:, :, 1:-2, 3:-2] = x
        return wide[1:, :, 1:-2, 3:-2]
    if kind == "expanded":
        return x[:1].expand(shape)
    return x.to({"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[kind])


def noise_for(case: Case, device: str) -> Noise:
    t = torch.linspace(0, 1, case.batch + 1)[1:].to(device)
    ids = (torch.arange(case.batch) * 2**31 - 1).to(device)  # both words of the counter are used
    return Noise(t, torch.tensor([2**40 + 9], device=device), ids, 1.5)


def check_product(case: Case, kind: str, dtype: torch.dtype, noisy: bool, device: str) -> None:
    """Forward, weight's and picture's gradient: error against float64 at most twice that of plain PyTorch."""
    image, p = picture(case, kind, device), case.patch
    noise = noise_for(case, device) if noisy else None
    drawn = (noise.t, noise.seed, noise.sample_ids) if noise else (None, None, None)
    scale = noise.scale if noise else 1.0
    generator = torch.Generator().manual_seed(1)
    features = case.channels * p * p
    weight = (torch.randn(case.bottleneck, features, generator=generator) / features**0.5).to(device, dtype)
    bias = torch.randn(case.bottleneck, generator=generator).to(device, dtype)
    tokens = (case.height // p) * (case.width // p)
    grad = torch.randn(case.batch, tokens, case.bottleneck, generator=generator).to(device, dtype)
    exact = image.double() if image.is_floating_point() else reference.scaled(image).double()
    near(
        launch.project(image, weight, bias, p, noise),
        reference.patch_project(image, weight, bias, *drawn, p, scale),
        reference.patch_project(exact, weight.double(), bias.double(), *drawn, p, scale),
    )
    near(
        launch.weight_gradient(grad, image, p, noise),
        reference.patch_weight_gradient(grad, image, *drawn, p, scale),
        reference.patch_weight_gradient(grad.double(), exact, *drawn, p, scale),
    )
    if image.is_floating_point():
        near(
            launch.image_gradient(grad, weight, drawn[0], image, p),
            reference.patch_image_gradient(grad, weight, drawn[0], image, p),
            reference.patch_image_gradient(grad.double(), weight.double(), drawn[0], exact, p),
        )


def near(actual: Tensor, formula: Tensor, exact: Tensor) -> None:
    assert actual.dtype == formula.dtype
    assert actual.shape == formula.shape
    size = float(exact.abs().max())
    error, plain = (float((x.double() - exact).abs().max()) for x in (actual, formula))
    # Twice the formula's error, and one rounding of the largest value; float32 sums in another order: eight.
    ulps = 8 if actual.dtype == torch.float32 else 1
    allowed = 2 * plain + ulps * torch.finfo(actual.dtype).eps * size
    assert error <= allowed, (
        f"error {error:.3g}, allowed {allowed:.3g} (plain PyTorch {plain:.3g}, values to {size:.3g})"
    )


def check_loss(case: Case, kind: str, dtype: torch.dtype, device: str) -> None:
    image, p = picture(case, kind, device), case.patch
    generator = torch.Generator().manual_seed(2)
    shape = (case.batch, (case.height // p) * (case.width // p), case.channels * p * p)
    tokens = torch.randn(shape, generator=generator).to(device, dtype)
    t = torch.linspace(0.001, 1, case.batch).to(device)
    exact_image = image.double() if image.is_floating_point() else reference.scaled(image).double()
    exact = reference.x_prediction_loss_gradient(tokens.double(), exact_image, t, p, 0.05, 0.7)
    formula = reference.x_prediction_loss_gradient(tokens, image, t, p, 0.05, 0.7)
    gradient = torch.empty(shape, dtype=dtype, device=device)
    losses = loss_kernels.loss(tokens, image, t, p, 0.05, gradient, 0.7)
    for actual, plain, truth in zip((losses, gradient), formula, exact, strict=True):
        near(actual, plain, truth)
    assert torch.equal(loss_kernels.loss(tokens, image, t, p, 0.05, None, 0.0), losses)


def check_scale(dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 7, 75, generator=generator).to(device, dtype)
    for factor in (torch.tensor(0.3), torch.tensor([1.0, -2.0, 0.0]), torch.tensor(1.0), torch.tensor(2.0).expand(3)):
        factor = factor.to(device)
        expected = (x.float() * (factor if factor.ndim == 0 else factor[:, None, None])).to(dtype)
        before = x.clone()
        out = loss_kernels.scale(x, factor, 1.0, in_place=False)
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
        assert torch.equal(x, before)
        loss_kernels.scale(before, factor, 1.0, in_place=True)
        torch.testing.assert_close(before, expected, rtol=0, atol=0)


def check_noise(device: str) -> None:
    """Normals to 1e-6, which integers that differ in any bit would not give, for any 64 bits of seed and id."""
    ids = torch.tensor([0, 1, -1, 2**32, 2**63 - 1, -(2**63)])
    for seed, count in ((0, 1), (-1, 7), (2**40 + 17, 5003), (-(2**63), 1024)):
        on_device = (ids.to(device), torch.tensor([seed], device=device), count)
        drawn = noise_kernels.draw(*on_device, uniform=False)
        expected = reference.philox_normal(torch.tensor([seed]), (len(ids), count), sample_ids=ids)
        torch.testing.assert_close(drawn.cpu(), expected, rtol=0, atol=1e-6)
        expected = reference.philox_uniform(torch.tensor([seed]), (len(ids), count), sample_ids=ids)
        assert torch.equal(noise_kernels.draw(*on_device, uniform=True).cpu(), expected)
