"""Which ingredient is worth its time: variants of a preset over several seeds, and when each reaches a target loss.

python train/ablate.py shapes --target 0.35 --variant base --variant "adam: --no-muon" -- --evaluation.every 100
"""

import argparse
import json
import math
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from train import shown  # noqa: E402
from train.commandline import parse  # noqa: E402
from train.errors import UserError, exit_with_sentence  # noqa: E402
from train.recipes import Recipe, TwoStages  # noqa: E402
from train.run.folder import METRICS, run_folder  # noqa: E402
from train.side_files import parse_json  # noqa: E402

HELD_OUT = "held-out"
"""Dense loss of the averaged weights on pictures never trained on: comparable between all variants."""
TRAIN = "train"
"""Flow-matching loss of the training steps, as a trailing mean; routed and dense variants see different tasks."""


@dataclass(frozen=True)
class Variant:
    """A name, and the words it adds to the command."""

    name: str
    words: tuple[str, ...]


class Point(NamedTuple):
    """A loss of a run, the steps done, and the seconds they took."""

    step: int
    seconds: float
    loss: float


@dataclass(frozen=True)
class Reached:
    """One run: when it reached the target, None where it never did, and its last loss."""

    variant: str
    seed: int
    steps: int | None
    seconds: float | None
    last: float


@dataclass(frozen=True)
class Row:
    """A variant over its seeds: mean and sample deviation of those that reached the target."""

    variant: str
    runs: int
    reached: int
    steps: tuple[float, float] | None
    seconds: tuple[float, float] | None
    last: tuple[float, float]


# --- from a run's metrics to its time to the target ------------------------------------------------------------------


def curve(lines: Iterable[dict[str, Any]], batch: int, metric: str, window: int) -> list[Point]:
    """The losses of a run of `batch` pictures a step, from the lines of its metrics.jsonl.

    Seconds are pictures over pictures a second, step by step: neither evaluation nor a pause between two starts
    counts, compilation and checkpoints do. The training loss is the mean over the last `window` steps, and has no value
    before those are done. A held-out loss is as measured, its mean over resolutions where there are several.
    """
    points: list[Point] = []
    recent: list[tuple[int, float]] = []
    done, seconds = 0, 0.0
    for line in lines:
        step = int(line["step"])
        if "train/loss" in line:
            seconds += (step - done) * batch / line["speed/images_per_second"]
            recent.append((step - done, line.get("train/loss/flow", line["train/loss"])))
            done = step
            while sum(count for count, _ in recent[1:]) >= window:
                recent.pop(0)
            steps = sum(count for count, _ in recent)
            if metric == TRAIN and steps >= window:
                points.append(Point(step, seconds, sum(count * loss for count, loss in recent) / steps))
        held_out = [v for name, v in line.items() if name.startswith("eval/ema/loss/") and "/t=" not in name]
        if metric == HELD_OUT and held_out:
            points.append(Point(step, seconds, mean(held_out)))
    return points


def read(folder: Path, batch: int, metric: str, window: int) -> list[Point]:
    """`curve` of the run in a folder.

    Raises:
        UserError: no metrics there, or none of this kind.
    """
    path = folder / METRICS
    try:
        points = curve(map(parse_json, path.read_bytes().splitlines()), batch, metric, window)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, ZeroDivisionError) as error:
        raise UserError(f"{path} cannot be read as the metrics of a run: {error}") from None
    if not points:
        fix = "set a smaller --window or more --train.steps" if metric == TRAIN else "its data have no split 'val'"
        raise UserError(f"{path} holds no {metric} loss: {fix}")
    return points


def reach(points: Sequence[Point], target: float) -> tuple[int | None, float | None]:
    """Step and seconds of the first point at or below the target; None twice where there is none."""
    return next(((point.step, point.seconds) for point in points if point.loss <= target), (None, None))


# --- from runs to a table --------------------------------------------------------------------------------------------


def summarise(runs: Sequence[Reached]) -> list[Row]:
    """A row a variant, in the order in which they first come."""
    rows = []
    for name in dict.fromkeys(run.variant for run in runs):
        own = [run for run in runs if run.variant == name]
        steps = [float(run.steps) for run in own if run.steps is not None]
        seconds = [run.seconds for run in own if run.seconds is not None]
        rows.append(
            Row(
                name,
                len(own),
                len(steps),
                _mean_and_deviation(steps) if steps else None,
                _mean_and_deviation(seconds) if seconds else None,
                _mean_and_deviation([run.last for run in own]),
            )
        )
    return rows


def table(rows: Sequence[Row], metric: str, target: float) -> str:
    """The rows in Markdown: mean ± sample deviation, "never" where no seed reached the target."""
    head = f"| variant | seeds that reached {metric} loss {target:g} | steps | seconds | last {metric} loss |"
    lines = [head, "|---|---|---|---|---|"]
    for row in rows:
        cells = [row.variant, f"{row.reached} of {row.runs}", _shown(row.steps, ".0f"), _shown(row.seconds, ".1f")]
        lines.append("| " + " | ".join([*cells, _shown(row.last, ".4f")]) + " |")
    return "\n".join(lines)


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample deviation; the latter is not a number for a single value, or where a run has diverged."""
    spread = len(values) > 1 and all(map(math.isfinite, values))
    return mean(values), stdev(values) if spread else math.nan


def _shown(pair: tuple[float, float] | None, form: str) -> str:
    if pair is None:
        return "never"
    value, deviation = (format(number, form) for number in pair)
    return value if math.isnan(pair[1]) else f"{value} ± {deviation}"


# --- the runs --------------------------------------------------------------------------------------------------------


def command(preset: str, common: Sequence[str], variant: Variant, seed: int, folder: Path) -> list[str]:
    """Words behind `speedrun.py` of one run."""
    where = ["--output.folder", str(folder), "--output.name", f"{variant.name}/seed-{seed}"]
    return [preset, *common, *variant.words, "--train.seed", str(seed), *where]


def train_one(words: Sequence[str], recipe: Recipe, ranks: int) -> None:
    """Run one training to its end, or what is left of it; a finished one is left as it is.

    Raises:
        UserError: it failed or was stopped; the same command goes on.
    """
    from train.run.folder import check_same_run
    from train.run.stages import finished

    folder = run_folder(recipe)
    if finished(recipe):
        check_same_run(folder, recipe)
        print(f"{folder}: finished before", flush=True)
        return
    print(f"{folder}: training", flush=True)
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    code = _wait([*launch, str(Path(__file__).with_name("speedrun.py")), *words])
    if code or not finished(recipe):
        why = f"failed with code {code}" if code else "was stopped"
        raise UserError(f"the run in {folder} {why}; the same command goes on with the rest")


def _wait(words: Sequence[str]) -> int:
    """Run a program to its end; one that is asked to stop saves first, so it is waited for, not killed."""
    with subprocess.Popen(words) as process:
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            return process.wait()
        except KeyboardInterrupt:  # the terminal told the run too
            return process.wait()
        finally:
            signal.signal(signal.SIGTERM, before)


def variant(text: str) -> Variant:
    """Read "name" or "name: --word value …", quoted as a shell takes them.

    Raises:
        UserError: no name, one that is no name of a folder, or a quote that does not end.
    """
    name, _, words = text.partition(":")
    name = name.strip()
    if not name or name.startswith((".", "-")) or set(name) & set("/\\|"):
        raise UserError(
            f"--variant takes 'name' or 'name: --field value', with a name that a folder can have; got {text!r}"
        )
    try:
        return Variant(name, tuple(shlex.split(words)))
    except ValueError as error:
        raise UserError(f"the words of --variant {text!r} cannot be read: {error}") from None


def main() -> int:
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    asked, common = _arguments(arguments[:split]), arguments[split + 1 :]
    variants = [variant(text) for text in asked.variant]
    for kind, values in (("--variant", [v.name for v in variants]), ("--seeds", asked.seeds)):
        if len(set(values)) < len(values):
            raise UserError(f"{kind} names something twice: {', '.join(str(value) for value in values)}")
    if isinstance(parse([asked.preset]).recipe, TwoStages):
        raise UserError(f"{asked.preset} has two stages, and a target loss belongs to one: take prx-512 or prx-1024")
    plan = []
    for one in variants:  # all words are read before the first run starts
        for seed in asked.seeds:
            words = command(asked.preset, common, one, seed, asked.out)
            recipe = parse(words).recipe
            assert isinstance(recipe, Recipe)
            plan.append((one, seed, words, recipe))
    runs = []
    for one, seed, words, recipe in plan:
        train_one(words, recipe, asked.ranks)
        points = read(run_folder(recipe), recipe.train.batch, asked.metric, asked.window)
        runs.append(Reached(one.name, seed, *reach(points, asked.target), points[-1].loss))
    rows = summarise(runs)
    printed = table(rows, asked.metric, asked.target)
    settings = {"preset": asked.preset, "words": common, "metric": asked.metric, "target": asked.target}
    settings |= {"window": asked.window, "variants": [asdict(one) for one in variants]}
    each = [{**asdict(run), "last": _number(run.last)} for run in runs]
    found = {**settings, "runs": each, "rows": [plain(row) for row in rows]}
    (asked.out / "ablation.json").write_text(json.dumps(shown.settings(found), indent=2, allow_nan=False) + "\n")
    (asked.out / "ablation.md").write_text(printed + "\n")
    print(f"\n{printed}")
    return 0


def plain(row: Row) -> dict[str, Any]:
    """A row as JSON can say it: null where there is no value."""
    pairs = {"steps": row.steps, "seconds": row.seconds, "last": row.last}
    named = {name: pair and {"mean": _number(pair[0]), "deviation": _number(pair[1])} for name, pair in pairs.items()}
    return {"variant": row.variant, "runs": row.runs, "reached": row.reached, **named}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ablate.py",
        description="Trains variants of a preset and prints, in Markdown, when each reaches a target loss.",
        epilog="Words behind -- go to every run. Finished runs are not repeated: the same command goes on.",
    )
    parser.add_argument("preset", nargs="?", default="shapes", help="of speedrun.py (shapes)")
    parser.add_argument("--target", type=float, required=True, help="loss to reach")
    parser.add_argument("--variant", action="append", required=True, help="'name' or 'name: --no-muon', once for each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of each variant (0 1 2)")
    parser.add_argument(
        "--metric",
        choices=[HELD_OUT, TRAIN],
        default=HELD_OUT,
        help="held-out: dense loss of the averaged weights, every evaluation.every steps; train: trailing mean of the "
        "flow-matching loss, which routed and dense variants cannot be compared by",
    )
    parser.add_argument("--window", type=int, default=100, help="steps of the trailing mean (100)")
    parser.add_argument("--ranks", type=int, default=1, help="processes of a run, one a GPU (1)")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="folder (runs/ablation)")
    return parser.parse_args(words)


if __name__ == "__main__":
    exit_with_sentence(main)
