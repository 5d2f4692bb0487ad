"""The FLOP formulas against torch's FlopCounterMode, and against the published work of a PRX step."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prx_kernels import newton_schulz_flop, sample_keep
from prx_model.config import PRXConfig, Routing, prx_1_2b
from prx_model.flops import forward_flop, training_flop
from prx_model.transformer import PRXTransformer

SMALL = PRXConfig(
    patch_size=8, context_in_dim=48, hidden_size=64, num_heads=2, depth=4, axes_dim=(16, 16), bottleneck_size=24
)


@pytest.mark.parametrize("routing", [None, Routing(start=1, end=2, selection_ratio=0.5)])
@pytest.mark.parametrize("bottleneck", [24, None])
def test_formula_equals_the_counter(routing: Routing | None, bottleneck: int | None) -> None:
    config = PRXConfig(**{**vars(SMALL), "bottleneck_size": bottleneck})
    model = PRXTransformer(config)
    batch, text_tokens, tokens = 3, 10, 32
    image, text = torch.randn(batch, 3, 32, 64), torch.randn(batch, text_tokens, 48)
    keep = None
    if routing is not None:
        keep = sample_keep(torch.arange(batch), tokens, routing.selection_ratio, seed=torch.tensor(1))
    route = (routing.start, routing.end) if routing is not None else None
    # Attention by plain products: the fused backward recomputes the scores, and torch 2.11 does not count it.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        out = model.forward_tokens(image, torch.rand(batch), text, keep=keep, route=route)
    forward = counter.get_total_flops()
    assert forward == batch * forward_flop(config, tokens, text_tokens, routing)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    # Nothing needs the gradient of the timestep's 256 sinusoids, which the formula counts.
    total = forward + counter.get_total_flops() + batch * 2 * 256 * config.hidden_size
    assert total == batch * training_flop(config, tokens, text_tokens, routing)


@pytest.mark.parametrize(
    ("size", "images", "routing", "published"),
    [
        (512, 32, None, 43.6),
        (1024, 16, None, 83.7),
        (512, 32, Routing(), 26.8),
        (1024, 16, Routing(), 47.3),
    ],
)
def test_work_of_a_step_is_that_of_the_recipe(
    size: int, images: int, routing: Routing | None, published: float
) -> None:
    """docs/recipe.md, "Where its time goes": denoiser, dense and with TREAD, TFLOP a GPU and step."""
    config = prx_1_2b()
    work = images * training_flop(config, config.tokens(size, size), 256, routing)
    assert work / 1e12 == pytest.approx(published, rel=0.01)


def test_newton_schulz_of_the_whole_model_is_that_of_the_recipe() -> None:
    with torch.device("meta"):
        model = PRXTransformer(prx_1_2b())
    matrices = [p for name, p in model.named_parameters() if "blocks." in name and p.ndim == 2]
    assert len(matrices) == 112
    assert sum(newton_schulz_flop(*p.shape) for p in matrices) / 1e12 == pytest.approx(47.9, rel=0.005)
