"""A CUDA device that is only pretended: launchers run on it up to the launch, which a list gets instead of a driver.

    with PretendedGPU(90) as gpu:
        prx_kernels.gather_tokens(torch.empty(2, 8, 64, device="cuda"), keep)
    print([launch.name for launch in gpu.launches])

Inside, tensors are torch's fake ones, and every op of ours runs its CUDA function in place of its fake; what both give
must agree. Triton's binder, its options and its cache are the real ones: only the compiler's call is replaced.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .recorder import MAX_SHARED, Launch

# Multiprocessors of A100, L40S, H200, B200, B300 and RTX PRO 6000, from NVIDIA's data sheets.
MULTIPROCESSORS = {80: 108, 89: 142, 90: 132, 100: 148, 103: 148, 120: 188}
NAMESPACE = "prx"  # of our ops
_ALLOCATION = 512  # bytes to which torch's caching allocator rounds; a base is a multiple of it
_numbers = itertools.count(1 << 20)  # Triton caches by device number: no two pretended devices share one


class FakeDisagrees(AssertionError):
    """An op's fake describes another result than its launcher makes."""


class PretendedGPU:
    """One architecture, major·10 + minor; a context manager.

    Attributes:
        launches: what was launched, in order.
        ops: qualified names of the ops whose CUDA function ran.
    """

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.launches: list[Launch] = []
        self.ops: set[str] = set()
        self.device = torch.device("cuda", 0)  # the current one
        self.mode = FakeTensorMode()
        self._number = next(_numbers)
        # By storage, each with what keeps it: one that is freed would leave its number to another.
        self._addresses: dict[int, tuple[int, object]] = {}
        self._next = _ALLOCATION
        self._stack = ExitStack()

    def __enter__(self) -> PretendedGPU:
        replace = patch.object
        properties = SimpleNamespace(
            multi_processor_count=MULTIPROCESSORS[self.arch],
            major=self.arch // 10,
            minor=self.arch % 10,
            shared_memory_per_block_optin=MAX_SHARED[self.arch],
        )
        gpu = self

        def compile_(kernel: Any, key: Any, signature: Any, _: Any, constants: Any, options: Any, *rest: Any) -> Any:
            made = _Compiled(gpu, kernel, signature, constants, options, rest[0])
            kernel.device_caches[gpu._number][0][key] = made
            return made

        for target in (
            replace(torch.cuda, "get_device_capability", lambda device=None: divmod(self.arch, 10)),
            replace(torch.cuda, "get_device_properties", lambda device=None: properties),
            replace(torch.cuda, "device", lambda device: _Current(gpu, torch.device(device))),
            replace(FakeTensor, "data_ptr", lambda tensor: self._address(tensor), create=True),
            replace(driver, "_active", _Driver(self.arch, self._number)),
            replace(JITFunction, "_do_compile", compile_),
        ):
            self._stack.enter_context(target)
        for name, op in list(OPDEFS.items()):
            if name.startswith(f"{NAMESPACE}::") and "cuda" in op._backend_fns:
                self._stack.enter_context(replace(op, "_abstract_fn", self._launched(name, op)))
        self._stack.enter_context(self.mode)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _launched(self, name: str, op: Any) -> Callable[..., Any]:
        """In the place of an op's fake: its CUDA function, held to that fake."""
        fake, launcher = op._abstract_fn, op._init_fn

        def run(*arguments: Any, **named: Any) -> Any:
            self.ops.add(name)
            made = launcher(*arguments, **named)
            _compare(name, made, fake(*arguments, **named), (arguments, named))
            return made

        return run

    def _address(self, tensor: Tensor) -> int:
        """Where a tensor would lie: storages one behind the other, at addresses that the allocator gives."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._addresses:
            self._addresses[storage._cdata] = self._next, storage
            self._next += (storage.nbytes() // _ALLOCATION + 1) * _ALLOCATION
        return self._addresses[storage._cdata][0] + tensor.storage_offset() * tensor.element_size()


class _Driver:
    """What Triton asks of a driver while it binds arguments."""

    def __init__(self, arch: int, number: int) -> None:
        self._target, self._number = GPUTarget("cuda", arch, 32), number

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._number

    def get_current_stream(self, device: int) -> int:
        return 0


class _Current:
    """`torch.cuda.device`: makes a device current for a while."""

    def __init__(self, gpu: PretendedGPU, device: torch.device) -> None:
        self._gpu, self._device = gpu, device

    def __enter__(self) -> None:
        self._before, self._gpu.device = self._gpu.device, self._device

    def __exit__(self, *error: object) -> None:
        self._gpu.device = self._before


class _Compiled:
    """In the place of a compiled kernel: `run` is called where the driver would launch."""

    function = packed_metadata = None

    def __init__(
        self, gpu: PretendedGPU, kernel: Any, signature: Any, constants: Any, options: Any, attributes: Any
    ) -> None:
        self._gpu, self._kernel = gpu, kernel
        self._facts = signature, constants, attributes, options

    def launch_metadata(self, grid: tuple[int, ...], *_: Any) -> None:
        self._grid = grid  # as the launcher gave it, before absent sizes became 1

    def run(self, *call: Any) -> None:
        values = dict(zip(self._kernel.arg_names, call[-len(self._kernel.arg_names) :], strict=True))
        launch = Launch(self._kernel, self._gpu.arch, tuple(self._grid), values, *self._facts, self._gpu.device)
        launch.check()
        self._gpu.launches.append(launch)


def _compare(name: str, made: Any, expected: Any, inputs: Any) -> None:
    """Shape, strides, dtype and device of what a launcher allocated against its op's fake; nothing shares memory."""
    ours, fakes = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in (made, expected))
    if len(ours) != len(fakes):
        raise FakeDisagrees(f"{name}: the launcher gives {len(ours)} tensors, the fake {len(fakes)}")
    seen = {x.untyped_storage()._cdata for x in tree_leaves(inputs) if isinstance(x, Tensor)}
    for number, (one, other) in enumerate(zip(ours, fakes, strict=True)):
        facts = [(tuple(x.shape), x.dtype, x.device, _strides(x)) for x in (one, other)]
        if facts[0] != facts[1]:
            raise FakeDisagrees(f"{name}: result {number} is {facts[0]}, its fake says {facts[1]}")
        if one.numel() and one.untyped_storage()._cdata in seen:
            raise FakeDisagrees(f"{name}: result {number} shares memory with an input or another result")
        seen.add(one.untyped_storage()._cdata)


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides that say anything: those of dimensions of more than one entry, in a tensor that has any."""
    return tuple(stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1) if x.numel() else ()
