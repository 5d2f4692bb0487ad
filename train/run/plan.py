"""What a run will cost, before anyone pays for it: sizes, memory, operations, hours and dollars (`--dry-run`)."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

import torch

from prx_kernels import newton_schulz_flop
from prx_model.flops import forward_flop, training_flop
from prx_model.text import ByteTower
from prx_model.transformer import PRXTransformer
from train.commandline import DryRun
from train.data.buckets import Size
from train.data.loader import most_captions, open_dataset, open_validation
from train.data.mixture import places
from train.data.readers import ImageDataset
from train.data.text_cache import MEAN_TOKENS, cache_bytes
from train.errors import UserError
from train.learner.build import check, check_ranks, on_paper
from train.learner.optimizers import Named, named_parameters, split
from train.ranks.parallel import mesh_shape
from train.recipes import PRESETS, Recipe, TwoStages
from train.run.hours import Expected, budget, expected, network_of, same_step
from train.shown import settings, tell

_PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "B200": 2250.0, "L40S": 362.0, "4090": 165.0}
"""Dense bf16 rate on the data sheet, TFLOP/s, by a part of the device's name."""

RECIPE_CAPTIONS = 8_700_000
"""flux_generated 1.7 M, FLUX-Reason-6M and midjourney-v6-llava 1 M, one caption each (docs/recipe.md, "Data")."""


def peak_flops(device: torch.device) -> float | None:
    """Data-sheet bf16 FLOP/s of a device, None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate * 1e12 for part, rate in _PEAK_TFLOPS.items() if part in name), None)


def flop_per_image(recipe: Recipe, buckets: Mapping[Size, int] | None = None) -> float:
    """Forward operations of the denoiser for one picture, routing counted: the mean over buckets where they are known.

    Frozen text is packed: `MEAN_TOKENS` a caption are assumed. That of the byte tower counts at its full length.
    """
    frozen = recipe.text.kind == "t5gemma"
    text_tokens = min(MEAN_TOKENS, recipe.text.max_tokens) if frozen else recipe.text.max_tokens
    return _mean(recipe, buckets, lambda tokens: forward_flop(recipe.model, tokens, text_tokens, recipe.routing))


def mean_tokens(recipe: Recipe, buckets: Mapping[Size, int] | None = None) -> float:
    """Image tokens of a picture: the mean over buckets where they are known."""
    return _mean(recipe, buckets, float)


def _mean(recipe: Recipe, buckets: Mapping[Size, int] | None, of_tokens: Callable[[int], float]) -> float:
    """A number that depends on image tokens, over buckets with so many pictures each; of height x width without."""
    sizes = dict(buckets) if buckets else {(recipe.data.height, recipe.data.width): 1}
    return sum(n * of_tokens(recipe.model.tokens(*size)) for size, n in sizes.items() if n) / sum(sizes.values())


@dataclass(frozen=True)
class Projection:
    """What a stage will cost; bytes, seconds and operations as plain numbers."""

    tokens: float
    """Image tokens, the mean over buckets where they are known."""
    state_bytes: float
    """Weights, gradients, optimizer and EMA of all GPUs together, unless each holds all."""
    shards: int
    """GPUs that share one copy of these, by the trainer's own rule (`mesh_shape`), eight GPUs a node."""
    activation_bytes: float
    """Of one GPU, for the largest bucket."""
    checkpoint_bytes: float
    """Of one checkpoint."""
    routed_flop: float
    """Denoiser, a step forward and backward."""
    dense_flop: float
    newton_schulz_flop: float
    expected: Expected
    """Time and money."""


def project(recipe: Recipe, assumed: DryRun, buckets: Mapping[Size, int] | None = None) -> Projection:
    """Project the cost of a stage on `assumed` GPUs.

    Args:
        recipe: of one stage.
        assumed: GPUs, their rate, and what a GPU-hour costs.
        buckets: pictures of each aspect-ratio bucket; all are data.height x data.width without.

    Raises:
        UserError: settings that do not fit one another, or a mesh that does not fit the GPUs.
    """
    check(recipe)
    parameters = named_parameters(_on_paper(recipe))
    muon, _ = split(parameters, recipe)
    batch, length = recipe.train.batch, recipe.text.max_tokens
    tokens = mean_tokens(recipe, buckets)
    most = max((recipe.model.tokens(*size) for size, n in (buckets or {}).items() if n), default=round(tokens))
    routed = batch * _mean(recipe, buckets, lambda n: training_flop(recipe.model, n, length, recipe.routing))
    dense = batch * _mean(recipe, buckets, lambda n: training_flop(recipe.model, n, length))
    state, activations = _memory(recipe, parameters, len(muon) > 0, most, assumed.gpus)
    return Projection(
        tokens=tokens,
        state_bytes=state,
        shards=mesh_shape(recipe.parallel, assumed.gpus, network_of(assumed.gpus).gpus)[1],
        activation_bytes=activations,
        checkpoint_bytes=state - 4.0 * sum(p.numel() for _, p in parameters),  # no gradients
        routed_flop=routed,
        dense_flop=dense,
        newton_schulz_flop=sum(newton_schulz_flop(p.shape[0], p.shape[1], recipe.muon.ns_steps) for _, p in muon),
        expected=expected(recipe, routed, assumed),
    )


def peak_memory(recipe: Recipe, assumed: DryRun, cost: Projection) -> tuple[float, str]:
    """Bytes of one GPU at the peak of a step, and how that is known: counted of the preset as it is, else estimated."""
    usual, counted = PRESETS[recipe.preset](), budget(recipe.preset, assumed.gpus)
    same = same_step(recipe)
    if isinstance(usual, Recipe):
        same = same and replace(recipe.parallel, timeout=1.0) == replace(usual.parallel, timeout=1.0)
    if same and counted.get("pictures") == recipe.train.batch / assumed.gpus:
        return counted[
            "peak GB"
        ] * 1e9, "counted (benchmarks/budgets/); without NCCL's buffers and gaps of the allocator"
    weights = cost.state_bytes - cost.checkpoint_bytes  # float32 gradients, as many numbers
    working = 0.0 if recipe.train.precision == "fp32" else weights / 2
    said = "estimated: states, bf16 weights and activations, without teachers, NCCL's buffers and gaps of the allocator"
    return cost.state_bytes / cost.shards + working + cost.activation_bytes, said


def print_plan(recipe: Recipe | TwoStages, assumed: DryRun) -> None:
    """Print the resolved recipe and what it costs; for two stages, both and their sum.

    Raises:
        UserError: settings that do not fit one another.
    """
    print(json.dumps(settings(asdict(recipe)), indent=2))
    stages = [recipe] if isinstance(recipe, Recipe) else [recipe.stage1, recipe.stage2]
    total = sum(_print_stage(stage, assumed) for stage in stages)
    if len(stages) > 1:
        print(f"\nboth stages: {total:.2f} h, ${total * assumed.gpus * assumed.dollars_per_hour:,.0f}")


def _on_paper(recipe: Recipe) -> dict[str, torch.nn.Module]:
    """The trained modules without memory."""
    with on_paper():
        modules: dict[str, torch.nn.Module] = {"model": PRXTransformer(recipe.model)}
        if recipe.text.kind == "bytes":
            text = recipe.text
            modules["tower"] = ByteTower(recipe.model.context_in_dim, text.depth, text.num_heads, text.max_tokens)
    return modules


def _print_stage(recipe: Recipe, assumed: DryRun) -> float:
    """Print one stage; gives its projected hours."""
    cost = project(recipe, assumed)
    modules = _on_paper(recipe)
    muon, adam = split(named_parameters(modules), recipe)
    size = f"{recipe.data.height}x{recipe.data.width}"
    print(f"\n{recipe.preset}: {size}, {cost.tokens:g} image and {recipe.text.max_tokens} text tokens")
    for name, module in modules.items():
        print(f"  parameters, {name}: {sum(p.numel() for p in module.parameters()):,}")
    print(f"  Muon: {_kinds(muon)}")
    print(f"  AdamW: {_kinds(adam)}")
    print(
        f"  memory: weights, gradients, optimizer and EMA {cost.state_bytes / 2**30:.2f} GiB in all; activations about"
    )
    print(
        f"    {cost.activation_bytes / 2**30:.2f} GiB a GPU at {recipe.train.batch / assumed.gpus:g} pictures "
        "(no checkpointing)"
    )
    print(
        f"  denoiser: {cost.routed_flop / 1e12:.4g} TFLOP a step forward and backward "
        f"({cost.dense_flop / 1e12:.4g} without routing)"
    )
    try:
        check_ranks(recipe, assumed.gpus)
    except UserError as error:
        tell(f"  note: the run would refuse to start on {assumed.gpus} GPUs: {error}")
    print(f"  Newton-Schulz: {cost.newton_schulz_flop / 1e12:.4g} TFLOP a step")
    print(f"  {cost.expected.line()}")
    if recipe.text.kind == "t5gemma":
        print(f"  {text_cache_line(recipe)}")
    return cost.expected.hours


def text_cache_line(recipe: Recipe) -> str:
    """How large the cache of embeddings is, or would be, and what that assumes."""
    captions, source = RECIPE_CAPTIONS, "docs/recipe.md's data; --data.path counts yours"
    if recipe.data.path:
        data = replace(recipe.data, buckets=False)  # only rows are counted
        sets = [open_dataset(data, recipe.train.seed, 1), open_validation(data, 1)]
        rows = sum(most_captions(images) for images in sets if isinstance(images, ImageDataset))
        captions, source = rows, f"those of {places(recipe.data)}"
    width, storage = recipe.model.context_in_dim, recipe.text.storage
    size = cache_bytes(captions, width, storage)
    padded = cache_bytes(captions, width, storage, recipe.text.max_tokens)
    return (
        f"text cache: {captions:,} captions ({source}) at {MEAN_TOKENS} tokens each, assumed, of width {width} in "
        f"{storage}: {in_units(size)} ({in_units(padded)} padded to {recipe.text.max_tokens})"
    )


def in_units(count: float) -> str:
    """Bytes in decimal units, one digit behind the point."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _memory(recipe: Recipe, parameters: Named, has_muon: bool, tokens: int, gpus: int) -> tuple[float, float]:
    """Bytes of all states, and of one GPU's activations.

    Weights, gradients and EMA are float32, as are one momentum (Muon) or two moments (AdamW). Activations kept for
    backward, in 16-bit numbers: about 11 hidden and 3 MLP widths a token and block, 3 hidden widths a text token.
    """
    count = sum(p.numel() for _, p in parameters)
    muon = sum(p.numel() for _, p in split(parameters, recipe)[0]) if has_muon else 0
    state = 4.0 * (3 * count + muon + 2 * (count - muon))
    model, routing = recipe.model, recipe.routing
    kept = tokens * (1 - routing.selection_ratio) if routing.enabled else tokens
    routed_blocks = routing.end - routing.start + 1 if routing.enabled else 0
    seen = routed_blocks * kept + (model.depth - routed_blocks) * tokens
    widths = seen * (11 * model.hidden_size + 3 * model.mlp_size)
    widths += model.depth * recipe.text.max_tokens * 3 * model.hidden_size
    return state, 2.0 * widths * recipe.train.batch / gpus


def _kinds(parameters: Named) -> str:
    """How many tensors and numbers, and which: names with block numbers taken out."""
    if not parameters:
        return "nothing"
    kinds: dict[str, int] = {}
    for name, _ in parameters:
        parts = [part for part in name.split(".") if not part.isdigit() or "blocks" not in name]
        kinds[".".join(parts)] = kinds.get(".".join(parts), 0) + 1
    listed = ", ".join(f"{name} x{n}" if n > 1 else name for name, n in kinds.items())
    return f"{len(parameters)} tensors, {sum(p.numel() for _, p in parameters):,} numbers ({listed})"
