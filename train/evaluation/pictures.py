"""Pictures on disk: single PNGs, and grids with a caption under each picture."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_CELL = 128
"""Smallest side of a picture in a grid, pixels; smaller ones are enlarged by a whole factor."""
_FONT, _LINE, _LINES = 11, 14, 3


def save_picture(image: Tensor, path: Path) -> None:
    """Write one (3, height, width) uint8 picture as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil(image).save(path)


def save_grid(images: Tensor, captions: Sequence[str], path: Path) -> None:
    """Write (n, 3, height, width) uint8 pictures as a nearly square PNG grid, captions below, at most three lines."""
    count, _, height, width = images.shape
    columns = int(np.ceil(np.sqrt(count)))
    scale = max(1, _CELL // min(height, width))
    cell_width, cell_height = width * scale + 8, height * scale + 8 + _LINE * _LINES
    grid = Image.new("RGB", (columns * cell_width, -(-count // columns) * cell_height), "white")
    pen, font = ImageDraw.Draw(grid), ImageFont.load_default(_FONT)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = i % columns * cell_width + 4, i // columns * cell_height + 4
        picture = to_pil(image).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        grid.paste(picture, (left, top))
        lines = textwrap.wrap(caption, max(8, width * scale // 6), max_lines=_LINES, placeholder=" …")
        pen.multiline_text((left, top + height * scale + 2), "\n".join(lines), fill="black", font=font, spacing=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path, optimize=True)


def to_pil(image: Tensor) -> Image.Image:
    """A (3, height, width) uint8 tensor as an RGB picture."""
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
