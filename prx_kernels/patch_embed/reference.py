"""Plain-PyTorch definition of the patch embedding's first product, with the noise that it adds, and its gradients."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..launch import widened
from ..noise.reference import philox_normal
from ..pixel_loss.reference import patchify, scaled, unpatchify


def noisy_image(
    image: Tensor, t: Tensor | None, noise_seed: Tensor | None, sample_ids: Tensor | None, noise_scale: float
) -> Tensor:
    """`(1-t)·x0 + t·noise_scale·eps` in float32 (float64 for float64); the picture as it is where t is None.

    uint8 pictures are scaled to [-1, 1]. eps is `philox_normal(noise_seed, image.shape, sample_ids=sample_ids)`.
    """
    if image.dtype == torch.uint8:
        image = scaled(image)
    if t is None or noise_seed is None:
        return image
    t = t[:, None, None, None]
    eps = philox_normal(noise_seed, tuple(image.shape), sample_ids=sample_ids)
    return (1 - t) * widened(image) + t * (noise_scale * eps)


def patch_project(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    t: Tensor | None,
    noise_seed: Tensor | None,
    sample_ids: Tensor | None,
    patch_size: int,
    noise_scale: float,
) -> Tensor:
    """`F.linear(patchify(x_t), weight, bias)`: (batch, N, bottleneck), dtype of weight."""
    pixels = patchify(noisy_image(image, t, noise_seed, sample_ids, noise_scale), patch_size)
    return F.linear(pixels.to(weight.dtype), weight, bias)


def patch_weight_gradient(
    grad: Tensor,
    image: Tensor,
    t: Tensor | None,
    noise_seed: Tensor | None,
    sample_ids: Tensor | None,
    patch_size: int,
    noise_scale: float,
) -> Tensor:
    """Gradient of `patch_project` by weight: (bottleneck, channels·p²), dtype of grad."""
    pixels = patchify(noisy_image(image, t, noise_seed, sample_ids, noise_scale), patch_size)
    return grad.flatten(0, 1).T @ pixels.to(grad.dtype).flatten(0, 1)


def patch_image_gradient(grad: Tensor, weight: Tensor, t: Tensor | None, image: Tensor, patch_size: int) -> Tensor:
    """Gradient of `patch_project` by image, in its shape and dtype."""
    pixels = widened(unpatchify(grad @ weight, patch_size, image.shape[2], image.shape[3]))
    return (pixels if t is None else (1 - t[:, None, None, None]) * pixels).to(image.dtype).contiguous()
