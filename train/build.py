"""From a recipe to its modules: denoiser and text tower, initialised from the run's seed."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prx_model.attention import check_backend
from prx_model.text import ByteTower, T5GemmaTower
from prx_model.transformer import PRXTransformer
from train.errors import UserError
from train.randomness import derive_seed
from train.recipes import Recipe


@dataclass
class Modules:
    """The denoiser and its text tower."""

    model: PRXTransformer
    tower: ByteTower | T5GemmaTower

    def trained(self) -> dict[str, nn.Module]:
        """Modules with weights of their own; a frozen tower is none of them."""
        return {"model": self.model, **({"tower": self.tower} if isinstance(self.tower, ByteTower) else {})}

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings (batch, L, width) and mask (batch, L) bool of captions, on the tower's device."""
        device = next(self.tower.parameters()).device
        ids, mask = self.tower.tokenize(captions)
        mask = mask.to(device, non_blocking=True)
        return self.tower(ids.to(device, non_blocking=True), mask), mask


def build(recipe: Recipe, device: torch.device) -> Modules:
    """Make the modules with their initial weights; the same weights for a seed on every rank and device.

    Raises:
        UserError: sizes that do not fit one another, or a text encoder that cannot be loaded.
    """
    check(recipe)
    try:
        check_backend(recipe.train.attention, device)
    except ValueError as error:
        raise UserError(f"train.attention: {error}") from None
    model = PRXTransformer(recipe.model, attention=recipe.train.attention)
    model.init_weights(torch.Generator().manual_seed(derive_seed(recipe.train.seed, purpose="weights")))
    tower = _tower(recipe)
    if tower.width != recipe.model.context_in_dim:
        raise UserError(
            f"the text tower gives {tower.width} features but model.context_in_dim is {recipe.model.context_in_dim}; "
            f"set --model.context-in-dim {tower.width}"
        )
    return Modules(model.to(device), tower.to(device))


def check(recipe: Recipe) -> None:
    """Refuse settings that do not fit one another, before anything is allocated.

    Raises:
        UserError: naming the field.
    """
    model, data, routing, train = recipe.model, recipe.data, recipe.routing, recipe.train
    try:
        tokens = model.tokens(data.height, data.width)
    except ValueError as error:
        raise UserError(f"data.height x data.width: {error}") from None
    if routing.enabled and (routing.end >= model.depth or tokens < 2):
        raise UserError(
            f"routing runs over blocks {routing.start} to {routing.end} of {tokens} tokens, but the model has blocks "
            f"0 to {model.depth - 1} and routing needs at least 2 tokens; set --routing.end or --routing.no-enabled"
        )
    for name, value in (("steps", train.steps), ("batch", train.batch)):
        if value < 1:
            raise UserError(f"train.{name} must be at least 1, got {value}")
    if train.warmup < 0 or train.cooldown < 0 or train.clip <= 0:
        raise UserError(
            f"train.warmup and train.cooldown must not be negative and train.clip must be positive, "
            f"got {train.warmup}, {train.cooldown} and {train.clip}"
        )
    if recipe.repa.enabled and not 0 <= recipe.repa.layer < model.depth:
        raise UserError(f"repa.layer {recipe.repa.layer} must be a block of the model, 0 to {model.depth - 1}")
    if recipe.repa.enabled and recipe.repa.projector_layers < 1:
        raise UserError(f"repa.projector_layers must be at least 1, got {recipe.repa.projector_layers}")
    if recipe.text.kind == "bytes" and model.context_in_dim % recipe.text.num_heads:
        raise UserError(
            f"text.num_heads {recipe.text.num_heads} must divide model.context_in_dim {model.context_in_dim}"
        )


def _tower(recipe: Recipe) -> ByteTower | T5GemmaTower:
    text = recipe.text
    if text.kind == "bytes":
        tower = ByteTower(recipe.model.context_in_dim, text.depth, text.num_heads, text.max_tokens)
        tower.init_weights(torch.Generator().manual_seed(derive_seed(recipe.train.seed, purpose="tower weights")))
        return tower
    try:
        return T5GemmaTower(text.name, max_tokens=text.max_tokens)
    except (ValueError, ImportError) as error:
        raise UserError(str(error)) from None
