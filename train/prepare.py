"""Make pictures ready to train on, once: scaled to their buckets at the stage's size, encoded, in small row groups.

    python train/prepare.py SOURCE… --out DEST [--sizes 512 1024] [--caption-columns a b] [--filter "score > 5"]

A SOURCE is what --data.path takes: a folder of parquet, tar, MDS or picture files, or an address. Then train with
--data.path DEST/512. Stop it at any time: the same command goes on. Start it on several machines with one DEST, and
they share the work. --dry-run says from a sample how long it would take; --help lists all options.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.commandline import read_options  # noqa: E402
from train.data.preparing.settings import Prepare  # noqa: E402
from train.errors import UserError, exit_with_sentence  # noqa: E402
from train.shown import tell  # noqa: E402


def main() -> int:
    words = sys.argv[1:]
    if not words:
        print(__doc__)
        return 0
    first = next((n for n, word in enumerate(words) if word.startswith("-")), len(words))
    settings = read_options(Prepare, args=words[first:], prog="prepare.py SOURCE…", description=__doc__)
    if not words[:first]:
        raise UserError("give the sources before all options, as in prepare.py FOLDER --out DEST")
    if not settings.out:
        raise UserError("give the folder to write into with --out DEST")
    from train.data.preparing.estimate import estimate
    from train.data.preparing.plan import make_plan
    from train.data.preparing.running import prepare

    settings = replace(settings, out=str(Path(settings.out).resolve()))
    plan = make_plan(words[:first], settings)
    workers = settings.workers or len(os.sched_getaffinity(0))
    if settings.dry_run:
        for line in estimate(plan, workers):
            tell(line)
        return 0
    for source in plan.sources:
        for problem in source.index.problems:
            tell(f"warning: {problem}")
    try:
        manifest = prepare(plan, workers)
    except KeyboardInterrupt:
        raise UserError("stopped; the same command goes on where it stopped") from None
    for line in summary(manifest, plan.out):
        tell(line)
    return 0


def summary(manifest: dict[str, Any], out: Path) -> list[str]:
    """What was kept and dropped, a line a size."""
    lines = []
    for side, size in manifest["sizes"].items():
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in size["dropped"].items()) or "nothing"
        lines.append(
            f"{out / side}: {size['kept']:,} of {size['seen']:,} rows in {len(size['shards']):,} shards, "
            f"{size['bytes'] / 1e6:,.1f} MB; dropped: {dropped}"
        )
    return lines


if __name__ == "__main__":
    exit_with_sentence(main)
