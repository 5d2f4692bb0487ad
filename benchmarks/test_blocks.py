"""From the projections of a block to what its attention reads: our one pass against the plain form and Inductor's.

liger-kernel has a norm and rotary positions apart, of halves and not of pairs, and nothing that joins text and image.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.machine import device
from benchmarks.measure import Measure
from benchmarks.passes import Which
from benchmarks.roofline import Cost
from benchmarks.sizes import CONFIG, GPU, text_lengths
from prx_kernels import qk_norm_rope, reference
from prx_kernels.reference import padded_rows
from prx_model.layers import NORM_EPS, rotary_table
from prx_model.packed_text import LENGTH_STEP, ROWS_STEP

CLOCKS = ("device",)
DTYPE = torch.bfloat16 if GPU else torch.float32
ELEMENT = 2 if GPU else 4
# Dense and routed blocks of both stages (docs/recipe.md), captions 40 % full.
CASES = [(32, 256), (32, 128), (16, 1024), (16, 512)] if GPU else [(2, 4)]
LONGEST = 256 if GPU else 8


def lengths(batch: int) -> list[int]:
    """Text tokens of each sample."""
    return text_lengths(batch, LONGEST, 0.4)


def places(batch: int) -> int:
    """Places of text that each sample has, as `prx_model.packed_text.pack` rounds them."""
    return -(-max(lengths(batch)) // LENGTH_STEP) * LENGTH_STEP


def ours(img_qkv: Tensor, txt_kv: Tensor, q: Tensor, k: Tensor, text: Tensor, table: Tensor, offsets: Tensor) -> Any:
    length = places(img_qkv.shape[0])
    made = qk_norm_rope(img_qkv, q, k, table, txt_kv, text, txt_offsets=offsets, txt_length=length, eps=NORM_EPS)
    return tuple(x.transpose(1, 2) for x in made)


def plain(img_qkv: Tensor, txt_kv: Tensor, q: Tensor, k: Tensor, text: Tensor, table: Tensor, offsets: Tensor) -> Any:
    length = places(img_qkv.shape[0])
    return reference.qk_norm_rope(img_qkv, q, k, table, txt_kv, text, offsets, length, eps=NORM_EPS)


def well_fused(
    img_qkv: Tensor, txt_kv: Tensor, q: Tensor, k: Tensor, text: Tensor, table: Tensor, offsets: Tensor
) -> Any:
    """The plain form that Inductor fused best: tables as wide as a head, pairs turned by flipping them, no stack.

    Its kernels move half as much again as ours (512 dense: 857 MB for 560, counted by benchmarks.dry_step's way).
    """
    head_dim = q.shape[0]
    cos = table[..., 0].repeat_interleave(2, -1)[:, :, None]
    signs = torch.tensor((-1.0, 1.0), device=table.device).repeat(head_dim // 2)
    sin = table[..., 1].repeat_interleave(2, -1)[:, :, None] * signs

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPS) * weight

    def turned(x: Tensor, weight: Tensor) -> Tensor:
        x = normed(x, weight)
        return x * cos + x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) * sin

    query, key, value = img_qkv.unflatten(-1, (3, -1, head_dim)).unbind(-3)
    text_key, text_value = txt_kv.unflatten(-1, (2, -1, head_dim)).unbind(-3)
    rows = normed(text_key, text).to(value.dtype), text_value
    first, second = (padded_rows(x, offsets, places(img_qkv.shape[0])) for x in rows)
    key = torch.cat((first, turned(key, k).to(value.dtype)), dim=1)
    return turned(query, q).to(value.dtype), key, torch.cat((second, value), dim=1)


def make_inputs(batch: int, tokens: int) -> Callable[[int], tuple[Tensor, ...]]:
    """Outputs of the projections, scales of the norms in float32, a gathered table, offsets."""
    real = lengths(batch)
    rows = -(-sum(real) // ROWS_STEP) * ROWS_STEP if GPU else sum(real) + 1

    def inputs(seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
            return torch.randn(shape, generator=generator).to(device(), dtype).requires_grad_()

        scales = [random(CONFIG.head_dim, dtype=torch.float32) for _ in range(3)]
        table = rotary_table(1, tokens, CONFIG.axes_dim, CONFIG.theta, device()).expand(batch, -1, -1, -1).contiguous()
        offsets = torch.tensor([0, *real]).cumsum(0).to(device(), torch.int32)
        image, text = random(batch, tokens, 3 * CONFIG.hidden_size), random(rows, 2 * CONFIG.hidden_size)
        return image, text, *scales, table, offsets

    return inputs


def cost(batch: int, tokens: int, which: Which) -> Cost:
    """Least bytes: projections read, heads written; backward reads no values and writes gradients."""
    rows, joint, width = sum(lengths(batch)), batch * (places(batch) + tokens), CONFIG.hidden_size * ELEMENT
    image = batch * tokens
    forward = 3 * image + 2 * rows + image + 2 * joint
    backward = image + 2 * (image + rows) + 2 * image + rows + 3 * image + 2 * rows
    table = image * CONFIG.head_dim * 4
    if which == "forward":
        return Cost(float(forward * width + table))
    return Cost(float((forward + backward) * width + 2 * table))


WAYS = {"ours": ours, "plain": plain, "plain, compiled": plain, "well fused, compiled": well_fused}


@pytest.mark.parametrize("which", ["forward", "both"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("batch", "tokens"), CASES)
def test_qk_norm_rope(measure: Measure, batch: int, tokens: int, way: str, which: Which) -> None:
    function: Callable[..., Any] = WAYS[way]
    if way.endswith("compiled"):
        function = torch.compile(function, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    measure(
        op="qk_norm_rope",
        case=f"B{batch} N{tokens}",
        which=which,
        way=way,
        function=function,
        inputs=make_inputs(batch, tokens),
        reference=plain,
        cost=cost(batch, tokens, which),
        # One rounding of inputs and outputs to bf16's 8 bits, and sums over tokens of such numbers.
        tolerance=2e-2 if GPU else 1e-5,
        ours=way == "ours",
    )
