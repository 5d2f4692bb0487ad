"""The examples' one-line routes on diffusers' transformers and on twins of public ones: positions, gradients, refusal.

Random weights; every token routed in random order gives what the dense model gives.
"""

from __future__ import annotations

import re

import pytest
import torch

from examples.route_models import DIFFUSERS, PUBLIC, route
from examples.small_models import build, run
from prx_kernels import route_blocks

from . import twins
from .models import permutations


@pytest.fixture(params=list(DIFFUSERS))
def case(request):
    torch.manual_seed(0)
    return request.param, *build(request.param)


def test_a_route_is_proven_and_half_the_tokens_make_a_difference(case):
    name, model, arguments = case
    model.eval()  # DiT drops labels at random in training mode
    with torch.no_grad():
        dense = run(model, arguments)
    made = route(name, model)
    tokens = int(re.search(r"with (\d+) tokens in random order", made.verify(lambda: run(model, arguments)))[1])
    with torch.no_grad():
        assert torch.equal(run(model, arguments), dense), "evaluation must be dense unless asked"
        made.in_eval = True
        made.fixed = permutations(1, tokens).expand(2, tokens) if made.shared else permutations(2, tokens)
        torch.testing.assert_close(run(model, arguments), dense, rtol=0, atol=1e-6 * float(dense.abs().max()) + 1e-6)
        made.fixed = None
        assert (run(model, arguments) - dense).abs().max() > 1e-3 * dense.abs().max()
    assert dense.abs().max() > 1e-2


def test_every_routed_block_has_gradients_with_diffusers_own_checkpointing(case):
    name, model, arguments = case
    made = route(name, model.train())
    if model._supports_gradient_checkpointing:  # HunyuanDiT has none
        model.enable_gradient_checkpointing()
    run(model, arguments).square().sum().backward()
    assert made.keep.shape[0] == 2
    for index, block in enumerate(made._blocks):
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in block.parameters()), index


@pytest.fixture(params=list(PUBLIC))
def twin(request):
    return request.param, *twins.build(request.param)


def test_the_route_of_a_public_model_is_proven_on_its_twin(twin):
    name, model, twin_run = twin
    model.eval()
    with torch.no_grad():
        dense = twin_run()
    made = route(name, model)
    said = made.verify(twin_run)
    # A reentrant checkpoint, LightningDiT's and U-ViT's, gives no gradients to torch.autograd.grad.
    assert ("reentrant checkpoints" if name in ("LightningDiT", "U-ViT") else " gradients with ") in said
    with torch.no_grad():
        assert torch.equal(twin_run(), dense), "evaluation must be dense unless asked"
        made.in_eval = True
        half = twin_run()
        assert made.keep.shape == (2, 8)
        made.fixed = permutations(1, 16).expand(2, 16) if made.shared else permutations(2, 16)
        torch.testing.assert_close(twin_run(), dense, rtol=0, atol=2e-6 * float(dense.abs().max()))
    assert half.shape == dense.shape
    assert (half - dense).abs().max() > 1e-3 * dense.abs().max()


def test_every_routed_block_of_a_twin_has_gradients_also_where_it_is_checkpointed(twin):
    name, model, twin_run = twin
    made = route(name, model.train())
    for _ in range(2):
        twin_run().square().sum().backward()
    assert made.keep.shape[0] == 2
    for index, block in enumerate(made._blocks):
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in block.parameters()), index


@pytest.mark.parametrize("name", [name for name in PUBLIC if name not in ("SiT", "REPA", "U-ViT")])
def test_what_was_forgotten_is_told_for_public_models(name):
    """The call without `per_token`: verify says what the table says, tried."""
    model, twin_run = twins.build(name)
    full = route(name, model)
    named = {
        t.argument.name: t.where for stop in [full._blocks[0]._routes[0]] for t in stop.places.tables if t.argument
    }
    for stop in (block._routes[0] for block in full._blocks):
        stop.places.tables = ()
    with pytest.raises(ValueError, match=r"Write \(tried\)") as caught:
        full.verify(twin_run)
    for argument, where in named.items():
        assert where is None or f'"{argument}": ' in str(caught.value), str(caught.value)


def test_sana_is_refused_because_its_blocks_convolve_the_grid():
    import diffusers

    model = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=4, sample_size=8,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=12,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"block 1 \(SanaTransformerBlock\) mixes neighbours .* in ff.conv_depth"):
        route_blocks(model.transformer_blocks, 1, 2, 0.5)
