"""The transformer: sizes, initialisation, routing, features, precision of t and positions, errors, compilation."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from prx_kernels import gather_tokens, patchify, unpatchify
from prx_model import PRXConfig, PRXTransformer, Routing, Sampling
from prx_model.config import prx_1_2b, prx_small, prx_tiny
from prx_model.layers import rotary_table, timestep_embedding

SMALL = PRXConfig(
    patch_size=4, context_in_dim=12, hidden_size=32, num_heads=2, depth=5, axes_dim=(8, 8), bottleneck_size=8
)
ROWS, COLUMNS, TEXT = 4, 6, 5
TOKENS = ROWS * COLUMNS


def random_model(config: PRXConfig = SMALL, seed: int = 0) -> PRXTransformer:
    """A model whose modulation and head are not zero, so that every block matters."""
    model = PRXTransformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def make_inputs(batch: int = 2, seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(batch, 3, ROWS * 4, COLUMNS * 4, generator=generator)
    text = torch.randn(batch, TEXT, 12, generator=generator)
    mask = torch.arange(TEXT)[None] < torch.tensor([3, 5, 0, 4])[:batch, None]
    return image, torch.linspace(0.2, 0.9, batch), text, mask


# --- sizes and initialisation -------------------------------------------------------------------------------------


def test_prx_1_2b_has_exactly_the_parameters_of_the_recipe() -> None:
    with torch.device("meta"):
        model = PRXTransformer(prx_1_2b())
    # Counted on diffusers' PRXTransformer2DModel of the same sizes; docs/recipe.md says 1.177 B.
    assert sum(p.numel() for p in model.parameters()) == 1_177_215_744
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("preset", [prx_tiny, prx_small])
def test_small_presets_run_at_sizes_that_differ(preset: Callable[[], PRXConfig]) -> None:
    config = preset()
    model = PRXTransformer(config)
    text = torch.randn(1, 3, config.context_in_dim)
    assert model(torch.randn(1, 3, 16, 40), torch.tensor([0.5]), text).shape == (1, 3, 16, 40)


def test_output_is_exactly_zero_at_initialisation() -> None:
    assert torch.count_nonzero(PRXTransformer(SMALL)(*make_inputs())) == 0


def test_blocks_are_the_identity_at_initialisation_and_the_head_alone_learns_first() -> None:
    model = PRXTransformer(SMALL)
    image, t, text, mask = make_inputs()
    _, feature = model.forward_tokens(image, t, text, mask, feature_layer=4)
    torch.testing.assert_close(feature, model.img_in(patchify(image, 4)), rtol=0, atol=0)
    (model(image, t, text, mask) - 1).square().mean().backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert learning == {"final_layer.linear.weight", "final_layer.linear.bias"}


def test_initialisation_is_the_same_for_a_generator_seed_and_differs_for_another() -> None:
    models = [PRXTransformer(SMALL) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        model.init_weights(torch.Generator().manual_seed(seed))
    first, same, other = (torch.cat([p.flatten() for p in m.parameters()]) for m in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_initial_weights_are_those_of_torchs_own_layers_but_for_modulation_and_head() -> None:
    """As PRX's code has them: `nn.Linear.reset_parameters` everywhere, then zeros; bitwise from the same generator."""
    got = dict(PRXTransformer(SMALL).initial_weights(torch.Generator().manual_seed(3)))
    plain = PRXTransformer(SMALL)
    torch.manual_seed(3)
    for module in plain.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.RMSNorm):
            module.reset_parameters()
    for block in plain.blocks:
        torch.nn.init.zeros_(block.modulation.lin.weight)
        torch.nn.init.zeros_(block.modulation.lin.bias)
    for layer in (plain.final_layer.linear, plain.final_layer.adaLN_modulation[1]):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    expected = dict(plain.named_parameters())
    assert got.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in got.items())
    assert float(got["txt_in.bias"].abs().max()) > 0


def test_xavier_weights_are_uniform_within_its_bound_and_their_biases_zero() -> None:
    for name, value in PRXTransformer(SMALL).initial_weights(torch.Generator().manual_seed(3), init="xavier"):
        if name.endswith("bias"):
            assert torch.count_nonzero(value) == 0
        elif name in ("txt_in.weight", "blocks.0.attention.img_qkv_proj.weight", "blocks.4.down_proj.weight"):
            bound = (6 / sum(value.shape)) ** 0.5
            # Of a hundred draws and more the largest is within 10 % of the bound; torch's own bound is 1.2 times off.
            assert 0.9 * bound < float(value.abs().max()) <= bound


def test_an_unknown_initialisation_is_a_sentence() -> None:
    with pytest.raises(ValueError, match='train.init must be "torch" or "xavier", got \'normal\''):
        PRXTransformer(SMALL).init_weights(init="normal")  # type: ignore[arg-type]


# --- routing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", [(0, 4), (1, 3), (2, 2)])
def test_routing_all_tokens_in_random_order_equals_dense(route: tuple[int, int]) -> None:
    model, inputs = random_model(), make_inputs()
    order = torch.stack([torch.randperm(TOKENS, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    dense = model.forward_tokens(*inputs)
    routed = model.forward_tokens(*inputs, keep=order, route=route)
    # Sums over keys in another order: float32 rounding.
    torch.testing.assert_close(routed, dense, rtol=1e-5, atol=1e-5)


def by_hand(model: PRXTransformer, inputs: tuple[Tensor, ...], keep: Tensor, route: tuple[int, int]) -> Tensor:
    """Routing written with plain indexing, one sample at a time, with positions from `rotary_table`."""
    outputs = []
    table = rotary_table(ROWS, COLUMNS, SMALL.axes_dim, SMALL.theta, torch.device("cpu"))
    for i in range(keep.shape[0]):
        image, t, text, mask = (part[i : i + 1] for part in inputs)
        x, words, temb = model.img_in(patchify(image, 4)), model.txt_in(text), model.time_in(t)
        for index, block in enumerate(model.blocks):
            chosen = keep[i].long() if route[0] <= index <= route[1] else torch.arange(TOKENS)
            new = x.clone()
            new[:, chosen] = block(x[:, chosen], words, temb, table[:, chosen], mask)
            x = new
        outputs.append(model.final_layer(x, temb))
    return torch.cat(outputs)


@pytest.mark.parametrize("route", [(0, 0), (1, 3), (0, 4), (4, 4)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_routed_run_equals_routing_by_hand(route: tuple[int, int], dtype: torch.dtype) -> None:
    model, inputs = random_model(), make_inputs()
    keep = torch.tensor([[0, 3, 7, 8, 20], [1, 2, 15, 22, 23]], dtype=dtype)
    routed = model.forward_tokens(*inputs, keep=keep, route=route)
    # One sample at a time against a batch: float32 rounding.
    torch.testing.assert_close(routed, by_hand(model, inputs, keep, route), rtol=1e-5, atol=1e-5)


def test_bypassed_tokens_are_exactly_those_in_front_of_the_route() -> None:
    """Seen at block 4, behind the route: its input rows outside `keep` are the output rows of block 0."""
    model, inputs = random_model(), make_inputs()
    keep = torch.tensor([[0, 3, 7], [1, 2, 23]])
    seen: dict[int, Tensor] = {}
    for index in (0, 4):
        model.blocks[index].register_forward_hook(
            lambda _m, args, out, i=index: seen.update({i: args[0] if i == 4 else out})
        )
    model.forward_tokens(*inputs, keep=keep, route=(1, 3))
    for i in range(2):
        bypassed = [j for j in range(TOKENS) if j not in keep[i].tolist()]
        assert torch.equal(seen[4][i, bypassed], seen[0][i, bypassed])
        assert (seen[4][i, keep[i]] - seen[0][i, keep[i]]).abs().min(dim=1).values.min() > 0


def test_routed_blocks_see_kept_tokens_only_and_gradients_match_routing_by_hand() -> None:
    model, inputs = random_model(), make_inputs()
    keep = torch.tensor([[0, 3, 7], [1, 2, 23]])
    widths: list[int] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _m, args, _out: widths.append(args[0].shape[1]))
    weight = torch.randn(2, TOKENS, 48, generator=torch.Generator().manual_seed(2))
    (model.forward_tokens(*inputs, keep=keep, route=(1, 3)) * weight).sum().backward()
    assert widths == [TOKENS, 3, 3, 3, TOKENS]
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    (by_hand(model, inputs, keep, (1, 3)) * weight).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        # Relative 1e-4, as against diffusers: sums over the batch in another order.
        assert (gradients[name] - parameter.grad).norm() <= 1e-4 * parameter.grad.norm(), name


@pytest.mark.parametrize(("layer", "tokens"), [(0, TOKENS), (1, 3), (2, 3), (3, 3), (4, TOKENS)])
def test_features_are_kept_tokens_within_the_route_and_all_tokens_outside(layer: int, tokens: int) -> None:
    model, inputs = random_model(), make_inputs()
    keep = torch.tensor([[0, 3, 7], [1, 2, 23]])
    blocks: list[Tensor] = []
    model.blocks[layer].register_forward_hook(lambda _m, _args, out: blocks.append(out))
    out, feature = model.forward_tokens(*inputs, keep=keep, route=(1, 3), feature_layer=layer)
    assert feature.shape == (2, tokens, 32)
    assert torch.equal(feature, blocks[0])
    assert torch.equal(out, model.forward_tokens(*inputs, keep=keep, route=(1, 3)))


def test_features_of_all_tokens_routed_are_the_dense_features_at_kept_positions() -> None:
    model, inputs = random_model(), make_inputs()
    order = torch.stack([torch.randperm(TOKENS, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    _, dense = model.forward_tokens(*inputs, feature_layer=3)
    _, routed = model.forward_tokens(*inputs, keep=order, route=(1, 3), feature_layer=3)
    torch.testing.assert_close(routed, gather_tokens(dense, order), rtol=1e-5, atol=1e-5)  # float32 rounding


def test_forward_is_forward_tokens_put_back_in_place() -> None:
    model, inputs = random_model(), make_inputs()
    assert torch.equal(model(*inputs), unpatchify(model.forward_tokens(*inputs), 4, ROWS * 4, COLUMNS * 4))


# --- errors -------------------------------------------------------------------------------------------------------

KEEP = torch.tensor([[0, 3], [1, 2]])
BAD_CALLS = {
    "keep without route": ({"keep": KEEP}, "keep and route belong together"),
    "route without keep": ({"route": (1, 3)}, "keep and route belong together"),
    "route past the end": ({"keep": KEEP, "route": (1, 5)}, r"route \(1, 5\) .* 0 … 4"),
    "route backwards": ({"keep": KEEP, "route": (3, 1)}, r"route \(3, 1\)"),
    "negative route": ({"keep": KEEP, "route": (-1, 3)}, r"route \(-1, 3\)"),
    "keep of another batch": ({"keep": KEEP[:1], "route": (1, 3)}, r"keep must be .*\(1, 2\)"),
    "keep of more than all tokens": ({"keep": torch.zeros(2, 25, dtype=torch.int64), "route": (1, 3)}, "keep must be"),
    "feature behind the last block": ({"feature_layer": 5}, "feature_layer 5 .* 0 … 4"),
    "negative feature": ({"feature_layer": -1}, "feature_layer -1"),
    "height no multiple": ({"image": torch.zeros(2, 3, 18, 24)}, "18x24 is not a multiple of the patch size 4; 16x24"),
    "width no multiple": ({"image": torch.zeros(2, 3, 16, 25)}, "16x25 is not a multiple of the patch size 4"),
    "empty picture": ({"image": torch.zeros(2, 3, 0, 24)}, "0x24 is not a multiple of the patch size 4; 4x24"),
    "one channel": ({"image": torch.zeros(2, 1, 16, 24)}, r"image must be \(batch, 3, H, W\), got \(2, 1, 16, 24\)"),
    "no batch": ({"image": torch.zeros(3, 16, 24)}, r"image must be .* got \(3, 16, 24\)"),
    "t of another batch": ({"t": torch.zeros(3)}, r"t must be .*batch of 2, got \(3,\)"),
    "t a scalar": ({"t": torch.tensor(0.5)}, r"t must be .* got \(\)"),
    "t a column": ({"t": torch.zeros(2, 1)}, r"t must be .* got \(2, 1\)"),
    "text of another batch": ({"text": torch.zeros(1, TEXT, 12)}, r"text must be \(2, L, 12\), got \(1, 5, 12\)"),
    "text of another width": ({"text": torch.zeros(2, TEXT, 13)}, r"text must be \(2, L, 12\), got \(2, 5, 13\)"),
    "mask of integers": ({"text_mask": torch.ones(2, TEXT, dtype=torch.int64)}, "text_mask must be bool .*int64"),
    "mask of another length": ({"text_mask": torch.ones(2, 4, dtype=torch.bool)}, r"text_mask .*\(2, 4\)"),
    "mask expanded": ({"text_mask": torch.ones(2, 1, 1, TEXT, dtype=torch.bool)}, r"text_mask .*\(2, 1, 1, 5\)"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_what_does_not_fit_is_refused_in_one_sentence(case: str) -> None:
    change, message = BAD_CALLS[case]
    image, t, text, mask = make_inputs()
    arguments: dict[str, Any] = {"image": image, "t": t, "text": text, "text_mask": mask, **change}
    with pytest.raises(ValueError, match=message) as caught:
        PRXTransformer(SMALL).forward_tokens(**arguments)
    assert "\n" not in str(caught.value)


def test_keep_of_floats_is_refused() -> None:
    with pytest.raises(TypeError, match="keep must be int32 or int64, got torch.float32"):
        PRXTransformer(SMALL).forward_tokens(*make_inputs(), keep=KEEP.float(), route=(1, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "PRXConfig.depth must be at least 1, got 0"),
        ({"patch_size": 0}, "PRXConfig.patch_size must be at least 1, got 0"),
        ({"bottleneck_size": 0}, "PRXConfig.bottleneck_size must be at least 1 or None, got 0"),
        ({"mlp_ratio": 0.0}, "PRXConfig.mlp_ratio must be positive, got 0.0"),
        ({"mlp_ratio": 0.01}, "PRXConfig.mlp_ratio must give the MLP at least one feature, got 0.01"),
        ({"theta": 0}, "PRXConfig.theta must be positive, got 0"),
        ({"hidden_size": 33}, "PRXConfig.hidden_size 33 must be a multiple of num_heads 2"),
        ({"axes_dim": (9, 7)}, "PRXConfig.axes_dim must be two even numbers, got (9, 7)"),
        ({"axes_dim": (4, 4, 8)}, "PRXConfig.axes_dim must be two even numbers, got (4, 4, 8)"),
        ({"axes_dim": (8, 6)}, "PRXConfig.axes_dim (8, 6) must add up to the head dimension 16"),
    ],
)
def test_config_names_the_field_that_is_wrong(change: dict[str, Any], message: str) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_heads": 2, "axes_dim": (8, 8)}
    with pytest.raises(ValueError, match=re.escape(message)):
        PRXConfig(**{**sizes, **change})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Routing(start=3, end=2), "routing.start 3 must not be negative or behind routing.end 2"),
        (lambda: Routing(start=-1, end=2), "routing.start -1"),
        (lambda: Routing(selection_ratio=1.0), "routing.selection_ratio must lie in (0, 1), got 1.0"),
        (lambda: Sampling(steps=0), "sampling.steps must be at least 1, got 0"),
        (lambda: Sampling(shift=0.0), "sampling.shift and noise_scale must be positive, got 0.0"),
        (lambda: Sampling(t_min=0.0), "sampling.t_min must lie in (0, 1), got 0.0"),
        (lambda: Sampling(guidance_kind="both"), 'sampling.guidance_kind must be "cfg" or "self", got \'both\''),
        (lambda: Sampling(routed_tokens="never"), 'sampling.routed_tokens must be "once" or "each-step", got'),
        (lambda: Sampling(time_grid="log"), 'sampling.time_grid must be "linear" or "diffusers", got \'log\''),
    ],
)
def test_routing_and_sampling_name_the_field_that_is_wrong(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_config_takes_the_list_of_axes_that_a_json_file_gives() -> None:
    config = PRXConfig(hidden_size=32, num_heads=2, axes_dim=[8, 8])  # type: ignore[arg-type]
    assert config.axes_dim == (8, 8)
    assert hash(config) == hash(PRXConfig(hidden_size=32, num_heads=2, axes_dim=(8, 8)))


# --- precision ----------------------------------------------------------------------------------------------------


def seen_by_layers(model: PRXTransformer, call: Callable[[], object]) -> tuple[Tensor, Tensor]:
    """t as the time embedding gets it and the rotary table as the first block gets it."""
    seen: dict[str, Tensor] = {}
    handles = [
        model.time_in.register_forward_pre_hook(lambda _m, args: seen.update(t=args[0])),
        model.blocks[0].register_forward_pre_hook(lambda _m, args: seen.update(rotary=args[3])),
    ]
    call()
    for handle in handles:
        handle.remove()
    return seen["t"], seen["rotary"]


@pytest.mark.parametrize("way", ["bfloat16 weights", "autocast"])
@pytest.mark.parametrize("routed", [False, True], ids=["dense", "routed"])
def test_t_and_positions_stay_float32(way: str, routed: bool) -> None:
    model, (image, _, text, mask) = random_model(), make_inputs()
    # 0.4996 and 0.5004 are the same number in bfloat16.
    t = torch.tensor([0.4996, 0.5004])
    if way == "bfloat16 weights":
        model = model.bfloat16()
    route: dict[str, Any] = {"keep": KEEP, "route": (0, 3)} if routed else {}
    out: list[Tensor] = []
    embedded: list[Tensor] = []
    model.time_in.register_forward_hook(lambda _m, _args, result: embedded.append(result))
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        t_seen, rotary = seen_by_layers(model, lambda: out.append(model.forward_tokens(image, t, text, mask, **route)))
    assert out[0].dtype == torch.bfloat16
    assert torch.isfinite(out[0]).all()
    assert t_seen.dtype == torch.float32
    assert torch.equal(t_seen, t)
    assert rotary.dtype == torch.float32
    table = rotary_table(ROWS, COLUMNS, SMALL.axes_dim, SMALL.theta, image.device)
    assert torch.equal(rotary, gather_tokens(table.expand(2, -1, -1, -1), KEEP) if routed else table)
    assert not torch.equal(embedded[0][0], embedded[0][1])


@pytest.mark.parametrize("way", ["bfloat16 weights", "autocast"])
def test_bfloat16_output_is_near_the_float32_output(way: str) -> None:
    model, inputs = random_model(), make_inputs()
    exact = model(*inputs)
    if way == "bfloat16 weights":
        model = model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        rounded = model(*inputs)
    # bfloat16 keeps 8 bits, 2^-9 a rounding; a dozen roundings a block in 5 blocks stay well below 5 %.
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()


def test_timestep_embedding_follows_its_formula_in_float64() -> None:
    t = torch.tensor([0.0, 1e-3, 0.4996, 1.0])
    frequency = 10_000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    angle = 1000.0 * t.double()[:, None] * frequency
    expected = torch.cat((angle.cos(), angle.sin()), dim=-1)
    # An angle up to 1000 in float32 is off by some 1e-4: spacing 6e-5 at 1000, and the same again from the frequency.
    torch.testing.assert_close(timestep_embedding(t).double(), expected, rtol=0, atol=2e-4)


def test_rotary_table_puts_the_row_first_and_the_column_second() -> None:
    table = rotary_table(2, 3, (4, 2), 100, torch.device("cpu"))[0]
    angle = torch.atan2(table[..., 1], table[..., 0])
    frequency = torch.tensor([1.0, 0.1])
    expected = torch.stack([torch.cat((r * frequency, c * torch.ones(1))) for r in range(2) for c in range(3)])
    torch.testing.assert_close(angle, expected, rtol=0, atol=1e-6)  # one rounding to float32, then atan2


# --- compilation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("routed", [False, True], ids=["dense", "routed"])
def test_model_compiles_without_a_graph_break(routed: bool) -> None:
    model, inputs = random_model(replace(SMALL, depth=3)), make_inputs()
    route: dict[str, Any] = {"keep": KEEP, "route": (1, 1)} if routed else {}
    torch._dynamo.reset()
    # fullgraph raises at the first graph break.
    compiled = torch.compile(partial(model.forward_tokens, feature_layer=1), fullgraph=True, backend="aot_eager")
    expected, feature = model.forward_tokens(*inputs, **route, feature_layer=1)
    got, got_feature = compiled(*inputs, **route)
    # aot_eager runs the same ops, decomposed: float32 rounding.
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got_feature, feature, rtol=1e-5, atol=1e-5)
    got.sum().backward()
    assert all(isinstance(p.grad, Tensor) for p in model.blocks.parameters())
