"""The training step at PRX size on one GPU: all ingredients by everyone, and ours built up one by one.

Before a way is timed, its loss and all its gradients are compared with the plain definition's in float32 (float64 on a
CPU) on the same pictures, captions, noise, times and kept tokens; then its first update and average with their
formulas. Teachers have random weights; captions are embeddings made beforehand. "By the trainer" is what
`train/speedrun.py` runs; the others hold float32 weights under autocast. The most telling rows come first: those whose
turn comes when `PRX_BENCH_SECONDS` are spent are skipped.
"""

import gc
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import denoisers
from benchmarks.measure import Measure
from benchmarks.peers import require
from benchmarks.roofline import Cost, newton_schulz, prx_muon_shapes
from benchmarks.sizes import GPU, Case, cases
from benchmarks.test_muon import LR, first_update
from benchmarks.trainer_step import AnyStep, TrainerStep, make_step
from benchmarks.training_step import LADDER, WHOLE, WITHOUT_OPTIMIZER, TrainingStep, Way, draws_of
from prx_kernels.muon.owners import local
from train.learner.optimizers import split

CLOCKS = ("wall",)
WHOLE_STEP, BUILT_UP = "training step, all ingredients", "training step, built up"
NO_OPTIMIZER = "training step, without optimizer"
# The last rung of the ladder is "ours" of the whole step.
TIERS = (
    ((WHOLE_STEP, WHOLE[:2]), (NO_OPTIMIZER, WITHOUT_OPTIMIZER)),
    ((WHOLE_STEP, WHOLE[2:]),),
    ((BUILT_UP, LADDER[:-1]),),
)


def rows(all_cases: Sequence[Case]) -> list[tuple[str, Case, Way]]:
    """Every (op, case, way): captions as full as they are likely to be first, and of these what is compared first."""
    likely = all_cases[0].fill
    return [
        (op, case, way)
        for fill_is_likely in (True, False)
        for tier in TIERS
        for case in all_cases
        if (case.fill == likely) == fill_is_likely
        for op, ways in tier
        for way in ways
    ]


@lru_cache(maxsize=1)
def truth(case: Case, routed: bool, teachers: bool) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the plain definition, on the host."""
    exact = TrainingStep(Way("truth", routed=routed, teachers=teachers), case, exact=True)
    loss = float(exact.backward(draws_of(case, exact.inputs, seed=0)))
    gradients = {name: gradient.cpu() for name, gradient in exact.gradients().items()}
    del exact
    gc.collect()  # its hooks refer to it: its memory would be counted with the step's
    return loss, gradients


def error_of_gradients(step: AnyStep) -> float:
    """Relative error of the loss, or of all gradients together; leaves the gradients."""
    expected, gradients = truth(step.case, step.way.routed, step.way.teachers)
    loss = float(step.backward(draws_of(step.case, step.inputs, seed=0)))
    found = step.gradients()
    if found.keys() != gradients.keys():
        return float("inf")
    wrong, whole = 0.0, 0.0
    for name, gradient in gradients.items():
        one = gradient.to(found[name].device).double()
        wrong += float((found[name].double() - one).square().sum())
        whole += float(one.square().sum())
    return max(abs(loss - expected) / abs(expected), (wrong / whole) ** 0.5)


def error_of_update(step: AnyStep) -> tuple[float, float]:
    """Relative error of the first update of one of Muon's matrices (0 without) and of one of AdamW's tensors.

    Their gradients are replaced by random ones: real ones of few tokens have singular values that are rounding alone,
    which Newton-Schulz makes as large as the others (test_newton_schulz.py checks it on matrices of all kinds).

    Raises:
        AssertionError: the average is not that of the weights.
    """
    muon, adam = split(step.named, step.recipe)
    chosen = [(named[0][1], first) for named, first in ((muon, first_update), (adam, adamw_update)) if named]
    for weight, _ in chosen:
        local(weight.grad).normal_()
    squares = [local(p.grad).double().square().sum() for p in step.parameters if p.grad is not None]
    norm = torch.stack(squares).sum().sqrt()
    factor = min(1.0, step.recipe.train.clip / (float(norm) + 1e-6))
    before = []
    for weight, formula in chosen:
        before.append((local(weight), local(weight).detach().clone(), local(weight.grad) * factor, formula))
    # At first an average is the weights, and one that never moves could not be told from one that does.
    average = local(step.averages[0]).normal_().clone() if step.averages else None
    step.update()
    errors = []
    for part, old, gradient, formula in before:
        truth = formula(old, gradient)
        errors.append(float((part.detach().double() - truth).norm() / (truth - old.double()).norm()))
    if average is not None:
        decay, now = step.recipe.ema.decay, local(step.named[0][1]).detach()
        assert torch.allclose(local(step.averages[0]), decay * average + (1 - decay) * now, rtol=1e-5, atol=1e-7)
    return (errors[0] if muon else 0.0), errors[-1]


def adamw_update(weight: Tensor, gradient: Tensor) -> Tensor:
    """The first AdamW step in float64: bias correction makes it lr·g / (|g| + eps)."""
    g = gradient.double()
    return weight.double() - LR * g / (g.abs() + 1e-8)


def check(step: AnyStep) -> float:
    """Error of loss and gradients, once the first update has been found right.

    Muon: 2 % for fp16 with its restart, 10 % for bf16 through five steps (as test_muon.py); AdamW's is known to 1 %
    where weights of order one keep 2^-24.
    """
    error = error_of_gradients(step)
    if step.way.optimizer == "none":
        step.update()
        return error
    by_muon, by_adam = error_of_update(step)
    assert by_muon <= (0.02 if step.way.ours and GPU else 0.1), (
        f"{step.way.name}: Muon's update is off by {by_muon:.3g}"
    )
    assert by_adam <= 1e-2, f"{step.way.name}: AdamW's update is off by {by_adam:.3g}"
    return error


@pytest.mark.parametrize(("op", "case", "way"), rows(cases()), ids=lambda value: getattr(value, "name", str(value)))
def test_step(measure: Measure, op: str, case: Case, way: Way) -> None:
    if way.denoiser == "diffusers":
        require("diffusers")
    if way.teachers:
        require("lpips")
    reason = denoisers.missing(way.denoiser)
    if reason:
        pytest.skip(reason)
    step = make_step(way, case)
    # Averages move in every tenth step only: time whole turns of them.
    repeat = step.recipe.ema.every if way.ema and GPU else 1
    parts = case.step().parts()
    flop = denoiser_flop = parts["denoiser, TREAD" if way.routed else "denoiser, dense"]
    if way.teachers:
        flop += parts["LPIPS"] + parts["P-DINO"] + parts["REPA teacher"]
    if way.optimizer == "muon":
        flop += newton_schulz(prx_muon_shapes(case.config), "gram")
    try:
        measure(
            op=op,
            case=str(case),
            which="step",
            way=way.name,
            function=steps(step, repeat),
            inputs=lambda seed: (),
            verify=lambda run, arguments: check(step),
            cost=Cost(0.0, flop),
            tolerance=5e-2 if GPU else 1e-4,  # 16 blocks of bf16 products, each rounding to 2^-8, as in test_model.py
            ours=way.ours and not way.trainer and op != BUILT_UP,
            graph=False,
            repeat=repeat,
            images=case.batch,
            denoiser_flop=denoiser_flop,
        )
    finally:
        if isinstance(step, TrainerStep):
            step.close()


def steps(step: AnyStep, count: int) -> Callable[[], Any]:
    """`count` steps in one call."""

    def run() -> None:
        for _ in range(count):
            step()

    return run
