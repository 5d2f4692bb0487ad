"""Pixels to tokens through a bottleneck, with and without noise formed on the way, and the whole pixel end of a step.

Weights are bf16 on a GPU, pictures fp32; all ways use the same weights, and the same noise where there is some (plain
ways are handed x_t's parts and mix them; ours is given the seed of the same stream).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import prx_kernels
from benchmarks.machine import device
from benchmarks.measure import Measure
from benchmarks.passes import Which
from benchmarks.peers import require
from benchmarks.roofline import Cost
from prx_kernels import reference

GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if GPU else torch.float32


@dataclass(frozen=True)
class Case:
    batch: int
    size: int
    patch: int
    bottleneck: int = 256
    hidden: int = 1792

    def __str__(self) -> str:
        return f"B{self.batch} {self.size} px patch {self.patch}"

    @property
    def tokens(self) -> int:
        return (self.size // self.patch) ** 2

    @property
    def features(self) -> int:
        return 3 * self.patch**2

    def cost(self, which: Which) -> Cost:
        """Least: fp32 pixels read, both weights read, tokens written; backward reads pixels and tokens' gradients.

        The backward has two products a weight less the one that would give a gradient to the pixels.
        """
        rows, element = self.batch * self.tokens, torch.tensor([], dtype=DTYPE).element_size()
        weights = self.bottleneck * (self.features + self.hidden)
        pixels, out = 4.0 * rows * self.features, float(element) * rows * self.hidden
        forward = Cost(pixels + element * weights + out, 2.0 * rows * weights)
        if which == "forward":
            return forward
        backward_flop = 2.0 * rows * (self.bottleneck * self.features + 2 * self.bottleneck * self.hidden)
        return Cost(2 * forward.nbytes, forward.flop + backward_flop)


CASES = [Case(32, 512, 32), Case(16, 1024, 32), Case(256, 256, 16)] if GPU else [Case(2, 64, 16, 32, 64)]


def unfold(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, patch: int) -> Tensor:
    """PRX's and diffusers': patches copied out, two linear maps."""
    patches = F.unfold(x, patch, stride=patch).transpose(1, 2)
    return F.linear(F.linear(patches.to(w1.dtype), w1, b1), w2, b2)


def rearranged(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, patch: int) -> Tensor:
    from einops import rearrange

    patches = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)
    return F.linear(F.linear(patches.to(w1.dtype), w1, b1), w2, b2)


def convolutions(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, patch: int) -> Tensor:
    """JiT's: a strided convolution and one of 1x1."""
    narrow = F.conv2d(x.to(w1.dtype), w1.view(-1, 3, patch, patch), b1, stride=patch)
    return F.conv2d(narrow, w2[:, :, None, None], b2).flatten(2).transpose(1, 2)


def timm(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, patch: int) -> Tensor:
    """What timm's PatchEmbed computes, then a linear map."""
    narrow = F.conv2d(x.to(w1.dtype), w1.view(-1, 3, patch, patch), b1, stride=patch).flatten(2).transpose(1, 2)
    return F.linear(narrow, w2, b2)


def diffusers(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, patch: int) -> Tensor:
    from diffusers.models.transformers.transformer_prx import img2seq

    return F.linear(F.linear(img2seq(x, patch).to(w1.dtype), w1, b1), w2, b2)


def ours(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, patch: int) -> Tensor:
    return prx_kernels.patch_embed(x, w1, b1, w2, b2, patch)


def definition(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, patch: int) -> Tensor:
    return F.linear(F.linear(reference.patchify(x, patch), w1, b1), w2, b2)


WAYS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "unfold + linear": (unfold, "plain"),
    "einops + linear": (rearranged, "einops"),
    "two convolutions": (convolutions, "plain"),
    "timm PatchEmbed + linear": (timm, "timm"),
    "diffusers PRX": (diffusers, "diffusers"),
    "ours": (ours, "plain"),
}


def parameters(case: Case, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator(device()).manual_seed(seed)
    shapes = ((case.bottleneck, case.features), (case.bottleneck,), (case.hidden, case.bottleneck), (case.hidden,))
    made = (torch.randn(shape, generator=generator, device=device()) * shape[-1] ** -0.5 for shape in shapes)
    return tuple(w.to(DTYPE).requires_grad_() for w in made)


def picture(case: Case, seed: int) -> Tensor:
    generator = torch.Generator(device()).manual_seed(seed)
    return torch.rand(case.batch, 3, case.size, case.size, generator=generator, device=device()) * 2 - 1


def through(function: Callable[..., Any], mode: str) -> Callable[..., Any]:
    if mode == "eager":
        return function
    return torch.compile(function, fullgraph=True, backend="inductor" if GPU else "aot_eager")


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("which", ["forward", "both"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_clean_picture(measure: Measure, case: Case, which: Which, way: str, mode: str) -> None:
    function, peer = WAYS[way]
    require(peer)
    measure(
        op="patch embedding",
        case=f"{case}, {mode}",  # like is compared with like
        which=which,
        way=way,
        function=through(function, mode),
        inputs=lambda seed: (picture(case, seed), *parameters(case, seed), case.patch),
        reference=definition,
        cost=case.cost(which),
        # Pixels, weights and the row between both maps rounded to bf16 once, and sums of them in the gradients.
        tolerance=1.5e-2 if GPU else 1e-5,
        ours=way == "ours",
    )


def plain_step(embed: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Noise drawn and stored, x_t formed, embedded; the loss in v-space, as the references write it."""

    def run(
        x0: Tensor, t: Tensor, seed: Tensor, prediction: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, p: int
    ) -> tuple[Tensor, Tensor]:
        level = t[:, None, None, None]
        noise = torch.randn_like(x0)
        x_t = (1 - level) * x0 + level * noise
        tokens = embed(x_t, w1, b1, w2, b2, p)
        clamped = level.clamp(min=0.05)
        x0_hat = reference.unpatchify(prediction.float(), p, *x0.shape[2:])
        error = (x_t - x0_hat) / clamped - (x_t - x0) / clamped
        return tokens, error.square().mean()

    return run


def our_step(
    x0: Tensor, t: Tensor, seed: Tensor, prediction: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, p: int
) -> tuple[Tensor, Tensor]:
    tokens = prx_kernels.patch_embed(x0, w1, b1, w2, b2, p, t=t, noise_seed=seed)
    return tokens, prx_kernels.x_prediction_loss(prediction, x0, t, p)


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("way", ["unfold + linear", "two convolutions", "ours"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_noise_embedding_and_loss(measure: Measure, case: Case, way: str, mode: str) -> None:
    """The pixel end of a training step, forward and backward; the loss and its gradient do not depend on the noise."""
    function = our_step if way == "ours" else plain_step(WAYS[way][0])

    def inputs(seed: int) -> tuple[Any, ...]:
        generator = torch.Generator(device()).manual_seed(seed)
        t = torch.rand(case.batch, generator=generator, device=device()) * 0.9 + 0.1
        rows = torch.randn(case.batch, case.tokens, case.features, generator=generator, device=device())
        prediction = rows.to(DTYPE)
        x0 = picture(case, seed)
        return (
            x0,
            t,
            torch.tensor(seed, device=device()),
            prediction.requires_grad_(),
            *parameters(case, seed),
            case.patch,
        )

    def error_of_loss_and_its_gradient(run: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
        tokens, loss, *gradients = run(*arguments)
        x0, t, _, prediction, *_ = arguments[0]
        exact = prediction.detach().double().requires_grad_()
        truth = reference.x_prediction_loss(exact, x0.double(), t, case.patch).mean()
        (gradient,) = torch.autograd.grad(truth, exact)
        gradient = gradient * arguments[2][1].double()
        worst = float((gradients[0].double() - gradient).norm() / gradient.norm())
        finite = bool(torch.isfinite(tokens).all()) and tokens.shape == (case.batch, case.tokens, case.hidden)
        return (
            max(worst, float((loss.detach().double() - truth.detach()).abs() / truth.detach()))
            if finite
            else float("inf")
        )

    embed = case.cost("both")
    element = torch.tensor([], dtype=DTYPE).element_size()
    values = case.batch * case.tokens * case.features
    measure(
        op="noise + patch embedding + loss",
        case=f"{case}, {mode}",
        which="both",
        way=way,
        function=through(function, mode),
        inputs=inputs,
        verify=error_of_loss_and_its_gradient,
        # The loss reads prediction and picture and writes the prediction's gradient.
        cost=Cost(embed.nbytes + values * (2.0 * element + 4.0), embed.flop),
        tolerance=1e-2 if GPU else 1e-4,
        ours=way == "ours",
    )
