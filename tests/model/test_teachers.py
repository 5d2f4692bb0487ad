"""Teachers on small real networks of timm and lpips: steps against plain formulas, gradients against differences."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from prx_kernels import gather_tokens, sample_keep
from prx_model import PRXConfig, PRXTransformer
from prx_model.teacher_constants import ImageNet
from prx_model.teachers import REPA, LPIPSLoss, PerceptualDINO, Prediction, Teacher

SMALL_DINOV3, SMALL_DINOV2 = "vit_small_patch16_dinov3", "vit_small_patch14_reg4_dinov2"
BATCH, SIZE, PATCH, HIDDEN = 2, 64, 32, 48
FP32 = torch.float32


@pytest.fixture(scope="module", params=["repa", "lpips", "pdino"])
def teacher(request: pytest.FixtureRequest) -> Teacher:
    return make(request.param)


@cache
def make(name: str) -> Teacher:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "repa":
            return REPA(HIDDEN, name=SMALL_DINOV3, weights="random", dtype=FP32)
        if name == "lpips":
            return LPIPSLoss(weights="random", dtype=FP32)
        order = "resize-last" if name == "pdino resize-last" else "resize-first"
        return PerceptualDINO(name=SMALL_DINOV2, weights="random", size=56, order=order, dtype=FP32)


def prediction(*, height: int = SIZE, width: int = SIZE, batch: int = BATCH, seed: int = 0) -> Prediction:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(batch, 3, height, width, generator=generator) * 2 - 1
    # Beyond [-1, 1] too, as predictions are.
    x0_hat = (image + 0.5 * torch.randn(image.shape, generator=generator)).requires_grad_()
    features = torch.randn(batch, (height // PATCH) * (width // PATCH), HIDDEN, generator=generator).requires_grad_()
    return Prediction(image, x0_hat, features, None, PATCH)


# --- against the plain formulas --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
def test_repa_is_minus_the_mean_cosine_with_the_resized_teachers_tokens(size: tuple[int, int]) -> None:
    repa = make("repa")
    seen = prediction(height=size[0], width=size[1])
    resized = F.interpolate(seen.image, size=(size[0] // 2, size[1] // 2), mode="nearest")
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = ((resized * 0.5 + 0.5) - mean[:, None, None]) / std[:, None, None]
    tokens = repa.network.forward_features(normalised)[:, 5:]
    a, b = repa.projector(seen.features), tokens
    cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    torch.testing.assert_close(repa(seen), -cosine.mean(1), rtol=1e-5, atol=1e-6)
    layers = [layer for layer in repa.projector if isinstance(layer, torch.nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in layers] == [(HIDDEN, 384), (384, 384), (384, 384)]
    assert sum(isinstance(layer, torch.nn.SiLU) for layer in repa.projector) == 2


@pytest.mark.parametrize(("patch", "grid"), [(32, (48, 80)), (32, (1, 1)), (32, (47, 3)), (49, (2, 24))])
def test_repas_teacher_has_a_patch_for_each_of_the_denoisers(
    patch: int, grid: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what it is given has been rounded once, to the 8 bits of bf16."""
    repa = copy.copy(make("repa"))
    given: list[Tensor] = []
    monkeypatch.setattr(repa, "dtype", torch.bfloat16)
    monkeypatch.setattr(repa, "patch_tokens", lambda image: given.append(image) or image)
    image = prediction(height=patch * grid[0], width=patch * grid[1], batch=1).image
    repa._target(Prediction(image, image, patch_size=patch))
    assert given[0].shape[2:] == (16 * grid[0], 16 * grid[1])
    rows, columns = (torch.arange(16 * n) * patch // 16 for n in grid)
    exact = ImageNet()((image.double()[:, :, rows][..., columns] + 1) / 2)
    assert ((given[0].double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()


def test_repa_on_kept_tokens_is_dense_repa_restricted_to_them() -> None:
    repa = make("repa")
    seen = prediction(height=128, width=96)
    assert seen.features is not None
    keep = sample_keep(torch.arange(BATCH), 12, 0.5, seed=torch.tensor(4))
    routed = Prediction(seen.image, seen.x0_hat, gather_tokens(seen.features, keep), keep, PATCH)
    tokens = repa.patch_tokens(ImageNet()((F.interpolate(seen.image, scale_factor=0.5) + 1) / 2))
    dense = F.cosine_similarity(repa.projector(seen.features), tokens, dim=-1)
    torch.testing.assert_close(repa(routed), -dense.gather(1, keep.long()).mean(1), rtol=1e-5, atol=1e-6)


def test_repa_takes_the_features_of_the_denoiser_behind_its_layer() -> None:
    repa = make("repa")
    config = PRXConfig(context_in_dim=8, hidden_size=HIDDEN, num_heads=2, depth=3, axes_dim=(8, 16), bottleneck_size=16)
    model = PRXTransformer(config)
    seen = prediction(height=128, width=96)
    keep = sample_keep(torch.arange(BATCH), 12, 0.5, seed=torch.tensor(4))
    text = torch.randn(BATCH, 3, 8)
    _, features = model.forward_tokens(seen.image, torch.rand(BATCH), text, keep=keep, route=(1, 1), feature_layer=1)
    loss = repa(Prediction(seen.image, seen.x0_hat, features, keep, PATCH)).sum()
    (gradient,) = torch.autograd.grad(loss, model.blocks[0].attention.img_qkv_proj.weight, allow_unused=True)
    assert gradient is not None
    with pytest.raises(ValueError, match="need that step's keep"):
        repa(Prediction(seen.image, seen.x0_hat, features, None, PATCH))
    with pytest.raises(ValueError, match="needs the denoiser's features"):
        repa(Prediction(seen.image, seen.x0_hat))


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_lpips_is_the_package_on_bilinear_half_size(size: tuple[int, int]) -> None:
    lpips = make("lpips")
    seen = prediction(height=size[0], width=size[1])
    half = [F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False) for x in (seen.x0_hat, seen.image)]
    torch.testing.assert_close(lpips(seen), lpips.network(*half).flatten(), rtol=1e-5, atol=1e-7)
    assert lpips.network.pnet_type == "vgg"


@pytest.mark.parametrize("network", ["vgg", "alex", "squeeze"])
def test_lpips_smallest_picture_goes_through_and_a_smaller_one_does_not(network: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lpips = LPIPSLoss(network=network, weights="random", dtype=FP32)
    side = LPIPSLoss.SMALLEST[network]
    assert torch.isfinite(lpips(prediction(height=side, width=side + 7))).all()
    with pytest.raises(RuntimeError, match="too small"):
        lpips(prediction(height=side - 2, width=side + 7))


def test_lpips_written_out() -> None:
    """Unit-length features of five layers, squared differences, the package's learned weights, mean over places."""
    lpips = make("lpips")
    seen = prediction()
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])

    def features(image: Tensor) -> list[Tensor]:
        half = image.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean(dim=(3, 5))
        out = lpips.network.net((half - shift[:, None, None]) / scale[:, None, None])
        return [layer / (layer.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for layer in out]

    total = torch.zeros(BATCH)
    for i, (a, b) in enumerate(zip(features(seen.x0_hat), features(seen.image), strict=True)):
        weight = lpips.network.lins[i].model[-1].weight
        assert (weight >= 0).all(), "the learned weights of the package"
        total = total + ((a - b).pow(2) * weight[0]).sum(1).mean(dim=(1, 2))
    torch.testing.assert_close(lpips(seen), total, rtol=1e-4, atol=1e-6)


def pdino_by_formula(pdino: Teacher, seen: Prediction, *, resize_first: bool) -> Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def square(image: Tensor) -> Tensor:
        return F.interpolate(image, size=(56, 56), mode="bilinear", align_corners=False)

    def tokens(image: Tensor) -> Tensor:
        unit = ((square(image) if resize_first else image) + 1) / 2
        normalised = (unit.clamp(0, 1) - mean[:, None, None]) / std[:, None, None]
        return pdino.network.forward_features(normalised if resize_first else square(normalised))[:, 5:]

    a, b = tokens(seen.x0_hat), tokens(seen.image)
    cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    assert cosine.shape == (BATCH, 16)
    return (1 - cosine).mean(1)


@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
@pytest.mark.parametrize("name", ["pdino", "pdino resize-last"])
def test_pdino_is_one_minus_the_mean_cosine_of_patch_tokens(name: str, size: tuple[int, int]) -> None:
    pdino, seen = make(name), prediction(height=size[0], width=size[1])
    expected = pdino_by_formula(pdino, seen, resize_first=name == "pdino")
    torch.testing.assert_close(pdino(seen), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["pdino", "pdino resize-last"])
def test_gradient_of_pdino_on_a_saturated_prediction_is_that_of_its_order(name: str) -> None:
    """Half of the pixels are out of range: there the two orders point elsewhere, by a cosine below 0.95."""
    pdino, seen = make(name), prediction(height=96, width=160)
    seen = Prediction(seen.image, (2.5 * seen.x0_hat.detach()).requires_grad_(), None, None, PATCH)
    (got,) = torch.autograd.grad(pdino(seen).sum(), seen.x0_hat)
    both = [
        torch.autograd.grad(pdino_by_formula(pdino, seen, resize_first=f).sum(), seen.x0_hat)[0] for f in (True, False)
    ]
    own, other = both if name == "pdino" else both[::-1]
    torch.testing.assert_close(got, own, rtol=1e-3, atol=1e-3 * float(own.abs().max()))
    assert F.cosine_similarity(got.flatten(), other.flatten(), dim=0) < 0.95


# --- all three -------------------------------------------------------------------------------------------------------


def test_gradient_into_what_is_learned_equals_finite_differences(teacher: Teacher) -> None:
    """Along three random directions in float64; prediction for two of them, features for REPA."""
    seen = prediction(batch=1)
    exact = copy.deepcopy(teacher).double()
    exact.network.double()
    exact.dtype = torch.float64
    features = isinstance(teacher, REPA)
    assert seen.features is not None
    start = (seen.features if features else seen.x0_hat).detach().double()

    def loss(point: Tensor) -> Tensor:
        image = seen.image.double()
        if features:
            return exact(Prediction(image, image, point, None, PATCH)).sum()
        return exact(Prediction(image, point, None, None, PATCH)).sum()

    point = start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(point), point)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(3):
            direction = torch.randn(start.shape, generator=generator, dtype=torch.float64)
            direction *= gradient.norm() / direction.norm() * 0.1
            direction += gradient
            direction /= direction.norm()
            step = 1e-6
            slope = (loss(start + step * direction) - loss(start - step * direction)) / (2 * step)
            # ReLU and clamp kinks crossed within the step leave a little.
            assert float(slope) == pytest.approx(float((gradient * direction).sum()), rel=2e-3)


def test_one_loss_a_sample_independent_of_the_others(teacher: Teacher) -> None:
    seen = prediction(batch=3)
    whole = teacher(seen)
    assert whole.shape == (3,)
    assert whole.dtype == torch.float32
    for i in range(3):
        torch.testing.assert_close(teacher(seen.select(torch.tensor([i])))[0], whole[i], rtol=1e-4, atol=1e-5)


def test_the_target_is_made_once_a_step_and_without_gradient(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = prediction()
    calls = []
    original = Prediction.once

    def counting(self: Prediction, key: object, build: Callable[[], Tensor]) -> Tensor:
        return original(self, key, lambda: calls.append(key) or build())  # type: ignore[arg-type,func-returns-value]

    monkeypatch.setattr(Prediction, "once", counting)
    first, second = teacher(seen), teacher(seen)
    assert torch.equal(first, second)
    assert len(calls) == 1
    assert all(not made.requires_grad for made in seen._made.values())


def test_frozen_networks_are_no_part_of_what_is_trained_or_saved(teacher: Teacher) -> None:
    assert not any(p.requires_grad for p in teacher.network.parameters())
    assert not teacher.network.training
    expected = {f"projector.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    assert set(teacher.state_dict()) == (expected if isinstance(teacher, REPA) else set())
    teacher.train()
    assert not teacher.network.training


def test_flop_are_those_of_forward_passes_and_the_gradient_to_pixels(teacher: Teacher) -> None:
    from benchmarks.roofline import vgg16_forward

    found = teacher.flop(SIZE, SIZE)
    if isinstance(teacher, LPIPSLoss):
        # Three passes, less the gradient of the first layer's weights that nobody asks for: it is not computed.
        assert found == pytest.approx(3 * vgg16_forward(32, 32), rel=0.01)
    elif isinstance(teacher, REPA):
        tokens, width = (SIZE // 32) ** 2 + 5, 384
        blocks = 12 * (24 * tokens * width**2 + 4 * tokens**2 * width)
        assert found == pytest.approx(blocks, rel=0.06)  # and the patch embedding
    else:
        tokens, width = 16 + 5, 384
        assert found == pytest.approx(3 * 12 * (24 * tokens * width**2 + 4 * tokens**2 * width), rel=0.06)


def test_bfloat16_networks_take_fp32_pictures() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pdino = PerceptualDINO(name=SMALL_DINOV2, weights="random", size=28)
    assert next(pdino.network.parameters()).dtype == torch.bfloat16
    assert pdino(prediction()).dtype == torch.float32


# --- weights ---------------------------------------------------------------------------------------------------------


def test_random_weights_warn_every_time() -> None:
    for _ in range(2):
        with pytest.warns(UserWarning, match="RANDOM weights, as asked"):
            PerceptualDINO(name=SMALL_DINOV2, weights="random", size=28)
        with pytest.warns(UserWarning, match="LPIPS's vgg has RANDOM weights"):
            LPIPSLoss(weights="random")


def timm_state(name: str) -> dict[str, Tensor]:
    import timm

    torch.manual_seed(7)
    return timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True).state_dict()  # type: ignore[no-any-return]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", "folder"])
def test_weights_come_from_a_file_or_folder(tmp_path: Path, suffix: str) -> None:
    state = timm_state(SMALL_DINOV3)
    if suffix == ".pth":
        path = tmp_path / "weights.pth"
        torch.save({"model": state}, path)
    else:
        path = tmp_path / "model.safetensors"
        save_file(state, path)
    given = tmp_path if suffix == "folder" else path
    repa = REPA(HIDDEN, name=SMALL_DINOV3, weights=str(given), dtype=FP32)
    for key, value in repa.network.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_lpips_trunk_comes_from_torchvisions_file(tmp_path: Path) -> None:
    from torchvision.models import vgg16

    torch.manual_seed(3)
    state = vgg16(weights=None, num_classes=2).state_dict()
    torch.save(state, tmp_path / "vgg16.pth")
    lpips = LPIPSLoss(weights=str(tmp_path / "vgg16.pth"), dtype=FP32)
    assert torch.equal(lpips.network.net.slice1[0].weight, state["features.0.weight"])
    assert torch.equal(lpips.network.net.slice5[-2].weight, state["features.28.weight"])


def test_missing_wrong_and_partial_weights_are_sentences(tmp_path: Path) -> None:
    def message(weights: object, name: str = SMALL_DINOV3) -> str:
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            REPA(HIDDEN, name=name, weights=str(weights))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "there is no file" in message(tmp_path / "none.pth")
    assert "model.safetensors of the hub model timm/vit_small_patch16_dinov3" in message(tmp_path)
    state = timm_state(SMALL_DINOV3)
    gone, extra = "blocks.3.mlp.fc1.weight", "blocks.99.norm.weight"
    partial = {key: value for key, value in state.items() if key != gone} | {extra: torch.zeros(2)}
    partial["norm.weight"] = torch.zeros(5)
    save_file(partial, tmp_path / "partial.safetensors")
    found = message(tmp_path / "partial.safetensors")
    for what in (f"missing: {gone}", f"not of this network: {extra}", "of another shape: norm.weight"):
        assert what in found
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    assert "is no readable weight file" in message(tmp_path / "broken.safetensors")
    torch.save([1, 2], tmp_path / "list.pth")
    assert "holds no state dict" in message(tmp_path / "list.pth")
    assert "timm has no model 'vit_nothing'" in message("random", "vit_nothing")
    save_file({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "vgg.safetensors")
    with pytest.raises(ValueError, match=r"does not hold the weights of LPIPS's vgg: missing: slice1.0.bias"):
        LPIPSLoss(weights=str(tmp_path / "vgg.safetensors"))
    with pytest.raises(ValueError, match="must be vgg, alex or squeeze"):
        LPIPSLoss(network="resnet")
    with pytest.raises(ValueError, match="size 60 must be a multiple of the patch 14"):
        PerceptualDINO(name=SMALL_DINOV2, weights="random", size=60)
    with pytest.raises(ValueError, match='pdino.order must be "resize-first" or "resize-last", got \'first\''):
        PerceptualDINO(name=SMALL_DINOV2, weights="random", size=56, order="first")


def test_a_malicious_pickle_is_refused(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (open, (str(tmp_path / "harm"), "w")[:1])

    torch.save({"model": Harm()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="is no readable weight file"):
        REPA(HIDDEN, name=SMALL_DINOV3, weights=str(tmp_path / "bad.pth"))
    assert not (tmp_path / "harm").exists()


def test_weights_that_cannot_be_downloaded_are_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to the hub\nand a long story")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match="could not be had from timm's hub: no route to the hub; give a file"):
        REPA(HIDDEN, name=SMALL_DINOV3)


@pytest.mark.parametrize("error", [OSError("no route"), RuntimeError('invalid hash value (expected "397923af")')])
def test_a_trunk_that_cannot_be_downloaded_whole_is_a_sentence(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lpips

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(lpips, "LPIPS", fail)
    with pytest.raises(ValueError, match="trunk 'vgg' could not be downloaded: .*; give the file of torchvision's"):
        LPIPSLoss()
