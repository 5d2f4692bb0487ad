"""The proof of a route: the dense model against all tokens routed in random order, and the cure where they differ."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .arguments import Table
from .entries import Where
from .passage import Passage, Stop, pick
from .state import routes
from .suspects import Suspect, call, is_ours, named, skipped, suspects, written

TRIALS = 24  # at most, of calls that may be right
# Of the largest value, for sums in another order. A route that is wrong by less than this is not found in half
# precision; what was tried is off by 1e-2 and more.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
COARSE = 5e-2
CLEARLY = 0.1  # of the difference that is left where a table is named rightly; rounding alone leaves it as it is
# Of the largest gradient: smaller ones are compared with this. Some are zero but for rounding, such as that of a key's
# bias, which no softmax sees.
FAINT = 1e-2


@dataclass
class Observed:
    """What one call of the model gave: its output, the stream in front of and behind the route, and gradients."""

    out: Tensor
    stream: Tensor | None = None
    gradients: dict[str, Tensor] = field(default_factory=dict)
    without: str = ""  # why there are no gradients
    found: list[Suspect] = field(default_factory=list)


def verify(route: Passage, run: Callable[[], Tensor]) -> str:
    """As `Route.verify`."""
    stance = torch.compiler.set_stance("force_eager")  # many forms, each of a few calls
    with stance, _prepared(route, _others(route, run)):
        dense = _observe(route, run, routed=False)
        again = _observe(route, run, routed=False, gradients=False)
        if _apart(dense, again) > _tolerance(dense):
            raise RuntimeError(
                "run() gives other values when it is called again with the same random numbers: a random number from "
                "elsewhere, or a state that it changes?"
            )
        error: Exception | None = None
        try:
            routed = _observe(route, run, routed=True)
        except Exception as failure:  # a size that does not fit: what was forgotten says its shape
            error = failure
        else:
            if dense.stream is None and route.now.keep is None:
                raise RuntimeError("run() did not call the routed blocks")
            apart = _apart(dense, routed)
            if apart <= _tolerance(dense) and not _hidden(route, run, dense, apart):
                _run_half(route, run)
                return _sentence(route, dense, routed, apart)
        raise ValueError(_diagnosis(route, run, dense, error, 0.0 if error else apart)) from error


def _hidden(route: Passage, run: Callable[[], Tensor], dense: Observed, apart: float) -> bool:
    """Whether a table that is not named hides below the tolerance: naming it brings the two much closer.

    Attention that is nearly even feels positions little, and without gradients nothing else shows them.
    """
    certain = replace(dense, found=[s for s in dense.found if s.certain and not s.more])
    return any(trial < CLEARLY * apart for _, _, trial in _trials(route, run, certain))


def _sentence(route: Passage, dense: Observed, routed: Observed, apart: float) -> str:
    gradients = f"outputs and {len(dense.gradients)} gradients" if dense.gradients else "outputs"
    without = f" (no gradients: {dense.without})" if dense.without else ""
    tokens = routed.stream.shape[1] if routed.stream is not None else "all"
    return (
        f"Blocks {route.start} to {route.end} give the dense model's {gradients} with {tokens} tokens in random order: "
        f"at most {apart:.1e} of the largest value apart{without}."
    )


# --- the cure ----------------------------------------------------------------------------------------------------


def _diagnosis(
    route: Passage, run: Callable[[], Tensor], dense: Observed, error: Exception | None, apart: float
) -> str:
    if error is not None:
        said = f"the route fails with all tokens in random order ({(str(error).splitlines() or [''])[0]})"
    else:
        said = f"the route changes the model: with all tokens in random order it is off by {apart:.1e} of its values"
    limit = min(_tolerance(dense), CLEARLY * apart) if error is None else _tolerance(dense)
    for tables, shared, trial in _trials(route, run, dense):
        if trial <= limit:
            kinds = [f"{s.name!r}" for s in dense.found if s.name in tables]
            harmless = {s.name: None for s in dense.found if s.certain and not s.more and s.name not in tables}
            whole = written(tables | harmless, shared or route.shared)
            return f"{said}. Entries of tokens are in {', '.join(dict.fromkeys(kinds))}. Write (tried): {whole}"
    if dense.found:
        return (
            f"{said}. These have an entry for each token, but naming them is not all that is missing: "
            f"{'; '.join(map(str, dense.found))}. Try {call(dense.found)}{skipped(dense.found)}"
        )
    if error is not None and is_ours(error):
        return said
    return (
        f"{said}, and no argument or tensor of the blocks has an entry for each token. The blocks make positions from "
        "the number of tokens, or mix neighbours: give them their positions as an argument, which per_token can name"
    )


def _trials(
    route: Passage, run: Callable[[], Tensor], dense: Observed
) -> Iterator[tuple[dict[str, Where], bool, float]]:
    """Calls that may be right, and how far each leaves the routed model from the dense one."""
    for tables, shared in itertools.islice(_cures(dense.found), TRIALS):
        with _named(route, tables, shared):
            try:
                trial = _observe(route, run, routed=True)
                if _apart(dense, trial) <= _tolerance(dense):
                    _run_half(route, run, checked=True)
            except Exception:
                continue
        yield tables, shared, _apart(dense, trial)


def _cures(found: list[Suspect]) -> Iterator[tuple[dict[str, Where], bool]]:
    """What may be missing, the likely first: all that is certain, then fewer and more."""
    names = list(dict.fromkeys(s.name for s in found))
    certain = [name for name in names if any(s.certain for s in found if s.name == name)]
    sets = [certain, names] + [[*c] for n in range(1, len(names)) for c in itertools.combinations(names, n)]
    seen = []
    for chosen in sets:
        if not chosen or chosen in seen:
            continue
        seen.append(chosen)
        members = [s for s in found if s.name in chosen]
        for ahead in (True, False) if any(s.more for s in members) else (True,):
            for one in (False, True) if any(len(s.dims) > 1 for s in members) else (False,):
                chosen_dims = [replace(s, dims=s.dims[:1]) if one else s for s in members]  # as many features as tokens
                shared = any(not s.batched for s in members)
                yield named(chosen_dims, ahead), shared
                if not shared:
                    yield named(chosen_dims, ahead), True


@contextlib.contextmanager
def _named(route: Passage, tables: dict[str, Where], shared: bool) -> Iterator[None]:
    before, kept = route.shared, {}
    for block, stop in _stops(route):
        kept[stop] = stop.places
        try:
            more = tuple(Table.find(block, name, where) for name, where in tables.items())
        except ValueError:  # another kind of block, that does not take it
            more = ()
        stop.places = replace(stop.places, tables=(*stop.places.tables, *more))
    route.shared = before or shared
    try:
        yield
    finally:
        route.shared = before
        for stop, places in kept.items():
            stop.places = places


def _run_half(route: Passage, run: Callable[[], Tensor], checked: bool = False) -> None:
    """run() with half of the tokens, as in training: what is right for all of them may not fit some.

    Raises what the model raises, and unless `checked`, what the first routed forward says of arguments.
    """
    kept = route._ratio, route._fixed, route.force_keep, route.score
    before = {stop: stop.checked for _, stop in _stops(route)}
    try:
        route.order_only, route.enabled = False, True
        route._ratio, route._fixed, route.force_keep, route.score = "0.5", None, None, None
        for stop in before if checked else ():
            stop.checked = True
        with torch.random.fork_rng(devices=_devices(route)):
            torch.manual_seed(0)
            run()
    finally:
        route.order_only = True
        route._ratio, route._fixed, route.force_keep, route.score = kept
        for stop, value in before.items():
            stop.checked = value


# --- one call of the model ---------------------------------------------------------------------------------------


def _others(route: Passage, run: Callable[[], Tensor]) -> set[Passage]:
    """The other routes over these blocks, and those over other blocks that run() leads through in this thread."""
    over = {stop.route for block in route._blocks for stop in block._routes}  # type: ignore[union-attr]
    enabled = {r: r.enabled for r in over}
    before = {r: r._here.now.forward for r in routes() if isinstance(r, Passage)}
    try:
        for r in over:
            r.enabled = False
        with torch.random.fork_rng(devices=_devices(route)):
            run()
    finally:
        for r, value in enabled.items():
            r.enabled = value
    elsewhere = {r for r, forward in before.items() if r._here.now.forward is not forward}
    return (over | elsewhere) - {route}


@contextlib.contextmanager
def _prepared(route: Passage, others: set[Passage]) -> Iterator[None]:
    """No dropout, no zeros that hide a block, no other route; all as before afterwards."""
    modules = [m for block in route._blocks for m in block.modules()]
    modes = [m.training for m in modules]
    names = ("in_eval", "enabled", "_dense", "_phased", "order_only")
    kept = {r: {name: getattr(r, name) for name in names} for r in (route, *others)}
    now = {r: r.now.keep for r in (route, *others)}
    zeros = [p for block in route._blocks for p in block.parameters() if p.numel() and not p.detach().any()]
    try:
        for module in modules:
            module.training = False
        for other in others:
            other.enabled = False
        route.in_eval, route._dense, route._phased, route.order_only = True, False, False, True
        with torch.no_grad(), torch.random.fork_rng(devices=_devices(route)):
            torch.manual_seed(1)
            for p in zeros:
                p.normal_(std=0.2)
        yield
    finally:
        route.watch = None
        with torch.no_grad():
            for p in zeros:
                p.zero_()
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for r, values in kept.items():
            for name, value in values.items():
                setattr(r, name, value)
            r.forget()
            r._here.now.keep = r._latest.keep = now[r]


def _observe(route: Passage, run: Callable[[], Tensor], *, routed: bool, gradients: bool = True) -> Observed:
    seen: dict[str, Any] = {"found": []}
    route.enabled, route.watch = routed, None if routed and not gradients else _watcher(route, seen, routed)
    with torch.random.fork_rng(devices=_devices(route)):
        torch.manual_seed(0)
        out = run()
    route.watch = None
    if not isinstance(out, Tensor):
        raise TypeError(f"run must return a tensor, got a {type(out).__name__}")
    made = Observed(out.detach(), found=seen["found"])
    stream = seen.get("stream")
    made.stream = None if stream is None else stream.detach()
    if gradients:
        _differentiate(route, made, out, seen)
    return made


def _watcher(route: Passage, seen: dict[str, Any], routed: bool) -> Callable[..., None]:
    def watch(stop: Stop, block: Any, args: Any, kwargs: Any, result: Any) -> None:
        if result is not None:
            if stop.last:
                seen["stream"] = pick(result, stop.places.out)
            return
        if stop.first:
            seen["entrance"] = stop.places.tokens.read(args, kwargs)
        if not routed:
            shapes = {(s.name, s.path) for s in seen["found"]}
            entrance = seen.get("entrance")
            if isinstance(entrance, Tensor) and entrance.ndim == 3:
                new = suspects(stop, block, args, kwargs, tokens=entrance.shape[1])
                seen["found"] += [s for s in new if (s.name, s.path) not in shapes]

    return watch


def _differentiate(route: Passage, made: Observed, out: Tensor, seen: dict[str, Any]) -> None:
    """Gradients of a random sum of the output and of the stream behind the route, which no final layer can hide."""
    parts = [t for t in (out, seen.get("stream")) if isinstance(t, Tensor) and t.requires_grad]
    if not parts:
        made.without = "run() recorded none"
        return
    wanted: dict[str, Tensor] = {
        f"{i}.{n}": p for i, b in enumerate(route._blocks) for n, p in b.named_parameters() if p.requires_grad
    }
    entrance = seen.get("entrance")
    if isinstance(entrance, Tensor) and entrance.requires_grad:
        wanted["what enters the route"] = entrance
    loss = sum(_weighted(part, i) for i, part in enumerate(parts))
    try:
        grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)  # type: ignore[arg-type]
    except (RuntimeError, IndexError) as failure:
        if "heckpoint" not in str(failure):
            raise
        made.without = "reentrant checkpoints give none to torch.autograd.grad"
        return
    made.gradients = {name: g for name, g in zip(wanted, grads, strict=True) if g is not None}


def _weighted(t: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    wide = t.to(torch.float64 if t.dtype == torch.float64 else torch.float32)
    weights = torch.randn(t.shape, generator=generator, dtype=wide.dtype).to(t.device)
    total: Tensor = (wide * weights).sum() / float(t.numel()) ** 0.5
    return total


def _apart(one: Observed, other: Observed) -> float:
    """The largest difference, of the largest value of each tensor."""
    found = [_difference(one.out, other.out)]
    if one.stream is not None and other.stream is not None:
        found.append(_difference(one.stream, other.stream))
    if other.gradients:
        largest = max((float(g.abs().max()) for g in one.gradients.values() if g.numel()), default=0.0)
        for name, gradient in one.gradients.items():
            found.append(_difference(gradient, other.gradients.get(name, torch.zeros_like(gradient)), FAINT * largest))
    return max(found)


def _difference(a: Tensor, b: Tensor, least: float = 0.0) -> float:
    """Of the largest value, or of `least` where no value is as large."""
    if a.shape != b.shape:
        return float("inf")
    scale = max(float(a.abs().max()), least) if a.numel() else 0.0
    apart = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
    return apart / scale if scale > 0 else apart


def _tolerance(dense: Observed) -> float:
    dtypes = [t.dtype for t in (dense.out, dense.stream) if t is not None]
    coarse = dense.out.is_cuda and torch.get_float32_matmul_precision() != "highest"
    return COARSE if coarse else max(TOLERANCE.get(dtype, COARSE) for dtype in dtypes)


def _devices(route: Passage) -> list[torch.device]:
    return list({p.device for b in route._blocks for p in b.parameters() if p.is_cuda})


def _stops(route: Passage) -> Iterator[tuple[Any, Stop]]:
    for block in route._blocks:
        yield from ((block, stop) for stop in block.__dict__["_routes"] if stop.route is route)
