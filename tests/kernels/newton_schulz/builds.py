"""The configurations of the symmetric products' and the norm's tables, as ahead-of-time builds."""

from __future__ import annotations

from collections.abc import Iterator

from prx_kernels.launch import Config
from prx_kernels.newton_schulz import norm_kernels as norm
from prx_kernels.newton_schulz import symmetric_kernels as kernels

from ..ahead_of_time import Build, build

SCALES = {"alpha": "fp32", "beta": "fp32", "gamma": "fp32"}
STRIDES = [f"{tensor}_{axis}" for tensor in ("a", "b", "c", "out") for axis in ("batch", "row")]
ALIGN = {"fp16": 8, "bf16": 8, "fp32": 4}


def tma(config: Config, element: str, arch: int, *, has_c: bool = True, transposed: bool = False) -> Build:
    rows, cols, depth = (config.options[name] for name in ("ROWS", "COLS", "DEPTH"))

    def descriptor(first: int, second: int) -> str:
        return f"tensordesc<{element}[1, {first}, {second}]>"

    pair = cols > 128
    cols = rows if pair else cols
    arguments = {
        "a_desc": descriptor(depth, rows) if transposed else descriptor(rows, depth),
        "b_desc": descriptor(depth, cols) if transposed else descriptor(cols, depth),
        "out_desc": descriptor(rows, rows),
        "k": "i32",
        "tiles": "i32",
        **SCALES,
    }
    constants = {
        "HAS_C": has_c,
        "HAS_SCALE": not has_c,
        "TRANSPOSED": transposed,
        "PAIR": pair,
    }  # X·Xᵀ has scales and no C
    if has_c:
        arguments["c_desc"] = descriptor(rows, cols)
        constants["scale_ptr"] = None
    else:
        arguments["scale_ptr"] = "*fp32"
        constants["c_desc"] = None
    return build(kernels._sym_gemm_tma_kernel, arguments, constants, config, arch)


def pointer(config: Config, element: str, arch: int, *, align: int, transposed: bool = False) -> Build:
    arguments = dict.fromkeys(("n", "k", "tiles", *STRIDES), "i32") | SCALES
    arguments |= {f"{tensor}_ptr": f"*{element}" for tensor in ("a", "b", "c", "out")}
    arguments["scale_ptr"] = "*fp32"
    constants = {"HAS_C": True, "HAS_SCALE": True, "TRANSPOSED": transposed, "ALIGN": align}
    return build(kernels._sym_gemm_pointer_kernel, arguments, constants, config, arch)


def with_descriptors(arch: int) -> Iterator[tuple[str, Build]]:
    """Every form on sm_90; elsewhere those that need most registers."""
    elements = ("fp16", "bf16") if arch == 90 else ("fp16",)
    rows = list(enumerate(kernels.CANDIDATES)) if arch == 90 else kernels.TMA[arch]
    for size, config in rows:
        for element in elements:
            for has_c, transposed in ((True, False), (False, True))[: 2 if element == "fp16" and arch < 103 else 1]:
                name = f"tma {size} {element} C={has_c} transposed={transposed}"
                yield name, tma(config, element, arch, has_c=has_c, transposed=transposed)


def with_pointers(arch: int) -> Iterator[tuple[str, Build]]:
    """16-byte rows of every dtype, and any rows of float32."""
    for table, element in ((kernels.POINTER, "fp16"), (kernels.FLOAT32, "fp32")):
        for size, config in table[0]:
            for transposed in (False, True) if arch == 90 else (False,):
                name = f"pointer {size} {element} transposed={transposed}"
                yield name, pointer(config, element, arch, align=ALIGN[element], transposed=transposed)


def unaligned(arch: int) -> Iterator[tuple[str, Build]]:
    for table, element, align in (
        (kernels.UNALIGNED, "fp16", 1),
        (kernels.UNALIGNED, "fp16", 4),
        (kernels.FLOAT32, "fp32", 1),
    ):
        config = table[0][0][1]
        yield f"unaligned {element} {align}", pointer(config, element, arch, align=align)


def norms(arch: int) -> Iterator[tuple[str, Build]]:
    element = {2: "fp16", 4: "fp32"}
    for width, config in norm.BLOCK[0]:
        arguments = {"size": "i32", "x_batch": "i32", "parts": "i32", "x_ptr": f"*{element[width]}"}
        arguments |= {"largest_ptr": "*fp32", "sum_ptr": "*fp32"}
        partial = {**arguments, "chunk": "i32"}
        yield f"partial {width}", build(norm._partial_norm_kernel, partial, {"ALIGN": 16}, config, arch)
        divide = {**arguments, "out_ptr": "*fp16", "blocks": "i32", "out_batch": "i32", "eps": "fp32"}
        yield f"divide {width}", build(norm._divide_kernel, divide, {"ALIGN": 16, "PARTS": 128}, config, arch)
