"""What the launchers launch, assembled: the recipe's kernels for Hopper, the largest tiles for what has least memory.

Types, constants and divisibility are those that Triton's binder found in the launch itself. The tables' rows are built
for sm_80, sm_90, sm_100 and sm_103 beside the ops' other tests.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("triton")
from triton.compiler import ASTSource

from tests.kernels.ahead_of_time import Build, assemble

from .recorder import MAX_SHARED, Launch
from .runs import Run, sweep

OPERANDS = ("image_ptr", "weight_ptr", "grad_ptr", "a_ptr")
SWIZZLED = {0: 256, 1: 32, 2: 64, 3: 128}  # bytes of a box's inner side, by Triton's number of a swizzle


def build(launch: Launch) -> Build:
    source = ASTSource(launch.kernel, dict(launch.signature), dict(launch.constants), dict(launch.attributes))
    return assemble(source, launch.arch, launch.options.__dict__)


def of_the_recipe() -> Iterator[tuple[Run, Launch]]:
    yield from (pair for pair in sweep(90).launches.values() if pair[0].is_recipe)


def largest_tiles(arch: int) -> list[tuple[Run, Launch]]:
    """Of the kernels that multiply matrices, patches and symmetric ones: the launch with most bytes in flight."""
    found: dict[str, tuple[int, Run, Launch]] = {}
    for run, launch in sweep(arch).launches.values():
        tile = launch.settings
        if "DEPTH" in tile:
            width = max(launch.arguments[name].element_size() for name in OPERANDS if name in launch.arguments)
            size = tile["num_stages"] * (tile["ROWS"] + tile["COLS"]) * tile["DEPTH"] * width
            kind = launch.kernel.fn.__module__
            if size > found.get(kind, (0,))[0]:
                found[kind] = size, run, launch
    return [(run, launch) for _, run, launch in found.values()]


def test_the_recipe_builds_for_hopper_without_spills_and_within_its_memory() -> None:
    built = set()
    for run, launch in of_the_recipe():
        made = build(launch)
        print(f"{launch.name}, {run}: {made.registers} registers, {made.stack} spilled, {made.shared} bytes shared")
        assert made.stack == 0, f"{launch.name} of {run} spills {made.stack} bytes"
        assert made.shared <= MAX_SHARED[90], f"{launch.name} of {run} asks for {made.shared} bytes"
        for box in made.boxes:  # what a tile of a descriptor was cut to
            *outer, inner = box["block_size"]
            assert all(1 <= side <= 256 for side in (*outer, inner)), f"{launch.name} of {run}: box {box}"
            assert inner * box["elem_size"] % 16 == 0, f"{launch.name} of {run}: box {box}"
            assert inner * box["elem_size"] <= SWIZZLED[box["swizzle"]], f"{launch.name} of {run}: box {box}"
        built.add(launch.name)
    assert built >= {
        *("_sample_keep_kernel", "_gather_kernel", "_merge_kernel", "_loss_kernel", "_scale_kernel"),
        *("project_kernel", "weight_gradient_kernel", "sum_parts_kernel", "_partial_norm_kernel", "_divide_kernel"),
        *("_sym_gemm_tma_kernel", "_momentum_kernel", "_apply_kernel"),
    }


@pytest.mark.parametrize("arch", [89, 120])
def test_the_largest_tiles_fit_the_memory_of_consumer_cards(arch: int) -> None:
    launches = largest_tiles(arch)
    assert len(launches) == 2
    for run, launch in launches:
        made = build(launch)
        print(f"sm_{arch} {launch.name}, {run}: {made.shared} bytes shared, {made.stack} spilled")
        assert made.shared <= MAX_SHARED[arch], f"{launch.name} of {run} asks for {made.shared} bytes"
