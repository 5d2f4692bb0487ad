"""The configurations of the pixel kernels' tables, as ahead-of-time builds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prx_kernels.launch import Config, Table
from prx_kernels.noise import kernels as noise_kernels
from prx_kernels.patch_embed import kernels, launch
from prx_kernels.pixel_loss import kernels as loss_kernels

from ..ahead_of_time import Build, build

SIZES = ["rows", "features", "bottleneck", "tokens", "columns", "width", "plane", "volume", "steps", "count", "parts"]
STRIDES = ["sb", "sc", "sh", "factor_stride"]
FLOATS = ["noise_scale", "t_min", "unit"]
POINTERS = {"t_ptr": "*fp32", "ids_ptr": "*i64", "seed_ptr": "*i64", "part_ptr": "*fp32", "factor_ptr": "*fp32"}
PIXELS = {"bf16": "*bf16", "fp32": "*fp32", "uint8": "*u8"}


def signature(kernel: Any, element: str = "*bf16", **others: str) -> dict[str, str]:
    """Triton types by name; the column stride stays out, as a launch with dense rows makes it the constant 1."""
    types = {name: POINTERS.get(name, element) for name in kernel.arg_names if name.endswith("_ptr")}
    types |= {name: "i32" for name in (*SIZES, *STRIDES) if name in kernel.arg_names}
    return {**types, **{name: "fp32" for name in FLOATS if name in kernel.arg_names}, **others}


def rows_of(table: Table, arch: int) -> Iterator[tuple[int, Config]]:
    yield from table.get(arch, table[0])


def products(
    arch: int, pixels: str, noise: bool, patch: int = 32, *, every: bool = False
) -> Iterator[tuple[str, Build]]:
    """Forward and weight's gradient in bfloat16 with float32 partial sums; the table's widest row, or every one."""
    align = 16 if patch % 4 == 0 else 4
    constants = {"P": patch, "NOISE": noise, "FOURS": patch % 4 == 0, "PARTIAL": True, "ALIGN": align, "sw": 1}
    constants["PIXELS"] = 16 if patch % 4 == 0 else 2
    for name, tables in (
        ("project", (launch.PROJECT, launch.PROJECT_NOISE, launch.PROJECT_SINGLE)),
        ("weight_gradient", (launch.WEIGHT, launch.WEIGHT_NOISE, launch.WEIGHT_SINGLE)),
    ):
        kernel = getattr(kernels, f"{name}_kernel")
        types = signature(kernel, image_ptr=PIXELS[pixels], out_ptr="*fp32")
        bias = {"BIAS": False} if name == "project" else {}
        rows = list(rows_of(launch.product_table(tables, noise, patch, 1), arch))
        for limit, config in rows if every else rows[-1:]:
            made = build(kernel, types, {**constants, **bias}, config, arch)
            yield f"{name} {pixels} noise={noise} patch {patch} up to {limit}", made


def image_gradient(arch: int) -> tuple[str, Build]:
    kernel = kernels.image_gradient_kernel
    constants = {"P": 32, "NOISE": True, "ALIGN": 16, "PIXELS": 16}
    return "image_gradient", build(kernel, signature(kernel), constants, launch.IMAGE[0][0][1], arch)


def float_products(arch: int) -> Iterator[tuple[str, Build]]:
    constants = {"P": 32, "NOISE": True, "FOURS": True, "ALIGN": 16, "PIXELS": 16}
    config = launch.FLOAT[0][0][1]
    for name in ("project", "weight_gradient", "image_gradient"):
        kernel = getattr(kernels, f"{name}_kernel")
        own = {k: v for k, v in {**constants, "BIAS": True, "PARTIAL": False, "sw": 1}.items() if k in kernel.arg_names}
        yield f"{name} float32", build(kernel, signature(kernel, "*fp32"), own, config, arch)


def streams(arch: int) -> Iterator[tuple[str, Build]]:
    """The kernels whose time is that of memory: loss, its scaling, the sum of partial sums, normals."""
    kernel = loss_kernels._loss_kernel
    for _, config in loss_kernels.LOSS[0]:
        for pixels in ("bf16", "fp32"):
            constants = {"P": 32, "GRAD": True, "ALIGN": 16, "PIXELS": 16, "sw": 1}
            made = build(kernel, signature(kernel, image_ptr=PIXELS[pixels]), constants, config, arch)
            yield f"loss {pixels} {config.tile}", made
    kernel, config = loss_kernels._scale_kernel, loss_kernels.SCALE[0][0][1]
    for in_place in (True, False):
        made = build(kernel, signature(kernel), {"IN_PLACE": in_place, "ALIGN": 16}, config, arch)
        yield f"scale in_place={in_place}", made
    kernel, config = kernels.sum_parts_kernel, launch.SUM_PARTS[0][0][1]
    types = signature(kernel, parts_ptr="*fp32")
    yield "sum_parts", build(kernel, types, {"BIAS": False, "ALIGN": 16}, config, arch)
    kernel = noise_kernels._draw_kernel
    for _, config in noise_kernels.DRAW[0]:
        for uniform in (False, True):
            constants = {"UNIFORM": uniform, "ALIGN": 16}
            made = build(kernel, signature(kernel, "*fp32"), constants, config, arch)
            yield f"{'uniform' if uniform else 'normal'} {config.tile}", made
