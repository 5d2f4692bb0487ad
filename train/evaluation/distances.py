"""How far drawn pictures are from real ones: FID, CMMD and DINO-MMD (a run's `evaluation` section).

FID is torchmetrics' formula over torch-fidelity's Inception. CMMD and DINO-MMD are one formula, `mmd`, over unit
embeddings of CLIP and of DINOv2. There are two protocols (`evaluation.protocol`), and a figure is named after its own:

|          | standard: fid, cmmd, dino_mmd                | prx: prx_fid, prx_cmmd, prx_dino_mmd           |
|----------|----------------------------------------------|------------------------------------------------|
| FID      | of the pictures                              | of `-picture mod 256`, see `WrappedFID`        |
| MMD      | unbiased                                     | biased: pairs of a picture with itself count   |
| CLIP     | short edge to 336 px, centre crop            | the same                                       |
| DINOv2   | without registers, 224 px, antialiased       | with registers, 518 px, bicubic, not antialiased |

"prx" is what PRX's code computes, for figures to hold against its own; "standard" is what to compare models by.
"""

import io
import sys
import urllib.error
from contextlib import redirect_stdout
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prx_model.teacher_weights import fill, load_timm
from train.errors import UserError
from train.recipes import Evaluation

SIGMA, SCALE = 10.0, 1_000.0
"""The kernel's width, and what the distance is multiplied by (https://arxiv.org/abs/2401.09603, section 4)."""
DINO_SIZE = 224
"""Pixels a side of DINOv2's input, as in FD-DINOv2 (https://arxiv.org/abs/2306.04675)."""
PRX_DINO_SIZE = 518
"""The same in PRX's code: the size that DINOv2 was trained at last."""
DINO_NETWORKS = {"standard": "vit_large_patch14_dinov2", "prx": "vit_large_patch14_reg4_dinov2"}
_ROWS = 1_024


def mmd(x: Tensor, y: Tensor, *, sigma: float = SIGMA, scale: float = SCALE, biased: bool = False) -> Tensor:
    """Squared maximum mean discrepancy of two sets of vectors, times `scale`; a 0-dim float64 tensor.

    The unbiased estimator of the CMMD paper: with k(a, b) = exp(-|a - b|²/(2·sigma²)),
    `mean_{i≠j} k(x_i, x_j) + mean_{i≠j} k(y_i, y_j) - 2·mean k(x_i, y_j)`. It may fall below zero where the sets are
    alike. Leaving i = j in, as its authors' code does, adds about (1 - mean k)/count of each set, times `scale`.

    Args:
        x: (m, width), y: (n, width); any floating dtype, sums are formed in float64.
        biased: leave i = j in.

    Raises:
        ValueError: fewer than two vectors in a set, or two widths.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(
            f"mmd takes two sets of at least two vectors of one width, got shapes {tuple(x.shape)} and {tuple(y.shape)}"
        )
    x, y = x.double(), y.double()

    def total(a: Tensor, b: Tensor) -> Tensor:
        """Sum of k over all pairs, some rows at a time; squared lengths and one product, clamped against rounding."""
        sums = []
        for rows in a.split(_ROWS):
            square = rows.square().sum(1)[:, None] + b.square().sum(1)[None] - 2 * rows @ b.T
            sums.append(torch.exp(square.clamp(min=0) / (-2 * sigma**2)).sum())
        return torch.stack(sums).sum()

    m, n = len(x), len(y)
    if biased:
        within = total(x, x) / m**2 + total(y, y) / n**2
    else:
        within = (total(x, x) - m) / (m * (m - 1)) + (total(y, y) - n) / (n * (n - 1))
    return scale * (within - 2 * total(x, y) / (m * n))


class _Distance(Protocol):
    """Takes uint8 pictures (batch, 3, H, W), real or drawn, and compares all it took."""

    def update(self, images: Tensor, real: bool) -> None: ...

    def compute(self) -> Tensor: ...

    def reset(self) -> None:
        """Forget the drawn pictures; the real ones stay."""


class Distances:
    """The distances that a recipe asks for; real pictures go through the networks once a run.

    Raises:
        UserError: networks or weights that are not there or do not fit.
    """

    def __init__(self, settings: Evaluation, device: torch.device) -> None:
        self.device, self.has_real = device, False
        self.metrics: dict[str, _Distance] = {}
        prx = settings.protocol == "prx"
        name = "prx_{}" if prx else "{}"
        try:
            if settings.fid:
                metric = fid(settings.inception_weights, device)
                self.metrics[name.format("fid")] = WrappedFID(metric) if prx else metric
            if settings.cmmd:
                clip = Embedder(load_timm(settings.clip_network, settings.clip_weights, with_head=True), crop=True)
                self.metrics[name.format("cmmd")] = MMD(clip.to(device), biased=prx)
            if settings.dino_mmd:
                network = load_timm(settings.dino_network or DINO_NETWORKS[settings.protocol], settings.dino_weights)
                dino = Embedder(network, PRX_DINO_SIZE if prx else DINO_SIZE, antialias=not prx)
                self.metrics[name.format("dino_mmd")] = MMD(dino.to(device), biased=prx)
        except ValueError as error:
            raise UserError(str(error)) from None

    def add(self, images: Tensor, *, real: bool) -> None:
        """Take in (batch, 3, H, W) uint8 pictures; in fp32, whatever the run's precision."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            for metric in self.metrics.values():
                metric.update(images.to(self.device), real=real)

    def compute(self) -> dict[str, float]:
        """The distances, by name; then the drawn pictures are forgotten."""
        found = {name: float(metric.compute()) for name, metric in self.metrics.items()}
        for metric in self.metrics.values():
            metric.reset()
        return found


class MMD:
    """`mmd` of the embeddings of real and drawn pictures."""

    def __init__(self, embed: nn.Module, *, biased: bool = False) -> None:
        self.embed, self.biased = embed, biased
        self.real: list[Tensor] = []
        self.drawn: list[Tensor] = []

    def update(self, images: Tensor, real: bool) -> None:
        (self.real if real else self.drawn).append(self.embed(images))

    def compute(self) -> Tensor:
        return mmd(torch.cat(self.drawn), torch.cat(self.real), biased=self.biased)

    def reset(self) -> None:
        self.drawn.clear()


class Embedder(nn.Module):
    """Unit vectors of pictures by a timm vision transformer, frozen and in fp32.

    Args:
        network: as `load_timm` gives it.
        size: side of its input in pixels; that of its configuration unless given.
        crop: bring the short edge to `size` and take the centre, as CLIP's own preparation does; else the whole
            picture is squeezed to a square.
        antialias: as Pillow does, values then clamped to their range; else plain bicubic, and not clamped.
    """

    def __init__(
        self, network: nn.Module, size: int | None = None, *, crop: bool = False, antialias: bool = True
    ) -> None:
        super().__init__()
        config: Any = network.pretrained_cfg
        self.network = network.float().eval().requires_grad_(False)
        self.size: int = size or config["input_size"][-1]
        self.crop, self.antialias = crop, antialias
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(config[name])[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 3, H, W) uint8 to (batch, width): resized (bicubic), then normalised."""
        height, width = images.shape[2:]
        short = min(height, width) if self.crop else 0
        high, wide = (self.size * side // short if self.crop else self.size for side in (height, width))
        pictures = F.interpolate(images.float() / 255, size=(high, wide), mode="bicubic", antialias=self.antialias)
        top, left = (high - self.size) // 2, (wide - self.size) // 2
        pictures = pictures[:, :, top : top + self.size, left : left + self.size]
        if self.antialias:
            pictures = pictures.clamp(0, 1)
        out: Tensor = self.network((pictures - self.get_buffer("mean")) / self.get_buffer("std"))
        return F.normalize(out, dim=1)


class WrappedFID:
    """FID as PRX's code computes it: uint8 pictures are multiplied by 255 once more, and wrap at 256.

    It hands uint8 to torchmetrics with `normalize=True`, which is meant for floats in [0, 1]: 0 stays 0, 1 becomes 255,
    2 becomes 254. Real and drawn pictures go the same way, so its figures have no relation to those of others.
    """

    def __init__(self, metric: _Distance) -> None:
        self.metric = metric

    def update(self, images: Tensor, real: bool) -> None:
        self.metric.update(images * 255, real=real)

    def compute(self) -> Tensor:
        return self.metric.compute()

    def reset(self) -> None:
        self.metric.reset()


def fid(weights: str, device: torch.device) -> Any:
    """torchmetrics' Frechet Inception distance over torch-fidelity's Inception; real pictures outlive a reset.

    Few pictures bias it upwards: compare figures of one number of pictures only.

    Args:
        weights: "" downloads torch-fidelity's; a path to that file; "random" takes none, and warns.

    Raises:
        ValueError: packages or weights that are not there, or weights that do not fit.
    """
    try:
        import torch_fidelity  # noqa: F401
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise ValueError(
            f"--evaluation.fid needs the packages torchmetrics and torch-fidelity (the extra 'train'): {error}"
        ) from None
    # One rank measures alone: a sum over ranks would wait for the others for ever.
    metric = FrechetInceptionDistance(_inception(weights), reset_real_features=False, sync_on_compute=False)
    return metric.to(device)


def _inception(weights: str) -> nn.Module:
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    class Inception(fidelity.FeatureExtractorInceptionV3):  # type: ignore[misc]
        """Gives the 2,048 pooled features, without the tuple they come in; an empty state loads nothing."""

        num_features = 2048

        def load_state_dict(self, state: dict[str, Tensor], *arguments: Any, **settings: Any) -> Any:
            return super().load_state_dict(state, *arguments, **settings) if state else None

        def forward(self, images: Tensor) -> Tensor:
            (features,) = super().forward(images)
            return features

    # Its own loading would run whatever pickle the file holds: it is given an empty one, and the weights come after.
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    network: nn.Module = Inception("inception-v3-compat", ["2048"], nothing)
    if weights:
        fill(network, "FID's Inception", weights, f"torch-fidelity's {fidelity.URL_INCEPTION_V3.rsplit('/', 1)[-1]}")
        return network
    try:
        with redirect_stdout(sys.stderr):
            state = torch.hub.load_state_dict_from_url(
                fidelity.URL_INCEPTION_V3, map_location="cpu", progress=False, check_hash=True, weights_only=True
            )
        network.load_state_dict(state)
    except (OSError, urllib.error.URLError, RuntimeError) as error:
        raise ValueError(
            f"the weights of FID's Inception could not be downloaded from {fidelity.URL_INCEPTION_V3}: {error}; "
            "give the file with --evaluation.inception-weights"
        ) from error
    return network
