"""One case in one form on a pretended GPU, forward and backward; and which forms are gone through."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from unittest.mock import patch

import torch

from .backward import gradients
from .cases import CASES, SMALL, Case
from .inputs import Inputs, differentiable
from .pretended_gpu import PretendedGPU
from .recorder import Launch

# How a backward can run: its graph is freed behind it, or kept for another one, or a compiler records it.
WAYS = ("freed", "kept", "traced")


@dataclass(frozen=True)
class Run:
    """A case at a size, with dtypes and a layout; `way` is how its backward runs."""

    case: Case
    size: str
    dtypes: tuple[torch.dtype, torch.dtype]
    layout: str = "dense"
    way: str = "freed"
    device: str = "cuda:0"

    def __str__(self) -> str:
        dtypes = " with ".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(self.dtypes))
        return f"{self.case}, {self.size}, {dtypes}, {self.layout}, {self.way}, {self.device}"

    @property
    def is_recipe(self) -> bool:
        """Whether PRX launches this in training: its sizes, its dtypes."""
        return self.size.startswith("recipe")

    def on(self, gpu: PretendedGPU) -> None:
        """Run it; `gpu` keeps what is launched.

        Raises:
            AssertionError: a gradient is missing, or of another shape, dtype or device than its tensor.
            Exception: whatever a launcher raises, LaunchRefused and FakeDisagrees among them.
        """
        make = Inputs(*self.dtypes, layout=self.layout, device=self.device, real=False)
        outputs = differentiable(self.case.call(make, *self.case.sizes[self.size]))
        with _way(self.way):
            found = gradients(outputs, [make.incoming(x) for x in outputs], make.leaves)
        for leaf, grad in zip(make.leaves, found, strict=True):
            assert grad is not None, f"a tensor of shape {tuple(leaf.shape)} got no gradient"
            facts = [(tuple(x.shape), x.dtype, x.device) for x in (grad, leaf)]
            assert facts[0] == facts[1], f"the gradient of {facts[1]} is {facts[0]}"


def _way(way: str) -> ExitStack:
    stack = ExitStack()
    keeps = torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: way == "kept"
    stack.enter_context(patch.object(*keeps, create=True))
    if way == "traced":
        stack.enter_context(patch.object(torch.compiler, "is_compiling", lambda: True))
    return stack


# --- which -------------------------------------------------------------------------------------------------------


def runs_of(case: Case, arch: int) -> Iterator[Run]:
    """Every size on every architecture; dtypes and layouts against one another on sm_90, where most is trained."""
    first, *others = case.dtypes
    for size in case.sizes:
        yield Run(case, size, first)
    for way in WAYS[1:]:
        yield Run(case, "aligned", first, way=way)
    # Tables and architectures know the width of numbers; kinds of one width are told apart once, on sm_90.
    widths = {tuple(dtype.itemsize for dtype in dtypes): dtypes for dtypes in reversed(others)}
    for dtypes in others if arch == 90 else widths.values():
        yield Run(case, "aligned", dtypes)
    if arch != 90:
        return
    yield Run(case, "aligned", first, device="cuda:1")
    for size in SMALL[:2]:
        for layout in case.layouts:
            yield Run(case, size, first, layout)
    for number, dtypes in enumerate(others):  # each dtype in some of the layouts, each layout with some of the dtypes
        for step in range(2):
            yield Run(case, "ragged", dtypes, case.layouts[(2 * number + step + 1) % len(case.layouts)])


@dataclass
class Sweep:
    """What all runs on one architecture came to.

    Attributes:
        failures: of each run that failed, what and why.
        launches: one of each compiled kernel, and the run that launched it; one of the recipe's sizes where one did.
        ops: that ran.
    """

    failures: list[str] = field(default_factory=list)
    launches: dict[tuple[object, ...], tuple[Run, Launch]] = field(default_factory=dict)
    ops: set[str] = field(default_factory=set)


@cache
def sweep(arch: int) -> Sweep:
    """Every run on one architecture, made once a process."""
    made = Sweep()
    logger = logging.getLogger("torch._subclasses.fake_tensor")  # it logs each error beside raising it
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with PretendedGPU(arch) as gpu:
            for case in CASES:
                for run in dict.fromkeys(runs_of(case, arch)):
                    try:
                        run.on(gpu)
                    except Exception as error:
                        made.failures.append(f"{run}: {type(error).__name__}: {error}")
                    for launch in gpu.launches:
                        if launch.build_key not in made.launches or run.is_recipe:
                            made.launches[launch.build_key] = run, launch
                    gpu.launches.clear()
        made.ops = gpu.ops
    finally:
        logger.setLevel(level)
    return made
