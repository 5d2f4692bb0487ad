"""The PRX pixel-space transformer: a noisy picture, its time and its text in; the clean picture out.

Names of parameters are those of diffusers' `PRXTransformer2DModel`, so weights load strictly both ways.
"""

from collections.abc import Iterator
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from prx_kernels import enter_route, exit_route, gather_tokens, patch_embed, unpatchify

from .attention import Backend, check_backend
from .config import PRXConfig
from .layers import FinalLayer, PRXBlock, TimeEmbedder, rotary_table
from .packed_text import PackedText

Init = Literal["torch", "xavier"]
"""How linear maps start; see `PRXTransformer.initial_weights`."""


class PRXTransformer(nn.Module):
    """Text-to-image transformer on pixels (PRX Part 3; docs/recipe.md, "Model").

    Args:
        config: sizes.
        attention: backend, "sdpa", "varlen" or "flash"; checked when a forward runs.
    """

    def __init__(self, config: PRXConfig, *, attention: Backend = "sdpa") -> None:
        super().__init__()
        self.config = config
        self.attention_backend = attention
        width = config.hidden_size
        self.img_in: nn.Module
        if config.bottleneck_size is None:
            self.img_in = nn.Linear(config.patch_features, width)
        else:
            self.img_in = nn.Sequential(
                nn.Linear(config.patch_features, config.bottleneck_size), nn.Linear(config.bottleneck_size, width)
            )
        self.time_in = TimeEmbedder(width)
        self.txt_in = nn.Linear(config.context_in_dim, width)
        self.blocks = nn.ModuleList(PRXBlock(config, attention) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None, *, init: Init = "torch") -> None:
        """Fill the weights with `initial_weights`."""
        for name, value in self.initial_weights(generator, init=init):
            self.get_parameter(name).copy_(value)

    @torch.no_grad()
    def initial_weights(
        self, generator: torch.Generator | None = None, *, init: Init = "torch"
    ) -> Iterator[tuple[str, Tensor]]:
        """Zero modulation and zero head (adaLN-zero), unit norm scales, and the other linear maps by `init`.

        Args:
            generator: on the CPU; torch's own unless given.
            init: "torch" is `nn.Linear`'s own, as in PRX's code: weights and biases uniform within 1/sqrt(fan-in);
                "xavier" is Xavier-uniform with zero biases, as in DiT's (https://arxiv.org/abs/2212.09748).

        Yields (name, value), float32, one at a time and in a fixed order: a sharded model takes its part of each.
        """
        if init not in ("torch", "xavier"):
            raise ValueError(f'train.init must be "torch" or "xavier", got {init!r}')
        zero = {f"blocks.{i}.modulation.lin" for i in range(len(self.blocks))}
        zero |= {"final_layer.adaLN_modulation.1", "final_layer.linear"}
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                weight, bias = _linear(module, init, generator)
                yield f"{name}.weight", weight.zero_() if name in zero else weight
                if bias is not None:
                    yield f"{name}.bias", bias.zero_() if name in zero else bias
            elif isinstance(module, nn.RMSNorm):
                yield f"{name}.weight", torch.ones(module.weight.shape)

    def forward(self, image: Tensor, t: Tensor, text: Tensor | PackedText, text_mask: Tensor | None = None) -> Tensor:
        """Predict the clean picture.

        Args:
            image: (batch, channels, height, width), the noisy picture; both sides multiples of the patch. Image and
                text are cast to the weights' dtype, t never.
            t: (batch,) or (1,) float32 in [0, 1], 1 is pure noise.
            text: (batch, L, context_in_dim) embeddings, or their real tokens alone (`packed_text.pack`): then the
                text's linear maps cost what its real tokens cost, and text_mask is not given.
            text_mask: (batch, L) bool, True at real tokens; None where all are real.

        Returns:
            x0_hat (batch, channels, height, width), dtype of the last linear map.

        Raises:
            ValueError: a size that is no multiple of the patch, or shapes that do not fit one another.
        """
        tokens = self.forward_tokens(image, t, text, text_mask)
        return unpatchify(tokens, self.config.patch_size, image.shape[2], image.shape[3])

    @overload
    def forward_tokens(
        self, image: Tensor, t: Tensor, text: Tensor | PackedText, text_mask: Tensor | None = None, *,
        keep: Tensor | None = None, route: tuple[int, int] | None = None, feature_layer: None = None,
        noise_seed: Tensor | None = None, sample_ids: Tensor | None = None, noise_scale: float = 1.0,
    ) -> Tensor: ...  # fmt: skip

    @overload
    def forward_tokens(
        self, image: Tensor, t: Tensor, text: Tensor | PackedText, text_mask: Tensor | None = None, *,
        keep: Tensor | None = None, route: tuple[int, int] | None = None, feature_layer: int,
        noise_seed: Tensor | None = None, sample_ids: Tensor | None = None, noise_scale: float = 1.0,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    def forward_tokens(
        self,
        image: Tensor,
        t: Tensor,
        text: Tensor | PackedText,
        text_mask: Tensor | None = None,
        *,
        keep: Tensor | None = None,
        route: tuple[int, int] | None = None,
        feature_layer: int | None = None,
        noise_seed: Tensor | None = None,
        sample_ids: Tensor | None = None,
        noise_scale: float = 1.0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predict the clean picture as patches, as the loss wants it; arguments as `forward`, and:

        Args:
            keep: (batch, K) int32 or int64 tokens that go through the routed blocks (`prx_kernels.sample_keep`);
                the others bypass them. None runs dense.
            route: first and last routed block, 0-based, both included; needed with `keep`.
            feature_layer: also return the tokens behind this block (0-based; REPA). Within the route these are the
                kept tokens only, the last routed block included: features are taken before the route is left.
            noise_seed: int64 tensor with one element: image is the clean picture then, and the noise of
                `prx_kernels.philox_normal` at level t is added while it is read; x_t is never stored. Such a picture
                may be uint8 too.
            sample_ids: (batch,) int64 ids of the noise; 0 … batch-1 unless given.
            noise_scale: standard deviation of that noise.

        Returns:
            (batch, N, channels·patch²); with `feature_layer` also the features (batch, N or K, hidden).
        """
        rows, columns = self._check(image, t, text, text_mask, keep, route, feature_layer)
        level = None if noise_seed is None else t.expand(image.shape[0])
        x = self._embed(image, t=level, noise_seed=noise_seed, sample_ids=sample_ids, noise_scale=noise_scale)
        offsets = text.offsets if isinstance(text, PackedText) else None
        embeddings, text_mask = (text.tokens, text.mask) if isinstance(text, PackedText) else (text, text_mask)
        context = self.txt_in(embeddings.to(self.txt_in.weight.dtype))
        temb = self.time_in(t)
        rotary = rotary_table(rows, columns, self.config.axes_dim, self.config.theta, image.device)
        start, end = route if route is not None and keep is not None else (-1, -1)
        features, bypass, dense_rotary = x, x, rotary
        for i, block in enumerate(self.blocks):
            if i == start and keep is not None:
                x, bypass = enter_route(x, keep)
                rotary = gather_tokens(dense_rotary.expand(image.shape[0], -1, -1, -1), keep)
            x = block(x, context, temb, rotary, text_mask, offsets)
            if i == feature_layer:
                features = x
            if i == end and keep is not None:
                x, rotary = exit_route(x, bypass, keep), dense_rotary
        tokens: Tensor = self.final_layer(x, temb)
        return tokens if feature_layer is None else (tokens, features)

    def _embed(self, image: Tensor, **noise: Any) -> Tensor:
        """The layers of `img_in` on patches of the picture, which are never unfolded (`prx_kernels.patch_embed`)."""
        layers: list[Any] = [self.img_in] if isinstance(self.img_in, nn.Linear) else list(self.img_in.children())
        w2, b2 = (layers[1].weight, layers[1].bias) if len(layers) > 1 else (None, None)
        return patch_embed(image, layers[0].weight, layers[0].bias, w2, b2, self.config.patch_size, **noise)

    def _check(
        self,
        image: Tensor,
        t: Tensor,
        text: Tensor | PackedText,
        text_mask: Tensor | None,
        keep: Tensor | None,
        route: tuple[int, int] | None,
        feature_layer: int | None,
    ) -> tuple[int, int]:
        """Refuse what does not fit, in one sentence; gives the grid's rows and columns."""
        config, depth = self.config, len(self.blocks)
        check_backend(self.attention_backend, image.device)
        if image.ndim != 4 or image.shape[1] != config.in_channels:
            raise ValueError(f"image must be (batch, {config.in_channels}, H, W), got {tuple(image.shape)}")
        batch, _, height, width = image.shape
        config.tokens(height, width)
        if t.ndim != 1 or t.shape[0] not in (1, batch):
            raise ValueError(f"t must be (batch,) or (1,) for a batch of {batch}, got {tuple(t.shape)}")
        if isinstance(text, PackedText):
            _check_packed(text, text_mask, batch, config.context_in_dim)
        elif text.ndim != 3 or text.shape[0] != batch or text.shape[2] != config.context_in_dim:
            raise ValueError(f"text must be ({batch}, L, {config.context_in_dim}), got {tuple(text.shape)}")
        elif text_mask is not None and (text_mask.shape != text.shape[:2] or text_mask.dtype != torch.bool):
            raise ValueError(
                f"text_mask must be bool of shape {tuple(text.shape[:2])}, "
                f"got {text_mask.dtype} of shape {tuple(text_mask.shape)}"
            )
        if (keep is None) != (route is None):
            raise ValueError("keep and route belong together: give both to route tokens, neither to run dense")
        if route is not None and not 0 <= route[0] <= route[1] < depth:
            raise ValueError(f"route {route} must be two block indices in order, within 0 … {depth - 1}")
        if feature_layer is not None and not 0 <= feature_layer < depth:
            raise ValueError(f"feature_layer {feature_layer} must be a block index within 0 … {depth - 1}")
        return height // config.patch_size, width // config.patch_size


def _linear(module: nn.Linear, init: Init, generator: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
    """Initial weight and bias of a linear map."""
    weight = torch.empty(module.weight.shape)
    bias = None if module.bias is None else torch.zeros(module.bias.shape)
    if init == "xavier":
        return nn.init.xavier_uniform_(weight, generator=generator), bias
    nn.init.kaiming_uniform_(weight, a=5**0.5, generator=generator)  # within 1/sqrt(fan-in), to the bit as torch does
    if bias is not None:
        bound = 1 / module.in_features**0.5
        nn.init.uniform_(bias, -bound, bound, generator=generator)
    return weight, bias


def _check_packed(text: PackedText, text_mask: Tensor | None, batch: int, width: int) -> None:
    """Refuse packed text that is not of this batch or width, or that comes with a second mask."""
    if text_mask is not None:
        raise ValueError("text_mask goes with padded text; packed text holds its own mask")
    tokens, places, mask, offsets = text
    if tokens.ndim != 2 or tokens.shape[1] != width or places.shape != tokens.shape[:1] or places.dtype != torch.int64:
        raise ValueError(
            f"packed text must be tokens (rows, {width}) and places (rows,) int64, "
            f"got {tuple(tokens.shape)} and {places.dtype} of shape {tuple(places.shape)}"
        )
    if mask.ndim != 2 or mask.shape[0] != batch or mask.dtype != torch.bool:
        raise ValueError(f"packed text's mask must be bool ({batch}, L), got {mask.dtype} of shape {tuple(mask.shape)}")
    if offsets.shape != (batch + 1,) or offsets.dtype != torch.int32:
        raise ValueError(
            f"packed text's offsets must be int32 ({batch + 1},), got {offsets.dtype} of shape {tuple(offsets.shape)}"
        )
