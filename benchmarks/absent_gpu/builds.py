"""Every Triton kernel of a counted step, built for sm_90 with the Triton that is installed: registers, spills, memory.

`cuobjdump -res-usage` reads them off the machine code; it ships inside Triton. Another Triton is another environment.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.absent_gpu.driver import CAPABILITY, pretended_driver
from benchmarks.absent_gpu.inductor import Compiled, Generated
from benchmarks.absent_gpu.launchers import Call

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Build:
    """One kernel in one configuration."""

    kernel: str
    whose: str
    """inductor or ours."""
    configuration: str
    registers: int
    """A thread."""
    stack: int
    """Bytes a thread that live in memory: registers that were spilled, above all."""
    shared: int
    """Bytes a block."""
    error: str = ""
    """Why it could not be built."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def build_all(compiled: Compiled, calls: Iterable[Call], *, every: bool = True) -> list[Build]:
    """Inductor's kernels in `every` configuration, or until one of them does not spill; ours as they are launched."""
    seen: dict[str, Generated] = {}
    for generated in compiled.kernels.values():
        seen.setdefault(re.sub(rf"\b{generated.name}\b", "kernel", generated.source), generated)
    with pretended_driver():
        found = [build for generated in seen.values() for build in _inductor(generated, every)]
        return found + [_ours(call) for call in calls]


def spilling(builds: Iterable[Build]) -> list[Build]:
    """Kernels of ours that keep registers in memory, and Inductor's that do so in every configuration."""
    kernels: dict[tuple[str, str], list[Build]] = {}
    for build in builds:
        key = build.kernel if build.whose == "inductor" else f"{build.kernel} {build.configuration}"
        kernels.setdefault((build.whose, key), []).append(build)
    return [min(group, key=lambda b: b.stack) for group in kernels.values() if all(b.stack for b in group)]


def _inductor(generated: Generated, every: bool) -> Iterator[Build]:
    from torch._inductor import config
    from torch._inductor.codecache import PyCodeCache

    with config.patch({"use_static_triton_launcher": False} if hasattr(config, "use_static_triton_launcher") else {}):
        tuner = getattr(PyCodeCache.load(generated.source), generated.name)
        for choice in tuner.configs:
            text = f"{choice.kwargs}, {choice.num_warps} warps, {choice.num_stages} stages"
            name = f"{generated.graph}: {generated.name}"
            try:
                binary = tuner._precompile_config(choice).kernel
            except Exception as error:
                yield Build(name, "inductor", text, 0, 0, 0, error=_first_line(error))
            else:
                built = Build(name, "inductor", text, *_usage(binary.asm["cubin"]), binary.metadata.shared)
                yield built
                if not every and not built.stack:
                    return


def _ours(call: Call) -> Build:
    source = ASTSource(call.kernel, call.signature, call.constants, call.attributes)
    constants = {call.kernel.arg_names[path[0]]: value for path, value in call.constants.items() if len(path) == 1}
    text = f"{constants}, {call.options.num_warps} warps, {call.options.num_stages} stages"
    try:
        target = GPUTarget("cuda", CAPABILITY, 32)
        binary: Any = triton.compile(source, target=target, options=call.options.__dict__)
    except Exception as error:
        return Build(call.name, "ours", text, 0, 0, 0, error=_first_line(error))
    return Build(call.name, "ours", text, *_usage(binary.asm["cubin"]), binary.metadata.shared)


def _usage(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) of the only kernel in machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [re.search(rf"{word}:(\d+)", text) for word in ("REG", "STACK")]
    if None in found:
        raise ValueError(f"cuobjdump does not tell the resources of a kernel: {text[:200]!r}")
    registers, stack = (int(match[1]) for match in found if match)
    return registers, stack


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
