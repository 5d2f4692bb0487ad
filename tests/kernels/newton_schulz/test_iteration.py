"""Newton-Schulz: its numbers in half precision, its launches, its layouts and errors. All on the CPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prx_kernels import newton_schulz, newton_schulz_flop, reference, safe_restarts, zeropower_via_newtonschulz5
from prx_kernels.newton_schulz.polynomials import COEFFICIENTS, polynomials

N, M = 128, 256
HALF = [torch.float16, torch.bfloat16]


def spectrum(name: str, n: int = N, m: int = M) -> torch.Tensor:
    """(n, m) float64 with the singular values that docs/kernels.md, section 2, bounds errors for."""
    generator = torch.Generator().manual_seed(n)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    if name == "gaussian":
        return normal(n, m)
    if name == "rank 16 and noise":
        return normal(n, 16) @ normal(16, m) / m**0.5 + 1e-3 * normal(n, m)
    if name == "rank one":
        return normal(n, 1) @ normal(1, m)
    values = {"1/i": 1 / torch.arange(1, n + 1, dtype=torch.float64), "log-spaced": torch.logspace(0, -6, n).double()}
    u, v = torch.linalg.qr(normal(n, n))[0], torch.linalg.qr(normal(m, n))[0]
    return (u * values[name]) @ v.mT


BOUNDS = {"gaussian": 0.005, "1/i": 0.01, "log-spaced": 0.02, "rank 16 and noise": 0.05}
SPECTRA = [*BOUNDS, "rank one"]


def exact(G: torch.Tensor, coefficients="jordan", ns_steps: int = 5) -> torch.Tensor:
    return reference.newton_schulz(G, polynomials(coefficients, ns_steps), restarts=None, dtype=torch.float64)


def error(Y: torch.Tensor, truth: torch.Tensor) -> float:
    return float((Y.double() - truth).norm() / truth.norm())


def largest(Y: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(Y.double(), 2))


def bound(coefficients, ns_steps: int) -> float:
    """The largest value the polynomials take on [0, 1]: what exact arithmetic can reach."""
    x = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    for a, b, c in polynomials(coefficients, ns_steps):
        x = a * x + b * x**3 + c * x**5
    return float(x.abs().max())


# --- numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOUNDS)
def test_float16_is_as_near_to_exact_arithmetic_as_kernels_md_says(name):
    G = spectrum(name)
    Y = newton_schulz(G.float(), algorithm="gram")
    truth = exact(G)
    assert error(Y, truth) <= BOUNDS[name]
    plain = reference.newton_schulz(G, polynomials("jordan", 5), restarts=None, dtype=torch.bfloat16)
    assert error(Y, truth) <= error(plain, truth), "worse than the plain iteration in bfloat16"
    assert largest(Y) <= 1.215
    U, values, Vh = torch.linalg.svd(G, full_matrices=False)
    gain = ((U.mT @ Y.double()) * Vh).sum(1)[values / G.norm() >= 1e-3]
    assert len(gain) >= 16
    assert gain.min() >= 0.46
    assert gain.max() <= 1.215


@pytest.mark.parametrize("algorithm", ["gram", "standard"])
@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("name", SPECTRA)
def test_both_forms_stay_below_the_polynomials_largest_value(name, coefficients, algorithm):
    G = spectrum(name, 96, 160).float()
    for dtype, slack in ((torch.float16, 1.02), (torch.bfloat16, 1.06)):
        Y = newton_schulz(G, ns_coefficients=coefficients, algorithm=algorithm, dtype=dtype)
        assert largest(Y) <= slack * bound(coefficients, 5)


# Polar Express without a restart enlarges even float64's rounding, to 2e-12.
@pytest.mark.parametrize(
    ("coefficients", "restarts"),
    [
        ("jordan", ()),
        ("jordan", (3,)),
        ("jordan", (1, 2, 3, 4)),
        ("polar_express", (2,)),
        ("polar_express", (1, 2, 3, 4)),
    ],
)
def test_forms_are_equal_in_float64(coefficients, restarts):
    G = torch.stack([spectrum(name, 24, 40) for name in ("gaussian", "1/i", "log-spaced")])
    settings = {"ns_coefficients": coefficients, "dtype": torch.float64}
    plain = newton_schulz(G, algorithm="standard", **settings)
    gram = newton_schulz(G, algorithm="gram", restarts=restarts, **settings)
    torch.testing.assert_close(gram, plain, rtol=0, atol=1e-12)
    x = torch.linalg.svdvals(G / torch.linalg.matrix_norm(G, keepdim=True))
    for a, b, c in polynomials(coefficients, 5):
        x = a * x + b * x**3 + c * x**5
    # Values come sorted from the decomposition; a polynomial above its interval's turning points unsorts them.
    torch.testing.assert_close(torch.linalg.svdvals(plain), x.sort(descending=True).values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("restarts", [None, (), (2,), (1, 3)])
def test_what_is_called_equals_the_definition(dtype, restarts):
    for shape in ((24, 40), (40, 24), (2, 24, 24)):
        G = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        settings = {"algorithm": "standard"} if restarts is None else {"algorithm": "gram", "restarts": restarts}
        truth = reference.newton_schulz(G, polynomials("jordan", 5), restarts=restarts, dtype=dtype)
        # Tall matrices are multiplied from the other side: other sums.
        torch.testing.assert_close(
            newton_schulz(G, dtype=dtype, **settings), truth, rtol=0, atol=8 * torch.finfo(dtype).eps
        )


def test_zeropower_is_the_published_iteration_in_bfloat16_and_nearer_to_exact():
    for shape in ((40, 64), (64, 40), (3, 2, 24, 24)):
        G = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        X = (G.mT if shape[-2] > shape[-1] else G).bfloat16()
        X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(5):
            A = X @ X.mT
            X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
        published = X.mT if shape[-2] > shape[-1] else X
        Y = zeropower_via_newtonschulz5(G)
        assert Y.dtype == torch.bfloat16
        assert Y.shape == G.shape
        truth = exact(G.double())
        assert error(Y, truth) <= error(published, truth) < 0.05
    assert torch.equal(zeropower_via_newtonschulz5(G, steps=1), newton_schulz(G, ns_steps=1).bfloat16())


# --- restarts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("coefficients", "float16", "bfloat16", "float32"),
    [("jordan", (3,), (2, 3), ()), ("polar_express", (2,), (2, 3), ())],
)
def test_restarts_of_the_published_coefficients(coefficients, float16, bfloat16, float32):
    steps = polynomials(coefficients, 5)
    assert safe_restarts(steps, torch.float16) == float16
    assert safe_restarts(steps, torch.bfloat16) == bfloat16
    assert safe_restarts(steps, torch.float32) == float32


@pytest.mark.parametrize("coefficients", [*COEFFICIENTS, (1.875, -1.25, 0.375), (3.0, -3.2, 1.2)])
@pytest.mark.parametrize("ns_steps", [1, 2, 3, 4, 6, 8, 10])
def test_derived_restarts_keep_every_spectrum_bounded(coefficients, ns_steps):
    steps = polynomials(coefficients, ns_steps)
    fewer = 0
    for dtype in (torch.float64, torch.float32, *HALF):
        restarts = safe_restarts(steps, dtype)
        assert fewer <= len(restarts) < max(ns_steps, 1), "a coarser dtype needs no fewer restarts"
        fewer = len(restarts)
        for name in ("1/i", "log-spaced", "rank one"):
            Y = newton_schulz(spectrum(name, 48, 64).float(), ns_coefficients=coefficients, ns_steps=ns_steps,
                              algorithm="gram", dtype=dtype)  # fmt: skip
            assert largest(Y) <= 1.1 * bound(coefficients, ns_steps), (name, dtype, restarts)


@pytest.mark.parametrize(
    ("coefficients", "dtype", "restarts"),
    [
        ("jordan", torch.float16, ()),
        ("polar_express", torch.float16, ()),
        ("jordan", torch.bfloat16, ()),
        ("polar_express", torch.bfloat16, (2,)),
        ("polar_express", torch.bfloat16, (1, 2)),
    ],
)
def test_with_fewer_restarts_than_derived_the_output_grows(coefficients, dtype, restarts):
    settings = {"ns_coefficients": coefficients, "dtype": dtype, "algorithm": "gram"}
    G = spectrum("log-spaced").float()
    assert largest(newton_schulz(G, **settings)) <= 1.03 * bound(coefficients, 5)
    assert largest(newton_schulz(G, restarts=restarts, **settings)) > 1.1 * bound(coefficients, 5)


# --- operations and launches -------------------------------------------------------------------------------------


class Count(TorchDispatchMode):
    """Products launched, as (name, batch, n, columns), and every op seen."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[str, int, int, int]] = []
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1]
        self.seen.add(name)
        if name in ("sym_gemm", "sym_gemm_out", "bmm"):
            self.products.append((name, *args[0].shape[:2], args[1].shape[2]))
        if name == "baddbmm":
            self.products.append(("bmm", *args[1].shape[:2], args[2].shape[2]))
        return func(*args, **(kwargs or {}))

    @property
    def flop(self) -> int:
        """A symmetric product of n×k operands counts n²k, a general one of n×n with n×m 2n²m."""
        return sum((2 if name == "bmm" else 1) * b * n * n * m for name, b, n, m in self.products)


@pytest.mark.parametrize(("ns_steps", "restarts"), [(5, (3,)), (5, ()), (1, ()), (7, (2, 4)), (3, (1, 2))])
def test_formula_counts_the_products_that_are_launched(ns_steps, restarts):
    G = torch.randn(2, 6, 10)
    for algorithm in ("gram", "standard"):
        chosen = restarts if algorithm == "gram" else ()
        with Count() as count:
            newton_schulz(G, ns_steps=ns_steps, algorithm=algorithm, restarts=chosen)
        assert count.flop == 2 * newton_schulz_flop(6, 10, ns_steps, algorithm=algorithm, restarts=chosen)


@pytest.mark.parametrize("rows", [6, 12, 24])
def test_auto_takes_the_form_of_fewer_operations(rows):
    costs = []
    for algorithm in ("gram", "standard", "auto"):
        with Count() as count:
            newton_schulz(torch.randn(rows, 12), algorithm=algorithm)
        costs.append(count.flop)
    assert costs[2] == min(costs)
    assert (costs[0] < costs[1]) == (rows != 12)


def test_different_shapes_share_the_launches_of_their_square_products():
    shapes = [(6, 10), (14, 6), (2, 6, 7), (9, 6)]
    with Count() as alone:
        newton_schulz(torch.randn(6, 10))
    with Count() as mixed:
        newton_schulz([torch.randn(shape) for shape in shapes])
    square = [p for p in mixed.products if p[0] == "sym_gemm"]
    assert all(batch == 5 for _, batch, _, _ in square)
    # A single shape makes its X·Xᵀ by `sym_gemm` too, once before each of two stages.
    assert len(square) == sum(p[0] == "sym_gemm" for p in alone.products) - 2 == 14
    for name in ("sym_gemm_out", "bmm"):
        assert sum(p[0] == name for p in mixed.products) == 2 * len(shapes)
    assert not {"_local_scalar_dense", "item", "nonzero", "equal"} & mixed.seen, "waits for the device"


# --- layouts, dtypes, broken input -------------------------------------------------------------------------------


def test_a_mixed_list_equals_its_members_one_by_one():
    generator = torch.Generator().manual_seed(1)
    shapes = [
        (6, 10),
        (10, 6),
        (2, 6, 7),
        (9, 6),
        (6, 6),
        (1, 5),
        (5, 1),
        (1, 1),
        (3, 2, 4, 8),
        (6, 10),
        (0, 4),
        (0, 3, 4),
    ]
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    matrices = [torch.randn(s, generator=generator).to(dtypes[i % 4]) for i, s in enumerate(shapes)]
    for settings in ({}, {"algorithm": "standard"}, {"algorithm": "gram", "dtype": torch.float32}):
        together = newton_schulz(tuple(matrices), **settings)
        assert isinstance(together, list)
        for G, Y in zip(matrices, together, strict=True):
            assert (Y.shape, Y.dtype) == (G.shape, G.dtype)
            assert torch.equal(Y, newton_schulz(G, **settings))
    assert newton_schulz([]) == []


def test_the_order_of_a_batch_and_the_layout_in_memory_change_nothing():
    G = torch.stack([spectrum(name, 32, 48) for name in BOUNDS]).float()
    order = torch.tensor([2, 0, 3, 1])
    Y = newton_schulz(G)
    assert torch.equal(newton_schulz(G[order]), Y[order])
    assert torch.equal(torch.stack(newton_schulz(list(G))), Y)
    # Tall matrices are the transposes of wide ones, in another layout: other sums, in float32 before rounding.
    torch.testing.assert_close(newton_schulz(G.mT), Y.mT, rtol=0, atol=2e-3)
    assert torch.equal(newton_schulz(G.mT.contiguous().mT), Y)
    assert torch.equal(newton_schulz(torch.stack((G, G), dim=3)[..., 0]), Y)
    assert torch.equal(newton_schulz(torch.stack((G, G))), torch.stack((Y, Y)))


@pytest.mark.parametrize("algorithm", ["gram", "standard"])
def test_any_finite_size_is_normalised(algorithm):
    G = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    Y = newton_schulz(G, algorithm=algorithm)
    for power in (-8, 100, 120):  # 2^120 · 12 is near the end of float32, its square far outside
        torch.testing.assert_close(newton_schulz(G * 2.0**power, algorithm=algorithm), Y, rtol=0, atol=5e-3)
    half = (G / G.abs().max() * 65504).half()
    assert half.float().norm() > 65504
    torch.testing.assert_close(newton_schulz(half, algorithm=algorithm).float(), Y, rtol=0, atol=5e-3)
    # eps counts in full: far below it the result is zero, as G / (norm + eps) says.
    assert newton_schulz(G * 2.0**-100, algorithm=algorithm).abs().max() < 1e-6
    assert torch.equal(newton_schulz(torch.zeros(3, 8, 12), algorithm=algorithm), torch.zeros(3, 8, 12))


@pytest.mark.parametrize("algorithm", ["gram", "standard"])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_matrix_is_nan_and_leaves_the_others_alone(algorithm, broken):
    G = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(0))
    good = newton_schulz(G, algorithm=algorithm)
    G[1, 2, 3] = broken
    Y = newton_schulz(G, algorithm=algorithm)
    assert Y[1].isnan().all()
    assert torch.equal(Y[[0, 2]], good[[0, 2]])


def test_autocast_changes_nothing():
    G = [torch.randn(12, 20), torch.randn(12, 12)]
    expected = newton_schulz(G, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        actual = newton_schulz(G, dtype=torch.float32)
    assert all(map(torch.equal, actual, expected))


def test_coefficients_come_as_a_name_a_triple_or_a_sequence():
    G = torch.randn(12, 20)
    jordan = newton_schulz(G)
    assert torch.equal(newton_schulz(G, ns_coefficients=(3.4445, -4.7750, 2.0315)), jordan)
    assert torch.equal(newton_schulz(G, ns_coefficients=[[3.4445, -4.7750, 2.0315]] * 9), jordan)
    other = newton_schulz(G, ns_coefficients=[(3.4445, -4.7750, 2.0315), (1.875, -1.25, 0.375)], ns_steps=3)
    triples = [(3.4445, -4.7750, 2.0315), (1.875, -1.25, 0.375), (1.875, -1.25, 0.375)]
    assert torch.equal(newton_schulz(G, ns_coefficients=triples, ns_steps=3), other)
    # The published first polynomial with x/1.05 for x; the last, a fixed point, as it is.
    assert polynomials("polar_express", 9)[0] == pytest.approx((7.89258287, -20.38301, 13.55518), rel=1e-5)
    assert polynomials("polar_express", 9)[7:] == ((1.875, -1.25, 0.375),) * 2


@pytest.mark.parametrize(
    ("arguments", "settings", "kind", "message"),
    [
        ((4, 6), {"ns_coefficients": "quintic"}, ValueError, "one of jordan, polar_express or triples, got 'quintic'"),
        (
            (4, 6),
            {"ns_coefficients": [(1.0, 2.0)]},
            ValueError,
            r"triples \(a, b, c\) of finite numbers, got \(1.0, 2.0\)",
        ),
        ((4, 6), {"ns_coefficients": (1.0, float("nan"), 1.0)}, ValueError, "finite numbers"),
        ((4, 6), {"ns_coefficients": []}, ValueError, "at least one triple"),
        ((4, 6), {"ns_steps": 0}, ValueError, "ns_steps must be at least 1, got 0"),
        ((6,), {}, ValueError, r"matrices \(..., rows, columns\), got shape \(6,\)"),
        ((4, 6), {"dtype": torch.int8}, TypeError, "dtype must be float16, .* got torch.int8"),
        ((4, 6), {"restarts": (5,)}, ValueError, r"restarts must be steps in 1 … 4 \(ns_steps - 1\), got 5"),
        ((4, 6), {"restarts": (0,)}, ValueError, "restarts must be steps in 1 … 4 .* got 0"),
        ((4, 6), {"restarts": "none"}, ValueError, "restarts must be 'auto' or steps, got 'none'"),
        ((4, 6), {"restarts": (2,), "algorithm": "standard"}, ValueError, r"got \(2,\) with algorithm 'standard'"),
        ((4, 6), {"algorithm": "plain"}, ValueError, "'auto', 'gram' or 'standard', got 'plain'"),
        ((4, 6), {"eps": -1.0}, ValueError, "eps must be at least 0, got -1.0"),
    ],
)
def test_errors_are_sentences(arguments, settings, kind, message):
    with pytest.raises(kind, match=message):
        newton_schulz(torch.randn(arguments), **settings)


def test_what_is_no_floating_tensor_is_refused():
    with pytest.raises(TypeError, match="floating-point tensors, got torch.int64"):
        newton_schulz(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="floating-point tensors, got float"):
        newton_schulz([torch.ones(2, 3), 1.0])
    with pytest.raises(ValueError, match="'plain', 'standard' or 'gram', got 'auto'"):
        newton_schulz_flop(2, 3, algorithm="auto")


def test_a_gradient_that_would_be_lost_is_an_error():
    weight = torch.randn(4, 6, requires_grad=True)
    for function in (newton_schulz, zeropower_via_newtonschulz5):
        with pytest.raises(RuntimeError, match="newton_schulz has no gradient: detach its input or call it under"):
            function(weight)
        with torch.no_grad():
            assert not function(weight).requires_grad
