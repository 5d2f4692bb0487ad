"""What a frozen network has to say about a prediction: REPA, LPIPS and perceptual DINO losses (docs/recipe.md).

All three are a `Teacher`: they take a `Prediction` and give one loss a sample. A fourth is one more class with a
`forward`, and a line in the recipe. What two of them need (features of the clean picture, say) is made once a step.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prx_kernels import gather_tokens

from .teacher_constants import Features, ImageNet, fix_size, rotary_table
from .teacher_weights import load_lpips, load_timm

_COSINE_EPS = 1e-8


@dataclass(frozen=True)
class Prediction:
    """What teachers look at in a step."""

    image: Tensor
    """Clean pictures (batch, 3, H, W) in [-1, 1]."""
    x0_hat: Tensor
    """Predicted pictures, same shape; gradients flow into them."""
    features: Tensor | None = None
    """Tokens of the denoiser behind the REPA layer: (batch, N or K, hidden); gradients flow into them."""
    keep: Tensor | None = None
    """(batch, K) the tokens that `features` are, where the layer is routed; None where they are all N."""
    patch_size: int = 32
    """Of the denoiser, in pixels."""
    _made: dict[Hashable, Tensor] = field(default_factory=dict)

    def once(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives, made at the first call of the step with this key, without gradients."""
        if key not in self._made:
            with torch.no_grad():
                self._made[key] = make()
        return self._made[key]

    def select(self, samples: Tensor) -> Prediction:
        """The prediction of some samples only: (count,) int64 indices on the tensors' device."""
        features, keep = (None if x is None else x[samples] for x in (self.features, self.keep))
        return Prediction(self.image[samples], self.x0_hat[samples], features, keep, self.patch_size)


class Teacher(nn.Module):
    """A frozen network and a loss from it.

    Args:
        network: frozen here: evaluation mode, no gradients to its weights. Never part of what is sharded, saved,
            averaged or optimised.
        dtype: of its weights and of what it is given.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        # Not a submodule: state_dict() and parameters() of a teacher are what is trained with it, a projector at most.
        self._frozen: list[Any] = [network.to(dtype).eval().requires_grad_(False)]
        self._frozen.append(Features(network).forward if hasattr(network, "forward_features") else network)
        self.dtype = dtype

    @property
    def network(self) -> Any:
        """The frozen network."""
        return self._frozen[0]

    def to_device(self, device: torch.device) -> Teacher:
        """Move everything, the frozen network too; gives the teacher."""
        self.network.to(device)
        return self.to(device)

    def wrap_network(self, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Replace what is run of the frozen network by what `wrap` makes of it: compiled, say.

        It takes pictures (batch, 3, H, W), of LPIPS two of them, and the rotary table where the network has one.
        """
        self._frozen[1] = wrap(self._frozen[1])

    @abstractmethod
    def input_size(self, height: int, width: int, patch_size: int = 32) -> tuple[int, int]:
        """Height and width of what the network is given of pictures of this size, in pixels."""

    def patch_tokens(self, image: Tensor) -> Tensor:
        """Normalised patch tokens of a timm vision transformer, without class and registers: (batch, N, width)."""
        tokens: Tensor = self._frozen[1](image, *rotary_table(self.network, image.shape[2], image.shape[3]))
        return tokens[:, self.network.num_prefix_tokens :]

    @abstractmethod
    def forward(self, prediction: Prediction) -> Tensor:
        """One loss a sample, unweighted: (batch,) float32 (float64 for a network in float64)."""

    @abstractmethod
    def flop(self, height: int, width: int, patch_size: int = 32) -> float:
        """Operations for one picture of this size, forward, and backward to the prediction where there is one.

        Args:
            patch_size: of the denoiser, in pixels.
        """


class REPA(Teacher):
    """Alignment of the denoiser's tokens with a vision transformer's: `-mean cos(projector(h), f(x0))`.

    Representation alignment, https://arxiv.org/abs/2410.06940, eq. 8, on the tokens that went through the blocks only.
    The teacher sees the clean picture resized (nearest) by teacher patch / denoiser patch, so that both have one grid,
    then as `(x + 1) / 2`, normalised as ImageNet in the picture's precision.

    Args:
        hidden_size: width of the denoiser's tokens.
        name: timm's name of the teacher.
        weights: see `teacher_weights.load_timm`.
        layers: linear layers of the projector, SiLU between them; all but the first are as wide as the teacher.
        dtype: of the teacher.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        name: str = "vit_large_patch16_dinov3",
        weights: str = "",
        layers: int = 3,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(load_timm(name, weights), dtype)
        width = self.network.embed_dim
        widths = [hidden_size, *[width] * layers]
        parts: list[nn.Module] = []
        for i in range(layers):
            parts += [nn.SiLU()] * (i > 0) + [nn.Linear(widths[i], widths[i + 1])]
        self.projector = nn.Sequential(*parts)
        self.normalise = ImageNet()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """torch's own initialisation of linear layers, from a generator."""
        for layer in self.projector:
            if isinstance(layer, nn.Linear):
                bound = layer.in_features**-0.5
                nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
                nn.init.uniform_(layer.bias, -bound, bound, generator=generator)

    def forward(self, prediction: Prediction) -> Tensor:
        if prediction.features is None:
            raise ValueError("REPA needs the denoiser's features: ask forward_tokens for them with feature_layer")
        target = prediction.once((id(self.network), "repa", prediction.patch_size), lambda: self._target(prediction))
        if prediction.keep is not None:
            target = gather_tokens(target, prediction.keep)
        projected = self.projector(prediction.features)
        if projected.shape != target.shape:
            raise ValueError(
                f"REPA has {tuple(target.shape)} teacher tokens for {tuple(projected.shape)} of the denoiser: "
                "features behind a routed block need that step's keep, features outside the route none"
            )
        return -F.cosine_similarity(_wide(projected), _wide(target), dim=-1, eps=_COSINE_EPS).mean(dim=1)

    def _target(self, prediction: Prediction) -> Tensor:
        height, width = prediction.image.shape[2:]
        resized = F.interpolate(prediction.image, size=self.input_size(height, width, prediction.patch_size))
        return self.patch_tokens(self.normalise((resized + 1) / 2).to(self.dtype))

    def flop(self, height: int, width: int, patch_size: int = 32) -> float:
        return _count(self.network.forward_features, *self.input_size(height, width, patch_size), gradient=False)

    def input_size(self, height: int, width: int, patch_size: int = 32) -> tuple[int, int]:
        """A patch of the teacher's for each of the denoiser's."""
        patch: int = self.network.patch_embed.patch_size[0]
        return height // patch_size * patch, width // patch_size * patch


class LPIPSLoss(Teacher):
    """LPIPS (https://arxiv.org/abs/1801.03924) of prediction and picture at half size, without a clamp.

    Half size is the mean of 2x2 pixels: what bilinear resizing by 0.5 is, and deterministic in its backward.
    Pictures are at least `SMALLEST[network]` pixels a side.

    Args:
        network: trunk, "vgg", "alex" or "squeeze".
        weights: see `teacher_weights.load_lpips`.
        dtype: of trunk and linear maps.
    """

    SMALLEST: ClassVar[dict[str, int]] = {"vgg": 32, "alex": 62, "squeeze": 34}
    """Pixels a side of whole pictures that leave the trunk's last layer at least one of its own."""

    def __init__(self, *, network: str = "vgg", weights: str = "", dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(load_lpips(network, weights), dtype)

    def forward(self, prediction: Prediction) -> Tensor:
        target = prediction.once("half size", lambda: F.avg_pool2d(prediction.image, 2)).to(self.dtype)
        predicted = F.avg_pool2d(prediction.x0_hat, 2).to(self.dtype)
        distance: Tensor = self._frozen[1](predicted, target)
        return _wide(distance.flatten(1)).mean(dim=1)

    def flop(self, height: int, width: int, patch_size: int = 32) -> float:
        trunk, size = self.network.net, self.input_size(height, width)
        return _count(trunk, *size, gradient=False) + _count(trunk, *size, gradient=True)

    def input_size(self, height: int, width: int, patch_size: int = 32) -> tuple[int, int]:
        """Half of both."""
        return height // 2, width // 2


class PerceptualDINO(Teacher):
    """P-DINO: `mean(1 - cos)` over the patch tokens of prediction and picture (docs/recipe.md).

    Pictures are resized to a square (bilinear, no antialiasing), taken as `(x + 1) / 2`, clamped to [0, 1] and
    normalised as ImageNet, in this order: that of PRX's code. Where a prediction is saturated, a pixel within range
    beside one outside it then still has a gradient.

    Args:
        name: timm's name of the network, DINOv2 ViT-B/14 with registers by default.
        weights: see `teacher_weights.load_timm`.
        size: side of the square in pixels, a multiple of the network's patch.
        order: "resize-first", or "resize-last": clamped and normalised at full size, then resized.
        dtype: of the network.

    Raises:
        ValueError: a size that is no multiple of the patch, or an unknown order.
    """

    def __init__(
        self,
        *,
        name: str = "vit_base_patch14_reg4_dinov2",
        weights: str = "",
        size: int = 224,
        order: str = "resize-first",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        if order not in ("resize-first", "resize-last"):
            raise ValueError(f'pdino.order must be "resize-first" or "resize-last", got {order!r}')
        super().__init__(load_timm(name, weights), dtype)
        patch = self.network.patch_embed.patch_size[0]
        if size % patch or size < patch:
            raise ValueError(f"pdino.size {size} must be a multiple of the patch {patch} of {name}")
        self.size, self.order = size, order
        self.normalise = ImageNet()
        fix_size(self.network, size, size)

    def forward(self, prediction: Prediction) -> Tensor:
        target = prediction.once(
            (id(self.network), "pdino", self.size, self.order), lambda: self._features(prediction.image)
        )
        predicted = self._features(prediction.x0_hat)
        return (1 - F.cosine_similarity(_wide(predicted), _wide(target), dim=-1, eps=_COSINE_EPS)).mean(dim=1)

    def _features(self, image: Tensor) -> Tensor:
        first = self.order == "resize-first"  # then nothing but the resizing itself reads whole pictures
        normalised = self.normalise((((self._square(image) if first else image) + 1) / 2).clamp(0, 1))
        return self.patch_tokens((normalised if first else self._square(normalised)).to(self.dtype))

    def _square(self, image: Tensor) -> Tensor:
        return F.interpolate(image, size=(self.size, self.size), mode="bilinear", antialias=False)

    def flop(self, height: int, width: int, patch_size: int = 32) -> float:
        forward = self.network.forward_features
        target = _count(forward, self.size, self.size, gradient=False)
        return target + _count(forward, self.size, self.size, gradient=True)

    def input_size(self, height: int, width: int, patch_size: int = 32) -> tuple[int, int]:
        """The square, whatever the picture's size."""
        return self.size, self.size


def _wide(x: Tensor) -> Tensor:
    """x in the dtype that sums and cosines are formed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _count(forward: Callable[[Tensor], Any], height: int, width: int, *, gradient: bool) -> float:
    """Operations of one picture through a network: run once, on the device and dtype of its weights."""
    from torch.utils.flop_counter import FlopCounterMode

    owner = forward if isinstance(forward, nn.Module) else forward.__self__  # type: ignore[attr-defined]
    weight = next(owner.parameters())
    image = torch.zeros(1, 3, height, width, device=weight.device, dtype=weight.dtype, requires_grad=gradient)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(gradient):
        out = forward(image)
        if gradient:
            outputs = [out] if isinstance(out, Tensor) else list(out)
            torch.stack([o.float().sum() for o in outputs]).sum().backward()
    return float(counter.get_total_flops())
