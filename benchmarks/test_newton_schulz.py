"""Newton-Schulz for Muon: the symmetric product alone, each PRX shape, all 112 matrices, and what an owner holds.

Rates count the Gram form with one triangle of its symmetric products, the least that is known to do the work, whatever
a way really multiplies: they compare like times. All ways run Jordan's polynomial, and are checked by it in float64.
Peers that take one batch of a shape stack the matrices first, as their optimizers do.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import prx_kernels
from benchmarks.machine import device
from benchmarks.measure import Measure
from benchmarks.peers import eager_on_cpu, require
from benchmarks.roofline import Cost, linear, owner_sample, prx_muon_shapes
from benchmarks.roofline import newton_schulz as newton_schulz_flop

GPU = torch.cuda.is_available()
JORDAN = (3.4445, -4.7750, 2.0315)
SCALE = 1 if GPU else 56
"""PRX's shapes are divided by this on a CPU."""
PRX = [(rows // SCALE, columns // SCALE) for rows, columns in prx_muon_shapes()]
SHAPES = sorted(set(PRX)) if GPU else sorted(set(PRX))[:2]

Matrices = list[Tensor]


def lists() -> dict[str, list[tuple[int, int]]]:
    """What is orthogonalised together: all of the model, what one of 32 ranks owns, one shape."""
    found = {"all 112 of PRX": PRX if GPU else PRX[:7]}
    for count in (1, 2, 3, 4, 6, 8) if GPU else (3,):
        found[f"an owner's {count}"] = owner_sample(PRX, count)
    found |= {f"4 of {rows}x{columns}": [(rows, columns)] * 4 for rows, columns in SHAPES}
    if GPU:
        found |= {f"16 of {rows}x{columns}": [(rows, columns)] * 16 for rows, columns in SHAPES}
    return found


LISTS = lists()


def plain(matrices: Matrices) -> Matrices:
    """Five steps in bf16, the matrices of a shape in one batch through cuBLAS: what most Muons do, batched."""
    return _by_shape(matrices, _plain_batch)


def serial(matrices: Matrices) -> Matrices:
    """torch.optim.Muon's own, one matrix after the other."""
    from torch.optim._muon import _zeropower_via_newtonschulz

    return [_zeropower_via_newtonschulz(m, JORDAN, 5, 1e-7) for m in matrices]


def muon_fsdp2(matrices: Matrices) -> Matrices:
    """One matrix after the other."""
    from muon_fsdp2 import zeropower_via_newtonschulz5

    with eager_on_cpu():
        return [zeropower_via_newtonschulz5(m, 5) for m in matrices]


def ours(matrices: Matrices) -> Matrices:
    return prx_kernels.newton_schulz(matrices)


def gram_newton_schulz() -> Callable[[Matrices], Matrices]:
    """Its own kernels and restart, without its CUDA graphs: the harness makes its own."""
    from gram_newton_schulz import GramNewtonSchulz

    run = GramNewtonSchulz(
        ns_coefficients=[list(JORDAN)] * 5,
        gram_newton_schulz_reset_iterations=[3],
        compile_kwargs={"fullgraph": True},
    )
    return lambda matrices: _by_shape(matrices, run)


def _plain_batch(batch: Tensor) -> Tensor:
    x = batch.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = JORDAN
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _by_shape(matrices: Matrices, run: Callable[[Tensor], Tensor]) -> Matrices:
    groups: dict[torch.Size, list[int]] = {}
    for i, matrix in enumerate(matrices):
        groups.setdefault(matrix.shape, []).append(i)
    results: dict[int, Tensor] = {}
    for members in groups.values():
        made = run(torch.stack([matrices[i] for i in members]))
        results |= dict(zip(members, made.unbind(0), strict=True))
    return [results[i] for i in range(len(matrices))]


def exact(matrix: Tensor) -> Tensor:
    """The polynomial in float64."""
    x = matrix.double()
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / (x.norm() + 1e-7)
    a, b, c = JORDAN
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


WAYS: dict[str, Callable[[], Callable[[Matrices], Matrices]]] = {
    "plain, cuBLAS, a batch a shape": lambda: plain,
    "torch.optim.Muon": lambda: serial,
    "muon-fsdp2": lambda: muon_fsdp2,
    "gram-newton-schulz": gram_newton_schulz,
    "ours": lambda: ours,
}
# Gaussian matrices: fp16 with Jordan's restart stays within 0.005 (docs/kernels.md, Numerics); bf16 keeps 8 bits
# through five steps that each multiply small singular values by 3.4.
TOLERANCE = {"ours": 0.01, "gram-newton-schulz": 0.01}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LISTS)
def test_newton_schulz(measure: Measure, name: str, way: str) -> None:
    if way in ("torch.optim.Muon", "muon-fsdp2", "gram-newton-schulz"):
        require(way)
    shapes = LISTS[name]

    def inputs(seed: int) -> tuple[Any, ...]:
        generator = torch.Generator(device=device()).manual_seed(seed)
        return ([torch.randn(shape, generator=generator, device=device()) for shape in shapes],)

    def worst_error(run: Callable[..., Sequence[Tensor]], arguments: tuple[Any, ...]) -> float:
        made = run(*arguments)
        first = {shape: i for i, shape in reversed(list(enumerate(shapes)))}
        truths = {i: exact(arguments[0][i]) for i in first.values()}
        errors = [float((made[i].double() - truth).norm() / truth.norm()) for i, truth in truths.items()]
        return max(errors) if all(bool(torch.isfinite(y).all()) for y in made) else float("inf")

    measure(
        op="Newton-Schulz, Jordan, 5 steps",
        case=name,
        way=way,
        function=WAYS[way](),
        inputs=inputs,
        verify=worst_error,
        cost=Cost(8.0 * sum(rows * columns for rows, columns in shapes), newton_schulz_flop(shapes, "gram")),
        tolerance=TOLERANCE.get(way, 0.1),
        ours=way == "ours",
    )


FORMS: dict[str, dict[str, Any]] = {
    "standard form": {"algorithm": "standard"},
    "Gram form": {"algorithm": "gram"},
    "Polar Express": {"ns_coefficients": "polar_express"},
    "4 steps": {"ns_steps": 4},
    "4 steps, AOL": {"ns_steps": 4, "preconditioner": "aol"},
}
"""Choices of ours beside its default, which `test_newton_schulz` times."""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [next(iter(LISTS)), f"4 of {SHAPES[0][0]}x{SHAPES[0][1]}"])
def test_forms_of_newton_schulz(measure: Measure, name: str, form: str) -> None:
    """Checked against the same steps in float64; rates count the Gram form of as many steps."""
    shapes, settings = LISTS[name], FORMS[form]

    def inputs(seed: int) -> tuple[Any, ...]:
        generator = torch.Generator(device=device()).manual_seed(seed)
        return ([torch.randn(shape, generator=generator, device=device()) for shape in shapes],)

    def run(matrices: Matrices) -> Matrices:
        return prx_kernels.newton_schulz(matrices, **settings)

    def worst_error(run: Callable[..., Sequence[Tensor]], arguments: tuple[Any, ...]) -> float:
        made, errors = run(*arguments), []
        for i in {shape: i for i, shape in reversed(list(enumerate(shapes)))}.values():
            truth = prx_kernels.newton_schulz(arguments[0][i].double(), **settings, dtype=torch.float64)
            errors.append(float((made[i].double() - truth).norm() / truth.norm()))
        return max(errors) if all(bool(torch.isfinite(y).all()) for y in made) else float("inf")

    measure(
        op="Newton-Schulz, forms of ours",
        case=name,
        way=f"ours, {form}",
        function=run,
        inputs=inputs,
        verify=worst_error,
        cost=Cost(
            8.0 * sum(rows * columns for rows, columns in shapes),
            newton_schulz_flop(shapes, "gram", settings.get("ns_steps", 5)),
        ),
        # Polar Express multiplies small singular values, and the rounding in them, by more than Jordan's steps do.
        tolerance=0.02,
        ours=True,
    )


@pytest.mark.parametrize("way", ["bmm", "ours"])
@pytest.mark.parametrize("batch", (1, 2, 3, 4, 5, 8, 16) if GPU else (1, 2))
def test_symmetric_product(measure: Measure, batch: int, way: str) -> None:
    """R² + R at n = 1792 in fp16; operations are those of one triangle, which is all that has to be formed."""
    n = 1792 // SCALE

    def inputs(seed: int) -> tuple[Tensor, ...]:
        x = torch.randn(batch, n, n, generator=torch.Generator(device=device()).manual_seed(seed), device=device())
        return ((x @ x.mT / n).half(),)

    def square(r: Tensor) -> Tensor:
        return torch.baddbmm(r, r, r)

    def symmetric(r: Tensor) -> Tensor:
        return prx_kernels.sym_gemm(r, r, C=r, beta=1.0)

    measure(
        op=f"symmetric product R*R + R, n = {n}",
        case=f"batch {batch}",
        way=way,
        function=symmetric if way == "ours" else square,
        inputs=inputs,
        reference=square,
        cost=Cost(2.0 * 2 * batch * n * n, batch * linear(n, n, n).flop * (n + 1) / (2 * n)),
        tolerance=2e-3,  # one rounding to fp16's 11 bits, and cuBLAS's own order of sums
        ours=way == "ours",
    )
