"""What the drawn data sets `shapes` and `scenes` share: colours, anti-aliased drawing, and reading a picture back.

Drawing works from signed distances and reading from colour alone, so the two agree only where the picture is right:
the reader never sees a prompt. Coordinates are pixels, (0, 0) is the top left corner, y points down.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from train.errors import UserError, nearest

# Any two of these are at least 190 apart in RGB (0 to 441), and none lies near the blend of two others: the edge
# of a shape is never mistaken for a third colour.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (230, 30, 30),
    "green": (30, 180, 50),
    "blue": (30, 60, 230),
    "yellow": (250, 220, 30),
    "magenta": (230, 40, 220),
    "white": (250, 250, 250),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle")
MIN_SIDE = 16

# Half the width of each shape's box over its nominal radius: areas then differ by less than 1.6 times, and no box
# is wider than 2.2 radii.
_HALF_WIDTH = {"circle": 1.0, "square": 0.9, "triangle": 1.1}
_SQRT3 = 3**0.5
_AREA = {
    "circle": np.pi,
    "square": 4 * _HALF_WIDTH["square"] ** 2,
    "triangle": _SQRT3 * _HALF_WIDTH["triangle"] ** 2,
}
# A triangle's centre of mass lies below the middle of its box: a sixth of its height, in radii.
_CENTROID_DROP = {"circle": 0.0, "square": 0.0, "triangle": _SQRT3 * _HALF_WIDTH["triangle"] / 6}

# Distances in RGB. Half the least distance between two colours is 95: beyond it a pixel belongs to neither.
_MAX_COLOUR_DISTANCE = 90.0
_FOREGROUND_DISTANCE = 70.0
_MIN_BORDER_SHARE = 0.6
_MAX_STRAY_SHARE = 0.1
_MIN_INTERIOR = 4
# Below it the best template wins nothing. Measured: half discs, rings, crosses, 2:1 boxes and ellipses, and triangles
# that point down fit none with more than 0.75; drawn shapes at 32 pixels under a blur of 1 pixel and noise of 12/255
# fit with 0.84 or more.
MIN_IOU = 0.8

_NAMES = tuple(COLOURS)
_PALETTE = np.array([COLOURS[name] for name in _NAMES], dtype=np.float32)

Item = TypeVar("Item")


@dataclass(frozen=True)
class Seen:
    """One object as the reader found it."""

    colour: str
    shape: str | None
    """None where no shape fits with an intersection over union of `MIN_IOU`."""
    radius: float
    """Nominal radius of the best fitting shape, over the shorter side of the picture."""
    centre: tuple[float, float]
    """Centre of mass (y, x), each a fraction of height and width."""
    iou: float


def check_size(height: int, width: int) -> None:
    """Refuse a picture size that shapes cannot be drawn at, with a `UserError`."""
    if height < MIN_SIDE or width < MIN_SIDE:
        raise UserError(
            f"drawn pictures need a height and width of at least {MIN_SIDE} pixels, got {height} x {width}; "
            "choose a larger size"
        )


def canvas(background: str, height: int, width: int) -> NDArray[np.float32]:
    """An evenly coloured picture (height, width, 3), float32, 0 to 255, to `paint` on."""
    picture = np.empty((height, width, 3), dtype=np.float32)
    picture[:] = COLOURS[background]
    return picture


def paint(picture: NDArray[np.float32], shape: str, colour: str, *, centre: tuple[float, float], radius: float) -> None:
    """Draw one anti-aliased shape into `picture` (height, width, 3), in place; `centre` (y, x) and `radius` in pixels.

    `centre` is the middle of the shape's box; boxes reach 1.0 (circle), 0.9 (square), 1.1 (triangle) radii sideways.
    """
    y, x = _pixel_centres(picture.shape[0], picture.shape[1])
    alpha = np.clip(0.5 - _signed_distance(shape, y - centre[0], x - centre[1], radius), 0, 1)[..., None]
    picture += alpha * (np.asarray(COLOURS[colour], dtype=np.float32) - picture)


def to_uint8(picture: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Round a picture of floats, 0 to 255, to uint8."""
    return (picture + 0.5).astype(np.uint8)


def check_images(images: NDArray[np.uint8], count: int) -> None:
    """Raise a `ValueError` unless `images` is (count, height, width, 3), uint8, with count above 0."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"pictures to score must be (n, height, width, 3) uint8, got {images.shape} {images.dtype}")
    if len(images) != count or count == 0:
        raise ValueError(f"scoring needs one prompt a picture and at least one, got {len(images)} and {count}")


def read_background(image: NDArray[np.uint8]) -> tuple[str, NDArray[np.float32]] | None:
    """Name and measured RGB of the background, from the outermost ring of pixels; None where no colour is clear."""
    ring = np.concatenate([image[0], image[-1], image[1:-1, 0], image[1:-1, -1]]).astype(np.float32)
    vote = _nearest_colour(ring)
    winner = int(np.bincount(vote, minlength=len(_NAMES)).argmax())
    chosen = vote == winner
    rgb = np.median(ring[chosen], axis=0).astype(np.float32)
    if chosen.mean() < _MIN_BORDER_SHARE or np.linalg.norm(rgb - _PALETTE[winner]) > _MAX_COLOUR_DISTANCE:
        return None
    return _NAMES[winner], rgb


def read_objects(image: NDArray[np.uint8], background: NDArray[np.float32], count: int) -> list[Seen] | None:
    """Find `count` objects of different colours on `background` (the RGB that `read_background` measured).

    None where there are fewer, where one has no clear colour, or where more than a tenth of what differs from the
    background is neither one of these colours nor its blend with the background.
    """
    pixels = image.astype(np.float32)
    mask = np.linalg.norm(pixels - background, axis=2) > _FOREGROUND_DISTANCE
    interior = _eroded(mask)
    ys, xs = np.nonzero(interior)
    vote = _nearest_colour(pixels[interior])
    votes = np.bincount(vote, minlength=len(_NAMES))
    winners = [int(index) for index in np.argsort(-votes, kind="stable")[:count]]
    if votes[winners[-1]] < _MIN_INTERIOR:
        return None
    owner = _nearest_object(image.shape[:2], [(ys[vote == w], xs[vote == w]) for w in winners])
    alphas, stray = [], 0
    for index, winner in enumerate(winners):
        rgb = pixels[ys[vote == winner], xs[vote == winner]].mean(axis=0)
        if np.linalg.norm(rgb - _PALETTE[winner]) > _MAX_COLOUR_DISTANCE:
            return None
        alpha, off_line = _unblend(pixels, background, rgb)
        alphas.append(np.where(owner == index, alpha, 0))
        stray += int(np.count_nonzero(mask & (owner == index) & (off_line > _FOREGROUND_DISTANCE)))
    if stray > _MAX_STRAY_SHARE * np.count_nonzero(mask):
        return None
    return [_fit(_NAMES[winner], alpha) for winner, alpha in zip(winners, alphas, strict=True)]


def held_out_pairs(rng: np.random.Generator) -> tuple[tuple[str, str], tuple[str, str]]:
    """Draw two (colour, shape) pairs that share neither colour nor shape, so that both stay known from other pairs."""
    colours = rng.choice(len(_NAMES), size=2, replace=False)
    shapes = rng.choice(len(SHAPES), size=2, replace=False)
    return (_NAMES[colours[0]], SHAPES[shapes[0]]), (_NAMES[colours[1]], SHAPES[shapes[1]])


def choose_held_out(groups: dict[str, tuple[Item, ...]], name: str) -> tuple[Item, ...]:
    """The prompts held out under `name`; an unknown name is a `UserError` that lists the known ones."""
    if name not in groups:
        raise UserError(f"no held-out prompts named {name!r}{nearest(name, groups)}; known: {', '.join(groups)}")
    return groups[name]


def cycle(items: Sequence[Item], count: int, rng: np.random.Generator) -> list[Item]:
    """`count` of `items` in random order; none comes twice before all came once."""
    order = rng.permutation(len(items))
    return [items[order[index % len(items)]] for index in range(count)]


@lru_cache(maxsize=16)
def _pixel_centres(height: int, width: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Pixel centres y (height, 1) and x (1, width)."""
    y = (np.arange(height) + 0.5).astype(np.float32)[:, None]
    x = (np.arange(width) + 0.5).astype(np.float32)[None, :]
    return y, x


def _signed_distance(
    shape: str, y: NDArray[np.float32], x: NDArray[np.float32], radius: float | NDArray[np.float32]
) -> NDArray[np.float32]:
    """Distance to the shape's edge, negative inside, for offsets y and x from the middle of its box (broadcast)."""
    half = radius * np.float32(_HALF_WIDTH[shape])
    if shape == "circle":
        return np.sqrt(y * y + x * x) - half
    if shape == "square":
        return np.maximum(np.abs(y), np.abs(x)) - half
    half_height = half * np.float32(_SQRT3 / 2)
    slope = np.abs(x) * np.float32(_SQRT3 / 2) - (y + half_height) * np.float32(0.5)
    return np.maximum(slope, y - half_height)


def _nearest_colour(pixels: NDArray[np.float32]) -> NDArray[np.intp]:
    """Index into the palette of the colour nearest to each pixel (n, 3)."""
    # |p - c|^2 without |p|^2, which is the same for every colour.
    return ((_PALETTE**2).sum(axis=1) - 2 * pixels @ _PALETTE.T).argmin(axis=1)


def _eroded(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels of the mask whose four neighbours are in it too: those that no edge has blended."""
    inner = np.zeros_like(mask)
    inner[1:-1, 1:-1] = mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
    return inner


def _nearest_object(
    size: tuple[int, ...], members: list[tuple[NDArray[np.intp], NDArray[np.intp]]]
) -> NDArray[np.intp]:
    """For each pixel, which object it belongs to: least distance to the object's middle, measured in its own sizes."""
    if len(members) == 1:
        return np.zeros(size, dtype=np.intp)
    y, x = _pixel_centres(size[0], size[1])
    distances = [((y - ys.mean() - 0.5) ** 2 + (x - xs.mean() - 0.5) ** 2) / len(ys) for ys, xs in members]
    return np.stack(distances).argmin(axis=0)


def _unblend(
    pixels: NDArray[np.float32], background: NDArray[np.float32], colour: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Split each pixel into its share of `colour` over `background` (0 to 1) and its distance from that blend."""
    line = colour - background
    difference = pixels - background
    share: NDArray[np.float32] = np.clip(difference @ line / (line @ line), 0, 1)
    return share, np.sqrt(((difference - share[..., None] * line) ** 2).sum(axis=2))


# The middle 60 % of the blend are stretched to 0 to 1 in picture and template: noise of 12/255 (0.06 of the
# distance between two colours) then leaves the background empty.
_STRETCH = 0.6
_SIZES = (0.92, 1.0, 1.08)
_OFFSETS = ((0.0, 0.0), (-0.4, 0.0), (0.4, 0.0), (0.0, -0.4), (0.0, 0.4))
_TRIALS = np.array([(size, y, x) for size in _SIZES for y, x in _OFFSETS], dtype=np.float32)


def _fit(colour: str, alpha: NDArray[np.float32]) -> Seen:
    """Fit each shape to a soft mask (height, width) near the place and size that its moments give."""
    height, width = alpha.shape
    alpha = np.clip((alpha - 0.5) / _STRETCH + 0.5, 0, 1)
    y, x = _pixel_centres(height, width)
    area = float(alpha.sum())
    if area == 0:
        return Seen(colour=colour, shape=None, radius=0.0, centre=(0.5, 0.5), iou=0.0)
    middle = float((alpha * y).sum()) / area, float((alpha * x).sum()) / area
    rows, columns = np.nonzero(alpha.any(axis=1))[0], np.nonzero(alpha.any(axis=0))[0]
    box = slice(max(rows[0] - 2, 0), rows[-1] + 3), slice(max(columns[0] - 2, 0), columns[-1] + 3)
    best, best_iou, best_radius = SHAPES[0], -1.0, 0.0
    for shape in SHAPES:
        iou, radius = _best_iou(shape, alpha[box], y[box[0]], x[:, box[1]], middle, area)
        if iou > best_iou:
            best, best_iou, best_radius = shape, iou, radius
    return Seen(
        colour=colour,
        shape=best if best_iou >= MIN_IOU else None,
        radius=best_radius / min(height, width),
        centre=(middle[0] / height, middle[1] / width),
        iou=best_iou,
    )


def _best_iou(
    shape: str,
    alpha: NDArray[np.float32],
    y: NDArray[np.float32],
    x: NDArray[np.float32],
    middle: tuple[float, float],
    area: float,
) -> tuple[float, float]:
    """Best intersection over union of one shape with the mask over `_TRIALS`, and the radius that reached it."""
    matched = (area / _AREA[shape]) ** 0.5
    radius = (matched * _TRIALS[:, 0])[:, None, None]
    centre_y = (middle[0] + _TRIALS[:, 1])[:, None, None] - np.float32(_CENTROID_DROP[shape]) * radius
    centre_x = (middle[1] + _TRIALS[:, 2])[:, None, None]
    distance = _signed_distance(shape, y - centre_y, x - centre_x, radius)
    template = np.clip(0.5 - distance / np.float32(_STRETCH), 0, 1)
    shared = np.minimum(template, alpha).sum(axis=(1, 2))
    # The template's whole area, also what lies outside the mask's box, from geometry.
    iou = shared / (area + _AREA[shape] * radius[:, 0, 0] ** 2 - shared)
    trial = int(iou.argmax())
    return float(iou[trial]), float(radius[trial, 0, 0])
