"""Plain-PyTorch definition of token routing (TREAD, https://arxiv.org/abs/2501.04765)."""

import torch
from torch import Tensor

from ..noise.reference import philox_uint32


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


def _row_index(keep: Tensor, x: Tensor) -> Tensor:
    return keep.long().reshape(keep.shape + (1,) * (x.ndim - 2)).expand(*keep.shape, *x.shape[2:])
