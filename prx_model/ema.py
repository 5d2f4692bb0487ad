"""Exponential moving average of weights: a list of float32 tensors beside the parameters, not a second model.

Works on plain and sharded (DTensor) parameters alike: a sharded model cannot be deep-copied.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .wrappers import unwrapped


class EMA:
    """`average ← decay·average + (1-decay)·weight`, every `every` steps.

    Args:
        parameters: (name, parameter) pairs, under names that wrappers may have added to; averaged in float32.
        decay: in [0, 1).
        every: steps between updates.
        phase: which of `every` steps moves the averages: "first" is after batches 1, every + 1, …, "last" after batches
            every, 2·every, …, as in PRX's code.
        ramp: move the n-th update (from 0) by 3/(n + 3) while that is more than 1 - decay: the average of power 2 of
            https://arxiv.org/abs/2312.02696, section 3.1, which forgets the first weights. Without it they count for
            more than a half until update 0.7/(1 - decay).

    Raises:
        ValueError: decay outside [0, 1), every < 1, or an unknown phase.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        decay: float = 0.999,
        every: int = 10,
        phase: str = "first",
        ramp: bool = False,
    ) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"ema.decay must lie in [0, 1), got {decay}")
        if every < 1:
            raise ValueError(f"ema.every must be at least 1, got {every}")
        if phase not in ("first", "last"):
            raise ValueError(f'ema.phase must be "first" or "last", got {phase!r}')
        self.decay, self.every, self.ramp = decay, every, ramp
        self.first_step = every - 1 if phase == "last" else 0
        """The first step that moves the averages, 0-based."""
        pairs = unwrapped(dict(parameters))
        self.names, self.parameters = list(pairs), list(pairs.values())
        self.averages = [parameter.detach().float().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self, step: int, taken: Tensor | None = None) -> None:
        """Move the averages after optimizer step `step` (0-based), where it is that step's turn.

        Args:
            step: of the optimizer.
            taken: 0-dim tensor on the weights' device, 0 where that step was skipped: the averages stay, bit for bit.
        """
        if step % self.every != self.first_step:
            return
        device = _local(self.averages[0]).device
        rate = torch.full((), self.rate(step), device=device)
        if taken is not None:
            rate = rate * taken.to(device, torch.float32, non_blocking=True)
        for average, parameter in zip(self.averages, self.parameters, strict=True):
            # Not foreach: its lerp takes no rate that is on the device.
            _local(average).lerp_(_local(parameter).detach().float(), rate)

    def rate(self, step: int) -> float:
        """By what share the averages move towards the weights after optimizer step `step`, where it is its turn."""
        return max(1.0 - self.decay, 3.0 / (step // self.every + 3.0)) if self.ramp else 1.0 - self.decay

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within this context the model's parameters hold the averages; afterwards the trained weights, bitwise."""
        trained = [_local(parameter).detach().clone() for parameter in self.parameters]
        self._write([_local(average) for average in self.averages])
        try:
            yield
        finally:
            self._write(trained)

    def state_dict(self) -> dict[str, Tensor]:
        """Averages by parameter name."""
        return dict(zip(self.names, self.averages, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy averages back in place.

        Raises:
            ValueError: names (but for what wrappers add) or shapes that differ from the model's.
        """
        state = unwrapped(state)
        if set(state) != set(self.names):
            odd = sorted(set(state) ^ set(self.names))
            raise ValueError(f"EMA names differ from the model's: {', '.join(odd[:5])}")
        for name, average in zip(self.names, self.averages, strict=True):
            if state[name].shape != average.shape:
                raise ValueError(
                    f"EMA of {name} has shape {tuple(state[name].shape)}, the model's is {tuple(average.shape)}"
                )
        for name, average in zip(self.names, self.averages, strict=True):
            average.copy_(state[name])

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            _local(parameter).copy_(value)


def _local(tensor: Any) -> Tensor:
    """This rank's part of a DTensor, in place; a plain tensor as it is."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part
