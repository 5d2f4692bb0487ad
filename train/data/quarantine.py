"""Samples that could not be read: a list of them in the run's folder, and a limit to their share.

Training takes another sample of the same bucket in such a one's place, drawn from (seed, position) alone, so that a
resume and another world size see the same. What is listed should be mended, or removed, before the next run.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from train.data.loader import Batch
from train.errors import UserError
from train.shown import tell
from train.side_files import objects, set_aside, write_whole

QUARANTINE = "quarantine"
_LEAST = 3
"""Samples that must have failed before their share means anything."""


class Quarantine:
    """This rank's list of substituted samples, `quarantine/rank-R.jsonl`, and how many there were.

    Args:
        folder: the run's folder.
        rank: this process's.
        limit: `data.bad_limit`, the share of samples that may be substituted; 0 stops at the first.
    """

    def __init__(self, folder: Path, rank: int, limit: float) -> None:
        self.folder, self.limit = folder / QUARANTINE, limit
        self.seen = 0
        """Samples of this rank since the start of this process."""
        self.substituted = 0
        """How many of them were substituted."""
        self._file = self.folder / f"rank-{rank}.jsonl"
        good, bad = objects(self._file)
        if bad:
            tell(f"warning: {set_aside(self._file, bad)}")
            write_whole(self._file, "".join(_line(entry) + "\n" for entry in good))
        # A resume goes over some positions again, maybe on another rank.
        self._listed = {entry["position"] for entry in self._samples()}
        self._shards = {str(entry["shard"]) for entry in self._entries() if "shard" in entry}

    def add(self, batch: Batch) -> None:
        """Count a batch and list those of its samples that were substituted and are not listed yet."""
        self.seen += len(batch.captions)
        self.substituted += len(batch.substituted)
        new = [entry for entry in batch.substituted if entry.position not in self._listed]
        self._listed.update(entry.position for entry in new)
        self._append([{"position": e.position, "key": e.key, "reason": e.reason} for e in new])

    def add_shards(self, problems: Sequence[str]) -> None:
        """List files that are read in part or not at all (`ImageIndex.problems`); call it on one rank."""
        new = [problem for problem in dict.fromkeys(problems) if problem not in self._shards]
        self._shards.update(new)
        self._append([{"shard": problem} for problem in new])

    def check(self, substituted: int, seen: int) -> None:
        """Stop where too many samples of all ranks were substituted; both numbers are sums over the ranks.

        A share is above the limit where it is so by three standard deviations of a Poisson count, and three samples.

        Raises:
            UserError: naming some samples and the list.
        """
        allowed = self.limit * seen
        few = substituted < _LEAST and self.limit > 0
        if not substituted or few or substituted <= allowed + 3 * allowed**0.5:
            return
        shown = "; ".join(f"{entry['key']}: {entry['reason']}" for entry in [*self._samples()][-3:])
        raise UserError(
            f"{substituted:,} of {seen:,} samples ({substituted / max(seen, 1):.2%}) could not be read, more than "
            f"data.bad_limit {self.limit:g} allows, among them {shown}; all are listed in {self.folder}: mend or "
            "remove them, or raise --data.bad-limit"
        )

    def _append(self, entries: Sequence[dict[str, object]]) -> None:
        if not entries:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        # Names of files may be no UTF-8: surrogates are kept as escapes, which JSON has.
        text = "".join(_line(entry) + "\n" for entry in entries)
        with self._file.open("a+b") as file:
            # A crash may have left half a line, which must not spoil the next.
            if file.seek(0, 2) and file.seek(-1, 2) is not None and file.read(1) != b"\n":
                text = "\n" + text
            file.write(text.encode())

    def _samples(self) -> Iterator[dict[str, Any]]:
        """The entries that are of samples, whole."""
        for entry in self._entries():
            if isinstance(entry.get("position"), int) and {"key", "reason"} <= entry.keys():
                yield entry

    def _entries(self) -> Iterator[dict[str, Any]]:
        """What all ranks have listed, this one's last; lines that a crash cut off are left out."""
        files = sorted(self.folder.glob("rank-*.jsonl"), key=lambda file: (file == self._file, file.name))
        for file in files:
            yield from objects(file)[0]


def _line(entry: dict[str, object]) -> str:
    text = json.dumps(entry, ensure_ascii=False)
    return text if text.isascii() or _writable(text) else json.dumps(entry)


def _writable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
