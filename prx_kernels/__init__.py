"""Kernels for diffusion transformers: token routing, patch embedding, x-prediction loss, noise, Muon's products.

Needs torch; Triton where there is a GPU. Every op has a plain-PyTorch definition in `prx_kernels.reference`.
"""

from .muon.optimizer import Muon
from .muon.owners import assign_owners
from .newton_schulz.iteration import newton_schulz, zeropower_via_newtonschulz5
from .newton_schulz.polynomials import newton_schulz_flop, safe_restarts
from .newton_schulz.symmetric_product import sym_gemm
from .noise.normal import philox_normal
from .patch_embed.embed import BottleneckPatchEmbed, patch_embed
from .pixel_loss.loss import patchify, unpatchify, x_prediction_loss
from .reference import kept_tokens
from .routing.blocks import Route, route_blocks
from .routing.fused import enter_route_modulate, exit_route_gated
from .routing.tokens import enter_route, exit_route, gather_tokens, sample_keep, scatter_tokens

__version__ = "0.1.0"

__all__ = [
    "BottleneckPatchEmbed",
    "Muon",
    "Route",
    "assign_owners",
    "enter_route",
    "enter_route_modulate",
    "exit_route",
    "exit_route_gated",
    "gather_tokens",
    "kept_tokens",
    "newton_schulz",
    "newton_schulz_flop",
    "patch_embed",
    "patchify",
    "philox_normal",
    "route_blocks",
    "safe_restarts",
    "sample_keep",
    "scatter_tokens",
    "sym_gemm",
    "unpatchify",
    "x_prediction_loss",
    "zeropower_via_newtonschulz5",
]
