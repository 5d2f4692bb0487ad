"""The harness fails where a launcher is wrong: each kind of fault, put into a launcher that is right."""

from __future__ import annotations

import inspect
import sys
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import pytest
import torch
from torch._library.custom_ops import OPDEFS

pytest.importorskip("triton")

from prx_kernels.blocks import modulation

from .cases import CASES
from .pretended_gpu import FakeDisagrees, PretendedGPU
from .recorder import CAPABILITIES, LaunchRefused, promises
from .runs import Run

BF16 = (torch.bfloat16, torch.bfloat16)
FP16 = (torch.float16, torch.float16)


def run_of(name: str, size: str = "aligned", **form: Any) -> Run:
    (case,) = [case for case in CASES if str(case) == name]
    return Run(case, size, form.pop("dtypes", case.dtypes[0]), **form)


def launch(run: Run, arch: int = 90) -> list[str]:
    """Names of the kernels that a run launches."""
    with PretendedGPU(arch) as gpu:
        run.on(gpu)
    return [launch.name for launch in gpu.launches]


def home_of(run: Run, kernel: str) -> ModuleType:
    """The module that defines a kernel, whose launcher is beside it."""
    with PretendedGPU(90) as gpu:
        run.on(gpu)
    (found, *_) = [launch.kernel.fn for launch in gpu.launches if launch.name == kernel]
    return sys.modules[found.__module__]


class Wrapped:
    """A kernel whose every call is changed on the way."""

    def __init__(self, kernel: Any, change: Any) -> None:
        self.kernel, self.change = kernel, change

    def __getitem__(self, grid: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            changed_grid, changed, changed_names = self.change(grid, arguments, dict(named))
            return self.kernel[changed_grid](*changed, **changed_names)

        return call


GATHER = run_of("gather_tokens")
PRODUCT = run_of("sym_gemm", dtypes=FP16)


def test_what_is_right_passes() -> None:
    assert launch(GATHER) == ["_gather_kernel", "_merge_kernel"]
    assert launch(PRODUCT) == ["_sym_gemm_tma_kernel"]
    assert launch(PRODUCT, arch=80) == ["_sym_gemm_pointer_kernel"]


@pytest.mark.parametrize("arch", CAPABILITIES)
def test_muon_multiplies_through_descriptors_where_there_are_any(arch: int) -> None:
    names = set(launch(run_of("muon", "recipe, one owner"), arch))
    assert ("_sym_gemm_tma_kernel" in names) == (arch in (90, 100, 103))
    assert ("_sym_gemm_pointer_kernel" in names) != ("_sym_gemm_tma_kernel" in names)


@pytest.mark.parametrize("arch", [90, 100, 103])
def test_a_look_up_that_needs_a_portable_row_fails(monkeypatch: pytest.MonkeyPatch, arch: int) -> None:
    """`table.get(architecture, table[0])`: the second key is read first, and the table of descriptors has none."""
    products = home_of(PRODUCT, "_sym_gemm_tma_kernel")

    def tuned(table: Any, size: int, device: torch.device) -> Any:
        rows = table.get(products.capability(device), table[0])
        return next(config for limit, config in rows if size <= limit)

    monkeypatch.setattr(products, "tuned", tuned)
    with pytest.raises(KeyError, match="^0$"):
        launch(PRODUCT, arch)
    with pytest.raises(KeyError, match="^0$"):
        launch(run_of("muon"), arch)
    launch(PRODUCT, 80)


def test_a_table_without_the_architecture_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    routing = home_of(GATHER, "_gather_kernel")
    monkeypatch.setattr(routing, "GATHER", {90: routing.GATHER[0]})
    launch(GATHER, 90)
    with pytest.raises(ValueError, match="runs on architectures 90, got 120"):
        launch(GATHER, 120)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda grid, a, named: (grid, (*a, 1), named), TypeError, "argument"),
        (lambda grid, a, named: (grid, a[:-1], named), TypeError, "missing"),
        (lambda grid, a, named: (grid, a, {**named, "TILE": 1}), KeyError, "TILE"),
        (lambda grid, a, named: (grid, a, {k: v for k, v in named.items() if k != "COLS"}), TypeError, "COLS"),
        (lambda grid, a, named: ((2**31,), a, named), LaunchRefused, "1 to 2147483647 are allowed"),
        (lambda grid, a, named: ((1, 65_536), a, named), LaunchRefused, "1 to 65535 are allowed"),
        (lambda grid, a, named: ((*grid, 0), a, named), LaunchRefused, "has 0 where"),
        (lambda grid, a, named: (grid, a, {**named, "num_warps": 64}), LaunchRefused, "num_warps"),
        (lambda grid, a, named: (grid, a, {**named, "num_stages": 0}), LaunchRefused, "num_stages"),
        (lambda grid, a, named: (grid, (*a[:5], a[5] + 1, *a[6:]), named), LaunchRefused, "width is promised to be"),
        (lambda grid, a, named: (grid, (a[0].to("cuda:1"), *a[1:]), named), LaunchRefused, "cuda:0 is current"),
    ],
    ids=[
        "one argument too many", "one too few", "an unknown keyword", "a missing constant", "too many programs",
        "too many in the second dimension", "none in one", "too many warps", "no stage", "a false promise",
        "another device",
    ],
)  # fmt: skip
def test_a_wrong_call_of_a_kernel_fails(
    monkeypatch: pytest.MonkeyPatch, change: Any, error: type[Exception], message: str
) -> None:
    routing = home_of(GATHER, "_gather_kernel")
    monkeypatch.setattr(routing, "_gather_kernel", Wrapped(routing._gather_kernel, change))
    with pytest.raises(error, match=message):
        launch(GATHER)


def test_a_launch_on_another_device_than_the_tensors_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of("gather_tokens", device="cuda:1")
    launch(run)
    monkeypatch.setattr(home_of(GATHER, "_gather_kernel"), "on_device", lambda x: nullcontext())
    with pytest.raises(LaunchRefused, match="is on cuda:1, and cuda:0 is current"):
        launch(run)


@pytest.mark.parametrize(
    ("size", "layout", "message"),
    [
        ("aligned", "offset", "begin at a multiple of 16 bytes"),
        ("ragged", "dense", "strides of 16·n bytes"),
        ("aligned", "expanded", "each stride span"),
    ],
)
def test_a_descriptor_that_CUDA_refuses_fails(
    monkeypatch: pytest.MonkeyPatch, size: str, layout: str, message: str
) -> None:
    run = run_of("sym_gemm", size, dtypes=FP16, layout=layout)
    assert launch(run) == ["_sym_gemm_pointer_kernel"]
    products = home_of(PRODUCT, "_sym_gemm_tma_kernel")
    monkeypatch.setattr(products, "_fits_tma", lambda x: True)
    tools = sys.modules["triton.tools.tensor_descriptor"]
    # Triton looks at some of it itself, at an address only where there is one.
    monkeypatch.setattr(tools.TensorDescriptor, "__post_init__", lambda self: None)
    with pytest.raises(LaunchRefused, match=message):
        launch(run)


def test_a_descriptor_with_too_wide_a_box_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    products = home_of(PRODUCT, "_sym_gemm_tma_kernel")
    wide = products._tile_config(512, 512, 64, 8, 2)
    monkeypatch.setattr(products, "TMA", {90: ((2**31 - 1, wide),)})
    with pytest.raises(LaunchRefused, match="box of 1 to 256"):
        launch(PRODUCT)


def test_a_fake_that_describes_another_result_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    gather = OPDEFS["prx::gather_tokens"]
    for fake in (
        lambda x, keep: x.new_empty((*keep.shape, *x.shape[2:]), dtype=torch.float32),
        lambda x, keep: x.new_empty((x.shape[2], *keep.shape)).permute(1, 2, 0),
        lambda x, keep: x.new_empty((*keep.shape, x.shape[2] + 1)),
    ):
        monkeypatch.setattr(gather, "_abstract_fn", fake)
        with pytest.raises(FakeDisagrees, match=r"prx::gather_tokens: result 0 is \(\(2, 32, 128\)"):
            launch(GATHER)


def test_a_result_that_is_an_input_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    clear = OPDEFS["prx::clear_tokens"]
    monkeypatch.setattr(clear, "_init_fn", lambda x, keep: x)
    with pytest.raises(FakeDisagrees, match="shares memory with an input"):
        launch(run_of("scatter_tokens"))


def test_a_gradient_of_another_dtype_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of("norm_modulate", dtypes=BF16)
    launch(run)
    whole = modulation._backward
    monkeypatch.setattr(modulation, "_backward", lambda *a: tuple(x.float() for x in whole(*a)))
    with pytest.raises(AssertionError, match=r"the gradient of .* torch.bfloat16"):
        launch(run)


def test_every_kernel_names_what_it_rounds_down() -> None:
    """The harness reads promises of divisibility from the kernels' source: `hint(argument, CONSTANT)`."""
    with PretendedGPU(90) as gpu:
        for name in ("gather_tokens", "muon", "patch_embed", "x_prediction_loss", "philox_normal"):
            run_of(name).on(gpu)
    for kernel in {launch.kernel for launch in gpu.launches}:
        source = inspect.getsource(kernel.fn)
        # What a kernel reads from memory, such as a table of addresses, its launcher's own tests look at.
        calls = source.count("hint(") - source.count("hint(_entry(")
        assert calls == len(promises(kernel.fn)), kernel.fn.__name__
