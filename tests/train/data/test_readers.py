"""Examples of a picture set: captions, styles, flips, and the order of samples; on the real set too."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from train.data.index import open_images
from train.data.readers import ImageDataset, parse_prefixes, prefixed
from train.data.sampler import index_at
from train.errors import UserError

from .picture_files import encoded, noise, plain, sentence, write_parquet

ROOT = Path(__file__).resolve().parents[3]


# Examples


def styled(tmp_path: Path, **options: Any) -> ImageDataset:
    write_parquet(
        tmp_path / "train.parquet",
        4,
        caption=["Cat.", " COOL button ", "A dog!", "A hat."],
        long=["A long cat.", None, "", "  "],
        source=["emoji", "emoji", "photo", None],
    )
    columns = options.pop("caption_columns", ("caption",))
    index = open_images(tmp_path, caption_columns=columns)
    return ImageDataset(index, caption_columns=columns, height=8, width=8, seed=1, **options)


def test_style_prefix_goes_before_captions_of_its_source_only(tmp_path: Path) -> None:
    dataset = styled(tmp_path, style_column="source", style_prefixes={"emoji": "flat icon of"}, shuffle=False)
    captions = [dataset[n].caption for n in range(4)]
    assert captions == ["flat icon of cat", "flat icon of COOL button", "A dog!", "A hat."]
    plain_ones = styled(tmp_path, style_prefixes={"emoji": "flat icon of"}, shuffle=False)
    assert [plain_ones[n].caption for n in range(4)] == ["Cat.", "COOL button", "A dog!", "A hat."]


def test_prefixed_joins_style_and_caption_as_one_phrase() -> None:
    assert prefixed("A snowman.", "flat icon of") == "flat icon of a snowman"
    assert prefixed("X", "3D render of") == "3D render of x"
    assert prefixed("ATM sign", "3D render of") == "3D render of ATM sign"


def test_each_visit_draws_one_of_the_captions_that_are_not_empty(tmp_path: Path) -> None:
    dataset = styled(tmp_path, caption_columns=("caption", "long"), shuffle=False)
    visits = [dataset[position].caption for position in range(4 * 200)]
    assert [dataset[position].caption for position in range(4 * 200)] == visits
    share = visits[0::4].count("A long cat.") / 200
    assert 0.35 < share < 0.65  # 4 standard deviations of 200 fair draws
    assert set(visits[0::4]) == {"Cat.", "A long cat."}
    assert set(visits[1::4]) == {"COOL button"}
    assert set(visits[3::4]) == {"A hat."}


def test_row_without_any_caption_is_named(tmp_path: Path) -> None:
    dataset = styled(tmp_path, caption_columns=("long",), shuffle=False)
    assert dataset[0].caption == "A long cat."
    assert "train.parquet row 1: no caption in long" in sentence(lambda: dataset.read(1))


def test_flip_mirrors_the_stated_share_and_the_same_ones_again(tmp_path: Path) -> None:
    pixels = noise(8, 8)
    write_parquet(tmp_path / "train.parquet", 1, image=[encoded(Image.fromarray(pixels))])
    index = open_images(tmp_path)

    def flips(probability: float, seed: int = 0) -> list[bool]:
        dataset = ImageDataset(index, height=8, width=8, seed=seed, flip=probability)
        images = [dataset[position].image for position in range(300)]
        assert all(image.flags.c_contiguous and image.flags.writeable for image in images)
        assert all(np.array_equal(image, pixels) or np.array_equal(image, pixels[:, ::-1]) for image in images)
        return [not np.array_equal(image, pixels) for image in images]

    assert sum(flips(0.0)) == 0
    assert sum(flips(1.0)) == 300
    assert 40 < sum(flips(0.25)) < 110  # 75 expected, 4.7 standard deviations either way
    assert flips(0.5) == flips(0.5) != flips(0.5, seed=1)


def test_positions_follow_the_sampler_and_go_on_over_epochs(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", 7)
    index = open_images(tmp_path)
    shuffled = ImageDataset(index, height=8, width=8, seed=4)
    assert len(shuffled) == 7
    assert [int(shuffled[p].image[0, 0, 0]) for p in range(20)] == [index_at(p, size=7, seed=4) for p in range(20)]
    in_order = ImageDataset(index, height=8, width=8, seed=4, shuffle=False)
    assert [in_order[p].key for p in (0, 6, 7)] == [f"train.parquet row {row}" for row in (0, 6, 0)]


def test_unreadable_picture_in_a_set_names_path_and_row(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", 2, image=[plain(0), plain(1)[:40]], key=["a", "b"])
    dataset = ImageDataset(open_images(tmp_path), height=8, width=8, seed=0, shuffle=False)
    message = sentence(lambda: dataset.read(1))
    assert message.startswith(f"{tmp_path}: train.parquet row 1 (b): the picture cannot be decoded")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"style_column": "sauce"}, r"no column 'sauce' \(style_column\).*did you mean 'source'"),
        ({"flip": 1.5}, "flip is a probability from 0 to 1, got 1.5"),
        ({"flip": float("nan")}, "flip is a probability"),
        ({"caption_columns": ()}, "caption_columns is empty"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, options: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=what):
        styled(tmp_path, **options)


def test_prefixes_are_parsed_or_refused() -> None:
    parsed = parse_prefixes(("noto-emoji=flat icon of", " fluent-3d = 3D render, a=b, of "))
    assert parsed == {"noto-emoji": "flat icon of", "fluent-3d": "3D render, a=b, of"}
    assert parse_prefixes(()) == {}
    for wrong in ("flat icon of", "=of", "noto=", " = "):
        assert f"style prefix {wrong!r}" in sentence(lambda entry=wrong: parse_prefixes((entry,)))  # type: ignore[misc]
    assert "two style prefixes for 'a'" in sentence(lambda: parse_prefixes(("a=b", "a=c")))


def test_reading_needs_no_torch() -> None:
    code = "import sys, train.data.readers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# The real set


def test_pictograms_have_their_rows_captions_and_pictures(pictograms: Path) -> None:
    prefixes = parse_prefixes(("noto-emoji=flat icon of", "fluent-3d=3D render of"))
    for split, rows in (("train", 3673), ("val", 218)):
        index = open_images(pictograms, image_column="image64", split=split)
        assert len(index) == rows
        dataset = ImageDataset(
            index, height=64, width=64, seed=0, style_column="source", style_prefixes=prefixes, shuffle=False
        )
        for position in range(0, rows, 20):
            example, cells = dataset[position], index.row(position).columns
            prefix = prefixes.get(cells["source"])
            assert example.caption == (f"{prefix} {lowered(cells['caption'])}" if prefix else cells["caption"].strip())
            assert example.image.shape == (64, 64, 3)
            assert example.image.std() > 1  # something is drawn
            assert example.image[[0, 0, -1, -1], [0, -1, 0, -1]].mean() > 200  # on white
            assert cells["key"] in example.key
            assert cells["split"] == split


def lowered(caption: str) -> str:
    return caption if caption[1:2].isupper() else caption[0].lower() + caption[1:]
