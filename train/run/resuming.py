"""Whether and where a run goes on: what lies in its folder, held against what is asked for now."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from train.checkpoint.checkpointer import Found, find_newest
from train.checkpoint.state import need
from train.data.mixture import places
from train.errors import UserError
from train.ranks.agreement import Group
from train.ranks.parallel import World
from train.recipes import Recipe
from train.run.folder import CONFIG, DamagedConfigError, check_same_data, check_same_run
from train.shown import tell


@dataclass(frozen=True)
class Progress:
    """How far a run had come."""

    step: int = 0
    first_position: int = 0
    """Of this stage's first sample in the order of the data."""
    seconds: float = 0.0
    skipped: tuple[int, ...] = ()
    """Steps that were left out, as `Learner.skipped` counts them; () for none."""


class Resuming:
    """The rules by which a run goes on.

    Args:
        force: turns a refusal into a warning, where the run can go on at all.
    """

    def __init__(self, recipe: Recipe, folder: Path, world: World, *, force: bool) -> None:
        self.recipe, self.folder, self.world, self.force = recipe, folder, world, force

    def check_config(self) -> None:
        """Compare with the run's config.json; one that a crash has cut is written anew: a checkpoint has its own.

        Raises:
            UserError: the settings are not the run's.
        """
        if not (self.folder / CONFIG).exists():
            return
        try:
            self._insist(lambda: check_same_run(self.folder, self.recipe))
        except DamagedConfigError as error:
            self._tell(f"warning: {error}; the newest checkpoint's counts, and it is written anew")

    def find(self, group: Group, fingerprint: str) -> tuple[Found, Progress] | None:
        """The newest whole checkpoint of the run's folder; None where there is none. Collective.

        Args:
            fingerprint: of the data as they are now.

        Raises:
            UserError: it is of other settings or data, or further than the run is to go.
        """
        found = find_newest(self.folder, group)
        if found is None:
            return None
        recipe, state = self.recipe, found.state
        self._insist(lambda: check_same_run(found.folder, recipe))
        before = state.get("fingerprint")
        self._insist(lambda: check_same_data(found.folder, places(recipe.data), before, fingerprint))
        if found.step > recipe.train.steps:
            raise UserError(
                f"{self.folder} has already done {found.step} steps, more than train.steps {recipe.train.steps}; "
                "start a new run with --output.name"
            )
        skipped, position, seconds = need(found.folder, state, "skipped", "first_position", "seconds")
        return found, Progress(found.step, position, float(seconds), tuple(skipped))

    def _insist(self, check: Callable[[], None]) -> None:
        """Make a check whose refusal `--force` turns into a warning."""
        try:
            check()
        except UserError as error:
            if not self.force or isinstance(error, DamagedConfigError):
                raise
            self._tell(f"warning: {error}; going on, as --force says")

    def _tell(self, message: str) -> None:
        if self.world.is_main:
            tell(message)
