"""docs/recipe.md's work of a step ("Where its time goes") beside what torch's FlopCounterMode counts of our modules.

Everything is built on the meta device at its real size, for one picture, and scaled by the batch: nothing is
computed, so `python -m benchmarks.flop_table` takes seconds on any machine.
"""

import argparse
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.roofline import STAGE_1, STAGE_2, Step, TextEncoder, prx_muon_shapes
from prx_kernels import kept_tokens, reference
from prx_model.config import PRXConfig
from prx_model.teachers import REPA, LPIPSLoss, PerceptualDINO, Prediction, Teacher
from prx_model.transformer import PRXTransformer
from train.recipes import Muon

RECIPE: dict[str, tuple[float, float]] = {
    "denoiser, dense": (43.6, 83.7),
    "denoiser, TREAD": (26.8, 47.3),
    "LPIPS": (3.8, 7.7),
    "P-DINO": (4.5, 2.2),
    "REPA teacher": (5.2, 0.0),
    "Newton-Schulz, one GPU": (47.9, 47.9),
    "Newton-Schulz, spread": (1.5, 1.5),
    "T5Gemma": (33.6, 16.8),
    "T5Gemma, embedding counted": (42.6, 21.3),
    "sum, text cached, Newton-Schulz spread": (41.8, 58.7),
}
"""TFLOP a GPU and step, forward and backward: 512 px with 32 pictures, 1024 px with 16."""
LIMIT, ROUNDING = 0.05, 0.05
"""Largest relative difference that needs no explanation, beyond what the figures' one decimal leaves open (TFLOP)."""
EXPLANATIONS = {
    "T5Gemma, embedding counted": "the figure counts two operations a token for each of the 590 M numbers of the "
    "embedding table, but a look-up multiplies nothing: the row above is the work",
}


@dataclass(frozen=True)
class Row:
    """A part of a step: TFLOP by docs/recipe.md (None where its table lacks it) and as counted, at both stages."""

    part: str
    recipe: tuple[float, float] | None
    counted: tuple[float, float]

    def difference(self) -> float:
        """The larger relative difference of the two stages; zero where there is nothing to compare with."""
        if self.recipe is None:
            return 0.0
        pairs = [(r, c) for r, c in zip(self.recipe, self.counted, strict=True) if r or c]
        return max(abs(c - r) / r if r else float("inf") for r, c in pairs)

    def needs_explanation(self) -> bool:
        """Whether counted and figure differ by more than `LIMIT`, rounding allowed for."""
        pairs = zip(self.recipe or self.counted, self.counted, strict=True)
        return any(abs(c - r) > LIMIT * r + ROUNDING for r, c in pairs)


def table() -> list[Row]:
    """All rows, docs/recipe.md's first and in its order."""
    first, second = count(STAGE_1), count(STAGE_2)
    return [Row(part, RECIPE.get(part), (first[part] / 1e12, second[part] / 1e12)) for part in first]


def count(step: Step) -> dict[str, float]:
    """Operations a step and GPU of every part, forward and backward, as FlopCounterMode counts them."""
    newton_schulz, text = _newton_schulz(step.config), step.batch * _text_encoder(step.text_tokens)
    found = {
        "denoiser, dense": step.batch * _denoiser(step, routed=False),
        "denoiser, TREAD": step.batch * _denoiser(step, routed=True),
        "LPIPS": step.batch * _teacher(lambda: LPIPSLoss(weights="random"), step.size),
        "P-DINO": step.batch * _teacher(lambda: PerceptualDINO(weights="random"), step.size),
        "REPA teacher": 0.0,
        "Newton-Schulz, one GPU": newton_schulz,
        "Newton-Schulz, spread": newton_schulz / step.gpus,
        "T5Gemma": text,
        "T5Gemma, embedding counted": text,
    }
    projector = 0.0
    if step.repa:
        teacher, projector = _repa(step)
        found["REPA teacher"] = step.batch * teacher
    summed = ("denoiser, TREAD", "LPIPS", "P-DINO", "REPA teacher", "Newton-Schulz, spread")
    found["sum, text cached, Newton-Schulz spread"] = sum(found[part] for part in summed)
    found["REPA projector"] = step.batch * projector
    return found


def _counted(run: Callable[[], object]) -> float:
    """Operations of what `run` does on the meta device; new tensors are made there."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


@cache
def _model(config: PRXConfig) -> PRXTransformer:
    with torch.device("meta"):
        return PRXTransformer(config)


def _denoiser(step: Step, *, routed: bool) -> float:
    """Forward and backward of one picture, noised while it is read, as the trainer does it."""
    model, tokens = _model(step.config), step.config.tokens(step.size, step.size)
    kept = kept_tokens(tokens, step.routing.selection_ratio)

    def run() -> None:
        image = torch.empty(1, step.config.in_channels, step.size, step.size, dtype=torch.uint8)
        text = torch.empty(1, step.text_tokens, step.config.context_in_dim)
        out = model.forward_tokens(
            image,
            torch.empty(1),
            text,
            torch.empty(1, step.text_tokens, dtype=torch.bool),
            keep=torch.empty(1, kept, dtype=torch.int64) if routed else None,
            route=(step.routing.start, step.routing.end) if routed else None,
            noise_seed=torch.empty((), dtype=torch.int64),
            sample_ids=torch.empty(1, dtype=torch.int64),
        )
        out.sum().backward()

    return _counted(run)


def _unfilled(make: Callable[[], nn.Module]) -> nn.Module:
    """A network on the meta device, whose values, and so whose weights, are none."""
    meta = torch.device("meta")
    with meta, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of random weights, and of those that a meta tensor does not take
        made = make()
    # Some buffers are made on the CPU wherever the rest is (lpips).
    return made.to_device(meta) if isinstance(made, Teacher) else made.to(meta)


def _teacher(make: Callable[[], Teacher], size: int) -> float:
    """What a teacher says of itself, `Teacher.flop`: features of both pictures, and the prediction's gradient."""
    teacher = _unfilled(make)
    assert isinstance(teacher, Teacher)
    return teacher.flop(size, size)


def _repa(step: Step) -> tuple[float, float]:
    """Of one picture: the teacher's forward, and the projector's forward and backward on the kept tokens."""
    hidden, tokens = step.config.hidden_size, step.config.tokens(step.size, step.size)
    repa = _unfilled(lambda: REPA(hidden, weights="random"))
    kept = kept_tokens(tokens, step.routing.selection_ratio)

    def run() -> None:
        image = torch.empty(1, 3, step.size, step.size)
        features = torch.empty(1, kept, hidden, requires_grad=True)
        keep = torch.empty(1, kept, dtype=torch.int64)
        repa(Prediction(image, image, features, keep, step.config.patch_size)).sum().backward()

    assert isinstance(repa, REPA)
    teacher = repa.flop(step.size, step.size, step.config.patch_size)
    return teacher, _counted(run) - teacher


@cache
def _newton_schulz(config: PRXConfig) -> float:
    """The recipe's plain iteration on every matrix that Muon updates."""
    steps = [Muon().ns_coefficients] * Muon().ns_steps

    def work(shape: tuple[int, int]) -> float:
        return _counted(lambda: reference.newton_schulz(torch.empty(shape), steps, restarts=None, dtype=torch.bfloat16))

    shapes = prx_muon_shapes(config)
    return sum(shapes.count(shape) * work(shape) for shape in set(shapes))


@cache
def _text_encoder(tokens: int) -> float:
    """transformers' T5Gemma encoder at Gemma 2 2B's sizes, on one caption of `tokens` tokens."""
    from transformers import T5GemmaConfig, T5GemmaEncoderModel, T5GemmaModuleConfig

    s = TextEncoder()
    half = T5GemmaModuleConfig(
        hidden_size=s.width,
        num_hidden_layers=s.depth,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=s.query_width // 8,
        intermediate_size=s.mlp,
        vocab_size=s.vocabulary,
    )
    encoder = _unfilled(
        lambda: T5GemmaEncoderModel(T5GemmaConfig(encoder=half, decoder=half, is_encoder_decoder=False))
    )
    # Masks made already: to make them, transformers would look at values.
    masks = {"full_attention": None, "sliding_attention": None}

    def run() -> None:
        with torch.no_grad():
            encoder(input_ids=torch.empty(1, tokens, dtype=torch.int64), attention_mask=masks)

    return _counted(run)


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    print(f"{'TFLOP a GPU and step':<42}{'512 px x 32':>22}{'1024 px x 16':>22}")
    print(f"{'':<42}{'RECIPE':>11}{'counted':>11}{'RECIPE':>11}{'counted':>11}{'difference':>12}")
    rows = table()
    for row in rows:
        figures = [f"{value:.1f}" for value in row.recipe] if row.recipe else ["-", "-"]
        pairs = "".join(f"{r:>11}{c:>11.2f}" for r, c in zip(figures, row.counted, strict=True))
        print(f"{row.part:<42}{pairs}{f'{row.difference():.1%}' if row.recipe else '-':>12}")
    print(f"\ndifferences over {LIMIT:.0%}:")
    for row in rows:
        if row.needs_explanation():
            print(textwrap.fill(f"{row.part}: {EXPLANATIONS.get(row.part, 'NOT EXPLAINED')}", 110, initial_indent="  "))
    print("attention is counted as its products, backward as twice forward: a fused backward forms the scores again,")
    print("half a forward more; REPA's projector runs on the kept tokens and is in no row of docs/recipe.md")


if __name__ == "__main__":
    main()
