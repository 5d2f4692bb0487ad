"""Token routing (TREAD): half the tokens skip the middle blocks of a transformer."""

from .blocks import route_blocks
from .entries import Entries
from .handle import Route
from .reference import kept_tokens
from .tokens import enter_route, exit_route, gather_tokens, sample_keep, scatter_tokens

__all__ = [
    "Entries",
    "Route",
    "enter_route",
    "exit_route",
    "gather_tokens",
    "kept_tokens",
    "route_blocks",
    "sample_keep",
    "scatter_tokens",
]
