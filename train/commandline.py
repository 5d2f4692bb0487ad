"""The command line of `speedrun.py`: a preset, then `--section.field value`; read before torch is imported."""

import io
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, fields, is_dataclass
from itertools import takewhile
from typing import Annotated, Any, TypeVar, get_type_hints

from prx_model.ranges import Range, check_ranges, ranges
from train.errors import UserError, nearest
from train.recipes import PRESETS, Recipe, TwoStages
from train.shown import address

Options = TypeVar("Options")

USAGE = """usage: speedrun.py [preset] [--section.field value ...]

Trains a text-to-image model, draws it and says how well it follows its prompts.
"""


@dataclass(frozen=True)
class DryRun:
    """What `--dry-run` prints a projection for."""

    enabled: bool = False
    gpus: Annotated[int, Range(1, 10_000_000)] = 32
    mfu: Annotated[float | None, Range(0, 1, above=True)] = None
    """Assumed in the place of a counted step; where there is none, 0.25 unless given."""
    peak_tflops: Annotated[float, Range(0, 1_000_000, above=True)] = 989.0
    dollars_per_hour: Annotated[float, Range(0, 1_000_000, above=True)] = 2.0


@dataclass(frozen=True)
class Command:
    """A parsed command line."""

    recipe: Recipe | TwoStages
    dry_run: DryRun
    force: bool = False
    """Go on with a run in spite of other settings or data."""


def parse(arguments: Sequence[str]) -> Command:
    """Read the words behind `speedrun.py`.

    Raises:
        UserError: an unknown preset or field (with the nearest name), or a value that does not fit its field.
        SystemExit: `--help` was asked for (code 0).
    """
    words = list(arguments)
    preset = "shapes"
    if words and not words[0].startswith("-"):
        preset = words.pop(0)
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}{nearest(preset, PRESETS)}; there are {', '.join(PRESETS)}")
    words, dry_run = _take_dry_run(_spell_profile(words), 32 if preset.startswith("prx-") else 1)
    force = "--force" in words
    words = [word for word in words if word != "--force"]
    recipe = PRESETS[preset]()
    if "--help" in words or "-h" in words:
        _print_presets()
    else:
        _check_names(words, recipe)
    return Command(_parse_fields(_without_ingredients(words, recipe), recipe, preset), dry_run, force)


def precompute_command(recipe: Recipe) -> str:
    """What a user types to write the text cache of a recipe: its data and text fields that the preset does not have."""
    usual = PRESETS[recipe.preset]()
    words = ["python", "train/precompute_text.py", recipe.preset]
    for section in ("data", "text"):
        for item in fields(getattr(recipe, section)):
            value = getattr(getattr(recipe, section), item.name)
            if value != getattr(getattr(usual, section), item.name):
                name = item.name.replace("_", "-")
                if isinstance(value, bool):
                    words.append(f"--{section}.{name if value else f'no-{name}'}")
                    continue
                listed = value if isinstance(value, tuple) else (value,)
                words += [f"--{section}.{name}", *map(str, listed)]
    return address(shlex.join(words))


def field_names(settings: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of all leaf fields of a dataclass."""
    for item in fields(settings):
        value = getattr(settings, item.name)
        if is_dataclass(value):
            yield from field_names(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}"


def ingredients(recipe: Recipe | TwoStages) -> dict[str, list[str]]:
    """Ingredients that are switched on and off, and the section of each: one, or one a stage."""
    stages = {"": recipe} if isinstance(recipe, Recipe) else {"stage1.": recipe.stage1, "stage2.": recipe.stage2}
    found: dict[str, list[str]] = {}
    for prefix, stage in stages.items():
        for item in fields(stage):
            if isinstance(getattr(getattr(stage, item.name), "enabled", None), bool):
                found.setdefault(item.name, []).append(f"{prefix}{item.name}")
    return found


def _spell_profile(words: list[str]) -> list[str]:
    """Write `--profile steps=10:15` out as `--profile.steps 10:15`."""
    spelt = list(words)
    for i, word in enumerate(words[1:], start=1):
        if words[i - 1] == "--profile" and word.startswith("steps="):
            spelt[i - 1 : i + 1] = ["--profile.steps", word.removeprefix("steps=")]
    return spelt


def _without_ingredients(words: list[str], recipe: Recipe | TwoStages) -> list[str]:
    """Write `--no-routing` out as `--routing.no-enabled`, of both stages where there are two."""
    short = {f"--no-{name}": sections for name, sections in ingredients(recipe).items()}
    return [
        full
        for word in words
        for full in ([f"--{name}.no-enabled" for name in short.get(word.replace("_", "-"), [])] or [word])
    ]


def read_options(kind: type[Options], **settings: Any) -> Options:
    """What `tyro.cli` makes of the command line, with `settings` for it.

    Raises:
        UserError: arguments that cannot be read.
    """
    import tyro

    printed = io.StringIO()
    try:
        with redirect_stderr(printed), _shown_ranges(kind):
            found = tyro.cli(kind, **settings)
        check_ranges(found)
        return found
    except ValueError as error:
        raise UserError(str(error)) from None
    except SystemExit as left:
        if not left.code:
            raise
        raise UserError(_one_sentence(printed.getvalue())) from None


@contextmanager
def _shown_ranges(kind: type) -> Iterator[None]:
    """Within this context `--help` says the range of each number beside its type."""
    import tyro

    before: list[tuple[Any, dict[str, Any]]] = []
    waiting = [kind]
    while waiting:
        section = waiting.pop()
        hints, allowed = get_type_hints(section, include_extras=True), ranges(section)
        waiting += [hint for hint in hints.values() if is_dataclass(hint) and isinstance(hint, type)]
        before.append((section, dict(section.__annotations__)))
        for name, bounds in allowed.items():
            bare = get_type_hints(section)[name]
            # Tuples and what may be None keep tyro's own words, which say how many numbers there are.
            if bare in (int, float):
                words = f"{bare.__name__.upper()} {bounds.interval()}"
                section.__annotations__[name] = Annotated[bare, bounds, tyro.conf.arg(metavar=words)]
    try:
        yield
    finally:
        for section, annotations in before:
            section.__annotations__.clear()
            section.__annotations__.update(annotations)


def _parse_fields(words: list[str], recipe: Recipe | TwoStages, preset: str) -> Recipe | TwoStages:
    parsed = read_options(type(recipe), args=words, default=recipe, prog=f"speedrun.py {preset}", description="")
    if parsed.preset != preset:
        raise UserError(f"--preset cannot be set: the preset is the first word, as in 'speedrun.py {parsed.preset}'")
    return parsed


def _one_sentence(box: str) -> str:
    """tyro's framed message as one line: its first paragraph, without the frame and the title."""
    lines = [line.strip("│ ") for line in box.splitlines() if line.startswith("│")]
    paragraph = list(takewhile(lambda line: not line.startswith("──"), lines))
    return " ".join(line for line in paragraph if line) or "the arguments cannot be read; --help lists all fields"


def _check_names(words: list[str], recipe: Recipe | TwoStages) -> None:
    """Refuse an unknown `--name` with the nearest one; tyro checks the values."""
    known = set(field_names(recipe))
    switches = {f"no-{name}" for name in ingredients(recipe)}
    for word in words:
        if not word.startswith("--"):
            continue
        name, equals, _ = word[2:].partition("=")
        if name.replace("_", "-") in switches:
            if equals:
                raise UserError(f"--{name} takes no value, got {word}")
            continue
        name = name.replace("-", "_")
        head, _, leaf = name.rpartition(".")
        positive = f"{head}.{leaf.removeprefix('no_')}" if head else leaf.removeprefix("no_")
        if name not in known and positive not in known:
            close = nearest(name.replace("_", "-"), switches) if name.startswith("no_") else nearest(name, known)
            raise UserError(f"unknown field --{word[2:]}{close}; --help lists all fields")


def _take_dry_run(words: list[str], gpus: int) -> tuple[list[str], DryRun]:
    """Take `--dry-run` and its numbers out of the words; so many GPUs unless it says how many."""
    rest: list[str] = []
    found: dict[str, Any] = {}
    kinds = {"gpus": int, "mfu": float, "peak_tflops": float, "dollars_per_hour": float}
    position = 0
    while position < len(words):
        name, equals, value = words[position].removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if words[position] in ("--dry-run", "--dry_run"):
            found["enabled"] = True
        elif words[position].startswith("--") and name in kinds:
            if not equals:
                position += 1
                value = words[position] if position < len(words) else ""
            try:
                found[name] = kinds[name](value)
            except (ValueError, OverflowError):
                raise UserError(f"--{name.replace('_', '-')} takes a number, got {value!r}") from None
            if problem := ranges(DryRun)[name].problem(found[name]):
                raise UserError(f"--{name.replace('_', '-')} {problem}")
        else:
            rest.append(words[position])
        position += 1
    if found and "enabled" not in found:
        raise UserError(f"--{next(iter(found)).replace('_', '-')} goes with --dry-run")
    return rest, DryRun(**({"gpus": gpus} | found))


def _print_presets() -> None:
    print(USAGE)
    print("presets:")
    for name, function in PRESETS.items():
        print(f"  {name:12} {(function.__doc__ or '').strip().splitlines()[0]}")
    print(
        "\n--no-routing, --no-repa, --no-lpips, --no-pdino and --no-muon leave an ingredient out (both stages of two);"
    )
    print("  train/ablate.py compares such variants")
    print("\n--dry-run prints the resolved recipe, sizes, memory, FLOP and the projected hours and dollars;")
    print("  with --gpus 32 --peak-tflops 989 --dollars-per-hour 2; --mfu 0.25 assumes one, whatever is counted")
    print("\n--force goes on with a run whose settings or data have changed, with a warning\n")
    sys.stdout.flush()
