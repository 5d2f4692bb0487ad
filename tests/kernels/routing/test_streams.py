"""Two streams: a route for each over the same blocks, and one that goes on where text joins the image."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prx_kernels import Entries, route_blocks

from .models import HEADS, HIDDEN, inputs, rotary_tables, rotate

TEXT = 8


def attend(q, k, v, pe):
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
    q, k = (rotate(t, pe[..., 0], pe[..., 1]) for t in (q, k))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Double(nn.Module):
    """BFL's double block by its arguments: text and image keep apart but attend to one another, text first."""

    def __init__(self) -> None:
        super().__init__()
        self.img_qkv, self.txt_qkv = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, 3 * HIDDEN)

    def forward(self, img, txt, vec, pe):
        both = torch.cat((self.txt_qkv(txt), self.img_qkv(img)), 1).chunk(3, -1)
        out = attend(*both, pe) * vec[:, None]
        return img + out[:, txt.shape[1] :], txt + out[:, : txt.shape[1]]


class Single(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)

    def forward(self, x, vec, pe):
        return x + attend(*self.qkv(x).chunk(3, -1), pe) * vec[:, None]


class FluxTwin(nn.Module):
    """The structure of Flux as BFL publishes it: double blocks, text put ahead of the image, single blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.double_blocks = nn.ModuleList(Double() for _ in range(3))
        self.single_blocks = nn.ModuleList(Single() for _ in range(3))

    def forward(self, img, txt, vec, pe):
        for block in self.double_blocks:
            img, txt = block(img=img, txt=txt, vec=vec, pe=pe)
        img = torch.cat((txt, img), 1)
        for block in self.single_blocks:
            img = block(img, vec=vec, pe=pe)
        return img[:, txt.shape[1] :]


def flux_inputs():
    (img, vec), pe = inputs(), torch.stack(rotary_tables(12 + TEXT), -1)[None, None]
    txt = torch.randn(2, TEXT, HIDDEN, generator=torch.Generator().manual_seed(5))
    return img, txt, vec, pe


ACROSS = {"tokens": ("img", "x"), "out": (0, None), "prefix": (0, "rest")}


@pytest.mark.parametrize("compiled", [False, True])
def test_one_route_goes_on_where_text_joins_the_image(compiled):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = FluxTwin()
    blocks = [*model.double_blocks, *model.single_blocks]
    for block in blocks if compiled else ():
        block.compile(fullgraph=True, backend="aot_eager")
    route = route_blocks(blocks, 1, -2, 0.5, per_token={"pe": Entries(2, prefix="rest")}, **ACROSS)
    assert "outputs and 13 gradients" in route.verify(lambda: model(*flux_inputs()))
    seen = []
    model.single_blocks[0].qkv.register_forward_hook(lambda _, args, __: seen.append(args[0].shape))
    out = model(*flux_inputs())
    assert seen == [(2, TEXT + 6, HIDDEN)]
    assert out.shape == (2, 12, HIDDEN)
    out.sum().backward()


def test_both_streams_have_a_route_over_the_same_blocks():
    """A table with entries of both is cut by the first route, then by the second."""
    torch.manual_seed(0)
    for first in ("img", "txt"):
        model = FluxTwin()
        run = lambda model=model: model(*flux_inputs())  # noqa: E731
        streams = {"img": (0, Entries(2, prefix="rest")), "txt": (1, Entries(2, suffix="rest"))}
        order = [first, *({"img", "txt"} - {first})]
        routes = {
            name: route_blocks(model.double_blocks, 0, 1, 0.5, tokens=name, out=out, per_token={"pe": where})
            for name, (out, where) in ((name, streams[name]) for name in order)
        }
        dense = model.eval()(*flux_inputs())
        model.train()
        for name, route in routes.items():
            assert "gradients" in route.verify(run), name
        for name, tokens in (("img", 12), ("txt", TEXT)):
            routes[name].fixed = torch.stack([torch.randperm(tokens) for _ in range(2)])
        torch.testing.assert_close(run(), dense, rtol=1e-5, atol=1e-5)
        for route in routes.values():
            route.fixed = None
        run().sum().backward()
        assert (routes["img"].keep.shape, routes["txt"].keep.shape) == ((2, 6), (2, 4))
        routes["img"].remove()
        assert "gradients" in routes["txt"].verify(run)
        routes["txt"].remove()
        assert type(model.double_blocks[0]) is Double
        assert torch.equal(run(), dense)


def test_two_routes_over_one_stream_are_refused():
    model = FluxTwin()
    route_blocks(model.double_blocks, 0, 1, 0.5, tokens="img", out=0)
    with pytest.raises(ValueError, match="block 1 .Double. is routed already"):
        route_blocks(model.double_blocks, 1, 2, 0.5, tokens="img", out=0)
    route_blocks(model.double_blocks, 1, 2, 0.5, tokens="txt", out=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({**ACROSS, "out": (0,)}, "out must have an entry for each of 2 kinds of block"),
        ({**ACROSS, "tokens": ("img", "y")}, "Single has none of the arguments 'img', 'y'"),
        ({**ACROSS, "prefix": ("rest", 0)}, "prefix and suffix of block 0, where the route starts, are numbers"),
        ({**ACROSS, "prefix": "rest", "suffix": "rest"}, 'only one of prefix and suffix can be the "rest"'),
        ({**ACROSS, "suffix": "most"}, "suffix is a number of tokens, got most"),
    ],
)
def test_kinds_that_do_not_fit_are_refused(arguments, message):
    model = FluxTwin()
    with pytest.raises(ValueError, match=message):
        route_blocks([*model.double_blocks, *model.single_blocks], 0, 4, 0.5, **arguments)
