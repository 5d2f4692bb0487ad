"""Our transformer against diffusers' `PRXTransformer2DModel`, which nobody here wrote: names, outputs, gradients."""

from dataclasses import asdict, dataclass

import pytest
import torch
from torch import Tensor

from prx_model import PRXConfig, PRXTransformer

PIXEL = PRXConfig(
    context_in_dim=24, hidden_size=64, num_heads=2, depth=2, axes_dim=(16, 16), patch_size=32, bottleneck_size=16
)
# Uneven rotary axes: swapped rows and columns would show.
LATENT = PRXConfig(
    in_channels=16,
    context_in_dim=24,
    hidden_size=64,
    num_heads=2,
    depth=2,
    axes_dim=(8, 24),
    patch_size=2,
    bottleneck_size=None,
)
# Latents are eight times smaller than the pictures (128x96 and 64x160) they stand for.
CASES = [
    pytest.param(PIXEL, (128, 96), id="pixel-128x96"),
    pytest.param(PIXEL, (64, 160), id="pixel-64x160"),
    pytest.param(LATENT, (16, 12), id="latent-128x96"),
    pytest.param(LATENT, (8, 20), id="latent-64x160"),
]
TEXT = 7


@dataclass
class Inputs:
    image: Tensor
    t: Tensor
    text: Tensor
    mask: Tensor | None

    def fresh(self) -> "Inputs":
        """The same values as new leaves that ask for gradients."""
        return Inputs(
            self.image.clone().requires_grad_(), self.t.clone(), self.text.clone().requires_grad_(), self.mask
        )


def make_inputs(config: PRXConfig, size: tuple[int, int], batch: int, mask: Tensor | None) -> Inputs:
    generator = torch.Generator().manual_seed(11)
    return Inputs(
        torch.randn(batch, config.in_channels, *size, generator=generator),
        torch.linspace(0.04, 0.93, batch),
        torch.randn(batch, TEXT, config.context_in_dim, generator=generator),
        mask,
    )


def make_theirs(config: PRXConfig) -> torch.nn.Module:
    """diffusers' model, every parameter drawn anew: its own initialisation leaves modulation or head near zero."""
    from diffusers import PRXTransformer2DModel

    model = PRXTransformer2DModel(**{**asdict(config), "axes_dim": list(config.axes_dim)})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            if parameter.ndim == 1:
                parameter.add_(0.7)
    return model


def make_pair(config: PRXConfig, *, small: tuple[str, ...] = ()) -> tuple[torch.nn.Module, PRXTransformer]:
    """Both models with the same weights; those whose name holds a word of `small` a thousand times smaller."""
    theirs = make_theirs(config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if any(word in name for word in small):
                parameter.mul_(1e-3)
    ours = PRXTransformer(config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def run(model: torch.nn.Module, inputs: Inputs, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and the gradients of `sum(output·weight)` by parameter, image and text."""
    leaves = inputs.fresh()
    if isinstance(model, PRXTransformer):
        out = model(leaves.image, leaves.t, leaves.text, leaves.mask)
    else:
        out = model(leaves.image, leaves.t, leaves.text, attention_mask=leaves.mask, return_dict=False)[0]
    model.zero_grad()
    (out * weight).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert leaves.image.grad is not None
    assert leaves.text.grad is not None
    return out.detach(), {**gradients, "image": leaves.image.grad, "text": leaves.text.grad}


def compare(config: PRXConfig, inputs: Inputs, *, small: tuple[str, ...] = ()) -> None:
    theirs, ours = make_pair(config, small=small)
    weight = torch.randn(inputs.image.shape, generator=torch.Generator().manual_seed(3))
    out_theirs, grad_theirs = run(theirs, inputs, weight)
    out_ours, grad_ours = run(ours, inputs, weight)
    assert out_theirs.std() > 0.1, "the comparison would be empty with an output near zero"
    # Issue 2: fp32 output within 1e-5 (docs/recipe.md has 2.4e-7 on outputs of order 1), scaled where outputs are not.
    assert (out_ours - out_theirs).abs().max() <= 1e-5 * max(1.0, float(out_theirs.abs().max()))
    assert grad_ours.keys() == grad_theirs.keys()
    for name, expected in grad_theirs.items():
        assert expected.norm() > 0, f"{name} gets no gradient, so nothing is compared"
        # Issue 2: relative gradients within 1e-4 (docs/recipe.md measured 5.2e-6).
        assert (grad_ours[name] - expected).norm() <= 1e-4 * expected.norm(), name


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize(("config", "size"), CASES)
def test_output_and_gradients_equal_diffusers(config: PRXConfig, size: tuple[int, int], masked: bool) -> None:
    mask = (torch.arange(TEXT) < 4)[None] if masked else None
    compare(config, make_inputs(config, size, 1, mask))


@pytest.mark.parametrize(("config", "size"), [CASES[0], CASES[3]])
def test_batch_of_different_masks_equals_diffusers(config: PRXConfig, size: tuple[int, int]) -> None:
    position = torch.arange(TEXT)
    # One row without any real text, one padded on the left, one on the right.
    mask = torch.stack((torch.zeros(TEXT, dtype=torch.bool), position >= 3, position < 5))
    compare(config, make_inputs(config, size, 3, mask))


@pytest.mark.parametrize("small", ["img_in", "img_qkv_proj", "txt_kv_proj"])
def test_norms_of_values_near_zero_equal_diffusers(small: str) -> None:
    """A mean square of 1e-6 is as large as the epsilon of layer norm and RMS norm, so another epsilon shows."""
    compare(PIXEL, make_inputs(PIXEL, (128, 96), 2, None), small=(small,))


@pytest.mark.parametrize(("config", "size"), [CASES[0], CASES[3]])
def test_one_t_for_a_batch_equals_diffusers_and_equals_t_repeated(config: PRXConfig, size: tuple[int, int]) -> None:
    inputs = make_inputs(config, size, 3, None)
    inputs.t = torch.tensor([0.37])
    compare(config, inputs)
    ours = make_pair(config)[1]
    with torch.no_grad():
        once = ours(inputs.image, inputs.t, inputs.text)
        repeated = ours(inputs.image, inputs.t.repeat(3), inputs.text)
    # The same sums; only the batch size of the modulation's product differs (float32 rounding).
    torch.testing.assert_close(once, repeated, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [PIXEL, LATENT], ids=["pixel", "latent"])
def test_names_and_shapes_are_those_of_diffusers_both_ways(config: PRXConfig) -> None:
    theirs, ours = make_theirs(config), PRXTransformer(config)
    shapes_theirs = {name: tuple(t.shape) for name, t in theirs.state_dict().items()}
    assert {name: tuple(t.shape) for name, t in ours.state_dict().items()} == shapes_theirs
    ours.load_state_dict(theirs.state_dict(), strict=True)
    back = make_theirs(config)
    with torch.no_grad():
        for parameter in back.parameters():
            parameter.zero_()
    back.load_state_dict(ours.state_dict(), strict=True)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_padded_text_changes_nothing_and_its_embedding_gets_no_gradient() -> None:
    _, ours = make_pair(PIXEL)
    inputs = make_inputs(PIXEL, (128, 96), 2, (torch.arange(TEXT) < 4).expand(2, TEXT))
    weight = torch.ones_like(inputs.image)
    out, gradients = run(ours, inputs, weight)
    inputs.text[:, 4:] = 1000.0
    out_other, _ = run(ours, inputs, weight)
    assert torch.equal(out, out_other)
    assert gradients["text"][:, 4:].abs().max() == 0
    assert gradients["text"][:, :4].abs().min() > 0
