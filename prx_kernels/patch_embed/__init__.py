"""Patch embedding through a bottleneck, with the noise added while pixels are read."""

from .embed import BottleneckPatchEmbed, patch_embed

__all__ = ["BottleneckPatchEmbed", "patch_embed"]
