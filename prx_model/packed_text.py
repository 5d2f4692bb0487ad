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
    offsets: Tensor
    """(batch + 1,) int32: sample i's tokens are rows offsets[i] … offsets[i + 1] - 1."""

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
    layout = [places, mask, F.pad(host.cumsum(0), (1, 0)).to(torch.int32)]
    if tokens.device.type == "cuda":
        layout = [x.pin_memory() for x in layout]
    padded = F.pad(tokens, (0, 0, 0, rows - real))
    return PackedText(padded, *(x.to(tokens.device, non_blocking=True) for x in layout))


def unpack(rows: Tensor, places: Tensor, batch: int, length: int) -> Tensor:
    """Rows (rows, …) at their places of a padded (batch, length, …) tensor, zeros elsewhere.

    Rows at batch·length are dropped, and their gradient is zero. Backward is a gather: nothing is added up.
    """
    padded = rows.new_zeros(batch * length + 1, *rows.shape[1:]).index_copy(0, places, rows)
    return padded[:-1].unflatten(0, (batch, length))
