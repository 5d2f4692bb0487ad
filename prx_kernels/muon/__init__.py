"""Muon for matrices and AdamW for everything else, in one optimizer."""

from .groups import muon_groups
from .optimizer import Muon
from .owners import assign_owners

__all__ = ["Muon", "assign_owners", "muon_groups"]
