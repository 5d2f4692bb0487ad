"""Which tensors one launch works on: a table on the device with their sizes and places, made without a wait.

Gradients are new tensors in every step, so their addresses must travel in every step. They travel as arguments of
torch's multi-tensor kernels: no copy from memory of the host that could be waited for, or that a CUDA graph would read
again after it has changed. What is in the table already, to the number, is not sent twice.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..launch import Config, alignment

KEPT = 64  # tables; a step of many buckets has three each

_tables: OrderedDict[tuple[torch.device, int, tuple[int, ...]], Tensor] = OrderedDict()


@dataclass(frozen=True)
class Batch:
    """Tensors of one launch: as many in every column, alike in dtype, column by column."""

    places: tuple[int, ...]  # in the caller's lists
    columns: tuple[tuple[Tensor, ...], ...]
    align: int  # elements that divide every size and every distance

    def table(self, config: Config, extra: Sequence[float] = ()) -> tuple[Tensor, int]:
        """The table (rows, tensors), int64 and flat, and the programs of a launch.

        Rows: the first program of each tensor; elements; place; for each column the distance in elements from its first
        tensor; bits of the float32 `extra`, if there are any.
        """
        sizes = [x.numel() for x in self.columns[0]]
        *firsts, programs = self.firsts(config, end=True)
        distances = [distance for column in self.columns for distance in _distances(column)]
        bits = [struct.unpack("<i", struct.pack("<f", x))[0] for x in extra]
        return numbers((*firsts, *sizes, *self.places, *distances, *bits), self.columns[0][0]), programs

    def firsts(self, config: Config, *, end: bool = False) -> list[int]:
        """The first program of each tensor; with `end` also the number of programs."""
        span, firsts = config.options["BLOCK"] * config.options["BLOCKS"], [0]
        for x in self.columns[0]:
            firsts.append(firsts[-1] + -(-x.numel() // span))
        return firsts if end else firsts[:-1]

    @property
    def steps(self) -> int:
        """Of a binary search among the tensors."""
        return (len(self.places) - 1).bit_length()


def batches(*columns: Sequence[Tensor], places: Sequence[int] = ()) -> Iterator[Batch]:
    """Tensors that lie side by side in the columns, in batches that a launch can take; empty ones are left out.

    Their places are their positions in the columns, where none are given.
    """
    found: dict[tuple[object, ...], list[int]] = {}
    for place, tensors in enumerate(zip(*columns, strict=True)):
        if tensors[0].numel():
            found.setdefault((_align(tensors), tensors[0].device, *(x.dtype for x in tensors)), []).append(place)
    for rows in found.values():
        chosen = tuple(tuple(column[i] for i in rows) for column in columns)
        yield Batch(tuple(places[i] if places else i for i in rows), chosen, _align([column[0] for column in chosen]))


def together(*columns: Sequence[Tensor], places: Sequence[int]) -> Iterator[Batch]:
    """All tensors, none of them empty and every column of one dtype, in one batch however they lie; none if none."""
    if columns[0]:
        align = min(_align(tensors) for tensors in zip(*columns, strict=True))
        yield Batch(tuple(places), tuple(map(tuple, columns)), align)


def _align(tensors: Sequence[Tensor]) -> int:
    """Elements that divide sizes and addresses of all tensors, as many as a load takes of the narrowest."""
    divides = min(alignment(x.numel(), x.data_ptr() // x.element_size()) for x in tensors)
    return min(divides, 16 // min(x.element_size() for x in tensors))


def numbers(given: tuple[int, ...], like: Tensor) -> Tensor:
    """Integers of the host as int64 on the device of `like`, sent as arguments of kernels."""
    device = like.device
    if type(like) not in (Tensor, nn.Parameter) or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return _sent(given, device)  # tensors of a tracer live no longer than it; a graph keeps what it captured
    stream = torch.cuda.current_stream(device).stream_id if device.type == "cuda" else 0
    key = (device, stream, given)
    if key not in _tables:
        _tables[key] = _sent(given, device)
        if len(_tables) > KEPT:
            _tables.popitem(last=False)
    _tables.move_to_end(key)
    return _tables[key]


def _sent(given: tuple[int, ...], device: torch.device) -> Tensor:
    table = torch.zeros(len(given), dtype=torch.int64, device=device)
    torch._foreach_add_(table.unbind(0), given)
    return table


def _distances(column: Sequence[Tensor]) -> list[int]:
    start, width = column[0].data_ptr(), column[0].element_size()
    return [(x.data_ptr() - start) // width for x in column]
