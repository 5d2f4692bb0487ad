"""The symmetric product and the kernels of Newton-Schulz: layouts, errors, compilation, what the kernels compile to."""

from __future__ import annotations

import re

import pytest
import torch

from prx_kernels import newton_schulz, reference, sym_gemm
from prx_kernels import newton_schulz as orthogonalise
from prx_kernels.newton_schulz import symmetric_kernels as kernels
from prx_kernels.newton_schulz import symmetric_product
from prx_kernels.newton_schulz.polynomials import polynomials

from . import checks


def symmetric(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(*shape, shape[-1], generator=torch.Generator().manual_seed(len(shape)))
    return (x + x.mT).to(dtype)


# --- the public function -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_result_is_the_formula_and_exactly_symmetric(dtype):
    A, C = torch.randn(3, 7, 11).to(dtype), symmetric(3, 7, dtype=dtype)
    formula = 0.5 * A.double() @ A.double().mT + 2 * C.double() - 3 * torch.eye(7, dtype=torch.float64)
    made = sym_gemm(A, A, C=C, alpha=0.5, beta=2, gamma=-3)
    assert made.dtype == dtype
    assert torch.equal(made, made.mT)
    # One rounding to a half precision; in the others every sum rounds, of 11 products and two more terms.
    ulps = 0.51 if dtype in (torch.float16, torch.bfloat16) else 13
    assert (made.double() - formula).abs().max() <= ulps * torch.finfo(dtype).eps * formula.abs().max()
    # Alone and in a batch, a CPU's library adds in different orders, so the last bit may be rounded the other way.
    alone = sym_gemm(A[1], A[1], C=C[1], alpha=0.5, beta=2, gamma=-3)
    assert (alone.double() - made[1].double()).abs().max() <= 2 * ulps * torch.finfo(dtype).eps * formula.abs().max()


def test_out_takes_the_result_and_beta_zero_does_not_read_c():
    A = torch.randn(2, 5, 3)
    broken = torch.full((2, 5, 5), float("nan"))
    expected = sym_gemm(A, A)
    buffer = torch.empty(4, 5, 6)
    for out in (torch.empty(2, 5, 5), buffer[1:3, :, :5], torch.empty(5, 5, 2).permute(2, 0, 1)):
        assert sym_gemm(A, A, C=broken, out=out) is out
        assert torch.equal(out, expected)
    # Two parts of one buffer do not overlap.
    sym_gemm(buffer[:2, :, :3], buffer[:2, :, :3], out=buffer.new_empty(4, 5, 5)[2:])
    whole = torch.zeros(4, 5, 5)
    assert torch.equal(sym_gemm(whole[:2], whole[:2], C=whole[:2], beta=1.0, out=whole[2:]), whole[:2])


def test_empty_operands_leave_the_rest_of_the_formula():
    assert sym_gemm(torch.empty(0, 4, 3), torch.empty(0, 4, 3)).shape == (0, 4, 4)
    assert torch.equal(sym_gemm(torch.empty(4, 0), torch.empty(4, 0), gamma=2.0), 2 * torch.eye(4))


def test_autocast_changes_nothing():
    A = torch.randn(6, 9)
    expected = sym_gemm(A, A)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sym_gemm(A, A), expected)


A, SQUARE = torch.ones(4, 6), torch.ones(4, 4)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: sym_gemm(A, A.mT), ValueError, r"of one shape \(n, k\) or \(batch, n, k\), got \(4, 6\) and \(6, 4\)"),
        (lambda: sym_gemm(A[0], A[0]), ValueError, r"got \(6,\) and \(6,\)"),
        (lambda: sym_gemm(A, A, beta=1.0), ValueError, "needs C where beta is not 0, got beta 1.0"),
        (
            lambda: sym_gemm(A, A, C=A, beta=1.0),
            ValueError,
            r"C must have the shape of the result, \(4, 4\), got \(4, 6\)",
        ),
        (lambda: sym_gemm(A, A, out=A), ValueError, r"out must have the shape of the result, \(4, 4\)"),
        (lambda: sym_gemm(A, A.half()), TypeError, "got B of torch.float16 beside torch.float32"),
        (lambda: sym_gemm(A.int(), A.int()), TypeError, "got A of torch.int32"),
        (lambda: sym_gemm(A, A.to("meta")), ValueError, "got B on meta and A on cpu"),
        (lambda: sym_gemm(SQUARE, SQUARE, out=SQUARE), ValueError, "out must not share memory"),
        (lambda: sym_gemm(A, A, C=SQUARE, beta=1.0, out=SQUARE), ValueError, "out must not share memory"),
        (lambda: sym_gemm(A.clone().requires_grad_(), A), RuntimeError, "sym_gemm has no gradient: detach its input"),
    ],
)
def test_errors_are_sentences(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


# --- compilation -------------------------------------------------------------------------------------------------


def test_opcheck():
    a, c = torch.randn(2, 5, 3), symmetric(2, 5)
    torch.library.opcheck(symmetric_product._sym_gemm, (a, a, c, 0.5, 2.0, 1.0))
    torch.library.opcheck(symmetric_product._sym_gemm, (a, a, None, 0.5, 0.0, 1.0))
    torch.library.opcheck(symmetric_product._sym_gemm, (a, a, c, 0.5, 2.0, 1.0, torch.rand(2)))
    torch.library.opcheck(symmetric_product._sym_gemm_out, (a, a, c, 0.5, 2.0, 1.0, torch.empty(2, 5, 5)))
    from prx_kernels.newton_schulz.iteration import _unit_norm

    torch.library.opcheck(_unit_norm, (a, 1e-7, torch.empty(2, 5, 3, dtype=torch.float16)))


# Inductor multiplies and adds what lies between the products in another order, which may round the other way.
@pytest.mark.parametrize(("backend", "tolerance"), [("aot_eager", 0.0), ("inductor", 4e-3)])
def test_a_compiled_call_is_one_graph_and_equal(backend, tolerance):
    G = [torch.randn(6, 10), torch.randn(10, 6), torch.randn(2, 6, 6)]
    settings = {"ns_coefficients": "polar_express", "algorithm": "gram"}
    expected = newton_schulz(G, **settings)
    torch._dynamo.reset()
    compiled = torch.compile(lambda G: orthogonalise(G, **settings), fullgraph=True, backend=backend)
    for actual, plain in zip(compiled(G), expected, strict=True):
        torch.testing.assert_close(actual, plain, rtol=0, atol=tolerance)


def test_dynamic_compilation_gives_each_shape_its_graph():
    torch._dynamo.reset()
    compiled = torch.compile(lambda G: orthogonalise(G), fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((6, 10), (8, 14), (30, 7)):
        G = torch.randn(shape)
        assert torch.equal(compiled(G), newton_schulz(G))


# --- kernels -----------------------------------------------------------------------------------------------------


def test_kernels_equal_the_definitions_in_the_interpreter(run_interpreted):
    run_interpreted("test_newton_schulz.py")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels_equal_the_definitions_on_the_gpu(dtype):
    for shape in (*checks.SHAPES, *checks.ALIGNED, (2, 1792, 1792), (5, 768, 3072), (1, 1000, 333)):
        checks.check_product(shape, dtype, "cuda")
    for shape in ((6, 1, 1), (6, 17, 33), (6, 1792, 4864)):
        checks.check_norm(shape, torch.float32, dtype, "cuda")
    checks.check_addresses_beyond_32_bits("cuda")


@pytest.mark.gpu
def test_newton_schulz_on_the_gpu_equals_the_cpu_and_captures_into_a_graph():
    matrices = [torch.randn(s, device="cuda") for s in ((256, 512), (512, 256), (3, 256, 256), (72, 200), (17, 33))]
    steps, exact = polynomials("jordan", 5), torch.float64
    expected = [reference.newton_schulz(G.double(), steps, restarts=None, dtype=exact) for G in matrices]
    for settings in ({}, {"algorithm": "standard"}, {"dtype": torch.bfloat16}):
        for Y, truth in zip(newton_schulz(matrices, **settings), expected, strict=True):
            assert (Y - truth).norm() <= (0.04 if settings.get("dtype") else 0.006) * truth.norm()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        eager = newton_schulz(matrices)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = newton_schulz(matrices)
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, captured, eager))


def show(arch: int, name: str, made) -> None:
    from .. import ahead_of_time

    print(f"sm_{arch} {name}: {made.registers} registers, {made.stack} spilled, {made.shared} bytes shared")
    assert made.stack == 0, name
    assert made.shared <= ahead_of_time.MAX_SHARED, name


@pytest.mark.parametrize("arch", [90, 100, 103])
def test_descriptor_kernels_build_without_spills(arch):
    pytest.importorskip("triton")
    from . import builds

    for name, made in builds.with_descriptors(arch):
        show(arch, name, made)
        assert "wgmma.mma_async" in made.ptx if arch == 90 else "tcgen05.mma" in made.ptx, name
        # Tiles come and go through descriptors alone: loads, stores, and the mirrored stores.
        assert re.search(r"cp\.async\.bulk\.tensor\.3d\.shared", made.ptx), name
        assert re.search(r"cp\.async\.bulk\.tensor\.3d\.global", made.ptx), name
        assert made.accesses("ld") == ([] if "C=True" in name else [4]), name  # a matrix's own scale, where it has one
        assert made.accesses("st") == [], name


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_pointer_kernels_build_without_spills(arch):
    pytest.importorskip("triton")
    from . import builds

    matrix = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[arch]
    for name, made in builds.with_pointers(arch):
        show(arch, name, made)
        assert ("fp32" in name) != (matrix in made.ptx), name
        loads = made.accesses("ld")
        loads.remove(4)  # the matrix's scale
        assert set(loads) == set(made.accesses("st")) == {16}, name
    for name, made in builds.unaligned(arch):
        show(arch, name, made)
    for name, made in builds.norms(arch):
        show(arch, name, made)
        assert 16 in made.accesses("ld"), name
        assert set(made.accesses("st")) == {16 if name.startswith("divide") else 4}, name


def test_every_row_is_a_candidate_and_every_candidate_differs():
    assert {config for rows in kernels.TMA.values() for _, config in rows} <= set(kernels.CANDIDATES)
    assert len(set(kernels.CANDIDATES)) == len(kernels.CANDIDATES)


def test_tables_have_a_row_for_every_size():
    for table in (kernels.TMA, kernels.POINTER, kernels.UNALIGNED, kernels.FLOAT32):
        for rows in table.values():
            assert [limit for limit, _ in rows] == sorted({limit for limit, _ in rows})
            assert rows[-1][0] == 2**31 - 1


def test_small_batches_leave_no_multiprocessor_idle():
    """docs/kernels.md, section 2: owners hold 3 or 4 matrices of n = 1792; 132 multiprocessors of an H200."""
    for batch in (1, 2, 3, 4, 16):
        size = batch * 105
        (config,) = [c for limit, c in kernels.TMA[90] if size <= limit][:1]
        programs = batch * kernels.tiles_of(1792, config)
        assert programs >= 132
        # Programs that one multiprocessor runs beside one another: 227 KiB of shared memory.
        rows, cols, depth = (config.options[name] for name in ("ROWS", "COLS", "DEPTH"))
        beside = 232_448 // (config.num_stages * (rows + cols) * depth * 2)
        whole = rows * cols / 128**2
        rounds = -(-programs // 132) * whole
        assert rounds <= -(-size // 132), "no more rounds than whole tiles take"
        assert beside >= 2 or batch > 4
