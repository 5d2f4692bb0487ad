"""Polynomials of Newton-Schulz orthogonalisation: published coefficients, safe restarts, floating-point operations.

Everything here is arithmetic on Python floats: nothing needs a device, and nothing is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

Polynomial = tuple[float, float, float]  # (a, b, c) of p(x) = a·x + b·x³ + c·x⁵
Coefficients = str | Sequence[float] | Sequence[Sequence[float]]

# Polar Express, degree 5: Amsel et al., https://arxiv.org/abs/2505.16932, algorithm 1. The last is the fixed point.
_POLAR_EXPRESS: tuple[Polynomial, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
# The polynomials take x/1.05 for x (all but the fixed point): rounding may push a singular value above one.
_SAFETY = 1.05

COEFFICIENTS: dict[str, tuple[Polynomial, ...]] = {
    "jordan": ((3.4445, -4.7750, 2.0315),),  # Jordan et al., https://kellerjordan.github.io/posts/muon/
    "polar_express": (
        *((a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS[:-1]),
        _POLAR_EXPRESS[-1],
    ),
}

# --- public ------------------------------------------------------------------------------------------------------


def newton_schulz_flop(
    rows: int, columns: int, ns_steps: int = 5, *, algorithm: str = "plain", restarts: Sequence[int] = ()
) -> float:
    """Floating-point operations to orthogonalise one matrix; n is its smaller side and m the larger.

    | algorithm | | five steps |
    |---|---|---|
    | "plain" | three full products a step | 20n²m + 10n³ |
    | "standard" | the same; of the two symmetric ones only a triangle | 15n²m + 5n³ |
    | "gram" | iterates on X·Xᵀ, see `newton_schulz`; with one restart | 6n²m + 14n³ |

    Raises:
        ValueError: the algorithm is none of these.
    """
    n, m = float(min(rows, columns)), float(max(rows, columns))
    if algorithm == "plain":
        return ns_steps * (4 * n * n * m + 2 * n**3)
    if algorithm == "standard":
        return ns_steps * (3 * n * n * m + n**3)
    if algorithm == "gram":
        stages = 1 + len(restarts)  # each forms X·Xᵀ (a triangle) and Q·X; its first Q and its last R need no product
        return stages * 3 * n * n * m + (ns_steps + 3 * (ns_steps - stages)) * n**3
    raise ValueError(f"algorithm must be 'plain', 'standard' or 'gram', got {algorithm!r}")


# --- coefficients ------------------------------------------------------------------------------------------------


def polynomials(ns_coefficients: Coefficients, ns_steps: int) -> tuple[Polynomial, ...]:
    """The polynomial of every step. Of a longer sequence the first are taken; of a shorter one the last is repeated.

    Args:
        ns_coefficients: "jordan", "polar_express", one triple (a, b, c), or a sequence of triples.

    Raises:
        ValueError: ns_steps is below 1, the name is unknown, or something is not three finite numbers.
    """
    if ns_steps < 1:
        raise ValueError(f"ns_steps must be at least 1, got {ns_steps}")
    if isinstance(ns_coefficients, str):
        if ns_coefficients not in COEFFICIENTS:
            raise ValueError(
                f"ns_coefficients must be one of {', '.join(COEFFICIENTS)} or triples, got {ns_coefficients!r}"
            )
        triples = COEFFICIENTS[ns_coefficients]
    else:
        triples = _triples(ns_coefficients)
    return tuple(triples[min(step, len(triples) - 1)] for step in range(ns_steps))


def _triples(given: Sequence[Any]) -> tuple[Polynomial, ...]:
    triples: list[Polynomial] = []
    nested = [given] if len(given) == 3 and all(isinstance(x, int | float) for x in given) else given
    for triple in nested:
        if not isinstance(triple, Sequence) or len(triple) != 3 or not all(math.isfinite(x) for x in triple):
            raise ValueError(f"ns_coefficients must hold triples (a, b, c) of finite numbers, got {triple!r}")
        a, b, c = triple
        triples.append((float(a), float(b), float(c)))
    if not triples:
        raise ValueError("ns_coefficients must hold at least one triple (a, b, c), got none")
    return tuple(triples)


# --- restarts ----------------------------------------------------------------------------------------------------

# Rounding X·Xᵀ moves an entry by 0.42 u of its size (rms of round-to-nearest over a binade, u the unit roundoff). The
# change is symmetric and has no preferred sign, so at most half of its energy is in the lowest eigenvalue:
# |shift| <= 0.42·u·‖R‖_F / √2, and ‖R‖_F <= 1 after normalisation.
_SHIFT = 0.3
# A stage between restarts may enlarge the largest singular value by a tenth of what exact arithmetic gives.
_GROWTH = 1.1
_GRID = 240  # singular values a stage is tried on: zero, and 1e-6 to 1 in equal ratios


def safe_restarts(steps: tuple[Polynomial, ...], dtype: torch.dtype) -> tuple[int, ...]:
    """Steps before which the Gram form must recompute X·Xᵀ, the fewest that keep the output bounded in `dtype`.

    In the Gram form R = X·Xᵀ is updated on its own, r <- r·p(r)² with p(r) = a + b·r + c·r². Exact r is never negative;
    one that rounding made so grows in size by at least a² a step, and p(r) then exceeds every p of the true interval:
    the output blows up. Forming R anew from X (a restart) resets it. For every stage from step i to step j the scalar
    recursion is run in float64 on singular values x that step i can meet, with r = x² ± s, s = 0.3 u max(x²), and the
    same shift after each update. A stage is safe if its largest x·Πp exceeds the exact one by at most a tenth; a stage
    of one step is the plain iteration and always allowed. Of the paths of safe stages, this is the one with the fewest
    restarts (each costs 3n²m - 3n³), and of those the one whose stages together grow least.

    Five steps of Jordan give (3,) in float16, (2, 3) in bfloat16, () in float32; of Polar Express (2,), (2, 3), ().
    """
    return _fewest_restarts(steps, _SHIFT * torch.finfo(dtype).eps / 2)


# What torch.compiler.assume_constant_result sets, without the second that importing the compiler takes: a compiled
# caller reads the coefficients and runs the search once, and keeps both results.
for _constant in (polynomials, safe_restarts):
    _constant.__dict__["_dynamo_marked_constant"] = True


@lru_cache(maxsize=256)
def _fewest_restarts(steps: tuple[Polynomial, ...], shift: float) -> tuple[int, ...]:
    x = [0.0] + [10 ** (-6 * k / (_GRID - 1)) for k in range(_GRID)]
    met = [x]  # singular values in front of every step, in exact arithmetic
    for a, b, c in steps:
        x = [v * (a + b * v * v + c * v**4) for v in x]
        met.append(x)
    # best[j]: the fewest stages that end at step j, the product of their growths, and where they start.
    best: list[tuple[int, float, tuple[int, ...]]] = [(0, 1.0, ())]
    for end in range(1, len(steps) + 1):
        paths = []
        for start in range(end):
            growth = _growth(met[start], met[end], steps[start:end], shift)
            if growth <= _GROWTH or end == start + 1:
                stages, product, starts = best[start]
                paths.append((stages + 1, product * growth, (*starts, start)))
        best.append(min(paths))
    return best[-1][2][1:]


def _growth(x: list[float], exact: list[float], steps: tuple[Polynomial, ...], shift: float) -> float:
    """Largest output of one stage over the largest exact one, the worse of both signs of the shift."""
    largest = max(map(abs, x)) ** 2
    worst = 0.0
    for sign in (-shift, shift):
        r = [v * v + sign * largest for v in x]
        q = [1.0] * len(x)
        for a, b, c in steps:
            p = [a + b * v + c * v * v for v in r]
            q = [u * v for u, v in zip(q, p, strict=True)]
            r = [u * v * v for u, v in zip(r, p, strict=True)]
            top = max(map(abs, r))
            if not top < 1e60:
                return math.inf
            r = [v + sign * top for v in r]
        worst = max(worst, *(abs(u * v) for u, v in zip(q, x, strict=True)))
    return worst / max(max(map(abs, exact)), 1e-300)
