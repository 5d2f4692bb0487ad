"""From a recipe to its modules: denoiser and text tower, initialised from the run's seed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prx_model.attention import check_backend
from prx_model.captions import clean_caption
from prx_model.packed_text import PackedText, pack
from prx_model.ranges import check_ranges
from prx_model.text import PAD, ByteTower, T5GemmaTower
from prx_model.transformer import PRXTransformer
from train.commandline import precompute_command
from train.data.text_cache import CachedText, Encoding
from train.errors import UserError
from train.randomness import derive_seed
from train.ranks.graphs import KEYS_STEP
from train.ranks.parallel import fill
from train.recipes import Recipe, Text

_FILLS = {name for name in vars(nn.init) if name.endswith("_") and not name.startswith("_")} | {"fill_", "zero_"}


@dataclass
class Modules:
    """The denoiser and its text tower, or the cache in the tower's place."""

    model: PRXTransformer
    tower: ByteTower | T5GemmaTower | CachedText
    clean: bool = True
    """Whether captions are cleaned before the tower gets them, `text.clean`."""

    def trained(self) -> dict[str, nn.Module]:
        """Modules with weights of their own; a frozen tower is none of them."""
        return {"model": self.model, **({"tower": self.tower} if isinstance(self.tower, ByteTower) else {})}

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings (batch, L, width) and mask (batch, L) bool of captions, on the tower's device."""
        text = self.text(captions)
        return text.padded() if isinstance(text, PackedText) else text

    def text(self, captions: list[str]) -> PackedText | tuple[Tensor, Tensor]:
        """What the denoiser takes: frozen embeddings packed, those of a trained tower padded, with their mask.

        Captions are cleaned here and nowhere else on their way (`prx_model.clean_caption`). Lengths are rounded up, so
        that blocks have one graph for all of them, captions that are all empty too.
        """
        captions = [clean_caption(caption) for caption in captions] if self.clean else captions
        if not isinstance(self.tower, ByteTower):
            return pack(*self.tower.encode(captions))
        device = next(self.tower.parameters()).device
        ids, mask = self.tower.tokenize(captions)
        missing = -ids.shape[1] % KEYS_STEP
        ids, mask = F.pad(ids, (0, missing), value=PAD), F.pad(mask, (0, missing), value=False)
        mask = mask.to(device, non_blocking=True)
        return self.tower(ids.to(device, non_blocking=True), mask), mask


def build(recipe: Recipe, device: torch.device, prepare: Callable[[nn.Module], None] | None = None) -> Modules:
    """Make the modules with their initial weights; the same weights for a seed on every rank and device.

    Args:
        recipe: what to build.
        device: where it goes.
        prepare: called with each module that is trained while it has no memory yet: compiles and shards it in place.

    Raises:
        UserError: sizes that do not fit one another, or a text encoder that cannot be loaded.
    """
    check(recipe)
    try:
        check_backend(recipe.train.attention, device)
    except ValueError as error:
        raise UserError(f"train.attention: {error}") from None
    with on_paper():
        model = PRXTransformer(recipe.model, attention=recipe.train.attention)
    init = recipe.train.init
    _make_real(model, lambda g: model.initial_weights(g, init=init), recipe.train.seed, "weights", device, prepare)
    tower = _tower(recipe, device, prepare)
    if tower.width != recipe.model.context_in_dim:
        raise UserError(
            f"the text tower gives {tower.width} features but model.context_in_dim is {recipe.model.context_in_dim}; "
            f"set --model.context-in-dim {tower.width}"
        )
    return Modules(model, tower, recipe.text.clean)


@contextmanager
def on_paper() -> Iterator[None]:
    """Modules made here have shapes and no memory, and their own first values are left out.

    The first of them would import Dynamo, Inductor and sympy, 3 to 6 seconds, to fill nothing.
    """
    with torch.device("meta"), _Unfilled():
        yield


class _Unfilled(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        target = args[0] if args else given.get("tensor")
        if isinstance(target, Tensor) and target.is_meta and func.__name__ in _FILLS:
            return target
        return func(*args, **given)


def make_empty(module: nn.Module, device: torch.device) -> None:
    """Give a module on paper memory without values; `Module.to_empty` would import sympy."""

    def empty(x: Tensor) -> Tensor:
        if type(x) in (Tensor, nn.Parameter):
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
        return torch.empty_like(x, device=device)  # sharded

    module._apply(empty)


def _make_real(
    module: nn.Module,
    weights: Callable[[torch.Generator], Iterator[tuple[str, Tensor]]],
    seed: int,
    purpose: str,
    device: torch.device,
    prepare: Callable[[nn.Module], None] | None,
) -> None:
    """From the meta device to a device, sharded in between, with its initial weights."""
    if prepare is not None:
        prepare(module)
    make_empty(module, device)
    fill(module, weights(torch.Generator().manual_seed(derive_seed(seed, purpose=purpose))))


def check(recipe: Recipe) -> None:
    """Refuse settings that do not fit one another, before anything is allocated.

    Raises:
        UserError: naming the field.
    """
    model, data, routing = recipe.model, recipe.data, recipe.routing
    try:
        check_ranges(recipe)
    except ValueError as error:
        raise UserError(str(error)) from None
    try:
        tokens = model.tokens(data.height, data.width)
    except ValueError as error:
        raise UserError(f"data.height x data.width: {error}") from None
    if routing.enabled and (routing.end >= model.depth or tokens < 2):
        raise UserError(
            f"routing runs over blocks {routing.start} to {routing.end} of {tokens} tokens, but the model has blocks "
            f"0 to {model.depth - 1} and routing needs at least 2 tokens; set --routing.end or --routing.no-enabled"
        )
    if recipe.repa.enabled and not 0 <= recipe.repa.layer < model.depth:
        raise UserError(f"repa.layer {recipe.repa.layer} must be a block of the model, 0 to {model.depth - 1}")
    text = recipe.text
    if text.kind == "bytes" and (text.cache or text.revision):
        raise UserError("text.cache and text.revision are T5Gemma's; give --text.kind t5gemma, or leave them out")
    if text.storage != "bf16" and not text.cache:
        raise UserError(f"text.storage {text.storage!r} is how a cache holds embeddings; give --text.cache too")
    if recipe.text.kind == "bytes" and model.context_in_dim % recipe.text.num_heads:
        raise UserError(
            f"text.num_heads {recipe.text.num_heads} must divide model.context_in_dim {model.context_in_dim}"
        )


def check_ranks(recipe: Recipe, ranks: int) -> None:
    """Refuse a batch that so many ranks cannot share out.

    Raises:
        UserError: naming the fields.
    """
    if recipe.train.batch % (ranks * recipe.parallel.micro_batches):
        raise UserError(
            f"train.batch {recipe.train.batch} must be a multiple of the {ranks} ranks x "
            f"{recipe.parallel.micro_batches} parallel.micro_batches"
        )


def frozen_tower(text: Text) -> T5GemmaTower:
    """The frozen encoder of a text section, on the CPU.

    Raises:
        UserError: it cannot be loaded.
    """
    try:
        return T5GemmaTower(text.name, revision=text.revision or None, max_tokens=text.max_tokens)
    except (ValueError, ImportError) as error:
        raise UserError(str(error)) from None


def _tower(
    recipe: Recipe, device: torch.device, prepare: Callable[[nn.Module], None] | None
) -> ByteTower | T5GemmaTower | CachedText:
    text = recipe.text
    if text.kind == "bytes":
        with on_paper():
            tower = ByteTower(recipe.model.context_in_dim, text.depth, text.num_heads, text.max_tokens)
        _make_real(tower, tower.initial_weights, recipe.train.seed, "tower weights", device, prepare)
        return tower
    if text.cache:
        return CachedText(Path(text.cache), Encoding.of(text), device, precompute_command(recipe))
    return frozen_tower(text).to(device)
