"""Arguments and tensors with an entry a token: the right rows of them, or an error that says what to write."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prx_kernels import Entries, route_blocks

from .models import HIDDEN, Attention, Block, Model, inputs, permutations, rotary_tables

TEXT = 5


def all_tokens_in_random_order(model, run, blocks, **arguments):
    """The routed output with all tokens in random order against the dense one, and the same of gradients."""
    route = route_blocks(blocks, 0, len(blocks) - 1, 0.5, **arguments)
    results = []
    for fixed in (None, permutations(1 if route.shared else 2, 12).expand(2, 12)):
        route.enabled, route.fixed = fixed is not None, fixed
        model.zero_grad()
        out = run()
        out.square().sum().backward()
        results.append((out, *(p.grad for p in model.parameters() if p.grad is not None)))
    for dense, routed in zip(*results, strict=True):
        torch.testing.assert_close(routed, dense, rtol=1e-5, atol=1e-5)
    route.fixed = None
    assert not torch.allclose(run(), results[0][0], atol=1e-3), "half the tokens must make a difference"
    return route


class TextBlock(nn.Module):
    """Attention from image tokens to [image, text] or [text, image], with a mask over all of them."""

    def __init__(self, image_first: bool) -> None:
        super().__init__()
        self.image_first = image_first
        self.q, self.k, self.v = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))

    def forward(self, img, txt, mask):
        both = torch.cat((img, txt) if self.image_first else (txt, img), 1)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (self.q(img), self.k(both), self.v(both)))
        return img + F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("image_first", [True, False])
def test_a_mask_over_image_and_text_is_cut_where_the_image_is(image_first):
    torch.manual_seed(0)
    model = nn.ModuleList(TextBlock(image_first) for _ in range(2))
    img, txt, mask = inputs()[0], torch.randn(2, TEXT, HIDDEN), torch.rand(2, 1, 1, 12 + TEXT) > 0.4

    def run():
        x = img
        for block in model:
            x = block(x, txt, mask)
        return x

    where = Entries(3, suffix=TEXT) if image_first else Entries(3, prefix="rest")
    all_tokens_in_random_order(model, run, model, per_token={"mask": where})


def test_entries_that_nobody_accounted_for_are_an_error():
    model = nn.ModuleList([TextBlock(True)])
    route_blocks(model, 0, 0, 0.5, per_token={"mask": 3})
    with pytest.raises(ValueError, match=r"has 17 entries in dimension 3 for 12 tokens: say where the other 5 stand"):
        model[0](inputs()[0], torch.randn(2, TEXT, HIDDEN), torch.ones(2, 1, 1, 17, dtype=torch.bool))
    for where, said in ((Entries(3, suffix=4), "which does not fit"), (Entries(3, prefix=6), "which does not fit")):
        model = nn.ModuleList([TextBlock(True)])
        route_blocks(model, 0, 0, 0.5, per_token={"mask": where})
        with pytest.raises(ValueError, match=said):
            model[0](inputs()[0], torch.randn(2, TEXT, HIDDEN), torch.ones(2, 1, 1, 17, dtype=torch.bool))
    with pytest.raises(ValueError, match="only one of prefix and suffix"):
        Entries(1, prefix="rest", suffix="rest")
    with pytest.raises(ValueError, match="must be a number of entries"):
        Entries(1, prefix=-1)


# --- tables inside of modules ------------------------------------------------------------------------------------


class AttributeRope(nn.Module):
    """As public JiT code has it: plain tensors as attributes. Also in lists, as buffers, as parameters, nested."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        cos, sin = rotary_tables(12)
        self.scale = torch.ones(1)
        self.freqs = torch.randn(4)  # no entry a token: stays
        if kind == "attribute":
            self.cos, self.sin = cos, sin
        elif kind == "list":
            self.tables = [cos, sin]
        elif kind == "dict":
            self.tables = {0: cos, 1: sin}
        elif kind == "parameter":
            self.cos, self.sin = nn.Parameter(cos), nn.Parameter(sin)
        elif kind == "nested":
            self.inner = AttributeRope("attribute")
        elif kind == "object":
            self.cos, self.sin = cos, sin
        self.kind = kind

    def table(self, which: int) -> torch.Tensor:
        if self.kind == "nested":
            return self.inner.table(which)
        return self.tables[which] if self.kind in ("list", "dict") else (self.cos, self.sin)[which]

    def forward(self, t):
        half = t.shape[-1] // 2
        turned = torch.cat((-t[..., half:], t[..., :half]), dim=-1)
        return (t * self.table(0) + turned * self.table(1)) * self.scale


class PlainRope:
    """No module at all."""

    def __init__(self, cos, sin) -> None:
        self.cos, self.sin = cos, sin

    def __call__(self, t):
        half = t.shape[-1] // 2
        return t * self.cos + torch.cat((-t[..., half:], t[..., :half]), dim=-1) * self.sin


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["attribute", "list", "dict", "parameter", "nested", "object"])
def test_tables_that_a_module_keeps_in_any_way_are_routed(kind, compiled):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Model(depth=2, rope=AttributeRope(kind))
    if kind == "object":
        rope = model.rope
        del model.rope
        model.rope = PlainRope(rope.cos, rope.sin)
    for block in model.blocks if compiled else ():
        block.compile(fullgraph=True, backend="aot_eager")
    arguments = {"per_token": {"feat_rope": 0}, "shared": True}
    before = dict(model.rope.__dict__)
    all_tokens_in_random_order(model, lambda: model(*inputs()), model.blocks, **arguments)
    assert model.rope.__dict__ == before, "the model's own module must not be touched"


def test_a_module_without_a_fitting_table_is_an_error():
    model = Model(depth=2, rope=AttributeRope("attribute"))
    route_blocks(model.blocks, 0, 1, 0.5, per_token={"feat_rope": 1}, shared=True)
    with pytest.raises(ValueError, match=r"holds no tensor .* dimension 1; its tensors: .*cos \(12, 8\)"):
        model(*inputs())


class OwnTables(Block):
    """Keeps its positions itself and takes as many as there are tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.attn.positions = torch.randn(12, HIDDEN)
        self.register_buffer("cos", torch.randn(12, HIDDEN))

    def forward(self, x, c):
        x = x * self.cos[: x.shape[1]] + self.attn.positions[: x.shape[1]]
        return super().forward(x, c)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_block_s_own_tables_are_routed_by_their_paths(compiled):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Model(depth=2)
    model.blocks = nn.ModuleList(OwnTables() for _ in range(2))
    for block in model.blocks if compiled else ():
        block.compile(fullgraph=True, backend="aot_eager")
    tables = {"cos": 0, "attn.positions": 0}
    all_tokens_in_random_order(model, lambda: model(*inputs()), model.blocks, per_token=tables, shared=True)
    assert model.blocks[0].cos.shape == (12, HIDDEN)


# --- what is not named -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "cure"),
    [
        (lambda: Model(rope=rotary_tables(12)), '{"feat_rope": 0}, shared=True'),
        (lambda: Model(rope=AttributeRope("attribute")), '{"feat_rope": 0}, shared=True'),
        (lambda: Model(rope=AttributeRope("list")), '{"feat_rope": 0}, shared=True'),
        (lambda: Model(rope=tuple(t[None, None] for t in rotary_tables(12))), '{"feat_rope": 2}'),
        (lambda: with_own_tables(), '{"cos": 0, "attn.positions": 0}, shared=True'),
    ],
)
def test_a_forgotten_table_is_named_with_the_cure_at_the_first_forward(model, cure):
    torch.manual_seed(0)
    model, (x, c) = model(), inputs()
    dense = model(x, c)
    route = route_blocks(model.blocks, 1, 2, 0.5)
    with pytest.raises(ValueError, match="12 entries in dimension") as caught:
        model(x, c)
    said = str(caught.value)
    assert f"Write route_blocks(…, per_token={cure})" in said
    # What the message says to write is right.
    route.remove()
    written = eval(f"dict(per_token={cure})")
    route = route_blocks(model.blocks, 1, 2, 0.5, **written)
    route.fixed = permutations(1 if route.shared else 2, 12).expand(2, 12)
    torch.testing.assert_close(model(x, c), dense, rtol=1e-5, atol=1e-5)


def with_own_tables() -> Model:
    model = Model()
    model.blocks = nn.ModuleList(OwnTables() for _ in range(4))
    return model


@pytest.mark.parametrize("compiled", [False, True])
def test_a_failure_inside_of_a_block_names_argument_dimension_and_cure(compiled):
    """A modulation for every token looks like a text of that length, so only the failure tells."""
    torch._dynamo.reset()

    class Modulated(Block):
        def forward(self, x, c):
            return x * c

    block = Modulated()
    if compiled:
        block.compile(fullgraph=True, backend="aot_eager")
    x = inputs()[0]
    route_blocks([block], 0, 0, 0.5)
    with pytest.raises(ValueError, match=r'failed on the tokens.*\(2, 12, 16\) has 12 entries .* per_token={"c": 1}'):
        block(x, torch.randn_like(x))
    block = Modulated()
    route = route_blocks([block], 0, 0, 0.5, per_token={"c": 1})
    c = torch.randn_like(x)
    out = block(x, c)
    kept = torch.zeros(2, 12, dtype=torch.bool).scatter(1, route.keep.long(), True)
    torch.testing.assert_close(out, torch.where(kept[..., None], x * c, x))


def test_a_text_as_long_as_the_image_and_other_coincidences_are_let_be():
    """Text of 12 tokens, hidden size 16 at 16 tokens, a batch of 12: none of these is a table."""
    torch.manual_seed(0)

    class Cross(Block):
        def forward(self, x, c, text, text_mask):
            x = x + F.scaled_dot_product_attention(x, text, text, attn_mask=text_mask[:, None])
            return super().forward(x, c)

    for batch, tokens, text in ((2, 12, 12), (2, HIDDEN, 7), (12, 12, 3)):
        x, c = inputs(batch, tokens)
        block = Cross()
        block.register_buffer("average", torch.zeros(HIDDEN))
        route = route_blocks([block], 0, 0, 0.5)
        block(x, c, torch.randn(batch, text, HIDDEN), torch.ones(batch, text, dtype=torch.bool))
        assert route.keep is not None


def test_none_says_that_an_argument_only_seems_to_have_an_entry_a_token():
    class Conditioned(Block):
        def forward(self, x, c, classes):
            return super().forward(x, c + classes.mean(1))

    x, c = inputs()
    block = Conditioned()
    route_blocks([block], 0, 0, 0.5)
    with pytest.raises(ValueError, match=r'if they are not the tokens\', per_token={"classes": None}'):
        block(x, c, torch.randn(1, 12, 1))
    block = Conditioned()
    route_blocks([block], 0, 0, 0.5, per_token={"classes": None})
    assert block(x, c, torch.randn(1, 12, 1)).shape == x.shape


def test_other_errors_of_a_block_stay_what_they_are():
    class Failing(Block):
        def forward(self, x, c):
            raise KeyError("lost")

    block = Failing()
    route_blocks([block], 0, 0, 0.5)
    with pytest.raises(KeyError, match="lost"):
        block(*inputs())


# --- suffix, dict outputs ----------------------------------------------------------------------------------------


def test_leading_and_trailing_tokens_are_never_routed():
    torch.manual_seed(0)
    blocks, (x, c) = nn.ModuleList(Block() for _ in range(2)), inputs(tokens=17)
    seen = []
    blocks[0].norm1.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    route = route_blocks(blocks, 0, 1, 0.5, prefix=3, suffix=2)
    out = blocks[1](blocks[0](x, c), c)
    keep = torch.cat((torch.arange(3).expand(2, 3), route.keep + 3, torch.arange(15, 17).expand(2, 2)), 1).long()
    assert route.keep.shape == (2, 6)
    torch.testing.assert_close(seen[0], x.gather(1, keep[..., None].expand(-1, -1, HIDDEN)))
    bypassed = torch.ones(2, 17, dtype=torch.bool).scatter(1, keep, False)
    assert torch.equal(out[bypassed], x[bypassed])
    assert not torch.isclose(out[~bypassed], x[~bypassed]).all(-1).any()


class Output(OrderedDict):
    pass


def test_a_dict_as_a_block_s_output():
    class Naming(Block):
        def forward(self, x, c):
            return Output(hidden=super().forward(x, c), extra=c)

    torch.manual_seed(0)
    block, (x, c) = Naming(), inputs()
    dense = block(x, c)["hidden"]
    route = route_blocks([block], 0, 0, 0.5, out="hidden")
    route.fixed = permutations(2, 12)
    out = block(x, c)
    assert isinstance(out, Output)
    assert torch.equal(out["extra"], c)
    torch.testing.assert_close(out["hidden"], dense)
    other = Block()
    route_blocks([other], 0, 0, 0.5, out="hidden")
    with pytest.raises(TypeError, match="out='hidden' picks from a dict, the block returns a tensor"):
        other(x, c)
    bare = Naming()
    route_blocks([bare], 0, 0, 0.5)
    with pytest.raises(TypeError, match="returns 2 values: say with out="):
        bare(x, c)


def test_attention_without_its_block_is_a_block_too():
    torch.manual_seed(0)
    model, x = nn.ModuleList([Attention()]), inputs()[0]
    run = lambda: model[0](x, rotary_tables(12))  # noqa: E731
    all_tokens_in_random_order(model, run, model, per_token={"rope": 0}, shared=True)
