"""Each kind of picture file becomes the right RGB, at any size; what is no picture is refused."""

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from train.data.readers import _cover, decode
from train.data.sizes import HEAD_BYTES, upright_size

from ..commands import run_program
from .picture_files import encoded, noise, sentence, write_parquet

ROOT = Path(__file__).resolve().parents[3]


# Decoding


def test_exact_size_is_not_resampled() -> None:
    pixels = noise(24, 40)
    assert np.array_equal(decode(encoded(Image.fromarray(pixels)), height=24, width=40, name="x"), pixels)


@pytest.mark.parametrize(("height", "width"), [(24, 47), (31, 40)])
def test_one_axis_too_long_is_cropped_at_the_centre_without_resampling(height: int, width: int) -> None:
    pixels = noise(height, width)
    top, left = (height - 24) // 2, (width - 40) // 2
    expected = pixels[top : top + 24, left : left + 40]
    assert np.array_equal(decode(encoded(Image.fromarray(pixels)), height=24, width=40, name="x"), expected)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 300), (333, 10), (97, 101), (640, 480), (3, 3)])
def test_any_size_covers_any_other(height: int, width: int) -> None:
    content = encoded(Image.new("RGB", (width, height), (9, 8, 7)))
    for target in ((16, 16), (33, 7), (5, 64)):
        image = decode(content, height=target[0], width=target[1], name="x")
        assert image.shape == (*target, 3)
        assert image.dtype == np.uint8
        assert (image == np.array([9, 8, 7], dtype=np.uint8)).all()


def test_no_pair_of_sizes_trips_over_rounding() -> None:
    draws = np.random.default_rng(0).integers(1, 200, (2000, 4)).tolist()
    for width, height, target_width, target_height in [*draws, [1, 199, 199, 1], [199, 1, 1, 199]]:
        shape = _cover(Image.new("L", (width, height)), target_height, target_width).size
        assert shape == (target_width, target_height)


def test_fast_jpeg_shrinks_by_means_and_only_jpegs_that_are_large_enough() -> None:
    smooth = Image.fromarray(noise(12, 12)).resize((96, 96), Image.Resampling.BICUBIC)
    jpeg = encoded(smooth, "JPEG", quality=98, subsampling=0)
    fast, slow = (decode(jpeg, height=48, width=48, name="x", fast_jpeg=on).astype(int) for on in (True, False))
    means = np.asarray(smooth).reshape(48, 2, 48, 2, 3).mean(axis=(1, 3))
    assert np.abs(fast - means).mean() < 1.5
    assert not np.array_equal(fast, slow)
    for content, size in ((jpeg, 49), (encoded(smooth), 48)):
        same = [decode(content, height=size, width=size, name="x", fast_jpeg=on) for on in (True, False)]
        assert np.array_equal(*same)


def test_crop_is_centred_and_keeps_the_aspect_ratio() -> None:
    pixels = np.zeros((40, 120, 3), np.uint8)
    pixels[:, 40:80] = 255  # the middle square is all that a square crop shows
    image = decode(encoded(Image.fromarray(pixels)), height=20, width=20, name="x")
    assert image[:, 2:-2].min() > 240
    picture = Image.fromarray(noise(30, 60))
    scaled = np.asarray(picture.resize((40, 20), Image.Resampling.LANCZOS))[:, 10:30].astype(int)
    assert np.abs(decode(encoded(picture), height=20, width=20, name="x") - scaled).max() <= 1


def smooth(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * x / width, 255 * y / height, 255 * (x + y) / (width + height)], -1).astype(np.uint8)


def test_stretching_cuts_nothing_and_scales_each_axis_by_itself() -> None:
    pixels = noise(60, 40)
    made = decode(encoded(Image.fromarray(pixels)), height=30, width=50, name="x", fit="stretch")
    whole = Image.fromarray(pixels).resize((50, 30), Image.Resampling.LANCZOS)
    assert np.array_equal(made, np.asarray(whole))
    exact = decode(encoded(Image.fromarray(pixels)), height=60, width=40, name="x", fit="stretch")
    assert np.array_equal(exact, pixels)


def test_large_jpeg_decoded_at_reduced_scale_equals_full_resampling() -> None:
    # Detail at the scale of the target: decoding at less than its size would lose it.
    picture = Image.fromarray(noise(48, 64)).resize((400, 300), Image.Resampling.BICUBIC)
    expected = np.asarray(picture.resize((64, 48), Image.Resampling.LANCZOS)).astype(int)
    error = np.abs(decode(encoded(picture, "JPEG", quality=95), height=48, width=64, name="x") - expected)
    assert error.mean() <= 2


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "MPO"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(format: str, orientation: int) -> None:
    upright = smooth(48, 96)
    store: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: a.transpose(1, 0, 2)[::-1],
        7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(np.ascontiguousarray(store[orientation](upright))), format, exif=exif, quality=95)
    assert np.abs(decode(content, height=48, width=96, name="x").astype(int) - upright).max() <= 12
    assert upright_size(lambda count: content[:count]) == (48, 96)


def test_a_turned_picture_whose_size_stands_deep_in_its_file_is_measured_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(noise(200, 400))
    for format, options in (
        ("JPEG", {"quality": 100}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("AVIF", {"quality": 100}),
    ):
        content = encoded(picture, format, exif=exif, **options)
        assert len(content) > HEAD_BYTES
        assert upright_size(lambda count, content=content: content[:count]) == (400, 200)  # type: ignore[misc]


def test_doctor_finds_turned_pictures_of_every_format_in_the_bucket_of_their_upright_shape(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    formats = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF")
    picture = Image.fromarray(noise(64, 128))
    pictures = [encoded(picture, format, exif=exif.tobytes()) for format in formats]  # AVIF's writer empties an Exif
    write_parquet(tmp_path / "train.parquet", len(formats), image=pictures)
    done = run_program("doctor", "prx-512", "--data.path", str(tmp_path), "--train.batch", "4", "--json")
    (bucket,) = json.loads(done.stdout)["buckets"]
    assert (bucket["height"], bucket["width"], bucket["pictures"]) == (704, 352, 5)


def test_exif_behind_the_pixels_of_a_png_turns_neither_its_size_nor_its_pixels() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(Image.fromarray(smooth(16, 32)), exif=exif)
    start = content.index(b"eXIf") - 4
    length = 12 + int.from_bytes(content[start : start + 4], "big")
    chunk, end = content[start : start + length], content.index(b"IEND") - 4
    moved = content[:start] + content[start + length : end] + chunk + content[end:]
    asked: list[int] = []

    def read(count: int) -> bytes:
        asked.append(count)
        return moved[:count]

    assert upright_size(read) == (16, 32)
    assert asked == [HEAD_BYTES]  # and no pixel was decoded for it
    assert np.array_equal(decode(moved, height=16, width=32, name="x"), smooth(16, 32))


def test_broken_exif_does_not_spoil_a_picture() -> None:
    content = encoded(Image.fromarray(smooth(16, 16)), "JPEG", exif=b"Exif\0\0garbage!")
    assert decode(content, height=16, width=16, name="x").shape == (16, 16, 3)


def test_transparent_parts_become_white_also_at_other_sizes() -> None:
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[:, :8] = (10, 20, 30, 255)
    pixels[:, 8:] = (255, 0, 0, 0)  # hidden red
    for size in (16, 8):
        for format in ("PNG", "WEBP"):
            options = {"lossless": True, "exact": True} if format == "WEBP" else {}
            content = encoded(Image.fromarray(pixels), format, **options)
            image = decode(content, height=size, width=size, name="x").astype(int)
            assert image[0, 0].tolist() == [10, 20, 30]
            assert image[0, -1].tolist() == [255, 255, 255]
            assert (image[..., 0] <= image[..., 1] + 1).all()  # no red bled in
    half = np.full((8, 8, 2), (100, 128), np.uint8)
    assert abs(int(decode(encoded(Image.fromarray(half)), height=8, width=8, name="x")[0, 0, 0]) - 177) <= 1


def test_palettes_with_and_without_transparency() -> None:
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 0, 0, 0, 128, 64])
    palette.paste(0, (0, 0, 4, 8))
    opaque = decode(encoded(palette), height=8, width=8, name="x")
    assert (opaque[0, 0].tolist(), opaque[0, -1].tolist()) == ([255, 0, 0], [0, 128, 64])
    for format in ("PNG", "GIF"):
        image = decode(encoded(palette, format, transparency=0), height=8, width=8, name="x")
        assert (image[0, 0].tolist(), image[0, -1].tolist()) == ([255, 255, 255], [0, 128, 64])


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_scaled_not_clipped(format: str) -> None:
    levels16 = np.array([[0, 257, 65378, 65535]] * 4, np.uint16)  # 65378 / 257 = 254.4
    image = decode(encoded(Image.fromarray(levels16), format), height=4, width=4, name="x")
    assert image[0].tolist() == [[0] * 3, [1] * 3, [254] * 3, [255] * 3]


def test_grey_bilevel_and_cmyk_become_rgb() -> None:
    assert (decode(encoded(Image.new("L", (8, 8), 77)), height=8, width=8, name="x") == 77).all()
    assert (decode(encoded(Image.new("1", (8, 8), 1)), height=8, width=8, name="x") == 255).all()
    for format in ("JPEG", "TIFF"):
        cyan = encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), format)
        assert np.abs(decode(cyan, height=8, width=8, name="x").astype(int) - [0, 255, 255]).max() <= 3


def test_animated_files_give_their_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if format == "WEBP" else {}
        image = decode(
            encoded(frames[0], format, save_all=True, append_images=frames[1:], **options), height=8, width=8, name="x"
        )
        assert image[4, 4].tolist() == [200, 0, 0]


def bomb(side: int) -> bytes:
    """A PNG of 70 bytes that says it has side × side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 60_000])
def test_decompression_bombs_are_refused_before_decoding(side: int) -> None:
    message = sentence(lambda: decode(bomb(side), height=8, width=8, name="set/a.parquet row 3"))
    assert message.startswith("set/a.parquet row 3: the picture is too large")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated_files_are_refused(format: str, share: float) -> None:
    content = encoded(Image.fromarray(noise(200, 200)), format)
    message = sentence(lambda: decode(content[: int(share * len(content))], height=64, width=64, name="here row 1"))
    assert message.startswith("here row 1: the picture cannot be decoded")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"


@pytest.mark.parametrize("content", [b"", b"no picture", EPS])
def test_what_is_no_picture_is_refused(content: bytes, tmp_path: Path) -> None:
    reason = "EPS, which is a program" if content == EPS else "no known picture format"
    assert f"cannot be decoded ({reason}" in sentence(lambda: decode(content, height=8, width=8, name="here"))
    (tmp_path / "a.jpg").write_bytes(content)
    assert "cannot be decoded" in sentence(lambda: decode(tmp_path / "a.jpg", height=8, width=8, name="here"))


def test_float_pictures_are_refused_since_their_range_is_unknown() -> None:
    content = encoded(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF")
    assert "32-bit floats" in sentence(lambda: decode(content, height=8, width=8, name="here"))


def test_embedded_profile_is_left_alone() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = noise(8, 8)
    content = encoded(Image.fromarray(pixels), icc_profile=profile)
    assert np.array_equal(decode(content, height=8, width=8, name="x"), pixels)
