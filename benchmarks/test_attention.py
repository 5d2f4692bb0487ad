"""Image queries over [text, image] keys, with text padded to 256 tokens of which some are real: ways to skip them.

PRX's own is the additive one: a mask of shape (batch, heads, queries, keys), cuDNN's kernel first. Operations count
real keys only.
"""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import device
from benchmarks.measure import Measure
from benchmarks.passes import Which
from benchmarks.peers import require
from benchmarks.plain_prx import masked_kernel
from benchmarks.roofline import attention
from benchmarks.sizes import GPU, text_lengths
from prx_model.attention import attend, pack_keys

DTYPE = torch.bfloat16 if GPU else torch.float32


@dataclass(frozen=True)
class Case:
    batch: int
    queries: int
    heads: int
    head_dim: int
    text: int
    fill: float

    def __str__(self) -> str:
        return f"B{self.batch} H{self.heads} Q{self.queries} L{self.text} fill {self.fill:.0%}"

    def lengths(self) -> list[int]:
        """Real text tokens of each sample."""
        return text_lengths(self.batch, self.text, self.fill)


if GPU:
    # Dense and routed blocks of both stages (docs/recipe.md).
    CASES = [Case(b, q, 28, 64, 256, f) for b, q in ((32, 256), (32, 128), (16, 1024), (16, 512)) for f in (0.4, 1.0)]
else:
    CASES = [Case(2, 16, 2, 16, 8, 0.4), Case(2, 16, 2, 16, 8, 1.0)]

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def additive(q: Tensor, k: Tensor, v: Tensor, text_k: Tensor, text_v: Tensor, mask: Tensor) -> Tensor:
    """A mask of numbers for every head and query, as the PRX repository makes it."""
    key, value = torch.cat((text_k, k), dim=2), torch.cat((text_v, v), dim=2)
    joint = F.pad(mask, (0, k.shape[2]), value=True)
    bias = torch.zeros(joint.shape, dtype=q.dtype, device=q.device).masked_fill(~joint, float("-inf"))
    bias = bias[:, None, None, :].expand(-1, q.shape[1], q.shape[2], -1).contiguous()
    with masked_kernel(q):
        return F.scaled_dot_product_attention(q, key, value, attn_mask=bias)


def broadcast_cudnn(q: Tensor, k: Tensor, v: Tensor, text_k: Tensor, text_v: Tensor, mask: Tensor) -> Tensor:
    """Ours, with cuDNN's kernel before torch's choice."""
    with masked_kernel(q):
        return broadcast(q, k, v, text_k, text_v, mask)


def broadcast(q: Tensor, k: Tensor, v: Tensor, text_k: Tensor, text_v: Tensor, mask: Tensor) -> Tensor:
    return attend(q, torch.cat((text_k, k), dim=2), torch.cat((text_v, v), dim=2), mask, "sdpa")


def varlen(q: Tensor, k: Tensor, v: Tensor, text_k: Tensor, text_v: Tensor, mask: Tensor) -> Tensor:
    return attend(q, torch.cat((text_k, k), dim=2), torch.cat((text_v, v), dim=2), mask, "varlen")


def flash(q: Tensor, k: Tensor, v: Tensor, text_k: Tensor, text_v: Tensor, mask: Tensor) -> Tensor:
    return attend(q, torch.cat((text_k, k), dim=2), torch.cat((text_v, v), dim=2), mask, "flash")


def flash_4(q: Tensor, k: Tensor, v: Tensor, text_k: Tensor, text_v: Tensor, mask: Tensor) -> Tensor:
    """flash-attn-4's kernels over packed keys."""
    from flash_attn.cute import flash_attn_varlen_func

    key, value = torch.cat((text_k, k), dim=2), torch.cat((text_v, v), dim=2)
    packed_key, packed_value, ends = pack_keys(key, value, mask)
    batch, heads, tokens, head_dim = q.shape
    starts = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=q.device)
    query = q.transpose(1, 2).reshape(batch * tokens, heads, head_dim)
    out = flash_attn_varlen_func(
        query, packed_key, packed_value, cu_seqlens_q=starts, cu_seqlens_k=ends, max_seqlen_q=tokens,
        max_seqlen_k=key.shape[2],
    )  # fmt: skip
    out = out[0] if isinstance(out, tuple) else out
    return out.reshape(batch, tokens, heads, head_dim).transpose(1, 2)


def definition(q: Tensor, k: Tensor, v: Tensor, text_k: Tensor, text_v: Tensor, mask: Tensor) -> Tensor:
    """Softmax of masked scores, written out."""
    key, value = torch.cat((text_k, k), dim=2), torch.cat((text_v, v), dim=2)
    joint = F.pad(mask, (0, k.shape[2]), value=True)[:, None, None, :]
    scores = (q @ key.mT * q.shape[-1] ** -0.5).masked_fill(~joint, float("-inf"))
    return scores.softmax(dim=-1) @ value


WAYS = {
    "additive": additive,
    "broadcast": broadcast,
    "broadcast, cuDNN first": broadcast_cudnn,
    "packed": None,
    "varlen": varlen,
    "flash": flash,
    "flash 4": flash_4,
}
NEEDS = {"varlen": "varlen", "flash": "flash-attn", "flash 4": "flash-attn-4"}


def packed(lengths: list[int]):  # type: ignore[no-untyped-def]
    """Real keys only, sample by sample, lengths known to the host (as with cached captions of one length a bucket)."""

    def run(q: Tensor, k: Tensor, v: Tensor, text_k: Tensor, text_v: Tensor, mask: Tensor) -> Tensor:
        parts = []
        for i, length in enumerate(lengths):
            key = torch.cat((text_k[i : i + 1, :, :length], k[i : i + 1]), dim=2)
            value = torch.cat((text_v[i : i + 1, :, :length], v[i : i + 1]), dim=2)
            parts.append(F.scaled_dot_product_attention(q[i : i + 1], key, value))
        return torch.cat(parts)

    return run


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("which", ["forward", "both"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(measure: Measure, case: Case, which: Which, way: str) -> None:
    if way in NEEDS:
        require(NEEDS[way])

    def inputs(seed: int) -> Inputs:
        generator = torch.Generator(device()).manual_seed(seed)
        q, k, v, text_k, text_v = (
            torch.randn(case.batch, case.heads, n, case.head_dim, generator=generator, device=device())
            .to(DTYPE)
            .requires_grad_()
            for n in (case.queries, case.queries, case.queries, case.text, case.text)
        )
        lengths = torch.tensor(case.lengths(), device=device())
        return q, k, v, text_k, text_v, torch.arange(case.text, device=device()) < lengths[:, None]

    keys = case.queries + sum(case.lengths()) / case.batch
    measure(
        op="attention with text mask",
        case=str(case),
        which=which,
        way=way,
        function=WAYS[way] or packed(case.lengths()),
        inputs=inputs,
        reference=definition,
        cost=attention(case.batch, case.heads, case.queries, keys, case.head_dim, which),
        # bf16 keeps 8 bits: 2^-8 for each of scores, weights and output, and sums of them in the gradients.
        tolerance=2e-2 if GPU else 1e-5,
        ours=way == "broadcast",
    )
