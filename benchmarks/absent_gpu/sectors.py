"""Bytes that a kernel of Inductor moves: 32-byte sectors that its index expressions touch, each once an argument.

Sectors are what an NVIDIA GPU reads and writes at least. Inductor's own estimate takes every element at its width, and
so misses what strided reads cost.
"""

from typing import Any

import numpy as np
import sympy

SECTOR = 32
_LARGEST = 2_000_000
"""Positions that are looked at one by one; beyond it a view's elements are taken to lie side by side."""


def kernel_bytes(kernel: Any) -> int:
    """Of a `torch._inductor.codegen.simd.SIMDKernel` that is being generated; what is changed in place counts twice."""
    from torch._inductor.virtualized import V

    names, arguments, *_ = kernel.args.python_argdefs()
    accesses = kernel.features.buf_accesses()
    total = 0
    for name, argument in zip(names, arguments, strict=True):
        if argument in accesses:
            width = V.graph.get_dtype(argument).itemsize
            whole = _hint(V.graph.get_numel(argument)) * width
            touched = _touched(accesses[argument], width, whole)
            total += touched * (2 if name.name.startswith("in_out") else 1)
    return total


def _hint(expression: Any) -> int:
    from torch._inductor.virtualized import V

    sizes: Any = V.graph.sizevars
    look = getattr(sizes, "optimization_hint", None) or sizes.size_hint  # torch 2.11 has the second
    return int(look(expression))


def _touched(deps: Any, width: int, whole: int) -> int:
    """Bytes of the sectors of all accesses to one buffer, at most the buffer."""
    found: dict[Any, int] = {}
    for dep in deps:
        if not hasattr(dep, "var_names"):  # the whole buffer
            return whole
        sizes = tuple(_hint(size) for size in dep.size)
        if dep.is_indirect():
            found[dep] = int(np.prod(sizes, dtype=float)) * width
            continue
        index = dep.index.replace(lambda e: type(e).__name__ == "Identity", lambda e: e.args[0])
        index = index.subs({s: _hint(s) for s in index.free_symbols - set(dep.var_names)})
        found[sympy.expand(index), dep.var_names, sizes] = sectors(index, dep.var_names, sizes, width) * SECTOR
    return min(sum(found.values()), max(whole, SECTOR))


def sectors(index: Any, names: Any, sizes: tuple[int, ...], width: int) -> int:
    """Sectors that `index`, in elements of `width` bytes, touches while variables run through 0 … size - 1."""
    pairs = [(name, size) for name, size in zip(names, sizes, strict=True) if size > 1 and index.has(name)]
    if not pairs:
        return 1
    affine = sympy.Poly(index, *[name for name, _ in pairs]) if index.is_polynomial(*[n for n, _ in pairs]) else None
    if affine is not None and affine.total_degree() <= 1:
        steps = [(abs(int(affine.coeff_monomial(name))), size) for name, size in pairs]
        return _affine(steps, width)
    positions = int(np.prod([size for _, size in pairs], dtype=float))
    if positions > _LARGEST:
        return -(-positions * width // SECTOR)
    return _counted(index, pairs, width)


def _affine(steps: list[tuple[int, int]], width: int) -> int:
    """Runs of neighbours first, then how often they stand apart; runs that overlap are one longer run."""
    reach, runs = 1, 1
    for step, size in sorted(steps):
        if step * width < SECTOR or step <= reach:
            reach = step * (size - 1) + reach  # the next piece begins in or beside the sector of this one
        else:
            runs *= size
    return runs * -(-reach * width // SECTOR)


def _counted(index: Any, pairs: list[tuple[Any, int]], width: int) -> int:
    """By looking at each position, for views that fold or cut dimensions."""
    functions = {
        "FloorDiv": lambda a, b: a // b,
        "ModularIndexing": lambda a, divisor, modulus: (a // divisor) % modulus,
        "Identity": lambda a: a,
        "CleanDiv": lambda a, b: a // b,
    }
    place = sympy.lambdify([name for name, _ in pairs], index, [functions, "numpy"])
    grid = np.ogrid[tuple(slice(0, size) for _, size in pairs)]
    places = np.asarray(place(*[np.asarray(axis, dtype=np.int64) for axis in grid])) * width // SECTOR
    return int(np.unique(places).size)
