"""One step of a tiny model on gloo ranks, sharded by the trainer, every collective's bytes counted: do formulas hold?

Run by `python -m benchmarks.project --check`, and by a test.
"""

import json
import os
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch._dynamo  # what sharding loads late: once, before ranks are forked
import torch.distributed as dist
import torch.distributed.fsdp  # noqa: F401  (the same)
from torch.multiprocessing.spawn import start_processes

from benchmarks.collectives import Moved
from prx_kernels import Muon
from prx_kernels.muon.owners import Layout
from prx_model import PRXConfig, PRXTransformer
from train.learner.optimizers import named_parameters, split
from train.ranks import parallel
from train.recipes import Compile, Parallel, Recipe, prx_512
from train.run.collectives import Volumes, agreements, fsdp_step, groups, muon_step

CONFIG = PRXConfig(
    patch_size=8, context_in_dim=18, hidden_size=36, num_heads=3, mlp_ratio=2.5, depth=3, axes_dim=(6, 6),
    bottleneck_size=18,
)  # fmt: skip
"""Sizes that no number of ranks divides evenly: short and empty shards take part."""


@dataclass(frozen=True)
class Case:
    """Ranks on nodes, laid out as the preset would on that many."""

    nodes: int
    gpus: int
    """Ranks a node."""
    reshard: bool = Parallel().reshard_after_forward

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus

    def layout(self, rank: int = 0) -> Layout:
        replicas, shards = parallel.mesh_shape(self.recipe().parallel, self.ranks, self.gpus)
        return Layout(shards=shards, shard=rank % shards, replicas=replicas, replica=rank // shards)

    def recipe(self) -> Recipe:
        """The preset, bf16 as on a GPU, with a tiny model."""
        preset = prx_512()
        return replace(
            preset,
            model=CONFIG,
            train=replace(preset.train, device="cpu", precision="bf16"),
            parallel=replace(preset.parallel, reshard_after_forward=self.reshard),
            compile=Compile("no"),
        )

    def __str__(self) -> str:
        layout = self.layout()
        return f"{layout.replicas} x {layout.shards} ranks{', resharded' if self.reshard else ''}"


CASES = tuple(Case(nodes, gpus, reshard) for nodes, gpus in ((1, 2), (1, 4), (2, 2)) for reshard in (False, True))
CASES += (Case(2, 1),)
"""FSDP on one node, HSDP on two, and two nodes of one GPU: DDP."""


def check(case: Case) -> list[tuple[str, int, float, float]]:
    """(collective, rank, bytes by formula, bytes counted) of one step on a case's gloo ranks; nothing that is 0 = 0."""
    counted = moved(case)
    return [
        (kind.replace("_", "-"), rank, formula, counted[rank].get(kind, 0.0))
        for rank in range(case.ranks)
        for kind, formula in asdict(expected(case, rank)).items()
        if formula or counted[rank].get(kind)
    ]


def expected(case: Case, rank: int) -> Volumes:
    """What the formulas say of this model's step."""
    with torch.device("meta"):
        model = PRXTransformer(CONFIG)
    blocks, root = groups(model)
    matrices = [(shape[0], shape[1]) for shapes in blocks for shape in shapes if len(shape) == 2]
    layout = case.layout(rank)
    fsdp = fsdp_step([*blocks, root], layout, reshard=case.reshard)
    return fsdp + muon_step(matrices, layout) + agreements(layout)


def moved(case: Case) -> list[dict[str, float]]:
    """Bytes counted on every rank, by kind."""
    with tempfile.TemporaryDirectory() as folder:
        # Forked: one import of torch serves all ranks.
        start_processes(_worker, (case, folder), nprocs=case.ranks, start_method="fork")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(case.ranks)]


def _worker(rank: int, case: Case, folder: str) -> None:
    torch.set_num_threads(1)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    numbers = (rank, case.ranks, rank % case.gpus, case.gpus)
    os.environ.update({name: str(number) for name, number in zip(names, numbers, strict=True)})
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=case.ranks)
    recipe = case.recipe()
    world = parallel.start(recipe.train, recipe.parallel)
    assert world.mesh is not None
    torch.manual_seed(0)
    model = PRXTransformer(CONFIG)
    parallel.shard(model, world, recipe.parallel, recipe.train)
    named = named_parameters({"model": model})
    muon, adam = split(named, recipe)
    # Not the trainer's `Optimizers`, which on a CPU orthogonalises in another dtype: costs and owners would differ.
    optimizer = Muon([{"params": muon}, {"params": adam, "use_muon": False}])
    image, t = torch.randn(2, 3, 16, 16), torch.tensor([0.3, 0.8])
    text, mask = torch.randn(2, 4, CONFIG.context_in_dim), torch.ones(2, 4, dtype=torch.bool)
    replicated = "replicate" in (world.mesh.mesh_dim_names or ())
    with Moved(world.mesh.get_group("replicate") if replicated else None) as counted:
        model.forward_tokens(image, t, text, mask).square().mean().backward()  # what a training step calls
        optimizer.step(max_norm=recipe.train.clip)
    Path(folder, f"{rank}.json").write_text(json.dumps(counted.nbytes))
    dist.barrier()
    dist.destroy_process_group()
