"""The kernels of noise, patch embedding and loss under Triton's interpreter, against their definitions."""

from __future__ import annotations

import pytest
import torch

from prx_kernels import patch_embed, x_prediction_loss
from prx_kernels.patch_embed import launch, ops
from prx_kernels.patch_embed import reference as embedding
from prx_kernels.pixel_loss import kernels as loss_kernels
from prx_kernels.pixel_loss import reference as pixel_loss
from prx_model import PRXConfig, PRXTransformer
from prx_model.flow import sample_t
from tests.kernels.patch_embed import checks


@pytest.mark.parametrize("case", checks.CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("noisy", [False, True], ids=["clean", "noisy"])
def test_products(case, dtype, noisy):
    checks.check_product(case, "fp32" if dtype == torch.float32 else "fp16", dtype, noisy, "cpu")


@pytest.mark.parametrize("kind", ["uint8", "fp32", "channels_last", "sliced", "expanded"])
@pytest.mark.parametrize("noisy", [False, True], ids=["clean", "noisy"])
def test_products_of_other_pictures(kind, noisy):
    for case in (checks.CASES[0], checks.CASES[3]):
        checks.check_product(case, kind, torch.float16, noisy, "cpu")


@pytest.mark.parametrize("case", checks.CASES, ids=str)
@pytest.mark.parametrize(
    ("kind", "dtype"), [("fp32", torch.float32), ("uint8", torch.float16), ("channels_last", torch.float32)]
)
def test_loss(case, kind, dtype):
    checks.check_loss(case, kind, dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scale(dtype):
    checks.check_scale(dtype, "cpu")


def test_noise():
    checks.check_noise("cpu")


# --- training with the kernels -----------------------------------------------------------------------------------


@pytest.fixture
def kernels_on_the_cpu(monkeypatch):
    """What the ops run on a CPU becomes what they run on a GPU."""
    noise = ops._noise

    def project(image, weight, bias, t, seed, ids, patch, scale):
        return launch.project(image, weight, bias, patch, noise(t, seed, ids, scale))

    def weight_gradient(grad, image, t, seed, ids, patch, scale):
        return launch.weight_gradient(grad, image, patch, noise(t, seed, ids, scale))

    def loss_and_gradient(tokens, image, t, patch, t_min, unit):
        gradient = torch.empty_like(tokens)
        return loss_kernels.loss(tokens, image, t, patch, t_min, gradient, unit), gradient

    def install():
        monkeypatch.setattr(embedding, "patch_project", project)
        monkeypatch.setattr(embedding, "patch_weight_gradient", weight_gradient)
        monkeypatch.setattr(embedding, "patch_image_gradient", launch.image_gradient)
        monkeypatch.setattr(pixel_loss, "x_prediction_loss_gradient", loss_and_gradient)

    return install


def twenty_losses() -> list[float]:
    """Of a tiny transformer on two grey pictures of 8x16, with other noise and levels at each step."""
    torch.manual_seed(0)
    sizes = {"in_channels": 1, "hidden_size": 16, "num_heads": 1, "depth": 1, "axes_dim": (8, 8), "bottleneck_size": 16}
    model = PRXTransformer(PRXConfig(patch_size=8, context_in_dim=8, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    images = torch.randint(0, 256, (2, 1, 8, 16), dtype=torch.uint8)
    text, ids, losses = torch.randn(2, 3, 8), torch.tensor([4, 2**35]), []
    for step in range(20):
        seed = torch.tensor(step)
        t = sample_t(seed, ids)
        tokens = model.forward_tokens(images, t, text, noise_seed=seed, sample_ids=ids)
        loss = x_prediction_loss(tokens, images, t, 8)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_twenty_steps_give_the_losses_of_the_definitions(kernels_on_the_cpu):
    expected = twenty_losses()
    kernels_on_the_cpu()
    actual = twenty_losses()
    assert actual != expected, "the kernels did not run: their sums round differently"
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert expected[-1] < 0.9 * expected[0] or min(expected) < 0.5 * max(expected)


def test_gradients_of_the_kernels_equal_finite_differences(kernels_on_the_cpu):
    """Central differences in float32: the embedding is linear in each argument, so their error is rounding alone."""
    kernels_on_the_cpu()
    generator = torch.Generator().manual_seed(0)
    shapes = {"image": (2, 3, 8, 16), "w1": (16, 192), "b1": (16,)}
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    level = {"t": torch.tensor([0.3, 0.7]), "noise_seed": torch.tensor(7)}
    weight = torch.randn(2, 2, 16, generator=generator)

    def value(**inputs):
        return (patch_embed(inputs["image"], inputs["w1"], inputs["b1"], None, None, 8, **level) * weight).sum()

    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    value(**leaves).backward()
    for name, x in inputs.items():
        direction = torch.randn(x.shape, generator=generator)
        moved = [value(**{**inputs, name: x + sign * direction}) for sign in (0.5, -0.5)]
        slope = (leaves[name].grad * direction).sum()
        # Values to some hundreds, sums of thousands of products in float32.
        torch.testing.assert_close(moved[0] - moved[1], slope, rtol=1e-4, atol=2e-3)
