"""The configurations of Muon's kernels, as ahead-of-time builds."""

from __future__ import annotations

from collections.abc import Iterator

from prx_kernels.muon import kernels

from ..ahead_of_time import Build, build

ELEMENTS = {2: "bf16", 4: "fp32"}


def passes(arch: int) -> Iterator[tuple[str, Build]]:
    for width, config in kernels.BLOCK[0]:
        state = ELEMENTS[width]
        pointers = {"buffer_ptr": f"*{state}", "grad_ptr": "*fp32", "out_ptr": "*bf16"}
        scalars = {"size": "i32", "weight": "fp32"}
        for has_out in (True, False):
            constants = {"NESTEROV": True, "HAS_OUT": has_out, "ALIGN": 16}
            made = build(kernels._momentum_kernel, pointers | scalars, constants, config, arch)
            yield f"momentum {state} out={has_out}", made
        pointers = {"param_ptr": f"*{state}", "update_ptr": "*bf16", "lr_ptr": "*fp32"}
        scalars = {"size": "i32", "ratio": "fp32", "weight_decay": "fp32"}
        yield f"apply {state}", build(kernels._apply_kernel, pointers | scalars, {"ALIGN": 16}, config, arch)
