"""Sizes of all pictures of a set, told once: by one process for all others, and for every later start.

Reading them may mean reading all pictures. They are kept in the index cache, else beside the data in a hidden folder,
where the set is made of files that are written once: shards. Where neither can be written each process reads them.
"""

import io
import os
import sys
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from train.data.claims import take
from train.data.formats.folder import FolderIndex
from train.data.formats.parquet import ParquetIndex
from train.data.formats.storage import is_url
from train.data.mixture import MixedIndex
from train.data.rows import ImageIndex, sha256
from train.shown import tell
from train.side_files import write_whole

BESIDE = ".sizes"
"""Folder beside the data."""
_PAUSE = 0.5
"""Seconds between two looks at what the process does that reads them."""


def picture_sizes(index: ImageIndex, columns: tuple[str, str], cache: Path | None) -> NDArray[np.int32]:
    """(rows, 2) height and width of an index's pictures, from columns of these names, the cache, or their heads."""
    if isinstance(index, MixedIndex):
        return np.concatenate([picture_sizes(part, columns, cache) for part in index.parts])
    told = all(name in index.columns for name in columns)
    if told and isinstance(index, ParquetIndex | FolderIndex) and cache is None:
        return index.sizes(*columns)  # a few bytes a row, in seconds
    folder = cache or _beside(index)
    kept = folder / f"upright-{sha256([index.fingerprint, *columns])[:32]}.npy" if folder else None
    if kept is None or not _can_hold(kept):
        return index.sizes(*columns)
    while not kept.exists():
        claim = take(kept.with_suffix(".claim"))
        if claim is None:
            time.sleep(_PAUSE)  # another rank reads them
            continue
        with claim.beating():
            if not kept.exists():
                if not told:
                    said = f"reading the sizes of {len(index):,} pictures, once; they are kept in {kept.parent}"
                    tell(said, file=sys.stderr)
                stream = io.BytesIO()
                np.save(stream, index.sizes(*columns))
                write_whole(kept, stream.getvalue())
    sizes: NDArray[np.int32] = np.load(kept, allow_pickle=False)
    return sizes


def _beside(index: ImageIndex) -> Path | None:
    """The folder beside the data; None for addresses and patterns, and for pictures that may change one by one."""
    if is_url(index.path) or isinstance(index, FolderIndex):
        return None
    path = Path(index.path)
    folder = path if path.is_dir() else path.parent
    return folder / BESIDE if folder.is_dir() else None


def _can_hold(kept: Path) -> bool:
    """Whether the file is there, or can be written."""
    if kept.exists():
        return True
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(kept.parent, os.W_OK)
