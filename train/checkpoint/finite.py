"""Whether numbers are finite: asked of the host's copy that is written, and of the files that are read.

A diverged run must not push out the checkpoints from before, and nobody should draw with NaN.
"""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from train.errors import UserError


class NotFiniteError(Exception):
    """A tensor that was to be saved holds NaN or infinity; no other try would mend it."""


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor on the CPU holds neither NaN nor infinity; one pass, and no second tensor of its size."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.element_size() == 1:  # float8 has no such reduction
        tensor = tensor.float()
    low, high = torch.aminmax(tensor)
    return bool(low.isfinite() and high.isfinite())


def check_file(path: Path) -> None:
    """Refuse a safetensors file with a number that is not finite.

    Raises:
        UserError: naming the file and the tensor.
    """
    with safe_open(path, framework="pt") as shard:
        for name in shard.keys():  # noqa: SIM118 (not a dict)
            check(path, name, shard.get_tensor(name))


def check(path: Path, name: str, tensor: Tensor) -> None:
    """Refuse a tensor of a file that is not finite.

    Raises:
        UserError: naming both.
    """
    if not is_finite(tensor):
        raise UserError(f"checkpoint file {path} holds numbers that are not finite (in {name}): its run had diverged")
