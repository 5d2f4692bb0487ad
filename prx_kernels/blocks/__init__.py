"""What stands between the matrix products of a transformer block."""

from .attention_inputs import qk_norm_rope
from .gated_gelu import geglu
from .modulation import norm_modulate, residual_gate_norm_modulate

__all__ = ["geglu", "norm_modulate", "qk_norm_rope", "residual_gate_norm_modulate"]
