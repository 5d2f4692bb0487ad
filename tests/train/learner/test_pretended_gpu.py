"""A step and a drawing on a GPU that is only pretended: shapes, dtypes and devices as there, and no numbers.

torch's fake tensors refuse two devices in one operation, and refuse to say a value: what would wait for the GPU fails.
Backward needs a real one; its place is taken by empty gradients.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily

from prx_model.config import PRXConfig
from tests.train.host_waits import Crossings
from train.data.loader import Batch
from train.evaluation import evaluate
from train.learner import step as training_step
from train.learner.build import Modules, build
from train.learner.step import Learner
from train.learner.teaching import build_teachers
from train.ranks import graphs
from train.ranks.parallel import World
from train.recipes import LPIPS, PDINO, REPA, Compile, Recipe, Routing, shapes
from train.run.stopwatch import Stopwatch

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
TEACHERS = {
    "repa": REPA(enabled=True, weights="random", teacher="vit_small_patch16_dinov3", layer=1),
    "lpips": LPIPS(enabled=True, weights="random", network="squeeze"),
    "pdino": PDINO(enabled=True, weights="random", teacher="vit_tiny_patch16_224"),
}


def on_gpu(module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Put empty tensors of the pretended GPU in place of all that a module holds; `dtype` for what is floating."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
                    empty = torch.empty(tensor.shape, dtype=wanted, device=GPU)
                    trained = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(empty, tensor.requires_grad) if trained else empty  # type: ignore[assignment]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def learner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Learner]:
    """Everything on, on the pretended GPU; weights in the dtype in which FSDP2 gives them to the forward."""

    def pretended_build(recipe: Recipe, device: torch.device, prepare: object) -> Modules:
        with unset_fake_temporarily():
            modules = build(recipe, CPU)
        for module in modules.trained().values():
            on_gpu(module, request.param)
        return modules

    def pretended_teachers(recipe: Recipe, device: torch.device) -> dict[str, nn.Module]:
        with unset_fake_temporarily(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            teachers = build_teachers(recipe, CPU)
        for teacher in teachers.values():
            teacher.dtype = torch.bfloat16
            on_gpu(teacher.network, torch.bfloat16)
            on_gpu(teacher, request.param)
        return teachers

    monkeypatch.setattr(training_step, "build", pretended_build)
    monkeypatch.setattr(training_step, "build_teachers", pretended_teachers)
    preset = shapes()
    config = PRXConfig(context_in_dim=32, hidden_size=64, num_heads=2, depth=4, axes_dim=(16, 16), bottleneck_size=16)
    recipe = replace(
        preset,
        model=config,
        data=replace(preset.data, height=224, width=224),
        routing=Routing(enabled=True, start=1, end=2),
        compile=Compile("no"),
        **TEACHERS,  # type: ignore[arg-type]
    )
    with FakeTensorMode():
        made = Learner(recipe, World(0, 1, GPU))
        made.stopwatch = Stopwatch(CPU)
        # Dropped captions are drawn on the host, whose numbers are pretended here too.
        monkeypatch.setattr(made, "_captions", lambda batch, number: batch.captions)
        yield made


def a_batch(learner: Learner) -> Batch:
    data = learner.recipe.data
    image = torch.empty(2, 3, data.height, data.width, dtype=torch.uint8, device=GPU)
    return Batch(image, ["a red circle", ""], torch.arange(2, device=GPU), torch.arange(2))


def test_a_step_stays_on_the_gpu_and_reads_nothing_back(learner: Learner) -> None:
    loss, parts, losses, bins = learner._loss(a_batch(learner), 3)
    assert set(parts) == {"loss/flow", "loss/repa", "loss/lpips", "loss/pdino"}
    assert {tensor.device for tensor in (loss, losses, bins, *parts.values())} == {GPU}
    assert loss.dtype == torch.float32
    for _, parameter in learner.parameters:
        parameter.grad = torch.empty_like(parameter)
    assert learner.update(0).device == GPU
    state = learner.optimizers.state_dict()
    assert {tensor.device for tensor in (*state.values(), *learner.ema.averages, learner.skipped)} == {GPU}


def test_a_step_waits_for_no_copy_and_computes_nothing_on_the_host(learner: Learner) -> None:
    """Once the tables of a size are made: the first step of each size makes them."""
    learner._loss(a_batch(learner), 0)
    with Crossings() as crossings:
        learner._loss(a_batch(learner), 1)
        for _, parameter in learner.parameters:
            parameter.grad = torch.empty_like(parameter)
        learner.update(0)
    assert crossings.waits == []
    assert {each.dtype for each in crossings.seen} <= {torch.int64, torch.bool}, "seeds, bytes and their mask"
    assert crossings.seen, "captions do cross"


def test_what_teachers_made_in_every_step_is_seen(learner: Learner) -> None:
    """As it was: timm's table of coordinates, built on the CPU, and a normalisation made from Python's numbers."""
    teachers = learner.teaching.teachers
    repa, pdino = teachers["repa"], teachers["pdino"]
    learner._loss(a_batch(learner), 0)
    kept = dict(repa.network.rope._tables)
    repa.network.rope._tables.clear()
    pdino.normalise.forward = lambda image: image - image.new_tensor((0.5, 0.5, 0.5))[:, None, None]
    with Crossings() as crossings:
        learner._loss(a_batch(learner), 1)
    assert crossings.waits == ["blocking aten::_to_copy of torch.float32"] * 3
    assert repa.network.rope._tables.keys() == kept.keys()


def test_no_node_of_a_compiled_step_is_on_the_host(learner: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor makes code for the CPU of such nodes, and a copy that the host waits for; of timm's table there are."""
    nodes: list[tuple[str, str]] = []

    def looked_at(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        for node in module.graph.nodes:
            made = node.meta.get("example_value")
            if isinstance(made, Tensor) and node.op != "output":
                nodes.append((made.device.type, str(node.target)))
        return module.forward

    monkeypatch.setattr(graphs, "BACKEND", looked_at)
    torch._dynamo.reset()
    recipe, teachers = replace(learner.recipe, compile=Compile("yes")), learner.teaching.teachers
    blocks = graphs.block_graphs(recipe, GPU)
    assert blocks is not None
    for block in learner.modules.model.blocks:
        block.forward = blocks.compile(block.forward)
    graphs.compile_teachers(teachers, recipe, GPU)
    learner._loss(a_batch(learner), 0)
    assert len(nodes) > 200
    assert [target for device, target in nodes if device == "cpu"] == []
    network = teachers["repa"].network
    network.rope = network.rope.embedding
    learner._loss(a_batch(learner), 0)
    torch._dynamo.reset()
    assert [target for device, target in nodes if device == "cpu"]


def test_drawing_waits_for_the_gpu_only_for_the_finished_pictures(learner: Learner) -> None:
    with learner.averaged():
        drawn = evaluate.draw(learner.modules, ["a red circle", ""], learner.recipe, learner.world)
    assert (drawn.shape, drawn.dtype, drawn.device) == ((2, 3, 224, 224), torch.uint8, CPU)


def test_what_waits_or_mixes_devices_fails(learner: Learner) -> None:
    batch = a_batch(learner)
    with pytest.raises(ValueError, match="device of sample_ids, cpu"):
        learner._loss(replace(batch, positions=batch.host_positions), 3)
    learner.skipped = torch.zeros(2, dtype=torch.int64)
    for _, parameter in learner.parameters:
        parameter.grad = torch.empty_like(parameter)
    with pytest.raises(RuntimeError, match="two (different )?devices"):
        learner.update(0)
    with pytest.raises(DataDependentOutputException):
        float(learner._loss(batch, 3)[0].detach())
