"""Every launch of a step with its bytes and operations, what the host waits for, and what memory is alive.

A dispatch mode above the fake tensors: eager ops, products, attention, collectives and our ops pass through it.
Inductor's kernels are noted by `inductor`, those of `prx_kernels` by running their launchers (`launchers`).
"""

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.absent_gpu import libraries, ours
from benchmarks.absent_gpu.launchers import Call, is_ours, launched
from benchmarks.absent_gpu.memory import Memory

ROOT = str(Path(__file__).resolve().parents[2])
_DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.uint8: "u8", torch.int64: "i64"}


@dataclass(frozen=True)
class Launch:
    """One launch: of a kernel, or of a library's op that is taken for one."""

    part: str
    """Of the step: "denoiser", "lpips", "optimizer", …; "backward" for what no compiled graph does there."""
    graph: str
    """The compiled graph that it stands in, as "0/1 forward"; "" for eager code."""
    kind: str
    """product, convolution, attention, inductor, ours, eager, collective or host."""
    name: str
    shapes: str
    nbytes: float
    """Least bytes of device memory: each input read once, each output written once."""
    flop: float = 0.0
    share: float | None = None
    """Of the matrix rate, where it is counted and not assumed for all of its kind."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


# Ops that launch nothing.
_FREE = {
    "aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::new_empty_strided",
    "aten::detach", "aten::lift_fresh", "aten::alias", "aten::_unsafe_view", "aten::is_pinned", "aten::set_",
    "aten::resize_", "aten::record_stream", "aten::_local_scalar_dense", "prim::device",
    "fsdp::set_", "fsdp::record_grad_output_stream", "c10d::barrier",
}  # fmt: skip
_WRITE_ONLY = {"aten::zero_", "aten::fill_", "aten::_foreach_zero_"}
_COPIES = {"aten::copy_", "aten::_to_copy", "aten::_foreach_copy_"}


def read_bytes(x: Tensor) -> int:
    """Bytes that reading a tensor once moves: an expanded dimension counts once."""
    count = x.element_size()
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride != 0 else 1
    return count


def shape_text(tensors: list[Tensor], most: int = 4) -> str:
    """Shapes and dtypes of the first tensors, as "32x256x1792 bf16, …"."""
    texts = ["x".join(map(str, x.shape)) + " " + _DTYPES.get(x.dtype, str(x.dtype)[6:]) for x in tensors[:most]]
    return ", ".join(texts) + (", …" if len(tensors) > most else "")


class Recorder(TorchDispatchMode):
    """Notes what is launched while it is active; enter it inside of a FakeTensorMode."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.calls: dict[Any, Call] = {}
        """Each of our kernels that was launched, by what makes it another build."""
        self.waits: Counter[str] = Counter()
        """Where the host waited for the device, and how often."""
        self.memory = Memory()
        self._parts, self._graphs = ["set-up"], [""]
        self._waited = libraries.waits()

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # Dynamo refuses to compile below other modes

    @property
    def part(self) -> str:
        return self._parts[-1]

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """A part of the step, in the place of `train.run.stopwatch.Stopwatch.span`."""
        self._parts.append(name)
        try:
            yield
        finally:
            self._parts.pop()

    @contextmanager
    def graph(self, part: str, name: str) -> Iterator[None]:
        """A compiled graph that runs; its launches belong to the part of the step in which it was first met."""
        self._graphs.append(name)
        with self.span(part):
            try:
                yield
            finally:
                self._graphs.pop()

    def clear(self) -> None:
        """Forget the launches and waits so far; what is alive stays alive."""
        self.launches.clear()
        self.waits.clear()
        self.memory.restart()
        self._waited = libraries.waits()

    def add(
        self, kind: str, name: str, shapes: str, nbytes: float, flop: float = 0.0, share: float | None = None
    ) -> None:
        """Note a launch."""
        self.launches.append(Launch(self.part, self._graphs[-1], kind, name, shapes, nbytes, flop, share))

    def count_library_waits(self) -> None:
        """Note the waits that torch's C++ asked libcudart for since the last op."""
        more = libraries.waits() - self._waited
        self._waited += more
        if more and torch._guards.TracingContext.try_get() is None:  # Inductor tries out patterns on real tensors
            self.waits[f"{self.part}: a synchronisation at or before {_place()}"] += more

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.count_library_waits()
        if any(issubclass(kind, torch.distributed.tensor.DTensor) for kind in types):
            return NotImplemented  # come back with the local tensors
        if torch._guards.TracingContext.try_get() is not None:  # compiling
            return func(*args, **kwargs)
        name = func._schema.name
        if name == "aten::_local_scalar_dense" and args[0].device.type == "cuda":
            return self._asked_for(args[0])
        if is_ours(name):
            return self._run_ours(func, args, kwargs)
        out = func(*args, **kwargs)
        self._note(func, args, kwargs, out)
        return out

    # --- kinds of ops ------------------------------------------------------------------------------------------------

    def _asked_for(self, x: Tensor) -> Any:
        """A value on the device is asked for: the host would wait. Nothing is known of it; one is as good as any."""
        self._wait("a value of the device is read")
        return True if x.dtype == torch.bool else (1.0 if x.is_floating_point() else 1)

    def _wait(self, what: str) -> None:
        self.waits[f"{self.part}: {what} at {_place()}"] += 1

    def _run_ours(self, func: Any, args: Any, kwargs: Any) -> Any:
        with self:  # what a launcher does beside its launches is seen too: copies, allocations, plain definitions
            out, calls = launched(func._schema.name, args, kwargs)
        ins, outs = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), out))
        given = tuple(args) + tuple(kwargs.values())
        share = ours.share(func, given, calls)
        cost = ours.cost(func, given, out, calls, _moved(func, args, kwargs, ins, outs))
        for call in calls:  # the least traffic is the op's; its kernels share it
            self.calls.setdefault(call.build_key, call)
            name = f"{_short(func).partition('::')[2]}: {call.name}"
            self.add("ours", name, shape_text(ins), cost.nbytes / len(calls), cost.flop / len(calls), share)
        return out

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        outs = self._track(out)
        ins = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        name = func._schema.name
        devices = {x.device.type for x in ins + outs}
        if name in _FREE or "cuda" not in devices:
            return
        passed_on = outs and all(any(o is i for i in ins) for o in outs)
        # Collectives of c10d give back what they write into, and do not say that they write.
        if not func._schema.is_mutable and (func.is_view or passed_on) and "c10d" not in name:
            return
        if name in _COPIES and "cpu" in devices:
            self._host_copy(func, args, kwargs, ins, outs)
            return
        packet, flop = func._overloadpacket, 0.0
        if packet in flop_registry:
            given = {key: value for key, value in kwargs.items() if key != "out"}
            flop = float(flop_registry[packet](*args, **given, out_val=out))
        shapes = shape_text([x for x in ins if x.device.type == "cuda"] or outs)
        self.add(_kind(name, flop), _short(func), shapes, _moved(func, args, kwargs, ins, outs), flop)

    def _host_copy(self, func: Any, args: Any, kwargs: Any, ins: list[Tensor], outs: list[Tensor]) -> None:
        blocking = not (kwargs.get("non_blocking") or (func._schema.name == "aten::copy_" and args[2:3] == (True,)))
        size = max((x.numel() * x.element_size() for x in outs or ins), default=0)
        self.add("host", f"{_short(func)} between host and device", shape_text(outs or ins), float(size))
        # A Python number made a tensor is one blocking copy; so is `.cpu()` and `.to("cuda")`.
        if blocking and size:
            self._wait("a blocking copy between host and device")

    def _track(self, out: Any) -> list[Tensor]:
        outs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        for x in outs:
            self.memory.track(x, self.part, len(self.launches))
        return outs


def _kind(name: str, flop: float) -> str:
    namespace, _, op = name.partition("::")
    if "c10d" in namespace:
        return "collective"
    if "attention" in op:
        return "attention"
    if "conv" in op:
        return "convolution"
    return "product" if flop else "eager"


def _short(func: Any) -> str:
    overload = func._overloadname
    return func._schema.name.removeprefix("aten::") + (f".{overload}" if overload not in ("", "default") else "")


def _moved(func: Any, args: Any, kwargs: Any, ins: list[Tensor], outs: list[Tensor]) -> float:
    """Least bytes of an op: inputs but write-only ones read, outputs and what is changed in place written."""
    name, schema = func._schema.name, func._schema
    given = dict(zip([a.name for a in schema.arguments], args, strict=False)) | kwargs
    written = {
        id(x): x
        for a in schema.arguments
        if a.alias_info is not None and a.alias_info.is_write
        for x in tree_leaves(given.get(a.name))
        if isinstance(x, Tensor)
    }
    unread = {id(x) for a in schema.arguments if a.is_out for x in tree_leaves(given.get(a.name))}
    if name in _WRITE_ONLY or name in _COPIES or name.startswith(("fsdp::", "c10d::")):
        unread |= set(written)
    device = {id(x): x for x in ins if x.device.type == "cuda"}
    read = sum(read_bytes(x) for key, x in device.items() if key not in unread)
    new = {id(x): x for x in outs if x.device.type == "cuda"} | written
    return float(read + sum(read_bytes(x) for x in new.values()))


def _place() -> str:
    """The innermost line of the project's own code."""
    for frame in reversed(traceback.extract_stack()):
        inside = frame.filename.startswith(ROOT) and "/.venv/" not in frame.filename
        if inside and "absent_gpu" not in frame.filename:
            return f"{frame.filename.removeprefix(ROOT + '/')}:{frame.lineno}"
    return "torch"
