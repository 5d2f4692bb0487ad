"""The denoiser's forward and backward at PRX size, ours and diffusers', with the same weights, dense and routed.

Checked against an fp32 run of the same weights before it is timed. Operations by formula, which a test here holds to
torch's count on the meta device at these very sizes.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import denoisers, passes
from benchmarks.clock import tensors
from benchmarks.denoisers import Kind
from benchmarks.machine import device
from benchmarks.measure import Measure
from benchmarks.passes import Which
from benchmarks.peers import require
from benchmarks.roofline import Cost
from benchmarks.sizes import CONFIG, GPU, Case, cases, routing
from prx_kernels import sample_keep
from prx_model import PRXTransformer
from prx_model.config import Routing, prx_1_2b
from prx_model.flops import forward_flop, training_flop

CASES = [case for case in cases() if case.fill == cases()[0].fill]
ROUTING = routing(CONFIG)
# Each way: diffusers or ours, compiled or not, routed or dense.
WAYS: dict[str, tuple[Kind, bool, bool]] = {
    "diffusers": ("diffusers", False, False),
    "diffusers compiled": ("diffusers", True, False),
    "ours": ("ours", False, False),
    "ours compiled": ("ours", True, False),
    "ours routed": ("ours", False, True),
    "ours routed compiled": ("ours", True, True),
}


def build(kind: Kind, *, compile_blocks: bool) -> nn.Module:
    model = denoisers.build(kind, CONFIG)
    if compile_blocks:
        denoisers.compile_blocks(kind, model)
    return model


def make_inputs(case: Case) -> Callable[[int], tuple[Tensor, ...]]:
    def inputs(seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        image = torch.randn(case.batch, 3, case.size, case.size, generator=generator)
        text = torch.randn(case.batch, case.text, CONFIG.context_in_dim, generator=generator)
        t = torch.rand(case.batch, generator=generator)
        mask = torch.arange(case.text).expand(case.batch, -1) < round(case.fill * case.text)
        ids, draw = torch.arange(case.batch), torch.tensor(seed)
        return tuple(x.to(device()) for x in (image, t, text, mask, ids, draw))

    return inputs


def call(model: nn.Module, *, kind: str, routed: bool, autocast: bool, case: Case) -> Callable[..., Tensor]:
    def run(image: Tensor, t: Tensor, text: Tensor, mask: Tensor, ids: Tensor, seed: Tensor) -> Tensor:
        with torch.autocast(device().type, torch.bfloat16, enabled=autocast, cache_enabled=False):
            if kind == "diffusers":
                return denoisers.predict("diffusers", model, image, t, text, mask)
            if not routed:
                return model(image, t, text, mask)
            keep = sample_keep(ids, case.tokens, ROUTING.selection_ratio, seed=seed)
            route = ROUTING.start, ROUTING.end
            return model.forward_tokens(image, t, text, mask, keep=keep, route=route)  # type: ignore[operator]

    return run


def error_against_fp32(case: Case, which: Which, routed: bool) -> Callable[..., float]:
    """Error of the output and of all gradients together, against ours in fp32 with the same weights."""

    def verify(run: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
        actual = list(tensors(run(*arguments)))
        exact = build("ours", compile_blocks=False)
        function = call(exact, kind="ours", routed=routed, autocast=False, case=case)
        expected_run, expected_arguments = passes.prepare(
            function, which, make_inputs(case)(0), parameters=by_name(exact)
        )
        expected = list(tensors(expected_run(*expected_arguments)))
        if len(actual) != len(expected):
            return float("inf")
        error = passes.relative_error(actual[0], expected[0])
        if which == "forward":
            return error
        together = (torch.cat([g.flatten().float() for g in side[1:]]) for side in (actual, expected))
        return max(error, passes.relative_error(*together))

    return verify


def by_name(model: nn.Module) -> list[Tensor]:
    return [p for _, p in sorted(model.named_parameters())]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("which", ["forward", "both"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_denoiser(measure: Measure, case: Case, which: Which, way: str) -> None:
    kind, compile_blocks, routed = WAYS[way]
    if kind == "diffusers":
        require("diffusers")
    model = build(kind, compile_blocks=compile_blocks)
    routing = ROUTING if routed else None
    real = round(case.fill * case.text)  # text tokens: padding is nobody's work
    flop = (forward_flop if which == "forward" else training_flop)(CONFIG, case.tokens, real, routing)
    weights = 4.0 * sum(p.numel() for p in model.parameters())
    measure(
        op="denoiser, routed" if routed else "denoiser, dense",
        case=f"{case}, {'compiled' if compile_blocks else 'eager'}",  # like is compared with like
        which=which,
        way=way.removesuffix(" compiled"),
        function=call(model, kind=kind, routed=routed, autocast=GPU, case=case),
        inputs=make_inputs(case),
        verify=error_against_fp32(case, which, routed),
        cost=Cost(weights * (1 if which == "forward" else 2), case.batch * flop),
        tolerance=5e-2 if GPU else 1e-4,  # 16 blocks of bf16 products, each rounding to 2^-8
        ours=kind == "ours",
        parameters=by_name(model),
    )


@pytest.mark.parametrize("routed", [False, True], ids=["dense", "routed"])
@pytest.mark.parametrize("size", [512, 1024])
def test_formula_counts_what_torch_counts_at_prx_size(benchmark: Any, size: int, routed: bool) -> None:
    """On the meta device, so at full size anywhere; what is timed here is only how long counting takes on the host."""
    from torch.utils.flop_counter import FlopCounterMode

    config = prx_1_2b()
    routing = Routing(enabled=True, start=1, end=14, selection_ratio=0.5) if routed else None
    with torch.device("meta"):
        model = PRXTransformer(config)
        tokens = config.tokens(size, size)
        image, text, t = torch.empty(1, 3, size, size), torch.empty(1, 256, config.context_in_dim), torch.empty(1)
        keep = torch.empty(1, tokens // 2, dtype=torch.int64) if routed else None

    def count() -> int:
        with FlopCounterMode(display=False) as counter:
            model.forward_tokens(image, t, text, keep=keep, route=(1, 14) if routed else None)
        return counter.get_total_flops()

    counted = benchmark.pedantic(count, rounds=1)
    benchmark.extra_info.update(flop=counted, how="host time of counting, not a result")
    assert counted == pytest.approx(forward_flop(config, tokens, 256, routing), rel=2e-3)
