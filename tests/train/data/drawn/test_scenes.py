"""The `scenes` data set and its oracle: exact on drawn pictures from 48 pixels, nothing on anything else."""

from dataclasses import astuple, replace

import numpy as np
import pytest

from train.data.drawn import scenes
from train.data.drawn.scenes import COLOURS, RELATIONS, SHAPES, SIZES, SceneObject, ScenePrompt, ScenesDataset
from train.errors import UserError

PROMPT = ScenePrompt(SceneObject("small", "red", "circle"), "left of", SceneObject("big", "blue", "square"), "white")


def sample(count, seed=0):
    everything = scenes.all_prompts()
    return [everything[i] for i in np.random.default_rng(seed).choice(len(everything), count, replace=False)]


def drawn(prompts, height, width, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([scenes.draw(prompt, height=height, width=width, rng=rng) for prompt in prompts])


def noisy(images, sigma=12):
    noise = np.random.default_rng(0).normal(0, sigma, images.shape)
    return np.clip(np.rint(images + noise), 0, 255).astype(np.uint8)


def smoothed(images):
    """Blur by the binomial kernel 1 4 6 4 1 (standard deviation one pixel) both ways."""
    for axis in (1, 2):
        pad = [(2, 2) if a == axis else (0, 0) for a in range(4)]
        padded = np.pad(images.astype(float), pad, mode="edge")
        size = images.shape[axis]
        images = sum(w / 16 * np.take(padded, range(k, k + size), axis) for k, w in enumerate((1, 4, 6, 4, 1)))
    return np.rint(images).astype(np.uint8)


def test_caption_reads_as_documented():
    assert PROMPT.caption == "a small red circle left of a big blue square on a white background"


def test_there_are_17280_prompts_with_different_captions_and_three_colours_each():
    prompts = scenes.all_prompts()
    assert len(prompts) == len({prompt.caption for prompt in prompts}) == 17280
    assert all(len({p.first.colour, p.second.colour, p.background}) == 3 for p in prompts)


def test_converse_says_the_same_from_the_other_object():
    assert PROMPT.converse.caption == "a big blue square right of a small red circle on a white background"
    assert PROMPT.converse.converse == PROMPT
    assert set(scenes.all_prompts()) == {prompt.converse for prompt in scenes.all_prompts()}


def test_split_is_a_partition_with_20_percent_of_known_pairs_held_out():
    split = scenes.split_prompts()
    assert len(split.train) + len(split.combinations) + len(split.pairs) == 17280
    assert {*split.train, *split.combinations, *split.pairs} == set(scenes.all_prompts())
    # Four standard errors of a share of 0.2 over the 6784 scenes (each two prompts): 0.02.
    assert len(split.combinations) / (len(split.train) + len(split.combinations)) == pytest.approx(0.2, abs=0.02)


def test_a_held_out_scene_is_not_trained_on_in_other_words():
    split = scenes.split_prompts()
    for part in (split.train, split.combinations, split.pairs):
        assert {prompt.converse for prompt in part} == set(part)


def test_held_out_pairs_are_never_trained_on_and_everything_else_is():
    split = scenes.split_prompts()
    train = {(item.colour, item.shape) for prompt in split.train for item in (prompt.first, prompt.second)}
    held_out = {(colour, shape) for colour in COLOURS for shape in SHAPES} - train
    assert len(held_out) == 2
    for prompt in split.pairs:
        assert held_out & {(prompt.first.colour, prompt.first.shape), (prompt.second.colour, prompt.second.shape)}
    assert {prompt.background for prompt in split.train} == set(COLOURS)
    assert {prompt.relation for prompt in split.train} == set(RELATIONS)
    assert {prompt.first.size for prompt in split.train} == set(SIZES)


def test_split_is_the_same_when_made_afresh_and_another_for_another_seed():
    first = scenes.split_prompts()
    scenes.split_prompts.cache_clear()
    assert scenes.split_prompts() == first
    assert scenes.split_prompts(1).combinations != first.combinations


@pytest.mark.parametrize("name", ["combinations", "pairs"])
def test_held_out_prompts_are_never_trained_on_and_repeat_only_after_all_came(name):
    held_out = getattr(scenes.split_prompts(), name)
    prompts = scenes.held_out_prompts(name, len(held_out) + 3, seed=4)
    assert set(prompts) == set(held_out)
    assert prompts[-3:] == prompts[:3]
    assert not set(prompts) & set(scenes.split_prompts().train)
    assert prompts == scenes.held_out_prompts(name, len(prompts), seed=4)
    assert prompts[:20] != scenes.held_out_prompts(name, 20, seed=5)


def test_unknown_held_out_name_is_a_sentence_with_the_nearest_name():
    with pytest.raises(UserError, match="'combination'; did you mean 'combinations'"):
        scenes.held_out_prompts("combination", 4)


def test_pictures_under_16_pixels_are_refused():
    with pytest.raises(UserError, match="at least 16 pixels, got 64 x 8"):
        ScenesDataset(0, 64, 8)


def test_example_depends_on_seed_and_position_only_and_comes_from_training_prompts():
    dataset, again, other = ScenesDataset(3, 48, 64), ScenesDataset(3, 48, 64), ScenesDataset(4, 48, 64)
    dataset[5]
    assert np.array_equal(dataset[7].image, again[7].image)
    assert dataset[7].caption == again[7].caption
    assert dataset[7].image.shape == (48, 64, 3)
    assert dataset[7].image.dtype == np.uint8
    captions = [dataset[position].caption for position in range(500)]
    assert set(captions) <= {prompt.caption for prompt in scenes.split_prompts().train}
    assert captions[:20] != [other[position].caption for position in range(20)]


@pytest.mark.parametrize(
    ("height", "width", "count", "seed"),
    [(64, 64, 800, 0), (64, 64, 800, 1), (128, 128, 200, 0), (48, 80, 300, 0), (128, 64, 200, 0)],
)
def test_oracle_is_exact_on_drawn_pictures(height, width, count, seed):
    prompts = sample(count, seed)
    assert astuple(scenes.score(drawn(prompts, height, width, seed), prompts)) == (1, 1, 1, 1, 1, 1, count)


@pytest.mark.parametrize("change", [noisy, smoothed, lambda images: noisy(smoothed(images))])
def test_oracle_reads_97_percent_under_noise_of_12_and_blur_of_one_pixel(change):
    prompts = sample(300)
    assert scenes.score(change(drawn(prompts, 64, 64)), prompts).all >= 0.97


def test_a_prompt_and_its_converse_score_alike():
    prompts = sample(100)
    score = scenes.score(drawn(prompts, 64, 64), [prompt.converse for prompt in prompts])
    assert astuple(score) == (1, 1, 1, 1, 1, 1, 100)


def test_uniform_noise_scores_nothing():
    images = np.random.default_rng(0).integers(0, 256, (200, 64, 64, 3), dtype=np.uint8)
    score = scenes.score(images, sample(200))
    assert max(score.colours, score.shapes, score.sizes, score.relation, score.background) <= 0.02
    assert score.all == 0


def test_constant_pictures_show_no_objects():
    score = scenes.score(np.full((4, 64, 64, 3), COLOURS["white"], dtype=np.uint8), [PROMPT] * 4)
    assert astuple(score) == (0, 0, 0, 0, 1, 0, 4)


def test_shuffled_prompts_score_at_chance():
    prompts = sample(600)
    order = np.random.default_rng(1).permutation(600)
    score = scenes.score(drawn(prompts, 64, 64), [prompts[i] for i in order])
    # Chance: colours 1/15, background 1/6, a relation (which needs the colours) 1/60; four standard errors of 600.
    assert score.colours < 0.11
    assert score.background < 0.23
    assert score.relation < 0.04
    assert score.all < 0.01


@pytest.mark.parametrize(
    ("wrong", "fields"),
    [
        (replace(PROMPT, relation="right of"), {"relation"}),
        (replace(PROMPT, relation="above"), {"relation"}),
        (replace(PROMPT, first=replace(PROMPT.first, size="big")), {"sizes"}),
        (replace(PROMPT, second=replace(PROMPT.second, shape="circle")), {"shapes"}),
        (replace(PROMPT, background="green"), {"background"}),
        (replace(PROMPT, second=replace(PROMPT.second, colour="green")), {"colours", "shapes", "sizes", "relation"}),
    ],
)
def test_a_wrong_part_lowers_what_depends_on_it_and_nothing_else(wrong, fields):
    score = vars(scenes.score(drawn([PROMPT] * 4, 64, 64), [PROMPT, PROMPT, wrong, wrong]))
    assert {name for name, value in score.items() if value == 0.5} == fields | {"all"}
    assert {name for name, value in score.items() if value == 1} == set(score) - fields - {"all", "count"}


def test_one_object_alone_and_a_third_one_are_both_wrong():
    image = drawn([PROMPT], 64, 64)[0]
    alone, third = image.copy(), image.copy()
    alone[:, :32] = COLOURS["white"]
    third[2:14, 26:38] = COLOURS["green"]
    score = scenes.score(np.stack([image, alone, third]), [PROMPT] * 3)
    assert score.all == score.colours == pytest.approx(1 / 3)
    assert score.background == 1


def test_objects_placed_diagonally_have_no_relation():
    image = np.full((64, 64, 3), COLOURS["white"], dtype=np.uint8)
    image[10:20, 10:20], image[40:60, 40:60] = COLOURS["red"], COLOURS["blue"]
    score = scenes.score(np.stack([image] * 4), [replace(PROMPT, relation=relation) for relation in RELATIONS])
    assert score.colours == 1
    assert score.sizes == 1
    assert score.relation == 0
