"""Pictures and captions that cannot be read: substituted alike everywhere, listed once, and a limit to their share."""

import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from train.data.example import Substituted
from train.data.index import open_images
from train.data.loader import Batch, batches, notes, open_dataset, open_validation
from train.data.quarantine import Quarantine
from train.data.readers import ImageDataset
from train.ranks.parallel import World
from train.recipes import Recipe, prx_512

from .picture_files import encoded, grey_tar, noise, plain, sentence, write_parquet, write_tar

CPU = torch.device("cpu")


def bomb() -> bytes:
    """A PNG whose header promises 60,000 x 60,000 pixels."""
    content = bytearray(plain(0))
    content[16:24] = struct.pack(">II", 60_000, 60_000)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    return bytes(content)


def animated() -> bytes:
    frames = [Image.new("RGB", (8, 8), (level, level, level)) for level in (90, 200)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def cmyk() -> bytes:
    return encoded(Image.new("RGB", (8, 8), (90, 90, 90)).convert("CMYK"), "JPEG", quality=100)


def sixteen_bit() -> bytes:
    return encoded(Image.fromarray(np.full((8, 8), 90 * 257, np.uint16)))


def truncated() -> bytes:
    content = encoded(Image.fromarray(noise(64, 64)), "JPEG")
    return content[: len(content) // 2]


UNREADABLE = {"corrupt": b"no picture at all", "truncated": truncated(), "empty": b"", "bomb": bomb()}
READABLE = {"cmyk": cmyk(), "16-bit": sixteen_bit(), "animated": animated()}


def recipe(path: Path, **data: Any) -> Recipe:
    made = prx_512()
    settings = {"path": str(path), "height": 32, "width": 32, "workers": 0, **data}
    return replace(made, data=replace(made.data, **settings), train=replace(made.train, steps=10, batch=4))


def broken_set(folder: Path, kind: str = "tar") -> Path:
    """24 samples in two shapes; 1 to 4 hold no readable picture, 5 to 7 odd ones, 8 no caption; shard-1 is empty."""
    odd = [*UNREADABLE.values(), *READABLE.values()]
    pictures = [plain(n, (64, 64) if n % 2 else (40, 80)) for n in range(24)]
    pictures[1:8] = odd
    captions = [f"grey {n}" for n in range(24)]
    captions[8] = " "
    if kind == "parquet":
        write_parquet(folder / "train-0.parquet", 24, image=pictures, caption=captions)
        (folder / "train-1.parquet").write_bytes(b"")
    else:
        both = zip(pictures, captions, strict=True)
        write_tar(folder / "train-0.tar", [(f"{n}", {"png": p, "txt": c.encode()}) for n, (p, c) in enumerate(both)])
        (folder / "train-1.tar").write_bytes(b"")
    return folder


def read(made: Recipe, world: World = World(0, 1, CPU), start: int = 0) -> list[Batch]:  # noqa: B008
    return list(batches(open_dataset(made.data, 0, 8), made, world, start))


@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize("buckets", [True, False])
def test_corrupt_truncated_bomb_and_captionless_are_substituted_the_same_at_any_world_size_and_after_a_resume(
    tmp_path: Path, kind: str, buckets: bool
) -> None:
    made = recipe(broken_set(tmp_path, kind), buckets=buckets)
    whole = read(made)
    listed = [entry for batch in whole for entry in batch.substituted]
    bad = {entry.key.partition(" row ")[2] for entry in listed}
    assert bad == {"1", "2", "3", "4", "8"}
    for entry in listed:
        step = entry.position // 4
        assert entry.position in whole[step].positions.tolist()
    for batch in whole:  # another picture with its own caption stands there
        for image, caption in zip(batch.image, batch.captions, strict=True):
            number = int(caption.removeprefix("grey "))
            assert abs(int(image[0, 0, 0]) - (90 if number in (5, 6, 7) else number)) <= 1
    ranks = [read(made, World(rank, 2, CPU)) for rank in range(2)]
    for step, parts in enumerate(zip(*ranks, strict=True)):
        assert torch.equal(torch.cat([part.image for part in parts]), whole[step].image)
        assert sum((part.substituted for part in parts), ()) == whole[step].substituted
    for one, other in zip(read(made, start=6), whole[6:], strict=True):
        assert torch.equal(one.image, other.image)
        assert one.substituted == other.substituted


def test_substitutes_and_their_list_come_out_of_workers(tmp_path: Path) -> None:
    made = recipe(broken_set(tmp_path))
    alone, workers = read(made), read(recipe(tmp_path, workers=2))
    assert [batch.substituted for batch in workers] == [batch.substituted for batch in alone]
    assert any(batch.substituted for batch in alone)
    assert all(torch.equal(a.image, b.image) for a, b in zip(alone, workers, strict=True))


def test_reasons_say_what_is_wrong_with_each(tmp_path: Path) -> None:
    reasons = {e.key: e.reason for batch in read(recipe(broken_set(tmp_path))) for e in batch.substituted}
    by_row = {key.partition(" row ")[2]: reason for key, reason in reasons.items()}
    assert "no known picture format" in by_row["1"]
    assert "truncated" in by_row["2"]
    assert "too large" in by_row["4"]
    assert "no caption in caption" in by_row["8"]


@pytest.mark.parametrize("name", READABLE)
def test_cmyk_16_bit_and_animated_are_decoded_right(tmp_path: Path, name: str) -> None:
    write_parquet(tmp_path / "train.parquet", 1, image=[READABLE[name]])
    image = ImageDataset(open_images(tmp_path), height=8, width=8, seed=0)[0].image
    assert np.abs(image.astype(int) - 90).max() <= 1


def test_zero_byte_shard_and_unreadable_row_group_do_not_stop_a_run(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", 16, row_group_size=4)
    (tmp_path / "train-1.parquet").write_bytes(b"")
    file = tmp_path / "train-0.parquet"
    content = bytearray(file.read_bytes())
    content[4:300] = bytes(296)  # within the first row group
    file.write_bytes(content)
    made = recipe(tmp_path, buckets=False)
    dataset = open_dataset(made.data, 0, 8)
    assert ["train-1.parquet is empty (0 bytes)" in note for note in notes(dataset, 4)] == [True]
    bad = {entry.key for batch in read(made) for entry in batch.substituted}
    assert bad == {f"train-0.parquet row {n}" for n in range(4)}


def test_missing_picture_file_and_held_out_picture_are_substituted(tmp_path: Path) -> None:
    cells = [{"bytes": None, "path": "gone.png"}, *({"bytes": plain(n), "path": None} for n in range(1, 6))]
    write_parquet(tmp_path / "val.parquet", 6, image=cells)
    validation = open_validation(recipe(tmp_path).data, 8)
    assert validation is not None
    found = validation[0]
    assert found.substituted is not None
    assert "gone.png" in found.substituted.reason
    assert found.caption == f"grey {found.image[0, 0, 0]}" != "grey 0"


def test_data_of_which_nothing_can_be_read_stop(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", 8, image=[b"no picture"] * 8)
    assert "33 samples in a row cannot be read; the first: " in sentence(lambda: read(recipe(tmp_path)))


def test_captions_leave_rows_without_any_out_and_name_them(tmp_path: Path) -> None:
    dataset = ImageDataset(open_images(broken_set(tmp_path)), height=8, width=8, seed=0)
    missing: list[str] = []
    captions = list(dataset.captions(missing.append))
    assert captions == [f"grey {n}" for n in range(24) if n != 8]
    assert missing == ["train-0.tar row 8"]


# The list and the limit


def batch(first: int, size: int, bad: list[int]) -> Batch:
    positions = torch.arange(first, first + size)
    entries = tuple(Substituted(n, f"a.tar row {n}", "the picture cannot be decoded (é)") for n in bad)
    return Batch(torch.zeros(size, 3, 1, 1, dtype=torch.uint8), ["c"] * size, positions, positions, entries)


def lines(run: Path) -> list[dict[str, Any]]:
    files = sorted((run / "quarantine").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_each_position_is_listed_once_also_after_a_resume_on_another_rank(tmp_path: Path) -> None:
    first = Quarantine(tmp_path, 0, 0.01)
    first.add(batch(0, 4, []))
    assert not (tmp_path / "quarantine").exists()
    first.add(batch(4, 4, [5, 6]))
    assert (first.seen, first.substituted) == (8, 2)
    later = Quarantine(tmp_path, 1, 0.01)
    later.add(batch(4, 4, [5, 6, 7]))
    assert (later.seen, later.substituted) == (4, 3)
    assert [line["position"] for line in lines(tmp_path)] == [5, 6, 7]
    assert lines(tmp_path)[0] == {
        "position": 5, "key": "a.tar row 5", "reason": "the picture cannot be decoded (é)",
    }  # fmt: skip


def test_half_a_line_left_by_a_crash_spoils_neither_the_list_nor_the_next_line(tmp_path: Path) -> None:
    Quarantine(tmp_path, 0, 0.01).add(batch(0, 4, [1]))
    file = tmp_path / "quarantine/rank-0.jsonl"
    file.write_bytes(file.read_bytes() + b'{"position": 2, "ke')
    Quarantine(tmp_path, 0, 0.01).add(batch(0, 4, [1, 2]))
    assert [json.loads(line)["position"] for line in file.read_text().splitlines() if line.endswith("}")] == [1, 2]


def test_shards_that_are_left_out_are_listed_once(tmp_path: Path) -> None:
    grey_tar(tmp_path / "data/a.tar", 4)
    (tmp_path / "data/b.tar").write_bytes(b"")
    problems = open_images(tmp_path / "data").problems
    for _ in range(2):
        Quarantine(tmp_path, 0, 0.01).add_shards(problems)
    assert lines(tmp_path) == [{"shard": problems[0]}]


def test_run_stops_above_the_limit_naming_samples_and_list(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path, 0, 0.01)
    quarantine.add(batch(0, 100, list(range(9))))
    message = sentence(lambda: quarantine.check(9, 100))
    assert message.startswith("9 of 100 samples (9.00%) could not be read, more than data.bad_limit 0.01 allows")
    assert "a.tar row 8: the picture cannot be decoded" in message
    assert str(tmp_path / "quarantine") in message
    other_rank = Quarantine(tmp_path, 1, 0.01)
    assert "a.tar row 8" in sentence(lambda: other_rank.check(9, 100))


@pytest.mark.parametrize(
    ("limit", "substituted", "seen", "stops"),
    [
        (0.01, 0, 0, False),
        (0.01, 2, 4, False),  # too few to tell
        (0.01, 3, 8, True),
        (0.01, 14, 1024, False),  # within what 1 % gives by chance
        (0.01, 30, 1024, True),
        (0.01, 9_900, 1_000_000, False),
        (0.01, 10_400, 1_000_000, True),
        (0.0, 0, 1000, False),
        (0.0, 1, 1000, True),
        (1.0, 1000, 1000, False),
    ],
)
def test_limit_is_a_share_with_room_for_chance(
    tmp_path: Path, limit: float, substituted: int, seen: int, stops: bool
) -> None:
    quarantine = Quarantine(tmp_path, 0, limit)
    if stops:
        assert "data.bad_limit" in sentence(lambda: quarantine.check(substituted, seen))
    else:
        quarantine.check(substituted, seen)
