"""A checkpoint's folder: what lies in it, the stages of writing it, and how it is checked. No ranks here.

    step-00000500/
      model.rank00000.safetensors …   slices of tensors, a file a section and rank; where each belongs is in its header
      config.json  state.json         the run's recipe; step, format and what the loop wants to know again
      manifest.json                   size and SHA-256 of all files above
      COMPLETE                        SHA-256 of manifest.json

Safetensors and JSON, nothing else: a file that could be a pickle is refused by name, listed or not.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import combinations, islice, pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from train.checkpoint.state import FORMAT, check_state
from train.errors import UserError
from train.run.folder import CHECKPOINTS, CONFIG, LATEST
from train.side_files import parse_json

MANIFEST = "manifest.json"
COMPLETE = "COMPLETE"
STATE = "state.json"
TEMPORARY = ".tmp"

_SHARD = re.compile(r"([A-Za-z0-9_]+)\.rank\d{5}\.safetensors")
_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".metadata", ".distcp", ".joblib", ".npy", ".npz")
_PIECE = 16 * 2**20
"""Bytes that are written and hashed at a time."""
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


@dataclass(frozen=True)
class Entry:
    """A line of the manifest."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Piece:
    """A slice of a tensor that one rank writes."""

    name: str
    data: Tensor
    """On the CPU, contiguous."""
    offsets: tuple[int, ...]
    """Where it begins in the whole tensor."""
    shape: tuple[int, ...]
    """Of the whole tensor."""


@dataclass(frozen=True)
class Chunk:
    """Where a slice of a tensor lies."""

    file: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: list[Chunk]


# --- writing: every stage is a function, in this order ------------------------------------------------------------


def begin(temporary: Path) -> None:
    """Make an empty folder to write in."""
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def write_shard(path: Path, pieces: Iterable[Piece]) -> Entry:
    """Write slices as one safetensors file and flush it to disk; gives its size and hash.

    By hand and not by `safetensors.save_file`: that one builds the whole file in memory a second time, and holds
    Python's lock against the training thread while it does. The hash is of what was in memory, so that a disk that
    wrote something else is found out too.
    """
    # The format wants no gaps; wide types first keeps every tensor aligned.
    ordered = sorted(pieces, key=lambda piece: (-piece.data.element_size(), piece.name))
    header: dict[str, Any] = {}
    position = 0
    for piece in ordered:
        end = position + piece.data.numel() * piece.data.element_size()
        kind = _NAMES[piece.data.dtype]
        header[piece.name] = {"dtype": kind, "shape": list(piece.data.shape), "data_offsets": [position, end]}
        position = end
    places = {piece.name: [piece.offsets, piece.shape] for piece in ordered}
    header["__metadata__"] = {"format": "pt", "slices": json.dumps(places)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return write_file(
        path, [len(text).to_bytes(8, "little") + text, *(piece.data.reshape(-1).view(torch.uint8) for piece in ordered)]
    )


def write_file(path: Path, parts: Iterable[bytes | Tensor]) -> Entry:
    """Write bytes (or uint8 tensors) to a new file and flush it to disk; gives its size and hash."""
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as file:
        for part in parts:
            view = memoryview(part.numpy().data if isinstance(part, Tensor) else part)
            for start in range(0, len(view), _PIECE):
                append(file, view[start : start + _PIECE])
                digest.update(view[start : start + _PIECE])
            size += len(view)
        file.flush()
        flush(file.fileno())
    return Entry(size, digest.hexdigest())


def append(file: BinaryIO, part: memoryview) -> None:
    """Write some bytes."""
    file.write(part)


def flush(descriptor: int) -> None:
    """Wait until a file (or a folder's list of names) is on the disk."""
    os.fsync(descriptor)


def write_state(temporary: Path, run: Path, step: int, facts: dict[str, Any]) -> dict[str, Entry]:
    """Write state.json, and config.json as the run has it."""
    state = json.dumps({"format": FORMAT, "step": step, **facts}, indent=2) + "\n"
    return {
        CONFIG: write_file(temporary / CONFIG, [(run / CONFIG).read_bytes()]),
        STATE: write_file(temporary / STATE, [state.encode()]),
    }


def write_manifest(temporary: Path, entries: dict[str, Entry]) -> None:
    """List all files with their hashes, after a look that they are there in full (other nodes wrote some).

    Raises:
        OSError: a file is missing or shorter than what was written.
    """
    for name, entry in entries.items():
        if (size := (temporary / name).stat().st_size) != entry.bytes:
            raise OSError(f"{temporary / name} has {size} bytes, {entry.bytes} were written")
    text = json.dumps({name: asdict(entry) for name, entry in sorted(entries.items())}, indent=2) + "\n"
    write_file(temporary / MANIFEST, [text.encode()])


def mark_complete(temporary: Path) -> None:
    """Seal the manifest: from here on the folder can be checked."""
    digest = hashlib.sha256((temporary / MANIFEST).read_bytes()).hexdigest()
    write_file(temporary / COMPLETE, [f"{digest}\n".encode()])
    flush_folder(temporary)


def publish(temporary: Path, folder: Path) -> None:
    """Give the folder its name; one of that name (damaged, or of a run that was set back) goes out of the way first."""
    if folder.exists():
        aside = folder.with_name(f"{folder.name}.replaced{TEMPORARY}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
    os.replace(temporary, folder)
    flush_folder(folder.parent)


def point_latest(run: Path, folder: Path) -> None:
    """Move `latest`, a text file with the name of a checkpoint, in one operation."""
    temporary = run / f"{LATEST}{TEMPORARY}"
    temporary.unlink(missing_ok=True)
    write_file(temporary, [f"{CHECKPOINTS}/{folder.name}\n".encode()])
    os.replace(temporary, run / LATEST)
    flush_folder(run)


def remove_old(run: Path, folder: Path, keep: int) -> None:
    """Remove complete checkpoints older than the `keep` newest up to `folder`, and what earlier starts left over.

    Later steps than `folder`'s are left alone: they were refused when this run was resumed, and do not count.
    """
    for old in [p for p in complete(run) if p.name <= folder.name][:-keep]:
        # Renamed first: a folder that is half removed is never taken for a damaged checkpoint.
        aside = old.with_name(f"{old.name}{TEMPORARY}")
        os.replace(old, aside)
        shutil.rmtree(aside)
    remove_leftovers(run)


def remove_leftovers(run: Path) -> None:
    """Remove temporary folders of a save that did not come to its end."""
    for left in (run / CHECKPOINTS).glob(f"step-*{TEMPORARY}"):
        shutil.rmtree(left, ignore_errors=True)


def flush_folder(folder: Path) -> None:
    """Wait until a folder's list of names is on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)


# --- finding and checking -----------------------------------------------------------------------------------------


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint after a step lies."""
    return run / CHECKPOINTS / f"step-{step:08d}"


def step_folders(run: Path) -> list[Path]:
    """All step-N folders of a run, whole or not, oldest first."""
    folders = [p for p in (run / CHECKPOINTS).glob("step-*") if re.fullmatch(r"step-\d+", p.name) and p.is_dir()]
    return sorted(folders, key=lambda p: int(p.name.removeprefix("step-")))


def complete(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return [p for p in step_folders(run) if (p / COMPLETE).exists()]


def read_manifest(folder: Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    """The manifest and state.json of a checkpoint, after everything was checked but the hashes of the listed files.

    Raises:
        UserError: not a whole checkpoint, of another format, or with a file that is no part of one (by name).
    """
    _refuse_pickles(folder)
    for name in (COMPLETE, MANIFEST, STATE):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is not a complete checkpoint: {name} is missing")
    state = _read_json(folder / STATE)
    check_state(folder / STATE, state)
    digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    if (folder / COMPLETE).read_bytes() != f"{digest}\n".encode():
        raise UserError(f"{folder / MANIFEST} is damaged, or {COMPLETE} beside it (its SHA-256 is not the one there)")
    try:
        entries = {name: Entry(**entry) for name, entry in _read_json(folder / MANIFEST).items()}
    except TypeError:
        raise UserError(f"{folder / MANIFEST} is damaged (an entry without bytes and sha256)") from None
    for name in entries:
        if name not in (CONFIG, STATE) and not _SHARD.fullmatch(name):
            raise UserError(f"{folder / MANIFEST} lists {name!r}, which is no part of a checkpoint; nothing was read")
    for name in (CONFIG, STATE):
        if name not in entries:
            raise UserError(f"{folder / MANIFEST} does not list {name}")
        check_file(folder, name, entries[name])
    return entries, state


def check_file(folder: Path, name: str, entry: Entry) -> None:
    """Compare a file with its line of the manifest.

    Raises:
        UserError: missing or damaged.
    """
    path = folder / name
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            raise UserError(f"checkpoint file {path} is damaged ({size} bytes, {entry.bytes} in the manifest)")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                raise UserError(f"checkpoint file {path} is damaged (its SHA-256 differs from the manifest)")
    except FileNotFoundError:
        raise UserError(f"checkpoint file {path} is missing") from None
    except OSError as error:
        raise UserError(f"checkpoint file {path} cannot be read: {error.strerror}") from None


def section_of(name: str) -> str | None:
    """The section of a file ("model" of "model.rank00000.safetensors"); none for a file without tensors."""
    found = _SHARD.fullmatch(name)
    return found[1] if found else None


def read_index(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Stored]]:
    """Which tensors the files hold, by section and name, and where their slices lie.

    Raises:
        UserError: a file that is no safetensors file of ours, or slices that do not make up their tensor.
    """
    index: dict[str, dict[str, Stored]] = {}
    for file in names:
        section = index.setdefault(str(section_of(file)), {})
        try:
            with safe_open(folder / file, framework="pt") as shard:
                places = parse_json(shard.metadata()["slices"])
                for name in shard.keys():  # noqa: SIM118 (not a dict)
                    part = shard.get_slice(name)
                    offsets, shape = (tuple(map(int, numbers)) for numbers in places[name])
                    tensor = section.setdefault(name, Stored(shape, _DTYPES[part.get_dtype()], []))
                    if tensor.shape != shape or tensor.dtype != _DTYPES[part.get_dtype()]:
                        raise ValueError(f"slices of {name} disagree about its shape or dtype")
                    tensor.chunks.append(Chunk(file, offsets, tuple(part.get_shape())))
        except (SafetensorError, ValueError, TypeError, KeyError, OverflowError, OSError) as error:
            raise UserError(f"checkpoint file {folder / file} is not a safetensors file of ours: {error}") from None
    for section_name, tensors in index.items():
        for name, tensor in tensors.items():
            _check_cover(f"{folder}: {section_name}/{name}", tensor)
    return index


def read_chunk(shard: Any, name: str, slices: tuple[slice, ...]) -> Tensor:
    """A slice of a tensor in an open safetensors file; 0-d tensors have none to cut."""
    return shard.get_slice(name)[slices] if slices else shard.get_tensor(name)


def _check_cover(what: str, tensor: Stored) -> None:
    inside = all(
        len(chunk.offsets) == len(chunk.sizes) == len(tensor.shape)
        and all(o >= 0 and o + n <= whole for o, n, whole in zip(chunk.offsets, chunk.sizes, tensor.shape, strict=True))
        for chunk in tensor.chunks
    )
    if not inside or sum(math.prod(chunk.sizes) for chunk in tensor.chunks) != math.prod(tensor.shape):
        raise UserError(f"the slices of {what} do not make up its shape {tensor.shape}; a rank's file is missing")
    placed = sorted(tensor.chunks, key=lambda chunk: chunk.offsets)
    # Slices of one rank each lie behind one another; others are compared pair by pair.
    if any(_overlap(a, b, 1) for a, b in pairwise(placed)) and any(_overlap(a, b) for a, b in combinations(placed, 2)):
        raise UserError(f"the slices of {what} lie over one another, and leave a part of it empty")


def _overlap(a: Chunk, b: Chunk, dimensions: int | None = None) -> bool:
    """Whether two slices share an element, looking at the first dimensions only where so many are given."""
    spans = zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
    return all(p < q + m and q < p + n and n and m for p, n, q, m in islice(spans, dimensions))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_bytes())
    except ValueError:
        raise UserError(f"{path} is damaged (not JSON)") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (not a JSON object)")
    return content


def _refuse_pickles(folder: Path) -> None:
    """Refuse a folder that holds a file which other programs would unpickle, by its name or by its first bytes."""
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        with path.open("rb") as file:
            first = file.read(4)
        # A safetensors file may begin with the same bytes (its header's length); what else lies there is found in it.
        like = not _SHARD.fullmatch(path.name) and (first[:2] in _PICKLE_STARTS or first == b"PK\x03\x04")
        if like or path.name.endswith(_PICKLES):
            raise UserError(
                f"{path} may be a pickle, which can run any code when it is loaded; a checkpoint has none, "
                "and this folder was not read"
            )


_PICKLE_STARTS = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))
