"""One step of Muon over the matrices of one layout: a pipeline of buckets through momentum, owner and weights.

On one rank the momentum pass writes what Newton-Schulz reads, in its dtype and stacked by shape. Among ranks `Exchange`
stands between the two. Matrices are not normalised: powers of two bring them into the range of half precision, where
they are formed or where they arrive, and one over the norms goes into the products and into the last pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from .exchange import Exchange
from .owners import local
from .passes import apply_update, momentum_scales, momentum_update, scaled_copy, square_sums

Group = dict[str, Any]
# Orthogonalises matrices of one parameter group; the last argument is `scales` of `newton_schulz`.
Orthogonalise = Callable[[list[Tensor], Group, Tensor | None], list[Tensor]]


@dataclass(frozen=True)
class Member:
    """The parameter a block is part of."""

    param: Any
    group: int


@dataclass(frozen=True)
class Step:
    """What one step works with."""

    groups: Sequence[Group]
    states: Mapping[Any, dict[str, Tensor]]
    gradients: Mapping[Any, Tensor]
    """This rank's part, of the parameters that have one."""
    orthogonalise: Orthogonalise
    factor: Tensor | None
    """What gradients are multiplied by, 0-dim."""
    copies: Mapping[Any, Tensor]
    """Of weights, to be kept up to date; of a DTensor the local part."""


class Plan:
    """All blocks of one layout, one device and one dtype on the wire, with what is done to each.

    Args:
        held: dtype of what waits to be orthogonalised, on one rank or where it is `scaled`.
        scaled: whether it is brought into range by a power of two instead of being normalised: where `held` is the
            dtype of Newton-Schulz.
    """

    def __init__(self, members: Sequence[Member], exchange: Exchange, held: torch.dtype, scaled: bool) -> None:
        self.members, self.exchange, self.held = list(members), exchange, held
        self.scaled = scaled
        self.order = [
            sorted(bucket.blocks, key=lambda b: (self.members[b].group, self._shape(b), b))
            for bucket in exchange.buckets
        ]
        # Of each bucket and group: the blocks that were last moved, and the squared norms of their momentum since then.
        # They bound the next update's. Should somebody write into the momentum, a factor of 2⁷ is there to spare.
        self._squares: dict[tuple[int, int], tuple[tuple[int, ...], Tensor]] = {}

    @property
    def measured(self) -> bool:
        """Whether `run` needs norms of the gradients."""
        return self.scaled and self.exchange.alone

    def gradient_parts(self, gradients: Mapping[Any, Tensor]) -> list[Tensor]:
        """This rank's rows of every block with a gradient, bucket by bucket in `order`."""
        return [gradients[self.members[b].param][self._rows(b)] for order in self.order for b in order
                if self.members[b].param in gradients]  # fmt: skip

    def run(self, step: Step, squares: Tensor | None, meanwhile: Callable[[], None]) -> Tensor:
        """Update all parameters; `meanwhile` runs while the first bucket travels.

        Args:
            squares: of `gradient_parts`, where the plan is `measured`.

        Returns:
            Number of blocks that were left alone because their update is not finite, int64, 0-dim, alike on all ranks.
        """
        members = {member.group for member in self.members}
        rates = {g: learning_rate(step.groups[g]["lr"], self.exchange.device) for g in members}
        bad = (self._run_alone if self.exchange.alone else self._run_among_ranks)(step, rates, squares, meanwhile)
        device = self.exchange.device
        skipped = torch.cat(bad).sum().long() if bad else torch.zeros((), dtype=torch.int64, device=device)
        if self.exchange.layout.shards > 1:
            torch.distributed.all_reduce(skipped, group=self.exchange.layout.shard_group)
        return skipped

    # --- on one rank ---------------------------------------------------------------------------------------------

    def _run_alone(
        self, step: Step, rates: Mapping[int, Tensor], squares: Tensor | None, meanwhile: Callable[[], None]
    ) -> list[Tensor]:
        meanwhile()
        bad, at = [], 0
        for bucket, order in enumerate(self.order):
            present = [b for b in order if self.members[b].param in step.gradients]
            for number, found in groupby(present, key=lambda b: self.members[b].group):
                blocks = tuple(found)
                part = None if squares is None else squares[at : at + len(blocks)]
                at += len(blocks)
                matrices, scales = self._move(bucket, number, blocks, step, part)
                updates = step.orthogonalise(matrices, step.groups[number], scales)
                del matrices
                bad += self._apply(list(zip(blocks, updates, strict=True)), step, rates, scales)
        return bad

    def _move(
        self, bucket: int, number: int, blocks: tuple[int, ...], step: Step, squares: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Move the momentum. Gives what is to be orthogonalised, and for `scaled` one over its norms.

        A norm is known only when all has been written. What is written is brought into the range of `held` by the norms
        that are known before: of the gradients, and of the momentum as the last step left it.
        """
        outs = self._empty(blocks)
        grads = [step.gradients[self.members[b].param][self._rows(b)] for b in blocks]
        buffers = [local(step.states[self.members[b].param]["momentum_buffer"])[self._rows(b)] for b in blocks]
        group = step.groups[number]
        momentum, nesterov = group["momentum"], group["nesterov"]
        if squares is None:
            momentum_update(grads, buffers, outs, momentum, nesterov, step.factor)
            return outs, None
        if self._squares.get((bucket, number), ((), squares))[0] != blocks:
            self._squares[bucket, number] = blocks, square_sums(buffers, [1] * len(buffers))
        known = self._squares[bucket, number][1]
        scales = momentum_scales(squares, known, momentum, nesterov, step.factor)
        written, moved = momentum_update(grads, buffers, outs, momentum, nesterov, step.factor, scales).unbind(0)
        known.copy_(moved)  # in place: a captured step reads there what it left there
        return outs, (written.float().sqrt() + group["eps"] * scales).reciprocal()

    # --- among ranks ---------------------------------------------------------------------------------------------

    def _run_among_ranks(
        self, step: Step, rates: Mapping[int, Tensor], squares: Tensor | None, meanwhile: Callable[[], None]
    ) -> list[Tensor]:
        exchange, count = self.exchange, len(self.exchange.buckets)
        # Buckets between being worked on and being applied: one among shards, one more among replicas.
        lag = 1 if exchange.layout.replicas == 1 else 2
        bad = []
        self._send(0, step)
        meanwhile()
        for tick in range(count + lag):
            if tick + 1 < count:
                self._send(tick + 1, step)
            if tick < count:
                self._work(tick, step)
            if 0 <= tick - 1 < count:
                exchange.gather(tick - 1)
            if tick >= lag:
                bad += self._apply(list(exchange.close(tick - lag)), step, rates, None)
        return bad

    def _send(self, bucket: int, step: Step) -> None:
        """Move the momentum of this rank's rows, and send what is to be orthogonalised to its owner."""
        outs = self.exchange.open(bucket)
        work: dict[tuple[int, bool], tuple[list[Tensor], list[Tensor], list[Tensor]]] = {}
        for block in self.exchange.buckets[bucket].blocks:
            member, rows = self.members[block], self._rows(block)
            if member.param not in step.gradients or rows.start == rows.stop:
                if block in outs:
                    outs[block].zero_()
                continue
            grads, buffers, targets = work.setdefault((member.group, block in outs), ([], [], []))
            grads.append(step.gradients[member.param][rows])
            buffers.append(local(step.states[member.param]["momentum_buffer"])[rows])
            if block in outs:
                targets.append(outs[block].view(grads[-1].shape))
        for (group, _), lists in work.items():
            momentum_update(*lists, step.groups[group]["momentum"], step.groups[group]["nesterov"], step.factor)
        self.exchange.send(bucket)

    def _work(self, bucket: int, step: Step) -> None:
        """Orthogonalise the owned matrices, those of one group together, and send the updates back."""
        owned = self.exchange.buckets[bucket].owned
        parts = dict(zip(owned, self.exchange.collect(bucket), strict=True))
        updates: dict[int, Tensor] = {}
        scales: dict[int, Tensor] = {}
        # Also without a gradient here, which another rank may have; zeros are orthogonalised to zeros.
        order = sorted(owned, key=lambda b: (self.members[b].group, self._shape(b), b))
        for number, found in groupby(order, key=lambda b: self.members[b].group):
            blocks, group = list(found), step.groups[number]
            if self.scaled:
                matrices, inverses = self._scale(blocks, parts, group)
                scales |= dict(zip(blocks, inverses.unbind(0), strict=True))
                made = step.orthogonalise(matrices, group, inverses)
            else:
                whole = [torch.cat(parts[b]).view(self._shape(b)) for b in blocks]
                made = step.orthogonalise(whole, group, None)
            updates |= dict(zip(blocks, made, strict=True))
        factors = torch.stack([scales[b] for b in owned]) if scales else None
        self.exchange.give_back(bucket, [updates[b] for b in owned], factors)

    def _scale(self, blocks: list[int], parts: Mapping[int, list[Tensor]], group: Group) -> tuple[list[Tensor], Tensor]:
        """Matrices in the range and dtype of Newton-Schulz, from what came of each; one over their norms."""
        matrices = self._empty(blocks)
        pieces, counts = [piece for b in blocks for piece in parts[b]], [len(parts[b]) for b in blocks]
        outs = [
            out
            for b, matrix in zip(blocks, matrices, strict=True)
            for out in matrix.view(-1).split_with_sizes([piece.numel() for piece in parts[b]])
        ]
        squares = square_sums(pieces, counts)
        scales = momentum_scales(squares, squares, 0.0, False)
        written = scaled_copy(pieces, outs, counts, scales)
        return matrices, (written.sqrt() + group["eps"] * scales).reciprocal()

    # --- on any number -------------------------------------------------------------------------------------------

    def _apply(
        self, updates: list[tuple[int, Tensor]], step: Step, rates: Mapping[int, Tensor], scales: Tensor | None
    ) -> list[Tensor]:
        """Decay and update this rank's rows; of blocks that begin here, 1.0 where one is not finite."""
        # Those that begin here come first: Newton-Schulz spreads what is not finite over its whole matrix.
        order = sorted(range(len(updates)), key=lambda i: not self.exchange.begins_here(updates[i][0]))
        work: dict[tuple[int, bool], list[int]] = {}
        for i in order:
            member, rows = self.members[updates[i][0]], self._rows(updates[i][0])
            if member.param in step.gradients and rows.start != rows.stop:
                work.setdefault((member.group, member.param in step.copies), []).append(i)
        bad = []
        for (number, copied), chosen in work.items():
            group, blocks = step.groups[number], [updates[i][0] for i in chosen]
            params = [local(self.members[b].param)[self._rows(b)] for b in blocks]
            made = [updates[i][1].view(param.shape) for i, param in zip(chosen, params, strict=True)]
            copies = [step.copies[self.members[b].param][self._rows(b)] for b in blocks] if copied else []
            ratios = [lr_ratio(group["adjust_lr_fn"], *self._shape(b)) for b in blocks]
            part = (
                scales
                if scales is None or chosen == list(range(len(updates)))
                else torch.stack([scales[i] for i in chosen])
            )
            found: Tensor = apply_update(params, made, copies, ratios, rates[number], group["weight_decay"], part)
            bad.append(found[: sum(map(self.exchange.begins_here, blocks))])
        return bad

    def _empty(self, blocks: Sequence[int]) -> list[Tensor]:
        """Unwritten matrices of `held`; those that follow one another and are of one shape do so in memory."""
        counts = [(shape, len(list(alike))) for shape, alike in groupby(blocks, key=self._shape)]
        device = self.exchange.device
        stacks = [torch.empty((n, *shape), dtype=self.held, device=device) for shape, n in counts]
        return [matrix for stack in stacks for matrix in stack.unbind(0)]

    def _shape(self, block: int) -> tuple[int, int]:
        return self.exchange.blocks[block].rows, self.exchange.blocks[block].columns

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
