"""The training loop: draw, predict, learn, average; evaluate, save and stop on the way.

A step's random numbers come from (seed, stage, step, sample position, purpose): see train/randomness.py.
"""

import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

from prx_kernels import sample_keep, x_prediction_loss
from prx_model import flow
from prx_model.ema import EMA
from train import checkpoint, evaluate
from train.build import Modules, build, check_ingredients
from train.data.loader import Batch, batches, fingerprint, open_dataset, open_validation, to_float
from train.errors import UserError
from train.metrics import Display, Metrics, drop_metrics_after
from train.optimizers import Optimizers, clip_gradients, learning_rate_factor, named_parameters
from train.parallel import World, any_rank, average_gradients, compile_blocks, precision, replica_mesh
from train.pictures import save_grid
from train.plan import flop_per_image, peak_flops
from train.randomness import derive_seed
from train.recipes import Recipe
from train.run_folder import CONFIG, SAMPLES, check_same_run, run_folder, write_config

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
    """One stage of a run, in one process of possibly many.

    Raises:
        UserError: settings, data or a run's folder that do not fit; nothing is overwritten then.
    """

    def __init__(self, recipe: Recipe, world: World, *, stage: int = 0) -> None:
        check_ingredients(recipe)
        self.recipe, self.world, self.stage = recipe, world, stage
        self.folder = run_folder(recipe)
        if recipe.train.batch % world.size:
            raise UserError(f"train.batch {recipe.train.batch} must be a multiple of the {world.size} ranks")
        fresh = not (self.folder / CONFIG).exists()
        if not fresh:
            check_same_run(self.folder, recipe)
        self.dataset = open_dataset(recipe.data, recipe.train.seed)
        self.validation = open_validation(recipe.data)
        self.modules: Modules = build(recipe, world.device)
        self.parameters = named_parameters(self.modules.trained())
        self.optimizers = Optimizers(self.parameters, recipe, replica_mesh(world))
        self.ema = EMA(self.parameters, decay=recipe.ema.decay, every=recipe.ema.every)
        self.step = 0 if fresh else self._resume()
        compile_blocks(self.modules.model.blocks, recipe.compile, world.device)
        self._stop = False

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
                meter = _Meter(recipe, self.world)
                for batch in batches(self.dataset, recipe, self.world, self.step):
                    loss, norm = self._train_step(batch)
                    self.step += 1
                    meter.add(loss, norm)
                    if self.step % _LOG_EVERY == 0 or self.step == settings.steps:
                        values = meter.read()
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

    def _train_step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """One optimizer step; gives the loss and the gradient's norm as tensors on the device."""
        factor = self._factor(self.step)
        with precision(self.recipe.train, self.world.device):
            loss = self._loss(batch)
        loss.backward()
        trained = [parameter for _, parameter in self.parameters]
        average_gradients(trained, self.world)
        norm = clip_gradients(trained, self.recipe.train.clip)
        self.optimizers.step(factor)
        self.ema.update(self.step)
        return loss.detach(), norm

    def _loss(self, batch: Batch) -> Tensor:
        """Flow-matching loss of a batch (RECIPE.md, "Objective")."""
        recipe, settings, model = self.recipe, self.recipe.flow, self.modules.model
        ids = batch.positions
        image = to_float(batch.image)
        t = flow.sample_t(
            self._seed("t"),
            ids,
            shift=settings.shift,
            uniform_fraction=settings.uniform_fraction,
            t_floor=settings.t_floor,
        )
        noise = flow.draw_noise(self._seed("noise"), ids, image)
        noisy = flow.add_noise(image, noise, t, noise_scale=settings.noise_scale)
        text, mask = self.modules.encode(self._captions(batch))
        keep, route = None, None
        if recipe.routing.enabled:
            tokens = recipe.model.tokens(*image.shape[2:])
            keep = sample_keep(ids, tokens, recipe.routing.selection_ratio, seed=self._seed("keep"))
            route = (recipe.routing.start, recipe.routing.end)
        predicted = model.forward_tokens(noisy, t, text, mask, keep=keep, route=route)
        return x_prediction_loss(predicted, image, t, recipe.model.patch_size, t_min=settings.t_min)

    def _captions(self, batch: Batch) -> list[str]:
        """Captions with some dropped; drawn on the host, where the captions are."""
        seed = torch.tensor(derive_seed(self.recipe.train.seed, stage=self.stage, step=self.step, purpose="drop"))
        dropped = flow.drop_captions(seed, batch.positions.cpu(), self.recipe.flow.caption_drop)
        return ["" if drop else text for drop, text in zip(dropped.tolist(), batch.captions, strict=True)]

    def _seed(self, purpose: str) -> Tensor:
        value = derive_seed(self.recipe.train.seed, stage=self.stage, step=self.step, purpose=purpose)
        return torch.tensor(value, dtype=torch.int64).to(self.world.device, non_blocking=True)

    def _factor(self, step: int) -> float:
        return learning_rate_factor(step, self.recipe.train)

    def _evaluate(self, metrics: Metrics, display: Display, *, final: bool) -> tuple[dict[str, float], Path | None]:
        """Grid, held-out loss and (at the end) prompt accuracy with averaged weights, on rank 0; the others wait."""
        scores: dict[str, float] = {}
        grid: Path | None = None
        if self.world.is_main:
            with self.ema.swapped_in(), precision(self.recipe.train, self.world.device):
                prompts = evaluate.grid_prompts(self.recipe, self.validation)
                if prompts:
                    grid = self.folder / SAMPLES / f"step-{self.step:08d}.png"
                    save_grid(evaluate.draw(self.modules, prompts, self.recipe), prompts, grid)
                if self.validation is not None:
                    scores |= evaluate.held_out_loss(self.modules, self.validation, self.recipe)
                if final and self.recipe.data.kind in ("shapes", "scenes"):
                    display.say("scoring held-out prompts …")
                    scores |= evaluate.prompt_accuracy(self.modules, self.recipe)
            metrics.log(self.step, {f"eval/{name}": value for name, value in scores.items()})
        if self.world.size > 1:
            dist.barrier()
        return scores, grid

    def _save(self) -> None:
        """Save on rank 0 (all ranks hold the same); the others wait, so that none runs ahead of a stop."""
        if self.world.is_main:
            tensors = {name: module.state_dict() for name, module in self.modules.trained().items()}
            tensors |= {"ema": self.ema.state_dict(), "optimizer": self.optimizers.state_dict()}
            state = {"fingerprint": fingerprint(self.dataset), "stage": self.stage}
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
        for name, module in self.modules.trained().items():
            module.load_state_dict(saved.tensors[name])
        self.ema.load_state_dict(saved.tensors["ema"])
        self.optimizers.load_state_dict(saved.tensors["optimizer"])
        if self.world.is_main:
            print(f"going on with {self.folder} at step {saved.step}", flush=True)
        return saved.step

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Finish the step, save and stop; a second Ctrl-C stops at once."""
        if self._stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._stop = True


class _Meter:
    """Loss and speed since the last reading, kept on the device until then."""

    def __init__(self, recipe: Recipe, world: World) -> None:
        self.batch, self.device, self.world_size = recipe.train.batch, world.device, world.size
        tokens_flop = 3.0 * flop_per_image(recipe)
        peak = peak_flops(world.device)
        self.mfu_per_rate = tokens_flop / (peak * world.size) if peak else None
        self.restart()

    def restart(self) -> None:
        self.loss = torch.zeros((), device=self.device)
        self.norm = torch.zeros((), device=self.device)
        self.steps, self.began = 0, time.monotonic()

    def add(self, loss: Tensor, norm: Tensor) -> None:
        self.loss += loss
        self.norm += norm
        self.steps += 1

    def read(self) -> dict[str, float]:
        means = torch.stack((self.loss, self.norm)) / (max(self.steps, 1) * self.world_size)
        if self.world_size > 1:
            dist.all_reduce(means)  # each rank has seen its own part of the batch
        loss, norm = means.tolist()
        rate = self.batch * self.steps / (time.monotonic() - self.began)
        values = {"train/loss": loss, "train/gradient_norm": norm, "speed/images_per_second": rate}
        if self.mfu_per_rate:
            values["speed/mfu"] = rate * self.mfu_per_rate
        self.restart()
        return values

    @staticmethod
    def shown(values: dict[str, float]) -> dict[str, float]:
        """What the console shows, by its short names."""
        names = {"train/loss": "loss", "speed/images_per_second": "images/s", "speed/mfu": "MFU"}
        return {short: values[name] for name, short in names.items() if name in values}
