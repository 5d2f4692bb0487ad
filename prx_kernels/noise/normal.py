"""Normals and uniforms from (seed, global sample id, element), the same on every device and at any world size."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..launch import custom_op, on_cpu
from . import kernels, reference


def philox_normal(seed: Tensor, shape: tuple[int, ...], *, sample_ids: Tensor | None = None) -> Tensor:
    """Draw the noise that `patch_embed` adds: Box-Muller on Philox 4x32-10 (`reference.philox_normal` defines it).

    Integers are bitwise the same everywhere, normals agree to 1e-6 across devices.

    Args:
        seed: int64 tensor with one element; a tensor, so that a new seed neither recompiles nor is baked into a graph.
        shape: (batch, ...) of the result; elements are counted in row-major order within a sample.
        sample_ids: (batch,) int64 global ids; 0 … batch-1 unless given. The result is on their device.

    Returns:
        float32 tensor of `shape`.

    Raises:
        ValueError: `sample_ids` does not have `shape[0]` entries, seed not one, or shape no batch.
        TypeError: seed is no tensor of integers, or sample_ids are none.
    """
    seed, sample_ids = _checked(seed, shape, sample_ids)
    normals: Tensor = _normal(seed, sample_ids, math.prod(shape[1:]))
    return normals.reshape(shape)


def philox_uniform(seed: Tensor, shape: tuple[int, ...], *, sample_ids: Tensor | None = None) -> Tensor:
    """Draw uniforms in (0, 1), ends excluded: `((x >> 9) + 1/2) / 2^23` of the integers x of Philox 4x32-10.

    Bitwise the same on every device. Arguments, result and errors are those of `philox_normal`.
    """
    seed, sample_ids = _checked(seed, shape, sample_ids)
    uniforms: Tensor = _uniform(seed, sample_ids, math.prod(shape[1:]))
    return uniforms.reshape(shape)


def _checked(seed: Tensor, shape: tuple[int, ...], sample_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Seed and sample ids as the ops take them: int64, on one device."""
    for name, given in (("seed", seed), ("sample_ids", sample_ids)):
        if given is not None and (not isinstance(given, Tensor) or given.is_floating_point() or given.is_complex()):
            kind = given.dtype if isinstance(given, Tensor) else type(given).__name__
            raise TypeError(f"{name} must be a tensor of integers, got {kind}")
    if not len(shape):
        raise ValueError("shape must be (batch, ...), got ()")
    if sample_ids is None:
        sample_ids = torch.arange(shape[0], dtype=torch.int64, device=seed.device)
    if sample_ids.shape != (shape[0],):
        raise ValueError(
            f"sample_ids must have shape ({shape[0]},) to match shape {tuple(shape)}, got {tuple(sample_ids.shape)}"
        )
    if seed.numel() != 1:
        raise ValueError(f"seed must have one element, got shape {tuple(seed.shape)}")
    return seed.to(device=sample_ids.device, dtype=torch.int64), sample_ids.to(torch.int64)


@custom_op("philox_normal")
def _normal(seed: Tensor, sample_ids: Tensor, count: int) -> Tensor:
    return kernels.draw(sample_ids, seed, count, uniform=False)


@on_cpu(_normal)
def _(seed: Tensor, sample_ids: Tensor, count: int) -> Tensor:
    return reference.philox_normal(seed, (sample_ids.shape[0], count), sample_ids=sample_ids).contiguous()


@_normal.register_fake
def _(seed: Tensor, sample_ids: Tensor, count: int) -> Tensor:
    return sample_ids.new_empty((sample_ids.shape[0], count), dtype=torch.float32)


@custom_op("philox_uniform")
def _uniform(seed: Tensor, sample_ids: Tensor, count: int) -> Tensor:
    return kernels.draw(sample_ids, seed, count, uniform=True)


@on_cpu(_uniform)
def _(seed: Tensor, sample_ids: Tensor, count: int) -> Tensor:
    return reference.philox_uniform(seed, (sample_ids.shape[0], count), sample_ids=sample_ids)


@_uniform.register_fake
def _(seed: Tensor, sample_ids: Tensor, count: int) -> Tensor:
    return sample_ids.new_empty((sample_ids.shape[0], count), dtype=torch.float32)
