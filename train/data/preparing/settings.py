"""What prepare.py takes; no torch here, and nothing that takes long to load."""

from dataclasses import dataclass
from typing import Annotated, Literal

from prx_model.ranges import Range


@dataclass(frozen=True)
class Prepare:
    """Options of prepare.py."""

    out: str = ""
    """Folder to write into: a folder a size, and manifest.json."""
    sizes: Annotated[tuple[int, ...], Range(1, 65_536)] = (512,)
    """Sides in pixels of the square that pictures are about as large as; several are made in one pass."""
    buckets: bool = True
    """Pictures keep about their shape, as with --data.buckets; else they become squares."""
    patch: Annotated[int, Range(1, 1_024)] = 32
    """Sides are multiples of it: the model's patch size."""
    fit: Literal["crop", "stretch"] = "crop"
    """As --data.fit."""
    format: Literal["jpeg", "webp", "lossless"] = "jpeg"
    """What pictures are stored as; lossless is WebP's own. A picture of the right size and format stays as it is."""
    quality: Annotated[int, Range(1, 100)] = 92
    """Of JPEG and WebP."""
    chroma: Literal["full", "half"] = "full"
    """Of JPEG: half keeps colours at half the resolution (4:2:0), which is a tenth smaller and faster to read."""
    enlarge: Annotated[float, Range(1, 1_000)] = 1.0
    """How many times a picture may be made larger than it is; those that need more are dropped as too small."""
    image_column: str = "image"
    caption_columns: tuple[str, ...] = ("caption",)
    """Columns whose texts become the captions of a picture; those that a source lacks are left out there."""
    key_column: str = "key"
    """Column that names a row, where there is one; a name that comes again is a duplicate."""
    keep_columns: tuple[str, ...] = ()
    """Columns that are kept as text, for --data.style-column say."""
    filter: str = ""
    """Rows to keep, as in "status == 'ok' and score > 5"; a comparison with an empty cell does not hold."""
    duplicates: Literal["drop", "keep"] = "drop"
    """Of rows with the same key or the same bytes of the picture: drop all but the first, or keep them."""
    rows: Annotated[int, Range(1, 1_000_000)] = 2048
    """Rows of the data that become one shard: what one worker takes at a time."""
    group: Annotated[int, Range(1, 100_000)] = 16
    """Rows of a row group, which is read whole for each picture."""
    workers: Annotated[int, Range(0, 4_096)] = 0
    """Processes on this machine; 0 is one a core. Start the same command on more machines to share the work."""
    index_cache: str = ""
    """Folder that keeps what was read from tar headers, as --data.index-cache."""
    timeout: Annotated[float, Range(0, 1_000_000, above=True)] = 20.0
    """Seconds that a server (http, https) may be silent."""
    tries: Annotated[int, Range(1, 1_000)] = 8
    """Requests of the same bytes before preparing stops."""
    dry_run: bool = False
    """Say from a sample how long it would take and how much disk; nothing is written."""
    sample: Annotated[int, Range(1, 1_000_000)] = 64
    """Pictures of each source that --dry-run makes."""

    def content(self) -> dict[str, object]:
        """The settings that decide about the bytes that are written."""
        other = {"out", "workers", "index_cache", "timeout", "tries", "dry_run", "sample"}
        return {name: value for name, value in self.__dict__.items() if name not in other}
