"""Attention: one result by mask, by packing and sample by sample; and nothing ever expanded or leaked."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prx_model import PRXConfig, PRXTransformer
from prx_model import attention as attention_module
from prx_model.attention import BACKENDS, check_backend, pack_keys

BATCH, HEADS, IMAGE, TEXT, HEAD_DIM = 4, 2, 6, 5, 8
MASKS = {
    "right": [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]],
    "left": [[0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]],
    "scattered": [[1, 0, 1, 0, 1], [0, 1, 0, 1, 0], [0, 0, 1, 0, 0], [1, 1, 0, 0, 1]],
    "some without text": [[0, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]],
}
mask_param = pytest.mark.parametrize(
    "mask", [pytest.param(torch.tensor(m).bool(), id=name) for name, m in MASKS.items()]
)


def make_heads(seed: int = 0) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Query, image keys and values, text keys and values, in the layout of the model: views of (batch, tokens, …)."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (IMAGE, IMAGE, IMAGE, TEXT, TEXT)
    q, ik, iv, tk, tv = (
        torch.randn(BATCH, n, HEADS, HEAD_DIM, generator=generator).transpose(1, 2).requires_grad_() for n in sizes
    )
    return q, (ik, iv), (tk, tv)


def attend(
    query: Tensor, image: tuple[Tensor, Tensor], text: tuple[Tensor, Tensor], mask: Tensor | None, backend: Any
) -> Tensor:
    key, value = (torch.cat(parts, dim=2) for parts in zip(text, image, strict=True))
    return attention_module.attend(query, key, value, mask, backend)


def sample_by_sample(
    query: Tensor, image: tuple[Tensor, Tensor], text: tuple[Tensor, Tensor], mask: Tensor | None
) -> Tensor:
    """The definition: softmax over the real keys of one sample, written out, without padding or masks."""
    out = []
    for i in range(query.shape[0]):
        real = slice(None) if mask is None else mask[i]
        key = torch.cat((text[0][i][:, real], image[0][i]), dim=1)
        value = torch.cat((text[1][i][:, real], image[1][i]), dim=1)
        weights = (query[i] @ key.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(dim=-1)
        out.append(weights @ value)
    return torch.stack(out)


class _Segments(torch.autograd.Function):
    """A packed kernel on CPU: one SDPA a segment; what it need not write is NaN, as `torch.empty` may be on a GPU."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v, cu_q, cu_k)
        return _Segments.run(q, k, v, cu_q, cu_k)

    @staticmethod
    def run(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Tensor:
        pieces = []
        for i in range(len(cu_q) - 1):
            a, b = slice(int(cu_q[i]), int(cu_q[i + 1])), slice(int(cu_k[i]), int(cu_k[i + 1]))
            heads = (part.transpose(0, 1) for part in (q[a], k[b], v[b]))
            pieces.append(F.scaled_dot_product_attention(*heads).transpose(0, 1))
        return torch.cat(pieces)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, cu_q, cu_k = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [part.detach().requires_grad_() for part in (q, k, v)]
            dq, dk, dv = torch.autograd.grad(_Segments.run(*leaves, cu_q, cu_k), leaves, grads[0])
        for unwritten in (dk, dv):
            unwritten[int(cu_k[-1]) :] = float("nan")
        return dq, dk, dv, None, None


def packed_on_cpu(monkeypatch: pytest.MonkeyPatch, backend: str) -> list[tuple[int, int]]:
    """Put `_Segments` where the kernel of `backend` is; gives the (max_q, max_k) of each call."""
    calls: list[tuple[int, int]] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert int(cu_q.diff().max()) <= max_q
        assert int(cu_k.diff().max()) <= max_k
        calls.append((max_q, max_k))
        out = _Segments.apply(q, k, v, cu_q, cu_k)
        assert isinstance(out, Tensor)
        return out

    monkeypatch.setattr(attention_module, f"_{backend}", kernel)
    return calls


def gradients(out: Tensor, heads: tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    return torch.autograd.grad((out * weight).sum(), (heads[0], *heads[1], *heads[2]))


@mask_param
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_equals_sample_by_sample_without_padding(
    backend: Any, mask: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = packed_on_cpu(monkeypatch, backend) if backend != "sdpa" else [(0, 0)]
    heads = make_heads()
    out, expected = attend(*heads, mask, backend), sample_by_sample(*heads, mask)
    assert len(calls) == 1
    # Sums of at most 11 float32 products and weights, in another order: a few units of 6e-8 on values of order 1.
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-6)
    for got, wanted in zip(gradients(out, heads), gradients(expected, heads), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=5e-6)


@mask_param
@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_gets_gradient_exactly_zero(backend: Any, mask: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed kernels leave the gradient of unused rows unwritten: it must not reach the text projection."""
    if backend != "sdpa":
        packed_on_cpu(monkeypatch, backend)
    heads = make_heads()
    for gradient in gradients(attend(*heads, mask, backend), heads)[3:]:
        at_token = gradient.transpose(1, 2)
        assert torch.count_nonzero(at_token[~mask]) == 0
        assert torch.isfinite(at_token).all()
        assert (at_token[mask].abs().sum(dim=(1, 2)) > 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_mask_equals_a_mask_of_ones_and_sample_by_sample(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend != "sdpa":
        packed_on_cpu(monkeypatch, backend)
    heads = make_heads()
    without = attend(*heads, None, backend)
    with_ones = attend(*heads, torch.ones(BATCH, TEXT, dtype=torch.bool), backend)
    torch.testing.assert_close(without, with_ones, rtol=1e-5, atol=2e-6)  # as above
    torch.testing.assert_close(without, sample_by_sample(*heads, None), rtol=1e-5, atol=2e-6)


@mask_param
def test_packed_keys_are_the_real_keys_in_order_and_the_shape_is_the_mask_s_no_matter_what(mask: Tensor) -> None:
    _, image, text = make_heads()
    key, value = torch.cat((text[0], image[0]), dim=2), torch.cat((text[1], image[1]), dim=2)
    packed_key, packed_value, cumulative = pack_keys(key, value, mask)
    assert packed_key.shape == packed_value.shape == (BATCH * (TEXT + IMAGE), HEADS, HEAD_DIM)
    lengths = mask.sum(dim=1) + IMAGE
    assert cumulative.tolist() == [0, *lengths.cumsum(0).tolist()]
    for i in range(BATCH):
        segment = slice(int(cumulative[i]), int(cumulative[i + 1]))
        expected_key = torch.cat((text[0][i][:, mask[i]], image[0][i]), dim=1).transpose(0, 1)
        expected_value = torch.cat((text[1][i][:, mask[i]], image[1][i]), dim=1).transpose(0, 1)
        assert torch.equal(packed_key[segment], expected_key)
        assert torch.equal(packed_value[segment], expected_value)


def test_packing_without_a_mask_keeps_all_keys() -> None:
    _, image, text = make_heads()
    key, value = torch.cat((text[0], image[0]), dim=2), torch.cat((text[1], image[1]), dim=2)
    packed_key, packed_value, cumulative = pack_keys(key, value, None)
    assert torch.equal(packed_key.reshape(BATCH, -1, HEADS, HEAD_DIM).transpose(1, 2), key)
    assert torch.equal(packed_value.reshape(BATCH, -1, HEADS, HEAD_DIM).transpose(1, 2), value)
    assert cumulative.tolist() == [0, 11, 22, 33, 44]
    assert cumulative.dtype == torch.int32


def test_mask_is_never_expanded_over_heads_or_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    real = F.scaled_dot_product_attention

    def record(*args: Any, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        assert attn_mask is not None
        seen.append((*attn_mask.shape, attn_mask.untyped_storage().nbytes()))
        return real(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    config = PRXConfig(patch_size=4, context_in_dim=8, hidden_size=32, num_heads=2, depth=3, axes_dim=(8, 8))
    mask = torch.tensor(MASKS["left"]).bool()
    PRXTransformer(config)(torch.zeros(BATCH, 3, 8, 12), torch.ones(1), torch.zeros(BATCH, TEXT, 8), mask)
    assert seen == [(BATCH, 1, 1, TEXT + 6, BATCH * (TEXT + 6))] * 3


@pytest.mark.parametrize("backend", ["varlen", "flash"])
def test_whole_model_gives_the_same_packed_and_masked(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    packed_on_cpu(monkeypatch, backend)
    monkeypatch.setattr("prx_model.transformer.check_backend", lambda *_: None)
    config = PRXConfig(patch_size=4, context_in_dim=8, hidden_size=32, num_heads=2, depth=2, axes_dim=(8, 8))
    generator = torch.Generator().manual_seed(4)
    masked, packed = PRXTransformer(config), PRXTransformer(config, attention=backend)
    with torch.no_grad():
        for parameter in masked.parameters():
            parameter.normal_(std=0.2, generator=generator)
    packed.load_state_dict(masked.state_dict())
    image = torch.randn(BATCH, 3, 8, 12, generator=generator)
    text = torch.randn(BATCH, TEXT, 8, generator=generator)
    inputs = (image, torch.rand(BATCH, generator=generator), text, torch.tensor(MASKS["some without text"]).bool())
    outputs = [model(*inputs) for model in (masked, packed)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)  # float32 rounding through two blocks
    for model, out in zip((masked, packed), outputs, strict=True):
        out.square().mean().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    for (name, a), b in zip(masked.named_parameters(), packed.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert (a.grad - b.grad).norm() <= 1e-4 * a.grad.norm(), name  # as against diffusers


# --- errors -------------------------------------------------------------------------------------------------------


def test_unknown_backend_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match="unknown attention backend 'xformers'; there are sdpa, varlen, flash"):
        check_backend("xformers", torch.device("cpu"))


@pytest.mark.parametrize("backend", ["varlen", "flash"])
def test_packed_backends_are_refused_on_cpu_when_the_model_runs(backend: Any) -> None:
    config = PRXConfig(patch_size=4, context_in_dim=8, hidden_size=32, num_heads=2, depth=1, axes_dim=(8, 8))
    model = PRXTransformer(config, attention=backend)
    with pytest.raises(
        ValueError, match=f"attention backend '{backend}' needs a CUDA device, this is 'cpu'; use 'sdpa'"
    ):
        model(torch.zeros(1, 3, 8, 8), torch.ones(1), torch.zeros(1, 2, 8))


def test_flash_without_its_package_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module, "find_spec", lambda _name: None)
    with pytest.raises(ValueError, match="'flash' needs the package flash-attn"):
        check_backend("flash", torch.device("cuda"))
    with pytest.raises(ValueError, match="'varlen' needs torch >= 2.10"):
        check_backend("varlen", torch.device("cuda"))


def test_torch_has_the_varlen_attention_that_the_backend_calls() -> None:
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    names = list(inspect.signature(varlen_attn).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    check_backend("varlen", torch.device("cuda"))


# --- on a GPU -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    "backend",
    [
        "varlen",
        pytest.param(
            "flash",
            marks=pytest.mark.skipif(not attention_module._has_flash_attention(), reason="needs flash-attn"),
        ),
    ],
)
@mask_param
def test_packed_kernels_equal_sdpa_in_bfloat16_on_a_gpu(backend: Any, mask: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = (256, 256, 256, TEXT, TEXT)
    q, ik, iv, tk, tv = (
        torch.randn(BATCH, 4, n, 64, generator=generator).cuda().bfloat16().requires_grad_() for n in sizes
    )
    heads = (q, (ik, iv), (tk, tv))
    exact_heads = (q.float(), (ik.float(), iv.float()), (tk.float(), tv.float()))
    mask = mask.cuda()
    weight = torch.randn(q.shape, generator=generator).cuda()

    def grads(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((out.float() * weight).sum(), (q, ik, iv, tk, tv))

    exact = sample_by_sample(*exact_heads, mask)
    masked, packed = attend(*heads, mask, "sdpa"), attend(*heads, mask, backend)
    pairs = zip((masked, *grads(masked)), (packed, *grads(packed)), (exact, *grads(exact)), strict=True)
    for by_mask, by_packing, truth in pairs:
        # Twice the error of the same-dtype formula (flash-attention's own rule), plus one bfloat16 rounding.
        allowed = 2 * (by_mask.float() - truth.float()).abs().max() + 2.0**-8 * truth.float().abs().max()
        assert (by_packing.float() - truth.float()).abs().max() <= allowed
