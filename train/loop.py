"""The training loop: draw, predict, learn, average; evaluate, save and stop on the way.

A step's random numbers come from (seed, stage, step, sample position, purpose): see train/randomness.py.
"""

import signal
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prx_kernels import sample_keep, x_prediction_loss
from prx_model import flow
from prx_model.ema import EMA
from prx_model.packed_text import PackedText
from train import checkpoint, evaluate
from train.build import Modules, build
from train.data.loader import Batch, batches, fingerprint, open_dataset, open_validation
from train.distances import Distances
from train.errors import UserError
from train.meter import Meter
from train.metrics import Display, Metrics, drop_metrics_after
from train.optimizers import Optimizers, clip_gradients, learning_rate_factor, named_parameters
from train.parallel import (
    World,
    any_rank,
    average_gradients,
    compile_blocks,
    compile_teachers,
    precision,
    replica_mesh,
)
from train.pictures import save_grid
from train.randomness import derive_seed
from train.recipes import Recipe
from train.run_folder import CONFIG, SAMPLES, check_same_run, run_folder, write_config
from train.stages import carry_over
from train.stopwatch import Stopwatch
from train.teaching import TeacherLosses, build_teachers

_LOG_EVERY = 10
"""Steps between two readings of the loss: the host waits for the device only then."""


@dataclass(frozen=True)
class Outcome:
    """How a start of a run ended."""

    folder: Path
    step: int
    finished: bool
    """False where a signal stopped it; the same command goes on."""
    scores: dict[str, float]
    grid: Path | None


class Trainer:
    """One stage of a run, in one process of possibly many; `previous` is the folder of the stage before it.

    Raises:
        UserError: settings, data or a run's folder that do not fit; nothing is overwritten then.
    """

    def __init__(self, recipe: Recipe, world: World, *, stage: int = 0, previous: Path | None = None) -> None:
        self.recipe, self.world, self.stage = recipe, world, stage
        self.folder = run_folder(recipe)
        if recipe.train.batch % world.size:
            raise UserError(f"train.batch {recipe.train.batch} must be a multiple of the {world.size} ranks")
        fresh = not (self.folder / CONFIG).exists()
        if not fresh:
            check_same_run(self.folder, recipe)
        self.dataset = open_dataset(recipe.data, recipe.train.seed, recipe.model.patch_size)
        self.validation = open_validation(recipe.data, recipe.model.patch_size)
        self.distances = self._open_distances() if world.is_main else None
        self.modules: Modules = build(recipe, world.device)
        teachers = build_teachers(recipe, world.device)
        self.teaching = TeacherLosses(recipe, teachers)
        self.stopwatch = Stopwatch(world.device)
        # A projector is trained beside the model, and is no part of what is averaged or drawn with.
        projectors = {name: teacher for name, teacher in teachers.items() if list(teacher.parameters())}
        self.trained: dict[str, nn.Module] = {**self.modules.trained(), **projectors}
        self.parameters = named_parameters(self.trained)
        self.optimizers = Optimizers(self.parameters, recipe, replica_mesh(world))
        averaged = named_parameters(self.modules.trained())
        self.ema = EMA(averaged, decay=recipe.ema.decay, every=recipe.ema.every)
        self.first_position = 0
        self.step = 0 if fresh else self._resume()
        if self.step == 0 and previous is not None:
            self.first_position = carry_over(previous, self.trained, self.ema, self.optimizers)
        compile_blocks(self.modules.model.blocks, recipe.compile, world.device)
        compile_teachers(teachers.values(), recipe.compile, world.device)
        self._stop = False

    def _open_distances(self) -> Distances | None:
        """The networks that measure distances, before any step is made: a missing file should not show hours later."""
        settings = self.recipe.evaluation
        if not (settings.fid or settings.cmmd or settings.dino_mmd):
            return None
        if self.validation is None:
            raise UserError(
                f"evaluation.fid, cmmd and dino_mmd compare with validation pictures, and the data at "
                f"{self.recipe.data.path} have no split 'val'; add one or leave them off"
            )
        if min(len(self.validation), settings.samples) < 2:
            raise UserError(
                "evaluation.fid, cmmd and dino_mmd need at least 2 pictures, got "
                f"{len(self.validation)} in the split 'val' and evaluation.samples {settings.samples}"
            )
        return Distances(settings, self.world.device)

    def run(self) -> Outcome:
        """Train to the last step, or until SIGINT or SIGTERM; then evaluate, unless stopped."""
        recipe, settings = self.recipe, self.recipe.train
        if self.world.is_main:
            write_config(self.folder, recipe)
            drop_metrics_after(self.folder, self.step)
        handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        metrics = Metrics(self.folder, enabled=self.world.is_main)
        scores: dict[str, float] = {}
        grid: Path | None = None
        try:
            with Display(settings.steps, self.step, enabled=self.world.is_main) as display:
                meter = Meter(recipe, self.world)
                if self.teaching.teachers and self.world.is_main:
                    flop = self.teaching.flop_per_image()
                    metrics.log(self.step, {f"flop/{name}_per_image": count for name, count in flop.items()})
                for batch in batches(self.dataset, recipe, self.world, self.step, self.first_position):
                    parts, norm = self._train_step(batch)
                    self.step += 1
                    meter.add(parts, norm)
                    if self.step % _LOG_EVERY == 0 or self.step == settings.steps:
                        values = meter.read() | self.stopwatch.read(_LOG_EVERY)
                        values["train/lr_factor"] = self._factor(self.step - 1)
                        values["train/skipped_updates"] = self.optimizers.skipped()
                        metrics.log(self.step, values)
                        display.update(self.step, meter.shown(values))
                    stopping = any_rank(self._stop, self.world)
                    if stopping or self.step % recipe.checkpoint.every == 0 or self.step == settings.steps:
                        self._save()
                    if stopping:
                        break
                    if self.step % recipe.evaluation.every == 0 and self.step < settings.steps:
                        _, grid = self._evaluate(metrics, display, final=False)
                        meter.restart()
                if self.step >= settings.steps:
                    scores, grid = self._evaluate(metrics, display, final=True)
        finally:
            metrics.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return Outcome(self.folder, self.step, self.step >= settings.steps, scores, grid)

    def _train_step(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """One optimizer step; gives the loss with its parts, and the gradient's norm, as tensors on the device."""
        factor = self._factor(self.step)
        with precision(self.recipe.train, self.world.device):
            loss, parts = self._loss(batch)
        with self.stopwatch.span("backward"):
            loss.backward()
        trained = [parameter for _, parameter in self.parameters]
        average_gradients(trained, self.world)
        with self.stopwatch.span("optimizer"):
            norm = clip_gradients(trained, self.recipe.train.clip)
            self.optimizers.step(factor)
            self.ema.update(self.step)
        return {"loss": loss.detach(), **parts}, norm

    def _loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Flow-matching loss of a batch (RECIPE.md, "Objective") and what teachers add; the sum, and its parts."""
        recipe, settings, ids = self.recipe, self.recipe.flow, batch.positions
        image = batch.image  # uint8: scaled, and noised for the model, where it is read
        t = self._sample_t(ids, self._seed("t"))
        with self.stopwatch.span("text"):
            encoded = self.modules.text(self._captions(batch))
            text, mask = (encoded, None) if isinstance(encoded, PackedText) else encoded
        keep, route = None, None
        if recipe.routing.enabled:
            tokens = recipe.model.tokens(*image.shape[2:])
            keep = sample_keep(ids, tokens, recipe.routing.selection_ratio, seed=self._seed("keep"))
            route = (recipe.routing.start, recipe.routing.end)
        layer = recipe.repa.layer if "repa" in self.teaching.teachers else None
        with self.stopwatch.span("denoiser"):
            out: Any = self.modules.model.forward_tokens(
                image, t, text, mask, keep=keep, route=route, feature_layer=cast(Any, layer),
                noise_seed=self._seed("noise"), sample_ids=ids, noise_scale=settings.noise_scale,
            )  # fmt: skip
            predicted, features = (out, None) if layer is None else out
            loss = x_prediction_loss(predicted, image, t, recipe.model.patch_size, t_min=settings.t_min)
        if not self.teaching.teachers:
            return loss, {}
        inside = route is not None and layer is not None and route[0] <= layer <= route[1]
        host_t = self._sample_t(batch.host_positions, self._host_seed("t")) if self.teaching.needs_host_t else None
        added, parts = self.teaching(batch, predicted, features, keep if inside else None, host_t, self.stopwatch)
        return loss + added, {"loss/flow": loss.detach(), **{f"loss/{name}": part for name, part in parts.items()}}

    def _sample_t(self, ids: Tensor, seed: Tensor) -> Tensor:
        settings = self.recipe.flow
        return flow.sample_t(
            seed, ids, shift=settings.shift, uniform_fraction=settings.uniform_fraction, t_floor=settings.t_floor
        )

    def _captions(self, batch: Batch) -> list[str]:
        """Captions with some dropped; drawn on the host, where the captions are."""
        dropped = flow.drop_captions(self._host_seed("drop"), batch.host_positions, self.recipe.flow.caption_drop)
        return ["" if drop else text for drop, text in zip(dropped.tolist(), batch.captions, strict=True)]

    def _host_seed(self, purpose: str) -> Tensor:
        value = derive_seed(self.recipe.train.seed, stage=self.stage, step=self.step, purpose=purpose)
        return torch.tensor(value, dtype=torch.int64)

    def _seed(self, purpose: str) -> Tensor:
        return self._host_seed(purpose).to(self.world.device, non_blocking=True)

    def _factor(self, step: int) -> float:
        return learning_rate_factor(step, self.recipe.train)

    def _evaluate(self, metrics: Metrics, display: Display, *, final: bool) -> tuple[dict[str, float], Path | None]:
        """Grid, held-out loss, distances and (at the end) prompt accuracy, on rank 0; the others wait.

        "ema/…" and "raw/…" say which weights; grid and prompt accuracy are of the averaged ones.
        """
        scores: dict[str, float] = {}
        grid: Path | None = None
        if self.world.is_main:
            raw = self.recipe.evaluation.raw
            with precision(self.recipe.train, self.world.device):
                with self.ema.swapped_in():
                    prompts = evaluate.grid_prompts(self.recipe, self.validation)
                    if prompts:
                        grid = self.folder / SAMPLES / f"step-{self.step:08d}.png"
                        save_grid(evaluate.draw(self.modules, prompts, self.recipe), prompts, grid)
                        metrics.picture(self.step, "samples", grid)
                    scores |= self._measure("ema", distances=True)
                    if final and self.recipe.data.kind in ("shapes", "scenes"):
                        display.say("scoring held-out prompts …")
                        scores |= evaluate.prompt_accuracy(self.modules, self.recipe)
                if raw != "no":
                    scores |= self._measure("raw", distances=raw == "all")
            metrics.log(self.step, {f"eval/{name}": value for name, value in scores.items()})
        if self.world.size > 1:
            dist.barrier()
        return scores, grid

    def _measure(self, weights: str, *, distances: bool) -> dict[str, float]:
        """Held-out loss, and the distances that the recipe asks for, of the weights that the modules hold now."""
        if self.validation is None:
            return {}
        found = evaluate.held_out_loss(self.modules, self.validation, self.recipe)
        if distances and self.distances is not None:
            found |= evaluate.distances(self.modules, self.validation, self.recipe, self.distances)
        return {f"{weights}/{name}": value for name, value in found.items()}

    def _save(self) -> None:
        """Save on rank 0 (all ranks hold the same); the others wait, so that none runs ahead of a stop."""
        if self.world.is_main:
            tensors = {name: module.state_dict() for name, module in self.trained.items()}
            tensors |= {"ema": self.ema.state_dict(), "optimizer": self.optimizers.state_dict()}
            state = {
                "fingerprint": fingerprint(self.dataset),
                "stage": self.stage,
                "first_position": self.first_position,
                "position": self.first_position + self.step * self.recipe.train.batch,
            }
            checkpoint.save(self.folder, self.step, tensors, state, keep=self.recipe.checkpoint.keep)
        if self.world.size > 1:
            dist.barrier()

    def _resume(self) -> int:
        """Load the newest whole checkpoint of the run's folder; gives the steps done."""
        saved, messages = checkpoint.load_newest(self.folder)
        for message in messages if self.world.is_main else ():
            print(f"warning: {message}", flush=True)
        if saved is None:
            return 0
        if saved.state.get("fingerprint") != fingerprint(self.dataset):
            raise UserError(
                f"the data at {self.recipe.data.path} are not those that {self.folder} was trained on; "
                "give the old data, or start a new run with --output.name"
            )
        if saved.step > self.recipe.train.steps:
            raise UserError(
                f"{self.folder} has already done {saved.step} steps, more than train.steps {self.recipe.train.steps}; "
                "start a new run with --output.name"
            )
        for name, module in self.trained.items():
            module.load_state_dict(saved.tensors[name])
        self.ema.load_state_dict(saved.tensors["ema"])
        self.optimizers.load_state_dict(saved.tensors["optimizer"])
        self.first_position = int(saved.state["first_position"])
        if self.world.is_main:
            print(f"going on with {self.folder} at step {saved.step}", flush=True)
        return saved.step

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Finish the step, save and stop; a second Ctrl-C stops at once."""
        if self._stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._stop = True
