"""The formulas: docs/recipe.md's table, docs/kernels.md's figures, and counts by hand."""

import pytest
import torch

from benchmarks import roofline
from benchmarks.flop_table import RECIPE
from benchmarks.roofline import STAGE_1, STAGE_2
from benchmarks.sizes import CONFIG
from benchmarks.test_pointwise import PARTS, cost
from benchmarks.test_pointwise import make_inputs as make_pointwise_inputs
from benchmarks.test_token_routing import WAYS, Case, make_inputs
from benchmarks.traffic import EagerTraffic
from prx_kernels import newton_schulz_flop, reference


@pytest.mark.parametrize("part", STAGE_1.parts())
def test_parts_are_those_of_the_recipe(part):
    for stage, expected in zip((STAGE_1, STAGE_2), RECIPE[part], strict=True):
        # The table has one decimal; 1.5 % covers what it counts otherwise (register tokens, patch embeddings).
        assert stage.parts()[part] / 1e12 == pytest.approx(expected, rel=0.015, abs=0.06)


def test_sums_and_floors_are_those_of_the_recipe():
    assert STAGE_1.total() / 1e12 == pytest.approx(41.8, rel=0.005)
    assert STAGE_2.total() / 1e12 == pytest.approx(58.7, rel=0.005)
    assert STAGE_1.floor_seconds() * 1e3 == pytest.approx(53, abs=0.5)
    assert STAGE_2.floor_seconds() * 1e3 == pytest.approx(74, abs=0.5)
    assert roofline.hours(STAGE_1.floor_seconds(), STAGE_2.floor_seconds()) == pytest.approx(1.9, abs=0.05)
    assert roofline.hours(0.100, 0.135) == pytest.approx(3.5, abs=0.05)
    assert {name: one for name, one, _ in roofline.table()}["ms at the ceiling"] == pytest.approx(53, abs=0.5)


def test_newton_schulz_of_the_112_matrices():
    shapes = roofline.prx_muon_shapes()
    assert len(shapes) == 112
    assert {min(shape) for shape in shapes} == {1792}
    for algorithm, tflop in (("plain", 47.9), ("standard", 34.3), ("gram", 21.5)):
        assert roofline.newton_schulz(shapes, algorithm) / 1e12 == pytest.approx(tflop, abs=0.06)
    assert roofline.newton_schulz([(32, 64)], "plain") == newton_schulz_flop(32, 64)
    with pytest.raises(ValueError, match="must be 'plain', 'standard' or 'gram', got 'fast'"):
        roofline.newton_schulz(shapes, "fast")


def test_shapes_of_muon_are_those_of_the_model():
    from prx_model import PRXConfig, PRXTransformer

    config = PRXConfig(context_in_dim=24, hidden_size=64, num_heads=2, depth=2, axes_dim=(16, 16), bottleneck_size=16)
    named = PRXTransformer(config).named_parameters()
    found = sorted(tuple(p.shape) for name, p in named if "blocks." in name and p.ndim == 2)
    assert sorted(roofline.prx_muon_shapes(config)) == found


def test_counts_by_hand():
    assert roofline.linear(2, 3, 5).flop == 60
    assert roofline.linear(2, 3, 5).nbytes == 2 * (6 + 15 + 10)
    assert roofline.attention(1, 1, 2, 3, 4, "forward").flop == 4 * 2 * 3 * 4
    assert roofline.attention(1, 1, 2, 3, 4, "both").flop == 3.5 * 4 * 2 * 3 * 4
    assert roofline.routing_bytes("both", 2, 8, 4, 16, 4) == 6 * (2 * 8 * 16 * 4)


@pytest.mark.parametrize("name", PARTS)
def test_parts_between_products_read_their_inputs_and_write_their_outputs_once(name):
    part = PARTS[name]
    inputs = make_pointwise_inputs(part, 2, 4)(0)
    made = part.function(*inputs)
    wide = [
        x for x in (*inputs, *(made if isinstance(made, tuple) else (made,))) if x.numel() >= 8 * CONFIG.hidden_size
    ]
    moved = sum(x.numel() * x.element_size() for x in wide)
    if name == "q, k norm + rotary":
        moved -= inputs[0].numel() // 3 * inputs[0].element_size()  # values are not looked at
    assert cost(part, 2, 4, "forward").nbytes == moved
    assert cost(part, 2, 4, "both").nbytes * part.forward == moved * (part.forward + part.backward)


def test_vgg16_counts_what_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode
    from torchvision.models import vgg16

    with torch.device("meta"):
        model, image = vgg16().features, torch.empty(1, 3, 64, 96)
    with FlopCounterMode(display=False) as counter:
        model(image)
    assert counter.get_total_flops() == roofline.vgg16_forward(64, 96)


@pytest.mark.parametrize("teacher", ["vit_base_patch14_reg4_dinov2", "vit_large_patch16_dinov3"])
def test_teachers_count_what_torch_counts(teacher):
    import timm
    from torch.utils.flop_counter import FlopCounterMode

    size, vision = (224, roofline.DINOV2_B) if "dinov2" in teacher else (256, roofline.DINOV3_L)
    with torch.device("meta"):
        arguments = {"img_size": size} if "dinov2" in teacher else {}
        model, image = timm.create_model(teacher, pretrained=False, **arguments), torch.empty(1, 3, size, size)
        with FlopCounterMode(display=False) as counter:
            model.forward_features(image)
    assert counter.get_total_flops() == pytest.approx(vision.forward(size), rel=0.01)


def test_the_ways_of_routing_move_what_the_readme_says():
    """Bytes of each plain definition's eager ops in bf16 at half the tokens, indices included, against ours' 8u."""
    case = Case(batch=2, tokens=64, channels=1792)
    x, keep, complement, update = make_inputs(case)(0)
    x = x.detach().bfloat16().requires_grad_()
    update = update.bfloat16()
    u = x.numel() * 2
    counted = {}
    for way, function in WAYS.items():
        if way == "ours":
            continue
        with EagerTraffic() as traffic:
            out, _ = function(x, keep, complement, update)
            torch.autograd.grad(out, x, torch.ones_like(out))
        counted[way] = traffic.nbytes / u
    assert counted == pytest.approx({"CompVis": 14.5, "PRX": 24.0, "SimpleTuner": 70.5}, rel=2e-3)
    truth = reference.scatter_tokens(x, update, keep)
    assert all(torch.equal(WAYS[way](x, keep, complement, update)[0], truth) for way in counted)
