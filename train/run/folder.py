"""A run's folder: where its parts lie, its recipe as config.json, and what may change between two starts.

No torch here.
"""

import json
import types
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from prx_model.ranges import check_ranges
from train import shown
from train.data.settings import weight_of
from train.errors import UserError
from train.recipes import Recipe
from train.side_files import parse_json, write_whole

CONFIG = "config.json"
METRICS = "metrics.jsonl"
SAMPLES = "samples"
CHECKPOINTS = "checkpoints"
LATEST = "latest"

# Settings that do not change what is computed up to the step reached: a run may go on with other values.
_FREE = (
    "output.",
    "evaluation.",
    "checkpoint.",
    "data.path",
    "data.workers",
    "data.bad_limit",
    "data.index_cache",
    "data.timeout",
    "data.tries",
    "text.cache",
    "train.steps",
    "train.cooldown",
    "train.max_skipped",
    "parallel.",
    "profile.",
)
_FIRST = ("model.", "data.", "train.seed")
_SHOWN = 8
"""Differences that a message lists."""


class DamagedConfigError(UserError):
    """A config.json that is no JSON object: a crash has cut it, or a disk."""


def run_folder(recipe: Recipe) -> Path:
    """The folder of a recipe's run."""
    return Path(recipe.output.folder) / (recipe.output.name or recipe.preset)


def write_config(folder: Path, recipe: Recipe) -> None:
    """Write the recipe as config.json, without what addresses hold of secrets: checkpoints are shared."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / CONFIG, json.dumps(shown.settings(asdict(recipe)), indent=2) + "\n")


def read_config(folder: Path) -> Recipe:
    """Read config.json back.

    Raises:
        UserError: there is none, or it is not a recipe.
        DamagedConfigError: it is no JSON.
    """
    path = folder / CONFIG
    try:
        content = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{folder} has no {CONFIG}: it is neither a run's folder nor a checkpoint") from None
    except ValueError as error:
        raise DamagedConfigError(f"{path} is damaged: it is empty, cut or no JSON ({error})") from None
    try:
        content["text"].setdefault("clean", False)  # a run that does not say was trained before there was cleaning
        recipe = _build(Recipe, content)
        check_ranges(recipe)
        return recipe
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{path} is not a recipe of this version ({error}); start a new run with --output.name"
        ) from None


def check_same_run(folder: Path, recipe: Recipe) -> None:
    """Refuse to go on in a folder (a run's, or a checkpoint's) that was written with other settings.

    Raises:
        UserError: naming the fields that differ, model, data and seed first.
    """
    before, now = ({**dict(_flat(shown.settings(asdict(r)))), **_weights(r)} for r in (read_config(folder), recipe))
    names = [n for n in before.keys() | now.keys() if before.get(n) != now.get(n) and not n.startswith(_FREE)]
    if names:
        names.sort(key=lambda name: (not name.startswith(_FIRST), name))
        changed = [f"{name} {before.get(name)!r} -> {now.get(name)!r}" for name in names]
        listed = ", ".join(changed[:_SHOWN]) + (f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else "")
        raise UserError(
            f"{folder} holds a run with other settings ({listed}); give this one its own --output.name, "
            "start the old command again to go on, or add --force to go on all the same"
        )


def _weights(recipe: Recipe) -> dict[str, Any]:
    """The weights of a mixture, which are no part of where its data lie."""
    path = recipe.data.path
    return {} if isinstance(path, str) else {"data.weights": [weight_of(entry)[1] for entry in path]}


def check_same_data(folder: Path, path: str, before: str | None, now: str) -> None:
    """Refuse to go on from a checkpoint that was trained on other data.

    Args:
        folder: the checkpoint.
        path: where the data are now.
        before: their fingerprint in the checkpoint.
        now: their fingerprint.

    Raises:
        UserError: they differ.
    """
    if before != now:
        raise UserError(
            f"the data at {shown.address(path)} (fingerprint {now}) are not those that {folder} was trained on "
            f"({before}); give the old data, start a new run with --output.name, or add --force to go on all the same"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value


def _build(kind: Any, value: Any) -> Any:
    """Rebuild a value of a type from JSON, checking it as it is built."""
    if is_dataclass(kind) and isinstance(kind, type):
        hints = get_type_hints(kind)
        unknown = set(value) - {item.name for item in fields(kind)}
        if unknown:
            raise ValueError(f"{kind.__name__} has no field {sorted(unknown)[0]!r}")
        return kind(**{name: _build(hints[name], part) for name, part in value.items()})
    if get_origin(kind) is tuple:
        item_types = get_args(kind)
        if len(item_types) == 2 and item_types[1] is Ellipsis:
            return tuple(_build(item_types[0], part) for part in value)
        return tuple(_build(item, part) for item, part in zip(item_types, value, strict=True))
    if get_origin(kind) in (Union, types.UnionType):
        kinds = [a for a in get_args(kind) if a is not type(None)]
        fitting = next((a for a in kinds if isinstance(value, list) == (get_origin(a) is tuple)), kinds[0])
        return None if value is None else _build(fitting, value)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{value!r} is none of {get_args(kind)}")
        return value
    return kind(value)
