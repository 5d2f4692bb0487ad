"""What the absent GPU sees of a small step, as it is and with faults brought back on purpose.

`python -m tests.benchmarks.absent_gpu.seen` under the stand-ins (`libraries.environment`); prints JSON, a key a case:
the sentences in which a step with that fault is over the budget of the sound one, or the error that it dies of.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.absent_gpu import budget, builds, report, trainer
from prx_kernels import launch
from prx_kernels.launch import Config
from prx_kernels.newton_schulz import symmetric_kernels
from prx_model.layers import PRXBlock
from prx_model.transformer import PRXTransformer
from train.learner.step import Learner
from train.recipes import Recipe

SETTING = trainer.Setting("prx-512", batch=2, small=True)


def tiny() -> Recipe:
    """The recipe's step without its teachers, a seventh as wide."""
    recipe = SETTING.recipe
    off: dict[str, Any] = {name: replace(getattr(recipe, name), enabled=False) for name in ("repa", "lpips", "pdino")}
    model = replace(recipe.model, hidden_size=256, num_heads=4, bottleneck_size=64, depth=3)
    return replace(recipe, **off, model=model, routing=replace(recipe.routing, start=1, end=1))


def facts(*, compiled: bool = True) -> dict[str, Any]:
    """A counted step of `tiny`."""
    torch._dynamo.reset()
    recipe = tiny()
    if not compiled:
        recipe = replace(recipe, compile=replace(recipe.compile, enabled="no"))
    step = trainer.count(SETTING, recipe)
    return report.facts(step, builds.build_all(step.compiled, step.calls, every=False))


# --- faults, each of which was made once, or nearly ------------------------------------------------------------------


@contextmanager
def a_table_read_where_it_has_no_row() -> Iterator[None]:
    """`table.get(here, table[0])` looks up table[0] in any case, and descriptors' tables have none."""

    def tuned(table: Any, size: int, device: torch.device) -> Config:
        rows = table.get(launch.capability(device), table[0])
        return next(config for limit, config in rows if size <= limit)

    with patch.object(symmetric_kernels, "tuned", tuned):
        yield


@contextmanager
def a_graph_break() -> Iterator[None]:
    forward = PRXBlock.forward

    def broken(self: Any, *arguments: Any) -> Any:
        torch._dynamo.graph_break()
        return forward(self, *arguments)

    with patch.object(PRXBlock, "forward", broken):
        yield


@contextmanager
def a_float32_copy_of_the_activations() -> Iterator[None]:
    forward = PRXTransformer.forward_tokens

    def widened(self: Any, *arguments: Any, **keywords: Any) -> Any:
        out = forward(self, *arguments, **keywords)
        return out.float().to(out.dtype)

    with patch.object(PRXTransformer, "forward_tokens", widened):
        yield


@contextmanager
def a_tile_that_spills() -> Iterator[None]:
    rows = ((2**31 - 1, symmetric_kernels._tile_config(256, 256, 64, 8, 3)),)
    with patch.dict(symmetric_kernels.TMA, {90: rows}):
        yield


@contextmanager
def a_value_read_back() -> Iterator[None]:
    update = Learner.update

    def waiting(self: Any, number: int) -> Any:
        norm = update(self, number)
        if not norm.isfinite():
            raise RuntimeError("not finite")
        return norm

    with patch.object(Learner, "update", waiting):
        yield


def case(fault: Callable[[], Any], allowed: str, *, compiled: bool = True) -> list[str]:
    """What is said of a step with a fault."""
    with fault():
        try:
            return budget.over(facts(compiled=compiled), allowed)
        except Exception as error:
            return [f"{type(error).__name__}: {error}".splitlines()[0]]


def main() -> None:
    sound = facts()
    allowed = budget.text(sound)
    eager = budget.text(facts(compiled=False))
    seen = {
        "sound": budget.over(facts(compiled=False), eager),
        "table": case(a_table_read_where_it_has_no_row, eager, compiled=False),
        "graph break": case(a_graph_break, allowed),
        "float32": case(a_float32_copy_of_the_activations, eager, compiled=False),
        "spill": case(a_tile_that_spills, eager, compiled=False),
        "wait": case(a_value_read_back, eager, compiled=False),
    }
    print(json.dumps({"figures": budget.figures(sound), "seen": seen}))


if __name__ == "__main__":
    main()
