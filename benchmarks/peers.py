"""Whom we are compared with: how a peer is declared, found, and skipped with its reason.

A benchmark names a peer; `require` skips the row, visibly, where that peer is not installed or cannot run here.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec

import pytest
import torch


@dataclass(frozen=True)
class Peer:
    """An implementation by others, or torch's own."""

    name: str
    what: str
    """What of it is timed."""
    module: str = "torch"
    """Module that must be importable."""
    distribution: str = ""
    """Its name on PyPI, where it is not torch itself."""
    minimum_capability: tuple[int, int] | None = None
    """CUDA compute capability that it needs; None runs anywhere."""
    torch_attribute: str = ""
    """Dotted name below torch that this torch version must have."""

    def missing(self) -> str | None:
        """Why this peer cannot run here, in one sentence; None where it can."""
        try:
            found = find_spec(self.module) is not None
        except ModuleNotFoundError:  # a parent package is not there
            found = False
        if not found:
            return f"{self.name} is not installed (PyPI: {self.distribution or self.module})"
        if self.torch_attribute:
            owner: object = torch
            for part in self.torch_attribute.split("."):
                if not hasattr(owner, part):
                    return f"{self.name} needs torch.{self.torch_attribute}, which torch {torch.__version__} lacks"
                owner = getattr(owner, part)
        if self.minimum_capability is not None:
            if not torch.cuda.is_available():
                return f"{self.name} needs a CUDA device"
            if torch.cuda.get_device_capability() < self.minimum_capability:
                need = ".".join(map(str, self.minimum_capability))
                return f"{self.name} needs compute capability {need}, this is {torch.cuda.get_device_name()}"
        return None


_ALL = (
    Peer("plain", "the plain PyTorch definition, eager"),
    Peer("torch.optim.Muon", "torch's own Muon", torch_attribute="optim.Muon"),
    Peer("muon-fsdp2", "zeropower_via_newtonschulz5, Muon", module="muon_fsdp2", distribution="muon-fsdp2"),
    Peer(
        "gram-newton-schulz",
        "GramNewtonSchulz with its CuTeDSL kernels",
        module="gram_newton_schulz",
        distribution="gram-newton-schulz",
        minimum_capability=(9, 0),
    ),
    Peer("diffusers", "PRXTransformer2DModel", module="diffusers", distribution="diffusers"),
    Peer("lpips", "the loss of a step with teachers", module="lpips", distribution="lpips"),
    Peer("einops", "rearrange", module="einops", distribution="einops"),
    Peer("timm", "PatchEmbed", module="timm", distribution="timm"),
    Peer(
        "varlen",
        "torch.nn.attention.varlen",
        module="torch.nn.attention.varlen",
        distribution="torch",
        minimum_capability=(8, 0),
    ),
    Peer(
        "flash-attn",
        "flash_attn_varlen_func",
        module="flash_attn.flash_attn_interface",  # flash-attn-4 makes a `flash_attn` too, without this in it
        distribution="flash-attn",
        minimum_capability=(8, 0),
    ),
    Peer(
        "flash-attn-4",
        "flash_attn_varlen_func of its CuTeDSL kernels",
        module="flash_attn.cute",
        distribution="flash-attn-4",
        minimum_capability=(9, 0),
    ),
    Peer(
        "liger-kernel",
        "LigerGELUMulFunction",
        module="liger_kernel",
        distribution="liger-kernel",
        minimum_capability=(8, 0),
    ),
)
PEERS: dict[str, Peer] = {peer.name: peer for peer in _ALL}


def eager_on_cpu() -> AbstractContextManager[None]:
    """For peers that compile themselves: eager on a CPU, where no time counts and compiling takes long."""
    return nullcontext() if torch.cuda.is_available() else torch.compiler.set_stance("force_eager")


def require(name: str) -> Peer:
    """The peer of this name; skips the test with the reason where it cannot run.

    Raises:
        ValueError: no peer of this name is declared.
    """
    if name not in PEERS:
        raise ValueError(f"no peer {name!r} is declared in benchmarks/peers.py; there are {', '.join(PEERS)}")
    reason = PEERS[name].missing()
    if reason:
        pytest.skip(reason)
    return PEERS[name]
