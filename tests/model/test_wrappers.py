"""Wrapper prefixes: weights saved from a compiled, distributed or checkpointed model load everywhere."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from prx_model.config import PRXConfig
from prx_model.convert import from_prx_repository
from prx_model.ema import EMA
from prx_model.teacher_weights import fill
from prx_model.transformer import PRXTransformer
from prx_model.wrappers import unwrapped

CONFIG = PRXConfig(
    patch_size=4, context_in_dim=8, hidden_size=32, num_heads=2, depth=2, axes_dim=(8, 8), bottleneck_size=8
)
PREFIXES = ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.module.", "_fsdp_wrapped_module."]


def by_block(name: str) -> str:
    """As where each block was compiled or checkpointed alone."""
    parts = name.split(".")
    if parts[0] != "blocks":
        return name
    return ".".join([*parts[:2], "_orig_mod" if parts[1] == "0" else "_checkpoint_wrapped_module", *parts[2:]])


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_come_off_wherever_they_stand(prefix: str) -> None:
    names = [name for name, _ in PRXTransformer(CONFIG).named_parameters()]
    assert list(unwrapped({prefix + by_block(name): 0 for name in names})) == names
    assert list(unwrapped({f"denoiser.{prefix}{name}": 0 for name in names})) == [f"denoiser.{n}" for n in names]


def test_two_names_that_become_one_are_refused() -> None:
    with pytest.raises(ValueError, match="both 'w' without the prefixes of wrappers"):
        unwrapped({"w": 0, "module.w": 1})


@pytest.mark.parametrize("prefix", PREFIXES)
def test_weights_and_averages_of_wrapped_models_load(prefix: str) -> None:
    torch.manual_seed(0)
    source, target = PRXTransformer(CONFIG), PRXTransformer(CONFIG)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_()
    theirs = {prefix + by_block(name): value for name, value in source.state_dict().items()}
    target.load_state_dict(from_prx_repository(theirs), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
    averages = EMA(PRXTransformer(CONFIG).named_parameters())
    averages.load_state_dict(theirs)
    assert torch.equal(averages.averages[0], next(source.parameters()))
    wrapped = EMA([(prefix + by_block(name), parameter) for name, parameter in source.named_parameters()])
    assert list(wrapped.state_dict()) == list(averages.state_dict())


def test_a_model_that_torch_has_wrapped_gives_the_names_of_one_that_it_has_not() -> None:
    model = PRXTransformer(CONFIG)
    wrapped: nn.Module = torch.optim.swa_utils.AveragedModel(torch.compile(model))  # type: ignore[arg-type]
    names = [name for name, _ in wrapped.named_parameters()]
    assert all("_orig_mod" in name for name in names)
    assert list(unwrapped(dict.fromkeys(names, 0))) == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_teacher_s_weights_load_with_prefixes(tmp_path: Path, prefix: str) -> None:
    source, target = nn.Sequential(nn.Linear(2, 3)), nn.Sequential(nn.Linear(2, 3))
    save_file({prefix + name: value for name, value in source.state_dict().items()}, tmp_path / "w.safetensors")
    fill(target, "a teacher", str(tmp_path / "w.safetensors"), "weights")
    assert torch.equal(source[0].weight, target[0].weight)
