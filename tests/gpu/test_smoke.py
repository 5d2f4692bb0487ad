"""The first seconds of a GPU: one launch of every op, forward and backward, against its definition on the CPU.

`benchmarks/run_h200.sh` begins with it.
"""

from __future__ import annotations

import pytest

from tests.kernels.launchers.cases import CASES, Case
from tests.kernels.launchers.values import check

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_op_gives_what_its_definition_gives(case: Case) -> None:
    check(case, "aligned", case.dtypes[0], device="cuda")
