"""Token routing (TREAD, https://arxiv.org/abs/2501.04765): half the tokens skip the middle blocks of a transformer.

`keep = sample_keep(...)`, `y, byp = enter_route(x, keep)`, blocks on y, `x = exit_route(y, byp, keep)`.
"""

import torch
from torch import Tensor

from . import reference


def sample_keep(sample_ids: Tensor, tokens: int, selection_ratio: float, *, seed: Tensor) -> Tensor:
    """Choose for every sample, uniformly at random, the tokens that go through the routed blocks.

    Counter-based (Philox 4x32-10 keyed on seed and sample id): the same set for a sample on every device, at every
    world size and on recomputation.

    Args:
        sample_ids: (batch,) int64 global sample ids.
        tokens: tokens a sample, N >= 2.
        selection_ratio: share of tokens that *bypass* the blocks, in (0, 1).
        seed: int64 tensor with one element; mix step and purpose into it for a fresh set every forward.

    Returns:
        (batch, K) int32, sorted and unique in each row, `K = N - clamp(round(N·selection_ratio), 1, N-1)`.

    Raises:
        ValueError: N < 2 or a ratio outside (0, 1).
    """
    return reference.sample_keep(sample_ids, tokens, selection_ratio, seed=seed)


def gather_tokens(x: Tensor, keep: Tensor) -> Tensor:
    """Take rows `keep` (batch, K) of x (batch, N, ...): (batch, K, ...), dtype kept. Rotary tables, REPA targets."""
    _check_keep(x, keep)
    return reference.gather_tokens(x, keep)


def scatter_tokens(x: Tensor, y: Tensor, keep: Tensor) -> Tensor:
    """Put y (batch, K, ...) at rows `keep` (batch, K; unique in a row) of a copy of x (batch, N, ...), dtype kept."""
    _check_rows(x, y, keep)
    return reference.scatter_tokens(x, y, keep)


def enter_route(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Split tokens in front of the routed blocks.

    Args:
        x: (batch, N, C).
        keep: (batch, K) int32 or int64, unique in each row.

    Returns:
        `y` (batch, K, C), the kept tokens, and `byp`, which stands for x and is used once, by `exit_route`.
    """
    _check_keep(x, keep)
    return reference.gather_tokens(x, keep), x


def exit_route(y: Tensor, byp: Tensor, keep: Tensor) -> Tensor:
    """Join tokens behind the routed blocks: rows `keep` from y (batch, K, C), the others from byp (batch, N, C)."""
    _check_rows(byp, y, keep)
    return reference.scatter_tokens(byp, y, keep)


def _check_keep(x: Tensor, keep: Tensor) -> None:
    if keep.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"keep must be int32 or int64, got {keep.dtype}")
    if keep.ndim != 2 or keep.shape[0] != x.shape[0] or not 0 < keep.shape[1] <= x.shape[1]:
        raise ValueError(
            f"keep must be (batch, K) with 0 < K <= tokens for x of shape {tuple(x.shape)}, got {tuple(keep.shape)}"
        )


def _check_rows(x: Tensor, y: Tensor, keep: Tensor) -> None:
    _check_keep(x, keep)
    if y.shape != keep.shape + x.shape[2:]:
        raise ValueError(
            f"y must be {tuple(keep.shape + x.shape[2:])} for keep {tuple(keep.shape)} and x {tuple(x.shape)}, "
            f"got {tuple(y.shape)}"
        )
