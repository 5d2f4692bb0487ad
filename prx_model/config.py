"""Sizes and settings of the model, its routing and its sampler, as frozen dataclasses that check themselves.

No torch here: command lines read these before torch is imported.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PRXConfig:
    """Sizes of a PRX transformer; fields and meaning as the arguments of diffusers' `PRXTransformer2DModel`.

    The defaults are the 1.18 B pixel-space model of PRX Part 3 (RECIPE.md, "Model").
    """

    in_channels: int = 3
    patch_size: int = 32
    context_in_dim: int = 2304
    """Width of the text embeddings."""
    hidden_size: int = 1792
    mlp_ratio: float = 3.5
    num_heads: int = 28
    depth: int = 16
    axes_dim: tuple[int, int] = (32, 32)
    """Rotary features of the row and of the column; their sum is the head dimension."""
    theta: int = 10_000
    bottleneck_size: int | None = 256
    """Width between the two linear maps of the patch embedding; None for a single linear map."""

    def __post_init__(self) -> None:
        for name in ("in_channels", "patch_size", "context_in_dim", "hidden_size", "num_heads", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"PRXConfig.{name} must be at least 1, got {getattr(self, name)}")
        if self.bottleneck_size is not None and self.bottleneck_size < 1:
            raise ValueError(f"PRXConfig.bottleneck_size must be at least 1 or None, got {self.bottleneck_size}")
        if self.mlp_size < 1:
            raise ValueError(f"PRXConfig.mlp_ratio must give the MLP at least one feature, got {self.mlp_ratio}")
        if self.theta <= 0:
            raise ValueError(f"PRXConfig.theta must be positive, got {self.theta}")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"PRXConfig.hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}"
            )
        object.__setattr__(self, "axes_dim", tuple(self.axes_dim))
        if len(self.axes_dim) != 2 or any(d < 2 or d % 2 for d in self.axes_dim):
            raise ValueError(f"PRXConfig.axes_dim must be two even numbers, got {self.axes_dim}")
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
    start: int = 1
    """First routed block, 0-based."""
    end: int = 14
    """Last routed block, included."""
    selection_ratio: float = 0.5
    """Share of tokens that bypass."""

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end:
            raise ValueError(f"routing.start {self.start} must not be negative or behind routing.end {self.end}")
        if not 0.0 < self.selection_ratio < 1.0:
            raise ValueError(f"routing.selection_ratio must lie in (0, 1), got {self.selection_ratio}")


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn: Euler steps over the flow, with guidance (RECIPE.md, "Objective")."""

    steps: int = 28
    guidance: float = 3.5
    """1 is no guidance."""
    guidance_kind: Literal["cfg", "self"] = "cfg"
    """cfg: against the empty prompt; self: against the routed pass with the same prompt (TREAD)."""
    routed_tokens: Literal["once", "each-step"] = "each-step"
    """Of self-guidance: one set of kept tokens for all steps of a picture, as in PRX's code, or a fresh one a step."""
    time_grid: Literal["linear", "diffusers"] = "diffusers"
    """linear: equal steps from 1 to 0, then shifted, as in PRX's code; diffusers: its Euler scheduler's."""
    shift: float = 3.0
    """Time shift of the grid, `shift·t / (1 + (shift-1)·t)`."""
    t_min: float = 0.05
    """Lower clamp of t where x0 is turned into a velocity."""
    noise_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"sampling.steps must be at least 1, got {self.steps}")
        if not self.guidance >= 0:
            raise ValueError(f"sampling.guidance must not be negative, got {self.guidance}; 1 is no guidance")
        if self.shift <= 0 or self.noise_scale <= 0:
            raise ValueError(f"sampling.shift and noise_scale must be positive, got {self.shift}, {self.noise_scale}")
        if not 0.0 < self.t_min < 1.0:
            raise ValueError(f"sampling.t_min must lie in (0, 1), got {self.t_min}")
        if self.guidance_kind not in ("cfg", "self"):
            raise ValueError(f'sampling.guidance_kind must be "cfg" or "self", got {self.guidance_kind!r}')
        if self.routed_tokens not in ("once", "each-step"):
            raise ValueError(f'sampling.routed_tokens must be "once" or "each-step", got {self.routed_tokens!r}')
        if self.time_grid not in ("linear", "diffusers"):
            raise ValueError(f'sampling.time_grid must be "linear" or "diffusers", got {self.time_grid!r}')
