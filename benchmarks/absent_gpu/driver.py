"""What Triton and Inductor ask of the active driver while they compile: an H200's properties, without a driver."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from triton.backends.compiler import GPUTarget

CAPABILITY = 90


class _Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132, "max_num_regs": 65_536, "warpSize": 32}


class Driver:
    """What Triton and Inductor ask of the active driver while they compile."""

    utils = _Utils()

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    @staticmethod
    def is_active() -> bool:
        return True


@contextmanager
def pretended_driver() -> Iterator[None]:
    """Within this context Triton compiles for the absent GPU; it launches nothing there."""
    from torch._inductor.runtime import triton_helpers
    from triton.runtime import driver

    driver.set_active(Driver())  # for good: Triton's own driver cannot be made without a GPU
    with patch.object(triton_helpers, "set_driver_to_gpu", lambda: None):
        yield
