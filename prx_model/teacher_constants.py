"""What a frozen network computes without looking at the picture, made once: rotary tables, positions, normalisation.

Made in every step, each was a copy from the host for which the host waited until the device had done all before it.
"""

from typing import Any

import torch
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ImageNet(nn.Module):
    """Normalise pictures (batch, 3, H, W) in [0, 1] by ImageNet's mean and deviation; dtype kept."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            # float64 here: rounded once, to the picture's dtype.
            self.register_buffer(name, torch.tensor(values, dtype=torch.float64)[:, None, None], persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        return (image - self.mean.to(image.dtype)) / self.std.to(image.dtype)


class RotaryTables(nn.Module):
    """Stands in a timm network for its rotary embedding, and asks it for the table of a grid once.

    timm's DINOv3 builds the coordinates on the CPU (`timm.layers.RotaryEmbeddingDinoV3`), in every forward. The numbers
    are its own: made on its device, in its precision, and again after a move or a cast.

    Args:
        embedding: timm's, which gives one table for all layers and draws nothing at random.
    """

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding
        self.given: Tensor | None = None
        """What `get_embed` answers where it is set: so a compiled network takes the table as an argument."""
        self._tables: dict[tuple[int, int], Tensor] = {}

    def _apply(self, *arguments: Any, **options: Any) -> "RotaryTables":
        self._tables.clear()
        super()._apply(*arguments, **options)
        return self

    @torch.no_grad()
    def table(self, rows: int, columns: int) -> Tensor:
        """The table of a grid: (rows·columns, 2·head_dim), sines then cosines, on the network's device."""
        if (rows, columns) not in self._tables:
            self._tables[rows, columns] = self.embedding.get_embed(shape=(rows, columns))  # type: ignore[operator]
        return self._tables[rows, columns]

    def get_embed(self, shape: tuple[int, int]) -> Tensor:
        """As timm's: the table of a grid of `shape`."""
        return self.table(*shape) if self.given is None else self.given


class Features:
    """A timm transformer's `forward_features`, the rotary table of the pictures' grid beside them.

    Its rotary embedding, where it has one for all layers, is replaced by `RotaryTables`; other networks take pictures
    alone. What is computed stays the same, bit for bit.
    """

    def __init__(self, network: Any) -> None:
        self.network = network
        # timm then checks no size of a picture: its message would hold the size, and so a graph no other one.
        network.patch_embed.img_size = None
        if getattr(network, "rope", None) is not None and not getattr(network, "rope_mixed", False):
            network.rope = RotaryTables(network.rope)

    def forward(self, image: Tensor, table: Tensor | None = None) -> Tensor:
        """Tokens (batch, prefix + N, width) of pictures, normed."""
        if table is None:
            return self.network.forward_features(image)
        self.network.rope.given = table
        try:
            return self.network.forward_features(image)
        finally:
            self.network.rope.given = None


def rotary_table(network: Any, height: int, width: int) -> tuple[Tensor, ...]:
    """What `Features` takes beside pictures of that size in pixels: the table, or nothing."""
    rope = getattr(network, "rope", None)
    if not isinstance(rope, RotaryTables):
        return ()
    patch = network.patch_embed.patch_size
    return (rope.table(height // patch[0], width // patch[1]),)


def fix_size(network: Any, height: int, width: int) -> None:
    """Resample a timm transformer's learned positions once, for pictures of this size alone.

    By timm, from the weights as they are, cast or not: the numbers that a forward on the same device gets.
    """
    network.set_input_size(img_size=(height, width))
    if getattr(network, "rope", None) is None:
        # With torch 2.11 timm takes a compiled network for an exported one, and resamples whatever the size.
        network.dynamic_img_size, network.patch_embed.flatten = False, True
