"""Loss, its parts and speed since the last reading, kept on the device until then."""

import time

import torch
import torch.distributed as dist
from torch import Tensor

from train.parallel import World
from train.plan import flop_per_image, peak_flops
from train.recipes import Recipe


class Meter:
    """Means over steps and ranks; reading it is where the host waits for the device."""

    def __init__(self, recipe: Recipe, world: World) -> None:
        self.batch, self.device, self.world_size = recipe.train.batch, world.device, world.size
        peak = peak_flops(world.device)
        self.mfu_per_rate = 3.0 * flop_per_image(recipe) / (peak * world.size) if peak else None
        self.restart()

    def restart(self) -> None:
        """Forget what was added."""
        self.sums: dict[str, Tensor] = {}
        self.steps, self.began = 0, time.monotonic()

    def add(self, parts: dict[str, Tensor], norm: Tensor) -> None:
        """Take in a step: "loss" and its parts, 0-dim tensors of this rank, and the norm of the gradient."""
        for name, value in (*parts.items(), ("gradient_norm", norm)):
            self.sums[name] = self.sums[name] + value if name in self.sums else value.float()
        self.steps += 1

    def read(self) -> dict[str, float]:
        """Means since the last reading as "train/<name>", and the speed; then start anew."""
        means = torch.stack([*self.sums.values()]) / (max(self.steps, 1) * self.world_size)
        if self.world_size > 1:
            dist.all_reduce(means)  # each rank has seen its own part of the batch
        values = {f"train/{name}": value for name, value in zip(self.sums, means.tolist(), strict=True)}
        rate = self.batch * self.steps / (time.monotonic() - self.began)
        values["speed/images_per_second"] = rate
        if self.mfu_per_rate:
            values["speed/mfu"] = rate * self.mfu_per_rate
        self.restart()
        return values

    @staticmethod
    def shown(values: dict[str, float]) -> dict[str, float]:
        """What the console shows, by its short names."""
        names = {"train/loss": "loss", "speed/images_per_second": "images/s", "speed/mfu": "MFU"}
        return {short: values[name] for name, short in names.items() if name in values}
