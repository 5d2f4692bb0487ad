"""Pictures a second that one core reads, decodes and scales, and what opening a large set costs a rank; without a GPU.

    python -m benchmarks.load                                   # the tables of train/README.md, "Data, prepared once"
    python -m benchmarks.load --rows 10000000 --files 1200      # opening so many tiny pictures too (700 MB of disk)
    python -m benchmarks.load --pictures 0 --tars 1000          # opening so many tar files of 20 tiny pictures
    python -m benchmarks.load --pictures 0 --steps 10000        # a tiny run with two workers: memory, files, step time

Seconds are those of the process, so that others on the machine do not count. Pictures are like generated ones in what
they cost: amplitude 1 / frequency^1.5, the same in the three colours but for a tenth, which at 1024 px gives about the
235 kB of a picture of the recipe's own data (1 / frequency, as photographs with grain, gives 630 kB). As in sets far
larger than memory each picture reads its row group anew, though from the system's cache, not from a disk.
"""

import argparse
import io
import os
import re
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.machine import describe
from benchmarks.photographs import photograph
from train.data.buckets import bucket_sizes
from train.data.formats import parquet
from train.data.index import open_images
from train.data.kept_sizes import picture_sizes
from train.data.preparing.pictures import encode
from train.data.preparing.plan import make_plan
from train.data.preparing.running import prepare
from train.data.preparing.settings import Prepare
from train.data.readers import ImageDataset, decode

_PICTURES = 16
"""Different ones, which are repeated: their costs are alike."""
_SMOOTH: dict[str, Any] = {"fall": 1.5, "colour": 0.1}
"""See `photograph`: like the recipe's generated pictures in what they cost."""
_SECONDS = 2.0
"""Of each measurement, at least."""


def rate(call: Callable[[], int]) -> float:
    """Pictures a second of this process's time; `call` gives how many it did."""
    call()
    done, began = 0, time.process_time()
    while (spent := time.process_time() - began) < _SECONDS:
        done += call()
    return done / spent


def decoders(content: bytes) -> Iterator[tuple[str, float]]:
    """Ways to decode a JPEG at its own size, of those that are installed."""

    def pillow() -> int:
        with Image.open(io.BytesIO(content)) as image:
            np.array(image.convert("RGB"))
        return 1

    yield "Pillow", rate(pillow)
    try:
        import simplejpeg

        yield "simplejpeg", rate(lambda: len([simplejpeg.decode_jpeg(content)]))
    except ImportError:
        pass
    try:
        import torch
        from torchvision.io import ImageReadMode, decode_jpeg

        def by_torchvision() -> int:
            decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB)
            return 1

        yield "torchvision", rate(by_torchvision)
    except ImportError:
        pass


def reading(path: Path, side: int, **options: Any) -> float:
    """Pictures a second from `path`, in training's random order, in buckets of a side: file to pixels."""
    index = open_images(path)
    dataset = ImageDataset(
        index,
        height=side,
        width=side,
        seed=0,
        buckets=bucket_sizes(side, side, 32),
        pictures=picture_sizes(index, ("width", "height"), None),
        **options,
    )
    positions = iter(range(10**9))

    def some() -> int:
        for _ in range(20):
            dataset[next(positions)]
        return 20

    return rate(some)


def write_raw(folder: Path, count: int, group: int) -> int:
    """`count` pictures of about 1024 px as the recipe's sets have them, JPEG in row groups; gives bytes a picture."""
    folder.mkdir(parents=True)
    shapes = bucket_sizes(1024, 1024, 32)[8:19:2]
    contents = []
    for seed in range(_PICTURES):
        stream = io.BytesIO()
        photograph(*shapes[seed % len(shapes)], seed, **_SMOOTH).save(stream, "JPEG", quality=92)
        contents.append(stream.getvalue())
    table = pa.table(
        {"image": [contents[n % _PICTURES] for n in range(count)], "caption": ["a caption of a picture"] * count}
    )
    pq.write_table(table, folder / "train.parquet", row_group_size=group, use_dictionary=False)
    return sum(map(len, contents)) // _PICTURES


def throughput(folder: Path, count: int) -> Iterator[tuple[str, int, float]]:
    """What, bytes a picture, pictures a second and core."""
    size = write_raw(folder / "raw", count, 100)
    yield "raw 1024 px JPEG, row groups of 100, to 512 px", size, reading(folder / "raw", 512)
    yield "the same with --data.fast-jpeg", size, reading(folder / "raw", 512, fast_jpeg=True)
    yield "raw 1024 px JPEG, row groups of 100, at 1024 px", size, reading(folder / "raw", 1024)
    for words, settings in (
        ("JPEG 92, 4:4:4 (default)", {}),
        ("JPEG 92, 4:2:0", {"chroma": "half"}),
        ("WebP 92", {"format": "webp"}),
        ("lossless WebP", {"format": "lossless"}),
    ):
        out = folder / words.replace(" ", "-").replace(":", "")
        kept = dict[str, Any](sizes=(512,), duplicates="keep", workers=1, **settings)
        began = time.process_time()
        manifest = prepare(make_plan([str(folder / "raw")], Prepare(out=str(out), **kept)), 1)["sizes"]["512"]
        yield f"preparing 512 px, {words}", size, count / (time.process_time() - began)
        yield f"prepared 512 px, {words}", manifest["bytes"] // manifest["kept"], reading(out / "512", 512)
    began = time.process_time()
    both = Prepare(out=str(folder / "both"), sizes=(512, 1024), duplicates="keep")
    manifest = prepare(make_plan([str(folder / "raw")], both), 1)["sizes"]["1024"]
    yield "preparing 512 and 1024 px in one pass, JPEG 92", size, count / (time.process_time() - began)
    yield "prepared 1024 px, JPEG as it was", manifest["bytes"] // manifest["kept"], reading(folder / "both/1024", 1024)


def opening(folder: Path, rows: int, files: int) -> Iterator[str]:
    """Seconds and memory of opening a set of tiny pictures, with and without columns of their sizes."""
    shapes = ((32, 32), (48, 32), (32, 48))
    pictures = []
    for height, width in shapes:
        stream = io.BytesIO()
        Image.new("L", (width, height)).save(stream, "PNG")
        pictures.append(stream.getvalue())
    each = -(-rows // files)
    columns: dict[str, Any] = {"image": [pictures[n % 3] for n in range(each)], "caption": ["a caption"] * each}
    sides = {name: [shapes[n % 3][axis] for n in range(each)] for axis, name in enumerate(("height", "width"))}
    for words, more in (("with width and height", sides), ("without", {})):
        place = folder / words.replace(" ", "-")
        place.mkdir()
        pq.write_table(pa.table(columns | more), place / "train-0.parquet", row_group_size=100)
        content = (place / "train-0.parquet").read_bytes()
        for number in range(1, files):
            (place / f"train-{number}.parquet").write_bytes(content)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for start in ("first start", "next start"):
            began = time.monotonic()
            index = open_images(place)
            ImageDataset(
                index,
                height=512,
                width=512,
                seed=0,
                buckets=bucket_sizes(512, 512, 32),
                pictures=picture_sizes(index, ("width", "height"), None),
            ).planned(batch=1024)[0]
            peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            yield (
                f"| {len(index):,} rows, {files:,} files, {words}, {start} | {time.monotonic() - began:.1f} s | "
                f"{peak:,.0f} MB more than before |"
            )


def opening_tars(folder: Path, files: int) -> Iterator[str]:
    """Seconds of opening tar files, and of reading their samples in training's order."""
    stream = io.BytesIO()
    Image.new("RGB", (32, 32)).save(stream, "PNG")
    for number in range(files):
        with tarfile.open(folder / f"train-{number:05d}.tar", "w") as tar:
            for sample in range(20):
                for ending, content in (("png", stream.getvalue()), ("txt", b"a caption")):
                    member = tarfile.TarInfo(f"{number:05d}-{sample:02d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    began = time.monotonic()
    dataset = ImageDataset(open_images(folder), height=32, width=32, seed=0)
    opened = time.monotonic() - began
    positions = iter(range(10**9))
    speed = rate(lambda: len([dataset[next(positions)] for _ in range(20)]))
    yield f"| {len(dataset):,} samples, {files:,} tar files | {opened:.1f} s | {speed:,.0f} pictures/s read |"


def endurance(folder: Path, steps: int) -> Iterator[str]:
    """A tiny run with two workers: at its tenths what it holds, and steps a second."""
    tiny = "--model.hidden-size 32 --model.num-heads 1 --model.axes-dim 16 16 --model.depth 2 --model.context-in-dim 32"
    few = "--train.batch 8 --data.workers 2 --evaluation.prompts 8 --evaluation.images 8 --evaluation.grid 2"
    rare = f"--evaluation.every {steps} --checkpoint.every {max(1, steps // 5)} --model.bottleneck-size 16"
    words = [*f"shapes --train.steps {steps} --routing.no-enabled {tiny} {few} {rare}".split(), "--output.folder"]
    script = Path(__file__).resolve().parents[1] / "train/speedrun.py"
    run = subprocess.Popen(
        [sys.executable, str(script), *words, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.stdout is not None
    due, began, before = 0, time.monotonic(), 0
    for line in run.stdout:
        found = re.match(r"step (\d+)/", line)
        if not found or int(found[1]) < due:
            continue
        step, due = int(found[1]), int(found[1]) + steps // 10
        workers = [int(word) for word in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
        sizes = [size for size in map(_megabytes, workers) if size > 20]  # multiprocessing's own child is small
        held = ", ".join(f"{size:,.0f}" for size in sizes)
        opened = len(os.listdir(f"/proc/{run.pid}/fd"))
        speed = (step - before) / (time.monotonic() - began)
        yield f"| {step:,} | {_megabytes(run.pid):,.0f} MB; {held} MB | {opened} | {speed:.1f} |"
        began, before = time.monotonic(), step
    yield f"\nexit code {run.wait()}"


def _megabytes(process: int) -> float:
    """Its share of memory, where pages that several hold are shared out."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=400, help="of about 1024 px to prepare and read")
    parser.add_argument("--rows", type=int, default=0, help="of tiny pictures to open; 0 leaves this out")
    parser.add_argument("--files", type=int, default=1200)
    parser.add_argument("--tars", type=int, default=0, help="tar files of 20 tiny pictures to open")
    parser.add_argument("--steps", type=int, default=0, help="of a tiny run whose memory is watched")
    given = parser.parse_args()
    machine = describe()
    print(f"{machine['host_cpu']}, {machine['host_cores']} cores")
    parquet._KEEP_BYTES = 0  # row groups in memory would hide what reading costs
    with tempfile.TemporaryDirectory() as folder:
        if given.pictures:
            print("\n| one core | bytes a picture | pictures/s |\n|---|---|---|", flush=True)
            for what, size, speed in throughput(Path(folder), given.pictures):
                print(f"| {what} | {size:,} | {speed:,.0f} |", flush=True)
            content = encode(photograph(512, 512, 0, **_SMOOTH), Prepare())
            print(f"\n| decoder, 512 px JPEG of {len(content):,} bytes | pictures/s |\n|---|---|", flush=True)
            for name, speed in decoders(content):
                print(f"| {name} | {speed:,.0f} |", flush=True)
            whole = rate(lambda: len([decode(content, height=512, width=512, name="x")]))
            print(f"| train.data.readers.decode | {whole:,.0f} |", flush=True)
        if given.rows:
            print("\n| opened | seconds | memory |\n|---|---|---|", flush=True)
            for line in opening(Path(folder), given.rows, given.files):
                print(line, flush=True)
        if given.tars:
            (Path(folder) / "tars").mkdir()
            print("\n| opened | seconds | then |\n|---|---|---|", flush=True)
            for line in opening_tars(Path(folder) / "tars", given.tars):
                print(line, flush=True)
        if given.steps:
            print("\n| step | memory of trainer; workers | open files | steps/s |\n|---|---|---|---|", flush=True)
            for line in endurance(Path(folder) / "runs", given.steps):
                print(line, flush=True)


if __name__ == "__main__":
    main()
