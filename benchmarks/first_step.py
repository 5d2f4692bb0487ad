"""One step of prx-512 at batch 4, as the trainer does it but not compiled: does everything run, and run right?

python -m benchmarks.first_step

The second thing that a new GPU is asked (`run_h200.sh`); the first are the ops one by one. Teachers have random
weights. Exits with 1 and names them where weights did not move, or are not finite behind the step. Without a GPU the
sizes are tiny, which shows that the program works.
"""

import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks import machine
from benchmarks.peers import PEERS
from benchmarks.sizes import GPU, Case
from benchmarks.trainer_step import TrainerStep
from benchmarks.training_step import WHOLE

BATCH = 4


def small_case() -> Case:
    return Case(512, BATCH) if GPU else Case(64, 2, text=8)


def run(case: Case) -> list[str]:
    """Do the step and print its loss, seconds and memory; gives what is wrong, a sentence each."""
    (way,) = (way for way in WHOLE if way.trainer)
    began = time.monotonic()
    step = TrainerStep(way, case)
    try:
        before = _norms(step.parameters)
        built = time.monotonic()
        with torch.compiler.set_stance("force_eager"):  # compilation takes more than the minute that this may
            loss = float(step())
        took = time.monotonic() - built
        after = _norms(step.parameters)
        names = [name for name, _ in step.named]
    finally:
        step.close()
    peak = f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB at the peak" if GPU else ""
    print(f"one step at {case}: loss {loss:.4f}, {took:.1f} s behind {built - began:.1f} s of building{peak}")
    wrong = [] if 0.0 < loss < 1e4 else [f"the loss must be a positive number of the size of one, got {loss}"]
    return wrong + wrong_weights(names, before, after)


def wrong_weights(names: list[str], before: list[float], after: list[float]) -> list[str]:
    """Sentences on weights whose norm a step left as it was, or broke."""
    still = [name for name, old, new in zip(names, before, after, strict=True) if new == old]
    broken = [name for name, new in zip(names, after, strict=True) if not new < float("inf")]
    said = [f"the step left {len(still)} weights as they were: {', '.join(still[:5])}"] if still else []
    return said + ([f"{len(broken)} weights are not finite: {', '.join(broken[:5])}"] if broken else [])


def _norms(weights: Sequence[Tensor]) -> list[float]:
    parts = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
    norms: list[float] = torch.stack([part.detach().double().norm() for part in parts]).tolist()
    return norms


def main() -> None:
    missing = PEERS["lpips"].missing()
    if missing:
        sys.exit(f"{missing}, which the teachers need")
    print(machine.describe().get("gpu", {}).get("name", "a CPU: tiny sizes"))
    wrong = run(small_case())
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
