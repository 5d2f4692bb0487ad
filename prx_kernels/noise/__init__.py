"""Counter-based noise: standard normals from (seed, global sample id, element), the same at any world size."""

from .normal import philox_normal

__all__ = ["philox_normal"]
