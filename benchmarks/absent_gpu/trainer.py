"""The trainer's own step (`train.learner.step.Learner`) on the absent GPU: run twice, counted the second time.

What stands in for what the machine lacks: a process group that sends nothing (torch's fake one), a text cache whose
embeddings are on the device already, teachers with random weights. All else is the trainer's.
"""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.absent_gpu.inductor import Compiled, installed
from benchmarks.absent_gpu.launchers import Call
from benchmarks.absent_gpu.recorder import Launch, Recorder
from benchmarks.sizes import text_lengths
from prx_model.packed_text import PackedText, pack
from prx_model.teachers import Teacher
from train import commandline
from train.checkpoint.checkpointer import Checkpointer
from train.data.loader import Batch
from train.learner import build
from train.learner import step as training_step
from train.learner.step import Learner
from train.learner.teaching import build_teachers
from train.ranks import parallel
from train.ranks.parallel import World
from train.recipes import Recipe
from train.run import stopwatch

DEVICE = torch.device("cuda", 0)
FILL = 0.4
"""Share of a caption's 256 tokens that is text."""
SMALL_DEPTH = 4
"""Blocks of the denoiser and of each vision teacher in the small form; all widths stay."""


@dataclass(frozen=True)
class Setting:
    """Which step is counted."""

    preset: str
    batch: int
    """Pictures on one rank."""
    ranks: int = 1
    nodes: int = 1
    small: bool = False
    words: tuple[str, ...] = ()
    """Settings of the recipe as speedrun.py takes them; the preset's without."""

    @property
    def recipe(self) -> Recipe:
        """The preset with random teachers, at this batch.

        Raises:
            UserError: a setting that does not fit.
        """
        made = commandline.parse([self.preset, *self.words]).recipe
        assert isinstance(made, Recipe)
        teachers = {name: replace(getattr(made, name), weights="random") for name in ("repa", "lpips", "pdino")}
        made = replace(made, **teachers, train=replace(made.train, batch=self.batch * self.ranks))
        made = replace(made, text=replace(made.text, cache="absent"))
        if not self.small:
            return made
        return replace(
            made,
            model=replace(made.model, depth=SMALL_DEPTH),
            routing=replace(made.routing, start=1, end=SMALL_DEPTH - 2),
            repa=replace(made.repa, layer=1),
        )


@dataclass
class Counted:
    """What a step launches, holds and compiles."""

    setting: Setting
    launches: list[Launch]
    occasional: dict[str, list[Launch]]
    """Launches of what does not happen in every step, by name."""
    peak: int
    """Bytes of device memory, of the training state and everything that a step makes."""
    state: int
    """Bytes alive between steps."""
    at_peak: list[tuple[str, str, int, int]]
    """See `memory.Memory.at_peak`."""
    waits: dict[str, int]
    compiled: Compiled
    calls: list[Call] = field(default_factory=list)
    """Kernels of ours that were launched, each build once."""


def count(setting: Setting, recipe: Recipe | None = None) -> Counted:
    """Build a learner, the preset's unless a recipe is given, and count its second step.

    The process must have been started with the stand-ins (`libraries.restart`).

    The first step compiles. The next one that moves the averages and a checkpoint's copy to the host come by
    themselves: they do not happen in every step.
    """
    recipe = recipe or setting.recipe
    recorder, world = Recorder(), _world(setting)
    with _stand_ins(recorder, setting) as compiled:
        learner = Learner(recipe, world)
        batch = _batch(recipe, setting.batch)
        steps = {}
        for number in (0, 1):
            recorder.clear()
            compiled.host_kernels.clear()
            with recorder.span("step"):
                learner.step(batch, number)
            steps[number] = list(recorder.launches)
        recorder.count_library_waits()
        counted = Counted(
            setting, steps[1], {}, recorder.memory.peak, 0, recorder.memory.at_peak(), dict(recorder.waits), compiled
        )
        counted.state = recorder.memory.live
        recorder.clear()
        learner.ema.update(learner.ema.first_step, torch.ones((), dtype=torch.bool, device=DEVICE))
        counted.occasional[f"averages, every {recipe.ema.every} steps"] = list(recorder.launches)
        recorder.clear()
        live = {f"{part}/{name}": x for part, held in learner.tensors().items() for name, x in held.items()}
        Checkpointer._copy_to_host(SimpleNamespace(_buffers={}), live)  # type: ignore[arg-type]
        counted.occasional[f"checkpoint's copy, every {recipe.checkpoint.every} steps"] = list(recorder.launches)
        counted.calls = list(recorder.calls.values())
    return counted


# --- stand-ins -------------------------------------------------------------------------------------------------------


@contextmanager
def _stand_ins(recorder: Recorder, setting: Setting) -> Iterator[Compiled]:
    with ExitStack() as stack:
        enter = stack.enter_context
        compiled = enter(installed(recorder))
        enter(patch.object(training_step, "build_teachers", _teachers(setting)))
        enter(patch.object(build, "CachedText", _Captions))
        enter(patch.object(build, "pack", _packed))
        enter(patch.object(stopwatch.Stopwatch, "span", lambda _, name: recorder.span(name)))
        # Which captions are dropped is decided on the host, from numbers that fake tensors do not have.
        enter(patch.object(Learner, "_captions", lambda self, batch, number: batch.captions))
        if setting.ranks == 1:  # torch cannot swap plain fake tensors for those of another device
            enter(patch.object(build, "make_empty", lambda module, device: _fake(module, None)))
        resize = torch.UntypedStorage.resize_

        def resized(storage: Any, size: int) -> Any:
            out = resize(storage, size)
            recorder.memory.resized(storage)
            return out

        enter(patch.object(torch.UntypedStorage, "resize_", resized))
        enter(FakeTensorMode())
        enter(recorder)
        try:
            yield compiled
        finally:
            parallel.finish()


def _world(setting: Setting) -> World:
    if setting.ranks == 1:
        return World(0, 1, DEVICE)
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=setting.ranks)
    per_node = max(setting.ranks // setting.nodes, 1)
    replicate, shard = parallel.mesh_shape(setting.recipe.parallel, setting.ranks, per_node)
    shape, names = ((shard,), ("shard",)) if replicate == 1 else ((replicate, shard), ("replicate", "shard"))
    return World(0, setting.ranks, DEVICE, init_device_mesh("cuda", shape, mesh_dim_names=names))


class _Captions:
    """In the place of the text cache."""

    def __init__(self, *_: Any) -> None:
        self.width = 2304

    def encode(self, captions: list[str]) -> tuple[Tensor, list[int]]:
        return torch.empty(0, self.width), text_lengths(len(captions), 256, FILL)


def _packed(tokens: Tensor, lengths: list[int]) -> PackedText:
    """Packed on the host, where places are found by their numbers; only then as on the absent GPU."""
    with unset_fake_temporarily():
        made = pack(torch.empty(sum(lengths), tokens.shape[1], dtype=torch.bfloat16), lengths)
    return PackedText(*(torch.empty(x.shape, dtype=x.dtype, device=DEVICE) for x in made))


def _batch(recipe: Recipe, size: int) -> Batch:
    image = torch.empty(size, 3, recipe.data.height, recipe.data.width, dtype=torch.uint8, device=DEVICE)
    places = torch.arange(size)
    return Batch(image, [""] * size, places.to(DEVICE, non_blocking=True), places)


def _teachers(setting: Setting) -> Any:
    """Random networks, made on the CPU for real: timm reads numbers while it builds them."""
    import timm

    create = timm.create_model

    def shallow(name: str, **settings: Any) -> Any:
        return create(name, **settings, **({"depth": SMALL_DEPTH} if setting.small else {}))

    def make(recipe: Recipe, device: torch.device) -> dict[str, Teacher]:
        with unset_fake_temporarily(), warnings.catch_warnings(), patch.object(timm, "create_model", shallow):
            warnings.simplefilter("ignore")
            made = build_teachers(recipe, torch.device("cpu"))
        for teacher in made.values():
            teacher.dtype = torch.bfloat16
            _fake(teacher.network, torch.bfloat16)
            _fake(teacher, None)
        return made

    return make


def _fake(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Move a module to the absent GPU, where tensors have no numbers; floating ones to `dtype`."""
    for part in module.modules():
        holders: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for held in holders:
            for name, x in held.items():
                if x is not None:
                    wanted = dtype if dtype is not None and x.is_floating_point() else x.dtype
                    moved = torch.empty(x.shape, dtype=wanted, device=DEVICE)
                    held[name] = nn.Parameter(moved, x.requires_grad) if isinstance(x, nn.Parameter) else moved
