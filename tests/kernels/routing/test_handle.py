"""The handle that `route_blocks` returns: modes, draws, fixed sets, copies, files, removal; and entries of tables."""

from __future__ import annotations

import copy
import pickle
from collections import namedtuple

import pytest
import torch
from torch import nn

from prx_kernels import gather_tokens, route_blocks
from prx_kernels.routing.tokens import MAX_TOKENS

from .models import Block, Model, inputs
from .test_blocks import expected


def test_evaluation_is_dense_unless_asked():
    model = Model()
    x, c = inputs()
    dense = model(x, c)
    route = route_blocks(model.blocks, 1, 2, 0.5)
    assert torch.equal(model.eval()(x, c), dense)
    assert route.keep is None
    route.in_eval = True
    assert not torch.equal(model(x, c), dense)
    route.in_eval = False
    assert not torch.equal(model.train()(x, c), dense)


def test_every_forward_draws_afresh_and_manual_seed_repeats_the_sequence():
    model = Model()
    route = route_blocks(model.blocks, 1, 2, 0.5)
    x, c = inputs()

    def sequence():
        route.manual_seed(3)
        sets = []
        for _ in range(4):
            model(x, c)
            sets.append(route.keep)
        return torch.stack(sets)

    first = sequence()
    assert len({tuple(row) for row in first.flatten(0, 1).tolist()}) == 8
    assert torch.equal(first, sequence())


def test_shared_keeps_one_set_for_the_batch():
    model = Model()
    route = route_blocks(model.blocks, 1, 2, 0.5, shared=True)
    model(*inputs(batch=4))
    assert (route.keep == route.keep[:1]).all()


def test_keep_names_the_tokens_that_a_routed_block_saw():
    """The last routed layer as REPA layer is unambiguous: its features have K rows, and keep says which."""
    model = Model(prefix=3)
    route = route_blocks(model.blocks, 1, 2, 0.5, prefix=3)
    seen = {}
    model.blocks[1].norm1.register_forward_hook(lambda _, args, __: seen.update(x=args[0]))
    model.blocks[0].register_forward_hook(lambda _, __, out: seen.update(before=out))
    model(*inputs())
    assert torch.equal(seen["x"][:, 3:], gather_tokens(seen["before"][:, 3:], route.keep))


def test_a_deep_copy_routes_by_itself():
    model = Model()
    route = route_blocks(model.blocks, 1, 2, 0.5)
    x, c = inputs()
    model(x, c).sum().backward()
    model.zero_grad()
    twin = copy.deepcopy(model)
    assert twin.blocks[1]._routes[0].route is twin.blocks[2]._routes[0].route is not route
    kept = route.keep
    out = twin(x, c)
    assert route.keep is kept
    torch.testing.assert_close(out, expected(twin, x, c, twin.blocks[1]._routes[0].route.keep))
    twin.blocks[1]._routes[0].route.in_eval = True
    assert not route.in_eval


def test_the_first_block_s_mode_decides_for_all():
    """Frozen blocks in evaluation mode are routed too: tokens that left the stream must come back."""
    model, (x, c) = Model(), inputs()
    route = route_blocks(model.blocks, 1, 2, 0.5)
    model.train()
    model.blocks[2].eval()
    out = model(x, c)
    torch.testing.assert_close(out, expected(model, x, c, route.keep))
    model.blocks[1].eval()
    dense = copy.deepcopy(model).eval()
    assert torch.equal(model(x, c), dense(x, c))


def test_a_first_draw_under_inference_mode_does_not_stop_training():
    model, (x, c) = Model(), inputs()
    route = route_blocks(model.blocks, 1, 2, 0.5)
    route.in_eval = True
    with torch.inference_mode():
        model.eval()(x, c)
    model.train()(x, c).sum().backward()


def test_a_routed_model_is_pickled_with_its_route():
    model, (x, c) = Model(), inputs()
    route = route_blocks(model.blocks, 1, 2, 0.5)
    model(x, c)
    again = pickle.loads(pickle.dumps(model))
    assert type(again.blocks[1]).__name__ == "Block"
    twin = again.blocks[1]._routes[0].route
    assert twin is again.blocks[2]._routes[0].route
    assert twin.handle != route.handle
    route.manual_seed(3)
    twin.manual_seed(3)
    assert torch.equal(model(x, c), again(x, c))
    assert torch.equal(route.keep, twin.keep)
    again(x, c).sum().backward()


def test_a_removed_route_leaves_the_model_as_it_was():
    model, (x, c) = Model(), inputs()
    before = model(x, c)
    attributes = [set(block.__dict__) for block in model.blocks]
    route = route_blocks(model.blocks, 1, 2, 0.5)
    assert not torch.equal(model(x, c), before)
    route.remove()
    assert torch.equal(model(x, c), before)
    assert [type(block) for block in model.blocks] == [Block] * len(model.blocks)
    assert [set(block.__dict__) for block in model.blocks] == attributes
    route_blocks(model.blocks, 0, 1, 0.25)
    model(x, c)


def test_the_ratio_may_change():
    model, (x, c) = Model(), inputs()
    route = route_blocks(model.blocks, 1, 2, 0.5)
    model(x, c)
    half = route.keep.shape[1]
    route.selection_ratio = 0.75
    model(x, c)
    assert route.keep.shape[1] == half // 2
    with pytest.raises(ValueError, match=r"lies in \(0, 1\), got 1.5"):
        route.selection_ratio = 1.5


@pytest.mark.parametrize(
    ("keep", "shared", "said"),
    [
        (torch.arange(4), False, r"must be \(batch, K\) integers, got torch.int64 of shape \(4,\)"),
        (torch.rand(2, 4), False, r"got torch.float32 of shape \(2, 4\)"),
        (torch.tensor([[0, 1, 1]]), False, "names a token twice"),
        (torch.tensor([[0, 1], [2, 3]]), True, "rows that differ"),
    ],
)
def test_sets_that_are_none_are_refused(keep, shared, said):
    route = route_blocks(Model().blocks, 1, 2, 0.5, shared=shared)
    with pytest.raises(ValueError, match=said):
        route.fixed = keep


def test_more_tokens_than_a_draw_takes_need_a_set_of_one_s_own():
    blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
    route = route_blocks(blocks, 0, 1, 0.5)
    x = torch.randn(1, MAX_TOKENS + 2, 2)
    with pytest.raises(ValueError, match="at most 16384 tokens, got 16386: set route.fixed"):
        blocks[0](x)
    route.fixed = torch.arange(0, MAX_TOKENS + 2, 2)[None]
    assert blocks[1](blocks[0](x)).shape == x.shape


# --- arguments with one entry a token ----------------------------------------------------------------------------

Pair = namedtuple("Pair", "hidden text")


class Reading(nn.Module):
    """Adds tables to its tokens, so that what it was given shows: image and text tables, a mask, a dict."""

    def forward(self, x, tables=None, mask=None, named=None):
        if tables is not None:
            x = x + tables[0][..., None] + tables[1].sum()
        if mask is not None:
            x = mask @ x
        return x + named["shift"][..., None] if named is not None else x


def test_one_table_of_a_tuple_is_routed_and_the_others_stay():
    """Qwen-Image: (image table, text table), the latter longer or shorter than the tokens."""
    blocks = nn.ModuleList(Reading() for _ in range(2))
    route = route_blocks(blocks, 0, 1, 0.5, per_token={"tables": {0: 0}}, shared=True)
    x, image, text = torch.randn(2, 16, 3), torch.randn(16), torch.randn(5)
    out = blocks[1](blocks[0](x, tables=(image, text)), tables=(image, text))
    dense = x + 2 * (image[:, None] + text.sum())
    kept = torch.zeros(2, 16, dtype=torch.bool).scatter(1, route.keep.long(), True)
    torch.testing.assert_close(out, torch.where(kept[..., None], dense, x))
    with pytest.raises(TypeError, match=r"argument 'tables' must be a tuple with values \[0\], got a tensor"):
        blocks[0](x, tables=image)


def test_both_sides_of_a_square_mask_and_dicts_are_routed():
    blocks = nn.ModuleList(Reading() for _ in range(2))
    route = route_blocks(blocks, 0, 0, 0.5, per_token={"mask": (1, 2), "named": 1})
    x, mask, shift = torch.randn(2, 8, 3), torch.randn(2, 8, 8), torch.randn(2, 8)
    out = blocks[0](x, mask=mask, named={"shift": shift})
    for i, keep in enumerate(route.keep.long()):
        routed = mask[i][keep][:, keep] @ x[i, keep] + shift[i, keep, None]
        torch.testing.assert_close(out[i, keep], routed)


def test_named_tuples_go_in_and_out():
    class Twofold(nn.Module):
        def forward(self, pair_table, x):
            return Pair(x + pair_table.hidden[..., None], pair_table.text)

    blocks = nn.ModuleList([Twofold()])
    route_blocks(blocks, 0, 0, 0.5, tokens="x", out=0, per_token={"pair_table": {0: 1}})
    out = blocks[0](Pair(torch.zeros(2, 8), torch.ones(3)), torch.randn(2, 8, 4))
    assert isinstance(out, Pair)
    assert out.hidden.shape == (2, 8, 4)
    assert torch.equal(out.text, torch.ones(3))
