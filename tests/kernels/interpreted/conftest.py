"""Memory that a kernel does not write shows: `torch.empty` gives NaN, and integers far outside any index."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(function):
        def call(*args, **kwargs):
            made = function(*args, **kwargs)
            if made.dtype == torch.bool:
                return made.fill_(True)
            floating = made.is_floating_point() or made.is_complex()
            return made.fill_(float("nan") if floating else torch.iinfo(made.dtype).min)

        return call

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
