"""One training step: draw, predict, learn, average. Everything that a step changes lives in `Learner`.

A step's random numbers come from (seed, stage, step, sample position, purpose): see train/randomness.py. Nothing here
waits for the device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from prx_kernels import sample_keep, x_prediction_loss
from prx_model import flow
from prx_model.ema import EMA
from prx_model.packed_text import PackedText
from train.data.loader import Batch
from train.learner.build import Modules, build
from train.learner.optimizers import Optimizers, learning_rate_factor, named_parameters
from train.learner.teaching import TeacherLosses, build_teachers
from train.randomness import derive_seed
from train.ranks import parallel
from train.ranks.graphs import block_graphs, compile_teachers
from train.ranks.parallel import World
from train.ranks.working_copy import copies_of
from train.recipes import Recipe
from train.run.stopwatch import Stopwatch

T_BINS = 10
"""Equal parts of [0, 1] by which the loss is shown."""


@dataclass(frozen=True)
class StepResult:
    """What a step tells of this rank's samples, on the device."""

    parts: dict[str, Tensor]
    """"loss" and its parts, 0-dim."""
    norm: Tensor
    """Of the gradient over all ranks, before clipping, 0-dim."""
    losses: Tensor
    """Flow-matching loss of each sample (batch,)."""
    bins: Tensor
    """(2, T_BINS): sums of these losses by t, and how many."""


class Learner:
    """The modules that a stage trains, sharded over the ranks, with their optimizer, averages and teachers.

    Raises:
        UserError: settings that do not fit, or weights that cannot be loaded.
    """

    def __init__(self, recipe: Recipe, world: World, *, stage: int = 0) -> None:
        self.recipe, self.world, self.stage = recipe, world, stage
        graphs = block_graphs(recipe, world.device)
        prepare = partial(parallel.shard, world=world, settings=recipe.parallel, train=recipe.train, graphs=graphs)
        self.modules: Modules = build(recipe, world.device, prepare)
        teachers = build_teachers(recipe, world.device)
        parallel.shard_projectors(teachers.values(), world, recipe.parallel, recipe.train)
        compile_teachers(teachers, recipe, world.device)
        self.teaching = TeacherLosses(recipe, teachers)
        self.stopwatch = Stopwatch(world.device, nvtx=recipe.profile.nvtx)
        # A projector is trained beside the model, and is no part of what is averaged or drawn with.
        projectors = {name: teacher for name, teacher in teachers.items() if list(teacher.parameters())}
        self.trained: dict[str, nn.Module] = {**self.modules.trained(), **projectors}
        self.parameters = named_parameters(self.trained)
        self.copies = copies_of(self.trained.values())
        self.optimizers = Optimizers(self.parameters, recipe)
        averaged, ema = named_parameters(self.modules.trained()), recipe.ema
        self.ema = EMA(averaged, decay=ema.decay, every=ema.every, phase=ema.phase, ramp=ema.ramp)
        self.skipped = torch.zeros(2, dtype=torch.int64, device=world.device)
        """Steps left out because their gradient was not finite: all, and the last ones in a row."""

    def step(self, batch: Batch, number: int) -> StepResult:
        """Step `number` (0-based) of the stage, with this rank's samples; skipped where the gradient is not finite."""
        parts, losses, bins = self.backward(batch, number)
        return StepResult(parts, self.update(number), losses, bins)

    def backward(self, batch: Batch, number: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The first half of a step: leaves gradients in the parameters; gives a result's `parts`, `losses`, `bins`."""
        count = self.recipe.parallel.micro_batches
        results = []
        for i, part in enumerate(micro_batches(batch, count)):
            if self.world.mesh is not None:
                parallel.reduce_gradients(self.trained.values(), now=i + 1 == count)
            loss, parts, losses, bins = self._loss(part, number)
            with self.stopwatch.span("backward"):
                (loss / count).backward()
            results.append(({"loss": loss.detach(), **parts}, losses, bins))
        means = {name: torch.stack([parts[name] for parts, _, _ in results]).mean() for name in results[0][0]}
        for copy in self.copies:
            copy.put_back()
        losses = torch.cat([each for _, each, _ in results])
        return means, losses, torch.stack([bins for _, _, bins in results]).sum(dim=0)

    def update(self, number: int) -> Tensor:
        """The second half: clip, update and drop the gradients, average the weights; gives the norm before."""
        with self.stopwatch.span("optimizer"):
            norm = self.optimizers.step(
                learning_rate_factor(number, self.recipe.train), self.recipe.train.clip, self.copies
            )
        taken = norm.isfinite()
        self.skipped += ~taken
        self.skipped[1] *= ~taken
        with self.stopwatch.span("ema"):
            self.ema.update(number, taken)
        return norm

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this context the modules hold the averaged weights."""
        parallel.reshard(self.trained.values())
        with self.ema.swapped_in():
            try:
                yield
            finally:
                parallel.reshard(self.trained.values())

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything that a checkpoint holds, in place: name -> tensor of each module, "ema" and "optimizer"."""
        for copy in self.copies:
            copy.put_back()
        found: dict[str, dict[str, Tensor]] = {name: module.state_dict() for name, module in self.trained.items()}
        return {**found, "ema": self.ema.state_dict(), "optimizer": self.optimizers.state_dict()}

    def _loss(self, batch: Batch, number: int) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
        """Flow-matching loss of a batch (docs/recipe.md, "Objective") and what teachers add.

        Gives the sum, its parts, the flow-matching loss of each sample, and its sums by t.
        """
        recipe, settings, ids = self.recipe, self.recipe.flow, batch.positions
        image = batch.image  # uint8: scaled, and noised for the model, where it is read
        t = self._sample_t(ids, self._seed("t", number))
        with self.stopwatch.span("text"):
            encoded = self.modules.text(self._captions(batch, number))
            text, mask = (encoded, None) if isinstance(encoded, PackedText) else encoded
        keep, route = None, None
        if recipe.routing.enabled:
            tokens = recipe.model.tokens(*image.shape[2:])
            keep = sample_keep(ids, tokens, recipe.routing.selection_ratio, seed=self._seed("keep", number))
            route = (recipe.routing.start, recipe.routing.end)
        layer = recipe.repa.layer if "repa" in self.teaching.teachers else None
        with self.stopwatch.span("denoiser"):
            out: Any = self.modules.model.forward_tokens(
                image, t, text, mask, keep=keep, route=route, feature_layer=cast(Any, layer),
                noise_seed=self._seed("noise", number), sample_ids=ids, noise_scale=settings.noise_scale,
            )  # fmt: skip
            predicted, features = (out, None) if layer is None else out
            loss, losses = x_prediction_loss(
                predicted, image, t, recipe.model.patch_size, t_min=settings.t_min, reduction="both"
            )
        bins = _by_t(losses, t)
        if not self.teaching.teachers:
            return loss, {}, losses, bins
        inside = route is not None and layer is not None and route[0] <= layer <= route[1]
        host_t = None
        if self.teaching.needs_host_t:
            host_t = self._sample_t(batch.host_positions, self._host_seed("t", number))
        added, parts = self.teaching(batch, predicted, features, keep if inside else None, host_t, self.stopwatch)
        named = {"loss/flow": loss.detach(), **{f"loss/{name}": part for name, part in parts.items()}}
        return loss + added, named, losses, bins

    def _sample_t(self, ids: Tensor, seed: Tensor) -> Tensor:
        settings = self.recipe.flow
        return flow.sample_t(
            seed, ids, shift=settings.shift, uniform_fraction=settings.uniform_fraction, t_floor=settings.t_floor
        )

    def _captions(self, batch: Batch, number: int) -> list[str]:
        """Captions with some dropped; drawn on the host, where the captions are."""
        rate = self.recipe.flow.caption_drop
        dropped = flow.drop_captions(self._host_seed("drop", number), batch.host_positions, rate)
        return ["" if drop else text for drop, text in zip(dropped.tolist(), batch.captions, strict=True)]

    def _host_seed(self, purpose: str, number: int) -> Tensor:
        value = derive_seed(self.recipe.train.seed, stage=self.stage, step=number, purpose=purpose)
        return torch.tensor(value, dtype=torch.int64)

    def _seed(self, purpose: str, number: int) -> Tensor:
        return self._host_seed(purpose, number).to(self.world.device, non_blocking=True)


def _by_t(losses: Tensor, t: Tensor) -> Tensor:
    """`StepResult.bins` of the losses (batch,) of samples at t."""
    return loss_sums(losses, (t * T_BINS).long().clamp(max=T_BINS - 1), T_BINS)


def loss_sums(losses: Tensor, places: Tensor, count: int) -> Tensor:
    """(2, count): sums of losses (batch,) by their places 0 … count - 1 (batch,), and how many."""
    rows = (places[:, None] == torch.arange(count, device=places.device)).to(losses.dtype)
    # In a fixed order. A loss that is not finite would otherwise reach every bin as 0 · NaN.
    sums = torch.where(rows > 0, losses[:, None], 0.0).sum(dim=0)
    return torch.stack([sums, rows.sum(dim=0)])


def micro_batches(batch: Batch, count: int) -> Iterator[Batch]:
    """A batch in `count` parts of one size, in order."""
    size = len(batch.captions) // count
    for first in range(0, size * count, size):
        rows = slice(first, first + size)
        yield replace(
            batch,
            image=batch.image[rows],
            captions=batch.captions[rows],
            positions=batch.positions[rows],
            host_positions=batch.host_positions[rows],
        )
