"""Token routing (TREAD): half the tokens skip the middle blocks of a transformer."""

from .blocks import route_blocks
from .entries import Entries
from .fused import enter_route_modulate, exit_route_gated
from .handle import Route
from .reference import kept_tokens
from .tokens import enter_route, exit_route, gather_tokens, sample_keep, scatter_tokens

__all__ = [
    "Entries",
    "Route",
    "enter_route",
    "enter_route_modulate",
    "exit_route",
    "exit_route_gated",
    "gather_tokens",
    "kept_tokens",
    "route_blocks",
    "sample_keep",
    "scatter_tokens",
]
