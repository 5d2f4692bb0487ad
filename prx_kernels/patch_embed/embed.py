"""Patch embedding of a pixel-space transformer: picture to tokens through a bottleneck, noise added while loading.

`patch_embed(image, w1, b1, w2, b2, p)` is `F.linear(F.linear(patchify(image), w1, b1), w2, b2)` without the unfolded
tensor; with `t` and `noise_seed` the picture is `x_t = (1-t)·x0 + t·noise`, and neither noise nor x_t is stored,
forward or backward. `BottleneckPatchEmbed` is the module, with constructors for the embeddings of other code bases.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..launch import check_no_tangent, check_one_device
from ..pixel_loss.loss import check_size
from .ops import project

# --- public ------------------------------------------------------------------------------------------------------


def patch_embed(
    image: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    patch_size: int,
    *,
    t: Tensor | None = None,
    noise_seed: Tensor | None = None,
    sample_ids: Tensor | None = None,
    noise_scale: float = 1.0,
) -> Tensor:
    """Embed patches of a picture, clean or noised on the way: two linear maps with nothing between, or one.

    Pixels of a patch are taken in the order (channel, row, column). With t the picture embedded is
    `(1-t)·image + t·noise_scale·philox_normal(noise_seed, image.shape, sample_ids=sample_ids)`, formed in float32 (t is
    never rounded) and rounded once to the dtype of the product.

    Args:
        image: (batch, channels, H, W) float32, bfloat16, float16, or uint8, which is scaled to [-1, 1]; any strides.
            float64 runs on the plain definition.
        w1: (bottleneck, channels·p²); b1: (bottleneck,) or None.
        w2: (hidden, bottleneck); b2: (hidden,) or None. w2 None leaves the second map out, and w1 leads to hidden.
        patch_size: p; H and W are multiples of it.
        t: (batch,) float32 in [0, 1], 1 is pure noise; refused outside on a CPU. On a GPU, where looking would mean
            waiting, the formula is followed whatever t is. No gradient.
        noise_seed: int64 tensor with one element, given exactly where t is.
        sample_ids: (batch,) int64 global ids; 0 … batch-1 unless given.
        noise_scale: standard deviation of the noise.

    Returns:
        (batch, H/p·W/p, hidden), dtype of w1, or autocast's. Sums are float32; the bottleneck row is rounded to that
        dtype, as by two linear layers. float32 products are IEEE.

    Gradients reach w1, b1, w2, b2 and the image; to second order only w2 and b2 have them.

    Raises:
        ValueError: shapes or devices that do not fit, a size that is no multiple of the patch, t outside [0, 1].
        TypeError: a dtype that does not fit.
        NotImplementedError: a forward-mode derivative is asked for, or one of torch.func.
    """
    check_no_tangent("patch_embed", image, w1, b1, w2, b2, t)
    _check_image(image, patch_size)
    _check_weights(image.shape[1] * patch_size**2, w1, b1, w2, b2, patch_size)
    check_one_device(image=image, w1=w1, b1=b1, w2=w2, b2=b2)
    noise = _checked_noise(image, t, noise_seed, sample_ids)
    if _autocast(image):
        dtype = torch.get_autocast_dtype(image.device.type)
        w1, b1 = w1.to(dtype), b1 if b1 is None else b1.to(dtype)
    row: Tensor = project(image, w1, b1, *noise, patch_size, noise_scale)
    return row if w2 is None else F.linear(row, w2, b2)


class BottleneckPatchEmbed(nn.Module):
    """`patch_embed` with its weights; parameters are named as in a Sequential of two Linear: "0.weight" … "1.bias".

    Code written for convolutions finds one map as `proj` and two as `proj1` and `proj2`, with matrices for weights: so
    initialize_weights() of DiT and JiT runs. A state_dict of such convolutions loads; `as_convolutions` leads back.

    Args:
        in_channels: channels of the picture.
        patch_size: p, the side of a patch in pixels.
        bottleneck: width between the two maps; None for one map, straight to hidden, without "1.weight" and "1.bias".
        hidden: width of a token.
        bias: whether the first and the second map have a bias.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self,
        in_channels: int,
        patch_size: int,
        bottleneck: int | None,
        hidden: int,
        *,
        bias: tuple[bool, bool] = (True, True),
    ) -> None:
        super().__init__()
        sizes = {"in_channels": in_channels, "patch_size": patch_size, "bottleneck": bottleneck, "hidden": hidden}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.in_channels = in_channels
        self.patch_size = (patch_size, patch_size)  # a pair, as code written for timm's PatchEmbed expects
        features = in_channels * patch_size**2
        self.add_module("0", nn.Linear(features, hidden if bottleneck is None else bottleneck, bias=bias[0]))
        if bottleneck is not None:
            self.add_module("1", nn.Linear(bottleneck, hidden, bias=bias[1]))

    def forward(
        self,
        image: Tensor,
        *,
        t: Tensor | None = None,
        noise_seed: Tensor | None = None,
        sample_ids: Tensor | None = None,
        noise_scale: float = 1.0,
    ) -> Tensor:
        """(batch, channels, H, W) -> (batch, H/p·W/p, hidden); arguments and errors as `patch_embed`."""
        if image.ndim != 4 or image.shape[1] != self.in_channels:
            raise ValueError(f"image must be (batch, {self.in_channels}, H, W), got {tuple(image.shape)}")
        noise: dict[str, Any] = {"t": t, "noise_seed": noise_seed, "sample_ids": sample_ids}
        return embed_with(self, image, self.patch_size[0], **noise, noise_scale=noise_scale)

    @property
    def proj(self) -> nn.Module:
        """The only map, in timm's name."""
        return self._map("proj", 0, 1)

    @property
    def proj1(self) -> nn.Module:
        """The first of two maps, in JiT's name."""
        return self._map("proj1", 0, 2)

    @property
    def proj2(self) -> nn.Module:
        """The second of two maps, in JiT's name."""
        return self._map("proj2", 1, 2)

    def _map(self, name: str, number: int, of: int) -> nn.Module:
        maps = list(self.children())
        if len(maps) != of:
            raise AttributeError(f"{type(self).__name__} of {len(maps)} maps has no {name}")
        return maps[number]

    def as_convolutions(self, *names: str) -> dict[str, Tensor]:
        """The state_dict of the convolutions that do the same, (out, channels, p, p) and (out, in, 1, 1); views.

        Args:
            names: what they are called: "proj" for one map and "proj1", "proj2" for two, unless given.

        Raises:
            ValueError: another number of names than of maps.
        """
        maps = list(self.children())
        names = names or (("proj",) if len(maps) == 1 else ("proj1", "proj2"))
        if len(names) != len(maps):
            raise ValueError(f"as_convolutions takes a name for each of {len(maps)} maps, got {names}")
        shapes = [(self.in_channels, *self.patch_size), (-1, 1, 1)]
        found: dict[str, Tensor] = {}
        for name, layer, shape in zip(names, maps, shapes, strict=False):
            for key, value in layer.state_dict().items():
                found[f"{name}.{key}"] = value.unflatten(1, shape) if key == "weight" else value
        return found

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Names and shapes of convolutions become ours; `load_state_dict` gives each module a copy to change."""
        for theirs, own in (("proj", "0"), ("proj1", "0"), ("proj2", "1")):
            for key in ("weight", "bias"):
                value = state_dict.pop(f"{prefix}{theirs}.{key}", None)
                if value is not None:
                    state_dict[f"{prefix}{own}.{key}"] = value.flatten(1) if key == "weight" else value
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        return f"in_channels={self.in_channels}, patch_size={self.patch_size[0]}"

    @classmethod
    def from_linear(cls, layers: nn.Module, in_channels: int = 3) -> BottleneckPatchEmbed:
        """Copy a Sequential of one or two Linear maps on patches of order (channel, row, column).

        Raises:
            TypeError: anything else than that.
            ValueError: the first map does not take in_channels·p² features for a whole p, or the maps do not fit.
        """
        if not isinstance(in_channels, int):
            raise TypeError(
                f"in_channels must be an int, got {type(in_channels).__name__}; put two Linear into one Sequential"
            )
        maps = [layers] if isinstance(layers, nn.Linear) else list(layers.children())
        if not 1 <= len(maps) <= 2 or not all(isinstance(layer, nn.Linear) for layer in maps):
            kinds = ", ".join(type(layer).__name__ for layer in maps)
            raise TypeError(
                f"from_linear takes a Sequential of one or two Linear, got {type(layers).__name__}({kinds})"
            )
        features = int(maps[0].weight.shape[1])  # type: ignore[index]
        patch_size = math.isqrt(features // in_channels) if in_channels > 0 else 0
        if in_channels * patch_size**2 != features or features == 0:
            raise ValueError(
                f"the first map takes {features} features, which is not in_channels {in_channels} times the square of "
                "a patch size"
            )
        return cls._copy(in_channels, patch_size, [(layer.weight, layer.bias) for layer in maps])  # type: ignore[misc]

    @classmethod
    def from_conv(cls, conv1: nn.Conv2d, conv2: nn.Conv2d | None = None) -> BottleneckPatchEmbed:
        """Copy a p×p convolution of stride p, and the 1×1 convolution behind it if there is one (JiT,
        https://arxiv.org/abs/2511.13720, whose first has no bias).

        Raises:
            TypeError: not Conv2d.
            ValueError: a convolution that is not one of patches, or that does not fit the other.
        """
        for name, conv in (("conv1", conv1), ("conv2", conv2)):
            if conv is not None:
                _check_conv(name, conv)
        side = conv1.kernel_size[0]
        if conv2 is not None and conv2.kernel_size != (1, 1):
            raise ValueError(f"conv2 must have a 1x1 kernel, got {conv2.kernel_size}")
        convs = [conv1] if conv2 is None else [conv1, conv2]
        return cls._copy(conv1.in_channels, side, [(conv.weight.flatten(1), conv.bias) for conv in convs])

    @classmethod
    def from_timm(cls, embed: nn.Module) -> BottleneckPatchEmbed:
        """Copy timm's `PatchEmbed` (one convolution straight to hidden). Its `num_patches`, `grid_size` and `img_size`
        are kept for code that reads them; pictures of other sizes are taken.

        Raises:
            TypeError: no convolution called `proj`.
            ValueError: a norm, position embeddings (diffusers' PatchEmbed), another output than (batch, N, hidden),
                padding, or a patch that is not square.
        """
        proj = getattr(embed, "proj", None)
        if not isinstance(proj, nn.Conv2d):
            raise TypeError(f"from_timm takes a module with a Conv2d called proj, got {type(embed).__name__}")
        if not isinstance(getattr(embed, "norm", None), nn.Identity | None):
            raise ValueError(f"a PatchEmbed without norm can be replaced, got norm {type(embed.norm).__name__}")
        if getattr(embed, "pos_embed", None) is not None:
            raise ValueError(
                f"{type(embed).__name__} adds position embeddings, which would be lost: replace its `proj` by "
                "`from_conv` and add them as before"
            )
        if not getattr(embed, "flatten", True) or getattr(embed, "dynamic_img_pad", False):
            raise ValueError("a PatchEmbed with flattened output and without padding can be replaced, got another one")
        made = cls.from_conv(proj)
        for name in ("img_size", "grid_size", "num_patches"):
            if hasattr(embed, name):
                setattr(made, name, getattr(embed, name))
        return made

    @classmethod
    @torch.no_grad()
    def _copy(cls, in_channels: int, patch_size: int, maps: list[tuple[Tensor, Tensor | None]]) -> BottleneckPatchEmbed:
        (w1, b1), (w2, b2) = maps[0], maps[-1]
        if len(maps) == 2 and w2.shape[1] != w1.shape[0]:
            raise ValueError(f"the second map must take the {w1.shape[0]} features of the first, got {w2.shape[1]}")
        bottleneck = w1.shape[0] if len(maps) == 2 else None
        with torch.device("meta"):
            made = cls(in_channels, patch_size, bottleneck, w2.shape[0], bias=(b1 is not None, b2 is not None))
        for layer, (weight, bias) in zip(made.children(), maps, strict=True):
            for name, value in (("weight", weight), ("bias", bias)):
                if value is not None:
                    copy = value.detach().clone(memory_format=torch.contiguous_format)
                    setattr(layer, name, nn.Parameter(copy, requires_grad=value.requires_grad))
        return made


def embed_with(layers: nn.Module, image: Tensor, patch_size: int, **noise: Any) -> Tensor:
    """`patch_embed` with the weights of a Linear, or of a module whose children are one or two of them."""
    maps: list[Any] = [layers] if isinstance(layers, nn.Linear) else list(layers.children())
    w2, b2 = (maps[1].weight, maps[1].bias) if len(maps) > 1 else (None, None)
    return patch_embed(image, maps[0].weight, maps[0].bias, w2, b2, patch_size, **noise)


def _check_conv(name: str, conv: nn.Module) -> None:
    if not isinstance(conv, nn.Conv2d):
        raise TypeError(f"{name} must be a Conv2d, got {type(conv).__name__}")
    side = conv.kernel_size[0]
    padded = conv.padding not in ((0, 0), "valid")
    if conv.kernel_size != (side, side) or conv.stride != (side, side) or padded:
        raise ValueError(
            f"{name} must have a square kernel, a stride of the same size and no padding, got kernel "
            f"{conv.kernel_size}, stride {conv.stride}, padding {conv.padding}"
        )
    if conv.groups != 1 or conv.dilation != (1, 1):
        raise ValueError(f"{name} must have no groups and no dilation, got {conv.groups} and {conv.dilation}")


def _autocast(x: Tensor) -> bool:
    kind = x.device.type  # the meta device has no autocast, and is_autocast_enabled refuses it
    return kind != "meta" and torch.is_autocast_enabled(kind)


def _check_image(image: Tensor, patch_size: int) -> None:
    if image.ndim != 4:
        raise ValueError(f"image must be (batch, channels, H, W), got shape {tuple(image.shape)}")
    if not image.is_floating_point() and image.dtype != torch.uint8:
        raise TypeError(f"image must be floating or uint8, got {image.dtype}")
    if patch_size < 1:
        raise ValueError(f"patch_size must be at least 1, got {patch_size}")
    check_size(image.shape[2], image.shape[3], patch_size)


def _check_weights(
    features: int, w1: Tensor, b1: Tensor | None, w2: Tensor | None, b2: Tensor | None, patch_size: int
) -> None:
    if w1.ndim != 2 or w1.shape[1] != features:
        raise ValueError(
            f"w1 must be (bottleneck, {features}) for {features // patch_size**2} channels in patches of "
            f"{patch_size}x{patch_size}, got {tuple(w1.shape)}"
        )
    if w2 is None and b2 is not None:
        raise ValueError("b2 is the bias of the second map and needs w2, which is None")
    if w2 is not None and (w2.ndim != 2 or w2.shape[1] != w1.shape[0]):
        raise ValueError(f"w2 must be (hidden, {w1.shape[0]}) behind w1 {tuple(w1.shape)}, got {tuple(w2.shape)}")
    for name, bias, weight in (("b1", b1, w1), ("b2", b2, w2)):
        if bias is not None and weight is not None and tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(f"{name} must be ({weight.shape[0]},) beside its weight, got {tuple(bias.shape)}")
    dtypes = {x.dtype for x in (w1, b1, w2, b2) if x is not None}
    if not w1.is_floating_point() or (len(dtypes) > 1 and not _autocast(w1)):
        raise TypeError(f"weights and biases must have one floating dtype, got {', '.join(sorted(map(str, dtypes)))}")


def _checked_noise(
    image: Tensor, t: Tensor | None, noise_seed: Tensor | None, sample_ids: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if t is None or noise_seed is None:
        if t is not None or noise_seed is not None or sample_ids is not None:
            raise ValueError("t and noise_seed belong together (sample_ids too, if given): all to add noise, or none")
        return None, None, None
    batch = image.shape[0]
    if not t.is_floating_point() or tuple(t.shape) != (batch,):
        raise ValueError(f"t must be floating of shape ({batch},), got {t.dtype} of shape {tuple(t.shape)}")
    if not isinstance(noise_seed, Tensor):  # a number would recompile each step, and be baked into a CUDA graph
        raise TypeError(f"noise_seed must be an int64 tensor with one element, got {type(noise_seed).__name__}")
    if noise_seed.dtype != torch.int64 or noise_seed.numel() != 1:
        raise ValueError(
            f"noise_seed must be an int64 tensor with one element, got {noise_seed.dtype} of shape "
            f"{tuple(noise_seed.shape)}"
        )
    if sample_ids is None:
        sample_ids = torch.arange(batch, device=image.device)
    if sample_ids.dtype != torch.int64 or tuple(sample_ids.shape) != (batch,):
        raise ValueError(
            f"sample_ids must be int64 of shape ({batch},), got {sample_ids.dtype} of shape {tuple(sample_ids.shape)}"
        )
    for name, x in (("t", t), ("noise_seed", noise_seed), ("sample_ids", sample_ids)):
        if x.device != image.device:
            raise ValueError(f"{name} must be on the device of the image, {image.device}, got {x.device}")
    return t.detach().float(), noise_seed, sample_ids
