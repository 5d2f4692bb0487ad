"""Which members of a tar file belong together as a sample, found by their headers; what belongs to none is counted.

WebDataset splits a name at the first dot of its last part (https://github.com/webdataset/webdataset): "00/17.jpg",
"00/17.long.txt" and "00/17.json" are sample "00/17". Base names with dots of their own would fall together so. Hence:
parts that are no words (digits first, blanks) are of the name, as in "v1.2.png"; and where a text has the dotted name
of a picture ("cat.final.png", "cat.final.txt", with no "cat.png"), that is the sample's name. Members may stand apart
("*.png" first, then "*.txt"), and links are followed inside the file.
"""

import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, cast

from PIL import Image

from train.data.rows import short

PICTURES = ("jpg", "jpeg", "png", "webp", "avif", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "jp2", "jfif")
"""Last parts of the endings that pictures have."""
PLUGINS = {"heic": "pillow-heif", "heif": "pillow-heif", "hif": "pillow-heif", "jxl": "pillow-jxl-plugin"}
"""Endings that Pillow reads once a package is installed."""
BLOCK = 512
_LARGEST_HEADER = 1 << 20
"""Bytes of a long name or of extended attributes in a tar file."""
_LINKS_IN_A_ROW = 8
_WORD = re.compile(r"[A-Za-z_][\w+-]*")
DUPLICATES = "in the place of one of the same name (the first is read)"
NOWHERE = "links that lead to no file in their tar"
UNNAMED = "hidden, or without an ending"
CUT_OFF = "of the sample in whose middle their tar is damaged"


class DamagedTar(Exception):
    """The rest of a tar file cannot be read."""


@dataclass
class Sample:
    """Members of one name: where they stand in the tar file, in bytes."""

    key: str
    start: int
    end: int
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    """First byte and length of each by its ending."""
    scattered: bool = False
    """Whether its members are other than those that stand between `start` and `end`."""

    @property
    def bytes(self) -> int:
        """What reading it takes."""
        return sum(size for _, size in self.members.values()) if self.scattered else self.end - self.start


def is_picture(ending: str) -> bool:
    """Whether Pillow reads files of an ending ("png", "full.png") here."""
    last = ending.rpartition(".")[2]
    return last in PICTURES or (last in PLUGINS and f".{last}" in Image.EXTENSION)


def picture_of(sample: Sample, image_column: str) -> str | None:
    """The ending of a sample's picture: the one that the image column names, else the first that pictures have."""
    if image_column in sample.members:
        return image_column
    return next(filter(is_picture, sample.members), None)


class Members:
    """All members of a tar file of `size` bytes, gathered into samples.

    Args:
        columns: endings and names that the caller asks for as columns, which are no part of a sample's name.

    Holds about 500 bytes a sample while it is there.
    """

    def __init__(self, file: BinaryIO, size: int, columns: Collection[str] = ()) -> None:
        self.samples: list[Sample] = []
        self.total = 0
        """Members, folders not counted."""
        self.left: Counter[str] = Counter()
        """Members that belong to no sample, by the reason."""
        self.problem: DamagedTar | None = None
        """Why what stands behind could not be read, if so."""
        self._known: dict[str, Sample] = {}
        self._links: dict[str, tuple[str, int]] = {}
        try:
            for run in runs(file, size, columns, self):
                self._add(run)
        except DamagedTar as error:
            self.problem = error
        if self._links:
            self._follow(file, size)
        self.samples.sort(key=lambda sample: sample.start)
        rest = self.total - sum(len(sample.members) for sample in self.samples) - self.left.total()
        if rest:
            self.left[CUT_OFF] = rest

    def link(self, member: tarfile.TarInfo) -> None:
        """Note a link, whose target may come later."""
        inside = posixpath.dirname(member.name) if member.issym() else ""
        self._links[member.name] = posixpath.normpath(posixpath.join(inside, member.linkname)), member.offset

    def _add(self, found: Sample) -> None:
        """A sample, or what was missing in one of the same name; two of one name that both have pictures are two."""
        before = self._known.get(found.key)
        if before is None or (any(map(is_picture, found.members)) and any(map(is_picture, before.members))):
            self._known[found.key] = found
            self.samples.append(found)
            return
        before.scattered = True
        for ending, place in found.members.items():
            if ending in before.members:
                self.left[DUPLICATES] += 1
            before.members.setdefault(ending, place)

    def _follow(self, file: BinaryIO, size: int) -> None:
        """Give samples the members that are links, with the place of what they lead to."""
        ends: dict[str, str] = {}
        for name in self._links:
            target = self._links[name][0]
            for _ in range(_LINKS_IN_A_ROW):
                target = self._links[target][0] if target in self._links else target
            ends[name] = target
        wanted, places = set(ends.values()), dict[str, tuple[int, int]]()
        try:
            for member in members(file, size):
                if member.isreg() and (name := posixpath.normpath(member.name)) in wanted:
                    places[name] = member.offset_data, member.size
        except DamagedTar:
            pass  # told already; what stands before the damage is known
        for name, (_, offset) in self._links.items():
            parts, place = split_name(name), places.get(ends[name])
            if parts is None or place is None or sum(place) > size:
                self.left[NOWHERE if parts else UNNAMED] += 1
                continue
            key, ending = parts
            sample = self._known.get(key)
            if sample is None:
                sample = self._known[key] = Sample(key, offset, offset)
                self.samples.append(sample)
            sample.scattered = True
            if ending in sample.members:
                self.left[DUPLICATES] += 1
            sample.members.setdefault(ending, place)


def runs(file: BinaryIO, size: int, columns: Collection[str] = (), told: Members | None = None) -> Iterator[Sample]:
    """Samples of members that stand behind one another, in their order; `told` is what counts the rest.

    Raises DamagedTar behind the last readable one.
    """
    sample: Sample | None = None
    for member in members(file, size):
        if told is not None and not member.isdir():
            told.total += 1
        parts = split_name(member.name)
        if told is not None and (member.islnk() or member.issym()):
            told.link(member)
            continue
        if parts is None or not member.isreg():
            if told is not None and not member.isdir():
                told.left[UNNAMED if member.isreg() else "devices and the like"] += 1
            continue
        key, ending = parts
        if sample is None or key != sample.key:
            if sample is not None:
                yield from _named_by_texts(sample, columns)
            sample = Sample(key, member.offset, member.offset)
        if ending in sample.members and told is not None:
            told.left[DUPLICATES] += 1
        sample.members.setdefault(ending, (member.offset_data, member.size))
        sample.end = member.offset_data + member.size
        if sample.end > size:
            raise DamagedTar(f"is cut off in the middle of {member.name}; copy it again")
    if sample is not None:
        yield from _named_by_texts(sample, columns)


def split_name(name: str) -> tuple[str, str] | None:
    """("00/v1.2", "long.txt") of "00/v1.2.long.txt"; None where hidden (".x"), a note ("__x") or without an ending."""
    folder, _, base = name.rpartition("/")
    parts = base.split(".")
    if len(parts) == 1 or not parts[0] or not parts[-1] or base.startswith("__"):
        return None
    first = len(parts) - 1
    while first > 1 and _WORD.fullmatch(parts[first - 1]):
        first -= 1
    stem = ".".join(parts[:first])
    return f"{folder}/{stem}" if folder else stem, ".".join(parts[first:]).lower()


def _named_by_texts(sample: Sample, columns: Collection[str]) -> Iterator[Sample]:
    """The sample, or those of the dotted names that its pictures share with their texts; see this file's head."""
    dotted: dict[str, list[str]] = {}
    for ending in sample.members:
        dotted.setdefault(ending.rpartition(".")[0], []).append(ending)
    names = {name: any(map(is_picture, endings)) for name, endings in dotted.items()}
    shared = any(names[n] and n and not all(map(is_picture, ends)) for n, ends in dotted.items())
    asked = any(ending in columns or ending.rpartition(".")[0] in columns for ending in sample.members)
    if not shared or names.get("") or asked:
        yield sample
        return
    pictured = [name for name, has in names.items() if has]
    rest = dict(sample.members)
    for name in pictured:
        taken = list(dotted[name])
        if len(pictured) == 1:  # what has no dotted name is of the only one
            taken += [ending for ending in dotted.get("", []) if f"{name}.{ending}" not in taken]
        part = {ending.removeprefix(f"{name}."): rest.pop(ending) for ending in taken}
        whole = len(part) == len(sample.members)
        yield Sample(f"{sample.key}.{name}", sample.start, sample.end, part, scattered=not whole)
    if rest:
        yield Sample(sample.key, sample.start, sample.end, rest, scattered=True)


class _Headers:
    """A tar file as tarfile sees it, which reads headers only: one that says it is longer is a trap for memory."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, count: int) -> bytes:
        if not 0 <= count <= _LARGEST_HEADER:
            raise DamagedTar(f"has a header of {count:,} bytes; copy it again or remove it")
        return self._read(count)


def members(file: BinaryIO, size: int) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar file in their order. Raises DamagedTar behind the last readable one."""
    file.seek(0)
    if not size:
        raise DamagedTar("is empty (0 bytes); copy it again or remove it")
    try:
        tar = tarfile.open(fileobj=cast(BinaryIO, _Headers(file)), mode="r:")  # noqa: SIM115  # the caller closes it
        behind = 0
        while (member := tar.next()) is not None:
            # What does not move forwards would be read for ever.
            if member.size < 0 or tar.offset <= behind:
                raise DamagedTar(
                    f"has a member of {member.size:,} bytes at byte {behind:,}; copy it again or remove it"
                )
            behind = tar.offset
            yield member
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all of them
    except RecursionError:
        raise DamagedTar("has headers of headers without end; copy it again or remove it") from None
    except (ValueError, OverflowError, TypeError, LookupError, AttributeError) as error:  # from tarfile's own parsing
        raise DamagedTar(f"is damaged ({short(error)}); copy it again") from None
    except tarfile.TarError as error:
        packed = at(file, 0, 2) == b"\x1f\x8b"
        what = "is compressed, which allows no random access; unpack it" if packed else "copy it again"
        raise DamagedTar(what if packed else f"is damaged or cut off ({short(error)}); {what}") from None
    # tarfile takes an unreadable header in the middle for the end.
    rest = at(file, tar.offset, BLOCK)
    if rest.strip(b"\0"):
        raise DamagedTar(f"is damaged at byte {tar.offset:,}; copy it again")


def at(file: BinaryIO, start: int, length: int) -> bytes:
    """So many bytes of a file from a place on."""
    file.seek(start)
    return file.read(length)
