"""Bytes of strided reads: sectors found by formula are those that looking at every element finds."""

import itertools

import pytest
import sympy

from benchmarks.absent_gpu.sectors import SECTOR, sectors

a, b, c = sympy.symbols("a b c", integer=True)


def looked_at(steps: tuple[int, ...], sizes: tuple[int, ...], width: int) -> int:
    places = {
        sum(step * i for step, i in zip(steps, index, strict=True)) * width // SECTOR
        for index in itertools.product(*map(range, sizes))
    }
    return len(places)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("steps", "sizes"),
    [
        ((64, 1), (16, 64)),  # dense
        ((128, 1), (16, 64)),  # half of each row
        ((1, 64), (64, 16)),  # the order of the variables does not matter
        ((64, 2), (16, 32)),  # every other element: the same sectors
        ((512, 64), (8, 8)),  # one element of each row
        ((4096, 64, 1), (4, 16, 64)),
        ((4096, 64, 1), (4, 16, 32)),
        ((0, 64, 1), (5, 16, 64)),  # read again and again
    ],
)
def test_affine_reads_touch_the_sectors_that_looking_finds(
    steps: tuple[int, ...], sizes: tuple[int, ...], width: int
) -> None:
    names = (a, b, c)[: len(steps)]
    index = sum(step * name for step, name in zip(steps, names, strict=True))
    assert sectors(index, names, sizes, width) == looked_at(steps, sizes, width)


def test_a_folded_view_is_looked_at_element_by_element() -> None:
    floor = sympy.Function("FloorDiv")
    modular = sympy.Function("ModularIndexing")
    # (8, 64) of 4 bytes, read as the first 32 columns of each row through one flat variable
    index = 64 * floor(a, 32) + modular(a, 1, 32)
    assert sectors(index, (a,), (8 * 32,), 4) == 8 * 32 * 4 // SECTOR


def test_a_constant_index_is_one_sector() -> None:
    assert sectors(sympy.Integer(7), (a, b), (4, 1), 4) == 1
