"""The configurations of Muon's kernels, as ahead-of-time builds."""

from __future__ import annotations

from collections.abc import Iterator

from prx_kernels.launch import Config
from prx_kernels.muon import kernels

from ..ahead_of_time import Build, build

ELEMENTS = {2: "bf16", 4: "fp32"}


STEPS = 7  # of the search among 65 to 128 tensors


def scalars(name: str) -> tuple[list[int], list[int]]:
    """Bytes of the loads and of the stores of one number that a kernel makes beside its tensors, sorted.

    Loads: of the table the search and the rows that it uses; factor and scale, or learning rate and scale; the first
    update, which tells whether all are finite. Stores: what it tells of its part.
    """
    rows = {"squares": 3, "momentum": 6 if "out=True" in name else 4, "apply": 7 if "True" in name else 6}
    kind = name.split()[0]
    numbers = {"squares": 0, "momentum": 2 if "out=True" in name else 0, "apply": 2 if "True" in name else 1}
    first = [2] if kind == "apply" else []
    return first + [4] * numbers[kind] + [8] * (STEPS + rows[kind]), [4] * (2 if kind == "momentum" else 1)


def passes(arch: int) -> Iterator[tuple[str, Build]]:
    """Every kernel of a step, as PRX has them: aligned float32 or bf16 state, half-precision updates and copies."""
    for width, config in kernels.BLOCK[0]:
        state = ELEMENTS[width]
        found = {"ALIGN": 8, "STEPS": STEPS}
        counts = {"table_ptr": "*i64", "part_ptr": "*fp32", "count": "i32", "programs": "i32"}
        yield f"squares {state}", build(kernels._squares_kernel, counts | {"x_ptr": f"*{state}"}, found, config, arch)
        pointers = {"buffer_ptr": f"*{state}", "grad_ptr": "*fp32", "out_ptr": "*fp16"}
        scalars = {"factor_ptr": "*fp32", "scale_ptr": "*fp32", "weight": "fp32"}
        for has_out in (True, False):
            flags = {"NESTEROV": True, "HAS_OUT": has_out, "HAS_FACTOR": has_out, "HAS_SCALE": has_out}
            made = build(kernels._momentum_kernel, counts | pointers | scalars, found | flags, config, arch)
            yield f"momentum {state} out={has_out}", made
        pointers = {"param_ptr": f"*{state}", "update_ptr": "*fp16", "copy_ptr": "*bf16", "bad_ptr": "*fp32"}
        scalars = {"lr_ptr": "*fp32", "scale_ptr": "*fp32", "weight_decay": "fp32"}
        for more in (True, False):
            flags = {"HAS_COPY": more, "HAS_SCALE": more}
            made = build(kernels._apply_kernel, counts | pointers | scalars, found | flags, config, arch)
            yield f"apply {state} {more}", made
    sums = {"table_ptr": "*i64", "part_ptr": "*fp32", "out_ptr": "*fp32"}
    sums |= {"count": "i32", "programs": "i32", "places": "i32"}
    yield "sum", build(kernels._sum_kernel, sums, {}, Config((("BLOCK", kernels.SUM),)), arch)
