"""Token routing (TREAD): half the tokens skip the middle blocks of a transformer."""

from .blocks import Route, route_blocks
from .fused import enter_route_modulate, exit_route_gated
from .reference import kept_tokens
from .tokens import enter_route, exit_route, gather_tokens, sample_keep, scatter_tokens

__all__ = [
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
