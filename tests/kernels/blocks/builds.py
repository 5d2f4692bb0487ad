"""The configurations of the block kernels' tables, as ahead-of-time builds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prx_kernels.blocks import gated_gelu, kernels, launch, modulation_kernels
from prx_kernels.launch import Config, tl

from ..ahead_of_time import Build, build

FLOATS = {2: "*bf16", 4: "*fp32", 8: "*fp64"}


def signature(kernel: Any, element: str, accumulator: str, text: int = 0) -> dict[str, str]:
    """Types of run-time arguments: pointers by what they hold, eps, and 32-bit numbers.

    Where text is not packed the launcher has no offsets, and hands on another tensor in their place.
    """
    offsets = "*i32" if text > 1 else element
    special = {"sums_ptr": accumulator, "part_ptr": accumulator, "rope_ptr": "*fp32", "offsets_ptr": offsets}
    special["eps"] = "fp32"
    weights = {name: "*fp32" for name in kernel.arg_names if name.endswith("weight_ptr")}
    made = {}
    for name in kernel.arg_names:
        if not name.isupper():
            made[name] = special.get(name) or weights.get(name) or (element if name.endswith("_ptr") else "i32")
    return made


def qk_norm_rope(arch: int, width: int, *texts: int, only: int | None = None) -> Iterator[tuple[str, Build]]:
    """Each row of the table (or one), at the widest head that it serves, for these ways that text comes and goes."""
    element = FLOATS[width]
    accumulator, kind = ("*fp64", tl.float64) if width == 8 else ("*fp32", tl.float32)
    for kernel, table in ((kernels._forward_kernel, launch.FORWARD), (kernels._backward_kernel, launch.BACKWARD)):
        for head_dim, config in table[0]:
            if only not in (None, head_dim):
                continue
            constants = {"ALIGN": 16 // width, "ACC": kind, "SAMPLES": 32, "HEAD_DIM": head_dim}
            for text in texts:
                types = signature(kernel, element, accumulator, text)
                made = build(kernel, types, {**constants, "TEXT": text}, config, arch)
                yield f"{kernel.__name__} D {head_dim} width {width} text {text}", made


def sums(arch: int) -> Iterator[tuple[str, Build]]:
    kernel = kernels._sum_kernel
    config: Config = launch.SUM[0][0][1]
    yield "sum", build(kernel, signature(kernel, "*fp32", "*fp32"), {"ACC": tl.float32, "HEAD_DIM": 64}, config, arch)


def modulation(arch: int, width: int, most: int = 8192) -> Iterator[tuple[str, Build]]:
    """Both kernels at every row of the table up to `most`, with all that they can be given and with the least."""
    accumulator, kind = "*fp32", tl.float32
    for kernel in (modulation_kernels._forward_kernel, modulation_kernels._backward_kernel):
        types = signature(kernel, FLOATS[width], accumulator)
        given = [name for name in kernel.arg_names if name.startswith("HAS_")]
        for columns, config in (row for row in modulation_kernels.ROW[0] if row[0] <= most):
            for every in (True, False):
                constants = {"ALIGN": 16 // width, "ACC": kind, **dict.fromkeys(given, every)}
                name = f"{kernel.__name__} C {columns} width {width} every input {every}"
                yield name, build(kernel, types, constants, config, arch)


def geglu(arch: int, width: int) -> Iterator[tuple[str, Build]]:
    """Both kernels, both forms of GELU."""
    config = gated_gelu.TILE[0][0][1]
    for kernel in (gated_gelu._geglu_kernel, gated_gelu._geglu_backward_kernel):
        types = signature(kernel, FLOATS[width], "*fp32")
        for tanh in (True, False):
            constants = {"ALIGN": 16 // width, "ACC": tl.float32, "TANH": tanh}
            yield f"{kernel.__name__} width {width} tanh {tanh}", build(kernel, types, constants, config, arch)
