"""Text without its padding: the real tokens of a batch behind one another, and where each belongs.

Linear maps and norms of the text then run on real tokens only. The number of rows is rounded up on the host, so that
shapes depend on no value on the device and a compiled block sees few of them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS_STEP, LENGTH_STEP = 256, 32
"""Rows and padded length are rounded up to multiples of these: 32 captions of 100 tokens are 8 % more rows at most."""


class PackedText(NamedTuple):
    """Embeddings of the real tokens of a batch; made by `pack`."""

    tokens: Tensor
    """(rows, width): the captions' tokens behind one another, then rows of zeros up to a multiple of the step."""
    places: Tensor
    """(rows,) int64: row i stands at `places[i]` of the flattened (batch·L) padded form; batch·L for rows of zeros."""
    mask: Tensor
    """(batch, L) bool: the padded form's mask, True at real tokens."""

    def padded(self) -> tuple[Tensor, Tensor]:
        """The padded form, zeros in its padding, and its mask: (batch, L, width) and (batch, L)."""
        return unpack(self.tokens, self.places, *self.mask.shape), self.mask


def pack(
    tokens: Tensor, lengths: Sequence[int], *, rows_step: int = ROWS_STEP, length_step: int = LENGTH_STEP
) -> PackedText:
    """Lay out the embeddings of a batch of captions.

    Args:
        tokens: (sum of lengths, width), the captions behind one another, on the device where they are used.
        lengths: tokens of each caption, on the host: no device is asked for them. 0 is a sample without text.
        rows_step, length_step: what the number of rows and L, the longest caption, are rounded up to.

    Raises:
        ValueError: no caption, a step below 1, or lengths that do not add up to the tokens.
    """
    if tokens.ndim != 2 or not lengths or min(lengths) < 0 or sum(lengths) != tokens.shape[0]:
        raise ValueError(
            f"lengths must be one number a caption and add up to the rows of tokens, got {len(lengths)} lengths of sum "
            f"{sum(lengths)} for tokens {tuple(tokens.shape)}"
        )
    if rows_step < 1 or length_step < 1:
        raise ValueError(f"rows_step and length_step must be at least 1, got {rows_step} and {length_step}")
    real, longest = tokens.shape[0], max(1, *lengths)
    rows, length = -(-max(real, 1) // rows_step) * rows_step, -(-longest // length_step) * length_step
    host = torch.tensor(lengths)
    mask = torch.arange(length) < host[:, None]
    places = F.pad(mask.flatten().nonzero()[:, 0], (0, rows - real), value=mask.numel())
    if tokens.device.type == "cuda":
        mask, places = mask.pin_memory(), places.pin_memory()
    return PackedText(
        F.pad(tokens, (0, 0, 0, rows - real)),
        places.to(tokens.device, non_blocking=True),
        mask.to(tokens.device, non_blocking=True),
    )


def unpack(rows: Tensor, places: Tensor, batch: int, length: int) -> Tensor:
    """Rows (rows, …) at their places of a padded (batch, length, …) tensor, zeros elsewhere.

    Rows at batch·length are dropped, and their gradient is zero. Backward is a gather: nothing is added up.
    """
    padded = rows.new_zeros(batch * length + 1, *rows.shape[1:]).index_copy(0, places, rows)
    return padded[:-1].unflatten(0, (batch, length))


def join_keys(text: Tensor, image: Tensor, places: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Packed text and image keys (or values), sample after sample, text first: what varlen attention reads.

    Args:
        text: (rows, heads, head_dim), packed as `places` (rows,) and `mask` (batch, L) say.
        image: (batch, N, heads, head_dim).

    Returns:
        (rows + batch·N, heads, head_dim), the rows of zeros last, and the int32 cumulative lengths (batch + 1,)
        without them.
    """
    (batch, length), tokens = mask.shape, image.shape[1]
    end = mask.sum(dim=1).cumsum(0)
    sample = torch.arange(batch, device=image.device)
    # A row of text stands behind the images of the samples before its own; a row of zeros behind all.
    to_text = torch.arange(text.shape[0], device=text.device) + (places // length).clamp(max=batch) * tokens
    to_image = (end + sample * tokens)[:, None] + torch.arange(tokens, device=image.device)
    # Packed kernels leave the gradient of keys behind the last segment unwritten (empty_like): cut it off here.
    text = text.masked_fill((places >= mask.numel())[:, None, None], 0.0)
    source = torch.cat((text, image.flatten(0, 1)))
    joined = torch.zeros_like(source).index_copy(0, torch.cat((to_text, to_image.flatten())), source)
    return joined, F.pad(end + (sample + 1) * tokens, (1, 0)).to(torch.int32)
