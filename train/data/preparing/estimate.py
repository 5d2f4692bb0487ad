"""How long preparing would take and how much disk, from a sample of the data."""

import time
from collections.abc import Iterator

import numpy as np

from train.data.preparing.pictures import REASONS, Maker
from train.data.preparing.plan import Plan
from train.data.preparing.settings import Prepare


def estimate(plan: Plan, workers: int) -> Iterator[str]:
    """Lines about what a plan would do, from `sample` rows of each source, spread over it."""
    settings: Prepare = plan.settings
    maker, seconds, rows = Maker(settings), 0.0, 0
    kept = dict.fromkeys(settings.sizes, 0.0)
    size = dict.fromkeys(settings.sizes, 0.0)
    looked = 0
    dropped: dict[str, int] = {}
    for source in plan.sources:
        count = min(settings.sample, len(source.index))
        rows += len(source.index)
        share = len(source.index) / count
        for row in np.linspace(0, len(source.index) - 1, count).astype(int).tolist():
            began = time.process_time()
            outcome = maker.make(source, row)
            seconds += (time.process_time() - began) * share
            looked += 1
            for side, made in outcome.made.items():
                kept[side] += share
                size[side] += len(made.content) * share
                size[side] += sum(len(text.encode(errors="replace")) for _, text in outcome.captions) * share
            for side, reason in outcome.dropped.items():
                if side == settings.sizes[0]:
                    dropped[reason] = dropped.get(reason, 0) + 1
    yield f"{rows:,} rows in {len(plan.sources)} sources, {len(plan.units):,} units of work; {looked:,} were made"
    for side in settings.sizes:
        yield f"  {side} px: about {kept[side]:,.0f} kept, {size[side] / 1e6:,.1f} MB in {plan.out / str(side)}"
    reasons = [f"{dropped[reason]} {reason}" for reason in REASONS if reason in dropped]
    if reasons:
        yield f"  of the {looked:,}, at {settings.sizes[0]} px dropped: {', '.join(reasons)}"
    hours = seconds / 3600
    yield (
        f"  {seconds / max(rows, 1) * 1000:.1f} ms a row on a core of this machine, so {hours:.2f} core hours: "
        f"{hours / workers:.2f} h with {workers} workers here; duplicates are not counted"
    )
