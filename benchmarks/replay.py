"""One step of a tiny model under FSDP2 on gloo ranks, with every collective's bytes counted: are the formulas right?

Run by `python -m benchmarks.project --check`, and by a test.
"""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
import torch._dynamo  # what sharding loads late: once, before ranks are forked
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.multiprocessing.spawn import start_processes

from benchmarks.collectives import Moved, Shape, Volumes, fsdp_step, muon_step
from prx_kernels import Muon
from prx_model import PRXConfig, PRXTransformer

CONFIG = PRXConfig(
    patch_size=8, context_in_dim=18, hidden_size=36, num_heads=3, mlp_ratio=2.5, depth=3, axes_dim=(6, 6),
    bottleneck_size=18,
)  # fmt: skip
"""Sizes that no number of ranks divides evenly: short and empty shards take part."""


def check(ranks: int) -> list[tuple[str, int, float, float]]:
    """(collective, rank, bytes by formula, bytes counted) of one step on so many gloo ranks."""
    with tempfile.TemporaryDirectory() as folder:
        # Forked: one import of torch serves all ranks.
        start_processes(_worker, (ranks, folder), nprocs=ranks, start_method="fork")
        counted = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]
    rows = []
    for rank in range(ranks):
        for kind, formula in asdict(expected(ranks, rank)).items():
            rows.append((kind.replace("_", "-"), rank, formula, float(counted[rank].get(kind, 0))))
    return rows


def expected(ranks: int, rank: int) -> Volumes:
    """What the formulas say of this model's step."""
    with torch.device("meta"):
        model = PRXTransformer(CONFIG)
    blocks, root = groups(model)
    fsdp = fsdp_step(blocks, root, ranks)
    muon = muon_step([shape for shapes in blocks for shape in shapes if len(shape) == 2], ranks, rank)
    return Volumes(fsdp.all_gather, fsdp.reduce_scatter, muon.all_to_all)


def groups(model: nn.Module) -> tuple[list[list[Shape]], list[Shape]]:
    """Shapes of the parameters of every block, and of those outside of blocks: FSDP2's groups."""
    blocks = [[tuple(p.shape) for p in block.parameters()] for block in model.get_submodule("blocks").children()]
    root = [tuple(p.shape) for name, p in model.named_parameters() if not name.startswith("blocks.")]
    return blocks, root


def _worker(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    model = PRXTransformer(CONFIG)
    mesh = init_device_mesh("cpu", (ranks,))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    named = list(model.named_parameters())
    matrices = [p for name, p in named if name.startswith("blocks.") and p.ndim == 2]
    rest = [p for name, p in named if not (name.startswith("blocks.") and p.ndim == 2)]
    optimizer = Muon([{"params": matrices}, {"params": rest, "use_muon": False}])
    image, t = torch.randn(2, 3, 16, 16), torch.tensor([0.3, 0.8])
    text, mask = torch.randn(2, 4, CONFIG.context_in_dim), torch.ones(2, 4, dtype=torch.bool)
    with Moved(rank) as moved:
        model(image, t, text, mask).square().mean().backward()
        optimizer.step()
    Path(folder, f"{rank}.json").write_text(json.dumps(moved.nbytes))
    dist.barrier()
    dist.destroy_process_group()
