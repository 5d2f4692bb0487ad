"""A pixel-space text-to-image transformer, its objective, text towers and sampler.

Public names are loaded when first used, so that `prx_model.config` can be read without importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import PRXConfig, Routing, Sampling

if TYPE_CHECKING:
    from .captions import clean_caption
    from .ema import EMA
    from .sampler import sample
    from .text import ByteTower, T5GemmaTower
    from .transformer import PRXTransformer

__all__ = [
    "EMA",
    "ByteTower",
    "PRXConfig",
    "PRXTransformer",
    "Routing",
    "Sampling",
    "T5GemmaTower",
    "clean_caption",
    "sample",
]

_HOME = {
    "EMA": "ema",
    "ByteTower": "text",
    "PRXTransformer": "transformer",
    "T5GemmaTower": "text",
    "clean_caption": "captions",
    "sample": "sampler",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
