"""The first product of a patch embedding as an op: pixels, noise and weight in, the bottleneck row out.

The backward is two ops, which read the pixels again and form the same noise again. The second product and the sum for
the bias are torch's own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..launch import NAMESPACE, custom_op, on_cpu
from . import launch as kernels
from . import reference

# --- ops ---------------------------------------------------------------------------------------------------------


@custom_op("patch_project")
def project(
    image: Tensor, weight: Tensor, bias: Tensor | None, t: Tensor | None, seed: Tensor | None, ids: Tensor | None,
    patch_size: int, noise_scale: float,
) -> Tensor:  # fmt: skip
    if weight.dtype == torch.float64:
        return reference.patch_project(image, weight, bias, t, seed, ids, patch_size, noise_scale)
    return kernels.project(image, weight, bias, patch_size, _noise(t, seed, ids, noise_scale))


@on_cpu(project)
def _(
    image: Tensor, weight: Tensor, bias: Tensor | None, t: Tensor | None, seed: Tensor | None, ids: Tensor | None,
    patch_size: int, noise_scale: float,
) -> Tensor:  # fmt: skip
    if t is not None and not bool(((t >= 0) & (t <= 1)).all()):
        worst = next(value for value in t.tolist() if not 0 <= value <= 1)
        raise ValueError(f"t must lie in [0, 1], where 1 is pure noise, got {worst:g}")
    return reference.patch_project(image, weight, bias, t, seed, ids, patch_size, noise_scale)


@project.register_fake
def _(
    image: Tensor, weight: Tensor, bias: Tensor | None, t: Tensor | None, seed: Tensor | None, ids: Tensor | None,
    patch_size: int, noise_scale: float,
) -> Tensor:  # fmt: skip
    tokens = (image.shape[2] // patch_size) * (image.shape[3] // patch_size)
    return weight.new_empty((image.shape[0], tokens, weight.shape[0]))


@custom_op("patch_weight_gradient")
def weight_gradient(
    grad: Tensor, image: Tensor, t: Tensor | None, seed: Tensor | None, ids: Tensor | None, patch_size: int,
    noise_scale: float,
) -> Tensor:  # fmt: skip
    if grad.dtype == torch.float64:
        return reference.patch_weight_gradient(grad, image, t, seed, ids, patch_size, noise_scale)
    return kernels.weight_gradient(grad, image, patch_size, _noise(t, seed, ids, noise_scale))


@on_cpu(weight_gradient)
def _(
    grad: Tensor, image: Tensor, t: Tensor | None, seed: Tensor | None, ids: Tensor | None, patch_size: int,
    noise_scale: float,
) -> Tensor:  # fmt: skip
    return reference.patch_weight_gradient(grad, image, t, seed, ids, patch_size, noise_scale)


@weight_gradient.register_fake
def _(
    grad: Tensor, image: Tensor, t: Tensor | None, seed: Tensor | None, ids: Tensor | None, patch_size: int,
    noise_scale: float,
) -> Tensor:  # fmt: skip
    return grad.new_empty((grad.shape[2], image.shape[1] * patch_size**2))


@custom_op("patch_image_gradient")
def image_gradient(grad: Tensor, weight: Tensor, t: Tensor | None, image: Tensor, patch_size: int) -> Tensor:
    if grad.dtype == torch.float64:
        return reference.patch_image_gradient(grad, weight, t, image, patch_size)
    return kernels.image_gradient(grad, weight, t, image, patch_size)


@on_cpu(image_gradient)
def _(grad: Tensor, weight: Tensor, t: Tensor | None, image: Tensor, patch_size: int) -> Tensor:
    return reference.patch_image_gradient(grad, weight, t, image, patch_size)


@image_gradient.register_fake
def _(grad: Tensor, weight: Tensor, t: Tensor | None, image: Tensor, patch_size: int) -> Tensor:
    return image.new_empty(image.shape)


def _noise(t: Tensor | None, seed: Tensor | None, ids: Tensor | None, noise_scale: float) -> kernels.Noise | None:
    if t is None or seed is None or ids is None:
        return None
    return kernels.Noise(t, seed, ids, noise_scale)


# --- backward ----------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    image, weight, bias, t, seed, ids, patch_size, noise_scale = inputs
    ctx.save_for_backward(image, weight, t, seed, ids)
    ctx.patch_size, ctx.noise_scale = patch_size, noise_scale


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    image, weight, t, seed, ids = ctx.saved_tensors
    for_image, for_weight, for_bias = ctx.needs_input_grad[:3]
    p = ctx.patch_size
    return (
        image_gradient(grad, weight, t, image, p) if for_image else None,
        weight_gradient(grad, image, t, seed, ids, p, ctx.noise_scale) if for_weight else None,
        grad.sum((0, 1)) if for_bias else None,
        *(None,) * 5,
    )


project.register_autograd(_backward, setup_context=_save)


# --- what a FLOP counter counts ----------------------------------------------------------------------------------
# torch's own looks up ops by name; without these it would miss the first map of a model, and its gradients.


def _product_flop(image: tuple[int, ...], weight: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 2 * math.prod(image) * weight[0]  # each value of the picture meets each column of the bottleneck once


def _weight_gradient_flop(grad: tuple[int, ...], image: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 2 * math.prod(image) * grad[2]


def _image_gradient_flop(grad: tuple[int, ...], weight: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 2 * math.prod(grad) * weight[1]


for _name, _formula in (
    ("patch_project", _product_flop),
    ("patch_weight_gradient", _weight_gradient_flop),
    ("patch_image_gradient", _image_gradient_flop),
):
    register_flop_formula(getattr(getattr(torch.ops, NAMESPACE), _name))(_formula)
