"""Sizes and settings of the model, its routing and its sampler, as frozen dataclasses that check themselves.

No torch here: command lines read these before torch is imported.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from .ranges import Range, check_ranges


@dataclass(frozen=True)
class PRXConfig:
    """Sizes of a PRX transformer; fields and meaning as the arguments of diffusers' `PRXTransformer2DModel`.

    The defaults are the 1.18 B pixel-space model of PRX Part 3 (docs/recipe.md, "Model").
    """

    in_channels: Annotated[int, Range(1, 1_024)] = 3
    patch_size: Annotated[int, Range(1, 1_024)] = 32
    context_in_dim: Annotated[int, Range(1, 65_536)] = 2304
    """Width of the text embeddings."""
    hidden_size: Annotated[int, Range(1, 65_536)] = 1792
    mlp_ratio: Annotated[float, Range(0, 64, above=True)] = 3.5
    num_heads: Annotated[int, Range(1, 1_024)] = 28
    depth: Annotated[int, Range(1, 1_024)] = 16
    axes_dim: Annotated[tuple[int, int], Range(2, 4_096)] = (32, 32)
    """Rotary features of the row and of the column; their sum is the head dimension."""
    theta: Annotated[int, Range(0, 10**9, above=True)] = 10_000
    bottleneck_size: Annotated[int | None, Range(1, 65_536)] = 256
    """Width between the two linear maps of the patch embedding; None for a single linear map."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes_dim", tuple(self.axes_dim))
        if self.bottleneck_size is not None and self.bottleneck_size < 1:
            raise ValueError(f"PRXConfig.bottleneck_size must be at least 1 or None, got {self.bottleneck_size}")
        if len(self.axes_dim) != 2 or any(d < 2 or d % 2 for d in self.axes_dim):
            raise ValueError(f"PRXConfig.axes_dim must be two even numbers, got {self.axes_dim}")
        check_ranges(self, "PRXConfig.")
        if self.mlp_size < 1:
            raise ValueError(f"PRXConfig.mlp_ratio must give the MLP at least one feature, got {self.mlp_ratio}")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"PRXConfig.hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}"
            )
        if sum(self.axes_dim) != self.head_dim:
            raise ValueError(
                f"PRXConfig.axes_dim {self.axes_dim} must add up to the head dimension {self.head_dim} "
                f"(hidden_size {self.hidden_size} / num_heads {self.num_heads})"
            )

    @property
    def head_dim(self) -> int:
        """Features of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_size(self) -> int:
        """Width inside the gated MLP."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def patch_features(self) -> int:
        """Values in one patch: channels·patch²."""
        return self.in_channels * self.patch_size**2

    def tokens(self, height: int, width: int) -> int:
        """Image tokens of a picture of that size in pixels.

        Raises:
            ValueError: a side that is not a positive multiple of the patch.
        """
        p = self.patch_size
        if height < p or width < p or height % p or width % p:
            fit = max(round(height / p), 1) * p, max(round(width / p), 1) * p
            raise ValueError(
                f"image size {height}x{width} is not a multiple of the patch size {p}; {fit[0]}x{fit[1]} would be"
            )
        return (height // p) * (width // p)


def prx_1_2b() -> PRXConfig:
    """The pixel-space model of PRX Part 3: 1.177 B parameters, patch 32, T5Gemma-2B text."""
    return PRXConfig()


def prx_tiny() -> PRXConfig:
    """The model of the `shapes` preset: 128 wide, 4 deep, patch 8, byte-level text; 1.6 M parameters."""
    return PRXConfig(
        patch_size=8,
        context_in_dim=128,
        hidden_size=128,
        num_heads=2,
        depth=4,
        axes_dim=(32, 32),
        bottleneck_size=64,
    )


def prx_small() -> PRXConfig:
    """A model for small pictures (`pictograms`, `scenes`): 192 wide, 6 deep, patch 8; about 5 M parameters."""
    return PRXConfig(
        patch_size=8,
        context_in_dim=192,
        hidden_size=192,
        num_heads=3,
        depth=6,
        axes_dim=(32, 32),
        bottleneck_size=128,
    )


@dataclass(frozen=True)
class Routing:
    """TREAD token routing: which blocks some of the tokens bypass, in training and in self-guidance."""

    enabled: bool = True
    start: Annotated[int, Range(0, 1_023)] = 1
    """First routed block, 0-based."""
    end: Annotated[int, Range(0, 1_023)] = 14
    """Last routed block, included."""
    selection_ratio: Annotated[float, Range(0, 1, above=True, below=True)] = 0.5
    """Share of tokens that bypass."""

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end:
            raise ValueError(f"routing.start {self.start} must not be negative or behind routing.end {self.end}")
        check_ranges(self, "routing.")


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn: Euler steps over the flow, with guidance (docs/recipe.md, "Objective")."""

    steps: Annotated[int, Range(1, 100_000)] = 28
    guidance: Annotated[float, Range(0, 1_000)] = 3.5
    """1 is no guidance."""
    guidance_kind: Literal["cfg", "self"] = "cfg"
    """cfg: against the empty prompt; self: against the routed pass with the same prompt (TREAD)."""
    routed_tokens: Literal["once", "each-step"] = "each-step"
    """Of self-guidance: one set of kept tokens for all steps of a picture, as in PRX's code, or a fresh one a step."""
    time_grid: Literal["linear", "diffusers"] = "diffusers"
    """linear: equal steps from 1 to 0, then shifted, as in PRX's code; diffusers: its Euler scheduler's."""
    shift: Annotated[float, Range(0, 1_000, above=True)] = 3.0
    """Time shift of the grid, `shift·t / (1 + (shift-1)·t)`."""
    t_min: Annotated[float, Range(0, 1, above=True, below=True)] = 0.05
    """Lower clamp of t where x0 is turned into a velocity."""
    noise_scale: Annotated[float, Range(0, 1_000, above=True)] = 1.0

    def __post_init__(self) -> None:
        if not self.guidance >= 0:
            raise ValueError(f"sampling.guidance must not be negative, got {self.guidance}; 1 is no guidance")
        if self.shift <= 0 or self.noise_scale <= 0:
            raise ValueError(f"sampling.shift and noise_scale must be positive, got {self.shift}, {self.noise_scale}")
        check_ranges(self, "sampling.")
        if self.guidance_kind not in ("cfg", "self"):
            raise ValueError(f'sampling.guidance_kind must be "cfg" or "self", got {self.guidance_kind!r}')
        if self.routed_tokens not in ("once", "each-step"):
            raise ValueError(f'sampling.routed_tokens must be "once" or "each-step", got {self.routed_tokens!r}')
        if self.time_grid not in ("linear", "diffusers"):
            raise ValueError(f'sampling.time_grid must be "linear" or "diffusers", got {self.time_grid!r}')
