"""Forward, backward, or both of a function, as something that can be checked and timed.

The same three forms serve the timed function, its peers and the reference, so that all do the same work: "forward"
records for a backward, "backward" runs a recorded graph again and again, "both" does one after the other.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch._functorch.config
from torch import Tensor

from benchmarks.clock import tensors

Which = Literal["forward", "backward", "both", "step"]
Function = Callable[..., Any]

# A compiled backward may otherwise free what the next run of the same graph needs.
torch._functorch.config.donated_buffer = False


def prepare(
    function: Function, which: Which, inputs: tuple[Any, ...], *, parameters: Sequence[Tensor] = ()
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What to run, and with which arguments.

    Args:
        function: takes `inputs`, gives a tensor or a nest of them.
        which: "forward" gives the outputs; "step" too, of a function that is a training step; "backward" the gradients
            of all floating inputs that ask for one and of `parameters`; "both" the outputs and the gradients.
        inputs: its arguments.
        parameters: tensors it also depends on.
    """
    if which in ("forward", "step"):
        return function, inputs
    wanted = [*(t for t in tensors(inputs) if t.requires_grad), *parameters]
    outputs = _differentiable(function(*inputs))
    incoming = incoming_gradients(outputs)
    if which == "backward":
        return _gradients, (outputs, wanted, incoming)

    def both(*arguments: Any) -> list[Tensor]:
        result = _differentiable(function(*arguments[0]))
        return [*result, *torch.autograd.grad(result, arguments[1], arguments[2])]

    return both, (inputs, wanted, incoming)


def incoming_gradients(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Random gradients for the outputs, the same for the same shapes whatever the dtype: both ways get these.

    A number gets 1, as a loss does.
    """
    made = []
    for i, output in enumerate(outputs):
        generator = torch.Generator(output.device).manual_seed(1000 + i)
        noise = torch.randn(output.shape, generator=generator, device=output.device)
        noise = noise if output.ndim else torch.ones_like(noise)
        # Rounded to the 16-bit format first, so that a reference in float64 is given exactly the same numbers.
        made.append(noise.to(torch.bfloat16).to(output))
    return made


def as_reference(values: Any) -> Any:
    """A copy of nested inputs with floating tensors in float64, which ask for gradients where the originals do."""
    if isinstance(values, Tensor):
        if not values.is_floating_point():
            return values
        return values.detach().double().requires_grad_(values.requires_grad)
    if isinstance(values, tuple | list):
        return type(values)(as_reference(value) for value in values)
    if isinstance(values, dict):
        return {key: as_reference(value) for key, value in values.items()}
    return values


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """`‖actual - expected‖ / ‖expected‖` in float64; infinite for another shape or anything not finite."""
    if actual.shape != expected.shape:
        return float("inf")
    a, e = actual.detach().double(), expected.detach().double().to(actual.device)
    error, norm = (a - e).norm(), e.norm()
    ratio = float(error / norm) if norm > 0 else float(error)
    return ratio if ratio == ratio else float("inf")


def _gradients(outputs: list[Tensor], wanted: list[Tensor], incoming: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, wanted, incoming, retain_graph=True)


def _differentiable(result: Any) -> list[Tensor]:
    return [t for t in tensors(result) if t.requires_grad]
