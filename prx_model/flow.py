"""The objective: flow matching with x-prediction (docs/recipe.md, "Objective").

All draws come from (seed, global sample id) by `prx_kernels`' counter-based generator, so they are the same on every
device and at every world size.
"""

import torch
from torch import Tensor

from prx_kernels import philox_normal, philox_uniform


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Time shift `shift·t / (1 + (shift-1)·t)` (SD3, https://arxiv.org/abs/2403.03206, eq. 23)."""
    return shift * t / (1.0 + (shift - 1.0) * t)


def sample_t(
    seed: Tensor, sample_ids: Tensor, *, shift: float = 3.0, uniform_fraction: float = 0.1, t_floor: float = 1e-3
) -> Tensor:
    """Draw training times: `shift_time(sigmoid(N(0, 1)))`, or uniform in [t_floor, 1] for a share of the samples.

    A shifted draw below `t_floor` is drawn again (up to 7 times, then clamped; one redraw has probability < 1e-11 at
    the defaults). Uniform draws are not shifted.

    Args:
        seed: int64 tensor with one element.
        sample_ids: (batch,) int64 global ids.
        shift: time shift; 1 is none.
        uniform_fraction: share of uniform draws, in [0, 1].
        t_floor: smallest t.

    Returns:
        (batch,) float32 in [t_floor, 1].
    """
    batch = sample_ids.shape[0]
    normal = philox_normal(seed, (batch, 8), sample_ids=sample_ids)
    # Not torch.sigmoid: on a CPU its last bit depends on the place in the batch, and so on the world size.
    shifted = shift_time(1.0 / (1.0 + torch.exp(-normal)), shift)
    first_valid = (shifted >= t_floor).to(torch.int8).argmax(dim=1, keepdim=True)
    shifted = shifted.gather(1, first_valid)[:, 0].clamp(min=t_floor)
    # Words 8 and 9 follow the eight that the normals have used.
    choice, level = philox_uniform(seed, (batch, 10), sample_ids=sample_ids)[:, 8:].unbind(1)
    uniform = t_floor + (1.0 - t_floor) * level
    return torch.where(choice < uniform_fraction, uniform, shifted)


def draw_noise(seed: Tensor, sample_ids: Tensor, image: Tensor) -> Tensor:
    """Standard normal noise like image (batch, channels, H, W), float32, one stream a sample."""
    return philox_normal(seed, tuple(image.shape), sample_ids=sample_ids)


def add_noise(image: Tensor, noise: Tensor, t: Tensor, *, noise_scale: float = 1.0) -> Tensor:
    """Noisy picture `x_t = (1-t)·x0 + t·noise_scale·eps`; image and noise (batch, C, H, W), t (batch,)."""
    t = t[:, None, None, None]  # never rounded to the picture's dtype: the model is told the exact t
    return (1 - t) * image + t * (noise_scale * noise)


def velocity(x_t: Tensor, x0: Tensor, t: Tensor, *, t_min: float = 0.05) -> Tensor:
    """Velocity of an x0 prediction, `(x_t - x0) / max(t, t_min)`; pictures (batch, C, H, W), t (batch,) or (1,)."""
    return (x_t - x0) / t.clamp(min=t_min)[:, None, None, None]


def drop_captions(seed: Tensor, sample_ids: Tensor, probability: float) -> Tensor:
    """Which samples train on the empty prompt: (batch,) bool (https://arxiv.org/abs/2207.12598, section 3.1)."""
    return philox_uniform(seed, (sample_ids.shape[0], 1), sample_ids=sample_ids)[:, 0] < probability
