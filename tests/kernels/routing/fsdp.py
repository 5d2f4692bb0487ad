"""Two ranks of FSDP2 with compiled, checkpointed and routed blocks against the unsharded model; run by a test.

python -m tests.kernels.routing.fsdp RANK STORE
"""

from __future__ import annotations

import copy
import sys
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from prx_kernels import route_blocks

from .models import Model, inputs

STEPS = 2


def main(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = Model(checkpoint=partial(checkpoint, use_reentrant=False))
    plain = copy.deepcopy(model)
    route, plain_route = (route_blocks(m.blocks, 1, 2, 0.5) for m in (model, plain))
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
        fully_shard(block)
    fully_shard(model)
    for step in range(STEPS):
        model(*inputs(seed=10 * step + rank)).square().mean().backward()
        keeps = [torch.empty_like(route.keep) for _ in range(2)]
        dist.all_gather(keeps, route.keep)
        assert not torch.equal(*keeps), "ranks must draw different sets"
        for other, keep in enumerate(keeps):
            plain_route.fixed = keep
            (plain(*inputs(seed=10 * step + other)).square().mean() / 2).backward()
        for (name, sharded), whole in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(sharded.grad.full_tensor(), whole.grad, rtol=1e-4, atol=1e-6, msg=name)
        model.zero_grad()
        plain.zero_grad()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
