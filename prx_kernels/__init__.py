"""Kernels for diffusion transformers: token routing, patch embedding, x-prediction loss, counter-based noise.

Needs torch; Triton where there is a GPU. Every op has a plain-PyTorch definition in `prx_kernels.reference`.
"""

from .noise import philox_normal
from .patch_embed import BottleneckPatchEmbed, patch_embed
from .pixel_loss import patchify, unpatchify, x_prediction_loss
from .reference import kept_tokens
from .route_blocks import Route, route_blocks
from .routing_fused import enter_route_modulate, exit_route_gated
from .token_routing import enter_route, exit_route, gather_tokens, sample_keep, scatter_tokens

__version__ = "0.1.0"

__all__ = [
    "BottleneckPatchEmbed",
    "Route",
    "enter_route",
    "enter_route_modulate",
    "exit_route",
    "exit_route_gated",
    "gather_tokens",
    "kept_tokens",
    "patch_embed",
    "patchify",
    "philox_normal",
    "route_blocks",
    "sample_keep",
    "scatter_tokens",
    "unpatchify",
    "x_prediction_loss",
]
