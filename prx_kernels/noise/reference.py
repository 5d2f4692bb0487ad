"""Plain-PyTorch definition of counter-based noise: Philox 4x32-10, uniforms, normals.

What runs here runs on any device; it is also what a CPU executes. Nothing here is tuned.
"""

import math

import torch
from torch import Tensor

# Philox 4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, table 2.
_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF


def philox_uint32(seed: Tensor, sample_ids: Tensor, count: int) -> Tensor:
    """Draw `count` 32-bit integers for each sample; the same integers on every device and at every world size.

    Element `e` of sample `s` is word `e % 4` of the Philox 4x32-10 block with counter
    `(e // 4, 0, s mod 2^32, s div 2^32)` and key `(seed mod 2^32, seed div 2^32)`.

    Args:
        seed: int64 tensor with one element.
        sample_ids: (batch,) int64, global ids.
        count: integers a sample, at most 2^34.

    Returns:
        (batch, count) int64 in [0, 2^32).
    """
    sample_ids = sample_ids.to(torch.int64)  # narrower integers would lose the upper word of the counter
    blocks = torch.arange((count + 3) // 4, dtype=torch.int64, device=sample_ids.device)
    shape = (sample_ids.shape[0], blocks.shape[0])
    # In place, as a CPU draws its noise here, forward and backward.
    c0 = blocks.repeat(shape[0], 1)
    c1 = torch.zeros_like(c0)
    c2 = (sample_ids & _MASK32)[:, None].repeat(1, shape[1])
    c3 = ((sample_ids >> 32) & _MASK32)[:, None].repeat(1, shape[1])
    seed = seed.reshape(()).to(device=sample_ids.device, dtype=torch.int64)
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(10):
        hi0, hi1 = _mulhilo_(_PHILOX_M[0], c0), _mulhilo_(_PHILOX_M[1], c2)
        c0, c1, c2, c3 = hi1.bitwise_xor_(c1).bitwise_xor_(k0), c2, hi0.bitwise_xor_(c3).bitwise_xor_(k1), c0
        k0, k1 = (k0 + _PHILOX_W[0]) & _MASK32, (k1 + _PHILOX_W[1]) & _MASK32
    return torch.stack((c0, c1, c2, c3), dim=-1).flatten(1)[:, :count]


def uniform_from_uint32(integers: Tensor) -> Tensor:
    """Map integers in [0, 2^32) to float32 in (0, 1), ends excluded: `((x >> 9) + 1/2) / 2^23`, exact in float32."""
    return ((integers >> 9).to(torch.float32) + 0.5) * 2.0**-23


def philox_uniform(seed: Tensor, shape: tuple[int, ...], *, sample_ids: Tensor | None = None) -> Tensor:
    """Uniforms in (0, 1) from (seed, global sample id, element): `uniform_from_uint32` of `philox_uint32`."""
    if sample_ids is None:
        sample_ids = torch.arange(shape[0], dtype=torch.int64, device=seed.device)
    return uniform_from_uint32(philox_uint32(seed, sample_ids, math.prod(shape[1:]))).reshape(shape)


def philox_normal(seed: Tensor, shape: tuple[int, ...], *, sample_ids: Tensor | None = None) -> Tensor:
    """Standard normals from (seed, global sample id, element), by Box-Muller on `philox_uint32`.

    Pairs of words `(x0, x1)` give `sqrt(-2 ln u0) · (cos 2πu1, sin 2πu1)` with `u = uniform_from_uint32(x)`. The
    integers are bitwise the same everywhere; the normals agree to 1e-6 across devices.

    Args:
        seed: int64 tensor with one element.
        shape: (batch, ...) of the result; elements are counted in row-major order within a sample.
        sample_ids: (batch,) int64 global ids; 0 … batch-1 unless given.

    Returns:
        float32 tensor of `shape`.

    Raises:
        ValueError: `sample_ids` does not have `shape[0]` entries.
    """
    if sample_ids is None:
        sample_ids = torch.arange(shape[0], dtype=torch.int64, device=seed.device)
    if sample_ids.shape != (shape[0],):
        raise ValueError(
            f"sample_ids must have shape ({shape[0]},) to match shape {shape}, got {tuple(sample_ids.shape)}"
        )
    count = math.prod(shape[1:])
    words = philox_uint32(seed, sample_ids, 2 * ((count + 1) // 2))
    u0, u1 = (uniform_from_uint32(word) for word in words.view(shape[0], (count + 1) // 2, 2).unbind(-1))
    radius = u0.log_().mul_(-2.0).sqrt_()
    angle = u1.mul_(2.0 * math.pi)
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return pairs.flatten(1)[:, :count].reshape(shape)


def _mulhilo_(a: int, b: Tensor) -> Tensor:
    """b becomes the low 32 bits of the 64-bit product; gives the high ones. int64 wraps: sign bits are masked away."""
    b.mul_(a)
    high = (b >> 32).bitwise_and_(_MASK32)
    b.bitwise_and_(_MASK32)
    return high
