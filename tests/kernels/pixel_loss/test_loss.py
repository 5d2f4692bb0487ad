"""The x-prediction loss: values, gradients, what is kept and moved, and that a training step stores no picture."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prx_kernels import patchify, philox_normal, reference, unpatchify, x_prediction_loss
from prx_kernels.pixel_loss import loss as pixel_loss
from prx_model import PRXConfig, PRXTransformer
from prx_model.flow import add_noise, velocity

from ..patch_embed import checks

T = torch.tensor([1e-3, 0.05, 0.4, 1.0])


def case(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Four predictions in patches of 4, and four pictures of 8x12."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(4, 6, 48, generator=generator, dtype=torch.float64)
    image = torch.randn(4, 3, 8, 12, generator=generator, dtype=torch.float64)
    return tokens.to(dtype).requires_grad_(), image.to(dtype)


def in_velocity_space(tokens: Tensor, image: Tensor, t_min: float = 0.05) -> Tensor:
    """Mean squared difference of two velocities with explicit noise, float64: one loss a sample."""
    tokens, image, t = tokens.double(), image.double(), T.double()
    noisy = add_noise(image, philox_normal(torch.tensor(1), tuple(image.shape)).double(), t)
    predicted = unpatchify(tokens, 4, 8, 12)
    return (
        (velocity(noisy, predicted, t, t_min=t_min) - velocity(noisy, image, t, t_min=t_min)).square().mean((1, 2, 3))
    )


# --- values and gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("t_min", [0.05, 0.5])
def test_loss_and_gradient_equal_the_velocity_space_formula(reduction, t_min):
    tokens, image = case()
    expected = in_velocity_space(tokens, image, t_min)
    expected = expected.mean() if reduction == "mean" else expected
    loss = x_prediction_loss(tokens, image, T, 4, t_min=t_min, reduction=reduction)
    assert loss.dtype == torch.float32
    # Float32 sums of 288 squares against float64.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    weight = torch.tensor([1.0, -0.5, 3.0, 0.0]) if reduction == "none" else torch.tensor(0.7)
    (got,) = torch.autograd.grad(loss, tokens, weight)
    (wanted,) = torch.autograd.grad(expected, tokens, weight.double())
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)


def test_loss_without_gradient_is_the_same():
    tokens, image = case()
    for reduction in ("mean", "none"):
        with_gradient = x_prediction_loss(tokens, image, T, 4, reduction=reduction)
        without = x_prediction_loss(tokens.detach(), image, T, 4, reduction=reduction)
        torch.testing.assert_close(without, with_gradient, rtol=1e-6, atol=0)
        assert not without.requires_grad


@pytest.mark.parametrize("needs", [True, False])
def test_both_gives_the_mean_and_the_losses_that_it_is_the_mean_of(needs):
    tokens, image = case()
    tokens = tokens.detach().requires_grad_(needs)
    mean, samples = x_prediction_loss(tokens, image, T, 4, reduction="both")
    assert torch.equal(mean, x_prediction_loss(tokens, image, T, 4))
    assert torch.equal(samples, x_prediction_loss(tokens, image, T, 4, reduction="none"))
    assert not samples.requires_grad
    if needs:
        (got,) = torch.autograd.grad(mean, tokens)
        (wanted,) = torch.autograd.grad(x_prediction_loss(tokens, image, T, 4), tokens)
        assert torch.equal(got, wanted)


def test_uint8_pictures_are_scaled_to_minus_one_and_one():
    tokens, _ = case()
    image = torch.randint(0, 256, (4, 3, 8, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    expected = x_prediction_loss(tokens, image.float() / 127.5 - 1, T, 4)
    assert torch.equal(x_prediction_loss(tokens, image, T, 4), expected)
    assert x_prediction_loss(patchify(image.float() / 127.5 - 1, 4), image, T, 4) == 0


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_in_float64(reduction):
    tokens, image = case(torch.float64)
    assert torch.autograd.gradcheck(lambda x: x_prediction_loss(x, image, T, 4, reduction=reduction), tokens)


def test_a_picture_that_wants_a_gradient_gets_one():
    tokens, image = case(torch.float64)
    image.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: x_prediction_loss(x, y, T, 4), (tokens, image))


def test_float16_gradients_of_a_large_batch_do_not_underflow():
    """1/elements alone is 4e-8 here, below half of float16's smallest number; a loss scale lifts it in the backward."""
    tokens, image = torch.zeros(8, 64, 3072, dtype=torch.float16, requires_grad=True), torch.ones(8, 3, 256, 256)
    scale = 2.0**16
    (grad,) = torch.autograd.grad(scale * x_prediction_loss(tokens, image, torch.ones(8), 32), tokens)
    assert grad.dtype == torch.float16
    expected = -2 * scale / image.numel()
    # One rounding of 2·error, which is exact, and one of the product, in float16's subnormal steps of 6e-8 at most.
    torch.testing.assert_close(grad.double().unique(), torch.tensor([expected]).double(), rtol=1e-3, atol=0)


# --- what the backward does --------------------------------------------------------------------------------------


def test_a_graph_that_is_kept_gives_the_same_gradient_each_time():
    tokens, image = case()
    loss = x_prediction_loss(tokens, image, T, 4)
    first = torch.autograd.grad(loss * 3, tokens, retain_graph=True)[0].clone()
    kept = torch.autograd.grad(loss, tokens, retain_graph=True)[0]
    again = torch.autograd.grad(loss * 3, tokens)[0]
    assert torch.equal(first, again)
    torch.testing.assert_close(first, 3 * kept)


def test_gradients_accumulate_beside_another_loss():
    tokens, image = case()
    (x_prediction_loss(tokens, image, T, 4) + tokens.square().sum()).backward()
    x_prediction_loss(tokens, image, T, 4).backward()
    (one,) = torch.autograd.grad(x_prediction_loss(tokens, image, T, 4), tokens)
    torch.testing.assert_close(tokens.grad, 2 * one + 2 * tokens.detach())


def test_second_order_is_an_error_and_not_zero():
    tokens, image = case()
    loss = x_prediction_loss(tokens, image, T, 4) * tokens.sum()
    (grad,) = torch.autograd.grad(loss, tokens, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_opcheck():
    tokens, image = (x.detach() for x in case())
    check = torch.library.opcheck
    check(pixel_loss._loss, (tokens, image, T, 4, 0.05))
    check(pixel_loss._loss_and_gradient, (tokens, image, T, 4, 0.05, 0.1))
    for factor in (T, torch.tensor(0.5)):
        check(pixel_loss._scale, (tokens, factor, 0.5))
        check(pixel_loss._scale_, (tokens, factor, 0.5))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_loss_equals_eager_and_leaves_the_scaling_to_the_compiler(reduction):
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    tokens, image = case()

    def run(tokens, image, t):
        return 0.5 * x_prediction_loss(2 * tokens, image, t, 4, reduction=reduction).sum()

    compiled = torch.compile(run, fullgraph=True)
    actual, codes = run_and_get_code(lambda: torch.autograd.grad(compiled(tokens, image, T), tokens))
    torch.testing.assert_close(actual, torch.autograd.grad(run(tokens, image, T), tokens))
    assert any("prx.x_prediction_loss_gradient" in code for code in codes)
    assert not any("scale_samples" in code for code in codes)


# --- what is stored ----------------------------------------------------------------------------------------------


class Stored(TorchDispatchMode):
    """Names of the ops that made storage for `elements` values or more."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.made, self.storages = elements, [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in (*args, *self.storages) if isinstance(x, Tensor)}
        for out in result if isinstance(result, tuple | list) else [result]:
            if isinstance(out, Tensor) and out.numel() >= self.elements and out.untyped_storage()._cdata not in known:
                self.made.append(function._schema.name)
                self.storages.append(out)
        return result


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("bottleneck", [16, None])
def test_a_training_step_stores_only_the_prediction_and_its_gradient(dtype, bottleneck):
    """At prx-512's picture and patch, on the meta device: no noise, no x_t, no velocity and no unfolded tensor."""
    config = PRXConfig(
        patch_size=32, context_in_dim=16, hidden_size=64, num_heads=2, depth=2, axes_dim=(16, 16),
        bottleneck_size=bottleneck,
    )  # fmt: skip
    with torch.device("meta"):
        model = PRXTransformer(config)
        image, text = torch.zeros(4, 3, 512, 512, dtype=dtype), torch.zeros(4, 5, 16)
        t, seed, ids = torch.zeros(4), torch.zeros(1, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
        with Stored(image.numel()) as stored:
            tokens = model.forward_tokens(image, t, text, noise_seed=seed, sample_ids=ids)
            x_prediction_loss(tokens, image, t, 32).backward()
    # The prediction, from the last layer's product, and its gradient.
    assert len(stored.made) == 2
    assert stored.made[0] in ("aten::addmm", "aten::mm")
    assert stored.made[1] == "prx::x_prediction_loss_gradient"


def test_only_the_gradient_is_kept_for_the_backward():
    tokens, image = case()
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x):
        loss = x_prediction_loss(tokens, image, T, 4)
    assert kept == [(4, 6, 48)]
    (grad,) = torch.autograd.grad(loss, tokens)
    gc.collect()
    assert grad.shape == tokens.shape


@pytest.mark.parametrize("patch", [8, 32])
def test_a_model_with_noise_in_its_embedding_equals_one_that_is_given_x_t(patch):
    torch.manual_seed(0)
    config = PRXConfig(
        patch_size=patch, context_in_dim=16, hidden_size=32, num_heads=2, depth=1, axes_dim=(8, 8), bottleneck_size=16
    )
    model = PRXTransformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    image = torch.randint(0, 256, (2, 3, patch, 2 * patch), dtype=torch.uint8)
    t, text, seed, ids = torch.tensor([0.2, 0.9]), torch.randn(2, 3, 16), torch.tensor(3), torch.tensor([5, 6])
    scaled = reference.scaled(image)
    x_t = add_noise(scaled, philox_normal(seed, tuple(image.shape), sample_ids=ids), t, noise_scale=1.5)
    losses, gradients = [], []
    for tokens in (
        model.forward_tokens(x_t, t, text),
        model.forward_tokens(image, t, text, noise_seed=seed, sample_ids=ids, noise_scale=1.5),
    ):
        losses.append(x_prediction_loss(tokens, scaled, t, patch))
        gradients.append(torch.autograd.grad(losses[-1], list(model.parameters())))
    assert losses[0] == losses[1]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)  # float32 sums in another order


# --- errors and kernels ------------------------------------------------------------------------------------------

TOKENS, IMAGE = (x.detach() for x in case())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: x_prediction_loss(TOKENS, IMAGE[..., :11], T, 4), ValueError, "8x11 is not a multiple .* 8x8 would"),
        (lambda: x_prediction_loss(TOKENS, IMAGE[:, :2], T, 4), ValueError, r"tokens must be \(4, 6, 32\)"),
        (lambda: x_prediction_loss(TOKENS, IMAGE, T[:2], 4), ValueError, r"t \(4,\), got .* and \(2,\)"),
        (lambda: x_prediction_loss(TOKENS, IMAGE.long(), T, 4), TypeError, "floating or uint8, got .* torch.int64"),
        (lambda: x_prediction_loss(TOKENS.byte(), IMAGE, T, 4), TypeError, "tokens must be floating"),
        (lambda: x_prediction_loss(TOKENS, IMAGE.to("meta"), T, 4), ValueError, "one device, got cpu, meta and cpu"),
        (lambda: x_prediction_loss(TOKENS.to("meta"), IMAGE, T, 4), ValueError, "one device, got meta, cpu and cpu"),
        (lambda: x_prediction_loss(TOKENS, IMAGE, T.to("meta"), 4), ValueError, "one device, got cpu, cpu and meta"),
    ],
)
def test_errors_are_one_sentence(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels_equal_the_definitions_on_the_gpu(dtype):
    for size in (*checks.CASES, checks.Case(32, 3, 512, 768, 16), checks.Case(8, 2, 256, 128, 16)):
        for kind in ("fp32", "bf16", "uint8", "channels_last", "sliced", "expanded"):
            checks.check_loss(size, kind, dtype, "cuda")
    checks.check_scale(dtype, "cuda")


@pytest.mark.gpu
def test_a_step_on_the_gpu_peaks_at_the_prediction_and_its_gradient():
    image = torch.randint(0, 256, (8, 3, 512, 512), dtype=torch.uint8, device="cuda")
    tokens = torch.randn(8, 256, 3072, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    t, before = torch.rand(8, device="cuda"), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    x_prediction_loss(tokens, image, t, 32).backward()
    # The gradient in bfloat16; partial sums and the allocator's rounding below one part in ten of it.
    assert torch.cuda.max_memory_allocated() - before < 1.1 * tokens.numel() * 2


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_streaming_kernels_build_without_spills_and_move_sixteen_bytes(arch):
    pytest.importorskip("triton")
    from ..patch_embed import builds

    for name, made in builds.streams(arch):
        print(f"sm_{arch} {name}: {made.registers} registers, {made.stack} spilled, {made.shared} bytes shared")
        assert made.stack == 0, name
        stores, loads = made.accesses("st"), made.accesses("ld")
        # The loss also writes one partial sum and reads one t.
        assert 16 in stores, name
        assert set(stores) <= ({4, 16} if name.startswith("loss") else {16}), name
        assert set(loads) <= {4, 8, 16}, name
        assert 16 in loads or name.startswith(("normal", "uniform")), name
