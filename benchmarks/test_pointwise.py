"""What stands between a block's matrix products, alone: eager and compiled, against the least bytes it must move.

"Ours" is our kernel, or where we have none the compiled form. The model runs that too, but for GELU x up, which it
leaves to the compiler (docs/kernels.md). Beside a profile of the step, compiled rows say what a kernel could win: the
share of the floor that the compiler reaches, times the part's share of the step.
The way from projections to attention is in test_blocks.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import device
from benchmarks.measure import Measure
from benchmarks.passes import Which
from benchmarks.peers import require
from benchmarks.roofline import Cost
from benchmarks.sizes import CONFIG, GPU
from prx_kernels import geglu, norm_modulate, residual_gate_norm_modulate
from prx_model.layers import NORM_EPS

CLOCKS = ("device",)
DTYPE = torch.bfloat16 if GPU else torch.float32
ELEMENT = 2 if GPU else 4
# Kept tokens of the routed blocks, which are 14 of 16, at both stages (docs/recipe.md).
CASES = [(32, 128), (16, 512)] if GPU else [(2, 4)]


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return x + gate[:, None] * branch


def modulated(x: Tensor, modulation: Tensor) -> Tensor:
    """`LayerNorm(x)·(1 + scale) + shift`."""
    shift, scale = modulation[:, None].chunk(2, dim=-1)
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift


def residual_and_modulation(x: Tensor, branch: Tensor, modulation: Tensor) -> Any:
    """The end of one branch and the beginning of the next: the new x, and what the next products read."""
    x = gated_residual(x, branch, modulation[:, : x.shape[-1]])
    return x, modulated(x, modulation[:, x.shape[-1] :])


def our_modulated(x: Tensor, modulation: Tensor) -> Tensor:
    return norm_modulate(x, modulation, eps=NORM_EPS)[1]


def our_residual_and_modulation(x: Tensor, branch: Tensor, modulation: Tensor) -> Any:
    return residual_gate_norm_modulate(x, branch, modulation, eps=NORM_EPS)[:2]


def gelu_times_up(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def liger(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    out: Tensor = LigerGELUMulFunction.apply(gate, up)
    return out


@dataclass(frozen=True)
class Part:
    """A pointwise part of a block, and how often it must pass over its (batch, N, width) tensors at least."""

    function: Callable[..., Any]
    wide: tuple[int, ...]
    """Widths of its (batch, N, width) inputs, in hidden sizes; 0 is the MLP's width."""
    vectors: int
    """Vectors of `hidden` numbers a sample, beside one another in one input; 0 for no such input."""
    forward: int
    backward: int
    """Passes over (batch, N, hidden), or over (batch, N, MLP width): inputs read once, outputs written once."""
    ours: Callable[..., Any] | None = None
    """Our kernel's way, if we have one."""


PARTS = {
    # x read, h written; both read, the gradient written.
    "LayerNorm + modulation": Part(modulated, (1,), 2, 2, 3, our_modulated),
    "gated residual": Part(gated_residual, (1, 1), 1, 3, 3),  # the gradient of x is that of the output
    "gated residual + LayerNorm + modulation": Part(
        residual_and_modulation, (1, 1), 3, 4, 6, our_residual_and_modulation
    ),
    "GELU x up": Part(gelu_times_up, (0, 0), 0, 3, 5, geglu),
}
WAYS = ("ours", "eager", "compiled", "liger-kernel")


def ways(part: Part) -> list[str]:
    """liger-kernel has GELU x up of these, and no modulation."""
    left_out = {"ours"} if part.ours is None else set()
    return [way for way in WAYS if way not in left_out and (way != "liger-kernel" or part.function is gelu_times_up)]


ROWS = [(name, way) for name, part in PARTS.items() for way in ways(part)]


def make_inputs(part: Part, batch: int, tokens: int) -> Callable[[int], tuple[Tensor, ...]]:
    """Random inputs of a part."""

    def inputs(seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device(), DTYPE).requires_grad_()

        widths = [times * CONFIG.hidden_size or CONFIG.mlp_size for times in part.wide]
        made = [random(batch, tokens, width) for width in widths]
        made += [random(batch, part.vectors * CONFIG.hidden_size)] if part.vectors else []
        return tuple(made)

    return inputs


def cost(part: Part, batch: int, tokens: int, which: Which) -> Cost:
    """Least bytes; vectors and tables are small beside them and left out."""
    width = CONFIG.hidden_size if part.wide[0] else CONFIG.mlp_size
    passes = part.forward + (part.backward if which == "both" else 0)
    return Cost(float(passes) * batch * tokens * width * ELEMENT)


@pytest.mark.parametrize("which", ["forward", "both"])
@pytest.mark.parametrize(("name", "way"), ROWS)
@pytest.mark.parametrize(("batch", "tokens"), CASES)
def test_pointwise(measure: Measure, batch: int, tokens: int, name: str, which: Which, way: str) -> None:
    part = PARTS[name]
    function = part.ours if way == "ours" and part.ours is not None else part.function
    if way == "liger-kernel":
        require("liger-kernel")
        function = liger
    if way == "compiled":
        function = torch.compile(function, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    measure(
        op=f"between products: {name}",
        case=f"B{batch} N{tokens}",
        which=which,
        way=way,
        function=function,
        inputs=make_inputs(part, batch, tokens),
        reference=part.function,
        cost=cost(part, batch, tokens, which),
        # One rounding of inputs and outputs to bf16's 8 bits, and sums over tokens of such numbers.
        tolerance=2e-2 if GPU else 1e-5,
        ours=way == ("compiled" if part.ours is None else "ours"),
    )
