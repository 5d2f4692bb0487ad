"""Patch embedding and its noise: the ops against their definitions, loaded weights, allocations, builds."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from prx_kernels import BottleneckPatchEmbed, patch_embed, patchify, philox_normal
from prx_kernels.noise import normal as noise
from prx_kernels.patch_embed import ops as _patch_embed_ops
from prx_model.flow import add_noise

from . import checks

SEED, IDS, T = torch.tensor(5), torch.tensor([3, 2**40]), torch.tensor([0.3, 0.8])
NOISE = {"t": T, "noise_seed": SEED, "sample_ids": IDS, "noise_scale": 1.5}


def tensors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """A picture of 2x3 patches of 4, and the weights of 48 -> 16 -> 32."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 8, 12), (16, 48), (16,), (32, 16), (32,))
    return tuple(torch.randn(s, generator=generator, dtype=dtype, requires_grad=True) for s in shapes)


def by_hand(image: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, p: int = 4, noisy: bool = False) -> Tensor:
    if noisy:
        image = add_noise(image, philox_normal(SEED, tuple(image.shape), sample_ids=IDS), T, noise_scale=1.5)
    return F.linear(F.linear(patchify(image, p).to(w1.dtype), w1, b1), w2, b2)


# --- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noisy", [False, True])
def test_embedding_equals_unfolding_noise_and_two_linear_maps(noisy):
    inputs = tensors()
    noise_arguments = NOISE if noisy else {}
    actual, expected = patch_embed(*inputs, 4, **noise_arguments), by_hand(*inputs, noisy=noisy)
    assert torch.equal(actual, expected)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    for got, wanted in zip(
        torch.autograd.grad((actual * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)  # float32 sums in another order


def test_one_map_without_bottleneck_and_without_bias():
    image, w1, *_ = tensors()
    assert torch.equal(patch_embed(image, w1, None, None, None, 4), F.linear(patchify(image, 4), w1))


def test_uint8_pictures_are_scaled_to_minus_one_and_one():
    _, *weights = tensors()
    image = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    image[0, 0, 0, :2] = torch.tensor([0, 255])
    scaled = image.float() / 127.5 - 1
    assert scaled.aminmax() == (-1, 1)
    assert torch.equal(patch_embed(image, *weights, 4), by_hand(scaled, *weights))
    assert torch.equal(patch_embed(image, *weights, 4, **NOISE), by_hand(scaled, *weights, noisy=True))


def test_strides_do_not_matter_nor_does_the_rest_of_the_batch():
    image, *weights = tensors()
    expected = patch_embed(image, *weights, 4, **NOISE)
    assert torch.equal(patch_embed(image.to(memory_format=torch.channels_last), *weights, 4, **NOISE), expected)
    alone = {**NOISE, "t": T[1:], "sample_ids": IDS[1:]}
    # Matrix products of another size round differently.
    torch.testing.assert_close(patch_embed(image[1:], *weights, 4, **alone), expected[1:], rtol=1e-5, atol=1e-5)


def test_t_zero_is_the_picture_and_t_one_is_noise_alone():
    image, *weights = tensors()
    ends = {**NOISE, "t": torch.tensor([0.0, 1.0])}
    out = patch_embed(image, *weights, 4, **ends)
    torch.testing.assert_close(out[0], patch_embed(image, *weights, 4)[0], rtol=1e-5, atol=1e-5)
    other = patch_embed(image + 7, *weights, 4, **ends)
    torch.testing.assert_close(out[1], other[1], rtol=0, atol=0)


def test_autocast_runs_in_its_dtype_and_gives_float32_gradients():
    inputs = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        out = patch_embed(*inputs, 4, **NOISE)
        expected = by_hand(*inputs, noisy=True)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    assert {g.dtype for g in torch.autograd.grad(out.float().square().sum(), inputs)} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_t_is_never_rounded_to_the_dtype_of_the_picture(dtype):
    # 0.4996 rounds to 0.5 in bfloat16. The picture is 1024, and only the map of one pixel is not zero.
    image, w1 = torch.full((1, 1, 4, 4), 1024.0, dtype=dtype), torch.zeros(16, 16)
    w1[0, 0] = 1
    level = {"t": torch.tensor([0.4996]), "noise_seed": SEED, "noise_scale": 0.0}
    assert patch_embed(image, w1, None, None, None, 4, **level)[0, 0, 0].item() == pytest.approx(512.4096, abs=1e-3)


# --- noise -------------------------------------------------------------------------------------------------------


def test_noise_over_steps_samples_and_pixels_is_standard_normal_and_independent():
    """Recovered from the embedding itself, by an identity map at t = 1."""
    eye, zeros = torch.eye(64), torch.zeros(8, 1, 32, 32)
    rows = []
    for step in range(4):
        level = {"t": torch.ones(8), "noise_seed": torch.tensor(1000 + step), "sample_ids": torch.arange(8) * 2**33}
        rows.append(patch_embed(zeros, eye, None, None, None, 8, **level).flatten(1))
    x = torch.cat(rows).double()
    values, n = x.flatten(), x.numel()
    # Five standard errors of each moment: 1, sqrt(2), sqrt(15), sqrt(96) over sqrt(n).
    for power, (moment, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], start=1):
        assert abs(float(values.pow(power).mean()) - moment) < 5 * math.sqrt(variance / n), power
    cdf = torch.special.ndtr(values.sort().values)
    upper = torch.arange(1, n + 1, dtype=torch.float64) / n
    distance = float(torch.maximum((upper - cdf).abs(), (upper - 1 / n - cdf).abs()).max())
    assert distance < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov, exceeded once in 1,000
    for moments in (x, x.square()):
        correlation = torch.corrcoef(moments) - torch.eye(32, dtype=torch.float64)
        assert float(correlation.abs().max()) < 5 / math.sqrt(1024)  # five standard errors, 496 pairs


def test_noise_is_that_of_philox_normal_at_any_world_size():
    zeros, eye = torch.zeros(4, 3, 8, 8), torch.eye(192)
    ids, level = torch.tensor([9, -1, 2**40, 0]), torch.ones(4)
    whole = patch_embed(zeros, eye, None, None, None, 8, t=level, noise_seed=SEED, sample_ids=ids)
    assert torch.equal(whole, patchify(philox_normal(SEED, (4, 3, 8, 8), sample_ids=ids), 8))
    ranks = [
        patch_embed(zeros[i::2], eye, None, None, None, 8, t=level[i::2], noise_seed=SEED, sample_ids=ids[i::2])
        for i in range(2)
    ]
    assert torch.equal(torch.stack(ranks, dim=1).flatten(0, 1), whole)


# --- gradients and registration ----------------------------------------------------------------------------------


@pytest.mark.parametrize("noisy", [False, True])
def test_gradients_in_float64(noisy):
    inputs = tensors(torch.float64)
    assert torch.autograd.gradcheck(lambda *x: patch_embed(*x, 4, **(NOISE if noisy else {})), inputs)


def test_a_gradient_to_second_order_is_an_error_and_not_zero():
    image, w1, *rest = tensors()
    (grad,) = torch.autograd.grad(patch_embed(image, w1, *rest, 4).square().sum(), w1, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        grad.square().sum().backward()


def test_opcheck():
    image, w1, b1, *_ = tensors()
    check, ops = torch.library.opcheck, _patch_embed_ops
    check(ops.project, (image, w1, b1, T, SEED, IDS, 4, 1.5))
    check(ops.project, (image.detach(), w1, None, None, None, None, 4, 1.0))
    grad = torch.randn(2, 6, 16)
    check(ops.weight_gradient, (grad, image.detach(), T, SEED, IDS, 4, 1.5))
    check(ops.image_gradient, (grad, w1.detach(), T, image.detach(), 4))
    check(noise._normal, (SEED, IDS, 7))


def test_a_flop_counter_sees_the_products_and_their_gradients():
    from torch.utils.flop_counter import FlopCounterMode

    inputs = tensors()
    counts = []
    for embed in (patch_embed, by_hand):
        with FlopCounterMode(display=False) as counter:
            embed(*inputs, 4).sum().backward()
        counts.append(counter.get_total_flops())
    # 12 tokens; the first map forward and for weight and picture, the second forward and for weight and row.
    assert counts == [3 * 2 * 12 * (48 * 16 + 16 * 32)] * 2


def test_twenty_steps_with_other_seeds_and_levels_compile_once():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    image, *weights = tensors()

    @torch.compile(fullgraph=True, backend=counter)
    def step(image, t, seed):
        return patch_embed(image, *weights, 4, t=t, noise_seed=seed, sample_ids=IDS).square().mean()

    results = set()
    for number in range(20):
        seed = torch.tensor(number)
        loss = step(image, T, seed)
        assert torch.equal(loss, patch_embed(image, *weights, 4, t=T, noise_seed=seed, sample_ids=IDS).square().mean())
        loss.backward()
        results.add(loss.item())
    assert counter.frame_count == 1
    assert len(results) == 20


def test_the_default_compiler_gives_the_same_gradients():
    torch._dynamo.reset()
    inputs = tensors()

    def run(*inputs):
        return patch_embed(*inputs, 4, **NOISE).square().mean()

    compiled = torch.compile(run, fullgraph=True)
    for got, wanted in zip(
        torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(run(*inputs), inputs), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


# --- weights of other code bases ---------------------------------------------------------------------------------


class JiTStyleEmbed(nn.Module):
    """Two convolutions as in JiT's embedding: p×p of stride p without bias, then 1×1 with one."""

    def __init__(self, patch: int, channels: int, bottleneck: int, hidden: int) -> None:
        super().__init__()
        self.proj1 = nn.Conv2d(channels, bottleneck, patch, stride=patch, bias=False)
        self.proj2 = nn.Conv2d(bottleneck, hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj2(self.proj1(x)).flatten(2).transpose(1, 2)


def same_maps(ours: BottleneckPatchEmbed, theirs: nn.Module, image: Tensor) -> None:
    """Outputs and weight gradients; a convolution sums in another order than a product."""
    expected = theirs(image)
    torch.testing.assert_close(ours(image), expected, rtol=1e-5, atol=1e-5)
    ours(image).square().mean().backward()
    expected.square().mean().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad.reshape(a.grad.shape), rtol=1e-4, atol=1e-5)


def test_jit_style_convolutions_are_loaded():
    theirs = JiTStyleEmbed(16, 3, 32, 48)
    ours = BottleneckPatchEmbed.from_conv(theirs.proj1, theirs.proj2)
    assert [name for name, _ in ours.named_parameters()] == ["0.weight", "1.weight", "1.bias"]
    same_maps(ours, theirs, torch.randn(2, 3, 32, 64))


def test_two_linear_maps_are_loaded_and_their_names_are_a_sequential_s():
    layers = nn.Sequential(nn.Linear(192, 32), nn.Linear(32, 48))
    ours = BottleneckPatchEmbed.from_linear(layers)
    assert list(ours.state_dict()) == list(layers.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    image = torch.randn(2, 3, 16, 24)
    torch.testing.assert_close(ours(image), layers(patchify(image, 8)), rtol=0, atol=0)
    BottleneckPatchEmbed(3, 8, 32, 48).load_state_dict(layers.state_dict(), strict=True)
    with torch.no_grad():
        layers[0].weight.zero_()
    assert ours(image).std() > 0.1, "a copy of the weights, not the weights"


def test_timm_s_patch_embed_is_replaced():
    timm = pytest.importorskip("timm.layers")
    theirs = timm.PatchEmbed(img_size=32, patch_size=8, in_chans=4, embed_dim=48)
    ours = BottleneckPatchEmbed.from_timm(theirs)
    assert list(ours.state_dict()) == ["0.weight", "0.bias"]
    assert (ours.num_patches, ours.grid_size, ours.patch_size) == (16, (4, 4), (8, 8))
    same_maps(ours, theirs, torch.randn(2, 4, 32, 32))
    assert ours(torch.randn(1, 4, 16, 40)).shape == (1, 10, 48)


class DiTLike(nn.Module):
    """What DiT's and JiT's models do with their embedding when they are made, in the names of their code."""

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.x_embedder = embed
        self.head = nn.Linear(48, 8)

    def initialize_weights(self) -> None:
        maps = [self.x_embedder.proj1, self.x_embedder.proj2] if hasattr(self.x_embedder, "proj1") else []
        for layer in maps or [self.x_embedder.proj]:
            weight = layer.weight.data
            nn.init.xavier_uniform_(weight.view([weight.shape[0], -1]))
            if layer.bias is not None:
                nn.init.constant_(layer.bias, 0)


def convolutions(kind: str) -> tuple[nn.Module, BottleneckPatchEmbed]:
    if kind == "JiT":
        theirs = JiTStyleEmbed(8, 4, 16, 48)
        return theirs, BottleneckPatchEmbed.from_conv(theirs.proj1, theirs.proj2)
    theirs = pytest.importorskip("timm.layers").PatchEmbed(img_size=32, patch_size=8, in_chans=4, embed_dim=48)
    return theirs, BottleneckPatchEmbed.from_timm(theirs)


@pytest.mark.parametrize("kind", ["timm", "JiT"])
def test_states_load_before_and_after_the_replacement_and_back(kind):
    image = torch.randn(2, 4, 32, 32)
    saved, _ = convolutions(kind)
    trained = DiTLike(saved)
    theirs, made = convolutions(kind)
    late = DiTLike(made)
    late.load_state_dict(trained.state_dict(), strict=True)
    expected = saved(image)
    torch.testing.assert_close(made(image), expected, rtol=1e-5, atol=1e-5)
    again = DiTLike(convolutions(kind)[1])  # its own names still load
    again.load_state_dict(late.state_dict(), strict=True)
    assert torch.equal(again.x_embedder(image), made(image))
    theirs.load_state_dict(made.as_convolutions(), strict=True)
    assert torch.equal(theirs(image), expected)
    with pytest.raises(RuntimeError, match="x_embedder.norm.weight"):
        late.load_state_dict({**trained.state_dict(), "x_embedder.norm.weight": torch.ones(48)})
    with pytest.raises(ValueError, match="a name for each of"):
        made.as_convolutions("a", "b", "c")


@pytest.mark.parametrize("kind", ["timm", "JiT"])
def test_initialize_weights_runs_on_what_replaced_the_convolutions(kind):
    model = DiTLike(convolutions(kind)[1])
    before = [p.clone() for p in model.x_embedder.parameters()]
    model.initialize_weights()
    for old, new in zip(before, model.x_embedder.parameters(), strict=True):
        assert not torch.equal(old, new)
    biases = [p for name, p in model.x_embedder.named_parameters() if name.endswith("bias")]
    assert biases
    assert not any(p.any() for p in biases)


def test_copies_keep_dtype_and_whether_weights_are_trained():
    layers = nn.Sequential(nn.Linear(48, 16), nn.Linear(16, 32)).to(torch.bfloat16).requires_grad_(False)
    ours = BottleneckPatchEmbed.from_linear(layers)
    assert {(p.dtype, p.requires_grad) for p in ours.parameters()} == {(torch.bfloat16, False)}


# --- errors ------------------------------------------------------------------------------------------------------

IMAGE, W1, B1, W2, B2 = (x.detach() for x in tensors())
EMBED = BottleneckPatchEmbed(3, 4, 16, 32)
ERRORS = {
    "size": (lambda: patch_embed(IMAGE[..., :11], W1, B1, W2, B2, 4), "8x11 is not a multiple .* 4; 8x8 would be"),
    "channels": (lambda: patch_embed(IMAGE[:, :2], W1, B1, W2, B2, 4), r"w1 must be \(bottleneck, 32\) for 2 channels"),
    "module": (lambda: EMBED(IMAGE[:, :2]), r"image must be \(batch, 3, H, W\), got \(2, 2, 8, 12\)"),
    "dimensions": (lambda: patch_embed(IMAGE[0], W1, B1, W2, B2, 4), r"must be \(batch, channels, H, W\)"),
    "integers": (lambda: patch_embed(IMAGE.long(), W1, B1, W2, B2, 4), "floating or uint8, got torch.int64"),
    "w1": (lambda: patch_embed(IMAGE, W1[:, :47], B1, W2, B2, 4), r"w1 must be \(bottleneck, 48\) .*, got \(16, 47\)"),
    "b1": (lambda: patch_embed(IMAGE, W1, B1[:3], W2, B2, 4), r"b1 must be \(16,\) beside its weight, got \(3,\)"),
    "w2": (lambda: patch_embed(IMAGE, W1, B1, W2.T, B2, 4), r"w2 must be \(hidden, 16\) .*, got \(16, 32\)"),
    "b2": (lambda: patch_embed(IMAGE, W1, B1, W2, B1, 4), r"b2 must be \(32,\)"),
    "b2 alone": (lambda: patch_embed(IMAGE, W1, B1, None, B2, 4), "needs w2, which is None"),
    "dtypes": (lambda: patch_embed(IMAGE, W1.bfloat16(), B1, W2, B2, 4), "one floating dtype, got torch.bfloat16, t"),
    "t above": (lambda: EMBED(IMAGE, t=T + 0.5, noise_seed=SEED), r"t must lie in \[0, 1\], .*, got 1.3"),
    "t below": (lambda: EMBED(IMAGE, t=T - 0.5, noise_seed=SEED), r"t must lie in \[0, 1\], .*, got -0.2"),
    "t NaN": (lambda: EMBED(IMAGE, t=T * math.nan, noise_seed=SEED), r"t must lie in \[0, 1\], .*, got nan"),
    "t shape": (lambda: EMBED(IMAGE, t=T[:1], noise_seed=SEED), r"t must be floating of shape \(2,\), got .* \(1,\)"),
    "t alone": (lambda: EMBED(IMAGE, t=T), "t and noise_seed belong together"),
    "seed alone": (lambda: EMBED(IMAGE, noise_seed=SEED), "t and noise_seed belong together"),
    "seed number": (lambda: EMBED(IMAGE, t=T, noise_seed=5), "noise_seed must be an int64 tensor .*, got int"),
    "seed": (lambda: EMBED(IMAGE, t=T, noise_seed=T), "noise_seed must be an int64 tensor with one element, got"),
    "ids": (lambda: EMBED(IMAGE, t=T, noise_seed=SEED, sample_ids=IDS[:1]), r"sample_ids must be int64 of shape \(2,"),
    "conv stride": (
        lambda: BottleneckPatchEmbed.from_conv(nn.Conv2d(3, 8, 4, stride=2)),
        r"conv1 must have a square kernel, a stride of the same size .* stride \(2, 2\)",
    ),
    "conv order": (
        lambda: BottleneckPatchEmbed.from_conv(nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(6, 8, 1)),
        "second map must take the 8 features of the first, got 6",
    ),
    "conv kernel": (
        lambda: BottleneckPatchEmbed.from_conv(nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(8, 8, 2, stride=2)),
        r"conv2 must have a 1x1 kernel, got \(2, 2\)",
    ),
    "linear features": (
        lambda: BottleneckPatchEmbed.from_linear(nn.Sequential(nn.Linear(50, 8), nn.Linear(8, 8))),
        "takes 50 features, which is not in_channels 3 times the square",
    ),
    "linear kind": (
        lambda: BottleneckPatchEmbed.from_linear(nn.Sequential(nn.Linear(48, 8), nn.SiLU())),
        r"one or two Linear, got Sequential\(Linear, SiLU\)",
    ),
    "timm": (lambda: BottleneckPatchEmbed.from_timm(nn.Linear(2, 2)), "a Conv2d called proj, got Linear"),
    "sizes": (lambda: BottleneckPatchEmbed(3, 0, 8, 8), "patch_size must be at least 1, got 0"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_sentence(case):
    call, message = ERRORS[case]
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


# --- kernels -----------------------------------------------------------------------------------------------------


def test_kernels_equal_the_definitions_in_the_interpreter(run_interpreted):
    run_interpreted("test_pixels.py")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels_equal_the_definitions_on_the_gpu(dtype):
    checks.check_noise("cuda")
    large = [checks.Case(32, 2, 512, 768, 256), checks.Case(16, 4, 256, 256, 64), checks.Case(14, 2, 224, 448, 768)]
    for case in (*checks.CASES, *large):
        for noisy in (False, True):
            for kind in ("fp32", "bf16", "uint8", "channels_last", "sliced", "expanded"):
                checks.check_product(case, kind, dtype, noisy, "cuda")


def build_names(arch: int):
    """Every row of sm_90's tables with bfloat16 pixels; the widest for other pixels, patches and architectures."""
    from . import builds

    for noisy in (False, True):
        yield from builds.products(arch, "bf16", noisy, every=arch == 90)
    if arch == 90:
        yield from builds.products(arch, "uint8", True)
        yield from builds.products(arch, "fp32", True)
        yield from builds.products(arch, "bf16", True, 14)
        yield from builds.float_products(arch)
    yield builds.image_gradient(arch)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_matrix_kernels_build_with_matrix_instructions_and_without_spills(arch):
    pytest.importorskip("triton")
    from ..ahead_of_time import MAX_SHARED

    instruction = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}[arch]
    for name, made in build_names(arch):
        print(f"sm_{arch} {name}: {made.registers} registers, {made.stack} spilled, {made.shared} bytes shared")
        # What other architectures share is the 99 KB of the smallest; sm_100 keeps a few bytes on the stack.
        assert made.stack <= (32 if arch == 100 else 0), name
        assert made.shared <= (MAX_SHARED if arch == 90 else 101_376), name
        assert (instruction in made.ptx) == ("float32" not in name), name
        assert set(made.accesses("st")) == {16}, name
        # Most loads are cp.async; of the others none is narrower than t (4 bytes), ids and the seed (8).
        assert set(made.accesses("ld")) <= {4, 8, 16}, name
