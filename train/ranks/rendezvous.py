"""A key-value store for a process group that holds nothing of an earlier start of the same run.

torchrun starts its processes again after a failure, but may give them the store of the start before: addresses of
processes that are gone, which a new group would wait for (torch 2.15, c10d rendezvous; how often each node has started
its processes need not agree between nodes, so that number is no name for a start either). The ranks therefore agree on
a name that no start had before, and use only keys below it.
"""

import os
import time
from datetime import timedelta
from uuid import uuid4

import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

_POLL = 0.02


def fresh_store(timeout: timedelta) -> Store:
    """The store that torchrun's environment names, below a prefix of this start's own; on every rank.

    Raises:
        RuntimeError: not all ranks came within the time.
    """
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=timeout)))  # type: ignore[attr-defined]
    if "TORCHELASTIC_RUN_ID" not in os.environ or size == 1:
        return store
    return PrefixStore(agree_on_name(PrefixStore("starts", store), rank, size, timeout), store)


def agree_on_name(store: Store, rank: int, size: int, timeout: timedelta) -> str:
    """A name that is new and the same on all ranks, from a store that may hold what earlier starts wrote.

    Each rank writes a word of its own, new every time, and waits for rank 0's answer to that very word: an old answer
    cannot be taken for it. Rank 0 answers whatever words it finds, old ones too, until all ranks have said that they
    have its name.
    """
    end = time.monotonic() + timeout.total_seconds()
    word = uuid4().hex
    if rank:
        store.set(f"hello/{rank}", word)
        _wait(store, f"answer/{word}", end)
        name = store.get(f"answer/{word}").decode()
        store.set(f"got/{name}/{rank}", "1")
        return name
    missing = set(range(1, size))
    answered: set[str] = set()
    while missing:
        for other in sorted(missing):
            if store.check([f"hello/{other}"]):
                its_word = store.get(f"hello/{other}").decode()
                if its_word not in answered:
                    store.set(f"answer/{its_word}", word)
                    answered.add(its_word)
            if store.check([f"got/{word}/{other}"]):
                missing.discard(other)
        if time.monotonic() > end:
            raise RuntimeError(f"ranks {sorted(missing)} did not start within {timeout.total_seconds():.0f} s")
        time.sleep(_POLL)
    return word


def _wait(store: Store, key: str, end: float) -> None:
    while not store.check([key]):
        if time.monotonic() > end:
            raise RuntimeError("rank 0 did not answer in time: it has not started, or has ended")
        time.sleep(_POLL)
