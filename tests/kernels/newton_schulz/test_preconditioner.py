"""The almost orthogonal preconditioner: its definition, its numbers in half precision, what it is worth."""

from __future__ import annotations

import pytest
import torch

from prx_kernels import newton_schulz
from prx_kernels.newton_schulz.polynomials import polynomials

from .test_iteration import BOUNDS, bound, error, largest, spectrum


def almost_orthogonal(G: torch.Tensor) -> torch.Tensor:
    """Rows (of tall matrices columns) over the roots of the absolute row sums of G·Gᵀ, in float64."""
    if G.shape[0] > G.shape[1]:
        return almost_orthogonal(G.mT).mT
    return G / (G @ G.mT).abs().sum(dim=1, keepdim=True).sqrt()


def polynomial_alone(X: torch.Tensor, coefficients, ns_steps: int) -> torch.Tensor:
    """The plain iteration in float64, without the division by the norm."""
    for a, b, c in polynomials(coefficients, ns_steps):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X


@pytest.mark.parametrize("algorithm", ["gram", "standard"])
@pytest.mark.parametrize("name", BOUNDS)
def test_the_preconditioned_iteration_is_that_of_the_almost_orthogonal_matrix(name, algorithm):
    """In float16 to the bounds of the plain one, in float64 exactly; wide and tall; with and without a restart."""
    G = spectrum(name)
    scaled = almost_orthogonal(G)
    assert torch.linalg.matrix_norm(scaled, 2) <= 1 + 1e-12
    settings = {"algorithm": algorithm, "preconditioner": "aol"}
    for ns_steps in (2, 4):
        truth = polynomial_alone(scaled, "jordan", ns_steps)
        assert error(newton_schulz(G, ns_steps=ns_steps, dtype=torch.float64, **settings), truth) <= 1e-9
        for given, wanted in ((G, truth), (G.mT, truth.mT)):
            made = newton_schulz(given.float(), ns_steps=ns_steps, **settings)
            assert error(made, wanted) <= BOUNDS[name]
            assert largest(made) <= 1.02 * bound("jordan", ns_steps)


def test_what_the_preconditioner_is_worth_in_four_steps_against_five():
    """Distance to the polar factor with Jordan's coefficients: why it is no default. A step is 12 % at PRX's sizes."""
    found = {}
    for name in BOUNDS:
        G = spectrum(name, 256, 512)
        U, _, Vh = torch.linalg.svd(G, full_matrices=False)
        found[name] = [
            round(error(newton_schulz(G, ns_steps=steps, dtype=torch.float64, preconditioner=kind), U @ Vh), 2)
            for steps, kind in ((5, None), (4, None), (4, "aol"))
        ]
        five, four, preconditioned = found[name]
        assert five < preconditioned, found
        assert preconditioned < four or name == "gaussian", found


def test_a_preconditioned_zero_matrix_and_zero_rows_stay_zero():
    G = spectrum("gaussian").float()
    G[3] = 0
    for algorithm in ("gram", "standard"):
        made = newton_schulz([G, torch.zeros_like(G)], preconditioner="aol", algorithm=algorithm)
        assert not made[0][3].any()
        assert not made[1].any()
        assert made[0].isfinite().all()
