"""The configurations of the routing kernels' tables, as ahead-of-time builds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prx_kernels.routing import kernels

from ..ahead_of_time import Build, build

BITS = {2: "*i16", 4: "*i32", 8: "*i64"}
FLOATS = {2: "*bf16", 4: "*fp32", 8: "*fp64"}
STRIDES = [f"{tensor}_{axis}" for tensor in ("x", "y", "byp", "grad") for axis in ("batch", "token")]
SIZES = ["tokens", "kept", "width", *STRIDES]


def signature(kernel: Any, element: str, **others: str) -> dict[str, str]:
    pointers = {name: element for name in kernel.arg_names if name.endswith("_ptr")}
    scalars = {name: "i32" for name in SIZES if name in kernel.arg_names}
    return {**pointers, **scalars, **others}


def copies(arch: int) -> Iterator[tuple[str, Build]]:
    """The kernels that move rows, for every element width; rows of 16·n bytes."""
    for width, config in kernels.GATHER[0]:
        align = {"ALIGN": 16 // width}
        kernel = kernels._gather_kernel
        yield f"gather {width}", build(kernel, signature(kernel, BITS[width], keep_ptr="*i32"), align, config, arch)
        kernel = kernels._update_kernel
        for add, element in ((False, BITS[width]), (True, FLOATS[width])):
            arguments = signature(kernel, element, keep_ptr="*i32")
            yield f"update {width} add={add}", build(kernel, arguments, {**align, "ADD": add}, config, arch)
    kernel = kernels._merge_kernel
    for width, _ in kernels.MERGE[0]:
        for has_x, has_y, add in ((True, True, False), (True, False, False), (False, True, False), (True, True, True)):
            config = dict((kernels.MERGE_ADD if add else kernels.MERGE)[0])[width]
            arguments = signature(kernel, FLOATS[width] if add else BITS[width], keep_ptr="*i32")
            constants = {"ALIGN": 16 // width, "HAS_X": has_x, "HAS_Y": has_y, "ADD": add}
            yield f"merge {width} {constants}", build(kernel, arguments, constants, config, arch)


def sample_keep(arch: int) -> Iterator[tuple[str, Build]]:
    kernel = kernels._sample_keep_kernel
    arguments = signature(kernel, "*i64", out_ptr="*i32")
    for tokens, config in kernels.SAMPLE_KEEP[0]:
        yield f"sample_keep N {tokens}", build(kernel, arguments, {"BLOCKS": tokens // 4}, config, arch)
