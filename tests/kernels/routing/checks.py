"""Kernel against definition, on the device given: the interpreter runs these on the CPU, a GPU on itself."""

from __future__ import annotations

import torch

from prx_kernels import reference
from prx_kernels.routing import kernels

# (batch, tokens, kept, width): ragged in every dimension, tiles that end inside and at the edge, all tokens kept.
SHAPES = [(2, 7, 3, 5), (1, 2, 1, 1), (2, 33, 16, 70), (2, 17, 17, 64), (1, 300, 290, 17), (1, 18, 9, 264)]


def random_keep(batch: int, tokens: int, kept: int, device: str, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """In no order: kernels must not rely on one."""
    generator = torch.Generator().manual_seed(tokens)
    return torch.stack([torch.randperm(tokens, generator=generator)[:kept] for _ in range(batch)]).to(device, dtype)


def numbers(*shape: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(device, dtype)


def layouts(x: torch.Tensor) -> list[torch.Tensor]:
    """The same values dense, with gaps between rows, transposed, and (first sample only) expanded over the batch."""
    gaps = torch.stack((x, x), dim=2)[:, :, 0]
    return [x, gaps, x.transpose(1, 2).contiguous().transpose(1, 2), x[:1].expand_as(x)]


def check_copies(shape, dtype: torch.dtype, device: str, index: torch.dtype = torch.int32) -> None:
    """Bitwise equal in every dtype: routing copies, and a sum of two numbers rounds once."""
    batch, tokens, kept, width = shape
    keep = random_keep(batch, tokens, kept, device, index)
    dense = numbers(batch, tokens, width, device=device, dtype=dtype)
    for x in layouts(dense) if tokens < 20 else [dense]:
        y = numbers(batch, kept, width, device=device, dtype=dtype)
        same(kernels.gather(x, keep), reference.gather_tokens(x, keep))
        same(kernels.merge(x, y, keep, tokens), reference.scatter_tokens(x, y, keep))
        same(kernels.merge(x, None, keep, tokens), reference.clear_tokens(x, keep))
        spread = reference.scatter_tokens(torch.zeros_like(x), y, keep)
        same(kernels.merge(None, y, keep, tokens), spread)
        cleared = x.clone(memory_format=torch.contiguous_format)
        kernels.update(cleared, None, keep)
        same(cleared, reference.clear_tokens(x, keep))
        # The interpreter computes in bfloat16 only what it copies.
        if dtype != torch.bfloat16 or device != "cpu":
            same(kernels.merge(x, y, keep, tokens, add=True), reference.add_tokens(x, y, keep))
            added = x.clone(memory_format=torch.contiguous_format)
            kernels.update(added, y, keep)
            same(added, reference.add_tokens(x, y, keep))


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def check_sample_keep(tokens: int, kept: int, device: str) -> None:
    ids = torch.tensor([0, 1, -1, 2**32, 2**32 + 1, 2**62], device=device)
    for seed in (0, -1, 2**40 + 17):
        seed = torch.tensor([seed], device=device)
        same(kernels.sample_keep(ids, seed, tokens, kept), reference.smallest_keys(ids, tokens, kept, seed=seed))


def check_ties(device: str) -> None:
    """Cut inside a pair of equal keys, which about one sample in 32 has at 16,384 tokens: the lower index is kept."""
    seed = torch.tensor(0)
    found = 0
    for sample in range(400):
        if found == 3:
            return
        ids = torch.tensor([sample])
        ordered = reference.philox_uint32(seed, ids, 16384)[0].sort().values
        (ties,) = torch.nonzero(ordered[1:] == ordered[:-1], as_tuple=True)
        for kept in (ties + 1).tolist():
            keep = kernels.sample_keep(ids.to(device), seed.to(device), 16384, kept).cpu()
            same(keep, reference.smallest_keys(ids, 16384, kept, seed=seed))
            found += 1
    raise AssertionError(f"only {found} ties found")


def check_addresses_beyond_32_bits(device: str) -> None:
    storage = torch.zeros(2**31 + 64, dtype=torch.int8, device=device)
    storage[-64:] = torch.arange(64, dtype=torch.int8)
    x = storage.as_strided((2, 4, 16), (2**31, 16, 1))
    keep = torch.tensor([[3, 1], [2, 0]], dtype=torch.int32, device=device)
    dense = x.contiguous()
    same(kernels.gather(x, keep), reference.gather_tokens(dense, keep))
    same(kernels.merge(x, None, keep, 4), reference.clear_tokens(dense, keep))


def check_index_out_of_range(device: str) -> None:
    """NaN where something is read, nothing where something would be written; the neighbours of x stay as they are."""
    keep = torch.tensor([[0, 5], [-1, 2]], dtype=torch.int32, device=device)
    outside = [[False, True], [True, False]]
    whole = numbers(4, 5, 8, device=device, dtype=torch.float32)
    before, x = whole.clone(), whole[1:3]
    y = numbers(2, 2, 8, device=device, dtype=torch.float32)
    assert kernels.gather(x, keep).isnan().all(dim=2).tolist() == outside
    kernels.update(x, y, keep)
    before[1, 0] += y[0, 0]
    before[2, 2] += y[1, 1]
    same(whole, before)
    kernels.update(x, None, keep)
    before[1, 0], before[2, 2] = 0, 0
    same(whole, before)
