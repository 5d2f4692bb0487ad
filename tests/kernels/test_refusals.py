"""What the kernels' public functions do not do, they refuse by name: never a silent zero, a lost term or a cast."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from prx_kernels import (
    BottleneckPatchEmbed,
    enter_route,
    exit_route,
    gather_tokens,
    geglu,
    norm_modulate,
    patch_embed,
    patchify,
    philox_normal,
    qk_norm_rope,
    reference,
    residual_gate_norm_modulate,
    scatter_tokens,
    sym_gemm,
    x_prediction_loss,
)

KEEP = torch.tensor([[0, 2], [1, 3]])
IMAGE, T = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.7])
TOKENS, ROWS, PREDICTED = torch.randn(2, 6, 4), torch.randn(2, 2, 4), torch.randn(2, 4, 48)
WEIGHT = torch.randn(5, 48)
VECTORS = torch.randn(2, 12)
QKV, NORM, ROPE = torch.randn(2, 3, 3 * 2 * 4), torch.rand(4), torch.randn(1, 3, 2, 2)


FUNCTIONS = [
    (lambda x: gather_tokens(x, KEEP), TOKENS),
    (lambda x: scatter_tokens(x, ROWS, KEEP), TOKENS),
    (lambda y: exit_route(y, TOKENS, KEEP), ROWS),
    (lambda x: enter_route(x, KEEP)[0], TOKENS),
    (lambda image: patch_embed(image, WEIGHT, None, None, None, 4), IMAGE),
    (lambda weight: patch_embed(IMAGE, weight, None, None, None, 4), WEIGHT),
    (lambda tokens: x_prediction_loss(tokens, IMAGE, T, 4), PREDICTED),
    (lambda qkv: qk_norm_rope(qkv, NORM, NORM, ROPE)[0], QKV),
    (lambda weight: qk_norm_rope(QKV, weight, NORM, ROPE)[0], NORM),
    (lambda gate: geglu(gate, TOKENS), TOKENS),
    (lambda up: geglu(TOKENS, up), TOKENS),
    (lambda x: residual_gate_norm_modulate(x, x, VECTORS)[1], TOKENS),
    (lambda vectors: residual_gate_norm_modulate(TOKENS, TOKENS, vectors)[0], VECTORS),
    (lambda vectors: norm_modulate(TOKENS, vectors[:, :8])[1], VECTORS),
]


@pytest.mark.parametrize(("function", "x"), FUNCTIONS)
def test_forward_mode_derivatives_are_refused_not_zero(function, x):
    """MeanFlow and sCM differentiate forward; torch drops the tangent in an op that has no rule for it."""
    with pytest.raises(NotImplementedError, match="no forward-mode derivative here; the definitions in"):
        torch.func.jvp(function, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        function(forward_ad.make_dual(x, torch.ones_like(x)))
    function(x)  # and nothing of it stays


@pytest.mark.parametrize(("function", "x"), FUNCTIONS)
@pytest.mark.parametrize("transform", ["grad", "vjp", "jacrev", "vmap of grad", "grad of vmap", "vmap of a graph"])
def test_derivatives_of_torch_func_are_right_or_refused_by_name(function, x, transform):
    scalar = lambda x: function(x).square().sum()  # noqa: E731
    batched = lambda x: torch.func.vmap(scalar)(torch.stack([x, x])).sum()  # noqa: E731
    calls = {
        "grad": lambda: torch.func.grad(scalar)(x),
        "vjp": lambda: torch.func.vjp(scalar, x)[1](torch.tensor(1.0))[0],
        "jacrev": lambda: torch.func.jacrev(scalar)(x),
        "vmap of grad": lambda: torch.func.vmap(torch.func.grad(scalar))(x[None])[0],
        "grad of vmap": lambda: torch.func.grad(batched)(x) / 2,
        "vmap of a graph": lambda: torch.autograd.grad(batched(x.clone().requires_grad_()), [])[0],
    }
    with pytest.raises(NotImplementedError, match=r"no derivative under torch.func \(grad, vjp, jacrev"):
        calls[transform]()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(("function", "x"), [pair for number, pair in enumerate(FUNCTIONS) if number != 3])
def test_vmap_without_derivatives_is_right(function, x):
    both = torch.stack([x, x * 0.5])
    torch.testing.assert_close(torch.func.vmap(function)(both), torch.stack([function(part) for part in both]))


ON_ONE_DEVICE = [
    (lambda image, w1, w2: patch_embed(image, w1, None, w2, None, 4), (IMAGE, WEIGHT, torch.randn(4, 5))),
    (gather_tokens, (TOKENS, KEEP)),
    (scatter_tokens, (TOKENS, ROWS, KEEP)),
    (enter_route, (TOKENS, KEEP)),
    (exit_route, (ROWS, TOKENS, KEEP)),
    (geglu, (TOKENS, TOKENS)),
    (norm_modulate, (TOKENS, VECTORS[:, :8])),
    (residual_gate_norm_modulate, (TOKENS, TOKENS, VECTORS)),
    (qk_norm_rope, (QKV, NORM, NORM, ROPE, torch.randn(2, 5, 2 * 2 * 4), NORM)),
    (x_prediction_loss, (PREDICTED, IMAGE, T, 4)),
    (sym_gemm, (WEIGHT, WEIGHT)),
]


@pytest.mark.parametrize(("function", "arguments"), ON_ONE_DEVICE)
def test_tensors_on_several_devices_are_refused_whichever_is_elsewhere(function, arguments):
    """Some gave memory that nobody had written."""
    function(*arguments)
    for moved, given in enumerate(arguments):
        if isinstance(given, torch.Tensor):
            changed = [x.to("meta") if place == moved else x for place, x in enumerate(arguments)]
            with pytest.raises(ValueError, match=r"one device, got .*meta"):
                function(*changed)


def test_the_definitions_have_forward_mode_derivatives():
    direction = torch.randn_like(PREDICTED)
    loss = lambda tokens: reference.x_prediction_loss(tokens, IMAGE, T, 4)  # noqa: E731
    _, tangent = torch.func.jvp(loss, (PREDICTED,), (direction,))
    eps = 1e-3
    expected = (loss(PREDICTED + eps * direction) - loss(PREDICTED - eps * direction)) / (2 * eps)
    torch.testing.assert_close(tangent, expected, rtol=1e-3, atol=1e-2)


def test_position_embeddings_of_a_patch_embedding_are_not_lost():
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    with pytest.raises(ValueError, match="PatchEmbed adds position embeddings, which would be lost"):
        BottleneckPatchEmbed.from_timm(embeddings.PatchEmbed(8, 8, 4, 3, 16))
    plain = embeddings.PatchEmbed(8, 8, 4, 3, 16, pos_embed_type=None)
    torch.testing.assert_close(BottleneckPatchEmbed.from_timm(plain)(IMAGE), plain(IMAGE), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: philox_normal(5, (2, 3)), TypeError, "seed must be a tensor of integers, got int"),
        (lambda: philox_normal(torch.tensor(5.7), (2, 3)), TypeError, "seed must be a tensor of integers, got torch."),
        (
            lambda: philox_normal(torch.tensor(5), (2, 3), sample_ids=torch.tensor([0.5, 0.7])),
            TypeError,
            "sample_ids must be a tensor of integers, got torch.float32",
        ),
        (lambda: philox_normal(torch.tensor(5), ()), ValueError, "shape must be (batch, ...), got ()"),
        (lambda: patchify(IMAGE, 0), ValueError, "patch_size must be at least 1, got 0"),
        (lambda: patchify(IMAGE[0], 4), ValueError, "image must be (batch, channels, H, W), got shape (3, 8, 8)"),
        (lambda: x_prediction_loss(PREDICTED, IMAGE[0], T, 4), ValueError, "image must be (batch, channels, H, W)"),
        (lambda: x_prediction_loss(PREDICTED, IMAGE, T.long(), 4), TypeError, "t must be floating, got torch.int64"),
        (lambda: x_prediction_loss(PREDICTED, IMAGE, T, 4, t_min=-1), ValueError, "t_min must not be negative, got -1"),
    ],
)
def test_wrong_arguments_are_named(call, error, said):
    with pytest.raises(error, match=re.escape(said)):
        call()


def test_a_batch_without_samples_has_noise_without_entries():
    assert philox_normal(torch.tensor(1), (0, 3)).shape == (0, 3)
    embed = BottleneckPatchEmbed(3, 4, 8, 16)
    assert embed(torch.zeros(0, 3, 8, 8), t=torch.zeros(0), noise_seed=torch.tensor(1)).shape == (0, 4, 16)


def test_the_loss_has_the_tokens_dtype_whatever_the_picture_has():
    loss = x_prediction_loss(nn.Parameter(PREDICTED), IMAGE.double(), T, 4, reduction="none")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, x_prediction_loss(PREDICTED, IMAGE, T, 4, reduction="none"))
    torch.library.opcheck(torch.ops.prx.x_prediction_loss, (PREDICTED, IMAGE.double(), T, 4, 0.05))
