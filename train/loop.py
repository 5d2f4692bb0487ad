"""The training loop of one stage: steps, and what happens between them; evaluate, save and stop on the way."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from train.checkpoint.checkpointer import Checkpointer, load_into
from train.data.loader import (
    Batch,
    accounts,
    batches,
    bucket_counts,
    fingerprint,
    notes,
    open_dataset,
    open_validation,
    source_names,
)
from train.data.quarantine import Quarantine
from train.data.readers import ImageDataset
from train.evaluation import evaluate
from train.evaluation.evaluation import Evaluation
from train.learner.build import check_ranks
from train.learner.optimizers import learning_rate_factor
from train.learner.step import Learner
from train.ranks import faults
from train.ranks.parallel import World, agree, from_main, patience
from train.recipes import Recipe
from train.run.end import read_end, write_end
from train.run.folder import SAMPLES, run_folder, write_config
from train.run.meter import Meter
from train.run.metrics import Display, Metrics, drop_metrics_after
from train.run.profiling import Profiler
from train.run.resuming import Progress, Resuming
from train.run.stages import carry_over
from train.run.told import evaluation_line, start_line
from train.shown import tell

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

    def __init__(
        self, recipe: Recipe, world: World, *, stage: int = 0, previous: Path | None = None, force: bool = False
    ) -> None:
        self.recipe, self.world, self.stage, self.force = recipe, world, stage, force
        self.folder = run_folder(recipe)
        check_ranks(recipe, world.size)
        resuming = Resuming(recipe, self.folder, world, force=force)
        resuming.check_config()
        self.dataset = open_dataset(recipe.data, recipe.train.seed, recipe.model.patch_size)
        self.validation = open_validation(recipe.data, recipe.model.patch_size)
        self._tell_notes()
        self.evaluation = Evaluation(recipe, world, self.validation)
        self.profiler = Profiler(recipe.profile, self.folder, world)
        self.checkpointer = Checkpointer(self.folder, keep=recipe.checkpoint.keep, timeout=patience(recipe.parallel))
        try:
            self.quarantine = Quarantine(self.folder, world.rank, recipe.data.bad_limit)
            if world.is_main and isinstance(self.dataset, ImageDataset):
                self.quarantine.add_shards(self.dataset.index.problems)
            self.learner = Learner(recipe, world, stage=stage)
            self._begin(resuming, previous)
        except BaseException:
            self.checkpointer.close()
            raise

    def _tell_notes(self) -> None:
        if self.world.is_main:
            for sentence in accounts(self.dataset):
                tell(f"data: {sentence}")
            for note in [*notes(self.dataset, self.recipe.train.batch), *evaluate.guidance_notes(self.recipe)]:
                tell(f"note: {note}")

    def _begin(self, resuming: Resuming, previous: Path | None) -> None:
        """Go on from the run's newest checkpoint, from the end of the stage before, or from nothing."""
        found, progress = resuming.find(self.checkpointer.group, fingerprint(self.dataset)) or (None, Progress())
        self.step, self.first_position, self.spent = progress.step, progress.first_position, progress.seconds
        if found is not None:
            load_into(found, self.learner.tensors(), self.checkpointer.group)
            self.learner.skipped.copy_(torch.tensor(progress.skipped))
            if self.world.is_main and self.step < self.recipe.train.steps:
                tell(f"going on with {self.folder} at step {self.step}")
        elif previous is not None:
            self.first_position = carry_over(previous, self.learner.tensors(), self.checkpointer.group)

    def run(self) -> Outcome:
        """Train to the last step, or until a signal; then evaluate, unless stopped.

        Raises:
            UserError: too many steps in a row whose gradient is not finite.
        """
        recipe, world = self.recipe, self.world
        ended = from_main(read_end(self.folder, recipe.train.steps), world)
        if ended is not None and self.step == recipe.train.steps and not self.force:
            self.checkpointer.close()
            if world.is_main:
                tell(f"{self.folder} at step {self.step} is finished: nothing is trained or written again")
            return Outcome(self.folder, self.step, True, *ended)
        if world.is_main:
            write_config(self.folder, recipe)
            drop_metrics_after(self.folder, self.step)
            tell(start_line(recipe, world, self.folder, self.learner.parameters, self.dataset))
        metrics = Metrics(self.folder, enabled=world.is_main)
        scores: dict[str, float] = {}
        grid: Path | None = None
        try:
            with (
                Display(recipe.train.steps, self.step, enabled=world.is_main) as display,
                faults.StopSignals(world) as self.signals,
                faults.Watchdog(recipe.parallel.timeout) as self.watchdog,
            ):
                try:
                    self._train(metrics, display)
                    scores, grid = self._evaluate(metrics, display, final=True)
                    if world.is_main:
                        write_end(self.folder, self.step, scores, grid)
                except faults.Interrupted:
                    if self.step != self.saved:
                        self._save(wait=True)
                    self.checkpointer.finish()
                    return Outcome(self.folder, self.step, False, scores, grid)
        finally:
            metrics.close()
            self.checkpointer.close()
        return Outcome(self.folder, self.step, True, scores, grid)

    def _train(self, metrics: Metrics, display: Display) -> None:
        """All steps that are left. Raises `faults.Interrupted` on all ranks where one was asked to stop."""
        recipe, learner = self.recipe, self.learner
        flop = learner.teaching.flop_per_image()
        counts = bucket_counts(self.dataset)
        self.meter = Meter(
            recipe,
            self.world,
            learner.parameters,
            flop,
            buckets=counts,
            spent=self.spent,
            sources=source_names(self.dataset),
        )
        if flop:
            metrics.log(self.step, {f"flop/{name}_per_image": count for name, count in flop.items()})
        # A run of which every step is skipped has learnt nothing, however short it is.
        skips = faults.SkippedSteps(min(recipe.train.max_skipped, recipe.train.steps), self.world)
        self.saved = self.step
        for batch, waited in self._batches():
            self.quarantine.add(batch)
            self.profiler.begin(self.step)
            result = learner.step(batch, self.step)
            trace = self.profiler.end(self.step)
            if trace is not None:
                display.say(f"profile: {trace}")
            skips.remember(self.step, batch, result.losses, learner.skipped[1])
            self.step += 1
            display.tick(self.step)
            self.meter.add(result, waited, batch.sources)
            self.watchdog.beat()
            if self.step % _LOG_EVERY == 0 or self.step == recipe.train.steps:
                self._log(metrics, display)
            # Before a save: what it names is told first.
            skips.check(self.signals.check(skips.arrived()))
            if self.step % recipe.checkpoint.every == 0 or self.step == recipe.train.steps:
                self._save(wait=self.step == recipe.train.steps)
            if self.step % recipe.evaluation.every == 0 and self.step < recipe.train.steps:
                self._evaluate(metrics, display, final=False)
                self.meter.restart()

    def _batches(self) -> Iterator[tuple[Batch, float]]:
        """This rank's batches from here to the last step, and the seconds that each was waited for."""
        source = batches(self.dataset, self.recipe, self.world, self.step, self.first_position)
        while True:
            began = time.monotonic()
            with self.learner.stopwatch.span("data"):
                batch = next(source, None)
            if batch is None:
                return
            yield batch, time.monotonic() - began

    def _log(self, metrics: Metrics, display: Display) -> None:
        """Read the loss and everything else that waits for the device."""
        values = self.meter.read() | self.learner.stopwatch.read(_LOG_EVERY)
        values["train/lr_factor"] = learning_rate_factor(self.step - 1, self.recipe.train)
        values["train/skipped_steps"] = int(self.learner.skipped[0])
        rate = values["speed/images_per_second"]
        values["time/hours_left"] = (self.recipe.train.steps - self.step) * self.recipe.train.batch / rate / 3600
        substituted, seen = agree([self.quarantine.substituted, self.quarantine.seen], self.world, dist.ReduceOp.SUM)
        values["data/substituted"] = substituted
        metrics.log(self.step, values)
        display.update(self.step, self.meter.shown(values))
        self.quarantine.check(substituted, seen)

    def _evaluate(self, metrics: Metrics, display: Display, *, final: bool) -> tuple[dict[str, float], Path | None]:
        """Scores, the same on every rank, and the grid."""
        path = self.folder / SAMPLES / f"step-{self.step:08d}.png"
        scores, grid = self.evaluation.run(self.learner, path, final=final, say=display.say, between=self._between)
        if grid is not None and self.world.is_main:
            metrics.picture(self.step, "samples", grid)
        metrics.log(self.step, {f"eval/{name}": value for name, value in scores.items()})
        line = None if final else evaluation_line(self.step, scores, grid)
        if line is not None:
            display.say(line)
        return scores, grid

    def _between(self) -> None:
        """After every part of an evaluation."""
        self.watchdog.beat()
        self.signals.check()

    def _save(self, *, wait: bool) -> None:
        """Save in the background, or to the end where nothing else is done before it."""
        facts = {
            "fingerprint": fingerprint(self.dataset),
            "stage": self.stage,
            "first_position": self.first_position,
            "position": self.first_position + self.step * self.recipe.train.batch,
            "skipped": self.learner.skipped.tolist(),
            "seconds": self.meter.seconds,
        }
        with self.learner.stopwatch.span("checkpoint"):
            self.checkpointer.save(self.step, self.learner.tensors(), facts, wait=wait)
        self.saved = self.step
        self.watchdog.beat()
