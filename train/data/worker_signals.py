"""Data workers outlive the signals that ask a run to stop: the trainer saves first, and ends them itself.

Torchrun, Slurm, `uv run` and a terminal send their signals to a whole process group. A worker that such a signal killed
would take the trainer with it, in the middle of its step.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""What asks a run to save and stop (`train.ranks.faults.StopSignals`)."""


@contextmanager
def born_shielded() -> Iterator[None]:
    """Processes that are started within this block the stopping signals from their first instruction on.

    The trainer's own are held back that long, not lost.
    """
    resource_tracker.ensure_running()  # or else the first process starts it, which unblocks them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_by_parent_only(worker: int) -> None:
    """A DataLoader's `worker_init_fn`: of the stopping signals only its parent's SIGTERM ends this process."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS: there its loop alone ends a worker
        threading.Thread(target=_wait_for, args=(os.getppid(),), daemon=True).start()


def _wait_for(parent: int) -> None:
    while True:
        received = signal.sigwaitinfo(STOPPING)
        if received.si_signo == signal.SIGTERM and received.si_pid == parent:
            os._exit(0)
