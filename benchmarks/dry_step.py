"""One training step of the recipe on an H200 that is not there: compiled, run and counted on a CPU.

python -m benchmarks.dry_step prx-512                                  # one GPU, 32 pictures
python -m benchmarks.dry_step prx-1024 --ranks 32 --nodes 4 --out F.json
python -m benchmarks.dry_step prx-512 --small --check                  # as CI: 4 blocks, held to benchmarks/budgets/
python -m benchmarks.dry_step prx-512 --muon.ns-steps 4                # with settings of the trainer's command line

The step is that of `train.learner.step.Learner`. Counted are launches, bytes of device memory and operations, memory
that is alive, graphs, recompilations and waits; every Triton kernel is built for sm_90. Milliseconds are predicted from
efficiencies that are printed beside them. What this leaves out stands in `benchmarks/absent_gpu/__init__.py`.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.absent_gpu import libraries
from train import commandline
from train.errors import UserError

BATCH = {"prx-512": 32, "prx-1024": 16}
"""Pictures a GPU in the published run (docs/recipe.md, "The run")."""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dry_step", description="count a training step on an H200 that is not there"
    )
    parser.add_argument("preset", choices=BATCH, help="settings as speedrun.py takes them may follow")
    parser.add_argument("--batch", type=_positive, help="pictures a GPU; the published run's unless given")
    parser.add_argument("--ranks", type=_positive, default=1, help="GPUs in all; this one is rank 0")
    parser.add_argument("--nodes", type=_positive, help="machines; 8 GPUs each unless given")
    parser.add_argument("--small", action="store_true", help="4 blocks a network instead of all, same widths")
    builds = "configurations that are built for sm_90; needed: until one of a kernel does not spill"
    parser.add_argument("--builds", choices=("all", "needed", "none"), default="all", help=builds)
    parser.add_argument("--out", type=Path, help="write everything that is known as JSON")
    parser.add_argument("--check", action="store_true", help="fail where the step costs more than its budget")
    parser.add_argument("--update", action="store_true", help="write the budget anew")
    chosen, words = parser.parse_known_args(arguments)
    chosen.words = words
    chosen.batch = chosen.batch or BATCH[chosen.preset]
    chosen.nodes = chosen.nodes or max(chosen.ranks // 8, 1)
    if chosen.ranks % chosen.nodes:
        parser.error(f"--ranks {chosen.ranks} must be a multiple of --nodes {chosen.nodes}")
    if (chosen.check or chosen.update) and chosen.builds == "none":
        parser.error("a budget counts kernels that spill: leave --builds none out")
    if (chosen.check or chosen.update) and chosen.words:
        parser.error(f"a budget is one of the preset: leave {' '.join(chosen.words)} out")
    return chosen


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)


def main(arguments: list[str]) -> int:
    """Count, print, write and check; the exit code."""
    chosen = parse(arguments)
    try:
        commandline.parse([chosen.preset, *chosen.words])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        libraries.restart("benchmarks.dry_step", arguments)
    except libraries.AbsentGPUError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = counted(chosen)
    if chosen.out is not None:
        chosen.out.write_text(json.dumps(found, indent=1))
    from benchmarks.absent_gpu import report

    print(*report.lines(found), sep="\n")
    return _budget(found, chosen)


def counted(chosen: argparse.Namespace) -> dict[str, Any]:
    """Everything that is known of the step, as JSON values; below the stand-ins only."""
    from benchmarks.absent_gpu import builds, report, trainer

    setting = trainer.Setting(
        chosen.preset, chosen.batch, chosen.ranks, chosen.nodes, chosen.small, tuple(chosen.words)
    )
    step = trainer.count(setting)
    made = []
    if chosen.builds != "none":
        made = builds.build_all(step.compiled, step.calls, every=chosen.builds == "all")
    return report.facts(step, made)


def _budget(found: dict[str, Any], chosen: argparse.Namespace) -> int:
    from benchmarks.absent_gpu import budget

    path = budget.path_of(found["setting"])
    if chosen.update:
        path.parent.mkdir(exist_ok=True)
        path.write_text(budget.text(found))
        print(f"wrote {path.name}")
    if not chosen.check:
        return 0
    if not path.exists():
        print(f"error: there is no budget {path.name}; write it with --update", file=sys.stderr)
        return 2
    content = path.read_text()
    if budget.read(content)[0] != budget.versions(found):
        print(f"the budget is of {budget.read(content)[0]} and this is {budget.versions(found)}: not compared")
        return 0
    print(*(f"lower than its budget: {line}" for line in budget.under(found, content)), sep="\n")
    over = budget.over(found, content)
    if over:
        print(f"error: the step costs more than {path.name} allows:", *over, sep="\n", file=sys.stderr)
        print("Mend it, or write the budget anew with --update and say why in the commit.", file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
