"""What there is to prepare: sources, and the units of work that their rows are cut into, the same on every machine."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.data.formats.storage import Storage
from train.data.index import open_images
from train.data.preparing.filters import Filter
from train.data.preparing.pictures import Source
from train.data.preparing.settings import Prepare
from train.data.preparing.shards import temporary
from train.data.rows import SPLITS, NoSplitError, no_column
from train.errors import UserError
from train.shown import address
from train.side_files import parse_json

MANIFEST = "manifest.json"
WORK = ".work"
_VERSION = 1
"""Of the shards and the manifest."""


@dataclass(frozen=True)
class Unit:
    """Rows `first` … `end` - 1 of a source, which become one shard of each size."""

    number: int
    source: int
    first: int
    end: int


@dataclass(frozen=True)
class Plan:
    """Everything that a worker needs; picklable."""

    settings: Prepare
    sources: tuple[Source, ...]
    units: tuple[Unit, ...]

    @property
    def out(self) -> Path:
        return Path(self.settings.out)

    @property
    def work(self) -> Path:
        """Where everything lies that is not finished."""
        return self.out / WORK

    def shard(self, unit: Unit) -> str:
        """Name of a unit's shards."""
        return f"{self.sources[unit.source].split}-{unit.number:06d}.parquet"

    def draft(self, unit: Unit, side: int) -> Path:
        """A shard whose duplicates are still in it."""
        return self.work / "drafts" / str(side) / self.shard(unit)

    def record(self, unit: Unit) -> Path:
        """What is known of a unit's rows; it is there when its drafts are."""
        return self.work / "units" / f"{unit.number:06d}.npz"

    def settled(self, unit: Unit) -> Path:
        """What is known of a unit's shards; it is there when they are in their places."""
        return self.work / "settled" / f"{unit.number:06d}.json"

    def claim(self, unit: Unit) -> Path:
        return self.work / "claims" / f"{unit.number:06d}"

    def content(self) -> dict[str, Any]:
        """What decides about the bytes that are written, as plain values."""
        sources = [
            {"name": s.name, "split": s.split, "rows": len(s.index), "fingerprint": s.index.fingerprint}
            for s in self.sources
        ]
        told: dict[str, Any] = json.loads(json.dumps(self.settings.content()))
        return {"version": _VERSION, "settings": told, "sources": sources}


def make_plan(paths: Sequence[str], settings: Prepare) -> Plan:
    """Open the sources and cut them into units.

    Raises:
        UserError: sources that cannot be read or lack a column, or settings that do not fit.
    """
    if not settings.sizes or len(set(settings.sizes)) < len(settings.sizes):
        raise UserError(f"--sizes takes one or more sides, each once, got {' '.join(map(str, settings.sizes))}")
    for side in settings.sizes:
        if side % settings.patch:
            raise UserError(f"--sizes {side} is no multiple of --patch {settings.patch}")
    taken = {"image", "width", "height", "key", "source", "caption", "caption_column", "split"}
    if clash := sorted(taken & set(settings.keep_columns)):
        raise UserError(f"--keep-columns {clash[0]}: a shard has a column of this name; leave it out")
    condition = Filter(settings.filter) if settings.filter else None
    names = _names(paths)
    sources = [source for path, name in zip(paths, names, strict=True) for source in _splits(path, name, settings)]
    for source in sources:
        if condition is not None:
            condition.check_columns(source.index.columns, address(source.index.path))
    for column in settings.keep_columns:
        if not any(column in source.index.columns for source in sources):
            raise no_column(address(sources[0].index.path), column, "--keep-columns", sources[0].index.columns)
    units: list[Unit] = []
    for number, source in enumerate(sources):
        for first in range(0, len(source.index), settings.rows):
            units.append(Unit(len(units), number, first, min(first + settings.rows, len(source.index))))
    return Plan(settings, tuple(sources), tuple(units))


def begin(plan: Plan) -> bool:
    """Make the folder for a plan, or find that it was begun with the same one; whether there is something to do.

    Raises:
        UserError: the folder holds something else, or was begun with other settings or data.
    """
    content = plan.content()
    for file in (plan.out / MANIFEST, plan.work / "plan.json"):
        with suppress(FileNotFoundError):
            _check_same(file, content)
            return file.name != MANIFEST
    if plan.out.exists() and any(entry.name != WORK for entry in plan.out.iterdir()):
        raise UserError(f"{plan.out} is not empty and was not begun by prepare.py; give another folder with --out")
    for folder in ("drafts", "units", "settled", "claims"):
        (plan.work / folder).mkdir(parents=True, exist_ok=True)
    written = temporary(plan.work / "plan.json")
    written.write_text(json.dumps(content, indent=1))
    with suppress(FileExistsError):
        os.link(written, plan.work / "plan.json")
    written.unlink()
    _check_same(plan.work / "plan.json", content)
    return True


def _splits(path: str, name: str, settings: Prepare) -> list[Source]:
    found: list[Source] = []
    nothing: NoSplitError | None = None
    for split in dict.fromkeys(SPLITS.values()):
        try:
            index = open_images(
                path,
                image_column=settings.image_column,
                caption_columns=(),
                split=split,
                storage=Storage(settings.timeout, settings.tries),
                cache=Path(settings.index_cache) if settings.index_cache else None,
            )
        except NoSplitError as error:
            nothing = nothing or error
            continue
        captions = tuple(column for column in settings.caption_columns if column in index.columns)
        if not captions:
            first = (*settings.caption_columns, "caption")[0]
            raise no_column(address(path), first, "--caption-columns", index.columns)
        key = settings.key_column if settings.key_column in index.columns else ""
        found.append(Source(name, split, index, captions, key))
    if not found and nothing is not None:
        raise nothing
    return found


def _names(paths: Sequence[str]) -> list[str]:
    """A short name of each source, which is part of no two: its last folders, as many as are needed."""
    if not paths:
        raise UserError("give at least one source, as in prepare.py FOLDER --out DEST")
    if len(set(paths)) < len(paths):
        raise UserError("a source is given twice; give each once")
    parts = [address(path).rstrip("/").split("/") for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{number} {address(path)}" for number, path in enumerate(paths)]


def _check_same(file: Path, content: dict[str, Any]) -> None:
    try:
        found = parse_json(file.read_bytes())
        before, now = ({**c["settings"], "sources": c["sources"], "version": c["version"]} for c in (found, content))
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} cannot be read; give another folder with --out") from None
    for name in now:
        if before.get(name) != now[name]:
            if name == "sources":
                raise UserError(
                    f"{file.parents[file.name != MANIFEST]} was begun with other data: {_sources(before[name])}, "
                    f"and now there are {_sources(now[name])}; give another folder with --out"
                )
            raise UserError(
                f"{file.parents[file.name != MANIFEST]} was begun with --{name.replace('_', '-')} {before.get(name)}, "
                f"and now it is {now[name]}; give the same, or another folder with --out"
            )


def _sources(listed: Any) -> str:
    try:
        return ", ".join(f"{s['name']} ({s['split']}, {s['rows']:,} rows, {s['fingerprint'][:8]})" for s in listed)
    except (TypeError, KeyError, ValueError):
        return "something that cannot be read"
