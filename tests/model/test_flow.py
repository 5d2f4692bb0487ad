"""The objective: distribution and determinism of t, noising, velocity, loss, dropped captions, the sampler's grid."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from prx_kernels import philox_normal, unpatchify, x_prediction_loss
from prx_kernels.reference import philox_uint32
from prx_model.flow import add_noise, draw_noise, drop_captions, sample_t, shift_time, velocity
from prx_model.sampler import time_grid

SEED = torch.tensor(1234)
COUNT = 100_000
IDS = torch.arange(COUNT)
# Kolmogorov-Smirnov: the distance exceeds 1.95/sqrt(n) once in 1,000 draws when the distribution is right; fixed seeds.
KS = 1.95


def ks_distance(sample: Tensor, cdf: Tensor) -> float:
    """Largest distance between the sample's steps and its claimed distribution, `cdf` taken at the sorted sample."""
    n = sample.numel()
    upper = torch.arange(1, n + 1, dtype=torch.float64) / n
    return float(torch.maximum((upper - cdf).abs(), (upper - 1 / n - cdf).abs()).max())


def shifted_logit_normal_cdf(t: Tensor, shift: float) -> Tensor:
    """P(shift·s/(1+(shift-1)·s) <= t) for s = sigmoid(N(0, 1)): the inverse shift, its logit, the normal's cdf."""
    t = t.double()
    s = t / (shift - (shift - 1) * t)
    return torch.special.ndtr(torch.logit(s))


# --- t ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 2.5, 3.0])
def test_t_without_uniform_draws_is_a_shifted_logit_normal(shift: float) -> None:
    t = sample_t(SEED, IDS, shift=shift, uniform_fraction=0.0).sort().values
    assert ks_distance(t, shifted_logit_normal_cdf(t, shift)) < KS / math.sqrt(COUNT)


def test_t_of_uniform_draws_is_uniform_and_not_shifted() -> None:
    t = sample_t(SEED, IDS, uniform_fraction=1.0, t_floor=0.2).sort().values
    assert ks_distance(t, (t.double() - 0.2) / 0.8) < KS / math.sqrt(COUNT)


def test_t_at_the_defaults_is_the_recipe_s_mixture() -> None:
    t = sample_t(SEED, IDS).sort().values
    cdf = 0.9 * shifted_logit_normal_cdf(t, 3.0) + 0.1 * (t.double() - 1e-3) / (1 - 1e-3)
    assert ks_distance(t, cdf) < KS / math.sqrt(COUNT)


def test_one_tenth_of_the_draws_is_uniform() -> None:
    share = (sample_t(SEED, IDS) != sample_t(SEED, IDS, uniform_fraction=0.0)).double().mean()
    assert abs(float(share) - 0.1) < 4 * math.sqrt(0.1 * 0.9 / COUNT)  # four standard errors


def test_uniform_choice_and_level_do_not_depend_on_the_normal_draw() -> None:
    """A share of uniform draws that depended on the normal would bend the mixture."""
    normal, mixed = sample_t(SEED, IDS, uniform_fraction=0.0), sample_t(SEED, IDS, uniform_fraction=0.5)
    uniform = sample_t(SEED, IDS, uniform_fraction=1.0)
    chosen = (mixed == uniform).double()
    for pair in ((normal, chosen), (normal, uniform), (uniform, chosen)):
        correlation = float(torch.corrcoef(torch.stack([p.double() for p in pair]))[0, 1])
        assert abs(correlation) < 4 / math.sqrt(COUNT)  # four standard errors


def test_t_below_the_floor_is_drawn_again_not_clamped() -> None:
    floor = 0.5  # a draw is below with probability 0.136; all eight draws with 1e-7
    t = sample_t(SEED, IDS, uniform_fraction=0.0, t_floor=floor).sort().values
    below = shifted_logit_normal_cdf(torch.tensor(floor), 3.0)
    assert ks_distance(t, (shifted_logit_normal_cdf(t, 3.0) - below) / (1 - below)) < KS / math.sqrt(COUNT)


@pytest.mark.parametrize("t_floor", [1e-3, 0.3, 0.999])
def test_t_stays_within_floor_and_one(t_floor: float) -> None:
    t = sample_t(SEED, IDS, t_floor=t_floor, uniform_fraction=0.5)
    assert t.dtype == torch.float32
    assert float(t.min()) >= np.float32(t_floor)
    assert float(t.max()) <= 1.0


def test_t_depends_on_seed_and_id_only() -> None:
    whole = sample_t(SEED, IDS[:64])
    scattered = torch.tensor([63, 5, 5, 0])
    assert torch.equal(sample_t(SEED, scattered), whole[scattered])
    assert torch.equal(torch.cat([sample_t(SEED, IDS[i : i + 1]) for i in range(64)]), whole)
    assert (sample_t(SEED + 1, IDS[:64]) != whole).all()


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 6.0])
def test_shift_keeps_the_ends_and_multiplies_the_odds_by_the_shift(shift: float) -> None:
    t = torch.tensor([0.0, 1e-3, 0.25, 0.5, 0.9, 1.0], dtype=torch.float64)
    shifted = shift_time(t, shift)
    assert shifted[0] == 0
    assert shifted[-1] == 1
    # The definition in other words: t'/(1-t') = shift·t/(1-t).
    torch.testing.assert_close(shifted[1:-1] / (1 - shifted[1:-1]), shift * t[1:-1] / (1 - t[1:-1]))
    torch.testing.assert_close(shift_time(shifted, 1 / shift), t)


# --- noise, velocity ----------------------------------------------------------------------------------------------


def test_noise_is_that_of_the_sample_s_id_at_any_place_in_any_batch() -> None:
    image = torch.zeros(3, 3, 8, 12)
    noise = draw_noise(SEED, torch.tensor([7, 123456789012, 7]), image)
    assert noise.shape == image.shape
    assert noise.dtype == torch.float32
    assert torch.equal(noise[0], noise[2])
    assert torch.equal(noise[1:2], draw_noise(SEED, torch.tensor([123456789012]), image[:1]))
    assert torch.equal(noise, philox_normal(SEED, (3, 3, 8, 12), sample_ids=torch.tensor([7, 123456789012, 7])))


def test_noisy_picture_follows_its_equation_sample_by_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    image, noise = torch.rand(3, 3, 4, 4, generator=generator), torch.randn(3, 3, 4, 4, generator=generator)
    t = torch.tensor([0.0, 0.3, 1.0])
    noisy = add_noise(image, noise, t, noise_scale=2.0)
    assert torch.equal(noisy[0], image[0])
    assert torch.equal(noisy[2], 2 * noise[2])
    expected = (1 - 0.3) * image[1].double() + 0.3 * 2.0 * noise[1].double()
    torch.testing.assert_close(noisy[1].double(), expected, rtol=0, atol=1e-6)  # float32 rounding of values below 4


def test_t_is_not_rounded_to_the_dtype_of_a_bfloat16_picture() -> None:
    image, noise = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16), torch.zeros(1, 1, 1, 1)
    # 0.4996 rounds to 0.5 in bfloat16; the model is told 0.4996.
    assert add_noise(image, noise, torch.tensor([0.4996])).item() == pytest.approx(1 - 0.4996, abs=1e-6)


@pytest.mark.parametrize("t", [0.0, 0.01, 0.05, 0.4, 1.0])
def test_velocity_divides_by_t_clamped_from_below(t: float) -> None:
    x_t, x0 = torch.full((2, 1, 1, 1), 3.0), torch.full((2, 1, 1, 1), 1.0)
    for shape in (1, 2):
        v = velocity(x_t, x0, torch.full((shape,), t), t_min=0.05)
        torch.testing.assert_close(v, torch.full((2, 1, 1, 1), 2.0 / max(t, 0.05)))


def test_velocity_of_the_truth_is_noise_minus_picture_above_the_clamp() -> None:
    image, noise = torch.rand(4, 3, 2, 2, dtype=torch.float64), torch.randn(4, 3, 2, 2, dtype=torch.float64)
    t = torch.tensor([0.05, 0.3, 0.7, 1.0], dtype=torch.float64)
    torch.testing.assert_close(velocity(add_noise(image, noise, t), image, t), noise - image)


# --- loss ---------------------------------------------------------------------------------------------------------


def loss_case(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(6, 3, 8, 12, generator=generator, dtype=dtype)
    noise = torch.randn(6, 3, 8, 12, generator=generator, dtype=dtype)
    tokens = torch.randn(6, 6, 48, generator=generator, dtype=dtype)
    return tokens, image, noise, torch.tensor([1e-3, 0.02, 0.05, 0.3, 0.8, 1.0])


def v_space_loss(tokens: Tensor, image: Tensor, noise: Tensor, t: Tensor, t_min: float) -> Tensor:
    """Mean squared difference of two velocities, with explicit noise: one loss a sample, float64."""
    image, noise, t = image.double(), noise.double(), t.double()
    x_t = add_noise(image, noise, t)
    predicted = unpatchify(tokens.double(), 4, 8, 12)
    difference = velocity(x_t, predicted, t, t_min=t_min) - velocity(x_t, image, t, t_min=t_min)
    return difference.square().mean(dim=(1, 2, 3))


@pytest.mark.parametrize("t_min", [0.05, 0.2])
def test_loss_equals_the_velocity_space_formula_with_explicit_noise(t_min: float) -> None:
    tokens, image, noise, t = loss_case()
    expected = v_space_loss(tokens, image, noise, t, t_min)
    got = x_prediction_loss(tokens, image, t, 4, t_min=t_min, reduction="none")
    assert got.dtype == torch.float32
    # The formula runs in float32: 288 squares summed pairwise and one division, below 1e-6 relative.
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)
    mean = x_prediction_loss(tokens, image, t, 4, t_min=t_min)
    torch.testing.assert_close(mean.double(), expected.mean(), rtol=1e-6, atol=0)


def test_loss_gradient_equals_autograd_of_the_velocity_space_formula() -> None:
    tokens, image, noise, t = loss_case()
    tokens.requires_grad_()
    (got,) = torch.autograd.grad(x_prediction_loss(tokens, image, t, 4), tokens)
    (expected,) = torch.autograd.grad(v_space_loss(tokens, image, noise, t, 0.05).mean(), tokens)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)  # float32 against float64


def test_loss_is_zero_for_the_truth_and_takes_the_clamp_at_its_default() -> None:
    _, image, _, t = loss_case()
    from prx_kernels import patchify

    assert x_prediction_loss(patchify(image, 4), image, t, 4).item() == 0
    off_by_one = x_prediction_loss(patchify(image, 4) + 1, image, t, 4, reduction="none")
    # Adding 1 rounds each pixel's error by some 1e-7.
    torch.testing.assert_close(off_by_one, 1 / torch.tensor([0.05, 0.05, 0.05, 0.3, 0.8, 1.0]) ** 2, rtol=1e-5, atol=0)


def test_loss_of_bfloat16_predictions_is_formed_in_float32() -> None:
    tokens, image, noise, t = loss_case()
    got = x_prediction_loss(tokens.bfloat16(), image, t, 4, reduction="none")
    assert got.dtype == torch.float32
    expected = v_space_loss(tokens.bfloat16(), image, noise, t, 0.05)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)


# --- captions, grid -----------------------------------------------------------------------------------------------


def test_captions_are_dropped_at_their_rate_and_by_id() -> None:
    dropped = drop_captions(SEED, IDS, 0.1)
    assert dropped.dtype == torch.bool
    assert abs(float(dropped.double().mean()) - 0.1) < 4 * math.sqrt(0.1 * 0.9 / COUNT)  # four standard errors
    assert torch.equal(drop_captions(SEED, IDS[50:60], 0.1), dropped[50:60])
    assert not drop_captions(SEED, IDS, 0.0).any()
    assert drop_captions(SEED, IDS, 1.0).all()
    # Whoever is dropped at 10 % is dropped at 20 % too: one threshold, one draw.
    assert (drop_captions(SEED, IDS, 0.2) >= dropped).all()


def test_dropped_captions_follow_word_zero_of_the_sample_s_stream() -> None:
    words = philox_uint32(SEED, IDS[:1000], 1)[:, 0]
    assert torch.equal(drop_captions(SEED, IDS[:1000], 0.25), words < 2**30)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_the_linear_time_grid_is_prx_s_formula(steps: int, shift: float) -> None:
    """`linspace(1, 0, steps + 1)` through `shift·t / (1 + (shift - 1)·t)`, both ends included."""
    grid = time_grid(steps, shift, "linear")
    expected = [shift * (1 - i / steps) / (1 + (shift - 1) * (1 - i / steps)) for i in range(steps + 1)]
    assert grid.dtype == torch.float32
    assert (float(grid[0]), float(grid[-1])) == (1.0, 0.0)
    torch.testing.assert_close(grid.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=6e-8)


@pytest.mark.parametrize("shift", [1.0, 2.5, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 20, 28, 50])
def test_time_grid_equals_diffusers_euler_scheduler(steps: int, shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    grid = time_grid(steps, shift)
    assert grid.dtype == torch.float32
    assert grid[0] == 1
    assert grid[-1] == 0
    assert (grid.diff() < 0).all()
    # Theirs is formed in float32, ours in float64: some units of 6e-8.
    torch.testing.assert_close(grid, scheduler.sigmas.float(), rtol=0, atol=3e-7)
