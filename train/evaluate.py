"""What a run is judged by: prompt accuracy from an exact oracle, held-out loss, distances to real pictures, grids.

Everything here takes the modules as they are: the loop swaps the averaged weights in where they are meant.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from prx_kernels import x_prediction_loss
from prx_model import flow
from prx_model.sampler import sample
from train.build import Modules
from train.data import scenes, shapes
from train.data.loader import HeldOut, collate, to_float, to_uint8
from train.distances import Distances
from train.randomness import derive_seed
from train.recipes import Recipe

FIXED_T = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Times of the held-out loss."""
_BATCH = 64


@torch.no_grad()
def draw(modules: Modules, prompts: Sequence[str], recipe: Recipe, *, seeds: Sequence[int] | None = None) -> Tensor:
    """Draw a picture for each prompt: (n, 3, height, width) uint8 on the CPU; seeds 0 … n-1 unless given."""
    seeds = range(len(prompts)) if seeds is None else seeds
    device = next(modules.model.parameters()).device
    null_text, null_mask = modules.encode([""])
    drawn = []
    for first in range(0, len(prompts), _BATCH):
        text, mask = modules.encode(list(prompts[first : first + _BATCH]))
        drawn.append(
            sample(
                modules.model,
                text,
                mask,
                height=recipe.data.height,
                width=recipe.data.width,
                seeds=torch.tensor(list(seeds[first : first + _BATCH]), dtype=torch.int64, device=device),
                settings=recipe.sampling,
                null_text=null_text,
                null_mask=null_mask,
                routing=recipe.routing,
            )
        )
    return to_uint8(torch.cat(drawn)).cpu()


def prompt_accuracy(modules: Modules, recipe: Recipe) -> dict[str, float]:
    """Share of held-out prompts that the oracle finds drawn right, by part and split ("combinations/all", …).

    "combinations" are prompts whose parts were all seen, never together; "pairs" have a colour and shape that never
    met in training.
    """
    source = {"shapes": shapes, "scenes": scenes}[recipe.data.kind]
    count = recipe.evaluation.prompts
    result: dict[str, float] = {}
    for split_name, number in (("combinations", count), ("pairs", max(1, count // 2))):
        prompts = source.held_out_prompts(split_name, number, 0)
        images = draw(modules, [p.caption for p in prompts], recipe)
        score = source.score(images.permute(0, 2, 3, 1).numpy(), prompts)
        result |= {f"{split_name}/{part}": float(value) for part, value in asdict(score).items()}
    return result


@torch.no_grad()
def held_out_loss(modules: Modules, dataset: HeldOut, recipe: Recipe) -> dict[str, float]:
    """Dense loss on validation pictures at fixed times and noise, by resolution, height first.

    "loss/64x48" is the mean over `FIXED_T` of "loss/64x48/t=0.1", …; a picture's noise is the same in every run.
    """
    device = next(modules.model.parameters()).device
    noise_seed = torch.tensor(derive_seed(0, purpose="held-out noise"), device=device)
    count = min(len(dataset), recipe.evaluation.images)
    sums: dict[str, Tensor] = {}
    seen: dict[str, int] = {}
    for numbers in _in_batches(count):
        batch = collate([(i, dataset[i]) for i in numbers]).to(device)
        image = to_float(batch.image)
        noise = flow.draw_noise(noise_seed, batch.positions, image)
        text, mask = modules.encode(batch.captions)
        losses = []
        for value in FIXED_T:
            t = torch.full((image.shape[0],), value, device=device)
            noisy = flow.add_noise(image, noise, t, noise_scale=recipe.flow.noise_scale)
            tokens = modules.model.forward_tokens(noisy, t, text, mask)
            each = x_prediction_loss(
                tokens, image, t, recipe.model.patch_size, t_min=recipe.flow.t_min, reduction="none"
            )
            losses.append(each.sum())
        size = f"{image.shape[2]}x{image.shape[3]}"
        sums[size] = sums.get(size, torch.zeros(len(FIXED_T), device=device)) + torch.stack(losses)
        seen[size] = seen.get(size, 0) + len(numbers)
    found: dict[str, float] = {}
    for size, total in sums.items():
        means = (total / seen[size]).tolist()
        found[f"loss/{size}"] = sum(means) / len(means)
        found |= {f"loss/{size}/t={t}": mean for t, mean in zip(FIXED_T, means, strict=True)}
    return found


def distances(modules: Modules, dataset: HeldOut, recipe: Recipe, measure: Distances) -> dict[str, float]:
    """The distances that `measure` holds, of drawn pictures to validation pictures with the same captions."""
    count = min(len(dataset), recipe.evaluation.samples)
    for numbers in _in_batches(count):
        examples = [dataset[i] for i in numbers]
        if not measure.has_real:
            measure.add(collate(list(zip(numbers, examples, strict=True))).image, real=True)
        measure.add(draw(modules, [example.caption for example in examples], recipe, seeds=numbers), real=False)
    measure.has_real = True
    return measure.compute()


def _in_batches(count: int) -> Iterator[range]:
    return (range(first, min(first + _BATCH, count)) for first in range(0, count, _BATCH))


def grid_prompts(recipe: Recipe, validation: HeldOut | None) -> list[str]:
    """Captions of a run's sample grid, the same at every evaluation: held-out prompts, or validation captions."""
    count = recipe.evaluation.grid
    if recipe.data.kind == "shapes":
        return [p.caption for p in shapes.held_out_prompts("combinations", count, 1)]
    if recipe.data.kind == "scenes":
        return [p.caption for p in scenes.held_out_prompts("combinations", count, 1)]
    if validation is None:
        return []
    step = max(1, len(validation) // max(count, 1))
    return [validation[i * step].caption for i in range(min(count, len(validation)))]
