"""One evaluation of a run, from beginning to end: which weights are judged by what, and where the results go."""

import time
from collections.abc import Callable
from pathlib import Path

from train.data.loader import HeldOut
from train.data.mixture import places
from train.errors import UserError
from train.evaluation import evaluate
from train.evaluation.distances import Distances
from train.evaluation.pictures import save_grid
from train.learner.step import Learner
from train.ranks.parallel import World, from_main
from train.recipes import Recipe

_SECONDS = 10.0
"""Between two lines about an evaluation that is under way."""


class Evaluation:
    """What a recipe measures, with the networks for it loaded: a file that is missing should not show hours later.

    Args:
        recipe: says what.
        world: the ranks; every one makes this and calls it.
        validation: held-out pictures, if there are any.

    Raises:
        UserError: distances are asked for, and there is nothing to compare with.
    """

    def __init__(self, recipe: Recipe, world: World, validation: HeldOut | None) -> None:
        self.recipe, self.world, self.validation = recipe, world, validation
        settings = recipe.evaluation
        self.measures_distances = settings.fid or settings.cmmd or settings.dino_mmd
        if self.measures_distances:
            _check(recipe, validation)
        here = self.measures_distances and world.is_main
        self.distances = Distances(settings, world.device) if here else None

    def run(
        self, learner: Learner, grid: Path, *, final: bool, say: Callable[[str], None], between: Callable[[], None]
    ) -> tuple[dict[str, float], Path | None]:
        """Draw the grid; held-out loss, distances and (at the end) prompt accuracy.

        Args:
            grid: where the grid of pictures goes, if there are prompts for one.
            final: whether the run ends with it.
            say: tells the user what is being done.
            between: called on all ranks after every part.

        Returns:
            Scores, the same on every rank, and the grid's path. "ema/…" and "raw/…" say which weights; grid and prompt
            accuracy are of the averaged ones.
        """
        recipe, world, modules = self.recipe, self.world, learner.modules
        scores: dict[str, float] = {}
        with learner.averaged():
            prompts = evaluate.grid_prompts(recipe, self.validation)
            if prompts:
                pictures = evaluate.draw(modules, prompts, recipe, world, between=between)
                if world.is_main:
                    save_grid(pictures, prompts, grid)
            scores |= self._measure(learner, "ema", distances=True, between=between)
            if final and recipe.data.kind in ("shapes", "scenes"):
                say("scoring held-out prompts …")
                told = _Parts("scoring held-out prompts", say, between)
                scores |= evaluate.prompt_accuracy(modules, recipe, world, told)
        if recipe.evaluation.raw != "no":
            everything = recipe.evaluation.raw == "all"
            scores |= self._measure(learner, "raw", distances=everything, between=between)
        return from_main(scores, world), grid if prompts else None

    def _measure(
        self, learner: Learner, weights: str, *, distances: bool, between: Callable[[], None]
    ) -> dict[str, float]:
        """Held-out loss, and distances if asked for, of the weights that the modules hold now."""
        if self.validation is None:
            return {}
        modules, recipe, world = learner.modules, self.recipe, self.world
        found = evaluate.held_out_loss(modules, self.validation, recipe, world, between)
        if distances and self.measures_distances:
            found |= evaluate.distances(modules, self.validation, recipe, self.distances, world, between)
        return {f"{weights}/{name}": value for name, value in found.items()}


def _check(recipe: Recipe, validation: HeldOut | None) -> None:
    """Refuse to measure distances to nothing."""
    if validation is None:
        raise UserError(
            f"evaluation.fid, cmmd and dino_mmd compare with validation pictures, and the data at "
            f"{places(recipe.data)} have no split 'val'; add one or leave them off"
        )
    samples = recipe.evaluation.samples
    if min(len(validation), samples) < 2:
        raise UserError(
            "evaluation.fid, cmmd and dino_mmd need at least 2 pictures, got "
            f"{len(validation)} in the split 'val' and evaluation.samples {samples}"
        )


class _Parts:
    """Says now and then how many parts of an evaluation are done; call it after each.

    Args:
        what: is being done.
        say: tells the user.
        then: called after every part, too.
    """

    def __init__(self, what: str, say: Callable[[str], None], then: Callable[[], None]) -> None:
        self.what, self.say, self.then = what, say, then
        self.done, self._last = 0, time.monotonic()

    def __call__(self) -> None:
        self.done += 1
        if time.monotonic() - self._last >= _SECONDS:
            self._last = time.monotonic()
            self.say(f"{self.what}: {self.done} batches done")
        self.then()
