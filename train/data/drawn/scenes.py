"""The `scenes` preset: two objects of given size, colour and shape, and how they lie to each other; meant for a GPU.

A caption reads "a small red circle left of a big blue square on a white background". Prompts are held out and scored
as in `shapes`: the oracle reads a picture without knowing its prompt. It needs 64 pixels: small objects are tiny below.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from train.data.drawn.drawing import (
    COLOURS,
    SHAPES,
    Seen,
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
    "COLOURS", "RELATIONS", "SHAPES", "SIZES", "SceneObject", "ScenePrompt", "SceneReading", "SceneScore",
    "SceneSplit", "ScenesDataset", "all_prompts", "draw", "held_out_prompts", "read", "score", "split_prompts",
]  # fmt: skip

# Each relation's opposite: "A left of B" and "B right of A" are one picture.
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATIONS: tuple[str, ...] = tuple(_OPPOSITE)

# Radius over the shorter side: at 64 pixels 5.4 to 6.4 and 9.9 to 11.2.
_RADIUS = {"small": (0.085, 0.1), "big": (0.155, 0.175)}
SIZES: tuple[str, ...] = tuple(_RADIUS)
# Along the relation the middles are 0.40 to 0.52 apart, and two big boxes (1.1 radii each) at most 0.385 wide together:
# objects never touch. Across it they are at most 0.16 apart: the relation is never in doubt.
_ALONG, _SHIFT_ALONG, _SHIFT_ACROSS = 0.27, 0.03, 0.08

# The reader's limits: between the two sizes (geometric mean of 0.100 and 0.155), and how far outside them.
_SIZE_LIMITS = (0.05, 0.124, 0.26)
# Centres of mass must differ by half the drawn distance, and 1.4 times as much along the relation as across it (drawn
# pictures: at least 1.8 times).
_MIN_ALONG, _MIN_RATIO = 0.2, 1.4
_COMBINATIONS_SHARE = 0.2


@dataclass(frozen=True)
class SceneObject:
    """One of the two objects."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class ScenePrompt:
    """What one picture shows; the objects' colours and the background are three different ones."""

    first: SceneObject
    relation: str
    second: SceneObject
    background: str

    @property
    def caption(self) -> str:
        """The text that a model is trained on and prompted with."""
        return f"{self.first} {self.relation} {self.second} on a {self.background} background"

    @property
    def converse(self) -> "ScenePrompt":
        """The prompt that says the same, told from the other object."""
        return ScenePrompt(self.second, _OPPOSITE[self.relation], self.first, self.background)


@dataclass(frozen=True)
class SceneSplit:
    """Which prompts are trained on and which are held out; a prompt and its converse are always in the same part."""

    train: tuple[ScenePrompt, ...]
    combinations: tuple[ScenePrompt, ...]
    """Never trained on, but the (colour, shape) pairs of both objects are, in other scenes."""
    pairs: tuple[ScenePrompt, ...]
    """Every prompt with an object of one of two (colour, shape) pairs that are never trained on."""


@dataclass(frozen=True)
class SceneReading:
    """What the oracle sees in one picture: objects by colour (none where two are not clear), and the background."""

    background: str | None = None
    objects: tuple[Seen, ...] = ()


@dataclass(frozen=True)
class SceneScore:
    """Fractions (0 to 1) of `count` pictures in which each part of the prompt, and `all` five together, are right.

    Shapes, sizes and relation belong to colours: they are right only where both colours are.
    """

    colours: float
    shapes: float
    sizes: float
    relation: float
    background: float
    all: float
    count: int


@lru_cache(maxsize=1)
def all_prompts() -> tuple[ScenePrompt, ...]:
    """All 17,280 prompts in a fixed order; each picture has two, a prompt and its converse."""
    return tuple(
        ScenePrompt(SceneObject(size, colour, shape), relation, SceneObject(other_size, other, other_shape), background)
        for colour, other, background in product(COLOURS, repeat=3)
        if len({colour, other, background}) == 3
        for size, other_size in product(SIZES, repeat=2)
        for shape, other_shape in product(SHAPES, repeat=2)
        for relation in RELATIONS
    )


@lru_cache(maxsize=8)
def split_prompts(seed: int = 0) -> SceneSplit:
    """Hold out two (colour, shape) pairs, and 20 % of the other scenes, by a hash of the caption, as `combinations`.

    `seed` is not the run's: with the default, results of all runs are comparable.
    """
    pairs = held_out_pairs(generator(seed, purpose="scenes split", position=0))
    parts: dict[str, list[ScenePrompt]] = {"train": [], "combinations": [], "pairs": []}
    for prompt in all_prompts():
        objects = {(seen.colour, seen.shape) for seen in (prompt.first, prompt.second)}
        name = "pairs" if objects & set(pairs) else "combinations" if _is_held_out(prompt, seed) else "train"
        parts[name].append(prompt)
    return SceneSplit(tuple(parts["train"]), tuple(parts["combinations"]), tuple(parts["pairs"]))


def held_out_prompts(split_name: str, count: int, seed: int = 0) -> list[ScenePrompt]:
    """`count` prompts held out as "combinations" or "pairs", in an order fixed by `seed`; none repeats before all came.

    An unknown `split_name` is a `UserError`.
    """
    split = split_prompts()
    prompts = choose_held_out({"combinations": split.combinations, "pairs": split.pairs}, split_name)
    return cycle(prompts, count, generator(seed, purpose=f"scenes {split_name}", position=0))


def draw(prompt: ScenePrompt, *, height: int, width: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw a picture (height, width, 3), uint8, RGB, with slightly random places and sizes taken from `rng`.

    Sizes are in pixels, at least 16 each (else a `UserError`), and may differ.
    """
    check_size(height, width)
    picture = canvas(prompt.background, height, width)
    first_sign = -1 if prompt.relation in ("left of", "above") else 1
    for item, sign in ((prompt.first, first_sign), (prompt.second, -first_sign)):
        size, shift_along, shift_across = rng.random(3)
        along = 0.5 + sign * (0.5 - _ALONG) + _SHIFT_ALONG * (2 * shift_along - 1)
        across = 0.5 + _SHIFT_ACROSS * (2 * shift_across - 1)
        y, x = (across, along) if prompt.relation in ("left of", "right of") else (along, across)
        low, high = _RADIUS[item.size]
        radius = (low + (high - low) * size) * min(height, width)
        paint(picture, item.shape, item.colour, centre=(y * height, x * width), radius=radius)
    return to_uint8(picture)


class ScenesDataset:
    """Endless drawn examples: position p is a function of (seed, p) only, its prompt uniform over `prompts`."""

    def __init__(self, seed: int, height: int, width: int, prompts: Sequence[ScenePrompt] | None = None) -> None:
        """`height`, `width` in pixels, at least 16 (else a `UserError`); `prompts` by default those to train on."""
        check_size(height, width)
        self.seed, self.height, self.width = seed, height, width
        self.prompts = split_prompts().train if prompts is None else tuple(prompts)

    def __getitem__(self, position: int) -> Example:
        """The example at a global sample position, 0 or above: image (height, width, 3), uint8, RGB."""
        rng = generator(self.seed, purpose="scenes", position=position)
        prompt = self.prompts[rng.integers(len(self.prompts))]
        image = draw(prompt, height=self.height, width=self.width, rng=rng)
        return Example(image=image, caption=prompt.caption, key=f"scenes {position}: {prompt.caption}")


def score(images: NDArray[np.uint8], prompts: Sequence[ScenePrompt]) -> SceneScore:
    """Read each picture of `images` (n, height, width, 3), uint8, and compare it with its prompt.

    Raises a `ValueError` for another shape or dtype, no picture, or a number of prompts that is not n.
    """
    check_images(images, len(prompts))
    right = np.array([_compare(read(image), prompt) for image, prompt in zip(images, prompts, strict=True)])
    colours, shapes, sizes, relation, background = right.mean(axis=0).tolist()
    return SceneScore(
        colours, shapes, sizes, relation, background, all=float(right.all(axis=1).mean()), count=len(prompts)
    )


def read(image: NDArray[np.uint8]) -> SceneReading:
    """Read one picture (height, width, 3), uint8, of unknown prompt: its background and two objects by colour.

    Exact on drawn pictures from 48 pixels; at 32, one or two scenes in 100 are too coarse to tell.
    """
    background = read_background(image)
    if background is None:
        return SceneReading()
    return SceneReading(background[0], tuple(read_objects(image, background[1], count=2) or ()))


def _compare(reading: SceneReading, prompt: ScenePrompt) -> tuple[bool, bool, bool, bool, bool]:
    """Which of colours, shapes, sizes, relation and background are right."""
    background = reading.background == prompt.background
    seen = {item.colour: item for item in reading.objects}
    if set(seen) != {prompt.first.colour, prompt.second.colour}:
        return False, False, False, False, background
    wanted = (prompt.first, prompt.second)
    shapes = all(seen[item.colour].shape == item.shape for item in wanted)
    sizes = all(_size(seen[item.colour].radius) == item.size for item in wanted)
    relation = _relation(seen[prompt.first.colour].centre, seen[prompt.second.colour].centre)
    return True, shapes, sizes, relation == prompt.relation, background


def _size(radius: float) -> str | None:
    """Name of a radius (over the shorter side of the picture); None far outside what is drawn."""
    least, middle, most = _SIZE_LIMITS
    if not least <= radius <= most:
        return None
    return "small" if radius < middle else "big"


def _relation(first: tuple[float, float], second: tuple[float, float]) -> str | None:
    """How `first` lies to `second`, from their centres (y, x); None where they are close or diagonal."""
    y, x = second[0] - first[0], second[1] - first[1]
    along, across = max(abs(y), abs(x)), min(abs(y), abs(x))
    if along < _MIN_ALONG or along < _MIN_RATIO * across:
        return None
    if abs(x) > abs(y):
        return "left of" if x > 0 else "right of"
    return "above" if y > 0 else "below"


def _is_held_out(prompt: ScenePrompt, seed: int) -> bool:
    """Whether a hash puts the scene among the held-out combinations, the same for a prompt and its converse."""
    caption = min(prompt.caption, prompt.converse.caption)
    digest = hashlib.blake2b(f"{seed}/{caption}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < _COMBINATIONS_SHARE * 2**64
