"""Every op's launcher under Triton's interpreter, by its public name, against its definition: numbers, not launches.

What an op runs on a GPU runs here on the CPU, forward and backward, in every layout. The recorder (launchers/) sees
what is launched, this what comes of it. bfloat16 is left out: the interpreter multiplies its bit patterns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import pytest
import torch
from torch._library.custom_ops import OPDEFS

from tests.kernels.launchers.cases import CASES, Case
from tests.kernels.launchers.values import check


@contextmanager
def launchers() -> Iterator[None]:
    """What the ops run on a CPU becomes what they run on a GPU."""
    with ExitStack() as stack:
        for name, op in list(OPDEFS.items()):
            if name.startswith("prx::") and "cuda" in op._backend_fns:
                stack.enter_context(patch.dict(op._backend_fns, {"cpu": op._init_fn}))
        yield


# Dense rows in the wrong place, no dense rows, samples in one place, and samples apart from one another.
LAYOUTS = ("sliced", "gaps", "expanded", "channels_last")
# These meet every layout in test_newton_schulz.py and test_muon.py, at a tenth of the launches.
MUON = [case for case in CASES if str(case).startswith(("newton_schulz", "muon", "sym_gemm"))]


def interpretable(case: Case) -> list[tuple[torch.dtype, torch.dtype]]:
    left_out = (torch.bfloat16, torch.float8_e4m3fn)
    return [dtypes for dtypes in case.dtypes if not any(dtype in left_out for dtype in dtypes)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_dtype(case: Case) -> None:
    first, *others = interpretable(case)
    for dtypes in others:
        check(case, "ragged", dtypes, launching=launchers())
    check(case, "empty", first, launching=launchers())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_layout(case: Case) -> None:
    for layout in ("gaps",) if case in MUON else LAYOUTS:
        check(case, "ragged", interpretable(case)[0], layout=layout, launching=launchers())


@pytest.mark.parametrize("case", [case for case in CASES if "route" in str(case) or "tokens" in str(case)], ids=str)
def test_a_backward_that_a_compiler_records(case: Case) -> None:
    check(case, "ragged", interpretable(case)[0], traced=True, launching=launchers())
