"""How many processes train one model: ranks and their mesh, blocks that are compiled and sharded, the same weights.

Several ranks: `fully_shard` over a mesh (FSDP2 on one dimension, HSDP on two, DDP where nothing is split). Each block
is, in this order: checkpointed, compiled, sharded; then the root. One process has nothing to split: its weights are
plain, with a working copy beside them where products are formed in half precision. Model code knows nothing of it.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint

from prx_model.teachers import REPA, Teacher
from prx_model.transformer import PRXTransformer
from train.errors import UserError
from train.ranks.graphs import Graphs
from train.ranks.rendezvous import fresh_store
from train.ranks.working_copy import WorkingCopy, copies_of
from train.recipes import Parallel, Train


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None
    """What weights are sharded over: ("shard",), or ("replicate", "shard"). None in one process: weights are plain."""

    @property
    def is_main(self) -> bool:
        """Rank 0 writes files and the console."""
        return self.rank == 0


# --- the process group -----------------------------------------------------------------------------------------------


def start(train: Train, settings: Parallel | None = None) -> World:
    """Join the process group that torchrun describes, or stand alone without one.

    Raises:
        UserError: a GPU was asked for and there is none, or a mesh that does not fit the ranks.
    """
    settings = settings or Parallel()
    rank, size, local, per_node = (int(os.environ.get(name, default)) for name, default in _TORCHRUN)
    if train.device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device is 'cuda' but no CUDA device is visible; use 'auto' or 'cpu'")
    if train.device != "cpu" and torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise UserError(
                f"rank {local} of this node has no GPU of its own ({torch.cuda.device_count()} visible); "
                f"start torchrun with --nproc-per-node {torch.cuda.device_count()}"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    replicate, shard = mesh_shape(settings, size, per_node)
    if train.deterministic:
        _repeat_exactly()
    if size == 1:
        return World(rank, size, device)
    if not dist.is_initialized():
        # gloo beside nccl: small host-side agreements (stop, finish) must not wait on the GPU.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        timeout = patience(settings)
        dist.init_process_group(backend, timeout=timeout, store=fresh_store(timeout), rank=rank, world_size=size)
    if replicate == 1:
        mesh = init_device_mesh(device.type, (shard,), mesh_dim_names=("shard",))
    else:
        mesh = init_device_mesh(device.type, (replicate, shard), mesh_dim_names=("replicate", "shard"))
    return World(rank, size, device, mesh)


def _repeat_exactly() -> None:
    """Kernels that add in a fixed order only, or an error that names the operation without one."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA is first used
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


_TORCHRUN = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))


def mesh_shape(settings: Parallel, size: int, per_node: int) -> tuple[int, int]:
    """(replicas, shards of each) for `size` ranks: weights are split inside a node and repeated across, unless set.

    Raises:
        UserError: numbers that do not multiply to the ranks.
    """
    replicate, shard = settings.replicate, settings.shard
    if replicate < 0 or shard < 0:
        raise UserError(f"parallel.replicate and parallel.shard must not be negative, got {replicate} and {shard}")
    if not shard:
        shard = size // replicate if replicate else (per_node if size % per_node == 0 else size)
    replicate = replicate or max(size // shard, 1)
    if replicate * shard != size:
        raise UserError(
            f"parallel.replicate {replicate} x parallel.shard {shard} must be the number of ranks, which is {size}; "
            f"leave one of them out and it is worked out"
        )
    return replicate, shard


def patience(settings: Parallel) -> timedelta:
    """How long a collective waits for the others: never less than ranks may differ in starting up.

    `faults.Watchdog` is stricter, from the first step on.
    """
    return timedelta(seconds=max(settings.timeout, 120.0))


def finish() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def compute_dtype(settings: Train, device: torch.device) -> torch.dtype:
    """What products are formed in, over float32 weights: what `train.precision` says for this device."""
    use_bf16 = settings.precision == "bf16" or (settings.precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if use_bf16 else torch.float32


# --- from modules to what is trained ---------------------------------------------------------------------------------


def shard(module: nn.Module, world: World, settings: Parallel, train: Train, graphs: Graphs | None = None) -> None:
    """Checkpoint, compile and shard a denoiser block by block, or shard any other trained module as one, in place.

    One process keeps a working copy instead of shards, where it does not train in float32 alone.

    On the meta device: weights are filled afterwards (`fill`). Names of parameters do not change. Blocks are compiled
    into `graphs`, where there are any.
    """
    if isinstance(module, PRXTransformer):
        for block in module.blocks:
            _wrap_forward(block, settings.checkpointing, graphs)
    dtype = compute_dtype(train, world.device)
    if world.mesh is None:
        if dtype != torch.float32:
            WorkingCopy(module, dtype, ["forward_tokens"] if isinstance(module, PRXTransformer) else [])
        return
    # Here, and not at the top: the import takes seconds, which a run in one process need not wait for.
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    policy = MixedPrecisionPolicy(
        param_dtype=dtype if dtype != torch.float32 else None,
        reduce_dtype=torch.float32,
        # t and the rotary tables stay in float32: cast, t·1000 would be off by up to 2.
        cast_forward_inputs=False,
    )
    for part in [*module.blocks, module] if isinstance(module, PRXTransformer) else [module]:
        fully_shard(part, mesh=world.mesh, mp_policy=policy, reshard_after_forward=settings.reshard_after_forward)
    if isinstance(module, PRXTransformer):
        register_fsdp_forward_method(module, "forward_tokens")


def shard_projectors(teachers: Iterable[Teacher], world: World, settings: Parallel, train: Train) -> None:
    """Shard what is trained of teachers, over the same mesh as the denoiser but outside of it."""
    for teacher in teachers:
        if isinstance(teacher, REPA):
            shard(teacher.projector, world, settings, train)


def _wrap_forward(block: nn.Module, checkpointed: bool, graphs: Graphs | None) -> None:
    """Replace a block's forward; FSDP's hooks run around it, outside the graph."""
    forward: Callable[..., Any] = block.forward
    if checkpointed:
        plain = forward

        def forward(*arguments: Any) -> Any:
            return checkpoint(plain, *arguments, use_reentrant=False)

    if graphs is not None:
        forward = graphs.compile(forward)
    if checkpointed or graphs is not None:
        block.forward = forward


@torch.no_grad()
def fill(module: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Write whole weights, one after the other, into parameters that may be sharded: each rank keeps its part.

    Args:
        weights: (name, value) on every rank alike, e.g. `PRXTransformer.initial_weights`.
    """
    for name, value in weights:
        parameter = module.get_parameter(name)
        parameter.copy_(_part_of(parameter, value) if hasattr(parameter, "placements") else value)


def _part_of(parameter: Any, value: Tensor) -> Tensor:
    """This rank's part of a whole tensor, as a DTensor like the parameter; nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def reshard(modules: Iterable[nn.Module]) -> None:
    """Drop gathered weights and put back copies that a forward without backward left: they would hide a change."""
    modules = list(modules)
    for part in _sharded(modules):
        part.reshard()
    for copy in copies_of(modules):
        copy.put_back()


def reduce_gradients(modules: Iterable[nn.Module], *, now: bool) -> None:
    """Whether the next backward reduces gradients over the ranks, or leaves them to be added up."""
    for part in _sharded(modules):
        part.set_requires_gradient_sync(now, recurse=False)
        part.set_is_last_backward(now)


def _sharded(modules: Iterable[nn.Module]) -> list[Any]:
    """All modules below (and with) these that `fully_shard` has made its own."""
    found = [part for module in modules for part in module.modules()]
    return [part for part in found if hasattr(part, "set_requires_gradient_sync")]


# --- agreements ------------------------------------------------------------------------------------------------------


def agree(votes: Sequence[int], world: World, op: Any = dist.ReduceOp.MAX) -> list[int]:
    """The largest (or sum, …) of each number over all ranks; on the host, without touching the GPU."""
    if world.size == 1:
        return list(votes)
    numbers = torch.tensor(list(votes), dtype=torch.int64)
    dist.all_reduce(numbers, op=op)
    return [int(number) for number in numbers]


def average(values: Tensor, world: World) -> Tensor:
    """Mean of a tensor over the ranks, in place."""
    if world.size > 1:
        dist.all_reduce(values.div_(world.size))
    return values


def gather(part: Tensor, world: World) -> Tensor | None:
    """Parts of all ranks, of one shape, behind one another on rank 0's host; None on the others."""
    if world.size == 1:
        return part.cpu()
    part = part.cpu().contiguous()
    parts = [torch.empty_like(part) for _ in range(world.size)] if world.is_main else None
    dist.gather(part, parts, dst=0)
    return torch.cat(parts) if parts is not None else None


def from_main(value: Any, world: World) -> Any:
    """What rank 0 has, on every rank."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
