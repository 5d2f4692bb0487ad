"""The `shapes` preset: one shape on a background, drawn on the fly, with prompts held out and an exact oracle.

A caption reads "a red circle on a blue background, top left". `score` reads pictures without knowing their prompts and
only then compares: 100 % on drawn pictures, nothing on noise, so its figures are prompt accuracy and nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from train.data.drawn.drawing import (
    COLOURS,
    SHAPES,
    canvas,
    check_images,
    check_size,
    choose_held_out,
    cycle,
    held_out_pairs,
    paint,
    read_background,
    read_objects,
    to_uint8,
)
from train.data.example import Example
from train.randomness import generator

__all__ = [
    "COLOURS", "POSITIONS", "SHAPES", "Prompt", "Reading", "Score", "ShapesDataset", "Split",
    "all_prompts", "draw", "held_out_prompts", "read", "score", "split_prompts",
]  # fmt: skip

# Middle of the shape's box (y, x), each a fraction of height and width.
_CENTRES: dict[str, tuple[float, float]] = {
    "top left": (0.25, 0.25),
    "top right": (0.25, 0.75),
    "bottom left": (0.75, 0.25),
    "bottom right": (0.75, 0.75),
    "center": (0.5, 0.5),
}
POSITIONS: tuple[str, ...] = tuple(_CENTRES)

# Radius over the shorter side: 5.4 to 6.7 pixels at 32. With the shift, the widest box (1.1 radii) just stays inside.
_RADIUS = (0.17, 0.21)
_SHIFT = 0.019
# A corner and the center are 0.354 apart; nearer than 0.15 to one of them is far from both others.
_MAX_POSITION_DISTANCE = 0.15
# An object far outside the drawn sizes is no shape of this data set.
_READ_RADIUS = (0.6 * _RADIUS[0], 1.5 * _RADIUS[1])
_COMBINATIONS_SHARE = 0.2


@dataclass(frozen=True)
class Prompt:
    """What one picture shows; `colour` and `background` differ."""

    colour: str
    shape: str
    background: str
    position: str

    @property
    def caption(self) -> str:
        """The text that a model is trained on and prompted with."""
        return f"a {self.colour} {self.shape} on a {self.background} background, {self.position}"


@dataclass(frozen=True)
class Split:
    """Which prompts are trained on and which are held out; the three parts together are `all_prompts()`."""

    train: tuple[Prompt, ...]
    combinations: tuple[Prompt, ...]
    """Never trained on, but their (colour, shape) pair is, on other backgrounds or at other positions."""
    pairs: tuple[Prompt, ...]
    """Every prompt of two (colour, shape) pairs that are never trained on."""


@dataclass(frozen=True)
class Reading:
    """What the oracle sees in one picture; None where it sees nothing clear."""

    colour: str | None = None
    shape: str | None = None
    background: str | None = None
    position: str | None = None


@dataclass(frozen=True)
class Score:
    """Fractions (0 to 1) of `count` pictures in which each part of the prompt, and `all` four together, are right."""

    colour: float
    background: float
    position: float
    shape: float
    all: float
    count: int


def all_prompts() -> list[Prompt]:
    """All 450 prompts (6 colours, 3 shapes, 5 other backgrounds, 5 positions), in a fixed order."""
    return [
        Prompt(colour=colour, shape=shape, background=background, position=position)
        for colour, shape, background, position in product(COLOURS, SHAPES, COLOURS, POSITIONS)
        if colour != background
    ]


@lru_cache(maxsize=8)
def split_prompts(seed: int = 0) -> Split:
    """Hold out two (colour, shape) pairs, and 20 % of the other prompts as `combinations`.

    `seed` is not the run's: with the default, results of all runs are comparable. What stays in training covers every
    colour, shape, background, position and every (colour, shape) pair that is not held out.
    """
    rng = generator(seed, purpose="shapes split", position=0)
    held_out = held_out_pairs(rng)
    pairs = tuple(prompt for prompt in all_prompts() if (prompt.colour, prompt.shape) in held_out)
    others = [prompt for prompt in all_prompts() if (prompt.colour, prompt.shape) not in held_out]
    while True:
        chosen = set(rng.permutation(len(others))[: round(_COMBINATIONS_SHARE * len(others))].tolist())
        train = tuple(prompt for index, prompt in enumerate(others) if index not in chosen)
        if _covered(train) == _covered(others):
            combinations = tuple(prompt for index, prompt in enumerate(others) if index in chosen)
            return Split(train=train, combinations=combinations, pairs=pairs)


def held_out_prompts(split_name: str, count: int, seed: int = 0) -> list[Prompt]:
    """`count` prompts held out as "combinations" or "pairs", in an order fixed by `seed`; none repeats before all came.

    An unknown `split_name` is a `UserError`.
    """
    split = split_prompts()
    prompts = choose_held_out({"combinations": split.combinations, "pairs": split.pairs}, split_name)
    return cycle(prompts, count, generator(seed, purpose=f"shapes {split_name}", position=0))


def draw(prompt: Prompt, *, height: int, width: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw a picture (height, width, 3), uint8, RGB, with a slightly random place and size taken from `rng`.

    Sizes are in pixels, at least 16 each (else a `UserError`), and may differ.
    """
    check_size(height, width)
    size, shift_y, shift_x = rng.random(3)
    y, x = _CENTRES[prompt.position]
    centre = (y + _SHIFT * (2 * shift_y - 1)) * height, (x + _SHIFT * (2 * shift_x - 1)) * width
    radius = (_RADIUS[0] + (_RADIUS[1] - _RADIUS[0]) * size) * min(height, width)
    picture = canvas(prompt.background, height, width)
    paint(picture, prompt.shape, prompt.colour, centre=centre, radius=radius)
    return to_uint8(picture)


class ShapesDataset:
    """Endless drawn examples: position p is a function of (seed, p) only, its prompt uniform over `prompts`."""

    def __init__(self, seed: int, height: int, width: int, prompts: Sequence[Prompt] | None = None) -> None:
        """`height`, `width` in pixels, at least 16 (else a `UserError`); `prompts` by default those to train on."""
        check_size(height, width)
        self.seed, self.height, self.width = seed, height, width
        self.prompts = split_prompts().train if prompts is None else tuple(prompts)

    def __getitem__(self, position: int) -> Example:
        """The example at a global sample position, 0 or above: image (height, width, 3), uint8, RGB."""
        rng = generator(self.seed, purpose="shapes", position=position)
        prompt = self.prompts[rng.integers(len(self.prompts))]
        image = draw(prompt, height=self.height, width=self.width, rng=rng)
        return Example(image=image, caption=prompt.caption, key=f"shapes {position}: {prompt.caption}")


def score(images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> Score:
    """Read each picture of `images` (n, height, width, 3), uint8, and compare it with its prompt.

    Raises a `ValueError` for another shape or dtype, no picture, or a number of prompts that is not n.
    """
    check_images(images, len(prompts))
    readings = [read(image) for image in images]
    fields = ("colour", "background", "position", "shape")
    right = np.array(
        [
            [getattr(reading, field) == getattr(prompt, field) for field in fields]
            for reading, prompt in zip(readings, prompts, strict=True)
        ]
    )
    colour, background, position, shape = right.mean(axis=0).tolist()
    return Score(colour, background, position, shape, all=float(right.all(axis=1).mean()), count=len(prompts))


def read(image: NDArray[np.uint8]) -> Reading:
    """Read one picture (height, width, 3), uint8, of unknown prompt.

    Background: most frequent colour of the border. Colour: of what differs from it, if that is of one colour.
    Position: of its centre of mass. Shape: the best fitting of the three, if its intersection over union is enough.
    Exact on drawn pictures from 24 pixels; at 16, one shape in 200 is too coarse to tell.
    """
    background = read_background(image)
    if background is None:
        return Reading()
    objects = read_objects(image, background[1], count=1)
    if objects is None or not _READ_RADIUS[0] <= objects[0].radius <= _READ_RADIUS[1]:
        return Reading(background=background[0])
    seen = objects[0]
    return Reading(
        colour=seen.colour, shape=seen.shape, background=background[0], position=_nearest_position(seen.centre)
    )


def _nearest_position(centre: tuple[float, float]) -> str | None:
    distance = {name: float(np.hypot(centre[0] - y, centre[1] - x)) for name, (y, x) in _CENTRES.items()}
    name = min(distance, key=distance.__getitem__)
    return name if distance[name] <= _MAX_POSITION_DISTANCE else None


def _covered(prompts: Sequence[Prompt]) -> set[tuple[str, str]]:
    """Every value of every field, and every (colour, shape) pair, that these prompts show."""
    fields = {(field, getattr(prompt, field)) for prompt in prompts for field in ("background", "position")}
    return fields | {(prompt.colour, prompt.shape) for prompt in prompts}
