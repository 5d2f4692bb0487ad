"""Draw pictures with a trained model.

python train/generate.py runs/shapes "a red circle on a blue background, top left" --out picture.png
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

sys.path[0] = str(Path(__file__).resolve().parents[1])

from prx_model.ranges import Range  # noqa: E402
from train.commandline import read_options  # noqa: E402
from train.errors import UserError, exit_with_sentence  # noqa: E402

if TYPE_CHECKING:
    from train.data.settings import Data
    from train.recipes import Recipe


@dataclass(frozen=True)
class Arguments:
    """Options of generate.py; what is not given comes from the run's recipe."""

    run: Path
    """A run's folder or a checkpoint."""
    prompts: tuple[str, ...]
    """One or more prompts."""
    out: Path = Path("picture.png")
    steps: int | None = None
    """Euler steps."""
    guidance: float | None = None
    """1 is no guidance."""
    guidance_kind: Literal["cfg", "self"] | None = None
    """cfg: against the empty prompt; self: against a routed pass."""
    time_grid: Literal["linear", "diffusers"] | None = None
    """linear: equal steps, then shifted, as PRX draws; diffusers: as an exported pipeline draws."""
    seed: Annotated[int, Range(-(2**63), 2**63 - 1)] = 0
    """Of the first picture; the next ones count up."""
    grid: Annotated[int, Range(1, 10_000)] = 1
    """Pictures for each prompt; more than one picture in all gives a grid with captions."""
    height: Annotated[int | None, Range(1, 65_536)] = None
    width: Annotated[int | None, Range(1, 65_536)] = None
    weights: Literal["ema", "raw"] = "ema"
    device: Literal["auto", "cpu", "cuda"] = "auto"


def main() -> int:
    arguments = read_options(_positional(), prog="generate.py", description=__doc__)
    if not arguments.prompts:
        raise UserError('give at least one prompt, as in generate.py runs/shapes "a red circle" --out picture.png')
    if not arguments.run.is_dir():
        raise UserError(f"there is no folder {arguments.run}; give a run's folder, or one of its checkpoints/step-N")
    if arguments.out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--out {arguments.out} must end in .png, .jpg or .webp")
    draw(arguments)
    print(arguments.out)
    return 0


def draw(arguments: Arguments) -> None:
    """Draw and write the picture or the grid.

    Raises:
        UserError: a folder that holds no model, or settings that do not fit it.
    """
    from train.evaluation import evaluate
    from train.evaluation.pictures import save_grid, save_picture
    from train.ranks import parallel
    from train.recipes import Train
    from train.run.trained import load_trained

    world = parallel.start(Train(device=arguments.device, precision="fp32"))
    trained = load_trained(arguments.run, world.device, weights=arguments.weights)
    recipe = trained.recipe
    changes = {name: getattr(arguments, name) for name in ("steps", "guidance", "guidance_kind", "time_grid")}
    size = {name: getattr(arguments, name) for name in ("height", "width")}
    try:
        sampling = replace(recipe.sampling, **{k: v for k, v in changes.items() if v is not None})
        data = replace(recipe.data, **{k: v for k, v in size.items() if v is not None})
        recipe.model.tokens(data.height, data.width)
    except ValueError as error:
        raise UserError(str(error)) from None
    drawn = replace(recipe, sampling=sampling, data=data)
    for note in [*evaluate.guidance_notes(drawn), *_size_note(recipe, data)]:
        print(f"note: {note}")
    prompts = [prompt for prompt in arguments.prompts for _ in range(arguments.grid)]
    seeds = range(arguments.seed, arguments.seed + len(prompts))
    # As sharded training computes: float32 weights are cast, t and rotary tables are not.
    for module in trained.modules.trained().values():
        module.to(parallel.compute_dtype(recipe.train, world.device))
    images = evaluate.draw(trained.modules, prompts, drawn, world, seeds=seeds)
    if len(prompts) == 1:
        save_picture(images[0], arguments.out)
    else:
        save_grid(images, prompts, arguments.out)


def _size_note(recipe: "Recipe", asked: "Data") -> list[str]:
    """What a user should know about a size that the model has never seen."""
    from train.data.buckets import bucket_sizes

    data = recipe.data
    seen = {(data.height, data.width)}
    if data.buckets:
        seen |= set(bucket_sizes(data.height, data.width, recipe.model.patch_size))
    if (asked.height, asked.width) in seen:
        return []
    trained = f"around {data.height}x{data.width}" if data.buckets else f"of {data.height}x{data.width}"
    return [
        f"this model was trained on pictures {trained} (height x width); pictures of {asked.height}x{asked.width} are "
        "often worse"
    ]


def _positional() -> type[Arguments]:
    """`Arguments` with its first two fields as positional words; tyro is imported only where it parses."""
    import tyro

    Arguments.__annotations__["run"] = Annotated[Path, tyro.conf.Positional]
    Arguments.__annotations__["prompts"] = Annotated[tuple[str, ...], tyro.conf.Positional]
    return Arguments


if __name__ == "__main__":
    exit_with_sentence(main)
