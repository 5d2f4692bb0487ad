"""The `shapes` data set and its oracle: exact on drawn pictures, tolerant of noise and blur, else nothing."""

from dataclasses import astuple

import numpy as np
import pytest

from train.data.drawn import shapes
from train.data.drawn.shapes import COLOURS, POSITIONS, SHAPES, Prompt, ShapesDataset
from train.errors import UserError

ALL = shapes.all_prompts()
Y, X = np.mgrid[:64, :64] + 0.5


def drawn(height, width, seed=0, prompts=ALL):
    rng = np.random.default_rng(seed)
    return np.stack([shapes.draw(prompt, height=height, width=width, rng=rng) for prompt in prompts])


def noisy(images, sigma=12, seed=0):
    noise = np.random.default_rng(seed).normal(0, sigma, images.shape)
    return np.clip(np.rint(images + noise), 0, 255).astype(np.uint8)


def blurred(images, sigma=1.0):
    kernel = np.exp(-(np.arange(-4, 5) ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    for axis in (1, 2):
        pad = [(4, 4) if a == axis else (0, 0) for a in range(4)]
        padded = np.pad(images.astype(float), pad, mode="edge")
        shifted = [np.take(padded, range(k, k + images.shape[axis]), axis) for k in range(9)]
        images = sum(w * part for w, part in zip(kernel, shifted, strict=True))
    return np.rint(images).astype(np.uint8)


def figure(*parts, background="white"):
    """A 64-pixel picture of (mask, colour) parts, without anti-aliasing."""
    picture = np.empty((64, 64, 3), dtype=np.uint8)
    picture[:] = COLOURS[background]
    for mask, colour in parts:
        picture[mask] = COLOURS[colour]
    return picture


def disc(y, x, radius):
    return np.hypot(Y - y, X - x) < radius


def test_there_are_450_prompts_with_450_captions():
    assert len(ALL) == len({prompt.caption for prompt in ALL}) == 450


def test_caption_reads_as_documented():
    assert Prompt("red", "circle", "blue", "top left").caption == "a red circle on a blue background, top left"


def test_any_two_colours_are_at_least_190_apart():
    rgb = np.array(list(COLOURS.values()), dtype=float)
    distances = np.linalg.norm(rgb[:, None] - rgb, axis=2)[~np.eye(6, dtype=bool)]
    assert distances.min() >= 190


def test_no_colour_is_near_the_blend_of_two_others():
    rgb = [np.array(value, dtype=float) for value in COLOURS.values()]
    share = np.linspace(0, 1, 101)[:, None]
    nearest = min(
        np.linalg.norm(a + share * (b - a) - c, axis=1).min()
        for a in rgb for b in rgb for c in rgb if a is not b and c is not a and c is not b
    )  # fmt: skip
    assert nearest > 120


def test_split_is_a_partition_with_320_80_and_50_prompts():
    split = shapes.split_prompts()
    assert [len(part) for part in (split.train, split.combinations, split.pairs)] == [320, 80, 50]
    assert {*split.train, *split.combinations, *split.pairs} == set(ALL)


@pytest.mark.parametrize("seed", range(5))
def test_held_out_pairs_are_never_trained_on_and_share_neither_colour_nor_shape(seed):
    split = shapes.split_prompts(seed)
    pairs = {(prompt.colour, prompt.shape) for prompt in split.pairs}
    assert len(pairs) == 2
    assert len({c for c, _ in pairs}) == 2
    assert len({s for _, s in pairs}) == 2
    assert not pairs & {(prompt.colour, prompt.shape) for prompt in (*split.train, *split.combinations)}


@pytest.mark.parametrize("seed", range(5))
def test_training_keeps_every_value_and_every_other_colour_and_shape_pair(seed):
    train = shapes.split_prompts(seed).train
    assert {prompt.colour for prompt in train} == {prompt.background for prompt in train} == set(COLOURS)
    assert {prompt.shape for prompt in train} == set(SHAPES)
    assert {prompt.position for prompt in train} == set(POSITIONS)
    assert len({(prompt.colour, prompt.shape) for prompt in train}) == 16


def test_split_is_the_same_when_made_afresh_and_another_for_another_seed():
    first = shapes.split_prompts()
    shapes.split_prompts.cache_clear()
    assert shapes.split_prompts() == first
    assert shapes.split_prompts(1).combinations != first.combinations


@pytest.mark.parametrize("name", ["combinations", "pairs"])
def test_held_out_prompts_are_never_trained_on_and_repeat_only_after_all_came(name):
    held_out = getattr(shapes.split_prompts(), name)
    prompts = shapes.held_out_prompts(name, 2 * len(held_out) + 3, seed=4)
    assert not set(prompts) & set(shapes.split_prompts().train)
    assert set(prompts[: len(held_out)]) == set(prompts[len(held_out) : 2 * len(held_out)]) == set(held_out)
    assert prompts == shapes.held_out_prompts(name, len(prompts), seed=4)
    assert prompts[:20] != shapes.held_out_prompts(name, 20, seed=5)


def test_unknown_held_out_name_is_a_sentence_with_the_nearest_name():
    with pytest.raises(UserError, match="'pair'; did you mean 'pairs'"):
        shapes.held_out_prompts("pair", 4)


@pytest.mark.parametrize("size", [(15, 32), (32, 0)])
def test_pictures_under_16_pixels_are_refused(size):
    with pytest.raises(UserError, match=f"at least 16 pixels, got {size[0]} x {size[1]}"):
        ShapesDataset(0, *size)


def test_example_depends_on_seed_and_position_only():
    dataset, again, other = ShapesDataset(3, 32, 48), ShapesDataset(3, 32, 48), ShapesDataset(4, 32, 48)
    dataset[5]
    assert np.array_equal(dataset[7].image, again[7].image)
    assert dataset[7].caption == again[7].caption
    assert dataset[7].image.shape == (32, 48, 3)
    assert dataset[7].image.dtype == np.uint8
    assert [dataset[p].caption for p in range(20)] != [other[p].caption for p in range(20)]


def test_dataset_draws_training_prompts_only_and_reaches_all_of_them():
    dataset = ShapesDataset(0, 16, 16)
    captions = {dataset[position].caption for position in range(4000)}
    assert captions == {prompt.caption for prompt in shapes.split_prompts().train}


def test_pictures_of_one_prompt_differ():
    images = drawn(32, 32, prompts=[ALL[0]] * 20)
    assert len({image.tobytes() for image in images}) == 20


@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 32), (24, 40), (64, 32)])
def test_shapes_cover_at_most_four_percent_of_the_border(height, width):
    for image, prompt in zip(drawn(height, width), ALL, strict=True):
        ring = np.concatenate([image[0], image[-1], image[1:-1, 0], image[1:-1, -1]]).astype(float)
        whole = np.linalg.norm(np.subtract(COLOURS[prompt.colour], COLOURS[prompt.background]))
        covered = np.linalg.norm(ring - COLOURS[prompt.background], axis=1) > 0.5 * whole
        assert covered.mean() <= 0.04


@pytest.mark.parametrize(("shape", "ratio"), [("circle", np.pi / 4), ("square", 1.0), ("triangle", 3**0.5 / 4)])
@pytest.mark.parametrize("position", ["center", "top left"])
def test_drawn_shapes_have_the_area_that_their_width_gives(shape, ratio, position):
    image = drawn(512, 512, prompts=[Prompt("red", shape, "white", position)])[0]
    share = (250.0 - image[..., 1]) / 220.0
    width = share.max(axis=0).sum()
    assert 0.3 < width / 512 < 0.47
    assert share.sum() == pytest.approx(ratio * width**2, rel=0.02)


@pytest.mark.parametrize(
    ("height", "width", "seed"),
    [(32, 32, 0), (32, 32, 1), (32, 32, 2), (64, 64, 0), (64, 64, 1), (24, 40, 0), (64, 32, 0)],
)
def test_oracle_is_exact_on_all_450_drawn_prompts(height, width, seed):
    assert astuple(shapes.score(drawn(height, width, seed), ALL)) == (1, 1, 1, 1, 1, 450)


@pytest.mark.parametrize("change", [noisy, blurred, lambda images: noisy(blurred(images))])
def test_oracle_reads_97_percent_under_noise_of_12_and_blur_of_one_pixel(change):
    assert shapes.score(change(drawn(32, 32)), ALL).all >= 0.97


def test_uniform_noise_scores_nothing():
    images = np.random.default_rng(0).integers(0, 256, (450, 32, 32, 3), dtype=np.uint8)
    score = shapes.score(images, ALL)
    assert max(score.colour, score.background, score.position, score.shape) <= 0.02
    assert score.all == 0


@pytest.mark.parametrize("rgb", [*COLOURS.values(), (128, 128, 128), (0, 0, 0)])
def test_constant_pictures_show_no_object(rgb):
    score = shapes.score(np.full((450, 32, 32, 3), rgb, dtype=np.uint8), ALL)
    assert (score.colour, score.position, score.shape, score.all) == (0, 0, 0, 0)
    assert score.background <= 1 / 6


def test_shuffled_prompts_score_at_chance():
    prompts = [ALL[i] for i in np.random.default_rng(0).permutation(450)]
    score = shapes.score(drawn(32, 32), prompts)
    # Chance, with four standard errors of 450 draws: 1/6, 1/6, 1/5, 1/3, 1/450.
    assert score.colour < 0.24
    assert score.background < 0.24
    assert score.position < 0.28
    assert score.shape < 0.43
    assert score.all < 0.012


@pytest.mark.parametrize("field", ["colour", "background", "position", "shape"])
def test_one_wrong_part_lowers_that_part_and_all_but_no_other(field):
    values = {"colour": ("red", "green"), "background": ("blue", "white"), "shape": ("circle", "square"),
              "position": ("center", "top left")}  # fmt: skip
    prompt = Prompt("red", "circle", "blue", "center")
    wrong = Prompt(**{**vars(prompt), field: values[field][1]})
    score = shapes.score(drawn(32, 32, prompts=[prompt] * 4), [prompt, prompt, prompt, wrong])
    expected = {"colour": 1.0, "background": 1.0, "position": 1.0, "shape": 1.0, "all": 0.75, "count": 4, field: 0.75}
    assert vars(score) == expected


@pytest.mark.parametrize(
    "mask",
    [
        disc(32, 32, 13) & (Y < 32),
        disc(32, 32, 13) & (Y > 32),
        disc(32, 32, 13) & (Y + X < 64),
        disc(32, 32, 13) & ~disc(32, 32, 7),
        ((abs(Y - 32) < 5) | (abs(X - 32) < 5)) & (abs(Y - 32) < 13) & (abs(X - 32) < 13),
        (abs(Y - 32) < 16) & (abs(X - 32) < 8),
        (Y > 20) & (3**0.5 * abs(X - 32) < 44 - Y),
        disc(32, 25, 7) | disc(32, 39, 7),
    ],
    ids=["upper half disc", "lower half disc", "slanted half disc", "ring", "cross", "2:1 box", "triangle upside down",
         "two discs"],
)  # fmt: skip
def test_other_figures_count_as_no_shape(mask):
    reading = shapes.read(figure((mask, "red")))
    assert (reading.background, reading.colour, reading.shape) == ("white", "red", None)


def test_two_blobs_of_different_colours_are_no_object():
    reading = shapes.read(figure((disc(16, 16, 12), "red"), (disc(48, 48, 12), "blue")))
    assert (reading.background, reading.colour, reading.shape, reading.position) == ("white", None, None, None)


def test_a_second_smaller_blob_of_another_colour_is_not_overlooked():
    right = figure((disc(16, 16, 12), "red"))
    assert shapes.read(right) == shapes.Reading("red", "circle", "white", "top left")
    assert shapes.read(figure((disc(16, 16, 12), "red"), (disc(48, 48, 6), "blue"))).colour is None


def test_a_shape_between_two_positions_has_none():
    assert shapes.read(figure((disc(16, 32, 12), "red"))).position is None


@pytest.mark.parametrize("radius", [3, 29])
def test_an_object_far_outside_the_drawn_sizes_is_none(radius):
    assert shapes.read(figure((disc(32, 32, radius), "red"))) == shapes.Reading(background="white")


def test_score_refuses_floats_and_a_wrong_number_of_prompts():
    with pytest.raises(ValueError, match=r"\(n, height, width, 3\) uint8, got \(2, 32, 32, 3\) float32"):
        shapes.score(np.zeros((2, 32, 32, 3), dtype=np.float32), ALL[:2])
    with pytest.raises(ValueError, match="one prompt a picture and at least one, got 2 and 3"):
        shapes.score(np.zeros((2, 32, 32, 3), dtype=np.uint8), ALL[:3])
    with pytest.raises(ValueError, match="at least one, got 0 and 0"):
        shapes.score(np.zeros((0, 32, 32, 3), dtype=np.uint8), [])
