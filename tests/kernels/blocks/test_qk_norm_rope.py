"""q/k norm, rotary positions and text before image in one pass: against plain PyTorch, and what the kernels become."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prx_kernels import qk_norm_rope, reference
from prx_kernels.blocks import attention_inputs as module

from . import checks


def call(case: checks.Case, *leaves: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    img, q_weight, k_weight, txt, txt_weight = leaves or case.floating
    packed = case.txt_offsets is not None and not case.packed_keys
    assert img is not None and q_weight is not None and k_weight is not None  # noqa: PT018
    return qk_norm_rope(
        img, q_weight, k_weight, case.rope, txt, txt_weight, txt_offsets=case.txt_offsets,
        txt_length=case.txt_length if packed else None, packed_keys=case.packed_keys, eps=checks.EPS,
    )  # fmt: skip


# --- what it computes --------------------------------------------------------------------------------------------


def test_it_is_norm_and_rotation_of_complex_numbers_and_text_before_the_image():
    """Written out with other means: RMSNorm of torch, complex products, one sample and head at a time."""
    case = checks.make((2, 3, 2, 8), "padded", torch.float32, "cpu")
    q, k, v = call(case)
    turn = torch.view_as_complex(case.rope)
    norms = {}
    for name, weight in (("q", case.q_weight), ("k", case.k_weight), ("text", case.txt_k_weight)):
        norms[name] = nn.RMSNorm(8, eps=checks.EPS)
        norms[name].weight.data = weight
    for b in range(2):
        for h in range(2):
            parts = case.img_qkv[b].view(3, 3, 2, 8)[:, :, h]  # token, part, feature
            for got, part, name in ((q[b, h], 0, "q"), (k[b, h, 4:], 1, "k")):
                normed = torch.view_as_complex(norms[name](parts[:, part]).view(3, 4, 2)) * turn[b]
                torch.testing.assert_close(got, torch.view_as_real(normed).flatten(1))
            text = case.txt_kv[b].view(4, 2, 2, 8)[:, :, h]
            torch.testing.assert_close(k[b, h, :4], norms["text"](text[:, 0]))
            assert torch.equal(v[b, h], torch.cat((text[:, 1], parts[:, 2])))


def test_packed_text_gives_the_padded_form_and_packed_keys_its_real_rows():
    case = checks.make((3, 4, 2, 8), "packed", torch.float32, "cpu")
    lengths = case.txt_offsets.diff().tolist()
    q, k, v = call(case)
    keys = checks.replace(case, packed_keys=True)
    packed_q, packed_k, packed_v = call(keys)
    assert torch.equal(packed_q, q.transpose(1, 2).flatten(0, 1))
    for whole, packed in ((k, packed_k), (v, packed_v)):
        samples = [torch.cat((whole[i, :, :n], whole[i, :, case.txt_length :]), dim=1) for i, n in enumerate(lengths)]
        real = torch.cat(samples, dim=1).transpose(0, 1)
        assert torch.equal(packed[: len(real)], real)
        assert torch.count_nonzero(packed[len(real) :]) == 0
        for i, n in enumerate(lengths):
            assert torch.count_nonzero(whole[i, :, n : case.txt_length]) == 0


def test_without_text_it_is_drop_in_for_a_block_with_one_projection():
    case = checks.make((2, 4, 2, 8), "none", torch.float32, "cpu")
    q, k, v = call(case)
    assert q.shape == k.shape == v.shape == (2, 2, 4, 8)
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    assert out.shape == (2, 4, 16)
    assert v.data_ptr() != case.img_qkv.data_ptr()


@pytest.mark.parametrize("text", checks.TEXTS)
def test_gradients(text):
    case = checks.make((2, 3, 2, 4), text, torch.float64, "cpu", gaps=True)
    case = checks.replace(case, rope=case.rope.double())
    leaves = [x if x is None else x.detach().requires_grad_() for x in case.floating]
    assert torch.autograd.gradcheck(lambda *given: call(case, *given), leaves)


@pytest.mark.parametrize("text", checks.TEXTS)
def test_the_definition_of_the_backward_is_that_of_autograd(text):
    case = checks.make((3, 3, 2, 4), text, torch.float64, "cpu")
    grads = checks.gradients(case)
    leaves = [x for x in case.floating if x is not None]
    for x in leaves:
        x.requires_grad_()
    wanted = torch.autograd.grad(case.definition(), leaves, [g.nan_to_num() for g in grads])
    got = case.definition_backward(grads)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("text", checks.TEXTS)
def test_opcheck(text):
    case = checks.make((2, 3, 2, 4), text, torch.float32, "cpu")
    leaves = [x if x is None else x.detach().requires_grad_() for x in case.floating]
    img, q_weight, k_weight, txt, txt_weight = leaves
    given = (img, q_weight, k_weight, case.rope, txt, txt_weight, case.txt_offsets)
    torch.library.opcheck(module._qk_norm_rope, (*given, case.txt_length, case.packed_keys, checks.EPS))
    plain = {"test_utils": ("test_schema", "test_faketensor")}
    grads = tuple(x.nan_to_num() for x in checks.gradients(case))
    torch.library.opcheck(module._backward, (*grads, *case.for_backward, case.packed_keys, checks.EPS), **plain)


@pytest.mark.parametrize("text", checks.TEXTS)
def test_it_compiles_as_one_graph_with_projections_and_attention_around_it(text):
    case = checks.make((2, 3, 2, 4), text, torch.float32, "cpu")
    leaves = [x.detach().requires_grad_() for x in case.floating if x is not None]
    absent = [None] * (5 - len(leaves))

    def around(*given: Tensor) -> Tensor:
        img, q_weight, k_weight, *text_part = given
        q, k, v = call(case, img * 2, q_weight, k_weight, *(x * 1 for x in text_part), *absent)
        if case.packed_keys:
            return torch.stack([q.sum(), k.square().sum(), v.sin().sum()]).sum()
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).sin().sum()

    torch._dynamo.reset()
    results = [f(*leaves) for f in (around, torch.compile(around, fullgraph=True, backend="aot_eager"))]
    torch.testing.assert_close(results[1], results[0])
    for a, b in zip(*(torch.autograd.grad(result, leaves) for result in results), strict=True):
        torch.testing.assert_close(a, b)


def test_the_queries_keep_the_order_of_tokens_so_that_attention_s_output_is_not_copied():
    q, k, v = call(checks.make((2, 3, 2, 4), "padded", torch.bfloat16, "cpu"))
    assert all(x.transpose(1, 2).is_contiguous() for x in (q, k, v))
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16


def test_an_empty_batch_has_no_keys_and_weights_without_gradient():
    weight = torch.ones(4, requires_grad=True)
    q, k, _ = qk_norm_rope(torch.zeros(0, 3, 24), weight, weight, torch.zeros(1, 3, 2, 2))
    assert q.shape == k.shape == (0, 2, 3, 4)
    (q.sum() + k.sum()).backward()
    assert torch.equal(weight.grad, torch.zeros(4))


# --- errors ------------------------------------------------------------------------------------------------------

IMG, W, ROPE = torch.zeros(2, 3, 24), torch.ones(4), torch.zeros(1, 3, 2, 2)
OFFSETS = torch.zeros(3, dtype=torch.int32)
PLAIN = (IMG, W, W, ROPE)
PADDED, PACKED = torch.zeros(2, 1, 16), torch.zeros(2, 16)
WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "width": ((IMG[..., :20], W, W, ROPE), {}, ValueError, r"must be \(batch, N, 3·heads·4\), got \(2, 3, 20\)"),
    "odd": ((IMG, W[:3], W[:3], ROPE), {}, ValueError, r"\(D,\) with D even"),
    "wide": ((IMG, torch.ones(258), torch.ones(258), ROPE), {}, ValueError, "at most 256 features, got 258"),
    "rope": ((IMG, W, W, ROPE[:, :2]), {}, ValueError, r"rope must be \(1 or 2, 3, 2, 2\)"),
    "table": ((IMG, W, W, ROPE.clone().requires_grad_()), {}, ValueError, "rope gets no gradient"),
    "integers": ((IMG.int(), W, W, ROPE), {}, TypeError, "must be floating, got torch.int32"),
    "text dtype": ((*PLAIN, PADDED.half(), W), {}, TypeError, "dtype of img_qkv"),
    "text weight": ((*PLAIN, PADDED), {}, ValueError, "txt_k_weight must be"),
    "text width": ((*PLAIN, PADDED[..., :8], W), {}, ValueError, r"\(2, T, 16\), got \(2, 1, 8\)"),
    "packed": ((*PLAIN, PADDED, W), {"packed_keys": True}, ValueError, "go with packed"),
    "rows": ((*PLAIN, PADDED, W), {"txt_offsets": OFFSETS}, ValueError, r"\(rows, 16\), got \(2, 1, 16\)"),
    "length": ((*PLAIN, PACKED, W), {"txt_offsets": OFFSETS}, ValueError, "txt_length from 0 on"),
    "int64": ((*PLAIN, PACKED, W), {"txt_offsets": OFFSETS.long()}, TypeError, "must be int32, got torch.int64"),
    "samples": ((*PLAIN, PACKED, W), {"txt_offsets": OFFSETS[:2]}, ValueError, r"must be \(3,\), got \(2,\)"),
    "alone": (PLAIN, {"txt_length": 3}, ValueError, "go with txt_kv"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_are_sentences(case):
    given, named, error, message = WRONG[case]
    with pytest.raises(error, match=message) as caught:
        qk_norm_rope(*given, **named)
    assert "\n" not in str(caught.value)


def test_forward_mode_derivatives_are_refused():
    with pytest.raises(NotImplementedError, match="qk_norm_rope has no forward-mode derivative"):
        torch.func.jvp(lambda x: qk_norm_rope(x, *PLAIN[1:])[0], (IMG,), (torch.ones_like(IMG),))
    out, tangent = torch.func.jvp(lambda x: reference.qk_norm_rope(x, W, W, ROPE)[2], (IMG,), (torch.ones_like(IMG),))
    assert out.shape == tangent.shape


# --- kernels -----------------------------------------------------------------------------------------------------


def test_kernels_equal_the_definitions_in_the_interpreter(run_interpreted):
    run_interpreted("test_blocks.py")


@pytest.mark.gpu
@pytest.mark.parametrize("text", checks.TEXTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_kernels_equal_the_definitions_on_the_gpu(dtype, text):
    for shape in (*checks.SHAPES, (4, 128, 28, 64), (2, 1024, 24, 128), (33, 300, 5, 72)):
        checks.check(checks.make(shape, text, dtype, "cuda", lengths=(100, 0, 37, 256)))


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_build_without_spills_and_move_rows_by_sixteen_bytes(arch):
    pytest.importorskip("triton")
    from .. import ahead_of_time
    from . import builds

    made = [*builds.qk_norm_rope(arch, 2, 2), *builds.sums(arch)]
    if arch == 90:
        made += [*builds.qk_norm_rope(arch, 4, 2), *builds.qk_norm_rope(arch, 2, 0, 1, 3, only=64)]
    for name, build in made:
        print(f"sm_{arch} {name}: {build.registers} registers, {build.stack} spilled, {build.shared} bytes shared")
        assert build.stack == 0, name
        assert build.shared <= ahead_of_time.MAX_SHARED, name
        if "forward" in name:
            assert set(build.accesses("st")) == {16}, name
        # Queries, keys and values of the image, keys and values of text: read and written 16 bytes at a time.
        if "kernel" in name:
            least = 3 if name.endswith("text 0") else 5
            assert build.accesses("ld").count(16) >= least, name
            assert build.accesses("st").count(16) >= least, name
