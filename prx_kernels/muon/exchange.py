"""Muon's exchange: rows of every matrix go to its owner, rows of its update come back, bucket by bucket.

One uneven all-to-all each way a bucket among the shards; among replicas one all-gather of the updates. While a bucket
is orthogonalised the next one's rows and the last one's updates travel. Every rank takes part in every collective, in
one order, whatever it owns or holds: which ones there are depends on shapes and settings alone.

Streams: buffers are made and freed on the current stream, and each is held here until `wait()` made that stream wait
for its collective. The caching allocator can therefore give their memory only to later work of the same stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from .owners import Block, Layout, assign_owners, shard_rows
from .passes import scaled_copy

# With more than one rank: one bucket travels there, one is worked on, one travels back. An owner of few matrices does
# better with one: three have no more rounds of tiles in one batch than alone, and a third of the launches.
MIN_BUCKETS = 3
FEW = 6  # matrices of the fullest owner
MAX_ELEMENTS = 1 << 29  # of a bucket on its owner: bounds the memory of a step, about 6 bytes an element


@dataclass(frozen=True)
class Bucket:
    """What of one bucket is where, in elements; computed once."""

    blocks: tuple[int, ...]  # all of the bucket, in one order on every rank
    owned: tuple[int, ...]  # those orthogonalised here
    # Where this rank's rows of each block lie: the owner's replica, and the slice of what that replica gets and gives.
    place: dict[int, tuple[int, slice]]
    to_shard: tuple[int, ...]  # elements this rank gives to each shard of its replica, and gets back as updates
    of_shard: tuple[int, ...]  # elements this rank gets of each
    width: int  # the largest of what this rank's shard exchanges with a replica


@dataclass
class _Flight:
    """One bucket under way: the tensors that a collective reads or writes, and the collective."""

    bucket: Bucket
    send: Tensor
    receive: Tensor | None = None
    work: Any = None

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()
            self.work = None


class Exchange:
    """The buckets of all blocks of one layout. Each goes through the methods below in the order they stand in.

    On one rank there is nothing to exchange: only the buckets are of use.
    """

    def __init__(self, blocks: Sequence[Block], layout: Layout, wire: torch.dtype, device: torch.device) -> None:
        self.blocks, self.layout, self.wire, self.device = list(blocks), layout, wire, device
        # Alike matrices follow one another: to every replica some of them, so that none has more than others to send.
        turns = assign_owners([block.cost for block in blocks], layout.ranks)
        self.owners = [turn % layout.replicas * layout.shards + turn // layout.replicas for turn in turns]
        self.buckets = [self._bucket(members) for members in self._buckets()]
        self._flights: dict[int, _Flight] = {}

    @property
    def alone(self) -> bool:
        return self.layout.ranks == 1

    def _buckets(self) -> list[list[int]]:
        """Blocks of each bucket: every owner's blocks spread over the buckets, so that each bucket is work for all."""
        owned: list[list[int]] = [[] for _ in range(self.layout.ranks)]
        for block, owner in enumerate(self.owners):
            owned[owner].append(block)
        most = max(len(own) for own in owned)
        elements = max(sum(map(self._size, own)) for own in owned)
        if self.alone:
            return self._in_order(-(-elements // MAX_ELEMENTS))
        count = max(-(-elements // MAX_ELEMENTS), 1 if most <= FEW else MIN_BUCKETS)
        buckets: list[list[int]] = [[] for _ in range(min(count, most))]
        for own in owned:
            for block, bucket in zip(own, assign_owners([self.blocks[b].cost for b in own], len(buckets)), strict=True):
                buckets[bucket].append(block)
        return [sorted(bucket) for bucket in buckets]

    def _in_order(self, count: int) -> list[list[int]]:
        """All blocks in `count` buckets of about as many elements; blocks of one shape stay together where they can."""
        units: list[list[int]] = []
        for _, found in groupby(sorted(range(len(self.blocks)), key=lambda b: (self._sides(b), b)), key=self._sides):
            alike = list(found)
            parts = -(-sum(map(self._size, alike)) // MAX_ELEMENTS)
            cuts = [len(alike) * part // parts for part in range(parts + 1)]
            units += [alike[a:b] for a, b in pairwise(cuts) if a < b]
        total, at = sum(self._size(block) for unit in units for block in unit), 0
        buckets: list[list[int]] = [[] for _ in range(count)]
        for unit in units:
            size = sum(map(self._size, unit))
            buckets[(2 * at + size) * count // (2 * total)] += unit
            at += size
        return [sorted(bucket) for bucket in buckets if bucket]

    def _size(self, block: int) -> int:
        return self.blocks[block].rows * self.blocks[block].columns

    def _sides(self, block: int) -> tuple[int, int, bool]:
        """The smaller side, the larger one, and whether it is tall."""
        rows, columns = self.blocks[block].rows, self.blocks[block].columns
        return min(rows, columns), max(rows, columns), rows > columns

    def _bucket(self, members: list[int]) -> Bucket:
        shards, shard, replica = self.layout.shards, self.layout.shard, self.layout.replica
        by_owner: dict[int, list[int]] = {}
        for block in members:
            by_owner.setdefault(self.owners[block], []).append(block)
        place, totals, to_shard = {}, [], []
        for other in range(self.layout.replicas):
            at = 0
            for peer in range(shards):
                start = at
                for block in by_owner.get(other * shards + peer, []):
                    size = self.blocks[block].elements_of(shard, shards)
                    place[block] = (other, slice(at, at + size))
                    at += size
                if other == replica:
                    to_shard.append(at - start)
            totals.append(at)
        owned = by_owner.get(replica * shards + shard, [])
        of_shard = [sum(self.blocks[b].elements_of(peer, shards) for b in owned) for peer in range(shards)]
        return Bucket(tuple(members), tuple(owned), place, tuple(to_shard), tuple(of_shard), max(totals))

    # --- one bucket, from here to its owners and back ------------------------------------------------------------

    def open(self, index: int) -> dict[int, Tensor]:
        """Unwritten memory for this rank's rows of the blocks its replica owns, flat; to be filled before `send`."""
        bucket = self.buckets[index]
        send = torch.empty(sum(bucket.to_shard), dtype=self.wire, device=self.device)
        self._flights[index] = _Flight(bucket, send)
        return {b: send[at] for b, (replica, at) in bucket.place.items() if replica == self.layout.replica}

    def send(self, index: int) -> None:
        """Start on the way to the owners."""
        flight = self._flights[index]
        self._all_to_all(flight, flight.bucket.to_shard, flight.bucket.of_shard)

    def collect(self, index: int) -> list[list[Tensor]]:
        """Wait, and give what came of every owned block: flat pieces that follow one another, none empty."""
        flight = self._flights[index]
        flight.wait()
        return self._by_block(flight.bucket, flight.send if flight.receive is None else flight.receive)

    def give_back(self, index: int, updates: list[Tensor], scales: Tensor | None) -> None:
        """Start the updates of the owned blocks, times their scales, on the way back to the shards of this replica."""
        flight = self._flights[index]
        flight.send = torch.empty(sum(flight.bucket.of_shard), dtype=self.wire, device=self.device)
        by_block = self._by_block(flight.bucket, flight.send)
        targets = [part for parts in by_block for part in parts]
        sources = [
            part
            for b, update in zip(flight.bucket.owned, updates, strict=True)
            for part in update.reshape(-1).split_with_sizes([size for size in self._sizes(b) if size])
        ]
        if targets and scales is not None:
            scaled_copy(sources, targets, [len(parts) for parts in by_block], scales)
        elif targets:
            torch._foreach_copy_(targets, sources)
        self._all_to_all(flight, flight.bucket.of_shard, flight.bucket.to_shard)

    def gather(self, index: int) -> None:
        """Wait, and start the updates on the way to the other replicas."""
        flight = self._flights[index]
        flight.wait()
        # As wide on all replicas of a shard, so all of them or none take part.
        if self.layout.replicas == 1 or flight.bucket.width == 0:
            return
        mine = flight.send if flight.receive is None else flight.receive
        flight.send = torch.empty(flight.bucket.width, dtype=self.wire, device=self.device)
        flight.send[: mine.numel()].copy_(mine)
        flight.receive = torch.empty(self.layout.replicas * flight.bucket.width, dtype=self.wire, device=self.device)
        flight.work = torch.distributed.all_gather_into_tensor(
            flight.receive, flight.send, group=self.layout.replica_group, async_op=True
        )

    def close(self, index: int) -> Iterator[tuple[int, Tensor]]:
        """Wait, and give the updates of this rank's rows, flat, block by block."""
        flight = self._flights.pop(index)
        flight.wait()
        came = flight.send if flight.receive is None else flight.receive
        rows = came.view(self.layout.replicas, -1) if came.numel() else came.view(self.layout.replicas, 0)
        for block, (replica, at) in flight.bucket.place.items():
            yield block, rows[replica, at]

    def _all_to_all(self, flight: _Flight, give: Sequence[int], take: Sequence[int]) -> None:
        flight.receive = None
        if self.layout.shards == 1:
            return
        flight.receive = torch.empty(sum(take), dtype=self.wire, device=self.device)
        flight.work = torch.distributed.all_to_all_single(
            flight.receive, flight.send, list(take), list(give), group=self.layout.shard_group, async_op=True
        )

    def begins_here(self, block: int) -> bool:
        """Whether the first row of a block is one of this rank's: true on one shard, in every replica."""
        layout, whole = self.layout, self.blocks[block]
        first, last = shard_rows(whole.height, layout.shard, layout.shards)
        return first <= whole.row < last

    def _sizes(self, block: int) -> list[int]:
        return [self.blocks[block].elements_of(shard, self.layout.shards) for shard in range(self.layout.shards)]

    def _by_block(self, bucket: Bucket, flat: Tensor) -> list[list[Tensor]]:
        """Of what the shards gave, shard by shard: the rows of every owned block, in order, none empty."""
        ends = [sum(bucket.of_shard[:shard]) for shard in range(self.layout.shards)]
        pieces: list[list[Tensor]] = []
        for block in bucket.owned:
            parts = []
            for shard, size in enumerate(self._sizes(block)):
                if size:
                    parts.append(flat[ends[shard] : ends[shard] + size])
                ends[shard] += size
            pieces.append(parts)
        return pieces
