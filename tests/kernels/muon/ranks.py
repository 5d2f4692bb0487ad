"""Checks of Muon on 1, 2 and 4 gloo ranks, forked from one process; run by test_distributed.py.

python -m tests.kernels.muon.ranks FOLDER

A rank writes FOLDER/CHECK-RANKS-RANK: "ok", or what went wrong. One and four ranks load what two have saved.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # what sharding loads late: once, before the fork
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from prx_kernels import Muon
from prx_kernels.muon import optimizer as muon

H = 16  # 1792 / 112
# Rows that no number of ranks divides, fewer rows than ranks, one row; then PRX's seven matrices.
SHAPES = (
    (66, 32), (3, 40), (1, 8),
    (3 * H, H), (2 * H, H), (H, H), (6 * H, H), (7 * H // 2, H), (7 * H // 2, H), (H, 7 * H // 2),
)  # fmt: skip
STEPS = 5
# Of what is orthogonalised and of the update every entry is rounded to bf16: by up to 2^-9, 0.6·2^-9 in the mean square
# each. Newton-Schulz enlarges the error of small singular values: 2^-7 of the change of the weights leaves room for it.
WIRE_BOUND = 2.0**-7
TIMEOUT = timedelta(seconds=60)


class Weights(nn.Module):
    """Matrices and a bias, without a forward."""

    def __init__(self, shapes: tuple[tuple[int, int], ...] = SHAPES) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.matrices = nn.ParameterList(nn.Parameter(0.1 * torch.randn(shape)) for shape in shapes)
        self.bias = nn.Parameter(torch.randn(5))

    def groups(self) -> list[dict[str, Any]]:
        named = list(self.named_parameters())
        return [
            {"params": [(name, p) for name, p in named if p.ndim == 2]},
            {"params": [(name, p) for name, p in named if p.ndim == 1], "use_muon": False, "weight_decay": 0.0},
        ]

    def fill_gradients(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for p in self.parameters():
            grad = torch.randn(p.shape, generator=generator)
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad


def trained(model: Weights, first: int = 0, last: int = STEPS, **settings: Any) -> Muon:
    optimizer = Muon(model.groups(), lr=1e-2, **settings)
    for step in range(first, last):
        model.fill_gradients(step)
        optimizer.step()
    return optimizer


def sharded(mesh: DeviceMesh, shapes: tuple[tuple[int, int], ...] = SHAPES) -> Weights:
    model = Weights(shapes)
    fully_shard(model, mesh=mesh)
    return model


def one_dimension(ranks: int) -> DeviceMesh:
    return init_device_mesh("cpu", (ranks,), mesh_dim_names=("shard",))


def two_dimensions() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x.detach()


def assert_same_weights(model: nn.Module, plain: nn.Module) -> None:
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(whole(p), q.detach(), rtol=0, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def assert_same_on_all(x: Tensor, group: Any = None) -> None:
    every = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, x.contiguous(), group=group)
    assert all(torch.equal(every[0], other) for other in every[1:])


def assert_follows_one_process(mesh: DeviceMesh) -> None:
    """Weights after five steps are those of one process, to 1e-6 with a float32 wire."""
    plain, start = Weights(), Weights()
    trained(plain)
    for wire in (torch.float32, torch.bfloat16):
        model = sharded(mesh)
        optimizer = trained(model, wire_dtype=wire)
        assert len(optimizer._plans) == 1
        if wire == torch.float32 or mesh.size() == 1:  # one rank sends nothing
            assert_same_weights(model, plain)
        for p, q, p0 in zip(model.parameters(), plain.parameters(), start.parameters(), strict=True):
            error = torch.linalg.vector_norm(whole(p) - q) / torch.linalg.vector_norm(q - p0)
            assert error <= WIRE_BOUND, f"{tuple(p.shape)}: {error}"
            assert set(optimizer.state[p]) == (
                {"momentum_buffer"} if p.ndim == 2 else {"step", "exp_avg", "exp_avg_sq"}
            )
            if mesh.ndim == 2:
                assert_same_on_all(p.to_local(), mesh.get_group("replicate"))


# --- checks ----------------------------------------------------------------------------------------------------------


def fsdp(ranks: int, folder: Path) -> None:
    assert_follows_one_process(one_dimension(ranks))


def hsdp(ranks: int, folder: Path) -> None:
    assert_follows_one_process(two_dimensions())


def replicas_of_a_sharded_mesh(ranks: int, folder: Path) -> None:
    """Parameters sharded over a part of distributed_mesh are replicas over the rest of it."""
    mesh = two_dimensions()
    plain, model = Weights(), sharded(mesh["shard"])
    trained(plain)
    optimizer = trained(model, distributed_mesh=mesh, wire_dtype=torch.float32)
    assert [plan.exchange.layout.ranks for plan in optimizer._plans] == [4]
    assert_same_weights(model, plain)
    again = trained(sharded(mesh["shard"]), distributed_mesh=mesh["shard"])
    assert [plan.exchange.layout.ranks for plan in again._plans] == [2]


def replicas(ranks: int, folder: Path) -> None:
    """Plain parameters over a mesh, as under DDP; default wire: all ranks have the bits of one update."""
    plain, model, rounded = Weights(), Weights(), Weights()
    mesh = one_dimension(ranks)
    trained(plain)
    trained(model, distributed_mesh=mesh, wire_dtype=torch.float32)
    trained(rounded, distributed_mesh=mesh)
    assert_same_weights(model, plain)
    for p in (*model.parameters(), *rounded.parameters()):
        assert_same_on_all(p.detach())


def gradients_of_a_backward(ranks: int, folder: Path) -> None:
    """What FSDP2 itself leaves as gradients, of matrices that its ranks do not divide."""
    models = []
    for mesh in (None, one_dimension(ranks)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 7), nn.Tanh(), nn.Linear(7, 1), nn.Linear(1, 3))
        for layer in (*model, model) if mesh is not None else ():
            fully_shard(layer, mesh=mesh)
        groups = [
            {"params": [p for p in model.parameters() if (p.ndim == 2) == muon], "use_muon": muon}
            for muon in (True, False)
        ]
        optimizer = Muon(groups, lr=0.05, wire_dtype=torch.float32)
        for step in range(STEPS):
            model(torch.randn(8, 10, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    assert_same_weights(models[1], models[0])


def fewer_matrices_than_ranks(ranks: int, folder: Path) -> None:
    """Three of four ranks own nothing, and two hold no row."""
    shapes = ((2, 8),)
    plain, model = Weights(shapes), sharded(one_dimension(ranks), shapes)
    trained(plain)
    trained(model, wire_dtype=torch.float32)
    assert_same_weights(model, plain)


def parts_of_a_parameter(ranks: int, folder: Path) -> None:
    """Query, key and value of uneven sizes, cut by shards elsewhere than between them."""
    settings = {"split_sizes": {"matrices.3": (5, 30, 13)}}
    plain, model = Weights(), sharded(one_dimension(ranks))
    trained(plain, **settings)
    trained(model, wire_dtype=torch.float32, **settings)
    assert_same_weights(model, plain)


def gradients_that_lie_otherwise(ranks: int, folder: Path) -> None:
    """Whole gradients, and sums still to be made, of sharded parameters; ranks without a row take part."""
    shapes = ((66, 32), (0, 4), (1, 8), (3, 40))
    mesh = one_dimension(ranks)
    for placement in (Replicate(), Partial()):
        plain, model = Weights(shapes), sharded(mesh, shapes)
        optimizers = [Muon(x.groups(), lr=1e-2, wire_dtype=torch.float32) for x in (plain, model)]
        for step in range(2):
            for x in (plain, model):
                x.fill_gradients(step)
            for p in model.parameters():
                whole_gradient = p.grad.full_tensor()
                part = whole_gradient if placement.is_replicate() else whole_gradient * ((dist.get_rank() + 1) / 10)
                assert placement.is_replicate() or ranks == 4, "1 + 2 + 3 + 4 tenths are the whole"
                p.grad = DTensor.from_local(part, mesh, [placement])
            for optimizer in optimizers:
                optimizer.step()
        assert_same_weights(model, plain)
        assert_same_on_all(whole(model.bias))


def a_parameter_without_gradient(ranks: int, folder: Path) -> None:
    model = sharded(one_dimension(ranks))
    optimizer = Muon(model.groups(), lr=1e-2)
    model.fill_gradients(0)
    frozen = model.matrices[3]
    frozen.grad = None
    before = whole(frozen).clone()
    optimizer.step()
    assert torch.equal(whole(frozen), before)
    assert not whole(optimizer.state[frozen]["momentum_buffer"]).any()
    assert not torch.equal(whole(model.matrices[4]), whole(Weights().matrices[4]))


def a_gradient_that_is_not_finite(ranks: int, folder: Path) -> None:
    """A NaN on the last rank stops its matrix on all ranks and nothing else; all ranks count it."""
    model, plain = sharded(one_dimension(ranks)), Weights()
    optimizer, expected = Muon(model.groups(), wire_dtype=torch.float32), Muon(plain.groups())
    for step in range(2):
        model.fill_gradients(step)
        plain.fill_gradients(step)
        if step == 0:
            local = model.matrices[3].grad.to_local()
            if dist.get_rank() == ranks - 1:
                local[-1, 3] = torch.nan
            before = whole(model.matrices[3]).clone()
            plain.matrices[3].grad[-1, 3] = torch.nan
        optimizer.step()
        expected.step()
        if step == 0:
            assert torch.equal(whole(model.matrices[3]), before)
    assert optimizer.nonfinite == 1
    assert not torch.equal(whole(model.matrices[3]), before)
    assert_same_weights(model, plain)
    model.fill_gradients(0)
    if dist.get_rank() == 0:
        model.bias.grad.to_local().fill_(torch.inf)
    bias = whole(model.bias).clone()
    optimizer.step()
    assert optimizer.nonfinite == 2
    assert torch.equal(whole(model.bias), bias)
    assert optimizer.state[model.bias]["step"] == 2


def a_mesh_that_does_not_contain_the_parameters(ranks: int, folder: Path) -> None:
    model = sharded(one_dimension(ranks))
    other = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    half = other["tensor"]
    for mesh in (other, half):
        with pytest.raises(ValueError, match="does not contain the mesh of 'matrices.0'"):
            Muon(model.groups(), distributed_mesh=mesh)
    columns = distribute_tensor(torch.ones(4, 4), one_dimension(ranks), [Shard(1)])
    with pytest.raises(ValueError, match=r"needs rows sharded .* but 'w' has placements \(Shard\(dim=1\),\)"):
        Muon([("w", nn.Parameter(columns))])


def save_checkpoint(ranks: int, folder: Path) -> None:
    model = sharded(one_dimension(ranks))
    optimizer = trained(model, last=3, wire_dtype=torch.float32)
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder / "named")
    dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=folder / "plain")


def load_checkpoint(ranks: int, folder: Path) -> None:
    """Three steps on two ranks, two on others: the weights of five on one process."""
    plain = Weights()
    trained(plain)
    for kind in ("named", "plain"):
        model = sharded(one_dimension(ranks))
        optimizer = trained(model, last=1, wire_dtype=torch.float32)
        get = optimizer.state_dict if kind == "plain" else lambda: get_optimizer_state_dict(model, optimizer)  # noqa: B023
        state = {"model": model.state_dict(), "optimizer": get()}
        dcp.load(state, checkpoint_id=folder / kind)
        model.load_state_dict(state["model"])
        if kind == "plain":
            optimizer.load_state_dict(state["optimizer"])
        else:
            set_optimizer_state_dict(model, optimizer, state["optimizer"])
        for step in range(3, STEPS):
            model.fill_gradients(step)
            optimizer.step()
        assert_same_weights(model, plain)


def load_without_ranks(ranks: int, folder: Path) -> None:
    """The same into a model that is not sharded at all."""
    plain, model = Weights(), Weights()
    trained(plain)
    optimizer = Muon(model.groups(), lr=1e-2)
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder / "named")
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    for step in range(3, STEPS):
        model.fill_gradients(step)
        optimizer.step()
    assert_same_weights(model, plain)


def nobody_waits(ranks: int, folder: Path) -> None:
    """16 matrices of 0.1 s on 4 ranks: at most a quarter above 0.4 s, in the best of up to 20 steps on busy cores."""

    def sleeping(matrices: list[Tensor], **_: Any) -> list[Tensor]:
        time.sleep(0.1 * len(matrices))
        return list(matrices)

    model = nn.ParameterList(nn.Parameter(torch.randn(64, 32)) for _ in range(16))
    fully_shard(model, mesh=one_dimension(ranks))
    optimizer, times, real = Muon(model.parameters()), [], muon.newton_schulz
    muon.newton_schulz = sleeping
    bound = 1.25 * 16 * 0.1 / ranks
    for _ in range(20):
        for p in model:
            p.grad = torch.randn_like(p)
        dist.barrier()
        start = time.perf_counter()
        optimizer.step()
        dist.barrier()
        slowest = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)  # all ranks go on, or none
        times.append(float(slowest))
        if times[-1] <= bound:
            break
    muon.newton_schulz = real
    assert min(times) <= bound, times


# What runs on how many ranks, in this order: four ranks load what two saved.
SCHEDULE: dict[int, tuple[Callable[[int, Path], None], ...]] = {
    2: (fsdp, replicas, save_checkpoint),
    4: (
        fsdp,
        hsdp,
        replicas,
        replicas_of_a_sharded_mesh,
        gradients_of_a_backward,
        fewer_matrices_than_ranks,
        parts_of_a_parameter,
        gradients_that_lie_otherwise,
        a_parameter_without_gradient,
        a_gradient_that_is_not_finite,
        a_mesh_that_does_not_contain_the_parameters,
        load_checkpoint,
        nobody_waits,
    ),
    1: (fsdp, load_checkpoint, load_without_ranks),
}


def run_rank(rank: int, ranks: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / f"store-{ranks}"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=TIMEOUT)
    for check in SCHEDULE[ranks]:
        said, start = "ok", time.perf_counter()
        try:
            check(ranks, folder)
        except BaseException:
            said = traceback.format_exc()
        (folder / f"{check.__name__}-{ranks}-{rank}").write_text(said)
        if said != "ok":
            os._exit(1)
        if rank == 0:
            print(f"{check.__name__} on {ranks}: {time.perf_counter() - start:.1f} s", flush=True)
        dist.barrier()
    dist.destroy_process_group()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for ranks in SCHEDULE:
        children = []
        for rank in range(ranks):
            child = os.fork()  # one import of torch for all of them
            if child == 0:
                run_rank(rank, ranks, folder)
                os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
