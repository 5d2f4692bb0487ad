"""Build a Triton kernel for a GPU that is not here and read what the assembler made of it.

`build(kernel, arguments, constants, config, arch)` compiles as a launch would; the result holds registers, spills and
shared memory from `cuobjdump -res-usage` (it ships inside Triton) and the global accesses of the PTX.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from prx_kernels.launch import Config

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
MAX_SHARED = 232_448  # bytes a block may have on sm_90 (227 KiB)


@dataclass(frozen=True)
class Build:
    registers: int
    stack: int
    shared: int
    ptx: str
    boxes: tuple[dict[str, Any], ...] = ()  # of the kernel's descriptors: block_size, elem_size, swizzle

    def accesses(self, kind: str) -> list[int]:
        """Bytes of each global access ("ld" or "st") in the PTX."""
        pattern = rf"\b{kind}\.global(?:\.[a-z0-9_:]+)*?(?:\.v(\d))?\.b(\d+)\b"
        return [int(vector or 1) * int(bits) // 8 for vector, bits in re.findall(pattern, self.ptx)]


def build(kernel: Any, arguments: dict[str, str], constants: dict[str, Any], config: Config, arch: int) -> Build:
    """Compile `kernel` for `sm_{arch}`.

    Args:
        arguments: Triton type of every run-time argument by name ("*i16", "i32"); pointers count as 16-byte aligned.
        constants: constexpr arguments that the configuration does not set.
    """
    constants = {**constants, **dict(config.tile)}
    signature = {name: arguments.get(name, "constexpr") for name in kernel.arg_names}
    attrs = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")
    }
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()}, attrs)
    return assemble(source, arch, {"num_warps": config.num_warps, "num_stages": config.num_stages})


def assemble(source: ASTSource, arch: int, options: dict[str, Any]) -> Build:
    """Compile what a launch would compile for `sm_{arch}`."""
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    boxes = tuple(filter(None, getattr(compiled.metadata, "tensordesc_meta", None) or ()))
    return Build(registers, stack, compiled.metadata.shared, compiled.asm["ptx"], boxes)
