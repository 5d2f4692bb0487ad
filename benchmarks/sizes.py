"""The sizes that are timed: PRX's on a GPU, tiny ones elsewhere, which only show that everything works."""

from dataclasses import dataclass, replace

import torch

from benchmarks.roofline import Step
from prx_model.config import PRXConfig, Routing, prx_1_2b

GPU = torch.cuda.is_available()
TINY = PRXConfig(context_in_dim=24, hidden_size=64, num_heads=2, depth=3, axes_dim=(16, 16), bottleneck_size=16)
CONFIG = prx_1_2b() if GPU else TINY


def routing(config: PRXConfig) -> Routing:
    """The recipe's: half of the tokens bypass all blocks but the first and the last."""
    return Routing(enabled=True, start=1, end=config.depth - 2, selection_ratio=0.5)


def text_lengths(batch: int, longest: int, fill: float) -> list[int]:
    """Real text tokens of each sample: spread evenly round `fill` of `longest`, never none."""
    mean = fill * longest
    spread = min(mean - 1, longest - mean)
    steps = [2 * i / max(batch - 1, 1) - 1 for i in range(batch)]
    return [round(mean + spread * step) for step in steps]


@dataclass(frozen=True)
class Case:
    """One GPU's part of a step: pictures of `size` pixels, captions padded to `text` tokens of which some are real."""

    size: int
    batch: int
    text: int = 256
    fill: float = 0.4
    repa: bool = True
    config: PRXConfig = CONFIG

    def __str__(self) -> str:
        return f"{self.size} px x {self.batch}, text {self.fill:.0%} full"

    @property
    def tokens(self) -> int:
        """Image tokens of a picture."""
        return self.config.tokens(self.size, self.size)

    def lengths(self) -> list[int]:
        """Real text tokens of each sample."""
        return text_lengths(self.batch, self.text, self.fill)

    def step(self) -> Step:
        """The formulas' view of it: operations count real text tokens only, whatever a way multiplies."""
        mean = round(sum(self.lengths()) / self.batch)
        return Step(self.size, self.batch, self.repa, mean, self.config, routing(self.config), gpus=1)


def stages_that_fit(memory: int) -> list[Case]:
    """A GPU's part of both stages, as the recipe has it on an H200 (141 GB); half of the pictures on smaller ones.

    Ours needs 45 and 52 GB for the whole (docs/step.md), but the plain ways that it is compared with keep more.
    """
    shares = 1 if memory > 120e9 else 2
    return [Case(512, 32 // shares), Case(1024, 16 // shares, repa=False)]


def cases() -> list[Case]:
    """Both stages of the recipe (docs/recipe.md), captions 40 % and 100 % full; the likely filling first."""
    if not GPU:
        return [Case(64, 2, text=8)]
    stages = stages_that_fit(torch.cuda.get_device_properties(0).total_memory)
    return [replace(stage, fill=fill) for fill in (0.4, 1.0) for stage in stages]
