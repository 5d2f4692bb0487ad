"""`--profile steps=10:15`: a torch.profiler trace and a memory snapshot of some steps, in the run's folder."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from train.errors import UserError
from train.ranks.parallel import World
from train.recipes import Profile

FOLDER = "profile"


class Profiler:
    """Call `begin` before a step and `end` after it; both do nothing outside the steps asked for.

    Writes `profile/rank-0-steps-10-15.json` (chrome://tracing, Perfetto) and, on a GPU, the same name with `.pickle`
    (https://pytorch.org/memory_viz), of rank 0 only.

    Raises:
        UserError: `profile.steps` is not of the form first:last.
    """

    def __init__(self, settings: Profile, folder: Path, world: World) -> None:
        self.first, self.last = steps_of(settings)
        self.folder, self.world = folder / FOLDER, world
        self._profile: profile | None = None

    def begin(self, step: int) -> None:
        """Before step `step` (0-based)."""
        if self._profile is None and self.first <= step < self.last and self.world.is_main:
            activities = [ProfilerActivity.CPU]
            if self.world.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
                torch.cuda.memory._record_memory_history()
            self._profile = profile(activities=activities, record_shapes=True)
            self._profile.__enter__()

    def end(self, step: int) -> Path | None:
        """After step `step`; where it was the last, writes the files and gives the trace."""
        if self._profile is None or step + 1 < self.last:
            return None
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        self._profile.__exit__(None, None, None)
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / f"rank-{self.world.rank}-steps-{self.first}-{self.last}.json"
        self._profile.export_chrome_trace(str(trace))
        if self.world.device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(trace.with_suffix(".pickle")))
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profile, self.last = None, self.first
        return trace


def steps_of(settings: Profile) -> tuple[int, int]:
    """ "10:15" as (10, 15), the steps 10 to 14; (0, 0) where nothing is asked for."""
    if not settings.steps:
        return 0, 0
    first, colon, last = settings.steps.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise UserError(f"profile.steps is first:last, as in 10:15 for the steps 10 to 14, got {settings.steps!r}")
    return int(first), int(last)
