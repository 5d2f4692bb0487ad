"""Structural twins of public models that no package installs, for the calls of `examples/route_models.py`.

Ours, line by line. What they share with the originals is what a route meets: names and order of a block's arguments,
where rotary tables are kept, what is put beside the tokens and where, skips, checkpoints, and what a block returns.
`TWINS` maps a name of the table to a small model with random weights and a run of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import decoupled, flux, in_context, latent, skipping

Twin = tuple[nn.Module, Callable[[], Tensor]]

MAKERS: dict[str, Callable[[], Twin]] = {
    **latent.MAKERS,
    **in_context.MAKERS,
    **decoupled.MAKERS,
    **skipping.MAKERS,
    **flux.MAKERS,
}


def build(name: str) -> Twin:
    """A twin whose weights are all random: nothing that begins at zero hides a block."""
    torch.manual_seed(0)
    model, run = MAKERS[name]()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model, run
