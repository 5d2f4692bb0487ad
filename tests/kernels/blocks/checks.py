"""Kernel against definition, on the device given: the interpreter runs these on the CPU, a GPU on itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prx_kernels import reference
from prx_kernels.blocks import gated_gelu, launch, modulation_kernels

EPS = 1e-6
# (batch, tokens, heads, D): one of each, heads that fill no tile, D no power of two, more heads than a tile has.
SHAPES = [(1, 1, 1, 2), (2, 3, 3, 8), (3, 5, 5, 12), (2, 2, 4, 80), (1, 2, 20, 128), (2, 2, 2, 256)]
TEXTS = ("none", "empty", "padded", "packed", "cut", "packed keys")


@dataclass(frozen=True)
class Case:
    """What the op is given."""

    img_qkv: Tensor
    q_weight: Tensor
    k_weight: Tensor
    rope: Tensor
    txt_kv: Tensor | None = None
    txt_k_weight: Tensor | None = None
    txt_offsets: Tensor | None = None
    txt_length: int = 0
    packed_keys: bool = False

    @property
    def floating(self) -> tuple[Tensor | None, ...]:
        """What gets a gradient."""
        return self.img_qkv, self.q_weight, self.k_weight, self.txt_kv, self.txt_k_weight

    @property
    def for_backward(self) -> tuple[Tensor | None, ...]:
        first = self.img_qkv, self.q_weight, self.k_weight, self.rope
        return *first, self.txt_kv, self.txt_k_weight, self.txt_offsets

    def double(self) -> Case:
        """The same numbers in float64."""
        names = ("img_qkv", "q_weight", "k_weight", "rope", "txt_kv", "txt_k_weight")
        values = {name: getattr(self, name) for name in names}
        return replace(self, **{name: x.double() for name, x in values.items() if x is not None})

    def definition(self) -> tuple[Tensor, Tensor, Tensor]:
        given = *self.for_backward, self.txt_length
        return reference.qk_norm_rope(*given, packed_keys=self.packed_keys, eps=EPS)  # type: ignore[arg-type]

    def definition_backward(self, grads: tuple[Tensor, ...]) -> list[Tensor]:
        made = reference.qk_norm_rope_backward(*grads, *self.for_backward, packed_keys=self.packed_keys, eps=EPS)  # type: ignore[arg-type]
        return [x for x in made if x is not None]


def make(
    shape: tuple[int, int, int, int], text: str, dtype: torch.dtype, device: str, *, gaps: bool = False,
    shared: bool = False, lengths: tuple[int, ...] = (3, 0, 5), weights: torch.dtype | None = None,
) -> Case:  # fmt: skip
    """Random inputs; `gaps` puts them into wider tensors, `shared` gives all samples one table of positions."""
    batch, tokens, heads, head_dim = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def numbers(*size: int) -> Tensor:
        wide = torch.randn(*size[:-1], size[-1] + (8 if gaps else 0), generator=generator).to(device, dtype)
        return wide[..., : size[-1]]

    def weight() -> Tensor:
        return (0.5 + torch.rand(head_dim, generator=generator)).to(device, weights or dtype)

    angle = torch.randn(1 if shared else batch, tokens, head_dim // 2, generator=generator)
    rope = torch.stack((angle.cos(), angle.sin()), dim=-1).to(device)
    case = Case(numbers(batch, tokens, 3 * heads * head_dim), weight(), weight(), rope)
    width = 2 * heads * head_dim
    if text in ("padded", "empty"):
        length = 4 if text == "padded" else 0
        return replace(case, txt_kv=numbers(batch, length, width), txt_k_weight=weight())
    if text == "none":
        return case
    real = [lengths[i % len(lengths)] for i in range(batch)]
    offsets = torch.tensor([0, *real]).cumsum(0).to(device, torch.int32)
    case = replace(case, txt_kv=numbers(sum(real) + 2, width), txt_k_weight=weight(), txt_offsets=offsets)
    if text == "packed keys":
        return replace(case, packed_keys=True)
    return replace(case, txt_length=max(real) + 1 if text == "packed" else max(max(real) - 1, 0))


def gradients(case: Case, seed: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Incoming gradients in the layout that attention gives, heads before tokens; NaN where it need write none."""
    generator = torch.Generator(case.rope.device).manual_seed(seed)
    made = []
    for x in case.definition():
        turned = x.transpose(-3, -2)
        grad = torch.randn(turned.shape, generator=generator, device=x.device).to(x.dtype).transpose(-3, -2)
        made.append(grad)
    if case.packed_keys and case.txt_offsets is not None:
        end = int(case.txt_offsets[-1]) + case.img_qkv.shape[0] * case.img_qkv.shape[1]
        made[1][end:], made[2][end:] = float("nan"), float("nan")
    return made[0], made[1], made[2]


def check(case: Case) -> None:
    """Error against float64 at most twice that of the definition in the same dtype, forward and backward."""
    exact = case.double()
    given = *case.for_backward, case.txt_length, case.packed_keys, EPS
    compare(launch.forward(*given), case.definition(), exact.definition())  # type: ignore[arg-type]
    grads = gradients(case)
    img, txt, weights = launch.backward(*grads, *case.for_backward, case.packed_keys, EPS)  # type: ignore[arg-type]
    assert weights.dtype == case.q_weight.dtype
    actual = [img, weights[0], weights[1], *([] if case.txt_kv is None else [txt, weights[2]])]
    if case.txt_kv is None:
        assert torch.count_nonzero(weights[2]) == 0
    plain = case.definition_backward(grads)
    compare(actual, plain, exact.definition_backward(tuple(g.double() for g in grads)))  # type: ignore[arg-type]


def compare(actual: tuple[Tensor, ...], plain: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> None:
    for got, formula, exact in zip(actual, plain, truth, strict=True):
        assert got.shape == exact.shape
        if not exact.numel():
            continue
        # The definition sums weights' gradients in float32 and does not round them to the weights' dtype.
        formula = formula.to(got.dtype)
        # One rounding of the largest value; 64 in float64, where the truth is rounded like the formula.
        ulps = 1 if got.dtype != torch.float64 else 64
        rounding = ulps * torch.finfo(got.dtype).eps * exact.abs().max()
        error, allowed = ((x.double() - exact).abs().max() for x in (got, formula))
        assert error <= 2 * allowed + rounding, (got.shape, got.dtype, error, allowed)


# --- residual, gate, LayerNorm, modulation ---------------------------------------------------------------------------

# (batch, tokens, C): one of each, rows that fill no tile, a tile exactly, several rows a program.
ROWS = [(1, 1, 1), (2, 3, 5), (3, 7, 70), (2, 2, 512), (1, 3, 1000)]


def check_modulation(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str, *, vectors: torch.dtype | None = None
) -> None:
    """Both forms, forward and backward, with every set of incoming gradients."""
    batch, _, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    x, branch, grad_x, grad_y, grad_h = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(5))
    # Read in place from a wider projection, as a block does.
    wide = torch.randn(batch, 6 * width, generator=generator).to(device, vectors or dtype)
    for side, given in ((None, wide[:, : 2 * width]), (branch, wide[:, 2 * width : 5 * width])):
        inputs = x, side, given
        compare(modulation_kernels.forward(*inputs, EPS), plain_modulation(*inputs), plain_modulation(*doubled(inputs)))
        for other, again in ((grad_y, grad_x), (grad_y, None), (None, None)):
            arguments = (other, grad_h, again, *inputs)
            actual = modulation_kernels.backward(*arguments, EPS)
            plain = reference.residual_gate_norm_modulate_backward(*arguments, eps=EPS)
            exact = reference.residual_gate_norm_modulate_backward(*doubled(arguments), eps=EPS)
            compare(*([made[0], made[2].sum(1)] for made in (actual, plain, exact)))  # type: ignore[arg-type]
            if plain[1] is not None and exact[1] is not None:
                compare((actual[1],), (plain[1],), (exact[1],))


def doubled(tensors: tuple[Tensor | None, ...]) -> Any:
    """The same numbers in float64."""
    return [t if t is None else t.double() for t in tensors]


def plain_modulation(x: Tensor, branch: Tensor | None, modulation: Tensor) -> tuple[Tensor, Tensor]:
    if branch is None:
        return x, reference.norm_modulate(x, modulation, eps=EPS)
    return reference.residual_gate_norm_modulate(x, branch, modulation, eps=EPS)


# --- gated GELU --------------------------------------------------------------------------------------------------


def check_geglu(shape: tuple[int, ...], dtype: torch.dtype, device: str, approximate: str) -> None:
    """Of two tensors and of halves of one, forward and backward, from -8 to 8."""
    generator = torch.Generator().manual_seed(sum(shape))
    wide = (torch.rand(*shape[:-1], 2 * shape[-1], generator=generator) * 16 - 8).to(device, dtype)
    grad = torch.randn(shape, generator=generator).to(device, dtype)
    halves = wide.chunk(2, dim=-1)
    for inputs in (halves, tuple(half.contiguous() for half in halves)):
        exact: Any = doubled(inputs)
        formula = (reference.geglu(*given, approximate=approximate) for given in (inputs, exact))
        compare((gated_gelu.launch_geglu(*inputs, approximate),), *((x,) for x in formula))  # type: ignore[arg-type]
        compare(
            gated_gelu.launch_geglu_backward(grad, *inputs, approximate),
            reference.geglu_backward(grad, *inputs, approximate=approximate),
            reference.geglu_backward(grad.double(), *exact, approximate=approximate),
        )
