"""Inductor for the absent GPU: its output code runs on fake tensors, its Triton kernels are noted and never launched.

All private names of torch's compiler that this hangs on stand here. Checked with torch 2.11 and 2.15.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.absent_gpu.driver import pretended_driver
from benchmarks.absent_gpu.recorder import Recorder, read_bytes, shape_text
from benchmarks.absent_gpu.sectors import kernel_bytes


@dataclass(frozen=True)
class Generated:
    """A Triton kernel that Inductor wrote."""

    name: str
    source: str
    graph: str
    nbytes: float


class Compiled:
    """What was compiled, and what about it the user of a fast step would want to know."""

    def __init__(self) -> None:
        self.kernels: dict[str, Generated] = {}
        self.graphs: dict[str, str] = {}
        """Graph id ("0/1") to the part of the step in which it was first met."""
        self.recompilations: Counter[str] = Counter()
        """Function and the guard that failed, as Dynamo says it."""
        self.wrong_layouts: list[str] = []
        """Tensors that came with other strides than the generated code reads."""
        self.host_kernels: Counter[str] = Counter()
        """C++ kernels that would run on the CPU, by graph."""

    @property
    def breaks(self) -> int:
        """Graph breaks that Dynamo counted in this process."""
        counters: Any = torch._dynamo.utils.counters
        return sum(counters["graph_break"].values())


@contextmanager
def installed(recorder: Recorder) -> Iterator[Compiled]:
    """Within this context, compiled code runs on fake tensors and tells the recorder what it launches."""
    import torch._functorch.config as functorch_config
    from torch._inductor import config
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codegen.simd import SIMDKernel
    from torch._inductor.output_code import CompiledFxGraph

    made = Compiled()
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(pretended_driver())
        enter(
            config.patch(
                # A kernel's bytes are written into its source only where it can be benchmarked alone.
                {"fx_graph_cache": False, "fx_graph_remote_cache": False, "compile_threads": 1,
                 "benchmark_kernel": True, "triton.unique_kernel_names": True,
                    # Whether padding a product pays is tried out on the device.
                    "shape_padding": False}
            )
        )  # fmt: skip
        enter(functorch_config.patch(enable_autograd_cache=False))
        enter(patch.object(AsyncCompile, "triton", _note_triton(made, recorder)))
        enter(patch.object(AsyncCompile, "cpp_pybinding", _note_host(made, recorder)))
        enter(patch.object(SIMDKernel, "estimate_kernel_num_bytes", kernel_bytes))
        enter(patch.object(CompiledFxGraph, "__init__", _labelled(CompiledFxGraph.__init__, made, recorder)))
        enter(patch.object(CompiledFxGraph, "__call__", _spanned(CompiledFxGraph.__call__, recorder)))
        for target, name, value in _without_addresses(made):
            enter(patch.object(target, name, value))
        enter(_recompilations(made))
        yield made


# --- labels: which graph, of which part of the step ------------------------------------------------------------------


def _label(made: Compiled, recorder: Recorder, backward: bool) -> tuple[str, str]:
    number = re.sub(r"[^0-9/]", "", str(torch._guards.CompileContext.current_compile_id()))
    part = made.graphs.setdefault(number, recorder.part)
    return part, f"{number} {'backward' if backward else 'forward'}"


def _labelled(init: Any, made: Compiled, recorder: Recorder) -> Any:
    def labelled(self: Any, *arguments: Any, **keywords: Any) -> None:
        init(self, *arguments, **keywords)
        self._absent_label = _label(made, recorder, bool(self.fx_kwargs.get("is_backward")))

    return labelled


def _spanned(call: Any, recorder: Recorder) -> Any:
    def spanned(self: Any, inputs: Any) -> Any:
        with recorder.graph(*self._absent_label):
            return call(self, inputs)

    return spanned


# --- kernels ---------------------------------------------------------------------------------------------------------


class _Noted:
    """In the place of a compiled Triton kernel."""

    def __init__(self, generated: Generated, recorder: Recorder) -> None:
        self.generated, self.recorder = generated, recorder

    def run(self, *arguments: Any, stream: Any = None, **_: Any) -> None:
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        nbytes = self.generated.nbytes or float(sum(read_bytes(x) for x in tensors))
        self.recorder.add("inductor", self.generated.name, shape_text(tensors), nbytes)


def _note_triton(made: Compiled, recorder: Recorder) -> Any:
    from torch._inductor.virtualized import V

    def triton(self: Any, kernel_name: str, source_code: str, device_str: str = "cuda") -> _Noted:
        _, graph = _label(made, recorder, bool(getattr(V.graph, "is_backward", False)))
        size = re.search(r"'kernel_num_gb': ([0-9.e+-]+)", source_code)
        generated = Generated(kernel_name, source_code, graph, float(size[1]) * 1e9 if size else 0.0)
        made.kernels[f"{graph} {kernel_name}"] = generated
        return _Noted(generated, recorder)

    return triton


def _note_host(made: Compiled, recorder: Recorder) -> Any:
    def cpp_pybinding(self: Any, *arguments: Any, **keywords: Any) -> Any:
        _, graph = _label(made, recorder, False)

        def kernel(*arguments: Any) -> None:
            made.host_kernels[graph] += 1
            recorder.add("host", "a C++ kernel on the CPU", "", 0.0)

        return kernel

    return cpp_pybinding


# --- fake tensors have no addresses ----------------------------------------------------------------------------------


def _without_addresses(made: Compiled) -> Iterator[tuple[Any, str, Any]]:
    """(module, name, what to put there): the C++ that output code calls on tensors, in Python."""
    from torch._inductor import compile_fx, output_code, utils

    guards = torch._C._dynamo.guards
    for device in ("cuda", "cpu", "cpu_pinned"):
        if hasattr(guards, f"_empty_strided_{device}"):
            yield guards, f"_empty_strided_{device}", _empty_strided(device.partition("_")[0])
    yield guards, "_reinterpret_tensor", _reinterpret
    yield guards, "assert_size_stride", _layout_check(made)
    if hasattr(guards, "assert_alignment"):
        yield guards, "assert_alignment", lambda *_: None
    for module in (utils, compile_fx, output_code):
        if hasattr(module, "copy_misaligned_inputs"):
            yield module, "copy_misaligned_inputs", lambda *_, **__: ([], [])
        if hasattr(module, "align_inputs_from_check_idxs"):
            yield module, "align_inputs_from_check_idxs", lambda model, *_, **__: model


def _empty_strided(device: str) -> Any:
    def empty(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device=device)

    return empty


def _reinterpret(x: Tensor, size: Any, stride: Any, offset: int = 0) -> Tensor:
    return torch.as_strided(x, size, stride, x.storage_offset() + offset)


def _layout_check(made: Compiled) -> Any:
    def check(x: Tensor, size: Any, stride: Any, *_: Any) -> None:
        if tuple(x.shape) != tuple(size) or tuple(x.stride()) != tuple(stride):
            made.wrong_layouts.append(f"{tuple(x.shape)} {tuple(x.stride())} for {tuple(size)} {tuple(stride)}")

    return check


# --- recompilations --------------------------------------------------------------------------------------------------


@contextmanager
def _recompilations(made: Compiled) -> Iterator[None]:
    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if text.startswith("Recompiling function"):
                function = re.search(r"Recompiling function (\S+)", text)
                reasons = re.findall(r"- \d+/\d+: (.*)", text)
                made.recompilations[f"{function[1] if function else '?'}: {'; '.join(reasons)}"] += 1

    from torch._logging._internal import set_logs

    listener = Listener()
    set_logs(recompiles=True)
    heard = logging.getLogger("torch._dynamo.guards.__recompiles")
    heard.addHandler(listener)
    # Heard here, and not said on the console too.
    console = [(handler, handler.level) for handler in logging.getLogger("torch").handlers]
    for handler, _ in console:
        handler.setLevel(logging.WARNING)
    try:
        yield
    finally:
        heard.removeHandler(listener)
        for handler, level in console:
            handler.setLevel(level)
        set_logs()
