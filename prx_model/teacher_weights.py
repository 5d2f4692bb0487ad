"""Frozen networks with their weights: from the hub, from a file, or random where that is asked for by name.

A missing, wrong or partly fitting file is one sentence; nothing falls back to random weights.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from .wrappers import unwrapped

RANDOM = "random"


def load_timm(name: str, weights: str = "", *, with_head: bool = False) -> nn.Module:
    """A timm vision transformer that takes pictures of any size in whole patches.

    Args:
        name: timm's model name, with or without a pretrained tag.
        with_head: keep the network's own last linear map, CLIP's into the space it shares with text.
        weights: "" takes those of timm's hub; a path to a .safetensors or .pth file (timm's names, those of the
            network's authors or, for DINOv2 and DINOv3, those of transformers), or to a folder that holds
            model.safetensors; "random" takes none, and warns.

    Raises:
        ValueError: an unknown network, or weights that are not there or do not fit; the message says which.
    """
    import timm

    arguments: dict[str, Any] = {"dynamic_img_size": True, **({} if with_head else {"num_classes": 0})}
    model: Any
    try:
        model = _from_hub(name, arguments) if weights == "" else timm.create_model(name, pretrained=False, **arguments)
    except RuntimeError as error:  # timm's answer to a name it does not know
        raise ValueError(f"timm has no model {name!r}: {_first_line(error)}") from None
    if weights:
        hub = model.pretrained_cfg.get("hf_hub_id") or f"timm/{name}"
        wanted = f"a checkpoint of {name}, for example model.safetensors of the hub model {hub}"
        fill(model, name, weights, wanted, lambda state: _to_timm(state, model, name))
    return model


def fill(
    model: nn.Module,
    name: str,
    weights: str,
    wanted: str,
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> None:
    """Load a file's weights into a network, all of them; or leave those it was made with.

    Args:
        model: loaded in place.
        name: of the network, in messages.
        weights: path to a file, or to a folder that holds model.safetensors; "random" loads nothing, and warns.
        wanted: what the file should be, in messages.
        convert: from the file's names to the network's.

    Raises:
        ValueError: a file that is not there, cannot be read, or holds other keys or shapes; the message lists them.
    """
    if weights == RANDOM:
        _warn(name)
        return
    file = _find(weights, wanted)
    state = _read(file)
    state = unwrapped(state)
    if convert is not None:
        try:
            state = convert(state)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{str(file)!r} does not hold the weights of {name}: {_first_line(error)}") from None
    _load(model, state, file, name)


def load_lpips(network: str = "vgg", weights: str = "") -> nn.Module:
    """The LPIPS metric of package `lpips`, whose linear maps come with it.

    Args:
        network: trunk: "vgg", "alex" or "squeeze".
        weights: of the trunk: "" takes torchvision's from the hub; a path to a state dict of torchvision's network
            (.safetensors or .pth); "random" takes none, and warns.

    Raises:
        ValueError: an unknown trunk, or weights that are not there or do not fit.
    """
    import lpips

    if network not in ("vgg", "alex", "squeeze"):
        raise ValueError(f"lpips.network must be vgg, alex or squeeze, got {network!r}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips calls torchvision by an old argument
        try:
            made = lpips.LPIPS(net=network, pnet_rand=weights != "", verbose=False)
        except (OSError, RuntimeError) as error:  # the latter where a download has another checksum
            raise ValueError(
                f"the weights of LPIPS's trunk {network!r} could not be downloaded: {_first_line(error)}; "
                "give the file of torchvision's network with --lpips.weights"
            ) from error
    # lpips keeps torchvision's numbers of layers, in slices: slice1.0.weight is features.0.weight.
    numbered = {re.sub(r"^slice\d+\.", "features.", key): key for key in made.net.state_dict()}
    if weights:
        wanted = f"torchvision's {network} weights, for example vgg16-397923af.pth"
        fill(
            made.net,
            f"LPIPS's {network}",
            weights,
            wanted,
            lambda state: {
                numbered.get(key, key): value for key, value in state.items() if key.startswith("features.")
            },
        )
    return made


def _from_hub(name: str, arguments: dict[str, Any]) -> nn.Module:
    import timm

    if not timm.is_model(name.split(".")[0]):
        raise RuntimeError(f"unknown model {name}")
    try:
        made: nn.Module = timm.create_model(name, pretrained=True, **arguments)
    except Exception as error:  # the hub's client raises whatever its transport raises
        raise ValueError(
            f"the weights of {name} could not be had from timm's hub: {_first_line(error)}; give a file with the "
            "setting of what needs it (--repa.weights, --pdino.weights, --evaluation.clip-weights, "
            "--evaluation.dino-weights PATH)"
        ) from error
    return made


def _to_timm(state: dict[str, Tensor], model: Any, name: str) -> dict[str, Tensor]:
    """A file's weights under timm's names, from those of timm, of the network's authors or of transformers.

    Raises:
        ValueError: biases of queries and values, which a network without them would leave out.
    """
    if any(key.endswith("layer.0.attention.q_proj.weight") or "attention.attention.query" in key for key in state):
        state = _from_transformers(state)
    if "storage_tokens" in state and not any(key.endswith("q_bias") for key, _ in model.named_parameters()):
        # DINOv3's small networks have biases of zero there, and timm's form without them; one of key is masked.
        for key in [key for key in state if key.endswith("attn.qkv.bias")]:
            query, _, value = state.pop(key).chunk(3)
            if query.any() or value.any():
                raise ValueError(f"it has biases that {name} leaves out, first {key}; take {name}_qkvb")
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    return state if convert is None else convert(state, model)


# Of transformers' DINOv2 (with registers or without) and DINOv3, on the hub and as version 5 writes them.
_FROM_TRANSFORMERS = (
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^(encoder\.|model\.)?layer\.", "blocks."),
    (r"\.attention\.(attention\.query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(attention\.key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(attention\.value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
)


def _from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under their authors' names: query, key and value in one, DINOv3's registers as `storage_tokens`."""
    dinov3 = "embeddings.position_embeddings" not in state
    gated = any(".gate_proj." in key for key in state)
    names = [*_FROM_TRANSFORMERS]
    if dinov3:
        names.append((r"^register_tokens$", "storage_tokens"))
        kinds = (("gate_proj", "w1"), ("up_proj", "w2"), ("down_proj", "w3"))
        names += kinds if gated else (("up_proj", "fc1"), ("down_proj", "fc2"))
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        for pattern, new in names:
            key = re.sub(pattern, new, key)
        renamed[key] = value
    for key in [key for key in renamed if ".attn.q." in key]:
        query = renamed.pop(key)
        parts = [renamed.pop(key.replace(".attn.q.", f".attn.{kind}."), torch.zeros_like(query)) for kind in "kv"]
        renamed[key.replace(".attn.q.", ".attn.qkv.")] = torch.cat([query, *parts])
    return renamed


def _find(path: str, wanted: str) -> Path:
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / "model.safetensors"
    if not file.is_file():
        raise ValueError(f"there is no file {str(file)!r} to take a teacher's weights from; it should be {wanted}")
    return file


def _read(file: Path) -> dict[str, Tensor]:
    """A state dict from safetensors, or from torch's format without running anything in it."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError:  # torch's own words advise to run what the file holds
        raise ValueError(
            f"{str(file)!r} is no readable weight file: it is damaged, or holds more than tensors, and what a pickle "
            "says is never run; save its state dict as safetensors"
        ) from None
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise ValueError(f"{str(file)!r} is no readable weight file: {_first_line(error)}") from None
    for wrapper in ("state_dict", "model", "teacher"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{str(file)!r} holds no state dict of tensors")
    return state


def _load(model: nn.Module, state: dict[str, Tensor], file: Path, name: str) -> None:
    """Load strictly; every key that is missing, left over or of another shape is named."""
    own = model.state_dict()
    # Buffers that a network makes itself (rotary periods, a count of batches) need not be in a file.
    buffers = {key for key, _ in model.named_buffers() if not key.endswith(("running_mean", "running_var"))}
    missing = sorted(own.keys() - state.keys() - buffers)
    unexpected = sorted(state.keys() - own.keys())
    misshapen = sorted(key for key in own.keys() & state.keys() if own[key].shape != state[key].shape)
    odd = [("missing", missing), ("not of this network", unexpected), ("of another shape", misshapen)]
    if any(keys for _, keys in odd):
        listed = "; ".join(f"{what}: {', '.join(keys)}" for what, keys in odd if keys)
        raise ValueError(f"{str(file)!r} does not hold the weights of {name}: {listed}")
    model.load_state_dict(state, strict=False)


def _warn(name: str) -> None:
    warnings.warn(f"{name} has RANDOM weights, as asked: what is computed from it means nothing", stacklevel=4)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")
