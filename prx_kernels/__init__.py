"""Kernels for diffusion transformers: token routing, what stands between a block's products, pixels, noise, Muon.

Needs torch; Triton where there is a GPU. Every op has a plain-PyTorch definition in `prx_kernels.reference`.
"""

from . import reference as reference
from .blocks import geglu, norm_modulate, qk_norm_rope, residual_gate_norm_modulate
from .muon import Muon, assign_owners, muon_groups
from .newton_schulz import newton_schulz, newton_schulz_flop, safe_restarts, sym_gemm, zeropower_via_newtonschulz5
from .noise import philox_normal, philox_uniform
from .patch_embed import BottleneckPatchEmbed, patch_embed
from .pixel_loss import patchify, unpatchify, x_prediction_loss
from .routing import (
    Entries,
    Route,
    enter_route,
    exit_route,
    gather_tokens,
    kept_tokens,
    route_blocks,
    sample_keep,
    scatter_tokens,
)

__version__ = "0.1.0"

__all__ = [
    "BottleneckPatchEmbed",
    "Entries",
    "Muon",
    "Route",
    "assign_owners",
    "enter_route",
    "exit_route",
    "gather_tokens",
    "geglu",
    "kept_tokens",
    "muon_groups",
    "newton_schulz",
    "newton_schulz_flop",
    "norm_modulate",
    "patch_embed",
    "patchify",
    "philox_normal",
    "philox_uniform",
    "qk_norm_rope",
    "residual_gate_norm_modulate",
    "route_blocks",
    "safe_restarts",
    "sample_keep",
    "scatter_tokens",
    "sym_gemm",
    "unpatchify",
    "x_prediction_loss",
    "zeropower_via_newtonschulz5",
]
