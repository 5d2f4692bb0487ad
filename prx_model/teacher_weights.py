"""Frozen networks with their weights: from the hub, from a file, or random where that is asked for by name.

A missing, wrong or partly fitting file is one sentence; nothing falls back to random weights.
"""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

RANDOM = "random"


def load_timm(name: str, weights: str = "") -> nn.Module:
    """A timm vision transformer that takes pictures of any size in whole patches.

    Args:
        name: timm's model name, with or without a pretrained tag.
        weights: "" takes those of timm's hub; a path to a .safetensors or .pth file (timm's names or those of the
            network's authors), or to a folder that holds model.safetensors; "random" takes none, and warns.

    Raises:
        ValueError: an unknown network, or weights that are not there or do not fit; the message says which.
    """
    import timm

    arguments: dict[str, Any] = {"num_classes": 0, "dynamic_img_size": True}
    model: Any
    try:
        model = _from_hub(name, arguments) if weights == "" else timm.create_model(name, pretrained=False, **arguments)
    except RuntimeError as error:  # timm's answer to a name it does not know
        raise ValueError(f"timm has no model {name!r}: {_first_line(error)}") from None
    if weights == RANDOM:
        _warn(name)
    elif weights:
        hub = model.pretrained_cfg.get("hf_hub_id") or f"timm/{name}"
        file = _find(weights, f"a checkpoint of {name}, for example model.safetensors of the hub model {hub}")
        state = _read(file)
        convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        _load(model, convert(state, model) if convert is not None else state, file, name)
    return model


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
        except OSError as error:
            raise ValueError(
                f"the weights of LPIPS's trunk {network!r} could not be downloaded: {_first_line(error)}; "
                "give the file of torchvision's network with --lpips.weights"
            ) from error
    if weights == RANDOM:
        _warn(f"LPIPS's {network}")
    elif weights:
        file = _find(weights, f"torchvision's {network} weights, for example vgg16-397923af.pth")
        features = {
            key.removeprefix("features."): value for key, value in _read(file).items() if key.startswith("features.")
        }
        # lpips keeps torchvision's numbers of layers, in slices: slice1.0.weight is features.0.weight.
        numbered = {re.sub(r"^slice\d+\.", "", key): key for key in made.net.state_dict()}
        used = {numbered.get(key, f"features.{key}"): value for key, value in features.items()}
        _load(made.net, used, file, f"LPIPS's {network}")
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
            "teacher's setting `weights` (--repa.weights PATH, --pdino.weights PATH)"
        ) from error
    return made


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
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
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
    # Buffers that timm makes itself (rotary periods) need not be in a file.
    buffers = {key for key, _ in model.named_buffers()}
    missing = sorted(own.keys() - state.keys() - buffers)
    unexpected = sorted(state.keys() - own.keys())
    misshapen = sorted(key for key in own.keys() & state.keys() if own[key].shape != state[key].shape)
    odd = [("missing", missing), ("not of this network", unexpected), ("of another shape", misshapen)]
    if any(keys for _, keys in odd):
        listed = "; ".join(f"{what}: {', '.join(keys)}" for what, keys in odd if keys)
        raise ValueError(f"{str(file)!r} does not hold the weights of {name}: {listed}")
    model.load_state_dict(state, strict=False)


def _warn(name: str) -> None:
    warnings.warn(f"{name} has RANDOM weights, as asked: its loss teaches nothing", stacklevel=3)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")
