"""A training step on one GPU with any of the recipe's ingredients, ours or the PRX repository's way of doing them.

What `test_step.py` times and `profile_step.py` looks into. `backward` and `update` are its halves; both ways of
`backward` can be given the same draws, which is how their losses and gradients are compared.
"""

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from benchmarks import denoisers, plain_prx
from benchmarks.denoisers import HOOKED, Kind
from benchmarks.machine import device
from benchmarks.plain_prx import HookRouting, PlainAttention, PlainEMA, velocity_loss
from benchmarks.sizes import GPU, Case, routing
from prx_kernels import philox_normal, sample_keep, x_prediction_loss
from prx_model import EMA, flow
from prx_model.packed_text import PackedText, pack
from prx_model.teachers import Prediction, Teacher
from train.data.loader import Batch, to_float
from train.learner.optimizers import Optimizers, named_parameters, split
from train.learner.teaching import TeacherLosses, build_teachers
from train.ranks.graphs import compile_teachers
from train.recipes import Recipe, prx_512, prx_1024
from train.run.stopwatch import Stopwatch


@dataclass(frozen=True)
class Way:
    """Who does a step, with which ingredients."""

    name: str
    denoiser: Kind = "plain"
    compiled: bool = False
    routed: bool = False
    packed: bool = False
    """Text without its padding; only ours takes it."""
    teachers: bool = False
    optimizer: Literal["none", "adamw", "muon"] = "adamw"
    """adamw on all weights, or Muon for the matrices in blocks; the plain one goes matrix by matrix. none only drops
    the gradients."""
    ema: bool = False
    trainer: bool = False
    """By `trainer_step.TrainerStep`."""

    @property
    def ours(self) -> bool:
        return self.denoiser == "ours"


def _ladder() -> tuple[Way, ...]:
    rungs = [Way("plain, eager")]
    for name, changes in (
        ("+ compiled", {"compiled": True}),
        ("+ routing", {"routed": True}),
        ("+ our model, kernels and optimizers", {"denoiser": "ours"}),
        ("+ packed text", {"packed": True}),
        ("+ teachers", {"teachers": True}),
        ("+ Muon", {"optimizer": "muon"}),
        ("+ EMA", {"ema": True}),
    ):
        rungs.append(replace(rungs[-1], name=name, **cast(dict[str, Any], changes)))
    return tuple(rungs)


LADDER = _ladder()
"""Ingredients one by one; every rung holds those below it, and the last is the whole step, ours."""
_ALL = Way("", compiled=True, routed=True, teachers=True, optimizer="muon", ema=True)
WHOLE = (
    replace(LADDER[-1], name="ours"),
    replace(_ALL, name="PRX way, compiled"),
    replace(LADDER[-1], name="ours, by the trainer", trainer=True),
    replace(_ALL, name="PRX way, eager", compiled=False),
    replace(_ALL, name="diffusers in its place, compiled", denoiser="diffusers"),
    replace(_ALL, name="PRX repository in its place, compiled", denoiser="PRX repository"),
)
"""The step with all ingredients, by everyone."""
WITHOUT_OPTIMIZER = tuple(replace(way, optimizer="none", ema=False) for way in WHOLE[:2])
"""Forward, teachers and backward alone: what is left on every GPU when all else is spread over ranks."""


@dataclass(frozen=True)
class Inputs:
    """One batch, and what both ways are given of its captions."""

    image: Tensor
    ids: Tensor
    text: Tensor
    mask: Tensor
    packed: PackedText


def make_inputs(case: Case) -> Inputs:
    """Random pictures (uint8) and caption embeddings (bf16, as a cache holds them), on the benchmarks' device."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (case.batch, 3, case.size, case.size), dtype=torch.uint8, generator=generator)
    lengths = case.lengths()
    rows = torch.randn(sum(lengths), case.config.context_in_dim, generator=generator).bfloat16().to(device())
    packed = pack(rows, lengths)
    text, mask = pack(rows, lengths, length_step=case.text).padded()  # to the longest caption that there can be
    return Inputs(image.to(device()), torch.arange(case.batch, device=device()), text, mask, packed)


@dataclass(frozen=True)
class Draws:
    """The random numbers of a step; those of a seed are the same for every way."""

    seed: Tensor
    t: Tensor
    noise: Tensor
    scores: Tensor
    """(batch, N): 1 at the tokens that are kept, 0 at those that bypass."""


def draws_of(case: Case, inputs: Inputs, seed: int) -> Draws:
    """What our step draws from a seed, as tensors for the others."""
    key = torch.tensor(seed, device=device())
    keep = sample_keep(inputs.ids, case.tokens, routing(case.config).selection_ratio, seed=key)
    scores = torch.zeros(case.batch, case.tokens, device=device()).scatter(1, keep.long(), 1.0)
    noise = philox_normal(key, tuple(inputs.image.shape), sample_ids=inputs.ids)
    return Draws(key, flow.sample_t(key, inputs.ids), noise, scores)


def recipe_of(way: Way, case: Case) -> Recipe:
    """The preset of this stage with this way's ingredients; teachers have random weights, small ones on a CPU."""
    preset = prx_512() if case.repa else prx_1024()
    small: dict[str, Any] = {} if GPU else {"teacher": "vit_small_patch16_dinov3"}
    small_dino: dict[str, Any] = {} if GPU else {"teacher": "vit_small_patch14_reg4_dinov2", "size": 28}
    layer = min(preset.repa.layer, case.config.depth // 2)
    return replace(
        preset,
        data=replace(preset.data, height=case.size, width=case.size),
        model=case.config,
        routing=replace(routing(case.config), enabled=way.routed),
        ema=replace(preset.ema, phase="first"),  # so that the step that is checked moves the averages
        repa=replace(preset.repa, enabled=way.teachers and case.repa, weights="random", layer=layer, **small),
        lpips=replace(preset.lpips, enabled=way.teachers, weights="random"),
        pdino=replace(preset.pdino, enabled=way.teachers, weights="random", **small_dino),
        muon=replace(preset.muon, enabled=way.optimizer == "muon"),
        train=replace(preset.train, batch=case.batch),
    )


def random_teachers(recipe: Recipe) -> dict[str, Teacher]:
    """A recipe's teachers, with the same random weights every time; drawn once, which takes a while on the host."""
    key = repr((recipe.model.hidden_size, recipe.repa, recipe.lpips, recipe.pdino))
    if key not in _drawn_teachers:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of random weights, which are asked for here
            _drawn_teachers.clear()
            made = build_teachers(recipe, device())
        _drawn_teachers[key] = {name: teacher.to_device(torch.device("cpu")) for name, teacher in made.items()}
    return {name: copy.deepcopy(teacher).to_device(device()) for name, teacher in _drawn_teachers[key].items()}


_drawn_teachers: dict[str, dict[str, Teacher]] = {}
"""On the host, as `build_teachers` made them."""


class TrainingStep:
    """One way of doing a step; call it to do one, on the same batch every time, with fresh draws.

    Args:
        way: ingredients.
        case: sizes.
        exact: in float64 (on a GPU float32, its frozen networks bf16 as everyone's) without autocast, compilation or
            optimizer: the truth that others are compared with.
    """

    def __init__(self, way: Way, case: Case, *, exact: bool = False) -> None:
        self.way, self.case, self.exact, self.count = way, case, exact, 0
        self.recipe, self.inputs = recipe_of(way, case), make_inputs(case)
        self.model = denoisers.build(way.denoiser, case.config)
        for module in self.model.modules() if exact else ():
            if isinstance(module, PlainAttention):
                module.expanded = False
        if exact and not GPU:
            self.model.double()
        self.teachers = random_teachers(self.recipe)
        if exact and not GPU:
            for teacher in self.teachers.values():
                teacher.double().network.double()
                teacher.dtype = torch.float64
        trained = {"model": self.model, **{n: t for n, t in self.teachers.items() if list(t.parameters())}}
        self.named = named_parameters(trained)
        self.parameters = [parameter for _, parameter in self.named]
        self.teaching, self.stopwatch = TeacherLosses(self.recipe, self.teachers), Stopwatch(device())
        if not way.ours:
            self._hook()
        if not exact:
            self._optimize = self._optimizers()
            self._average = self._ema()
            if way.compiled:
                denoisers.compile_blocks(way.denoiser, self.model)
                compile_teachers(self.teachers, self.recipe, device())

    def __call__(self) -> Tensor:
        """A whole step; gives the loss, a 0-dim tensor."""
        loss = self.backward()
        self.update()
        return loss

    def backward(self, draws: Draws | None = None) -> Tensor:
        """Loss of the batch, its gradients left in the parameters; draws of its own where none are given."""
        with self._precision():
            loss = self._our_loss(draws) if self.way.ours else self._plain_loss(draws)
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        """Clip the gradients, update the weights by them, drop them, and average the weights."""
        self._optimize()
        self._average(self.count)
        self.count += 1

    def gradients(self) -> dict[str, Tensor]:
        """Gradients by our names of the parameters."""
        found = {}
        for name, parameter in self.named:
            module, _, rest = name.partition(".")
            own = denoisers.ours_name(self.way.denoiser, rest) if module == "model" else rest
            assert parameter.grad is not None, name
            found[f"{module}.{own}"] = parameter.grad
        return found

    def _precision(self) -> AbstractContextManager[object]:
        """bf16 products over float32 weights, for every way alike; the trainer's FSDP2 casts once a step instead."""
        return torch.autocast(device().type, torch.bfloat16, enabled=GPU and not self.exact)

    # --- ours: what train/learner/step.py does -------------------------------------------------------------------

    def _our_loss(self, draws: Draws | None) -> Tensor:
        recipe, inputs = self.recipe, self.inputs
        seed = draws.seed if draws else torch.full((), self.count, dtype=torch.int64, device=device())
        t = flow.sample_t(seed, inputs.ids)
        keep, route = None, None
        if recipe.routing.enabled:
            keep = sample_keep(inputs.ids, self.case.tokens, recipe.routing.selection_ratio, seed=seed)
            route = (recipe.routing.start, recipe.routing.end)
        layer = recipe.repa.layer if "repa" in self.teachers else None
        text, mask = (inputs.packed, None) if self.way.packed else (inputs.text, inputs.mask)
        model: Any = self.model
        out = model.forward_tokens(
            inputs.image, t, text, mask, keep=keep, route=route, feature_layer=layer,
            noise_seed=seed, sample_ids=inputs.ids,
        )  # fmt: skip
        predicted, features = (out, None) if layer is None else out
        loss: Tensor = x_prediction_loss(predicted, inputs.image, t, recipe.model.patch_size)
        if not self.teachers:
            return loss
        batch = Batch(inputs.image, [], inputs.ids, inputs.ids)
        added, _ = self.teaching(batch, predicted, features, keep, None, self.stopwatch)
        return loss + added

    # --- the PRX way ---------------------------------------------------------------------------------------------

    def _hook(self) -> None:
        blocks = self.model.get_submodule("blocks")
        assert isinstance(blocks, nn.ModuleList)
        self.features: Tensor | None = None
        if "repa" in self.teachers:
            # Before the route's own hook: features are taken before the route is left.
            blocks[self.recipe.repa.layer].register_forward_hook(self._take_features)
        tokens, rotary = HOOKED[self.way.denoiser]
        self.hooks = HookRouting(blocks, self.recipe.routing, tokens=tokens, rotary=rotary) if self.way.routed else None

    def _take_features(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.features = output

    def _plain_loss(self, draws: Draws | None) -> Tensor:
        inputs, image = self.inputs, to_float(self.inputs.image)
        if self.exact and not GPU:
            image = image.double()
        t = draws.t if draws else plain_prx.sample_t(self.case.batch, device())
        noise = draws.noise.to(image.dtype) if draws else torch.randn_like(image)
        level = t[:, None, None, None]
        x_t = (1 - level) * image + level * noise
        if self.hooks is not None:
            self.hooks.scores = draws.scores if draws else None
        x0_hat = denoisers.predict(self.way.denoiser, self.model, x_t, t, inputs.text, inputs.mask)
        loss = velocity_loss(x0_hat, image, x_t, t)
        keep = self.hooks.keep if self.hooks is not None else None
        seen = Prediction(image, x0_hat, self.features, keep, self.recipe.model.patch_size)
        for name, teacher in self.teachers.items():
            loss = loss + self.teaching.weights[name] * teacher(seen).mean()
        return loss

    # --- optimizers ----------------------------------------------------------------------------------------------

    def _optimizers(self) -> Callable[[], object]:
        if self.way.optimizer == "none":
            return self._drop_gradients
        if self.way.ours:
            ours = Optimizers(self.named, self.recipe)
            return lambda: ours.step(1.0, self.recipe.train.clip)
        made = plain_optimizers([p for _, p in split(self.named, self.recipe)[0]], self.parameters, self.recipe)

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.train.clip)
            for optimizer in made:
                optimizer.step()
                optimizer.zero_grad()

        return step

    def _drop_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def _ema(self) -> Callable[[int], None]:
        settings = self.recipe.ema
        averaged = [(n, p) for n, p in self.named if n.startswith("model.")]
        self.averages: list[Tensor] = []
        if not self.way.ema:
            return lambda step: None
        ema: EMA | PlainEMA = (
            EMA(averaged, decay=settings.decay, every=settings.every)
            if self.way.ours
            else PlainEMA([p for _, p in averaged], settings.decay, settings.every)
        )
        self.averages = ema.averages
        return ema.update


def plain_optimizers(
    muon: list[nn.Parameter], parameters: list[nn.Parameter], recipe: Recipe
) -> list[torch.optim.Optimizer]:
    """torch's own: Muon matrix by matrix where there are some, AdamW for the rest."""
    m, a = recipe.muon, recipe.adam
    chosen = {id(p) for p in muon}
    rest = [p for p in parameters if id(p) not in chosen]
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=a.lr, betas=a.betas, eps=a.eps, weight_decay=a.weight_decay)
    ]
    if muon:
        made.append(
            torch.optim.Muon(
                muon, lr=m.lr, weight_decay=m.weight_decay, momentum=m.momentum, nesterov=m.nesterov,
                ns_coefficients=m.ns_coefficients, ns_steps=m.ns_steps, adjust_lr_fn="match_rms_adamw",
            )
        )  # fmt: skip
    return made
