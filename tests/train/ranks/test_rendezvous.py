"""Ranks agree on a name for a start, whatever earlier starts left in the store."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from torch.distributed import HashStore, Store

from train.ranks.rendezvous import agree_on_name

SOON = timedelta(seconds=20)


def start(store: Store, order: list[int], delay: float = 0.0) -> list[str]:
    """Names that ranks find, started in an order, with a pause between them."""
    names: dict[int, str] = {}

    def one(rank: int) -> None:
        names[rank] = agree_on_name(store, rank, len(order), SOON)

    threads = []
    for rank in order:
        threads.append(threading.Thread(target=one, args=(rank,)))
        threads[-1].start()
        threads[-1].join(delay)
    for thread in threads:
        thread.join()
    return [names[rank] for rank in range(len(order))]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
def test_all_ranks_have_one_name_and_every_start_another(order: list[int]) -> None:
    store = HashStore()
    names = [start(store, order, delay=0.1) for _ in range(3)]
    assert all(len(set(found)) == 1 for found in names)
    assert len({found[0] for found in names}) == 3


def test_words_of_ranks_that_died_early_do_not_count() -> None:
    """Rank 1 of an earlier start wrote its word and died; rank 0 finds it before the new rank 1 comes."""
    store = HashStore()
    store.set("hello/1", "of a rank that is gone")
    assert len(set(start(store, [0, 1], delay=0.3))) == 1


def test_a_rank_that_never_comes_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"ranks \[1, 2\] did not start within 0 s"):
        agree_on_name(HashStore(), 0, 3, timedelta(seconds=0.2))
    with pytest.raises(RuntimeError, match="rank 0 did not answer"):
        agree_on_name(HashStore(), 1, 3, timedelta(seconds=0.2))
