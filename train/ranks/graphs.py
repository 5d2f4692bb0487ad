"""Which graphs are compiled: every call of a block, or of a teacher's network, has one of a few forms, a graph each.

A form says which sizes differ from call to call; every other size is a number in its graph. Those of a block:

| form | numbers | symbols |
|---|---|---|
| training at the preset's own size: dense, routed | batch, image tokens | text tokens |
| training at the other buckets' sizes: dense, routed | batch | image tokens, text tokens |
| evaluation and sampling: dense, and routed for self-guidance | | batch, image tokens, text tokens |

`block_forms` counts them for a recipe (train/README.md has the table), whatever lengths, batches and sizes come by.

Text tokens are free: Inductor's kernels of a block move the same bytes with them as a symbol (counted for sm_90 at
512 px x 32). Image tokens are not quite: 0.9 % more. That is worth a graph for the size that most steps have, and not
one for each token count of 13 or 27 buckets: such a graph takes ten seconds or more to make and saves 0.05 ms a step.

A size that is a symbol must not be 1, which is always a number: such calls (a last picture alone in an evaluation) run
uncompiled, and captions are padded, so that a step without captions is none. Where image tokens are a symbol there are
two graphs: kernels of attention ask whether keys are a multiple of eight.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor

from prx_kernels import kept_tokens
from prx_model.teachers import PerceptualDINO, Teacher
from train.recipes import Compile, Recipe

BACKEND = "inductor"
"""torch.compile's."""
KEYS_STEP = 8
"""Of how many keys attention kernels on CUDA want a multiple (`preprocess_mask` in torch's attention.cpp)."""
_numbers = count()


@dataclass(frozen=True)
class Form:
    """What the calls of one graph have in common."""

    name: str
    symbols: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Dimensions that differ from call to call, by the number of the argument."""


class Graphs:
    """Functions of one kind, compiled with a graph for each form; those of one model share their graphs.

    Past the limit, which only something unforeseen can bring about, calls that no graph fits run uncompiled: with one
    warning, and the others as before.

    Args:
        kind: what is compiled, in logs and messages.
        form_of: the form of a call from its arguments; None where it is to run uncompiled.
        most: how many forms there are.
        whole: refuse a function that is no single graph; otherwise torch compiles it in parts.
    """

    def __init__(self, kind: str, form_of: Callable[..., Form | None], most: int, *, whole: bool = True) -> None:
        import torch._dynamo.config as dynamo  # here: it takes seconds, which a run without graphs need not wait for

        self.kind, self.form_of, self.most, self.whole = kind, form_of, most, whole
        self.exceeded = False
        # One number for the process; never lowered, since others may count on it.
        dynamo.recompile_limit = max(dynamo.recompile_limit, most)
        # Dynamo keeps and counts graphs by code object: one of our own holds none of a stage before.
        name = f"{kind}_{next(_numbers)}".replace(" ", "_")
        self._code = _traced(print).__code__.replace(co_name=name, co_qualname=name)

    def compile(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The function as it is to be called in its place, with positional arguments."""
        traced = FunctionType(self._code, globals(), self._code.co_name, None, (CellType(forward),))
        compiled: Callable[..., Any] = torch.compile(traced, fullgraph=self.whole, dynamic=False, backend=BACKEND)

        def call(*arguments: Any) -> Any:
            form = self.form_of(*arguments)
            if form is None or any(arguments[n].shape[d] == 1 for n, dims in form.symbols.items() for d in dims):
                return forward(*arguments)
            for number, dimensions in form.symbols.items():
                torch._dynamo.maybe_mark_dynamic(arguments[number], list(dimensions))
            return self._run(compiled, forward, form.name, arguments)

        return call

    def _run(
        self, compiled: Callable[..., Any], forward: Callable[..., Any], form: str, arguments: tuple[Any, ...]
    ) -> Any:
        from torch._dynamo.exc import FailOnRecompileLimitHit

        if self.exceeded:
            with torch.compiler.set_stance("eager_on_recompile"):
                return compiled(form, *arguments)
        try:
            return compiled(form, *arguments)
        except FailOnRecompileLimitHit:  # raised before anything of the call has run
            self.exceeded = True
            warnings.warn(
                f"a {self.kind} has more graphs than the {self.most} foreseen, last in the form '{form}': calls that "
                "none fits run uncompiled from now on; TORCH_LOGS=recompiles says what differs",
                stacklevel=2,
            )
            return forward(*arguments)


def _traced(forward: Callable[..., Any]) -> Callable[..., Any]:
    """What Dynamo sees: the form is a constant of the graph, so that no call meets the graph of another form."""

    def call(form: str, *arguments: Any) -> Any:
        assert form  # looked at: a graph does not depend on what it does not use
        return forward(*arguments)

    return call


def compiles(settings: Compile, device: torch.device) -> bool:
    """Whether to compile on this device."""
    return settings.enabled == "yes" or (settings.enabled == "auto" and device.type == "cuda")


# --- blocks ----------------------------------------------------------------------------------------------------------


def block_graphs(recipe: Recipe, device: torch.device) -> Graphs | None:
    """The graphs that a recipe's blocks share; None where they are not compiled."""
    if not compiles(recipe.compile, device):
        return None
    own = own_tokens(recipe)
    return Graphs("block", lambda *arguments: block_form(own, *arguments), block_forms(recipe))


def block_forms(recipe: Recipe) -> int:
    """How many graphs a recipe's blocks have at most: training, evaluation and sampling together."""
    sizes = 2 if recipe.data.buckets else 0  # other sizes, with keys a multiple of eight or not
    training = (1 + sizes) * (2 if recipe.routing.enabled else 1)
    return training + max(1, sizes) + (recipe.sampling.guidance_kind == "self")


def own_tokens(recipe: Recipe) -> frozenset[int]:
    """Image tokens in blocks at data.height x data.width: all, and those that are kept."""
    tokens = recipe.model.tokens(recipe.data.height, recipe.data.width)
    return frozenset(
        {tokens, kept_tokens(tokens, recipe.routing.selection_ratio)} if recipe.routing.enabled else {tokens}
    )


def block_form(
    own: frozenset[int],
    x: Tensor,
    text: Tensor,
    temb: Tensor,
    rotary: Tensor,
    mask: Tensor | None = None,
    places: Tensor | None = None,
) -> Form:
    """The form of a call of `PRXBlock.forward`, where `own` are image tokens to be numbers in a graph."""
    symbols: dict[int, tuple[int, ...]] = {1: (1,)} if places is None else {1: (0,), 5: (0,)}
    symbols |= {} if mask is None else {4: (1,)}
    training, routed = torch.is_grad_enabled(), rotary.shape[0] > 1
    if training and x.shape[1] in own:
        return Form(f"training with {x.shape[1]} image tokens", symbols)
    keys = x.shape[1] + (text if mask is None else mask).shape[1]
    name = f"{'routed' if routed else 'dense'}, keys {'in' if keys % KEYS_STEP == 0 else 'not in'} eights"
    if training:
        return Form(f"training, other sizes, {name}", symbols | {0: (1,), 3: (1,)})
    symbols |= {0: (0, 1), 3: (0, 1) if routed else (1,)}
    symbols |= {1: (0, 1)} if places is None else {}
    symbols |= {} if mask is None else {4: (0, 1)}
    symbols |= {2: (0,)} if temb.shape[0] > 1 else {}
    return Form(f"evaluation, {name}, {'a time each' if temb.shape[0] > 1 else 'one time'}", symbols)


# --- teachers --------------------------------------------------------------------------------------------------------


def compile_teachers(teachers: Mapping[str, Teacher], recipe: Recipe, device: torch.device) -> None:
    """Compile the frozen networks in place, where blocks are compiled."""
    if compiles(recipe.compile, device):
        for name, teacher in teachers.items():
            teacher.wrap_network(teacher_graphs(name, teacher, recipe).compile)


def teacher_graphs(name: str, teacher: Teacher, recipe: Recipe) -> Graphs:
    """The graphs of a teacher's network: at the preset's own size and, with buckets, one for all other sizes.

    P-DINO sees squares of one size, with a gradient and without. Where samples are left out by t the batch is a symbol.
    """
    data = recipe.data
    own = teacher.input_size(data.height, data.width, recipe.model.patch_size)
    some = getattr(getattr(recipe, name), "t_max", 1.0) < 1.0

    def form_of(image: Tensor, *others: Tensor) -> Form:
        symbols: dict[int, tuple[int, ...]] = {}
        for number, argument in enumerate((image, *others)):
            # Pictures (batch, 3, height, width), or a table with a row for each patch of their grid.
            sizes = () if tuple(image.shape[2:]) == own else (2, 3) if argument.ndim == 4 else (0,)
            dimensions = ((0,) if some and argument.ndim == 4 else ()) + sizes
            symbols |= {number: dimensions} if dimensions else {}
        size = "own size" if tuple(image.shape[2:]) == own else "other sizes"
        return Form(f"{size}, {'with' if image.requires_grad else 'no'} gradient", symbols)

    forms = 2 if data.buckets or isinstance(teacher, PerceptualDINO) else 1
    return Graphs(f"teacher {name}", form_of, forms, whole=False)
