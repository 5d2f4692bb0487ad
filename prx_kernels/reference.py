"""Plain-PyTorch definition of every op, by its name: the truth that kernels are tested against.

Each stands beside its kernels, in the op's own `reference.py`. What runs here runs on any device and under autograd. It
is also what a CPU executes, and the eager baseline of the benchmarks. Nothing here is tuned.
"""

from .blocks.reference import (
    geglu,
    geglu_backward,
    joined_rows,
    norm_modulate,
    padded_rows,
    qk_norm_rope,
    qk_norm_rope_backward,
    residual_gate_norm_modulate,
    residual_gate_norm_modulate_backward,
    rms_norm,
    rms_norm_backward,
    rotate_pairs,
    rows_of,
)
from .launch import widened
from .muon.reference import (
    apply_update,
    bounding_scales,
    decayed_update,
    momentum_update,
    move_momentum,
    squares,
    update_bounds,
)
from .newton_schulz.reference import cpu_has_bfloat16, multiply, newton_schulz, sym_gemm, unit_norm
from .noise.reference import philox_normal, philox_uint32, philox_uniform, uniform_from_uint32
from .patch_embed.reference import noisy_image, patch_image_gradient, patch_project, patch_weight_gradient
from .pixel_loss.reference import patchify, scaled, unpatchify, x_prediction_loss, x_prediction_loss_gradient
from .routing.reference import (
    add_tokens,
    clear_tokens,
    gather_tokens,
    kept_tokens,
    sample_keep,
    scatter_tokens,
    smallest_keys,
)

__all__ = [
    "add_tokens",
    "apply_update",
    "bounding_scales",
    "clear_tokens",
    "cpu_has_bfloat16",
    "decayed_update",
    "gather_tokens",
    "geglu",
    "geglu_backward",
    "joined_rows",
    "kept_tokens",
    "momentum_update",
    "move_momentum",
    "multiply",
    "newton_schulz",
    "noisy_image",
    "norm_modulate",
    "padded_rows",
    "patch_image_gradient",
    "patch_project",
    "patch_weight_gradient",
    "patchify",
    "philox_normal",
    "philox_uint32",
    "philox_uniform",
    "qk_norm_rope",
    "qk_norm_rope_backward",
    "residual_gate_norm_modulate",
    "residual_gate_norm_modulate_backward",
    "rms_norm",
    "rms_norm_backward",
    "rotate_pairs",
    "rows_of",
    "sample_keep",
    "scaled",
    "scatter_tokens",
    "smallest_keys",
    "squares",
    "sym_gemm",
    "uniform_from_uint32",
    "unit_norm",
    "unpatchify",
    "update_bounds",
    "widened",
    "x_prediction_loss",
    "x_prediction_loss_gradient",
]
