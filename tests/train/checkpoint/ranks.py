"""Ranks on gloo that save and load tiny tensors in all layouts; run by test_ranks.py.

python -m tests.train.checkpoint.ranks <folder> save:2:shard load:4:hsdp …  forks ranks for each step, one after the
other, and prints as JSON how many ranks of each step failed.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch._dynamo  # DTensors import it: once here, and not in every rank
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from train.checkpoint import checkpointer as checkpoint
from train.checkpoint.checkpointer import Checkpointer, Tensors

SHAPES = {"even": (4, 6), "uneven": (3, 5), "mostly_empty": (1, 7), "no_rows": (0, 3), "vector": (5,)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool)


def truth() -> Tensors:
    """Whole tensors, the same in every process; bit patterns that a conversion would change are among them."""
    source = torch.Generator().manual_seed(0)
    model: dict[str, Tensor] = {}
    for name, shape in SHAPES.items():
        for dtype in DTYPES:
            values = torch.randn(shape, generator=source) * 100
            model[f"{name}.{dtype}".replace("torch.", "")] = values.to(dtype) if dtype != torch.bool else values > 0
    model["odd_floats"] = torch.tensor([-0.0, 1e-45, torch.finfo(torch.float32).max])
    model["scalar"], model["count"] = torch.tensor(2.5), torch.tensor(7, dtype=torch.int64)
    optimizer = {"even/momentum_buffer": torch.randn(4, 6, generator=source), "even/step": torch.tensor(3.0)}
    return {"model": model, "optimizer": optimizer}


def laid_out(kind: str, whole: Tensors) -> Tensors:
    """Tensors as plain ones, as shards of a 1-D mesh, or as replicated shards of a 2-D one (HSDP)."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    mesh: DeviceMesh | None = None
    if kind == "shard":
        mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("shard",))
    elif kind == "hsdp":
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("replicate", "shard"))

    def lay(tensor: Tensor) -> Tensor:
        if mesh is None:
            return tensor.clone()
        last = Shard(0) if tensor.ndim else Replicate()
        return distribute_tensor(tensor.clone(), mesh, [*[Replicate()] * (mesh.ndim - 1), last])

    return {section: {name: lay(t) for name, t in content.items()} for section, content in whole.items()}


def zeroed(whole: Tensors) -> Tensors:
    return {section: {name: torch.zeros_like(t) for name, t in content.items()} for section, content in whole.items()}


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy())


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, each rank its shard."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in (a, b)]
    return local[0].shape == local[1].shape and local[0].dtype == local[1].dtype and bits(local[0]) == bits(local[1])


def save(folder: Path, kind: str) -> None:
    """Save, change the tensors at once, and let it finish."""
    tensors = laid_out(kind, truth())
    checkpointer = Checkpointer(folder, keep=2, timeout=timedelta(seconds=60))
    checkpointer.save(5, tensors, {"position": 40})
    for content in tensors.values():
        for tensor in content.values():
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).zero_()
    checkpointer.finish()
    checkpointer.close()


def load(folder: Path, kind: str) -> None:
    """Load in place and compare with the truth."""
    checkpointer = Checkpointer(folder, keep=2, timeout=timedelta(seconds=60))
    found = checkpoint.find_newest(folder, checkpointer.group)
    assert found is not None
    assert (found.step, found.state["position"]) == (5, 40)
    wanted, tensors = laid_out(kind, truth()), laid_out(kind, zeroed(truth()))
    checkpoint.load_into(found, tensors, checkpointer.group)
    for section, content in wanted.items():
        wrong = [name for name, tensor in content.items() if not same(tensor, tensors[section][name])]
        assert not wrong, f"rank {dist.get_rank() if dist.is_initialized() else 0}: {section}: {wrong}"
    checkpointer.close()


def start(ranks: int, folder: Path, action: Callable[[], None], *, alone: bool = False) -> list[int]:
    """Fork ranks that meet on gloo (or one that stays alone) and run an action on each; gives their exit codes."""
    meeting = folder / "meeting"
    meeting.unlink(missing_ok=True)
    limit = timedelta(seconds=60)
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                if not alone:
                    where = f"file://{meeting}"
                    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=ranks, timeout=limit)
                action()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    (folder / "config.json").write_text("{}")
    failed = {}
    for step in sys.argv[2:]:
        name, ranks, kind = step.split(":")
        action = partial({"save": save, "load": load}[name], folder, kind)
        codes = start(int(ranks), folder, action, alone=(ranks, kind) == ("1", "plain"))
        failed[step] = sum(code != 0 for code in codes)
    print(json.dumps(failed))


if __name__ == "__main__":
    main()
