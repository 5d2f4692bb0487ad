"""Distances of pictures: the formulas on known cases, weights that are not there, and a run that measures itself."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.train.learner.test_teaching import tiny
from train.data.loader import open_validation
from train.errors import UserError
from train.evaluation import evaluate
from train.evaluation.distances import DINO_NETWORKS, MMD, Distances, Embedder, WrappedFID, fid, mmd
from train.loop import Trainer
from train.ranks import parallel
from train.recipes import Evaluation, Recipe, scenes, shapes

CPU = torch.device("cpu")
CLIP_SMALL, DINO_SMALL = "vit_xsmall_patch16_clip_224", "vit_small_patch14_reg4_dinov2"
SMALL = Evaluation(
    every=100, prompts=4, images=6, grid=2, samples=6, cmmd=True, dino_mmd=True, clip_network=CLIP_SMALL,
    clip_weights="random", dino_network=DINO_SMALL, dino_weights="random",
)  # fmt: skip


# --- the formula -----------------------------------------------------------------------------------------------------


def test_mmd_of_two_points_each_is_the_formula_by_hand() -> None:
    x, y = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 0.0], [0.0, 2.0]])

    def k(square: float) -> float:
        return math.exp(-square / 200)

    # One pair within each set (25 and 4 apart, squared); across: 0, 4, 25 and 9 + 4.
    expected = 1000 * (k(25) + k(4) - 2 * (k(0) + k(4) + k(25) + k(13)) / 4)
    assert mmd(x, y).item() == pytest.approx(expected, rel=1e-12)


def test_mmd_is_that_of_all_pairs_and_does_not_depend_on_how_rows_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(7, 5, generator=generator), torch.randn(4, 5, generator=generator) + 1

    def mean(a: torch.Tensor, b: torch.Tensor, same: bool) -> float:
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (same and i == j)]
        return sum(math.exp(-float((a[i] - b[j]).double().square().sum()) / 8) for i, j in pairs) / len(pairs)

    expected = 10 * (mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False))
    assert mmd(x, y, sigma=2, scale=10).item() == pytest.approx(expected, rel=1e-7)
    monkeypatch.setattr("train.evaluation.distances._ROWS", 3)
    assert mmd(x, y, sigma=2, scale=10).item() == pytest.approx(expected, rel=1e-7)


def test_mmd_has_no_bias_where_the_sets_are_alike() -> None:
    """Mean over 200 draws of two alike sets: within three standard errors of zero, and draws of both signs."""
    generator = torch.Generator().manual_seed(1)
    draws = torch.stack([mmd(*torch.randn(2, 8, 3, generator=generator), sigma=1.0, scale=1.0) for _ in range(200)])
    assert abs(draws.mean()) < 3 * draws.std() / math.sqrt(200)
    assert draws.min() < 0 < draws.max()


def test_the_biased_mmd_is_the_mean_over_all_pairs_themselves_included() -> None:
    """As CMMD's and PRX's code: `scale·(mean k(x, x) + mean k(y, y) - 2·mean k(x, y))`, written with plain loops."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(7, 5, generator=generator), torch.randn(4, 5, generator=generator) + 1

    def mean(a: torch.Tensor, b: torch.Tensor) -> float:
        return sum(math.exp(-float((p - q).double().square().sum()) / 200) for p in a for q in b) / (len(a) * len(b))

    expected = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert mmd(x, y, biased=True).item() == pytest.approx(expected, rel=1e-6)
    assert mmd(x, y, biased=True) > mmd(x, y)


@pytest.mark.parametrize("shapes_of", [((1, 3), (4, 3)), ((4, 3), (4, 2)), ((4,), (4,))])
def test_sets_that_cannot_be_compared_are_refused(shapes_of: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="mmd takes two sets of at least two vectors of one width, got shapes"):
        mmd(*(torch.zeros(shape) for shape in shapes_of))


# --- networks --------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Gives the corners of what it is shown."""

    pretrained_cfg = {"input_size": (3, 4, 4), "mean": (0.5, 0.25, 0.0), "std": (0.5, 0.25, 1.0)}  # noqa: RUF012

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen = images
        return images[:, :, 0, 0] * 3


def test_pictures_are_resized_as_pillow_does_then_normalised_and_embeddings_have_length_one() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    embed = Embedder(Network())
    out = embed(torch.from_numpy(picture).permute(2, 0, 1)[None])
    pillow = np.asarray(Image.fromarray(picture).resize((4, 4), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    expected = (pillow - np.array([0.5, 0.25, 0.0])) / np.array([0.5, 0.25, 1.0])
    # Pillow rounds to 1/255 after each of its two passes; the smallest deviation here is 0.25.
    assert np.abs(embed.network.seen[0].permute(1, 2, 0).numpy() - expected).max() < 1.5 / 255 / 0.25
    assert out.norm().item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize(("height", "width"), [(12, 16), (17, 11), (8, 8)])
def test_clips_pictures_have_their_short_edge_resized_and_their_centre_cut(height: int, width: int) -> None:
    """CLIP's own preparation, written with Pillow."""
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    network = Network()
    Embedder(network, crop=True)(torch.from_numpy(picture).permute(2, 0, 1)[None])
    wide, high = (int(4 * side / min(height, width)) for side in (width, height))
    resized = np.asarray(Image.fromarray(picture).resize((wide, high), Image.Resampling.BICUBIC), dtype=np.float32)
    top, left = (high - 4) // 2, (wide - 4) // 2
    expected = (resized[top : top + 4, left : left + 4] / 255 - np.array([0.5, 0.25, 0.0])) / np.array([0.5, 0.25, 1.0])
    assert np.abs(network.seen[0].permute(1, 2, 0).numpy() - expected).max() < 1.5 / 255 / 0.25


def test_prx_s_dinov2_sees_plain_bicubic_pictures_that_are_not_clamped() -> None:
    """Keys' cubic (a = -0.75) at four points a side, written out: pixel centres `(i + 1/2)·scale - 1/2`, edges kept."""
    picture = np.random.default_rng(0).integers(0, 2, (12, 16, 3)).astype(np.uint8) * 255

    def weights(distance: float) -> float:
        d, a = abs(distance), -0.75
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0

    def rows(size: int) -> np.ndarray:
        matrix = np.zeros((4, size))
        for i in range(4):
            centre = (i + 0.5) * size / 4 - 0.5
            for place in range(math.floor(centre) - 1, math.floor(centre) + 3):
                matrix[i, min(max(place, 0), size - 1)] += weights(centre - place)
        return matrix

    network = Network()
    Embedder(network, antialias=False)(torch.from_numpy(picture).permute(2, 0, 1)[None])
    square = np.einsum("ih,hwc,jw->ijc", rows(12), picture / 255, rows(16))
    assert square.min() < -0.01
    expected = (square - np.array([0.5, 0.25, 0.0])) / np.array([0.5, 0.25, 1.0])
    assert np.abs(network.seen[0].permute(1, 2, 0).numpy() - expected).max() < 1e-5


def test_each_protocol_has_its_networks_and_its_names() -> None:
    with pytest.warns(UserWarning, match="RANDOM weights, as asked"):
        standard, prx = (Distances(replace(SMALL, protocol=name), CPU).metrics for name in ("standard", "prx"))
    assert set(standard) == {"cmmd", "dino_mmd"}
    assert set(prx) == {"prx_cmmd", "prx_dino_mmd"}
    for metrics, name, size, crop, antialias, biased in (
        (standard, "cmmd", 224, True, True, False),
        (standard, "dino_mmd", 224, False, True, False),
        (prx, "prx_cmmd", 224, True, True, True),
        (prx, "prx_dino_mmd", 518, False, False, True),
    ):
        metric = metrics[name]
        assert isinstance(metric, MMD)
        embed = metric.embed
        assert isinstance(embed, Embedder)
        assert (embed.size, embed.crop, embed.antialias, metric.biased) == (size, crop, antialias, biased)
    assert DINO_NETWORKS == {"standard": "vit_large_patch14_dinov2", "prx": "vit_large_patch14_reg4_dinov2"}


def test_prx_s_fid_sees_what_torchmetrics_makes_of_uint8_by_normalize() -> None:
    """`(pictures * 255).byte()`, its own words, on every level there is."""

    class Seen:
        def update(self, images: torch.Tensor, real: bool) -> None:
            self.images, self.real = images, real

        def compute(self) -> torch.Tensor:
            return torch.tensor(3.0)

        def reset(self) -> None:
            self.real = False

    levels = torch.arange(256).to(torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    seen = Seen()
    metric = WrappedFID(seen)
    metric.update(levels, real=True)
    assert seen.real
    assert torch.equal(seen.images, (levels * 255).byte())
    assert seen.images[0, 0].flatten()[:4].tolist() == [0, 255, 254, 253]
    assert float(metric.compute()) == 3.0
    metric.reset()
    assert not seen.real


def test_an_mmd_keeps_the_real_pictures_over_a_reset() -> None:
    metric = MMD(Embedder(Network()))
    generator = torch.Generator().manual_seed(0)
    real, near, far = (torch.randint(low, high, (5, 3, 8, 8), generator=generator, dtype=torch.uint8)
                       for low, high in ((0, 128), (0, 128), (128, 256)))  # fmt: skip
    metric.update(real, real=True)
    found = []
    for drawn in (near, far):
        metric.update(drawn, real=False)
        found.append(metric.compute().item())
        metric.reset()
    assert found[0] < found[1]
    assert found[0] == mmd(metric.embed(near), metric.embed(real)).item()


def test_clip_keeps_its_map_into_the_shared_space() -> None:
    with pytest.warns(UserWarning, match=f"{CLIP_SMALL} has RANDOM weights, as asked"):
        metric = Distances(replace(SMALL, dino_mmd=False), CPU).metrics["cmmd"]
    assert isinstance(metric, MMD)
    embed: Embedder = metric.embed  # type: ignore[assignment]
    assert embed.network.head.out_features == 512  # type: ignore[union-attr]
    assert embed.size == 224
    assert not any(p.requires_grad for p in embed.parameters())


def test_missing_weights_are_one_sentence(tmp_path: Path) -> None:
    for settings, message in (
        (replace(SMALL, clip_weights=str(tmp_path / "no.pth")), f"a checkpoint of {CLIP_SMALL}"),
        (replace(SMALL, cmmd=False, dino_weights=str(tmp_path)), f"a checkpoint of {DINO_SMALL}"),
        (replace(SMALL, clip_network="vit_of_nobody"), "timm has no model 'vit_of_nobody'"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            Distances(settings, CPU)
        assert "\n" not in str(caught.value)


# --- FID -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inception() -> object:
    pytest.importorskip("torch_fidelity", reason="needs torch-fidelity, which the extra 'train' installs")
    pytest.importorskip("torchmetrics", reason="needs torchmetrics, which the extra 'train' installs")
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="FID's Inception has RANDOM weights, as asked"):
        return fid("random", CPU)


def test_fid_is_the_formula_over_inceptions_features(inception: object) -> None:
    """Over the first 64 of them: the eigenvalues of 2,048 take ten seconds."""
    metric = inception
    generator = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (6, 3, 24, 24), generator=generator, dtype=torch.uint8)
    drawn = torch.randint(0, 128, (5, 3, 24, 24), generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        metric.update(real, real=True)  # type: ignore[attr-defined]
        metric.update(drawn, real=False)  # type: ignore[attr-defined]
        a, b = (metric.inception(x).double().numpy() for x in (real, drawn))  # type: ignore[attr-defined]
    assert a.shape == (6, 2048)
    for kind, features in (("real", a), ("fake", b)):
        total, products = (getattr(metric, f"{kind}_features_{name}sum") for name in ("", "cov_"))
        assert np.allclose(total, features.sum(0))
        assert np.allclose(products, features.T @ features)
        setattr(metric, f"{kind}_features_sum", total[:64])
        setattr(metric, f"{kind}_features_cov_sum", products[:64, :64])
    a, b = a[:, :64], b[:, :64]
    # tr sqrt(Ca Cb) is the sum of singular values of A·Bᵀ, where C = MᵀM.
    centred = [(m - m.mean(0)) / math.sqrt(len(m) - 1) for m in (a, b)]
    root = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    expected = np.square(a.mean(0) - b.mean(0)).sum() + sum(np.square(m).sum() for m in centred) - 2 * root
    found = float(metric.compute())  # type: ignore[attr-defined]
    # 64 eigenvalues, of which 4 are not zero: the others' roots of rounding add up.
    assert found == pytest.approx(expected, rel=1e-3)


def test_inceptions_file_is_loaded_whole_and_runs_no_pickle(inception: object, tmp_path: Path) -> None:
    state = dict(inception.inception.state_dict())  # type: ignore[attr-defined]
    state["fc.bias"] = torch.arange(1008.0)
    torch.save(state, tmp_path / "weights.pth")
    loaded = fid(str(tmp_path / "weights.pth"), CPU)
    assert torch.equal(loaded.inception.fc.bias, state["fc.bias"])
    gone = "Mixed_7c.branch1x1.bn.running_mean"
    state.pop(gone)
    torch.save(state, tmp_path / "partial.pth")
    with pytest.raises(ValueError, match=f"does not hold the weights of FID's Inception: missing: {gone}"):
        fid(str(tmp_path / "partial.pth"), CPU)
    torch.save({"odd": Path("x")}, tmp_path / "pickle.pth")
    with pytest.raises(ValueError, match="is no readable weight file"):
        fid(str(tmp_path / "pickle.pth"), CPU)


def test_inceptions_weights_that_cannot_be_downloaded_are_one_sentence(
    inception: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*arguments: object, **settings: object) -> None:
        assert settings["weights_only"] is True
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(ValueError, match=r"could not be downloaded .*: no route; give the file with --evaluation.inc"):
        fid("", CPU)


# --- in a run --------------------------------------------------------------------------------------------------------


def trainer(recipe: Recipe) -> Trainer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Trainer(recipe, parallel.start(recipe.train))


def test_a_run_logs_losses_and_distances_of_both_kinds_of_weights_and_shows_its_grid(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = tiny(tmp_path, steps=2, evaluation=replace(SMALL, raw="all"))
    run = trainer(recipe)
    outcome = run.run()
    line = json.loads((outcome.folder / "metrics.jsonl").read_text().splitlines()[-1])
    times = [f"loss/32x32/t={t}" for t in (0.1, 0.3, 0.5, 0.7, 0.9)]
    for weights in ("ema", "raw"):
        assert all(math.isfinite(line[f"eval/{weights}/{name}"]) for name in (*times, "cmmd", "dino_mmd"))
        mean = sum(line[f"eval/{weights}/{name}"] for name in times) / 5
        assert line[f"eval/{weights}/loss/32x32"] == pytest.approx(mean)
    assert line["eval/ema/loss/32x32"] != line["eval/raw/loss/32x32"]
    events = EventAccumulator(str(outcome.folder))
    events.Reload()
    assert "eval/ema/cmmd" in events.Tags()["scalars"]
    assert events.Tags()["images"] == ["samples"]
    # The weights left in place are the trained ones: measured again, they give the raw loss.
    assert run.validation is not None
    again = evaluate.held_out_loss(run.learner.modules, run.validation, recipe, run.world)
    assert again["loss/32x32"] == line["eval/raw/loss/32x32"]


@pytest.mark.parametrize(("raw", "expected"), [("no", set()), ("loss", {"loss"})])
def test_raw_weights_are_measured_as_far_as_asked(tmp_path: Path, raw: str, expected: set[str]) -> None:
    settings = replace(SMALL, raw=raw, dino_mmd=False)
    outcome = trainer(tiny(tmp_path, steps=1, evaluation=settings)).run()
    assert {name.split("/")[1] for name in outcome.scores if name.startswith("raw/")} == expected
    assert "ema/cmmd" in outcome.scores


def test_held_out_pictures_are_of_prompts_never_trained_on_and_the_same_for_every_seed() -> None:
    for preset, source in ((shapes(), "shapes"), (scenes(), "scenes")):
        held_out = open_validation(preset.data, preset.model.patch_size)
        assert held_out is not None
        module = __import__(f"train.data.drawn.{source}", fromlist=["split_prompts"])
        allowed = {prompt.caption for prompt in module.split_prompts().combinations}
        assert all(held_out[i].caption in allowed for i in range(20))
        assert len(held_out) == 50_000


def test_distances_without_pictures_to_compare_with_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"need at least 2 pictures, got 50000 in .* and evaluation.samples 1"):
        trainer(tiny(tmp_path, evaluation=replace(SMALL, samples=1)))
