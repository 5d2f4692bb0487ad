"""A training step on any CUDA machine: no synchronisation, no leak, CUDA graphs, the same result as the CPU's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prx_kernels import enter_route, exit_route, sample_keep, x_prediction_loss
from prx_model import PRXConfig, PRXTransformer
from train.data.loader import Batch, batches
from train.loop import Trainer
from train.ranks import parallel
from train.recipes import LPIPS, PDINO, REPA, Compile, Output, Recipe, Routing, Train, shapes

pytestmark = pytest.mark.gpu

CONFIG = PRXConfig(
    context_in_dim=64, hidden_size=128, num_heads=2, depth=4, axes_dim=(32, 32), patch_size=16, bottleneck_size=32
)


def recipe(folder: Path, **train: object) -> Recipe:
    """The `shapes` preset with routing, short."""
    preset = shapes()
    return replace(
        preset,
        routing=Routing(enabled=True, start=1, end=2),
        train=replace(preset.train, device="cuda", **train),  # type: ignore[arg-type]
        compile=Compile(enabled="yes"),
        output=Output(folder=str(folder), name="gpu"),
    )


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[tuple[Trainer, Iterator[Batch]]]:
    settings = recipe(tmp_path, steps=200, warmup=0, cooldown=0)
    world = parallel.start(settings.train)
    made = Trainer(settings, world)
    yield made, batches(made.dataset, settings, world, 0)
    parallel.finish()


@pytest.fixture
def taught(tmp_path: Path) -> Iterator[tuple[Trainer, Iterator[Batch]]]:
    """With every teacher, and weights that mean nothing."""
    settings = recipe(tmp_path, steps=200, warmup=0, cooldown=0)
    settings = replace(
        settings,
        repa=REPA(enabled=True, teacher="vit_small_patch16_dinov3", weights="random", layer=1),
        lpips=LPIPS(enabled=True, weights="random"),
        pdino=PDINO(enabled=True, teacher="vit_small_patch14_reg4_dinov2", weights="random", size=28),
    )
    world = parallel.start(settings.train)
    made = Trainer(settings, world)
    yield made, batches(made.dataset, settings, world, 0)
    parallel.finish()


@pytest.mark.parametrize("which", ["trainer", "taught"])
def test_a_step_never_waits_for_the_device(which, request):
    made, source = request.getfixturevalue(which)
    for step in range(3):  # compilation, autotuning and the first allocations may wait
        made.learner.step(next(source), step)
    batch = next(source)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = made.learner.step(batch, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(result.parts["loss"])
    assert torch.isfinite(result.norm)


def test_fifty_steps_leak_no_memory(trainer):
    made, source = trainer
    held = []
    for step in range(56):
        made.learner.step(next(source), step)
        if step >= 5:
            torch.cuda.synchronize()
            held.append(torch.cuda.memory_allocated())
    # One batch may still be on its way; a leak of one activation a step would be megabytes.
    assert max(held[-5:]) - held[0] < 2**20, held


def test_routed_forward_and_backward_run_in_a_cuda_graph_with_changing_seeds():
    """`reduce-overhead` captures the step; each replay must draw other tokens."""
    model = PRXTransformer(CONFIG).cuda()
    generator = torch.Generator(device="cuda").manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    image, text = torch.randn(4, 3, 64, 64, device="cuda"), torch.randn(4, 8, 64, device="cuda")
    t, ids = torch.rand(4, device="cuda"), torch.arange(4, device="cuda")
    mask = torch.ones(4, 8, dtype=torch.bool, device="cuda")

    def loss(seed: Tensor) -> Tensor:
        keep = sample_keep(ids, 16, 0.5, seed=seed)
        tokens = model.forward_tokens(image, t, text, mask, keep=keep, route=(1, 2))
        return x_prediction_loss(tokens, image, t, 16)

    compiled = torch.compile(loss, fullgraph=True, mode="reduce-overhead")
    seen = []
    for step in range(6):
        torch.compiler.cudagraph_mark_step_begin()
        seed = torch.tensor(step, device="cuda")
        model.zero_grad()
        value = compiled(seed)
        value.backward()
        gradient = model.blocks[1].attention.img_qkv_proj.weight.grad.clone()
        model.zero_grad()
        expected = loss(seed)
        expected.backward()
        torch.testing.assert_close(value.detach(), expected.detach(), rtol=2e-4, atol=1e-5)
        truth = model.blocks[1].attention.img_qkv_proj.weight.grad
        assert (gradient - truth).norm() <= 1e-3 * truth.norm()
        seen.append(float(value))
    assert len(set(seen)) > 3, "replays drew the same tokens"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_step_is_near_the_fp32_step_on_the_cpu(dtype):
    model = PRXTransformer(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
    image, text = torch.randn(2, 3, 64, 96), torch.randn(2, 8, 64)
    t, mask = torch.tensor([0.3, 0.8]), torch.arange(8).expand(2, 8) < torch.tensor([[3], [8]])
    keep = sample_keep(torch.arange(2), 24, 0.5, seed=torch.tensor(1))
    truth = model.forward_tokens(image, t, text, mask, keep=keep, route=(1, 2))
    moved = [x.cuda() for x in (image, t, text, mask)]
    with torch.autocast("cuda", dtype):
        found = model.cuda().forward_tokens(*moved, keep=keep.cuda(), route=(1, 2))
    # Four blocks that round to 8 bits at every product.
    assert (found.float().cpu() - truth).norm() <= 3e-2 * truth.norm()


def test_the_same_tokens_are_kept_on_both_devices():
    ids, seed = torch.arange(1000), torch.tensor(12345)
    on_cpu = sample_keep(ids, 256, 0.5, seed=seed)
    assert torch.equal(sample_keep(ids.cuda(), 256, 0.5, seed=seed.cuda()).cpu(), on_cpu)


def test_routing_gradients_in_bfloat16_are_exact():
    """Rows are copied and cleared: in any dtype the result is the definition's."""
    x = torch.randn(4, 64, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    keep = sample_keep(torch.arange(4, device="cuda"), 64, 0.5, seed=torch.tensor(3, device="cuda"))
    y, byp = enter_route(x, keep)
    out = exit_route(y * 2, byp, keep)
    weight = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, x, weight)
    factor = torch.ones(4, 64, 1, device="cuda").scatter_(1, keep.long()[..., None], 2.0)
    assert torch.equal(gradient, (weight * factor).bfloat16())
    assert torch.equal(out, (x * factor).bfloat16())


def test_settings_are_those_of_a_gpu():
    assert Train().precision == "auto"
    assert parallel.compute_dtype(Train(), torch.device("cuda")) == torch.bfloat16
