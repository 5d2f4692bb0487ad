"""The denoisers that stand in the same place of a step: ours, the plain definition, diffusers', the PRX repository's.

All hold the same random weights. The PRX repository's own code takes part where `PRX_REFERENCE` is the path of a
checkout of it.
"""

import importlib
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.machine import device
from benchmarks.plain_prx import PlainPRX
from benchmarks.sizes import GPU
from prx_model import PRXConfig, PRXTransformer
from prx_model.convert import from_prx_repository

Kind = Literal["ours", "plain", "diffusers", "PRX repository"]
HOOKED: Mapping[Kind, tuple[str, str]] = {
    "plain": ("x", "rotary"),
    "diffusers": ("hidden_states", "image_rotary_emb"),
    "PRX repository": ("img", "pe"),
}
"""What blocks call their tokens and their rotary table, where routing is done by hooks."""


def random_weights(config: PRXConfig) -> dict[str, Tensor]:
    """Weights that give outputs of order one: the initial ones give zero."""
    generator = torch.Generator(device=device()).manual_seed(0)
    with torch.device("meta"):
        like = PRXTransformer(config).state_dict()
    state = {}
    for name, tensor in like.items():
        noise = torch.randn(tensor.shape, generator=generator, device=device())
        state[name] = noise * tensor.shape[-1] ** -0.5 if tensor.ndim == 2 else 0.7 + 0.1 * noise
    return state


def build(kind: Kind, config: PRXConfig) -> nn.Module:
    """A denoiser on the benchmarks' device with `random_weights`, float32."""
    with torch.device(device()):
        model = _empty(kind, config)
    weights = random_weights(config)
    if kind == "PRX repository":
        # Its names are found by renaming its own state dict.
        weights = {own: weights[ours_name(kind, own)] for own in model.state_dict()}
    model.load_state_dict(weights, strict=True)
    return model


def _empty(kind: Kind, config: PRXConfig) -> nn.Module:
    sizes = {**asdict(config), "axes_dim": list(config.axes_dim)}
    if kind == "ours":
        return PRXTransformer(config)
    if kind == "plain":
        return PlainPRX(config)
    if kind == "diffusers":
        from diffusers import PRXTransformer2DModel

        made: nn.Module = PRXTransformer2DModel(**sizes)
        return made
    reference = importlib.import_module("prx.models.prx")
    theirs: nn.Module = reference.PRX(reference.PRXParams(**sizes))
    return theirs


def missing(kind: Kind) -> str | None:
    """Why the PRX repository's code cannot run here, in one sentence; None where it can, and for all others."""
    if kind != "PRX repository":
        return None
    path = os.environ.get("PRX_REFERENCE", "")
    if not path:
        return "PRX_REFERENCE is not set; give the path of a checkout of the PRX repository"
    if not (Path(path) / "prx" / "models" / "prx.py").is_file():
        return f"PRX_REFERENCE {path!r} is no checkout of the PRX repository: it has no prx/models/prx.py"
    if path not in sys.path:
        sys.path.append(path)
    try:
        importlib.import_module("prx.models.prx")
    except ImportError as error:
        return f"the PRX repository's code at {path!r} cannot be imported: {error}"
    return None


def ours_name(kind: Kind, name: str) -> str:
    """A parameter's name in `PRXTransformer`."""
    if kind != "PRX repository":
        return name
    (renamed,) = from_prx_repository({name: torch.empty(0)})
    return renamed


def compile_blocks(kind: Kind, model: nn.Module) -> None:
    """Compile every block in place; without a graph break in ours, hooks and their breaks included in the others."""
    for block in model.get_submodule("blocks").children():
        block.compile(fullgraph=kind == "ours", backend="inductor" if GPU else "aot_eager")


def predict(kind: Kind, model: nn.Module, image: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """Predicted pictures (batch, channels, H, W) of noisy ones, dense or as the hooks on the model's blocks route.

    Args:
        text, mask: padded: (batch, L, width), and (batch, L) bool.
    """
    out: Tensor
    text = text.to(model.get_parameter("txt_in.weight").dtype)
    if kind == "diffusers":
        (out,) = model(image, t, text, attention_mask=mask, return_dict=False)
    else:
        out = model(image, t, text, mask)
    return out
