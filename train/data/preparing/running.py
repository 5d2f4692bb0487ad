"""Workers of one machine, which take units until none is left, and the two steps in between that one process does."""

import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from train.data.claims import Claim, is_held, take
from train.data.preparing import settling
from train.data.preparing.plan import MANIFEST, Plan, Unit, begin
from train.data.preparing.units import make_unit
from train.errors import UserError
from train.shown import tell
from train.side_files import parse_json

_PAUSE = 1.0
"""Seconds between two looks at what other machines do."""

Stage = Callable[[Plan, int], None]


def prepare(plan: Plan, workers: int) -> dict[str, Any]:
    """Do everything that a plan has left to do, beside whoever else does; gives the manifest.

    Raises:
        UserError: another plan's folder, or whatever stopped a worker.
    """
    if begin(plan):
        steps: list[tuple[Callable[[], bool], Callable[[], None]]] = [
            (lambda: _all(plan, plan.record), lambda: _share(_make_units, plan, _free(plan, plan.record), workers)),
            (settling.duplicates_file(plan).exists, lambda: _alone(plan, "duplicates", settling.find_duplicates)),
            (lambda: _all(plan, plan.settled), lambda: _share(_settle_units, plan, _free(plan, plan.settled), workers)),
            (lambda: False, lambda: _alone(plan, "finish", lambda plan, _: settling.finish(plan))),
        ]
        for done, step in steps:
            while not (plan.out / MANIFEST).exists() and not done():
                step()
                if not ((plan.out / MANIFEST).exists() or done()):
                    time.sleep(_PAUSE)  # others hold the rest, on this machine or another
        # Who came too late for a step may have left a claim after the folder was removed.
        shutil.rmtree(plan.work, ignore_errors=True)
    found: dict[str, Any] = parse_json((plan.out / MANIFEST).read_bytes())
    return found


@contextmanager
def _unless_finished(plan: Plan) -> Iterator[None]:
    """Within this context files may be gone, if only because another process has finished and removed them."""
    try:
        yield
    except FileNotFoundError:
        if not (plan.out / MANIFEST).exists():
            raise


def _all(plan: Plan, file: Callable[[Unit], Path]) -> bool:
    return all(file(unit).exists() for unit in plan.units)


def _free(plan: Plan, file: Callable[[Unit], Path]) -> int:
    """Units that are not done, and that nobody works at."""
    return sum(not file(unit).exists() and not is_held(plan.claim(unit)) for unit in plan.units)


def _alone(plan: Plan, name: str, step: Callable[[Plan, Callable[[], None]], object]) -> None:
    with _unless_finished(plan):
        claim = take(plan.work / "claims" / name)
        if claim is not None:
            with claim:
                step(plan, claim.beat)


def _make_units(plan: Plan, parent: int) -> None:
    for unit in plan.units:
        if plan.record(unit).exists() or (claim := take(plan.claim(unit))) is None:
            continue
        with claim:
            if plan.record(unit).exists():
                continue

            def beat(claim: Claim = claim) -> None:
                claim.beat()
                _end_with(parent)

            told = make_unit(plan, unit, beat)
        kept = ", ".join(f"{shard['rows']:,} at {side} px" for side, shard in told["shards"].items())
        tell(
            f"unit {unit.number + 1:,} of {len(plan.units):,}: {told['rows']:,} rows, kept {kept}; "
            f"{told['rows'] / max(told['seconds'], 1e-9):.0f} rows/s in this process"
        )
        _end_with(parent)


def _settle_units(plan: Plan, parent: int) -> None:
    duplicates = settling.load_duplicates(plan)
    for unit in plan.units:
        if plan.settled(unit).exists() or (claim := take(plan.claim(unit))) is None:
            continue
        with claim:
            if not plan.settled(unit).exists():
                settling.settle(plan, unit, duplicates)
        _end_with(parent)


def _end_with(parent: int) -> None:
    """A worker whose parent is gone ends, so that nothing goes on behind a killed command."""
    if parent and os.getppid() != parent:
        os._exit(1)


def _share(stage: Stage, plan: Plan, units: int, workers: int) -> None:
    """Run a stage for so many units in this process, or in several; the first that fails ends all."""
    if min(workers, units) < 2:
        with _unless_finished(plan):
            if units:
                stage(plan, 0)
        return
    context = multiprocessing.get_context("spawn")
    errors = context.SimpleQueue()
    processes = [
        context.Process(target=_worker, args=(stage, plan, os.getpid(), errors), daemon=True)
        for _ in range(min(workers, units))
    ]
    try:
        for process in processes:
            process.start()
        _wait(processes)
        if not errors.empty():
            raise UserError(errors.get())
        if failed := [process.exitcode for process in processes if process.exitcode]:
            raise UserError(
                f"a worker of prepare.py ended with exit code {failed[0]} (its words, if any, stand above; "
                "-9 is often too little memory); the same command goes on where it stopped"
            )
    finally:
        for process in processes:
            if process.pid is not None and process.is_alive():
                process.terminate()


def _wait(processes: list[SpawnProcess]) -> None:
    """Until all have ended, or one has failed."""
    from multiprocessing.connection import wait

    waiting = {process.sentinel: process for process in processes}
    while waiting:
        for sentinel in wait(list(waiting)):
            process = waiting.pop(sentinel)  # type: ignore[arg-type]
            process.join()
            if process.exitcode:
                return


def _worker(stage: Stage, plan: Plan, parent: int, errors: Any) -> None:
    # Ctrl-C reaches the whole group; the parent ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with _unless_finished(plan):
            stage(plan, parent)
    except UserError as error:
        errors.put(str(error))
        sys.exit(2)
