"""Counter-based noise: normals and uniforms from (seed, global sample id, element), the same at any world size."""

from .normal import philox_normal, philox_uniform

__all__ = ["philox_normal", "philox_uniform"]
