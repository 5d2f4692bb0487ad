"""Newton-Schulz iterations for lists of matrices, and the symmetric products that they are made of."""

from .iteration import newton_schulz, zeropower_via_newtonschulz5
from .polynomials import newton_schulz_flop, safe_restarts
from .symmetric_product import sym_gemm

__all__ = ["newton_schulz", "newton_schulz_flop", "safe_restarts", "sym_gemm", "zeropower_via_newtonschulz5"]
