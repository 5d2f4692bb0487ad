"""`route.verify`: one sentence where the route is right, and the call to write where it is not."""

from __future__ import annotations

import copy
import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from prx_kernels import Entries, route_blocks

from .models import HEADS, HIDDEN, Block, Model, Rope, inputs, rotary_tables
from .test_per_token import TEXT, AttributeRope, TextBlock, with_own_tables


def model_with(rope=None, **arguments) -> Model:
    torch.manual_seed(0)
    return Model(rope=rope, **arguments)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("rope", "arguments"),
    [
        (None, {}),
        (rotary_tables(12), {"per_token": {"feat_rope": 0}, "shared": True}),
        (Rope(12), {"per_token": {"feat_rope": 0}, "shared": True}),
        (tuple(t[None, None] for t in rotary_tables(12)), {"per_token": {"feat_rope": 2}}),
    ],
)
def test_a_right_route_is_proven_in_one_sentence(rope, arguments, compiled):
    torch._dynamo.reset()
    model = model_with(rope)
    for block in model.blocks if compiled else ():
        block.compile(fullgraph=True, backend="aot_eager")
    said = route_blocks(model.blocks, 1, 2, 0.5, **arguments).verify(lambda: model(*inputs()))
    found = re.fullmatch(
        r"Blocks 1 to 2 give the dense model's outputs and (\d+) gradients with 12 tokens in random order: at most "
        r"(.*) of the largest value apart\.", said,
    )  # fmt: skip
    assert int(found[1]) == 21  # 10 parameters in each of two blocks, and what enters them
    assert float(found[2]) < 1e-5


@pytest.mark.parametrize(
    ("model", "cure"),
    [
        (lambda: model_with(rotary_tables(12)), 'per_token={"feat_rope": 0}, shared=True'),
        (lambda: model_with(AttributeRope("list")), 'per_token={"feat_rope": 0}, shared=True'),
        (lambda: model_with(tuple(t[None, None] for t in rotary_tables(12))), 'per_token={"feat_rope": 2}'),
        (lambda: with_own_tables(), 'per_token={"cos": 0, "attn.positions": 0}, shared=True'),
    ],
)
def test_a_wrong_route_is_told_with_a_call_that_is_right(model, cure):
    torch.manual_seed(0)
    model = model()
    route = route_blocks(model.blocks, 1, 2, 0.5)
    with pytest.raises(ValueError, match="the route changes the model|the route fails") as caught:
        route.verify(lambda: model(*inputs()))
    assert str(caught.value).endswith(f"Write (tried): {cure}")
    route.remove()
    route = route_blocks(model.blocks, 1, 2, 0.5, **eval(f"dict({cure})"))
    assert "outputs and" in route.verify(lambda: model(*inputs()))


@pytest.mark.parametrize("image_first", [True, False])
def test_a_mask_over_two_streams_is_found_with_its_side(image_first):
    torch.manual_seed(0)
    blocks = nn.ModuleList(TextBlock(image_first) for _ in range(2))
    img, txt, mask = inputs()[0], torch.randn(2, TEXT, HIDDEN), torch.rand(2, 1, 1, 12 + TEXT) > 0.4
    run = lambda: blocks[1](blocks[0](img, txt, mask), txt, mask)  # noqa: E731
    side = "suffix" if image_first else "prefix"
    with pytest.raises(ValueError, match=rf'Write \(tried\): per_token={{"mask": Entries\(3, {side}="rest"\)}}'):
        route_blocks(blocks, 0, 1, 0.5).verify(run)
    for block in blocks:
        block._routes[0].route.remove()
        break
    wrong = Entries(3, prefix="rest") if image_first else Entries(3, suffix="rest")
    with pytest.raises(ValueError, match="the route changes the model"):
        route_blocks(blocks, 0, 1, 0.5, per_token={"mask": wrong}).verify(run)


class Counting(Block):
    """Positions from the number of tokens: no table to find, all silently wrong."""

    def forward(self, x, c):
        return super().forward(x + torch.linspace(0, 1, x.shape[1])[None, :, None], c)


def test_positions_made_from_the_number_of_tokens_are_seen():
    torch.manual_seed(0)
    model = Model()
    model.blocks = nn.ModuleList(Counting() for _ in range(4))
    with pytest.raises(ValueError, match="make positions from the number of tokens, or mix neighbours"):
        route_blocks(model.blocks, 1, 2, 0.5).verify(lambda: model(*inputs()))


def test_gates_and_a_final_layer_that_are_zero_hide_nothing():
    """adaLN-zero: at the start every block is the identity, and the output is zero."""
    model = model_with(rotary_tables(12))
    for block in model.blocks:
        nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(block.adaLN_modulation[1].bias)
    final = nn.Linear(HIDDEN, 3)
    nn.init.zeros_(final.weight)
    nn.init.zeros_(final.bias)
    route = route_blocks(model.blocks, 1, 2, 0.5, per_token={"feat_rope": None})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="the route changes the model"):
        route.verify(lambda: final(model(*inputs())))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_verify_leaves_everything_as_it_was():
    model = model_with(dropout=0.5)
    route = route_blocks(model.blocks, 1, 2, 0.25)
    route.probability, route.enabled = 0.5, False
    model.blocks[1].eval()
    model(*inputs()).sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    route.verify(lambda: model(*inputs()))
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert (route.probability, route.enabled, route.in_eval, route.selection_ratio) == (0.5, False, False, 0.25)
    assert route.keep is None


def test_a_run_that_differs_from_call_to_call_or_calls_no_block_is_no_proof():
    model = model_with()
    route = route_blocks(model.blocks, 1, 2, 0.5)
    calls = iter(range(9))
    with pytest.raises(RuntimeError, match="gives other values when it is called again"):
        route.verify(lambda: model(*inputs(seed=next(calls))))
    with pytest.raises(RuntimeError, match="did not call the routed blocks"):
        route.verify(lambda: torch.ones(1))
    with pytest.raises(TypeError, match="run must return a tensor, got a tuple"):
        route.verify(lambda: inputs())


def test_checkpointed_models_are_verified_and_what_was_left_out_is_said():
    for reentrant in (False, True):
        model = model_with(checkpoint=partial(checkpoint, use_reentrant=reentrant))
        said = route_blocks(model.blocks, 1, 2, 0.5).verify(lambda model=model: model(*inputs()))
        assert ("no gradients: reentrant checkpoints" in said) == reentrant


class KeyBias(Block):
    """A bias of the key: softmax does not see it, so that its gradient is zero but for rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.key_bias = nn.Parameter(torch.randn(HIDDEN))

    def forward(self, x, c, *rest):
        x = super().forward(x, c, *rest)
        return x + (x @ (x + self.key_bias).mT / HIDDEN).softmax(-1) @ x


def test_a_gradient_that_is_zero_but_for_rounding_is_no_difference():
    """As in CogVideoX, whose keys are normed with a bias."""
    torch.manual_seed(0)
    model = Model()
    model.blocks = nn.ModuleList(KeyBias() for _ in range(4))
    model(*inputs()).square().sum().backward()
    largest = max(float(p.grad.abs().max()) for p in model.blocks.parameters())
    assert 0 < float(model.blocks[1].key_bias.grad.abs().max()) < 1e-5 * largest
    assert "gradients" in route_blocks(model.blocks, 1, 2, 0.5).verify(lambda: model(*inputs()))


def test_a_table_that_barely_shows_is_found_without_gradients():
    """Attention that is nearly even: what was forgotten changes the outputs by less than the tolerance."""
    model = model_with(rotary_tables(12))
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[: 2 * HIDDEN] *= 0.02
            block.attn.qkv.bias[: 2 * HIDDEN] *= 0.02
    route = route_blocks(model.blocks, 1, 2, 0.5)
    with torch.no_grad(), pytest.raises(ValueError, match='"feat_rope": 0}, shared=True$') as caught:
        route.verify(lambda: model(*inputs()))
    assert float(re.search(r"off by (\S+) of its values", str(caught.value))[1]) < 1e-4
    route.remove()
    route = route_blocks(model.blocks, 1, 2, 0.5, per_token={"feat_rope": 0}, shared=True)
    with torch.no_grad():
        assert "run() recorded none" in route.verify(lambda: model(*inputs()))


def test_as_many_features_as_tokens_are_not_taken_for_tokens():
    tables = rotary_tables(HIDDEN // HEADS)
    model = model_with(tables)
    assert tables[0].shape == (8, 8)
    run = lambda: model(*inputs(tokens=8))  # noqa: E731
    route = route_blocks(model.blocks, 1, 2, 0.5)
    with pytest.raises(ValueError, match=r'Write \(tried\): per_token={"feat_rope": 0}, shared=True$'):
        route.verify(run)
    with pytest.raises(ValueError, match=r'Write route_blocks\(…, per_token={"feat_rope": 0}, shared=True\)'):
        run()


@pytest.mark.parametrize("first", [0, 2])
def test_a_route_over_other_blocks_is_dense_meanwhile(first):
    model = model_with(depth=5)
    routes = [route_blocks(model.blocks, start, start + 1, 0.5) for start in (0, 2)]
    run = lambda: model(*inputs())  # noqa: E731
    assert "outputs and 21 gradients" in routes[first // 2].verify(run)
    model(*inputs())
    assert [r.keep.shape for r in routes] == [(2, 6), (2, 6)]


class Skipping(Model):
    """U-ViT's structure by its order: a block of the second half is given what its twin in the first half gave."""

    def forward(self, x, c):
        x = first = self.blocks[0](x, c)
        x = second = self.blocks[1](x, c)
        x = self.blocks[2](x, c)
        x = self.blocks[3](x, c, second)
        return self.blocks[4](x, c, first)


class SkipBlock(Block):
    def forward(self, x, c, skip=None):
        return super().forward(x if skip is None else x + 2 * skip.flip(-1), c)


def test_skip_connections_lead_into_a_route_that_lies_alike_at_both_ends():
    torch.manual_seed(0)
    model = Skipping(depth=5)
    model.blocks = nn.ModuleList(SkipBlock() for _ in range(5))
    run = lambda: model(*inputs())  # noqa: E731
    route = route_blocks(model.blocks, 1, -2, 0.5)
    assert "outputs and" in route.verify(run)
    route.remove()
    route = route_blocks(model.blocks, 1, -1, 0.5)  # block 3 is given kept tokens, block 4 all
    lie = "choose a start and an end that lie alike, as 1 and -2$"
    with pytest.raises(ValueError, match=lie):
        route.verify(run)
    with pytest.raises(ValueError, match=lie):
        run()
    route.remove()
    with pytest.raises(ValueError, match=r'Write \(tried\): per_token={"skip": 1}$'):  # from outside of the route
        route_blocks(model.blocks, 2, -2, 0.5).verify(run)


def test_tokens_added_inside_a_route_are_told_as_such():
    class Adding(Model):
        def forward(self, x, c):
            x = self.blocks[1](self.blocks[0](x, c), c)
            return self.blocks[2](torch.cat((x[:, :1], x), dim=1), c)

    torch.manual_seed(0)
    model = Adding(depth=3)
    with pytest.raises(ValueError, match=r"must not add or drop tokens between routed blocks\)$"):
        route_blocks(model.blocks, 0, -1, 0.5).verify(lambda: model(*inputs()))


def test_what_a_block_noted_in_an_earlier_forward_is_no_table():
    """SpeedrunDiT's attention keeps its values for the blocks behind."""

    class Noting(Block):
        def forward(self, x, c, feat_rope=None):
            self.values = x.unsqueeze(1) * 2
            return super().forward(x, c)

    torch.manual_seed(0)
    model = Model(depth=3)
    model.blocks = nn.ModuleList(Noting() for _ in range(3))
    model(*inputs())
    assert model.blocks[1].values.shape == (2, 1, 12, HIDDEN)
    route = route_blocks(model.blocks, 0, 1, 0.5)
    model(*inputs()).sum().backward()
    assert route.keep.shape == (2, 6)
