"""The examples' one-line routes on diffusers' transformers (random weights): positions, gradients, refusal."""

from __future__ import annotations

import re

import pytest
import torch

from examples.route_models import DIFFUSERS, build, route, run
from prx_kernels import route_blocks

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
    blocks = getattr(model, DIFFUSERS[name][0])
    assert made.keep.shape[0] == 2
    for index in range(made.start, made.end + 1):
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in blocks[index].parameters()), index


def test_sana_is_refused_because_its_blocks_convolve_the_grid():
    import diffusers

    model = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=4, sample_size=8,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=12,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"block 1 \(SanaTransformerBlock\) mixes neighbours .* in ff.conv_depth"):
        route_blocks(model.transformer_blocks, 1, 2, 0.5)
