"""The teachers of a recipe, and what they add to a step's loss."""

import torch
from torch import Tensor

from prx_kernels import unpatchify
from prx_model.teachers import REPA, LPIPSLoss, PerceptualDINO, Prediction, Teacher
from train.data.loader import Batch, to_float
from train.errors import UserError
from train.randomness import derive_seed
from train.recipes import Recipe
from train.run.stopwatch import Stopwatch


def build_teachers(recipe: Recipe, device: torch.device) -> dict[str, Teacher]:
    """The teachers that a recipe asks for, on the device: bf16 on a GPU, fp32 on a CPU. None for a weight of zero.

    Weights that are random, as asked, are the same on every rank and after a resume.

    Raises:
        UserError: weights that are not there or do not fit, or pictures too small for LPIPS.
    """
    _check_size(recipe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(recipe.train.seed, purpose="random teachers"))
        return {name: teacher.to_device(device) for name, teacher in _make_teachers(recipe, device).items()}


def _make_teachers(recipe: Recipe, device: torch.device) -> dict[str, Teacher]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    made: dict[str, Teacher] = {}
    try:
        if recipe.repa.enabled and recipe.repa.weight:
            s = recipe.repa
            repa = REPA(
                recipe.model.hidden_size, name=s.teacher, weights=s.weights, layers=s.projector_layers, dtype=dtype
            )
            repa.init_weights(torch.Generator().manual_seed(derive_seed(recipe.train.seed, purpose="projector")))
            made["repa"] = repa
        if recipe.lpips.enabled and recipe.lpips.weight:
            made["lpips"] = LPIPSLoss(network=recipe.lpips.network, weights=recipe.lpips.weights, dtype=dtype)
        if recipe.pdino.enabled and recipe.pdino.weight:
            p = recipe.pdino
            made["pdino"] = PerceptualDINO(name=p.teacher, weights=p.weights, size=p.size, order=p.order, dtype=dtype)
    except ValueError as error:
        raise UserError(str(error)) from None
    return made


def _check_size(recipe: Recipe) -> None:
    data, lpips = recipe.data, recipe.lpips
    smallest = LPIPSLoss.SMALLEST[lpips.network]
    if lpips.enabled and min(data.height, data.width) < smallest:
        raise UserError(
            f"lpips.network {lpips.network!r} needs pictures of at least {smallest} pixels a side, got data.height "
            f"{data.height} and data.width {data.width}; set --lpips.no-enabled"
        )


class TeacherLosses:
    """Mean loss of every teacher over a batch, weighted and as logged.

    A teacher is the section of the recipe that has its name: `weight`, and `t_max` and `t_mean` where it has them.
    Samples with t at or above `t_max` do not go through it: they count as zero (`t_mean` "all"), or do not count
    ("below"; a batch that has none below is a loss of zero). t is known on the host then: nothing waits for the device.
    """

    def __init__(self, recipe: Recipe, teachers: dict[str, Teacher]) -> None:
        self.recipe, self.teachers = recipe, teachers
        sections = {name: getattr(recipe, name) for name in teachers}
        self.weights: dict[str, float] = {name: section.weight for name, section in sections.items()}
        self.limits: dict[str, float] = {name: getattr(section, "t_max", 1.0) for name, section in sections.items()}
        self.counts_all = {name: getattr(section, "t_mean", "all") == "all" for name, section in sections.items()}

    @property
    def needs_host_t(self) -> bool:
        """Whether some teacher skips samples by their t."""
        return any(limit < 1.0 for limit in self.limits.values())

    def flop_per_image(self) -> dict[str, float]:
        """Operations of each teacher for one picture."""
        data, patch_size = self.recipe.data, self.recipe.model.patch_size
        return {name: teacher.flop(data.height, data.width, patch_size) for name, teacher in self.teachers.items()}

    def __call__(
        self,
        batch: Batch,
        tokens: Tensor,
        features: Tensor | None,
        keep: Tensor | None,
        host_t: Tensor | None,
        stopwatch: Stopwatch,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum, and each teacher's own mean loss.

        Args:
            batch: the step's samples.
            tokens: the predicted patches (batch, N, channels·patch²).
            features: tokens behind the REPA layer.
            keep: which tokens those are, None for all.
            host_t: (batch,) t on the host, where `needs_host_t`.
            stopwatch: measures each teacher.
        """
        height, width = batch.image.shape[2:]
        x0_hat = unpatchify(tokens, self.recipe.model.patch_size, height, width).float()
        whole = Prediction(to_float(batch.image), x0_hat, features, keep, self.recipe.model.patch_size)
        total = torch.zeros((), device=tokens.device)
        parts: dict[str, Tensor] = {}
        for name, teacher in self.teachers.items():
            with stopwatch.span(name):
                seen: Prediction | None = whole
                limit = self.limits[name]
                if limit < 1.0 and host_t is not None:
                    chosen = torch.nonzero(host_t < limit).flatten()
                    seen = whole.select(chosen.to(tokens.device, non_blocking=True)) if len(chosen) else None
                if seen is None:  # a zero that still depends on the prediction, as every other step's loss
                    parts[name] = x0_hat.sum() * 0.0
                else:
                    parts[name] = teacher(seen).sum() / len(x0_hat if self.counts_all[name] else seen.image)
            total = total + self.weights[name] * parts[name]
        return total, {name: part.detach() for name, part in parts.items()}
