"""The captions of a mixture, encoded once and trained on: of each source those of its own columns."""

import json
from pathlib import Path

from ...commands import run_program
from ..picture_files import plain, write_parquet, write_tar
from .caches import words


def test_the_captions_of_all_sources_are_encoded_and_found_in_training(encoder: Path, tmp_path: Path) -> None:
    names = ["a", "b", None, "d", "e", "f", "g", "h", "i", "j", "k", "l"]
    styles = ["photo"] * 12
    write_parquet(tmp_path / "first/train.parquet", 12, caption=names, long=["long"] * 12, source=styles)
    samples = [(f"v1.{n}", {"png": plain(n), "json": json.dumps({"llava": f"mj &amp; {n}", "caption": "no"}).encode()}) for n in range(12)]  # fmt: skip  # noqa: E501
    write_tar(tmp_path / "second/train.tar", samples)
    command = words(encoder, tmp_path, tmp_path / "cache", "--evaluation.grid", "0", "--data.no-buckets")
    command += ["--data.path", f"{tmp_path / 'first'}=1", f"{tmp_path / 'second'}=1"]
    command += ["--data.source-columns", "second:captions=llava"]
    done = run_program("precompute_text", *command)
    assert done.returncode == 0, done.stderr
    assert "encoded 25 captions" in done.stdout  # 11 and "long" of the first, 12 of the second, and the empty prompt
    done = run_program("speedrun", *command)
    assert done.returncode == 0, done.stderr
    assert "data: second: 24 members make 12 samples" in done.stdout
