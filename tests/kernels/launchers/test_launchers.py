"""Every op's launcher, forward and backward, up to the launch on every architecture; no GPU is needed.

What CUDA would refuse fails here: see recorder.py. A new op adds a case to cases.py.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
from torch._library.custom_ops import OPDEFS

import prx_kernels

pytest.importorskip("triton")
from triton.runtime.jit import JITFunction

from .pretended_gpu import NAMESPACE
from .recorder import CAPABILITIES
from .runs import sweep


def modules() -> Iterator[ModuleType]:
    for found in pkgutil.walk_packages(prx_kernels.__path__, "prx_kernels."):
        yield importlib.import_module(found.name)


def tables(arch: int) -> Iterator[tuple[str, Any]]:
    """Name and settings of every row that an architecture has in any table of launch settings."""
    for module in modules():
        for name, value in vars(module).items():
            if isinstance(value, dict) and value and all(type(key) is int for key in value):
                for limit, config in value.get(arch, value.get(0, ())):
                    yield f"{module.__name__}.{name}, up to {limit}", config


@pytest.mark.parametrize("arch", CAPABILITIES)
def test_every_launcher_reaches_its_launch(arch: int) -> None:
    failures = sweep(arch).failures
    assert not failures, f"{len(failures)} on sm_{arch}:\n" + "\n".join(failures[:20])


@pytest.mark.parametrize("arch", CAPABILITIES)
def test_every_op_runs_and_every_kernel_is_launched(arch: int) -> None:
    ours = {name for name, op in OPDEFS.items() if name.startswith(f"{NAMESPACE}::") and "cuda" in op._backend_fns}
    assert sweep(arch).ops == ours, "cases.py has no case that gets to an op"
    kernels = {
        value.fn.__name__
        for module in modules()
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    launched = {launch.name for _, launch in sweep(arch).launches.values()}
    # Descriptors are what Hopper and the Blackwell of data centres have.
    assert launched == kernels - (set() if arch in (90, 100, 103) else {"_sym_gemm_tma_kernel"})


@pytest.mark.parametrize("arch", CAPABILITIES)
def test_every_row_of_every_table_is_launched(arch: int) -> None:
    settings = [launch.settings for _, launch in sweep(arch).launches.values()]
    unused = [
        name for name, config in tables(arch) if not any(config.options.items() <= found.items() for found in settings)
    ]
    assert not unused, f"cases.py has no size that gets to {unused} on sm_{arch}"


def test_what_the_launchers_compute_is_what_the_definitions_do(run_interpreted: Callable[[str], None]) -> None:
    run_interpreted("test_cases.py")
