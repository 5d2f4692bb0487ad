"""One step of Muon over the matrices of one layout: a pipeline of buckets through momentum, owner and weights.

The order of work is the same on one rank and on many; `Exchange` does nothing where there is nobody to exchange with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .exchange import Exchange
from .owners import gradient, local
from .passes import apply_update, momentum_update

Group = dict[str, Any]
# Orthogonalises matrices of one parameter group.
Orthogonalise = Callable[[list[Tensor], Group], list[Tensor]]


@dataclass(frozen=True)
class Member:
    """The parameter a block is part of."""

    param: Any
    group: int


class Plan:
    """All blocks of one layout, one device and one dtype on the wire, with what is done to each."""

    def __init__(self, members: Sequence[Member], exchange: Exchange) -> None:
        self.members, self.exchange = list(members), exchange

    def run(
        self,
        groups: Sequence[Group],
        states: Mapping[Any, dict[str, Tensor]],
        orthogonalise: Orthogonalise,
        meanwhile: Callable[[], None],
    ) -> Tensor:
        """Update all parameters; `meanwhile` runs while the first bucket travels.

        Returns:
            Number of blocks that were left alone because their update is not finite, int64, 0-dim, alike on all ranks.
        """
        exchange, count = self.exchange, len(self.exchange.buckets)
        # Buckets between being worked on and being applied: none alone, one among shards, one more among replicas.
        lag = 0 if exchange.alone else 1 if exchange.layout.replicas == 1 else 2
        skipped = torch.zeros((), dtype=torch.int64, device=exchange.device)
        rates = {g: learning_rate(groups[g]["lr"], exchange.device) for g in {member.group for member in self.members}}
        self._start(0, groups, states)
        meanwhile()
        for tick in range(count + lag):
            if tick + 1 < count:
                self._start(tick + 1, groups, states)
            if tick < count:
                self._work(tick, groups, orthogonalise)
            if 0 <= tick - min(lag, 1) < count:
                exchange.gather(tick - min(lag, 1))
            if tick >= lag:
                skipped += self._apply(tick - lag, groups, rates)
        if exchange.layout.shards > 1:
            torch.distributed.all_reduce(skipped, group=exchange.layout.shard_group)
        return skipped

    def _start(self, bucket: int, groups: Sequence[Group], states: Mapping[Any, dict[str, Tensor]]) -> None:
        """Move the momentum of this rank's rows, and send what is to be orthogonalised to its owner."""
        outs = self.exchange.open(bucket)
        work: dict[tuple[int, bool], tuple[list[Tensor], list[Tensor], list[Tensor]]] = {}
        blocks = self.exchange.buckets[bucket].blocks
        params = {id(param): param for param in (self.members[block].param for block in blocks)}
        # Of all of them, also where this rank has no row: ranks may have to send gradients to one another.
        gradients = {key: gradient(param) for key, param in params.items() if param.grad is not None}
        for block in blocks:
            member, rows = self.members[block], self._rows(block)
            if member.param.grad is None or rows.start == rows.stop:
                if block in outs:
                    outs[block].zero_()
                continue
            grads, buffers, targets = work.setdefault((member.group, block in outs), ([], [], []))
            grads.append(gradients[id(member.param)][rows])
            buffers.append(local(states[member.param]["momentum_buffer"])[rows])
            if block in outs:
                targets.append(outs[block].view(grads[-1].shape))
        for (group, _), lists in work.items():
            momentum_update(*lists, groups[group]["momentum"], groups[group]["nesterov"])
        self.exchange.send(bucket)

    def _work(self, bucket: int, groups: Sequence[Group], orthogonalise: Orthogonalise) -> None:
        """Orthogonalise the owned matrices, those of one group together, and send the updates back."""
        updates = self.exchange.collect(bucket)
        by_group: dict[int, list[int]] = {}
        for i, block in enumerate(self.exchange.buckets[bucket].owned):
            member = self.members[block]
            # Among ranks another one may have a gradient; zeros are orthogonalised to zeros.
            if member.param.grad is not None or not self.exchange.alone:
                by_group.setdefault(member.group, []).append(i)
        for group, chosen in by_group.items():
            for i, update in zip(chosen, orthogonalise([updates[i] for i in chosen], groups[group]), strict=True):
                updates[i] = update
        self.exchange.give_back(bucket, updates)

    def _apply(self, bucket: int, groups: Sequence[Group], rates: Mapping[int, Tensor]) -> Tensor:
        """Decay and update this rank's rows; the number of blocks that begin here and are not finite."""
        work: dict[int, tuple[list[Tensor], list[Tensor], list[float]]] = {}
        firsts = []
        for block, update in self.exchange.close(bucket):
            member, rows, shape = self.members[block], self._rows(block), self.exchange.blocks[block]
            if member.param.grad is None or rows.start == rows.stop:
                continue
            params, updates, ratios = work.setdefault(member.group, ([], [], []))
            params.append(local(member.param)[rows])
            updates.append(update.view(params[-1].shape))
            ratios.append(lr_ratio(groups[member.group]["adjust_lr_fn"], shape.rows, shape.columns))
            if self.exchange.begins_here(block):
                firsts.append(updates[-1][0, 0])
        for group, lists in work.items():
            apply_update(*lists, rates[group], groups[group]["weight_decay"])
        # Newton-Schulz spreads what is not finite over the whole of its matrix: one entry tells.
        return (~torch.stack(firsts).isfinite()).sum() if firsts else torch.zeros((), dtype=torch.int64)

    def _rows(self, block: int) -> slice:
        layout = self.exchange.layout
        return slice(*self.exchange.blocks[block].rows_of(layout.shard, layout.shards))


def lr_ratio(adjust_lr_fn: str | None, rows: int, columns: int) -> float:
    """By what the learning rate of a matrix is multiplied; names as in torch.optim.Muon."""
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    if adjust_lr_fn == "spectral_unclamped":
        return math.sqrt(rows / columns)
    return math.sqrt(max(1.0, rows / columns))


def learning_rate(lr: float | Tensor, device: torch.device) -> Tensor:
    """A number on the device, without waiting for it: a number of the host is written there by a kernel."""
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        return lr.to(device, non_blocking=True)
    return torch.full((), float(lr), dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
