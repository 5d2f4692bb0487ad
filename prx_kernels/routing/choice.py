"""Choosing the kept tokens of a route: at random or by importance, some of them forced, or all in any order."""

from __future__ import annotations

import torch
from torch import Tensor

from ..noise.reference import philox_uint32
from .tokens import draw


def choose(
    x: Tensor,
    seed: Tensor,
    tokens: int,
    kept: int,
    *,
    force: Tensor | None,
    score: Tensor | None,
    shared: bool,
    ordered: bool,
) -> Tensor:
    """The kept tokens, (batch, kept) int32, unique in each row.

    Args:
        x: the stream, for its batch and device.
        seed: int64 tensor with one element.
        tokens: N, of which kept, K, are chosen.
        force: (batch, N) bool, tokens that are among the chosen.
        score: (batch, N); the largest are chosen, the earlier of equals. Random without.
        shared: the same in every sample; scores are averaged over the batch, forced tokens of one forced in all.
        ordered: sort each row; else random order.

    Raises:
        ValueError: a shape that does not fit, or more forced tokens than kept. On a GPU, where counting would mean
            waiting, the latter is a device-side assertion.
    """
    batch = x.shape[0]
    drawn = 1 if shared else batch
    ids = torch.arange(drawn, device=x.device)
    if ordered and force is None and score is None:
        return draw(ids, seed, tokens, kept).expand(batch, kept)
    if score is None:
        keys = philox_uint32(seed, ids, tokens).double()
    else:
        if tuple(score.shape) != (batch, tokens):
            raise ValueError(f"score must give (batch, tokens) = {(batch, tokens)}, got {tuple(score.shape)}")
        wide = score.detach().double()
        keys = -(wide.mean(0, keepdim=True) if shared else wide)
    if force is not None:
        if tuple(force.shape) != (batch, tokens) or force.dtype != torch.bool:
            raise ValueError(
                f"route.force_keep must be bool of shape (batch, tokens) = {(batch, tokens)}, prefix and suffix not "
                f"counted, got {force.dtype} of shape {tuple(force.shape)}"
            )
        force = force.to(x.device)
        force = force.any(0, keepdim=True) if shared else force
        _check_room(force, kept)
        keys = keys.masked_fill(force, -torch.inf)
    chosen = torch.argsort(keys, dim=1, stable=True)[:, :kept]
    chosen = chosen.sort(dim=1).values if ordered else chosen
    return chosen.to(torch.int32).expand(batch, kept)


def _check_room(force: Tensor, kept: int) -> None:
    most = force.sum(1).amax()
    text = f"tokens of a sample must go through, but the route keeps {kept}: lower selection_ratio, or force fewer"
    if force.device.type == "cpu":
        if int(most) > kept:
            raise ValueError(f"{int(most)} {text}")
    else:
        torch._assert_async(most <= kept, f"more {text}")


def mix(seed: int) -> int:
    """splitmix64 (Steele et al., OOPSLA 2014): seeds 0, 1, 2 … give sequences that do not overlap in practice."""
    z = (seed + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def signed(seed: int) -> int:
    return (seed + 2**63) % 2**64 - 2**63
