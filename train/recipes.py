"""Presets: functions that return a frozen dataclass, a section for every ingredient of the recipe.

No torch here, so that `--help` answers at once. The `prx-*` presets are docs/recipe.md field by field.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from prx_model.config import PRXConfig, Routing, Sampling, prx_1_2b, prx_small, prx_tiny
from prx_model.ranges import Range
from train.data.settings import Data

MOST = 10**9
"""Steps and the like."""
LARGEST = 3.4e38
"""Of float32, in which optimizers compute."""
SHARE = Range(0, 1)
RATE = Range(0, LARGEST)


@dataclass(frozen=True)
class Text:
    """The text tower."""

    kind: Literal["bytes", "t5gemma"] = "t5gemma"
    name: str = "google/t5gemma-2b-2b-ul2"
    """Hub name or folder (t5gemma)."""
    revision: str = ""
    """Hub revision (t5gemma); the newest unless given."""
    max_tokens: Annotated[int, Range(1, 65_536)] = 256
    clean: bool = True
    """Captions and prompts are cleaned as diffusers' PRX pixel pipeline does (`prx_model.clean_caption`)."""
    cache: str = ""
    """Folder of embeddings written by train/precompute_text.py (t5gemma); the encoder is not loaded then."""
    storage: Literal["bf16", "fp8", "int8"] = "bf16"
    """How the cache holds them; fp8 and int8 with a scale a token."""
    depth: Annotated[int, Range(0, 1_024)] = 1
    """Blocks of the byte tower."""
    num_heads: Annotated[int, Range(1, 1_024)] = 8
    """Heads of the byte tower."""


@dataclass(frozen=True)
class Flow:
    """Flow matching with x-prediction (docs/recipe.md, "Objective")."""

    shift: Annotated[float, Range(0, 1_000, above=True)] = 3.0
    uniform_fraction: Annotated[float, SHARE] = 0.1
    t_floor: Annotated[float, Range(0, 1, below=True)] = 1e-3
    """Smallest t in training."""
    t_min: Annotated[float, Range(0, 1, above=True, below=True)] = 0.05
    """Lower clamp of t in the loss."""
    noise_scale: Annotated[float, Range(0, 1_000, above=True)] = 1.0
    caption_drop: Annotated[float, SHARE] = 0.1


@dataclass(frozen=True)
class REPA:
    """Alignment of inner features with DINOv3's (https://arxiv.org/abs/2410.06940)."""

    enabled: bool = False
    weight: Annotated[float, RATE] = 0.5
    layer: Annotated[int, Range(0, 1_023)] = 7
    """0-based block behind which features are taken."""
    teacher: str = "vit_large_patch16_dinov3"
    """timm's name of DINOv3 ViT-L/16."""
    weights: str = ""
    """A file or folder with the network's weights; timm's hub unless given; "random" for none."""
    projector_layers: Annotated[int, Range(1, 64)] = 3


@dataclass(frozen=True)
class LPIPS:
    """Perceptual loss on whole pictures at half size (https://arxiv.org/abs/1801.03924)."""

    enabled: bool = False
    weight: Annotated[float, RATE] = 0.1
    network: Literal["vgg", "alex", "squeeze"] = "vgg"
    """Trunk; pictures go through it at half size."""
    weights: str = ""
    """A file with the weights of torchvision's trunk; the hub's unless given; "random" for none."""
    t_max: Annotated[float, SHARE] = 1.0
    """Only samples with t below this go through it; 1 is all."""
    t_mean: Literal["below", "all"] = "all"
    """below: the mean over a rank's samples below t_max, as in PRX's code; all: the others count as 0, so that the mean
    over all ranks depends on no rank's share of them."""


@dataclass(frozen=True)
class PDINO:
    """Cosine distance of DINOv2 patch features of prediction and picture."""

    enabled: bool = False
    weight: Annotated[float, RATE] = 0.01
    teacher: str = "vit_base_patch14_reg4_dinov2"
    """timm's name of DINOv2 ViT-B/14 with registers."""
    weights: str = ""
    """A file or folder with the network's weights; timm's hub unless given; "random" for none."""
    t_max: Annotated[float, SHARE] = 1.0
    """Only samples with t below this go through it; 1 is all."""
    t_mean: Literal["below", "all"] = "all"
    """below: the mean over a rank's samples below t_max, as in PRX's code; all: the others count as 0, so that the mean
    over all ranks depends on no rank's share of them."""
    size: Annotated[int, Range(1, 4_096)] = 224
    """Pixels a side of the teacher's input."""
    order: Literal["resize-first", "resize-last"] = "resize-first"
    """resize-first: resized, clamped, normalised, as PRX's code does; resize-last: clamped and normalised before."""


@dataclass(frozen=True)
class Muon:
    """Muon for the 2-D weights inside `blocks` (https://kellerjordan.github.io/posts/muon/)."""

    enabled: bool = True
    lr: Annotated[float, RATE] = 1e-4
    momentum: Annotated[float, Range(0, 1, below=True)] = 0.95
    nesterov: bool = True
    ns_steps: Annotated[int, Range(1, 100)] = 5
    ns_coefficients: Annotated[tuple[float, float, float], Range(-1_000, 1_000)] = (3.4445, -4.7750, 2.0315)
    ns_preconditioner: Literal["aol"] | None = None
    """aol: rows are scaled before the first step (Turbo-Muon, https://arxiv.org/abs/2512.04632, which then takes 4)."""
    weight_decay: Annotated[float, RATE] = 0.0


@dataclass(frozen=True)
class Adam:
    """AdamW for every other parameter, and for all of them without Muon."""

    lr: Annotated[float, RATE] = 1e-4
    betas: Annotated[tuple[float, float], Range(0, 1, below=True)] = (0.9, 0.95)
    eps: Annotated[float, SHARE] = 1e-8
    weight_decay: Annotated[float, RATE] = 0.0


@dataclass(frozen=True)
class Train:
    """Length, batch and the outer loop."""

    steps: Annotated[int, Range(1, MOST)] = 100_000
    batch: Annotated[int, Range(1, 2**24)] = 1024
    """Pictures a step, over all ranks."""
    warmup: Annotated[int, Range(0, MOST)] = 1_000
    """Steps of linear warm-up of the learning rates."""
    cooldown: Annotated[int, Range(0, MOST)] = 0
    """Last steps, over which the learning rates fall linearly to zero."""
    clip: Annotated[float, Range(0, LARGEST, above=True)] = 0.2
    """Largest norm of the gradient."""
    seed: Annotated[int, Range(-(2**63), 2**63 - 1)] = 0
    init: Literal["torch", "xavier"] = "xavier"
    """How the denoiser's linear maps start: torch's defaults, as in PRX's code, or Xavier-uniform with zero biases."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of activations; weights are fp32. auto is bf16 on a GPU, fp32 on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    attention: Literal["sdpa", "varlen", "flash"] = "sdpa"
    deterministic: bool = False
    """On a GPU, backward kernels that add in a fixed order only: resumed weights are bitwise the same. A CPU's are."""
    max_skipped: Annotated[int, Range(1, 100_000)] = 10
    """So many steps in a row whose gradient is not finite stop the run; each is skipped, on all ranks."""


@dataclass(frozen=True)
class Parallel:
    """How ranks share the work (FSDP2, HSDP, DDP; train/ranks/parallel.py)."""

    replicate: Annotated[int, Range(0, 2**20)] = 0
    """Copies of the weights; 0 is what `shard` leaves."""
    shard: Annotated[int, Range(0, 2**20)] = 0
    """Ranks that share one copy; 0 is what `replicate` leaves, or the ranks of a node. 1 is DDP."""
    micro_batches: Annotated[int, Range(1, 2**20)] = 1
    """Parts in which a rank's pictures go through the model; gradients are summed and reduced once."""
    checkpointing: bool = False
    """Recompute each block in backward instead of keeping its activations."""
    reshard_after_forward: bool = False
    """Drop gathered weights between forward and backward: one more gather saves 2.4 GB a GPU at 1.2 B parameters."""
    timeout: Annotated[float, Range(0.001, 10_000_000)] = 600.0
    """Seconds without a step (or part of an evaluation) after which a rank prints its stacks and gives up."""


@dataclass(frozen=True)
class EMASettings:
    """Exponential moving average of the weights, used for samples and evaluation."""

    decay: Annotated[float, Range(0, 1, below=True)] = 0.999
    every: Annotated[int, Range(1, MOST)] = 10
    """Steps from one update to the next."""
    phase: Literal["first", "last"] = "first"
    """first: after batches 1, 11, 21, …; last: after batches 10, 20, …, as in PRX's code."""
    ramp: bool = False
    """Move faster at first, so that the averages of a short run are not its initial weights; PRX's code does not."""


@dataclass(frozen=True)
class Evaluation:
    """What is measured and drawn on the way."""

    every: Annotated[int, Range(1, MOST)] = 2_000
    """Steps between evaluations; the end always has one."""
    prompts: Annotated[int, Range(1, 100_000)] = 450
    """Held-out prompts that the oracle scores at the end (shapes, scenes)."""
    images: Annotated[int, Range(0, 10_000_000)] = 512
    """Validation pictures of the held-out loss; shapes and scenes draw them from prompts never trained on."""
    grid: Annotated[int, Range(0, 10_000)] = 16
    """Pictures in a sample grid."""
    raw: Literal["no", "loss", "all"] = "loss"
    """What is measured with the raw weights too: nothing, the held-out loss, or the distances as well."""
    protocol: Literal["prx", "standard"] = "standard"
    """How distances are measured, train/evaluation/distances.py: as PRX's code does ("prx_fid", …), or "fid", …"""
    fid: bool = False
    """Frechet Inception distance of drawn to validation pictures (https://arxiv.org/abs/1706.08500)."""
    cmmd: bool = False
    """MMD of their CLIP embeddings (https://arxiv.org/abs/2401.09603)."""
    dino_mmd: bool = False
    """MMD of their DINOv2 embeddings."""
    samples: Annotated[int, Range(0, 10_000_000)] = 2_048
    """Pictures drawn for the distances, at most as many as there are validation pictures."""
    inception_weights: str = ""
    """torch-fidelity's file of Inception weights; downloaded unless given; "random" for none."""
    clip_network: str = "vit_large_patch14_clip_quickgelu_336.openai"
    """timm's name of CLIP ViT-L/14 at 336 pixels, with the activation it was trained with."""
    clip_weights: str = ""
    """A file or folder with the network's weights; timm's hub unless given; "random" for none."""
    dino_network: str = ""
    """timm's name; DINOv2 ViT-L/14 unless given, with registers where the protocol is prx."""
    dino_weights: str = ""
    """A file or folder with the network's weights; timm's hub unless given; "random" for none."""


@dataclass(frozen=True)
class Checkpoint:
    """Saving and resuming."""

    every: Annotated[int, Range(1, MOST)] = 1_000
    keep: Annotated[int, Range(1, MOST)] = 2
    """Newest complete checkpoints that stay."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise ValueError(f"checkpoint.every and keep must be at least 1, got {self.every} and {self.keep}")


@dataclass(frozen=True)
class Compile:
    """torch.compile, block by block."""

    enabled: Literal["auto", "yes", "no"] = "auto"
    """auto compiles on a GPU only."""


@dataclass(frozen=True)
class Output:
    """Where a run is written."""

    folder: str = "runs"
    name: str = ""
    """The run's folder is <folder>/<name>; the preset's name unless given."""
    dollars_per_hour: Annotated[float, Range(0, 1_000_000)] = 2.0
    """Price of a GPU-hour, for the cost in the metrics."""


@dataclass(frozen=True)
class Profile:
    """Where time and memory go."""

    steps: str = ""
    """first:last, steps of which a trace and a memory snapshot are written; `--profile steps=10:15` for short."""
    nvtx: bool = False
    """Name the parts of a step for Nsight Systems."""


@dataclass(frozen=True)
class Recipe:
    """Everything that defines a run of one stage."""

    preset: str
    data: Data
    model: PRXConfig
    text: Text = field(default_factory=Text)
    flow: Flow = field(default_factory=Flow)
    routing: Routing = field(default_factory=Routing)
    repa: REPA = field(default_factory=REPA)
    lpips: LPIPS = field(default_factory=LPIPS)
    pdino: PDINO = field(default_factory=PDINO)
    muon: Muon = field(default_factory=Muon)
    adam: Adam = field(default_factory=Adam)
    ema: EMASettings = field(default_factory=EMASettings)
    train: Train = field(default_factory=Train)
    parallel: Parallel = field(default_factory=Parallel)
    sampling: Sampling = field(default_factory=Sampling)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    compile: Compile = field(default_factory=Compile)
    output: Output = field(default_factory=Output)
    profile: Profile = field(default_factory=Profile)


@dataclass(frozen=True)
class TwoStages:
    """Two recipes in sequence; what carries over stands in docs/recipe.md, "From stage 1 to stage 2"."""

    preset: str
    stage1: Recipe
    stage2: Recipe


def shapes() -> Recipe:
    """One coloured shape on a coloured background, 32 px: two CPU cores, minutes. Dense: routing cost accuracy.

    Weight decay, and steps at the full rate after shapes have emerged (about step 1,000), are what lets colours and
    shapes combine that never met: seed 2 draws 0.06 of such pictures right with decay 0.1 and 1,700 steps (cool-down
    600), 0.72 with decay 0.3, 1.00 with 1,900 steps and a cool-down of 400; seed 0 0.72 with 1,800 and 0.87 with 1,900.
    """
    return Recipe(
        preset="shapes",
        data=Data(kind="shapes", height=32, width=32),
        model=prx_tiny(),
        text=Text(kind="bytes", max_tokens=64),
        flow=Flow(shift=6.0),
        routing=Routing(enabled=False, start=1, end=2),
        muon=Muon(lr=6e-3, weight_decay=0.3),
        adam=Adam(lr=3e-3, weight_decay=0.3),
        ema=EMASettings(decay=0.995, every=1, ramp=True),
        train=Train(steps=1_880, batch=32, warmup=100, cooldown=400, clip=0.1),
        sampling=Sampling(steps=15, guidance=2.0, shift=3.0),
        evaluation=Evaluation(every=300, prompts=384, images=64, grid=25, raw="no"),
        checkpoint=Checkpoint(every=500),
    )


def scenes() -> Recipe:
    """Two objects, sizes and a relation, 64 px: meant for a GPU."""
    return Recipe(
        preset="scenes",
        data=Data(kind="scenes", height=64, width=64, workers=4),
        model=prx_small(),
        text=Text(kind="bytes", max_tokens=96),
        flow=Flow(shift=2.5),
        routing=Routing(enabled=False, start=1, end=4),
        muon=Muon(lr=5e-3),
        adam=Adam(lr=1e-3),
        ema=EMASettings(decay=0.999, every=1, ramp=True),
        train=Train(steps=20_000, batch=256, warmup=500, cooldown=4_000, clip=0.1),
        sampling=Sampling(steps=28, guidance=2.0, shift=2.5),
        evaluation=Evaluation(every=2_000, prompts=512, grid=25),
        checkpoint=Checkpoint(every=1_000),
    )


def pictograms() -> Recipe:
    """Small real captioned pictures from a parquet folder: 64 px on a CPU, 128 px on a GPU.

    Held-out loss at step 1,000, one run each: 0.551 with time shift 2.5, no weight decay, an average over 500 steps and
    a text tower that looked beyond words; 0.291 with these figures.
    """
    return Recipe(
        preset="pictograms",
        data=Data(
            kind="images",
            height=64,
            width=64,
            image_column="image64",
            style_column="source",
            style_prefixes=("noto-emoji=flat icon of", "fluent-3d=3D render of"),
            workers=1,
        ),
        model=prx_small(),
        text=Text(kind="bytes", max_tokens=64),
        flow=Flow(shift=6.0),
        routing=Routing(enabled=False, start=1, end=4),
        muon=Muon(lr=4e-3, weight_decay=0.1),
        adam=Adam(lr=2e-3, weight_decay=0.1),
        ema=EMASettings(decay=0.995, every=1, ramp=True),
        train=Train(steps=4_000, batch=32, warmup=100, cooldown=1_000, clip=0.1),
        sampling=Sampling(steps=28, guidance=3.0, shift=3.0),
        evaluation=Evaluation(every=1_000, images=218, grid=16),
        checkpoint=Checkpoint(every=500),
    )


def prx_512() -> Recipe:
    """Stage 1 of PRX Part 3: 512 px, 100,000 steps of 1,024 pictures, REPA on."""
    return Recipe(
        preset="prx-512",
        data=Data(kind="images", height=512, width=512, buckets=True, fit="stretch", workers=8),
        model=prx_1_2b(),
        text=Text(),
        flow=Flow(),
        routing=Routing(enabled=True, start=1, end=14, selection_ratio=0.5),
        repa=REPA(enabled=True),
        lpips=LPIPS(enabled=True, t_mean="below"),
        pdino=PDINO(enabled=True, t_mean="below"),
        muon=Muon(),
        adam=Adam(),
        ema=EMASettings(decay=0.999, every=10, phase="last"),
        train=Train(steps=100_000, batch=1024, warmup=1_000, clip=0.2, init="torch"),
        sampling=Sampling(steps=50, guidance=3.5, guidance_kind="self", routed_tokens="once", time_grid="linear"),
        evaluation=Evaluation(protocol="prx"),
    )


def prx_1024() -> Recipe:
    """Stage 2 of PRX Part 3: 1024 px, 20,000 steps of 512 pictures, REPA off, no second warm-up."""
    first = prx_512()
    return replace(
        first,
        preset="prx-1024",
        data=replace(first.data, height=1024, width=1024),
        repa=replace(first.repa, enabled=False),
        train=replace(first.train, steps=20_000, batch=512, warmup=0),
    )


def prx_24h() -> TwoStages:
    """The whole run of PRX Part 3: prx-512, then prx-1024."""
    first, second = prx_512(), prx_1024()
    return TwoStages(
        preset="prx-24h",
        stage1=replace(first, output=replace(first.output, name="prx-24h/stage-1")),
        stage2=replace(second, output=replace(second.output, name="prx-24h/stage-2")),
    )


PRESETS: dict[str, Callable[[], Recipe | TwoStages]] = {
    "shapes": shapes,
    "scenes": scenes,
    "pictograms": pictograms,
    "prx-512": prx_512,
    "prx-1024": prx_1024,
    "prx-24h": prx_24h,
}


def for_device(recipe: Recipe, device: str) -> Recipe:
    """The recipe as this kind of device runs it: `pictograms` reads 128 px on a GPU, unless its size was set."""
    preset = pictograms()
    same_size = (recipe.data.height, recipe.data.width, recipe.data.image_column) == (
        preset.data.height,
        preset.data.width,
        preset.data.image_column,
    )
    if recipe.preset == "pictograms" and device == "cuda" and same_size:
        return replace(recipe, data=replace(recipe.data, height=128, width=128, image_column="image"))
    return recipe
