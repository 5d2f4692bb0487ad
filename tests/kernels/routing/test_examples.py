"""The examples' one-line routes on diffusers' transformers (random weights): positions, gradients, refusal."""

from __future__ import annotations

import pytest
import torch

from examples.route_diffusers import ROUTES, build, run
from prx_kernels import route_blocks

from .models import permutations


@pytest.fixture(params=list(ROUTES))
def case(request):
    torch.manual_seed(0)
    model, arguments = build(request.param)
    # DiT and PixArt start gates and output at zero: a route would be invisible.
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return ROUTES[request.param], model, arguments


def test_all_tokens_in_random_order_equal_the_dense_output(case):
    route_model, model, arguments = case
    model.eval()  # DiT drops labels at random in training mode
    with torch.no_grad():
        dense = run(model, arguments)
        route = route_model(model)
        assert torch.equal(run(model, arguments), dense), "evaluation must be dense unless asked"
        route.in_eval = True
        route.fixed = permutations(1, 16).expand(2, 16) if route.shared else permutations(2, 16)
        routed = run(model, arguments)
        torch.testing.assert_close(routed, dense, rtol=0, atol=1e-5)
        route.fixed = None
        assert (run(model, arguments) - dense).abs().max() > 1e-3, "half the tokens must make a difference"
    assert dense.abs().max() > 1e-2


def test_every_routed_block_has_gradients_with_diffusers_own_checkpointing(case):
    route_model, model, arguments = case
    route = route_model(model.train())
    model.enable_gradient_checkpointing()
    run(model, arguments).square().sum().backward()
    blocks = model.blocks if hasattr(model, "blocks") else model.transformer_blocks
    assert route.keep.shape == (2, 8)
    for index in range(route.start, route.end + 1):
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in blocks[index].parameters()), index


def test_sana_is_refused_because_its_blocks_convolve_the_grid():
    import diffusers

    model = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=4, sample_size=8,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=12,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"block 1 \(SanaTransformerBlock\) mixes neighbours .* in ff.conv_depth"):
        route_blocks(model.transformer_blocks, 1, 2, 0.5)
