"""Embeddings of captions on disk, without padding: written once by train/precompute_text.py, read while training.

A folder of safetensors shards, and for each writer a list of its whole shards. A shard holds the tokens of many
captions behind one another (with a scale a token in fp8 and int8), and of each caption its key, offset and CRC-32
over both. A writer holds a lock file, so that no two of one rank write at a time.
"""

import hashlib
import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prx_model.captions import clean_caption
from train.errors import UserError
from train.recipes import Text
from train.side_files import parse_json

Storage = Literal["bf16", "fp8", "int8"]
_DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
_LARGEST = {"fp8": 448.0, "int8": 127.0}
"""Largest number of each format (e4m3: OCP 8-bit floating point specification 1.0, section 5)."""
MIN_COSINE = 0.999
"""Between a stored token and the encoder's."""
MEAN_TOKENS = 100
"""Tokens a caption that sizes are projected with (docs/recipe.md, "Text cache")."""
SHARD_TOKENS = 1 << 18
"""Tokens after which a shard is written: 1.2 GB in bf16 at width 2304, seconds of a GPU's work."""
_OPEN_SHARDS = 4096
"""Shards that stay open: mapped files take neither memory nor descriptors, and 8.7 M captions fill 3,400 of them."""


def cache_bytes(captions: int, width: int, storage: Storage, tokens: int = MEAN_TOKENS) -> int:
    """Bytes that the embeddings of so many captions take, at `tokens` each; keys and lengths are under 40 a caption."""
    return captions * tokens * (width * _DTYPES[storage].itemsize + (0 if storage == "bf16" else 4))


@dataclass(frozen=True)
class Encoding:
    """What makes an embedding what it is, beside its caption."""

    name: str
    revision: str
    max_tokens: int
    storage: Storage
    clean: bool = False
    """Whether captions were cleaned (`prx_model.clean_caption`): not in a cache that does not say so, an old one."""

    @classmethod
    def of(cls, text: Text) -> "Encoding":
        """That of a recipe's text section."""
        return cls(text.name, text.revision, text.max_tokens, text.storage, text.clean)

    def key(self, caption: str) -> bytes:
        """BLAKE2b over the caption, as the encoder gets it, and everything here: 16 bytes."""
        fields: list[object] = [caption, self.name, self.revision, self.max_tokens, self.storage]
        fields += ["clean"] if self.clean else []  # without, keys are those that old caches have
        return hashlib.blake2b(json.dumps(fields).encode(), digest_size=16).digest()

    def text(self, caption: str) -> str:
        """The caption as the encoder gets it."""
        return clean_caption(caption) if self.clean else caption


def quantise(tokens: Tensor, storage: Storage) -> tuple[Tensor, Tensor | None]:
    """Tokens (n, width) as they are stored, and the float32 scale (n,) of each: value = stored · scale."""
    if storage == "bf16":
        return tokens.to(torch.bfloat16), None
    scale = tokens.abs().amax(dim=1).float() / _LARGEST[storage]
    scale = torch.where(scale > 0, scale, 1.0)
    scaled = tokens.float() / scale[:, None]
    return (scaled.round() if storage == "int8" else scaled).to(_DTYPES[storage]), scale


def dequantise(stored: Tensor, scale: Tensor | None) -> Tensor:
    """Stored tokens (n, width) in bfloat16."""
    return stored if scale is None else (stored.float() * scale[:, None]).to(torch.bfloat16)


class ShardWriter:
    """Collects embeddings and writes them in whole shards: a shard is there with all it says, or not at all.

    A context manager; leaving it writes nothing, and lets another process of this rank begin.

    Args:
        rank, ranks: of the processes that write together. Lists of shards are this rank's own, and those that an
            earlier start with more ranks left; shards that are no longer there are taken from them.
        shard_tokens: tokens after which a shard is written.

    Raises:
        UserError: another process writes as this rank, or a list of other settings or that is none.
    """

    def __init__(
        self, folder: Path, encoding: Encoding, rank: int, ranks: int = 1, shard_tokens: int = SHARD_TOKENS
    ) -> None:
        self.folder, self.encoding, self.rank, self.shard_tokens = folder, encoding, rank, shard_tokens
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(folder / f"writer-{rank:05d}.lock")
        self._manifest = folder / f"writer-{rank:05d}.json"
        self._temporary = folder / f"writer-{rank:05d}.tmp"
        self._shards: dict[str, int] = {}
        try:
            self._take_over(ranks)
        except BaseException:
            self.__exit__()  # not when the exception's frames are collected
            raise
        self._keys: list[bytes] = []
        self._lengths: list[int] = []
        self._parts: list[tuple[Tensor, Tensor | None]] = []
        self._waiting = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def _take_over(self, ranks: int) -> None:
        """Read this rank's lists, without the shards that are gone."""
        for manifest in self.folder.glob("writer-*.json"):
            number = manifest.stem.removeprefix("writer-")
            if number.isdecimal() and int(number) % ranks == self.rank:
                listed = _read_manifest(manifest, self.encoding)
                there = {name: size for name, size in listed.items() if (self.folder / name).exists()}
                if there != listed:
                    self._write_manifest(manifest, there)
                if manifest == self._manifest:
                    self._shards = there

    def add(self, captions: Sequence[str], tokens: Tensor, lengths: Sequence[int]) -> None:
        """Take the embeddings (sum of lengths, width) of captions; writes a shard where enough have come together.

        Raises:
            UserError: a token that is not finite, or that the storage format changes too much.
        """
        if not torch.isfinite(tokens).all():
            odd = next(c for c, t in zip(captions, tokens.split(list(lengths)), strict=True) if not t.isfinite().all())
            raise UserError(f"{self.encoding.name!r} encodes the caption {_shown(odd)} to values that are not finite")
        stored, scale = quantise(tokens, self.encoding.storage)
        if scale is not None:
            cosine = torch.nn.functional.cosine_similarity(dequantise(stored, scale).float(), tokens.float()).min()
            if float(cosine) < MIN_COSINE:
                raise UserError(
                    f"text.storage {self.encoding.storage!r} changes a token to a cosine of {float(cosine):.4f}, below "
                    f"{MIN_COSINE}; take --text.storage bf16{' or fp8' if self.encoding.storage == 'int8' else ''}"
                )
        self._parts.append((stored.cpu(), None if scale is None else scale.cpu()))
        self._keys += [self.encoding.key(caption) for caption in captions]
        self._lengths += lengths
        self._waiting += tokens.shape[0]
        if self._waiting >= self.shard_tokens:
            self.flush()

    def flush(self) -> None:
        """Write what has come together, if anything: to a temporary name, to the disk, then under its own name.

        Raises:
            UserError: the disk does not take it.
        """
        if not self._keys:
            return
        tokens = torch.cat([stored for stored, _ in self._parts])
        scales = [scale for _, scale in self._parts if scale is not None]
        scale = torch.cat(scales) if scales else None
        offsets = np.cumsum([0, *self._lengths])
        spans = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
        sums = [_checksum(tokens[a:b], None if scale is None else scale[a:b]) for a, b in spans]
        tensors = {
            "tokens": tokens,
            "keys": torch.frombuffer(bytearray(b"".join(self._keys)), dtype=torch.uint8).view(-1, 16),
            "offsets": torch.from_numpy(offsets),
            "checksums": torch.tensor(sums, dtype=torch.int64),
            **({} if scale is None else {"scales": scale}),
        }
        # The name says which captions and which order, so writing the same shard again replaces it.
        name = f"shard-{hashlib.blake2b(b''.join(self._keys), digest_size=12).hexdigest()}.safetensors"
        try:
            save_file(tensors, self._temporary, metadata={"encoding": json.dumps(asdict(self.encoding))})
            _replace(self._temporary, self.folder / name)
            self._shards[name] = (self.folder / name).stat().st_size
            self._write_manifest(self._manifest, self._shards)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"a shard of {tokens.nbytes:,} bytes could not be written to {self.folder}: {error}; the same command "
                "goes on once it can"
            ) from None
        self._keys, self._lengths, self._parts, self._waiting = [], [], [], 0

    def _write_manifest(self, manifest: Path, shards: dict[str, int]) -> None:
        self._temporary.write_text(json.dumps({"encoding": asdict(self.encoding), "shards": shards}, indent=1))
        _replace(self._temporary, manifest)


class CacheIndex:
    """Which captions a folder holds, and where: 48 bytes of memory a caption.

    Raises:
        UserError: a folder that is none, another encoder's, or a shard that is missing or damaged, by its file;
            with `missing_allowed` lost shards are left out.
    """

    def __init__(self, folder: Path, encoding: Encoding, *, missing_allowed: bool = False) -> None:
        sizes: dict[str, int] = {}
        for manifest in sorted(folder.glob("writer-*.json")):
            sizes |= _read_manifest(manifest, encoding)
        if missing_allowed:
            sizes = {name: size for name, size in sizes.items() if (folder / name).exists()}
        self.files = [folder / name for name in sizes]
        parts = [_read_index(file, size, encoding) for file, size in zip(self.files, sizes.values(), strict=True)]
        self.width = parts[0][3] if parts else 0
        keys = np.concatenate([part[0] for part in parts]) if parts else np.zeros((0, 16), np.uint8)
        words = np.ascontiguousarray(keys).view("<u8").reshape(-1, 2)
        order = np.lexsort((words[:, 1], words[:, 0]))
        self._words = words[order]
        shard = np.repeat(np.arange(len(parts)), [len(part[0]) for part in parts])
        ends = [np.stack((part[1][:-1], part[1][1:], part[2]), axis=1) for part in parts]
        spans = np.concatenate(ends) if ends else np.zeros((0, 3), np.int64)
        self._spans: NDArray[np.int64] = np.concatenate((shard[:, None], spans), axis=1)[order]

    def __len__(self) -> int:
        return len(self._words)

    @property
    def tokens(self) -> int:
        """Tokens of all captions."""
        return int((self._spans[:, 2] - self._spans[:, 1]).sum())

    def find(self, key: bytes) -> tuple[int, int, int, int] | None:
        """Shard, first and last token (exclusive) and CRC-32 of a caption's embedding; None where it is not there."""
        first, second = np.frombuffer(key, "<u8")
        at = int(np.searchsorted(self._words[:, 0], first))
        while at < len(self._words) and self._words[at, 0] == first:
            if self._words[at, 1] == second:
                shard, start, end, checksum = self._spans[at].tolist()
                return shard, start, end, checksum
            at += 1
        return None


class CachedText:
    """Reads embeddings in place of an encoder: `encode` as `T5GemmaTower.encode`, from memory-mapped shards.

    Args:
        folder: what train/precompute_text.py wrote.
        encoding: encoder and storage that the embeddings must be of.
        device: where they go.
        command: what a user would type to add captions.

    Raises:
        UserError: see `CacheIndex`; or an empty folder.
    """

    def __init__(self, folder: Path, encoding: Encoding, device: torch.device, command: str) -> None:
        self.folder, self.encoding, self.device, self.command = folder, encoding, device, command
        self.index = CacheIndex(folder, encoding)
        if not len(self.index):
            raise UserError(f"there is no text cache at {folder}; make it with: {command}")
        self.width = self.index.width
        self._open: OrderedDict[int, Any] = OrderedDict()

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, list[int]]:
        """Embeddings of the captions' tokens behind one another, (sum of lengths, width) bfloat16, and their lengths.

        Raises:
            UserError: a caption that the cache lacks, with the command that adds it; a damaged shard, by its file.
        """
        read = [self._read(caption) for caption in captions]
        if not read:
            return torch.empty(0, self.width, dtype=torch.bfloat16, device=self.device), []
        stored = self._to_device(torch.cat([part for part, _ in read]))
        scales = [scale for _, scale in read if scale is not None]
        tokens = dequantise(stored, self._to_device(torch.cat(scales)) if scales else None)
        return tokens, [part.shape[0] for part, _ in read]

    def _read(self, caption: str) -> tuple[Tensor, Tensor | None]:
        found = self.index.find(self.encoding.key(caption))
        if found is None:
            shown = _shown(caption)
            raise UserError(f"the text cache {self.folder} lacks the caption {shown}; add it with: {self.command}")
        shard, start, end, checksum = found
        file = self.index.files[shard]
        try:
            opened = self._shard(shard)
            tokens = opened.get_slice("tokens")[start:end]
            scale = None if self.encoding.storage == "bf16" else opened.get_slice("scales")[start:end]
        except (SafetensorError, OSError) as error:
            raise _damaged(file, str(error)) from None
        if _checksum(tokens, scale) != checksum:
            raise _damaged(file, f"tokens {start} to {end} have another checksum")
        return tokens, scale

    def _shard(self, number: int) -> Any:
        """A shard, opened; files are mapped, so each is read where it is asked for."""
        if number not in self._open:
            self._open[number] = safe_open(self.index.files[number], framework="pt")
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)


def _read_manifest(file: Path, encoding: Encoding) -> dict[str, int]:
    """Shards and their sizes in bytes that a writer lists; none where it has not written yet."""
    if not file.exists():
        return {}
    try:
        content = parse_json(file.read_bytes())
        there, shards = Encoding(**content["encoding"]), {str(n): int(s) for n, s in content["shards"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, OSError):
        raise UserError(f"{file} is no list of shards; remove it and run train/precompute_text.py again") from None
    if there != encoding:
        before, now = asdict(there), asdict(encoding)
        changed = ", ".join(f"{name} {before[name]!r} -> {now[name]!r}" for name in now if before[name] != now[name])
        keep = ", or --text.no-clean to train on captions as they were encoded" if there.clean < encoding.clean else ""
        raise UserError(
            f"{file.parent} holds embeddings of other settings ({changed}); give --text.cache another one{keep}"
        )
    return shards


def _read_index(
    file: Path, size: int, encoding: Encoding
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64], int]:
    """Keys (n, 16), offsets (n + 1,), checksums (n,) and width of a shard, whose structure is checked."""
    if not file.exists():
        raise UserError(f"the shard {file} is missing; copy it back, or run train/precompute_text.py again")
    if file.stat().st_size != size:
        raise _damaged(file, f"{file.stat().st_size} bytes where {size} were written")
    try:
        with safe_open(file, framework="pt") as opened:
            keys, offsets = opened.get_tensor("keys").numpy(), opened.get_tensor("offsets").numpy()
            checksums, shape = opened.get_tensor("checksums").numpy(), opened.get_slice("tokens").get_shape()
            there = Encoding(**parse_json(opened.metadata()["encoding"]))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(file, str(error)) from None
    name = hashlib.blake2b(keys.tobytes(), digest_size=12).hexdigest()
    fits = keys.shape == (len(checksums), 16) and offsets.shape == (len(checksums) + 1,) and name in file.name
    if not fits or there != encoding or int(offsets[-1]) != shape[0] or (np.diff(offsets) < 0).any():
        raise _damaged(file, "its index does not fit its tokens or its name")
    return keys, offsets, checksums, int(shape[1])


def _checksum(tokens: Tensor, scale: Tensor | None) -> int:
    """CRC-32 of a caption's stored tokens and their scales."""
    checksum = 0
    for part in (tokens, scale):
        if part is not None:
            checksum = zlib.crc32(part.contiguous().view(torch.uint8).numpy().data, checksum)
    return checksum


def _shown(caption: str) -> str:
    return repr(caption if len(caption) <= 60 else caption[:57] + "…")


def _damaged(file: Path, reason: str) -> UserError:
    line = (reason.strip().splitlines() or ["cannot be read"])[0].rstrip(".")[:160]
    return UserError(f"the shard {file} is damaged ({line}); remove it and run train/precompute_text.py again")


def _lock(file: Path) -> IO[bytes] | None:
    """Hold a file while it is open, which a dead process does not; None where a file system cannot."""
    try:
        import fcntl
    except ImportError:
        return None
    opened = file.open("wb")
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        opened.close()
        raise UserError(
            f"another process holds {file}; wait for it, or share the work out with torchrun --nproc-per-node"
        ) from None
    except OSError:
        opened.close()
        return None
    return opened


def _replace(temporary: Path, final: Path) -> None:
    """Put a written file on the disk and under its name, so that a crash leaves the whole or nothing."""
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, final)
    directory = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
