"""Where a process runs and how it meets the others: device, ranks, precision, averaged gradients.

One process or many (torchrun), the same code: every rank holds all weights, gradients are averaged after backward.
"""

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from prx_model.teachers import Teacher
from train.errors import UserError
from train.recipes import Compile, Train


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Rank 0 writes files and the console."""
        return self.rank == 0


def start(settings: Train) -> World:
    """Join the process group that torchrun describes, or stand alone without one.

    Raises:
        UserError: a GPU was asked for and there is none.
    """
    rank, size, local = (int(os.environ.get(name, default)) for name, default in _TORCHRUN)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device is 'cuda' but no CUDA device is visible; use 'auto' or 'cpu'")
    if settings.device != "cpu" and torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise UserError(
                f"rank {local} of this node has no GPU of its own ({torch.cuda.device_count()} visible); "
                f"start torchrun with --nproc-per-node {torch.cuda.device_count()}"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if size > 1 and not dist.is_initialized():
        # gloo beside nccl: small host-side agreements (stop, finish) must not wait on the GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return World(rank, size, device)


_TORCHRUN = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


def finish() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def replica_mesh(world: World) -> DeviceMesh | None:
    """The ranks that hold the same weights: all of them; nothing for one alone."""
    return init_device_mesh(world.device.type, (world.size,)) if world.size > 1 else None


def precision(settings: Train, device: torch.device) -> AbstractContextManager[object]:
    """bf16 autocast over fp32 weights, or nothing: what `train.precision` says for this device."""
    use_bf16 = settings.precision == "bf16" or (settings.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16) if use_bf16 else nullcontext()


def compile_blocks(modules: Iterable[nn.Module], settings: Compile, device: torch.device) -> None:
    """Compile each block in place, without a graph break, where the setting says so."""
    if settings.enabled == "yes" or (settings.enabled == "auto" and device.type == "cuda"):
        for block in modules:
            block.compile(fullgraph=True)


def compile_teachers(teachers: Iterable[Teacher], settings: Compile, device: torch.device) -> None:
    """Compile the frozen networks in place, where blocks are compiled."""
    if settings.enabled == "yes" or (settings.enabled == "auto" and device.type == "cuda"):
        for teacher in teachers:
            teacher.compile_network()


def average_gradients(parameters: Iterable[Tensor], world: World) -> None:
    """Replace each gradient by its mean over the ranks, in one flat float32 buffer."""
    if world.size == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients]).div_(world.size)
    dist.all_reduce(flat)
    parts = flat.split([g.numel() for g in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])


def any_rank(flag: bool, world: World) -> bool:
    """Whether the flag is set on any rank; agreed on the host, without touching the GPU."""
    if world.size == 1:
        return flag
    votes = torch.tensor(int(flag))
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes)
