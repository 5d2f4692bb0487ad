"""Plain-PyTorch definition of every op: the truth that kernels are tested against.

What runs here runs on any device and under autograd. It is also what a CPU executes, and the eager baseline of the
benchmarks. Nothing here is tuned.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..newton_schulz.reference import cpu_has_bfloat16 as cpu_has_bfloat16
from ..newton_schulz.reference import decayed_update as decayed_update
from ..newton_schulz.reference import momentum_update as momentum_update
from ..newton_schulz.reference import multiply as multiply
from ..newton_schulz.reference import newton_schulz as newton_schulz
from ..newton_schulz.reference import sym_gemm as sym_gemm
from ..newton_schulz.reference import unit_norm as unit_norm
from ..newton_schulz.reference import widened as widened

# Philox 4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, table 2.
_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF


# --- counter-based random numbers -------------------------------------------------------------------------------


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


# --- token routing (TREAD, https://arxiv.org/abs/2501.04765) -----------------------------------------------------


def kept_tokens(tokens: int, selection_ratio: float) -> int:
    """Number of tokens that go through the routed blocks: `tokens - clamp(round(tokens·selection_ratio), 1, tokens-1)`.

    Raises:
        ValueError: fewer than two tokens, or a ratio outside (0, 1).
    """
    if tokens < 2:
        raise ValueError(f"routing needs at least 2 tokens, got {tokens}")
    if not 0.0 < selection_ratio < 1.0:
        raise ValueError(
            f"selection_ratio is the share of tokens that bypass and lies in (0, 1), got {selection_ratio}"
        )
    return tokens - min(max(round(tokens * selection_ratio), 1), tokens - 1)


def sample_keep(sample_ids: Tensor, tokens: int, selection_ratio: float, *, seed: Tensor) -> Tensor:
    """Choose for every sample, uniformly, the tokens that are kept: those with the K smallest Philox keys.

    Args:
        sample_ids: (batch,) int64 global ids.
        tokens: tokens a sample, N.
        selection_ratio: share of tokens that bypass the blocks, in (0, 1).
        seed: int64 tensor with one element.

    Returns:
        (batch, K) int32, sorted and unique in each row.
    """
    return smallest_keys(sample_ids, tokens, kept_tokens(tokens, selection_ratio), seed=seed)


def smallest_keys(sample_ids: Tensor, tokens: int, kept: int, *, seed: Tensor) -> Tensor:
    """Positions of the `kept` smallest of `tokens` Philox keys, the lower index first among equals, sorted."""
    keys = philox_uint32(seed, sample_ids, tokens)
    smallest = torch.argsort(keys, dim=1, stable=True)[:, :kept]
    return smallest.sort(dim=1).values.to(torch.int32)


def gather_tokens(x: Tensor, keep: Tensor) -> Tensor:
    """Rows `keep` of x: (batch, N, ...) and (batch, K) integers -> (batch, K, ...), dtype of x."""
    return x.gather(1, _row_index(keep, x))


def scatter_tokens(x: Tensor, y: Tensor, keep: Tensor) -> Tensor:
    """A copy of x (batch, N, ...) whose rows `keep` are those of y (batch, K, ...); `keep` must be unique in a row."""
    return x.scatter(1, _row_index(keep, x), y)


def clear_tokens(x: Tensor, keep: Tensor) -> Tensor:
    """A copy of x (batch, N, ...) with zero at rows `keep`: the gradient that `scatter_tokens` gives x."""
    return x.scatter(1, _row_index(keep, x), 0)


def add_tokens(x: Tensor, y: Tensor, keep: Tensor) -> Tensor:
    """x (batch, N, ...) plus y (batch, K, ...) at rows `keep`: what `enter_route` makes of its two gradients."""
    return x.scatter_add(1, _row_index(keep, x), y)


def enter_route_modulate(
    x: Tensor, keep: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """Kept rows y of x, `LayerNorm(y)·(1 + scale) + shift` of them, and x. shift and scale are (batch, C).

    Statistics and modulation in float32 (float64 for float64), results in the dtype of x.
    """
    y = gather_tokens(x, keep)
    normed = F.layer_norm(widened(y), y.shape[-1:], eps=eps)
    return y, (normed * (1 + widened(scale)[:, None]) + widened(shift)[:, None]).to(x.dtype), x


def modulate_backward(
    grad_y: Tensor, grad_h: Tensor, y: Tensor, scale: Tensor, *, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `enter_route_modulate` by y (both paths), shift (accumulation dtype) and scale."""
    wide = widened(y)
    centred = wide - wide.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    normed = centred * rstd
    grad = widened(grad_h) * (1 + widened(scale)[:, None])
    inner = grad.mean(-1, keepdim=True) + normed * (grad * normed).mean(-1, keepdim=True)
    rows = widened(grad_y) + rstd * (grad - inner)
    return rows.to(y.dtype), widened(grad_h).sum(1), (widened(grad_h) * normed).sum(1).to(scale.dtype)


def exit_route_gated(y: Tensor, branch: Tensor, gate: Tensor, byp: Tensor, keep: Tensor) -> Tensor:
    """`scatter_tokens(byp, y + gate·branch, keep)`; gate is (batch, C), the sum is formed in float32 or float64."""
    return scatter_tokens(byp, (widened(y) + widened(gate)[:, None] * widened(branch)).to(y.dtype), keep)


def gate_backward(grad: Tensor, branch: Tensor, gate: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `exit_route_gated` by y, branch and gate."""
    grad_y = gather_tokens(grad, keep)
    grad_branch = (widened(gate)[:, None] * widened(grad_y)).to(branch.dtype)
    return grad_y, grad_branch, (widened(grad_y) * widened(branch)).sum(1).to(gate.dtype)


def _row_index(keep: Tensor, x: Tensor) -> Tensor:
    return keep.long().reshape(keep.shape + (1,) * (x.ndim - 2)).expand(*keep.shape, *x.shape[2:])


# --- pixels ------------------------------------------------------------------------------------------------------


def patchify(image: Tensor, patch_size: int) -> Tensor:
    """Cut (batch, channels, H, W) into (batch, H/p·W/p, channels·p²); features in the order (channel, row, column)."""
    batch, channels, height, width = image.shape
    p = patch_size
    grid = image.reshape(batch, channels, height // p, p, width // p, p)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // p) * (width // p), channels * p * p)


def unpatchify(tokens: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """Inverse of `patchify`: (batch, H/p·W/p, channels·p²) -> (batch, channels, H, W), dtype kept."""
    p = patch_size
    batch, _, features = tokens.shape
    channels = features // (p * p)
    grid = tokens.reshape(batch, height // p, width // p, channels, p, p)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def x_prediction_loss(tokens: Tensor, image: Tensor, t: Tensor, patch_size: int, *, t_min: float = 0.05) -> Tensor:
    """Per-sample flow-matching loss of an x0 prediction: `mean((x0_hat - x0)² / max(t, t_min)²)`, (batch,) float32.

    With `v = (x_t - x0)/max(t, t_min)` for both target and prediction the noise cancels (RECIPE.md, "Objective"; JiT,
    https://arxiv.org/abs/2511.13720, table 1 (3)(a)).

    Args:
        tokens: (batch, N, channels·p²), the predicted x0; float64 gives a float64 loss.
        image: (batch, channels, H, W), the clean picture in [-1, 1], or uint8.
        t: (batch,) float32 in [0, 1], 0 is clean.
    """
    predicted = widened(tokens)
    error = predicted - patchify(scaled(image), patch_size).to(predicted.dtype)
    return error.square().mean(dim=(1, 2)) / t.float().clamp(min=t_min).square()


def x_prediction_loss_gradient(
    tokens: Tensor, image: Tensor, t: Tensor, patch_size: int, t_min: float, unit: float
) -> tuple[Tensor, Tensor]:
    """Per-sample losses, and `error·unit/max(t, t_min)²` in the dtype of tokens: their gradient for unit 2/elements."""
    predicted = widened(tokens)
    error = predicted - patchify(scaled(image), patch_size).to(predicted.dtype)
    weight = t.float().clamp(min=t_min).square().reciprocal()
    gradient = error * (unit * weight)[:, None, None]
    return error.square().mean(dim=(1, 2)) * weight, gradient.to(tokens.dtype)


def scaled(image: Tensor) -> Tensor:
    """A picture in float32 (float64 for float64), uint8 scaled to [-1, 1]."""
    return image.float() / 127.5 - 1.0 if image.dtype == torch.uint8 else widened(image)


# --- patch embedding ---------------------------------------------------------------------------------------------


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
