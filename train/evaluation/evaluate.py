"""What a run is judged by: prompt accuracy from an exact oracle, held-out loss, distances to real pictures, grids.

Everything here takes the modules as they are: the loop swaps the averaged weights in where they are meant. Every rank
calls it with the same arguments and does its share, since a sharded model runs on all of them together; what is found
is on rank 0. `between` is called on all ranks after every part, for whoever wants to stop or to know that work goes on.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from prx_kernels import x_prediction_loss
from prx_model import flow
from prx_model.sampler import sample
from train.data.drawn import scenes, shapes
from train.data.loader import HeldOut, by_size, collate, to_float, to_uint8
from train.evaluation.distances import Distances
from train.learner.build import Modules
from train.randomness import derive_seed
from train.ranks.parallel import World, average, gather
from train.recipes import Recipe

FIXED_T = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Times of the held-out loss."""
_BATCH = 64
"""Samples a rank takes at once."""


def _nothing() -> None:
    return None


@torch.no_grad()
def draw(
    modules: Modules,
    prompts: Sequence[str],
    recipe: Recipe,
    world: World,
    *,
    seeds: Sequence[int] | None = None,
    between: Callable[[], None] = _nothing,
) -> Tensor:
    """Draw a picture for each prompt, with seeds 0 … n-1 unless given.

    Returns:
        (n, 3, height, width) uint8 on rank 0's host; (0, 3, height, width) on the others.
    """
    seeds = range(len(prompts)) if seeds is None else seeds
    null_text, null_mask = modules.encode([""])
    drawn = []
    for numbers, count in _shares(range(len(prompts)), world):
        text, mask = modules.encode([prompts[i] for i in numbers])
        part = sample(
            modules.model,
            text,
            mask,
            height=recipe.data.height,
            width=recipe.data.width,
            seeds=torch.tensor([seeds[i] for i in numbers], dtype=torch.int64, device=world.device),
            settings=recipe.sampling,
            null_text=null_text,
            null_mask=null_mask,
            routing=recipe.routing,
        )
        pictures = gather(to_uint8(part), world)
        drawn.append(pictures[:count] if pictures is not None else part[:0].to("cpu", torch.uint8))
        between()
    return torch.cat(drawn)


def guidance_notes(recipe: Recipe) -> list[str]:
    """What a user should know about the guidance of a recipe, as sentences."""
    sampling = recipe.sampling
    if recipe.routing.enabled or sampling.guidance_kind != "self" or sampling.guidance == 1.0:
        return []
    return [
        "this model is trained without routing, and self-guidance then often makes pictures worse; "
        "--sampling.guidance-kind cfg (of generate.py: --guidance-kind cfg) draws against the empty prompt"
    ]


def prompt_accuracy(
    modules: Modules, recipe: Recipe, world: World, between: Callable[[], None] = _nothing
) -> dict[str, float]:
    """Share of held-out prompts that the oracle finds drawn right, by part and split ("combinations/all", …).

    "combinations" are prompts whose parts were all seen, never together; "pairs" have a colour and shape that never
    met in training. Empty on ranks other than 0.
    """
    source = {"shapes": shapes, "scenes": scenes}[recipe.data.kind]
    count = recipe.evaluation.prompts
    result: dict[str, float] = {}
    for split_name, number in (("combinations", count), ("pairs", max(1, count // 2))):
        prompts = source.held_out_prompts(split_name, number, 0)
        images = draw(modules, [p.caption for p in prompts], recipe, world, between=between)
        if world.is_main:
            score = source.score(images.permute(0, 2, 3, 1).numpy(), prompts)
            result |= {f"{split_name}/{part}": float(value) for part, value in asdict(score).items()}
    return result


@torch.no_grad()
def held_out_loss(
    modules: Modules, dataset: HeldOut, recipe: Recipe, world: World, between: Callable[[], None] = _nothing
) -> dict[str, float]:
    """Dense loss on validation pictures at fixed times and noise, by resolution, height first; on every rank.

    "loss/64x48" is the mean over `FIXED_T` of "loss/64x48/t=0.1", …; a picture's noise is the same in every run.
    """
    device = world.device
    noise_seed = torch.tensor(derive_seed(0, purpose="held-out noise"), device=device)
    sums: dict[str, Tensor] = {}
    shares = [share for numbers in by_size(dataset, recipe.evaluation.images) for share in _shares(numbers, world)]
    for numbers, count in shares:
        batch = collate([(i, dataset[i]) for i in numbers]).to(device)
        image = to_float(batch.image)
        noise = flow.draw_noise(noise_seed, batch.positions, image)
        text, mask = modules.encode(batch.captions)
        # Of a last share that was filled up, what is repeated does not count.
        real = (torch.arange(len(numbers)) + world.rank * len(numbers) < count).to(device)
        losses = []
        for value in FIXED_T:
            t = torch.full((image.shape[0],), value, device=device)
            noisy = flow.add_noise(image, noise, t, noise_scale=recipe.flow.noise_scale)
            tokens = modules.model.forward_tokens(noisy, t[:1], text, mask)  # one time for all, as in sampling
            each = x_prediction_loss(
                tokens, image, t, recipe.model.patch_size, t_min=recipe.flow.t_min, reduction="none"
            )
            losses.append(torch.where(real, each, 0.0).sum())
        size = f"{image.shape[2]}x{image.shape[3]}"
        found = torch.stack([*losses, real.sum()])
        sums[size] = sums[size] + found if size in sums else found
        between()
    result: dict[str, float] = {}
    for size, total in sums.items():
        *by_t, seen = average(total, world).tolist()
        means = [loss / seen for loss in by_t]
        result[f"loss/{size}"] = sum(means) / len(means)
        result |= {f"loss/{size}/t={t}": mean for t, mean in zip(FIXED_T, means, strict=True)}
    return result


def distances(
    modules: Modules,
    dataset: HeldOut,
    recipe: Recipe,
    measure: Distances | None,
    world: World,
    between: Callable[[], None] = _nothing,
) -> dict[str, float]:
    """The distances that rank 0's `measure` holds, of drawn pictures to validation pictures with the same captions."""
    whole = _BATCH * world.size
    parts = [
        numbers[first : first + whole]
        for numbers in by_size(dataset, recipe.evaluation.samples)
        for first in range(0, len(numbers), whole)
    ]
    for numbers in parts:
        examples = [dataset[i] for i in numbers]
        captions = [example.caption for example in examples]
        images = draw(modules, captions, recipe, world, seeds=numbers, between=between)
        if measure is not None:
            if not measure.has_real:
                measure.add(collate(list(zip(numbers, examples, strict=True))).image, real=True)
            measure.add(images, real=False)
    if measure is None:
        return {}
    measure.has_real = True
    return measure.compute()


def _shares(numbers: Sequence[int], world: World) -> Iterator[tuple[list[int], int]]:
    """This rank's share of the numbers, part by part, and how many all ranks have in that part together.

    Every rank gets as many as every other, so that all of them run as often: the last number is repeated for that.
    """
    whole = _BATCH * world.size
    for first in range(0, len(numbers), whole):
        part = list(numbers[first : first + whole])
        each = -(-len(part) // world.size)
        filled = part + [part[-1]] * (each * world.size - len(part))
        yield filled[world.rank * each : (world.rank + 1) * each], len(part)


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
