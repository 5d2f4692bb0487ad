"""What pictures and captions lie at a path: parquet, tar files of WebDataset, MDS, or a folder with a JSONL file.

Opening reads names, sizes and the small columns' headers only; picture bytes are read when a row is asked for.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from train.data.formats.folder import FolderIndex
from train.data.formats.mds import INDEX, MdsIndex
from train.data.formats.object_stores import scheme_of
from train.data.formats.parquet import ParquetIndex
from train.data.formats.storage import Storage, expand, is_url
from train.data.formats.webdataset import TarIndex
from train.data.rows import SPLITS, ImageIndex, listing, short
from train.errors import UserError, nearest
from train.shown import address

_JSONL_NAMES = ("captions.jsonl", "metadata.jsonl")
_SHARDS = (".parquet", ".tar")


def open_images(
    path: str | Path,
    *,
    image_column: str = "image",
    caption_columns: Sequence[str] = ("caption",),
    split: str = "train",
    storage: Storage | None = None,
    cache: Path | None = None,
    some_captions: bool = False,
) -> ImageIndex:
    """Index the captioned pictures of one split ("train", "val" or "test") at `path`.

    `path` is
    - a parquet file, or a folder of parquet files (at any depth);
    - a tar file of WebDataset, or a folder of them: the files of a sample share their name up to the first dot (of
      tar_members.py the rule for names with more); the picture is known by its ending, captions are `.txt` files or
      fields of `.json`;
    - a folder with the `index.json` of MDS (there, or in folders below it), or that file itself;
    - parquet and tar files by a pattern, `shard-{000000..000127}.tar`, on a disk or at an address;
    - of the hub, S3 and Google Cloud a folder of these, too: `hf://datasets/owner/name`, `s3://bucket/a`, `gs://bucket/a`;
    - a folder with `captions.jsonl` or `metadata.jsonl` (there, or in sub-folders named as splits), one object a line:
      `file_name` (or `file`, `image`, `path`, or what `image_column` says), relative to the JSONL, and the captions.

    A row belongs to the split that its `split` column names (not in tar files); else to the one in its file's name or
    folder (`train-00000-of-00001.parquet`, `val/`); else to train. Where some files are named so, others are left out.

    Parquet and tar files that are missing, empty or damaged are left out and named in `problems`, unless all are.
    With `some_captions` not all of the caption columns need be there, and in parquet not in every file.
    `storage` says how long a server is waited for; `cache` is a folder that keeps what was read from tar headers.

    Raises UserError for a missing path, nothing readable there, a line that is no JSON, a missing column or picture
    file; its subclass NoSplitError where the split has no rows; StorageError where a server stays down.
    """
    storage = storage or Storage()
    if split not in SPLITS.values():
        raise UserError(f"split must be train, val or test, got {split!r}{nearest(split, SPLITS.values())}")

    shown = address(path) if is_url(path) else path
    if "://" in str(path) and not is_url(path):
        raise UserError(
            f"{address(path)} is no address that can be read here; give one of http, https, hf, s3 or gs, or a path"
        )

    def shards(files: Mapping[str, Path | str]) -> ImageIndex:
        if next(iter(files)).lower().endswith(".tar"):
            return TarIndex(shown, files, storage, image_column, caption_columns, split, cache, some_captions)
        return ParquetIndex(shown, files, storage, image_column, caption_columns, split, some_captions)

    def mosaic(files: Mapping[str, Path | str]) -> ImageIndex:
        return MdsIndex(shown, files, storage, image_column, caption_columns, split, some_captions)

    if is_url(path) and str(path).partition("?")[0].endswith(f"/{INDEX}"):
        return mosaic({INDEX: str(path)})
    if scheme_of(path) and "{" not in str(path) and Path(str(path)).suffix.lower() not in _SHARDS:
        return _in_store(str(path), storage.files(str(path)), shards, mosaic)
    if is_url(path) or ("{" in str(path) and not Path(path).exists()):
        return shards(_by_pattern(str(path)))
    path = Path(path)
    if not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(
            f"there is nothing at {path}; give a folder of parquet or tar files or an image folder with "
            f"{_JSONL_NAMES[0]}{nearest(path.name, siblings)}"
        )
    if path.is_file() and path.name == INDEX:
        return mosaic({INDEX: path})
    if path.is_file():
        if path.suffix.lower() not in _SHARDS:
            raise UserError(
                f"{path} is not a parquet file nor a tar file; give one of them, or the folder that holds the data"
            )
        return shards({path.name: path})
    if mds := _mds_files(path):
        return mosaic(mds)
    return _in_folder(
        path,
        shards,
        lambda jsonl: FolderIndex(path, jsonl, image_column, caption_columns, split, some_captions),
    )


def _in_folder(
    path: Path,
    shards: Callable[[Mapping[str, Path | str]], ImageIndex],
    lines: Callable[[list[Path]], ImageIndex],
) -> ImageIndex:
    jsonl, (found, problems) = _jsonl_files(path), _shard_files(path)
    if jsonl:
        for kind, files in found.items():
            if any(file.parent == path for file in files):
                what = f"both {kind.removeprefix('.')} files and {jsonl[0].relative_to(path)}"
                raise UserError(f"{path} holds {what}; give the folder of one")
        return lines(jsonl)
    kinds = [kind for kind, files in found.items() if files]
    if len(kinds) > 1:
        raise UserError(f"{path} holds both parquet and tar files; give the folder of one")
    if kinds:
        index = shards({file.relative_to(path).as_posix(): file for file in found[kinds[0]]})
        index.problems = (*problems, *index.problems)
        return index
    listed = listing(entry.name for entry in path.iterdir())
    raise UserError(
        f"{path} {f'holds only {listed}' if listed else 'is an empty folder'}; it needs parquet or tar files, "
        f"or {' or '.join(_JSONL_NAMES)} beside the pictures"
    )


def _in_store(
    folder: str,
    files: Mapping[str, Path | str],
    shards: Callable[[Mapping[str, Path | str]], ImageIndex],
    mosaic: Callable[[Mapping[str, Path | str]], ImageIndex],
) -> ImageIndex:
    """The index of a folder in an object store; picture files by themselves would be a request each."""
    kinds = {kind: {n: f for n, f in files.items() if n.lower().endswith(kind)} for kind in _SHARDS}
    found = [kind for kind in _SHARDS if kinds[kind]]
    if len(found) > 1:
        raise UserError(f"{address(folder)} holds both parquet and tar files; give the folder of one")
    if found:
        return shards(kinds[found[0]])
    listed = {name: file for name, file in files.items() if PurePosixPath(name).name == INDEX}
    if listed:
        return mosaic(listed)
    raise UserError(
        f"{address(folder)} holds {listing(files)}; of an object store parquet, tar and MDS files are read, so make "
        "shards of single pictures first (train/prepare.py, from a copy on a disk)"
    )


def _by_pattern(pattern: str) -> dict[str, Path | str]:
    """Places of the files of a brace pattern by their names, which are all of one kind."""
    places = expand(pattern)
    endings = {Path(place.partition("?")[0]).suffix.lower() for place in places}
    if len(endings) > 1 or not endings <= set(_SHARDS):
        raise UserError(
            f"{address(pattern)} names no parquet nor tar files alone; write as in DATA/shard-{{000000..000127}}.tar"
        )
    # A query (a signature, say) is no part of a name, and may differ the next time.
    names = [address(place).rpartition("/")[2] for place in places]
    if len(set(names)) < len(names):
        names = [address(place) for place in places]
    return dict(zip(names, [place if is_url(place) else Path(place) for place in places], strict=True))


def _shard_files(folder: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """Parquet and tar files below a folder by their ending, and a sentence for each that is left out.

    Links are followed, as all of a hub's cache is links; a folder or file that several names lead to is read once.
    Hidden ones are not looked at.
    """
    found: dict[str, list[Path]] = {kind: [] for kind in _SHARDS}
    problems: list[str] = []
    known: dict[tuple[int, int], Path] = {}
    for place, folders, names in os.walk(folder, followlinks=True):
        here = os.stat(place)
        if known.setdefault((here.st_dev, here.st_ino), Path(place)) != Path(place):
            folders.clear()  # a link to a folder that was read, or that this one stands in
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            file = Path(place) / name
            kind = file.suffix.lower()
            if kind not in found:
                if _is_packed(name):
                    problems.append(f"{file} is compressed, which allows no random access; it is left out: unpack it")
                continue
            try:
                status = file.stat()
            except OSError as error:
                reason = f"leads to {os.readlink(file)}, where nothing is" if file.is_symlink() else short(error)
                problems.append(f"{file} {reason}; it is left out")
                continue
            first = known.setdefault((status.st_dev, status.st_ino), file)
            if first == file:
                found[kind].append(file)
            else:
                problems.append(f"{file} is the same file as {first}; it is read once")
    for files in found.values():
        files.sort()
    return found, problems


def _is_packed(name: str) -> bool:
    return re.search(r"\.(tar|parquet)\.(gz|bz2|xz|zst|lz4)$|\.(tgz|zip)$", name.lower()) is not None


def _mds_files(folder: Path) -> dict[str, Path]:
    """The lists of MDS shards of a folder: its own, else all below it, without hidden ones."""
    own = folder / INDEX
    found = [own] if own.is_file() else sorted(folder.rglob(INDEX))
    listed = [file.relative_to(folder) for file in found if file.is_file()]
    shown = [name for name in listed if not any(part.startswith(".") for part in name.parts)]
    # Other programs call their files so, too.
    return {name.as_posix(): folder / name for name in shown if b'"shards"' in _head(folder / name)}


def _head(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(1 << 16)
    except OSError:
        return b""


def _jsonl_files(folder: Path) -> list[Path]:
    folders = sorted(entry for entry in folder.iterdir() if entry.name.lower() in SPLITS and entry.is_dir())
    found = [[entry / name for name in _JSONL_NAMES if (entry / name).is_file()] for entry in (folder, *folders)]
    for files in found:
        if len(files) > 1:
            raise UserError(f"{files[0].parent} holds both {' and '.join(_JSONL_NAMES)}; keep the one that is meant")
    return [file for files in found for file in files]
