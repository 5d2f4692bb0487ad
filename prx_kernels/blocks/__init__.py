"""What stands between the matrix products of a transformer block."""

from .attention_inputs import qk_norm_rope

__all__ = ["qk_norm_rope"]
