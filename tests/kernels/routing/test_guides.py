"""docs/dropin.md: its lines are run, with small models for those of the scripts, and one step is trained with them."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from examples.small_models import build, run

from ..conftest import ROOT
from . import twins

PAGE = (ROOT / "docs" / "dropin.md").read_text()


def snippets(title: str) -> list[str]:
    """The code of a section. A CPU stands for the GPU."""
    section = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)[1]
    return [code.replace('"cuda"', '"cpu"') for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL)]


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trained(model, optimizer, loss) -> int:
    """How many parameters one step changes."""
    before = [p.detach().clone() for p in model.parameters()]
    loss.backward()
    optimizer.step()
    return sum(bool((p != q).any()) for p, q in zip(model.parameters(), before, strict=True))


def test_every_section_of_the_page_is_run_here():
    titles = re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
    assert titles == ["DiT: train.py", "SiT: train.py", "diffusers", "SimpleTuner", "torchtitan: Flux"]
    assert sum(len(snippets(title)) for title in titles) == PAGE.count("```python")


def test_dit_and_sit_are_routed_proven_and_trained_by_muon(group, capsys):
    model, model_run = twins.build("SiT")
    names = {"model": model, "latent_size": 8, "torch": torch, "dist": dist, "train_steps": 8, "total_steps": 10}
    for code in snippets("DiT: train.py"):
        exec(code, names)
    assert "Blocks 1 to 3 give the dense model's outputs and" in capsys.readouterr().out
    model_run().square().mean().backward()
    assert names["route"].keep.shape == (2, 8)
    assert [g["use_muon"] for g in names["opt"].param_groups] == [True, False]
    (code,) = snippets("SiT: train.py")
    before = [p.detach().clone() for p in model.blocks.parameters()]
    exec(code, names)
    assert names["route"].enabled
    assert float(names["opt"].grad_norm) > 0
    assert all((p != q).any() for p, q in zip(model.blocks.parameters(), before, strict=True))
    exec(code, {**names, "train_steps": 9})
    assert not names["route"].enabled


def test_diffusers_transformers_are_routed_and_its_unet_is_trained_by_muon(group):
    import diffusers

    model, arguments = build("Flux")
    names = {"transformer": model, "torch": torch, "args": SimpleNamespace(learning_rate=1e-3)}
    names["accelerator"] = SimpleNamespace(num_processes=1)
    *first, last = snippets("diffusers")
    for code in first:
        exec(code, names)
    assert "outputs and" in names["route"].verify(lambda: run(model, arguments))
    changed = trained(model, names["optimizer"], run(model, arguments).square().mean())
    assert names["route"].keep.shape == (2, 8)
    assert changed > 0.9 * len(list(model.parameters()))
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=12, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    exec(last, {**names, "unet": unet, "optimizer": None}, names)
    out = unet(torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.randn(2, 5, 12)).sample
    assert trained(unet, names["optimizer"], out.square().mean()) > 0.9 * len(list(unet.parameters()))


def test_simpletuner_windows_become_routes_by_importance():
    model, arguments = build("Flux")
    windows = [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -2}]
    tuner = SimpleNamespace(unwrap_model=lambda model: model, model=model)
    tuner.config = SimpleNamespace(tread_config={"routes": windows})
    routing, optimizing = snippets("SimpleTuner")
    exec(routing, {"self": tuner})
    (route,) = {stop.route for block in model.transformer_blocks[1:3] for stop in block._routes}
    assert "outputs and" in route.verify(lambda: run(model, arguments))
    out = run(model, arguments)
    again = route.keep.clone()
    run(model, arguments)
    assert torch.equal(route.keep, again), "the largest tokens, not a draw"
    trainer = SimpleNamespace(config=SimpleNamespace(learning_rate=1e-3))
    trainer.model = SimpleNamespace(get_trained_component=lambda unwrap_model: model)
    exec(optimizing, {"self": trainer})
    assert trained(model, trainer.optimizer, out.square().mean()) > 0.9 * len(list(model.parameters()))


def test_torchtitans_flux_is_one_route_over_both_kinds_of_blocks():
    model, model_run = twins.build("Flux by torchtitan")
    routing, optimizing = snippets("torchtitan: Flux")
    exec(routing, {"model": model})
    route = model.double_blocks[1]._routes[0].route
    assert "outputs and" in route.verify(model_run)
    trainer = SimpleNamespace(optimizers=SimpleNamespace(optimizers=None), model_parts=[model])
    exec(optimizing, {"self": trainer})
    changed = trained(model, trainer.optimizers.optimizers[0], model_run().square().mean())
    assert route.keep.shape == (2, 8)
    assert changed > 0.9 * len(list(model.parameters()))
