"""The sampler: where Euler steps end, guidance by its formulas, and pictures that do not depend on their batch."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from prx_kernels import kept_tokens, patchify, sample_keep, unpatchify
from prx_model import PRXConfig, PRXTransformer, Routing, Sampling, sample
from prx_model.sampler import initial_noise, time_grid

SMALL = PRXConfig(
    patch_size=4, context_in_dim=12, hidden_size=32, num_heads=2, depth=3, axes_dim=(8, 8), bottleneck_size=8
)
HEIGHT, WIDTH = 8, 12
SEEDS = torch.tensor([3, 2**40 + 1, -5])
PLAIN = Sampling(steps=6, guidance=1.0)


class Fake(nn.Module):
    """A denoiser made of two given functions, which writes down each call."""

    def __init__(
        self, dense: Callable[[Tensor, Tensor], Tensor], routed: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.config, self.dense, self.routed = SMALL, dense, routed
        self.calls: list[dict[str, Any]] = []

    def forward(self, image: Tensor, t: Tensor, text: Tensor, text_mask: Tensor | None = None) -> Tensor:
        self.calls.append({"image": image, "t": t, "text": text, "mask": text_mask})
        return self.dense(image, text)

    def forward_tokens(
        self, image: Tensor, t: Tensor, text: Tensor, text_mask: Tensor | None = None, **routing: Any
    ) -> Tensor:
        self.calls.append({"image": image, "t": t, "text": text, "mask": text_mask, **routing})
        assert self.routed is not None
        return patchify(self.routed(image, text), SMALL.patch_size)


def draw(model: nn.Module, text: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    options = {"height": HEIGHT, "width": WIDTH, "seeds": SEEDS, "settings": PLAIN} | options
    return sample(model, text, mask, **options)  # type: ignore[arg-type]


def random_model() -> PRXTransformer:
    model = PRXTransformer(SMALL)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def make_text(batch: int = 3, length: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(length)[None] < torch.tensor([3, 5, 1])[:batch, None]
    return torch.randn(batch, length, 12, generator=generator), mask


def picture(value: float = 0.0) -> Tensor:
    return torch.linspace(-1, 1, 3 * HEIGHT * WIDTH).reshape(1, 3, HEIGHT, WIDTH) + value


# --- Euler --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "shift"), [(1, 3.0), (4, 1.0), (28, 3.0), (50, 3.0)])
def test_an_oracle_is_reached_up_to_the_noise_that_the_clamp_leaves(steps: int, shift: float) -> None:
    """Each step keeps `1 - (t - t')/max(t, t_min)` of the distance to x0: the closed form of the whole run."""
    x0, settings = picture(), Sampling(steps=steps, guidance=1.0, shift=shift)
    got = draw(Fake(lambda image, _: x0.expand_as(image)), make_text()[0], settings=settings)
    grid = time_grid(steps, shift).double()
    rest = torch.prod(1 - (grid[:-1] - grid[1:]) / grid[:-1].clamp(min=0.05))
    expected = x0 + rest * (initial_noise(SEEDS, 3, HEIGHT, WIDTH).double() - x0)
    # Float32 rounding of at most 50 steps on values below 5.
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)
    # What is left of the noise (standard deviation 1) stays below one in a hundred.
    assert rest < 0.01
    assert got.dtype == torch.float32


def test_steps_walk_the_time_grid_with_one_float32_t_for_the_whole_batch() -> None:
    fake = Fake(lambda image, _: image)
    draw(fake, make_text()[0])
    assert [c["t"].shape for c in fake.calls] == [(1,)] * 6
    assert {c["t"].dtype for c in fake.calls} == {torch.float32}
    assert torch.equal(torch.cat([c["t"] for c in fake.calls]), time_grid(6, 3.0)[:-1])


def test_a_network_that_predicts_its_input_leaves_the_noise_as_it_is() -> None:
    got = draw(Fake(lambda image, _: image), make_text()[0])
    assert torch.equal(got, initial_noise(SEEDS, 3, HEIGHT, WIDTH))


def test_noise_scale_multiplies_the_seeds_noise_and_given_noise() -> None:
    fake = Fake(lambda image, _: image)
    doubled = replace(PLAIN, noise_scale=2.0)
    assert torch.equal(draw(fake, make_text()[0], settings=doubled), 2 * initial_noise(SEEDS, 3, HEIGHT, WIDTH))
    given = torch.randn(3, 3, HEIGHT, WIDTH)
    assert torch.equal(draw(fake, make_text()[0], noise=given), given)


def test_initial_noise_is_standard_normal_and_each_seed_s_own() -> None:
    noise = initial_noise(SEEDS, 3, 64, 64)
    count = noise[0].numel()
    for one in noise:
        assert abs(float(one.mean())) < 4 / count**0.5  # four standard errors
        assert abs(float(one.var()) - 1) < 4 * (2 / count) ** 0.5
    correlation = torch.corrcoef(noise.flatten(1)) - torch.eye(3)
    assert float(correlation.abs().max()) < 4 / count**0.5


# --- guidance -----------------------------------------------------------------------------------------------------


def test_without_guidance_each_step_is_one_pass_over_the_prompt_only() -> None:
    text, mask = make_text()
    for kind in ("cfg", "self"):
        fake = Fake(lambda image, _: 0 * image)
        draw(fake, text, mask, settings=replace(PLAIN, guidance_kind=kind), null_text=torch.zeros(1, 2, 12))
        assert len(fake.calls) == PLAIN.steps
        assert all(torch.equal(c["text"], text) and c["mask"] is mask for c in fake.calls)
        assert all(c["image"].shape[0] == 3 for c in fake.calls)


@pytest.mark.parametrize("guidance", [0.0, 2.0, 3.5])
def test_classifier_free_guidance_follows_its_formula(guidance: float) -> None:
    """A network whose x0 is the mean of its text: the guided x0 is `null + s·(text - null)`, known in closed form."""

    def mean_of_text(image: Tensor, text: Tensor) -> Tensor:
        return text.mean(dim=(1, 2))[:, None, None, None].expand_as(image)

    text = torch.ones(3, 5, 12) * torch.tensor([0.1, 0.2, 0.3])[:, None, None]
    null = torch.full((1, 5, 12), -0.4)
    settings = Sampling(steps=1, guidance=guidance)
    fake = Fake(mean_of_text)
    got = draw(fake, text, settings=settings, null_text=null)
    expected = -0.4 + guidance * (torch.tensor([0.1, 0.2, 0.3]) + 0.4)
    # One Euler step from t = 1 to 0 lands on the guided x0: float32 rounding.
    torch.testing.assert_close(got, expected[:, None, None, None].expand_as(got), rtol=1e-5, atol=1e-5)
    assert len(fake.calls) == 1
    assert fake.calls[0]["image"].shape[0] == 6


@pytest.mark.parametrize("null_length", [2, 5, 9])
@pytest.mark.parametrize("masks", ["both", "null only", "text only", "none"])
def test_guidance_of_a_model_equals_two_separate_passes(null_length: int, masks: str) -> None:
    """Prompts of any two lengths: padding one to the other's length must change neither."""
    model, (text, mask) = random_model(), make_text()
    null = torch.randn(1, null_length, 12, generator=torch.Generator().manual_seed(2))
    null_mask = (torch.arange(null_length) < 2)[None] if masks in ("both", "null only") else None
    text_mask = mask if masks in ("both", "text only") else None
    settings = Sampling(steps=2, guidance=3.0)
    got = draw(model, text, text_mask, settings=settings, null_text=null, null_mask=null_mask)

    x, grid = initial_noise(SEEDS, 3, HEIGHT, WIDTH), time_grid(2, 3.0)
    many = None if null_mask is None else null_mask.expand(3, -1)
    with torch.no_grad():
        for now, then in zip(grid[:-1], grid[1:], strict=True):
            without = model(x, now[None], null.expand(3, -1, -1), many)
            guided = without + 3.0 * (model(x, now[None], text, text_mask) - without)
            x = x + (then - now) * (x - guided) / max(float(now), 0.05)
    # Float32 rounding, through guidance that triples it.
    torch.testing.assert_close(got, x, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("guidance", [0.0, 2.5])
def test_self_guidance_follows_its_formula_with_the_same_prompt_and_no_null(guidance: float) -> None:
    dense, routed = picture(0.5), picture(-0.25)
    fake = Fake(lambda image, _: dense.expand_as(image), lambda image, _: routed.expand_as(image))
    text, mask = make_text()
    settings = Sampling(steps=1, guidance=guidance, guidance_kind="self")
    got = draw(fake, text, mask, settings=settings, routing=Routing(start=1, end=2))
    expected = routed + guidance * (dense - routed)
    torch.testing.assert_close(got, expected.expand_as(got), rtol=1e-5, atol=1e-5)  # one step lands on it
    assert [sorted(c.keys() - {"image", "t"}) for c in fake.calls] == [
        ["mask", "text"],
        ["keep", "mask", "route", "text"],
    ]
    assert all(torch.equal(c["text"], text) and c["mask"] is mask for c in fake.calls)
    assert fake.calls[1]["route"] == (1, 2)


def test_self_guidance_keeps_the_share_of_tokens_afresh_each_step_and_by_the_picture_s_seed() -> None:
    def sets(seeds: Tensor) -> list[Tensor]:
        fake = Fake(lambda image, _: 0 * image, lambda image, _: 0 * image)
        settings = Sampling(steps=4, guidance=2.0, guidance_kind="self")
        options: dict[str, Any] = {"settings": settings, "seeds": seeds}
        options["routing"] = Routing(start=0, end=1, selection_ratio=0.6)
        draw(fake, torch.zeros(len(seeds), 2, 12), height=32, width=48, **options)
        return [c["keep"] for c in fake.calls if "keep" in c]

    together, alone = sets(SEEDS), sets(SEEDS[1:2])
    assert [k.shape for k in together] == [(3, kept_tokens(96, 0.6))] * 4
    assert all(torch.equal(many[1], one[0]) for many, one in zip(together, alone, strict=True))
    assert len({tuple(row.tolist()) for keep in together for row in keep}) == 12


def test_self_guidance_with_one_set_of_tokens_keeps_the_first_steps_throughout() -> None:
    def sets(routed_tokens: Literal["once", "each-step"]) -> list[Tensor]:
        fake = Fake(lambda image, _: 0 * image, lambda image, _: 0 * image)
        settings = Sampling(steps=4, guidance=2.0, guidance_kind="self", routed_tokens=routed_tokens)
        options: dict[str, Any] = {"settings": settings, "routing": Routing(start=0, end=1)}
        draw(fake, torch.zeros(3, 2, 12), height=32, width=48, **options)
        return [c["keep"] for c in fake.calls if "keep" in c]

    once, fresh = sets("once"), sets("each-step")
    assert len(once) == 4
    assert all(torch.equal(keep, fresh[0]) for keep in once)
    assert len({tuple(row.tolist()) for row in once[0]}) == 3, "each picture has its own"


def test_prx_s_way_of_drawing_equals_its_loop_written_out() -> None:
    """Self-guidance with one set of tokens, Euler steps on the linear grid shifted by 3, velocity with t_min 0.05."""
    model, (text, mask) = random_model(), make_text()
    settings = Sampling(steps=5, guidance=2.0, guidance_kind="self", routed_tokens="once", time_grid="linear")
    got = draw(model, text, mask, settings=settings, routing=Routing(start=1, end=2))
    fake = Fake(lambda x, _: 0 * x, lambda x, _: 0 * x)
    draw(fake, text, mask, settings=replace(settings, steps=1), routing=Routing(start=1, end=2))
    keep, x = fake.calls[1]["keep"], initial_noise(SEEDS, 3, HEIGHT, WIDTH)
    times = [3 * (1 - i / 5) / (1 + 2 * (1 - i / 5)) for i in range(6)]
    with torch.no_grad():
        for now, then in zip(times[:-1], times[1:], strict=True):
            t = torch.tensor([now])
            dense = model.forward_tokens(x, t, text, mask)
            routed = model.forward_tokens(x, t, text, mask, keep=keep, route=(1, 2))
            x0_hat = unpatchify(routed + 2.0 * (dense - routed), 4, HEIGHT, WIDTH)
            x = x + (then - now) * (x - x0_hat) / max(now, 0.05)
    # Float32 rounding, through five guided steps.
    torch.testing.assert_close(got, x, rtol=1e-4, atol=2e-5)


def test_self_guidance_of_a_model_equals_its_formula_written_out() -> None:
    model, (text, mask) = random_model(), make_text()
    fake = Fake(lambda x, _: 0 * x, lambda x, _: 0 * x)
    options = {"settings": Sampling(steps=1, guidance=2.0, guidance_kind="self"), "routing": Routing(start=1, end=1)}
    got = draw(model, text, mask, **options)
    draw(fake, text, mask, **options)
    keep = fake.calls[1]["keep"]
    noise, one = initial_noise(SEEDS, 3, HEIGHT, WIDTH), torch.ones(1)
    with torch.no_grad():
        dense = model.forward_tokens(noise, one, text, mask)
        routed = model.forward_tokens(noise, one, text, mask, keep=keep, route=(1, 1))
    assert float((dense - routed).abs().mean()) > 0.01, "routing must matter for the comparison to say something"
    expected = unpatchify(routed + 2.0 * (dense - routed), 4, HEIGHT, WIDTH)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)  # one step lands on it: float32 rounding


# --- independence of the batch ------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "none": {"settings": PLAIN},
    "cfg": {"settings": Sampling(steps=4, guidance=2.0), "null_text": torch.ones(1, 2, 12)},
    "self": {"settings": Sampling(steps=4, guidance=2.0, guidance_kind="self"), "routing": Routing(start=1, end=2)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_the_same_alone_in_a_batch_and_at_another_place(kind: str) -> None:
    model, (text, mask) = random_model(), make_text()
    together = draw(model, text, mask, **KINDS[kind])
    order = torch.tensor([2, 0, 1])
    moved = draw(model, text[order], mask[order], **(KINDS[kind] | {"seeds": SEEDS[order]}))
    # Products of another batch size may add in another order: float32 rounding through four guided steps.
    torch.testing.assert_close(moved, together[order], rtol=0, atol=1e-5)
    for i in range(3):
        alone = draw(model, text[i : i + 1], mask[i : i + 1], **(KINDS[kind] | {"seeds": SEEDS[i : i + 1]}))
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=1e-5)


def test_pictures_differ_by_seed_and_repeat_with_it() -> None:
    model, text = random_model(), make_text()[0][:1].expand(3, -1, -1)
    first, second = draw(model, text), draw(model, text)
    assert torch.equal(first, second)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert float((first[i] - first[j]).abs().mean()) > 0.1


def test_text_and_guidance_reach_the_picture() -> None:
    model, (text, mask) = random_model(), make_text()
    cfg = KINDS["cfg"]
    base = draw(model, text, mask, **cfg)
    changes = [
        draw(model, text.flip(0), mask, **cfg),
        draw(model, text, mask, **(cfg | {"null_text": -torch.ones(1, 2, 12)})),
        draw(model, text, mask, **(cfg | {"settings": replace(cfg["settings"], guidance=2.5)})),
    ]
    for changed in changes:
        assert float((changed - base).abs().max()) > 1e-3


def test_a_bfloat16_model_draws_nearly_the_float32_picture_in_float32() -> None:
    model, (text, mask) = random_model(), make_text()
    exact = draw(model, text, mask)
    rounded = draw(model.bfloat16(), text, mask)
    assert rounded.dtype == torch.float32
    # Roundings of 2^-9 in three blocks and six steps; unrelated pictures would be off by 1.4.
    assert float((rounded - exact).norm() / exact.norm()) < 0.1


def test_sampling_builds_no_graph() -> None:
    text = make_text()[0].requires_grad_()
    assert not draw(random_model(), text).requires_grad


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": Sampling()}, "guidance_kind 'cfg' needs null_text"),
        ({"settings": Sampling(guidance_kind="self")}, "guidance_kind 'self' needs routing"),
        ({"height": 10}, "10x12 is not a multiple of the patch size 4"),
        ({"seeds": SEEDS[:2]}, r"text must be \(2, L, 12\), got \(3, 5, 12\)"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(random_model(), make_text()[0], **options)


def test_kept_sets_of_two_steps_do_not_reuse_the_noise_s_stream() -> None:
    """The noise of a picture and its kept tokens come from different streams of its seed."""
    fake = Fake(lambda image, _: 0 * image, lambda image, _: 0 * image)
    settings = Sampling(steps=1, guidance=2.0, guidance_kind="self")
    draw(fake, make_text()[0], settings=settings, routing=Routing(start=0, end=1), height=32, width=48)
    of_noise = sample_keep(SEEDS, 96, 0.5, seed=torch.tensor(0x5EED))
    assert not torch.equal(fake.calls[1]["keep"], of_noise)
