"""Loss, its parts and speed since the last reading, kept on the device until then."""

import resource
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from prx_kernels import newton_schulz_flop
from train.data.buckets import Size
from train.learner.optimizers import Named, split
from train.learner.step import T_BINS, StepResult, loss_sums
from train.ranks.parallel import World, average
from train.recipes import Recipe
from train.run.plan import flop_per_image, mean_tokens, peak_flops


class Meter:
    """Means over steps and ranks; reading it is where the host waits for the device.

    Args:
        recipe: batch, sizes and the price of a GPU-hour.
        world: ranks.
        parameters: of the denoiser and what is trained beside it; Muon's matrices are counted.
        teachers: operations of each for one picture.
        buckets: pictures of each size, where there are several.
        spent: seconds that earlier starts of this run took.
        sources: names of a mixture's, whose losses are told apart.
    """

    def __init__(
        self,
        recipe: Recipe,
        world: World,
        parameters: Named,
        teachers: dict[str, float],
        *,
        buckets: Mapping[Size, int] | None = None,
        spent: float = 0.0,
        sources: Sequence[str] = (),
    ) -> None:
        self.recipe, self.world, self.sources = recipe, world, tuple(sources)
        self.tokens = mean_tokens(recipe, buckets)
        self.denoiser = 3.0 * flop_per_image(recipe, buckets)
        muon = split(parameters, recipe)[0]
        polar = sum(newton_schulz_flop(p.shape[0], p.shape[1], recipe.muon.ns_steps) for _, p in muon)
        self.everything = self.denoiser + sum(teachers.values()) + polar / recipe.train.batch
        peak = peak_flops(world.device)
        self.peak = peak * world.size if peak else None
        self.started = time.monotonic() - spent
        self.restart()

    @property
    def seconds(self) -> float:
        """Since the run first began, without the pauses between its starts."""
        return time.monotonic() - self.started

    def restart(self) -> None:
        """Forget what was added."""
        self.sums: dict[str, Tensor] = {}
        self.bins = torch.zeros(2, T_BINS, device=self.world.device)
        self.by_source = torch.zeros(2, len(self.sources), device=self.world.device)
        self.steps, self.waited, self.began = 0, 0.0, time.monotonic()

    def add(self, result: StepResult, waited: float, sources: Tensor | None = None) -> None:
        """Take in a step, the seconds that the host waited for its data, and the source of each sample (batch,)."""
        for name, value in (*result.parts.items(), ("gradient_norm", result.norm)):
            self.sums[name] = self.sums[name] + value if name in self.sums else value.float()
        self.bins += result.bins
        if self.sources and sources is not None:
            self.by_source += loss_sums(result.losses, sources[: len(result.losses)], len(self.sources))
        self.waited += waited
        self.steps += 1

    def read(self) -> dict[str, float]:
        """Means since the last reading as "train/<name>", loss by t, speed, memory and cost; then start anew."""
        means = torch.stack([*self.sums.values()]) / max(self.steps, 1)
        # each rank has seen its own part of the batch
        told = average(torch.cat([means, self.bins.flatten(), self.by_source.flatten()]), self.world).tolist()
        values = {f"train/{name}": value for name, value in zip(self.sums, told, strict=False)}
        names = [f"loss_by_t/{i / T_BINS:.1f}-{(i + 1) / T_BINS:.1f}" for i in range(T_BINS)]
        sums, counts = told[len(means) : len(means) + T_BINS], told[len(means) + T_BINS : len(means) + 2 * T_BINS]
        values |= {f"train/{name}": sums[i] / counts[i] for i, name in enumerate(names) if counts[i]}
        sums, counts = told[len(means) + 2 * T_BINS :][: len(self.sources)], told[len(told) - len(self.sources) :]
        for name, loss, count in zip(self.sources, sums, counts, strict=True):
            if count:
                values[f"train/loss_by_source/{name}"] = loss / count
        spent = time.monotonic() - self.began
        rate = self.recipe.train.batch * self.steps / spent
        values |= {
            "speed/images_per_second": rate,
            "speed/tokens_per_second": rate * self.tokens,
            "speed/data_wait": self.waited / spent,
            "memory/peak_gib": self._peak_memory() / 2**30,
            "cost/dollars": self.seconds / 3600 * self.world.size * self.recipe.output.dollars_per_hour,
        }
        if self.peak:
            values["speed/mfu"] = rate * self.denoiser / self.peak
            values["speed/mfu_all"] = rate * self.everything / self.peak
        self.restart()
        return values

    def _peak_memory(self) -> float:
        """Bytes: the allocator's peak on a GPU, this process's resident peak on a CPU."""
        if self.world.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.world.device))
        return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @staticmethod
    def shown(values: dict[str, float]) -> dict[str, float]:
        """What the console shows, by its short names."""
        names = {
            "train/loss": "loss",
            "speed/images_per_second": "images/s",
            "speed/mfu": "MFU",
            "speed/data_wait": "data wait",
        }
        return {short: values[name] for name, short in names.items() if name in values}
