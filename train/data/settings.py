"""The data section of a recipe; no torch here, see train/recipes.py."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from prx_model.ranges import Range

_WEIGHT = re.compile(r"(.+)=(-?[0-9.]+(?:[eE][+-]?[0-9]+)?)", re.DOTALL)


def weight_of(entry: str) -> tuple[str, float | None]:
    """An entry of a mixture's `data.path` as path and weight; None where it has none."""
    match = _WEIGHT.fullmatch(entry)
    try:
        return (entry, None) if match is None else (match[1], float(match[2]))
    except ValueError:
        return entry, None


@dataclass(frozen=True)
class Data:
    """Where pictures and captions come from."""

    kind: Literal["shapes", "scenes", "images"] = "images"
    """shapes and scenes are drawn on the fly; images are read from `path`."""
    path: str | tuple[str, ...] = ""
    """Folder of parquet or tar files, or of pictures with a captions.jsonl; or a/shard-{000..127}.tar, http(s)://… too.
    Several are mixed by weight: FIRST=3 SECOND=1; without weights by their numbers of samples.
    """
    height: Annotated[int, Range(1, 65_536)] = 512
    width: Annotated[int, Range(1, 65_536)] = 512
    image_column: str = "image"
    caption_columns: tuple[str, ...] = ("caption",)
    """One of them is drawn at each visit. In a mixture a source need not have all of them."""
    source_columns: tuple[str, ...] = ()
    """Columns of one source of a mixture, named by the last part of its path: "NAME:image=jpg" "NAME:captions=a,b"."""
    style_column: str = ""
    """Column whose value selects a caption's prefix."""
    style_prefixes: tuple[str, ...] = ()
    """Entries "value=prefix" for `style_column`."""
    flip: Annotated[float, Range(0, 1)] = 0.0
    """Probability of a mirrored picture."""
    buckets: bool = False
    """Pictures keep about their shape: aspect-ratio buckets of about height x width, one a step."""
    fit: Literal["crop", "stretch"] = "crop"
    """crop: to the nearest bucket in log aspect ratio; scaled until it is covered, the centre cut out. stretch: to the
    nearest in aspect ratio, scaled to its sides whatever becomes of the shape, as PRX does.
    """
    size_columns: tuple[str, str] = ("width", "height")
    """Columns with the pictures' sizes, which need not be read from them then."""
    fast_jpeg: bool = False
    """JPEGs twice too large and more are shrunk by their decoder: less sharp than Lanczos, 3 to 5 times as fast."""
    bad_limit: Annotated[float, Range(0, 1)] = 0.01
    """Share of samples that cannot be read, above which a run stops; others take their places. 0 stops at the first."""
    index_cache: str = ""
    """Folder that keeps what was read from tar headers and pictures' sizes, for the next start and the other ranks."""
    timeout: Annotated[float, Range(0, 1_000_000, above=True)] = 20.0
    """Seconds that a server (http, https) may be silent."""
    tries: Annotated[int, Range(1, 1_000)] = 8
    """Requests of the same bytes, with growing pauses, before a run stops."""
    workers: Annotated[int, Range(0, 1_024)] = 0
    """Processes that read and decode; 0 does it between steps."""
