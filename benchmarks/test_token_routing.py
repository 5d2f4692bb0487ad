"""Entering and leaving a TREAD route: ours, and three published ways, each written here as a plain definition.

All get the same kept sets; drawing them is timed by itself. The reference for all is a scatter of the kept rows. The
rows that enter are an output too: blocks would read them, and a compiler leaves out what nobody reads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import prx_kernels
from benchmarks.machine import device
from benchmarks.measure import Measure
from benchmarks.passes import Which
from benchmarks.roofline import Cost, routing_bytes
from prx_kernels import reference

GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if GPU else torch.float32
RATIO = 0.5


@dataclass(frozen=True)
class Case:
    batch: int
    tokens: int
    channels: int

    def __str__(self) -> str:
        return f"B{self.batch} N{self.tokens} C{self.channels}"

    @property
    def kept(self) -> int:
        return prx_kernels.kept_tokens(self.tokens, RATIO)


SIZES = ((32, 256), (16, 1024), (8, 4096)) if GPU else ((2, 16),)
CASES = [Case(b, n, c) for b, n in SIZES for c in ((1792, 1152) if GPU else (32,))]


Rows = tuple[Tensor, Tensor]
"""What leaves, and what entered."""


def ours(x: Tensor, keep: Tensor, complement: Tensor, update: Tensor) -> Rows:
    y, byp = prx_kernels.enter_route(x, keep)
    return prx_kernels.exit_route(_block(y, update), byp, keep), y.detach()


def prx(x: Tensor, keep: Tensor, complement: Tensor, update: Tensor) -> Rows:
    """The PRX repository's: both parts gathered, both scattered into zeros."""
    y, skipped = _take(x, keep), _take(x, complement)
    updated = _block(y, update)
    out = updated.new_zeros(x.shape).scatter(1, _wide(keep, x), updated)
    return out.scatter(1, _wide(complement, x), skipped), y.detach()


def compvis(x: Tensor, keep: Tensor, complement: Tensor, update: Tensor) -> Rows:
    """CompVis' TREAD: the kept rows gathered, and scattered into a copy of what came before."""
    y = _take(x, keep)
    return x.scatter(1, _wide(keep, x), _block(y, update)), y.detach()


def simpletuner(x: Tensor, keep: Tensor, complement: Tensor, update: Tensor) -> Rows:
    """SimpleTuner's: all rows shuffled, cut; both parts put behind one another, and all rows shuffled back."""
    shuffle = torch.cat((keep, complement), dim=1)
    restore = torch.argsort(shuffle, dim=1)
    kept = keep.shape[1]
    y = torch.take_along_dim(x, _wide(shuffle, x), dim=1)[:, :kept]
    joined = torch.empty_like(x)
    joined[:, :kept] = _block(y, update)
    joined[:, kept:] = torch.take_along_dim(x, _wide(shuffle, x), dim=1)[:, kept:]
    return torch.take_along_dim(joined, _wide(restore, x), dim=1), y.detach()


def definition(x: Tensor, keep: Tensor, complement: Tensor, update: Tensor) -> Rows:
    """The truth that all are checked against."""
    y = reference.gather_tokens(x, keep)
    return reference.scatter_tokens(x, _block(y, update), keep), y.detach()


def _block(y: Tensor, update: Tensor) -> Tensor:
    """What the routed blocks give, as far as traffic goes: another tensor, known beforehand, that depends on y.

    It moves nothing and is a view, so only entering and leaving are timed; its gradient goes on to y.
    """
    return _Swap.apply(y, update)


class _Swap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, update: Tensor) -> Tensor:
        return update.view_as(update)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, _wide(index, x))


def _wide(index: Tensor, x: Tensor) -> Tensor:
    return index.unsqueeze(-1).expand(-1, -1, x.shape[-1])


WAYS: dict[str, Callable[..., Rows]] = {"ours": ours, "PRX": prx, "CompVis": compvis, "SimpleTuner": simpletuner}


def make_inputs(case: Case) -> Callable[[int], tuple[Tensor, ...]]:
    def inputs(seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(device()).manual_seed(seed)
        x, update = (
            torch.randn(case.batch, n, case.channels, generator=generator, device=device()).to(DTYPE)
            for n in (case.tokens, case.kept)
        )
        order = torch.rand(case.batch, case.tokens, generator=generator, device=device()).argsort(dim=1)
        keep, complement = (part.sort(dim=1).values for part in order.split([case.kept, case.tokens - case.kept], 1))
        return x.requires_grad_(), keep, complement, update

    return inputs


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("which", ["forward", "backward", "both"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_enter_and_exit(measure: Measure, case: Case, which: Which, way: str, mode: str) -> None:
    function = WAYS[way] if mode == "eager" else compiled(WAYS[way])
    element = torch.tensor([], dtype=DTYPE).element_size()
    measure(
        op="enter + exit route",
        case=f"{case}, {mode}",  # like is compared with like
        which=which,
        way=way,
        function=function,
        inputs=make_inputs(case),
        reference=definition,
        cost=Cost(routing_bytes(which, case.batch, case.tokens, case.kept, case.channels, element)),
        tolerance=0.0,  # rows are copied
        ours=way == "ours",
    )


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Through Inductor on a GPU; on a CPU, where no time counts, through the graph capture alone."""
    return torch.compile(function, fullgraph=True, backend="inductor" if GPU else "aot_eager")


@pytest.mark.parametrize("way", ["ours", "rand + argsort + sort"])
@pytest.mark.parametrize("case", [c for c in CASES if c.channels == CASES[0].channels], ids=str)
def test_sample_keep(measure: Measure, case: Case, way: str) -> None:
    def inputs(seed: int) -> tuple[Tensor, ...]:
        return torch.arange(case.batch, device=device()), torch.tensor(seed, device=device())

    def draw(ids: Tensor, seed: Tensor) -> Tensor:
        return prx_kernels.sample_keep(ids, case.tokens, RATIO, seed=seed)

    def argsort(ids: Tensor, seed: Tensor) -> Tensor:
        order = torch.rand(len(ids), case.tokens, device=ids.device).argsort(dim=1)
        return order[:, : case.kept].sort(dim=1).values

    def is_a_sorted_subset(run: Callable[..., Tensor], arguments: tuple[Any, ...]) -> float:
        keep = run(*arguments).long()
        right = keep.shape == (case.batch, case.kept) and bool((keep.diff(dim=1) > 0).all())
        return 0.0 if right and int(keep.min()) >= 0 and int(keep.max()) < case.tokens else float("inf")

    measure(
        op="sample kept tokens",
        case=f"B{case.batch} N{case.tokens}",
        way=way,
        function=draw if way == "ours" else argsort,
        inputs=inputs,
        verify=is_a_sorted_subset,
        cost=Cost(4.0 * case.batch * case.kept),
        tolerance=0.0,
        ours=way == "ours",
    )
