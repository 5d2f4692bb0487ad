"""Packed text in the model: the padded form's results, and work for real tokens only."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from prx_kernels.reference import joined_rows
from prx_model import PRXConfig, PRXTransformer
from prx_model import attention as attention_module
from prx_model.packed_text import PackedText, pack, unpack
from tests.model.test_attention import _Segments

CONFIG = PRXConfig(patch_size=4, context_in_dim=24, hidden_size=32, num_heads=2, depth=3, axes_dim=(8, 8))
LENGTHS = [3, 0, 7, 1]
BATCH, LENGTH = len(LENGTHS), 8


def make_model(attention: Any = "sdpa", config: PRXConfig = CONFIG) -> PRXTransformer:
    model = PRXTransformer(config, attention=attention)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model


def make_text(lengths: list[int] = LENGTHS, width: int = 24) -> Tensor:
    return torch.randn(sum(lengths), width, generator=torch.Generator().manual_seed(1))


def make_inputs(batch: int = BATCH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, 3, 8, 12, generator=generator), torch.rand(batch, generator=generator)


def packed_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`varlen`'s kernel on a CPU, with NaN for the gradients that it need not write."""
    monkeypatch.setattr(
        attention_module, "_varlen", lambda q, k, v, cu_q, cu_k, _q, _k: _Segments.apply(q, k, v, cu_q, cu_k)
    )
    monkeypatch.setattr("prx_model.transformer.check_backend", lambda *_: None)


# --- the layout ---------------------------------------------------------------------------------------------------


def test_packing_and_unpacking_put_every_token_where_padding_on_the_right_has_it() -> None:
    tokens = make_text()
    packed = pack(tokens, LENGTHS, rows_step=8, length_step=4)
    assert packed.tokens.shape == (16, 24)
    assert packed.mask.tolist() == [[i < n for i in range(8)] for n in LENGTHS]
    assert packed.offsets.tolist() == [0, 3, 3, 10, 11]
    padded, mask = packed.padded()
    assert mask is packed.mask
    expected = torch.nn.utils.rnn.pad_sequence(tokens.split(LENGTHS), batch_first=True)
    assert torch.equal(padded, F.pad(expected, (0, 0, 0, 1)))
    assert torch.equal(padded[mask], tokens)


@pytest.mark.parametrize(("lengths", "rows", "length"), [([0, 0], 8, 4), ([8], 8, 8), ([5, 4], 16, 8)])
def test_shapes_are_multiples_of_the_steps_and_never_empty(lengths: list[int], rows: int, length: int) -> None:
    packed = pack(make_text(lengths), lengths, rows_step=8, length_step=4)
    assert packed.tokens.shape[0] == packed.places.shape[0] == rows
    assert packed.mask.shape == (len(lengths), length)


def test_unpacking_sends_back_the_gradient_of_real_places_only() -> None:
    packed = pack(make_text(), LENGTHS, rows_step=8, length_step=4)
    rows = packed.tokens.clone().requires_grad_()
    weight = torch.randn(BATCH, LENGTH, 24, generator=torch.Generator().manual_seed(3))
    (unpack(rows, packed.places, BATCH, LENGTH) * weight).sum().backward()
    assert rows.grad is not None
    assert torch.equal(rows.grad, F.pad(weight[packed.mask], (0, 0, 0, 16 - sum(LENGTHS))))


def test_joined_keys_are_each_sample_s_text_and_image() -> None:
    packed = pack(make_text(), LENGTHS, rows_step=8, length_step=4)
    text = packed.tokens.view(16, 2, 12)
    image = torch.randn(BATCH, 6, 2, 12, generator=torch.Generator().manual_seed(4))
    joined, cumulative = joined_rows(text, image, packed.offsets), packed.offsets + 6 * torch.arange(BATCH + 1).int()
    assert cumulative.dtype == torch.int32
    assert cumulative.diff().tolist() == [n + 6 for n in LENGTHS]
    parts = text[: sum(LENGTHS)].split(LENGTHS)
    expected = torch.cat([row for i in range(BATCH) for row in (parts[i], image[i])])
    assert torch.equal(joined, F.pad(expected, (0, 0, 0, 0, 0, 16 - sum(LENGTHS))))


# --- the model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("backend", ["sdpa", "varlen"])
def test_packed_text_gives_the_padded_form_s_output_and_gradients(
    backend: str, routed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed_on_cpu(monkeypatch)
    model = make_model(backend)
    image, t = make_inputs()
    packed = pack(make_text(), LENGTHS, rows_step=8, length_step=4)
    # What padding holds must not matter, whichever way it is skipped.
    padded, mask = packed.padded()
    padded = padded.masked_fill(~mask[..., None], 1e3)
    route: dict[str, Any] = {}
    if routed:
        route = {"keep": torch.tensor([[0, 2, 4]]).expand(BATCH, -1).contiguous(), "route": (1, 1)}
    results = []
    for text, text_mask in ((padded, mask), (packed, None)):
        model.zero_grad()
        leaf = (text.tokens if isinstance(text, PackedText) else text).clone().requires_grad_()
        given = text._replace(tokens=leaf) if isinstance(text, PackedText) else leaf
        out = model.forward_tokens(image, t, given, text_mask, **route)
        out.square().mean().backward()
        assert leaf.grad is not None
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((out.detach(), gradients, leaf.grad))
    (out, gradients, text_gradient), (out_packed, gradients_packed, text_gradient_packed) = results
    torch.testing.assert_close(out_packed, out, rtol=1e-4, atol=1e-5)  # float32 sums in another order, three blocks
    assert gradients.keys() == gradients_packed.keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients.items():
        assert torch.isfinite(gradients_packed[name]).all(), name
        assert (gradients_packed[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    real = sum(LENGTHS)
    torch.testing.assert_close(text_gradient_packed[:real], text_gradient[mask], rtol=1e-4, atol=1e-7)
    assert torch.count_nonzero(text_gradient_packed[real:]) == 0


def test_rows_that_round_the_number_up_change_nothing() -> None:
    model = make_model()
    image, t = make_inputs()
    short, long = (pack(make_text(), LENGTHS, rows_step=step, length_step=8) for step in (1, 64))
    assert (short.tokens.shape[0], long.tokens.shape[0]) == (11, 64)
    # Products of more rows may be blocked otherwise: float32 rounding.
    torch.testing.assert_close(model(image, t, short), model(image, t, long), rtol=1e-5, atol=1e-5)


def test_packed_text_equals_padded_under_bfloat16_autocast_within_its_rounding() -> None:
    model = make_model()
    image, t = make_inputs()
    packed = pack(make_text(), LENGTHS, rows_step=8, length_step=4)
    exact = model(image, t, *packed.padded())
    with torch.autocast("cpu", torch.bfloat16):
        by_padding, by_packing = model(image, t, *packed.padded()), model(image, t, packed)
    error = (by_padding.float() - exact).norm()
    assert error > 0
    assert (by_packing.float() - exact).norm() <= 2 * error  # twice the error of the same-dtype formula


def test_text_projections_cost_what_real_tokens_cost() -> None:
    """At 40 % fill (docs/recipe.md: 100 of 256 tokens) the text's linear maps do 40 % of the padded form's work."""
    lengths = [256, 40, 100, 100, 84, 120, 64, 60, 150, 50]
    assert sum(lengths) == 0.4 * 10 * 256
    packed = pack(make_text(lengths), lengths)
    assert packed.tokens.shape[0] == sum(lengths)  # 1,024: the step of 256 rounds nothing up here
    model, (image, t) = make_model(), make_inputs(10)
    totals, forwards = [], []
    for text, mask in (packed.padded(), (packed, None)):
        with FlopCounterMode(display=False) as counter:
            out = model(image, t, text, mask)
        named = {name: sum(flop.values()) for name, flop in counter.get_flop_counts().items()}
        forwards.append([sum(n for k, n in named.items() if k.endswith(part)) for part in (".txt_in", ".txt_kv_proj")])
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        totals.append(counter.get_total_flops() + backward.get_total_flops())
    txt_in, txt_kv_proj = 2 * 2560 * 24 * 32, 3 * 2 * 2560 * 32 * 64
    assert forwards[0] == [txt_in, txt_kv_proj]
    assert forwards[1] == [0.4 * txt_in, 0.4 * txt_kv_proj]
    # Backward: the weights' gradients, and the projected text's; embeddings want none. Nothing else has changed.
    assert totals[0] - totals[1] == 0.6 * (2 * txt_in + 3 * txt_kv_proj)


@pytest.mark.filterwarnings("ignore")
def test_blocks_compile_without_a_graph_break_and_few_times_for_many_fills() -> None:
    import torch._dynamo
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model, counter = make_model(), CompileCounterWithBackend("aot_eager")
    eager = make_model()
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend=counter, fullgraph=True)  # type: ignore[method-assign]
    image, t = make_inputs()
    for lengths in ([3, 0, 7, 1], [8, 8, 2, 9], [1, 1, 1, 1], [30, 5, 40, 2], [9, 50, 1, 60], [2, 3, 4, 5]):
        packed = pack(make_text(lengths), lengths, rows_step=16, length_step=8)
        out, expected = model(image, t, packed), eager(image, t, packed)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)  # the same operations, decomposed
        wanted = torch.autograd.grad(expected.sum(), list(eager.parameters()))
        for got, gradient in zip(torch.autograd.grad(out.sum(), list(model.parameters())), wanted, strict=True):
            assert (got - gradient).norm() <= 1e-5 * gradient.norm()
    torch._dynamo.reset()
    # A first shape, then one graph for all: three blocks, so at most two graphs each.
    assert counter.frame_count <= 2 * CONFIG.depth


def test_packing_asks_no_value_of_the_device() -> None:
    """On the meta device there is no value to ask for: shapes come from the lengths, and the model's from them."""
    packed = pack(torch.empty(11, 24, device="meta"), LENGTHS, rows_step=8, length_step=4)
    assert packed.tokens.device.type == packed.places.device.type == packed.mask.device.type == "meta"
    image, t = (x.to("meta") for x in make_inputs())
    assert make_model().to("meta")(image, t, packed).shape == (BATCH, 3, 8, 12)


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "lengths", "step"), [(3, [1, 1], 1), (2, [], 1), (0, [1, -1], 1), (2, [1, 1], 0)])
def test_lengths_that_do_not_fit_are_refused(rows: int, lengths: list[int], step: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        pack(torch.zeros(rows, 4), lengths, rows_step=step)


WRONG: dict[str, tuple[dict[str, Any], Tensor | None, str]] = {
    "width": ({"tokens": torch.zeros(16, 23)}, None, r"tokens \(rows, 24\).*\(16, 23\)"),
    "places": ({"places": torch.zeros(16, dtype=torch.int32)}, None, "int64, got .*int32"),
    "batch": ({"mask": torch.zeros(3, 8, dtype=torch.bool)}, None, r"mask must be bool \(4, L\), got .*\(3, 8\)"),
    "offsets": ({"offsets": torch.zeros(4, dtype=torch.int32)}, None, r"offsets must be int32 \(5,\), got .*\(4,\)"),
    "second mask": ({}, torch.zeros(4, 8, dtype=torch.bool), "packed text holds its own mask"),
}


@pytest.mark.parametrize(("change", "mask", "message"), WRONG.values(), ids=WRONG)
def test_packed_text_that_does_not_fit_is_refused(change: dict[str, Any], mask: Tensor | None, message: str) -> None:
    packed = pack(make_text(), LENGTHS, rows_step=8, length_step=4)._replace(**change)
    with pytest.raises(ValueError, match=message):
        make_model()(*make_inputs(), packed, mask)
