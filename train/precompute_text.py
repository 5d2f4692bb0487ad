"""Encode the captions of a data set once, so that training needs no text encoder.

    torchrun --nproc-per-node 8 train/precompute_text.py prx-512 --data.path FOLDER --text.cache CACHE

Takes the words that speedrun.py takes, so that captions are those that it will draw: every caption column, style
prefixes, the validation split, and the empty prompt. Stop it at any time; the same command goes on behind the last
whole shard. Ranks share the captions by their hash and wait for nobody. Then train with the same --text.cache.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.commandline import parse  # noqa: E402
from train.errors import UserError, exit_with_sentence  # noqa: E402
from train.recipes import Recipe, TwoStages  # noqa: E402
from train.shown import tell  # noqa: E402

if TYPE_CHECKING:
    from train.data.text_cache import CacheIndex, Encoding
    from train.ranks.parallel import World

CHUNK = 1024
"""Captions tokenised and sorted by length together: groups of one length are then full."""
_REPORT_EVERY = 16


def main() -> int:
    words = sys.argv[1:]
    if "--help" in words or "-h" in words:
        print(__doc__)
        return 0
    command = parse(words)
    if command.dry_run.enabled:
        raise UserError("precompute_text.py has no --dry-run; speedrun.py's says how large the cache will be")
    recipe = command.recipe
    stages = [recipe.stage1, recipe.stage2] if isinstance(recipe, TwoStages) else [recipe]
    from train.ranks import parallel

    world = parallel.start(stages[0].train)
    try:
        for stage in stages:
            tell(precompute(stage, world))
    except KeyboardInterrupt:
        raise UserError("stopped; the same command goes on behind the last whole shard") from None
    finally:
        parallel.finish()
    return 0


def precompute(recipe: Recipe, world: "World", shard_tokens: int | None = None) -> str:
    """Encode this rank's share of the captions that its cache lacks; gives a sentence about what was done.

    Raises:
        UserError: settings without a cache, data or an encoder that cannot be read, a damaged shard, or another
            process that writes as this rank.
    """
    from prx_model.text import T5GemmaTower
    from train.data.text_cache import SHARD_TOKENS, CacheIndex, Encoding, ShardWriter
    from train.learner.build import frozen_tower

    text = recipe.text
    if text.kind != "t5gemma" or not text.cache or recipe.data.kind != "images":
        raise UserError(
            "precompute_text.py encodes the captions of pictures by T5Gemma: give a prx preset or --text.kind t5gemma, "
            "--data.path and --text.cache"
        )
    folder, encoding = Path(text.cache), Encoding.of(text)
    captionless: list[str] = []
    tower: T5GemmaTower | None = None
    encoded, tokens, began = 0, 0, time.monotonic()
    with ShardWriter(folder, encoding, world.rank, world.size, shard_tokens or SHARD_TOKENS) as writer:
        index = CacheIndex(folder, encoding, missing_allowed=True)
        todo = _missing(recipe, index, encoding, world, captionless)
        while chunk := list(islice(todo, CHUNK)):
            if tower is None:  # not before there is something to encode
                tower = frozen_tower(text).to(world.device)
            out, lengths = tower.encode(chunk)
            writer.add(chunk, out, lengths)
            encoded, tokens = encoded + len(chunk), tokens + len(out)
            if world.is_main and encoded % (_REPORT_EVERY * CHUNK) == 0:
                rate = encoded / (time.monotonic() - began)
                print(f"rank 0 of {world.size}: {encoded:,} captions, {rate:.0f} captions/s", flush=True)
        writer.flush()
    return (
        f"{folder}: rank {world.rank} of {world.size} encoded {encoded:,} captions ({tokens:,} tokens); "
        f"{len(index):,} were there before{_without_caption(captionless)}"
    )


def _without_caption(keys: list[str]) -> str:
    """What is said about rows that have no caption: training shows other rows in their places."""
    return f"; {len(keys):,} rows have no caption and are never shown, the first {keys[0]}" if keys else ""


def _missing(
    recipe: Recipe, index: "CacheIndex", encoding: "Encoding", world: "World", captionless: list[str]
) -> Iterator[str]:
    """This rank's captions that the index lacks, each once, in the order of the data.

    The keys of rows without any caption are added to `captionless`.
    """
    from train.data.loader import open_dataset, open_validation
    from train.data.readers import ImageDataset

    seen: set[bytes] = set()

    def all_captions() -> Iterator[str]:
        yield ""
        data = replace(recipe.data, buckets=False)  # captions alone need no picture's size
        for dataset in (open_dataset(data, recipe.train.seed, 1), open_validation(data, 1)):
            if isinstance(dataset, ImageDataset):
                yield from dataset.captions(captionless.append)

    for caption in map(encoding.text, all_captions()):
        key = encoding.key(caption)
        if int.from_bytes(key, "little") % world.size != world.rank or key in seen:
            continue
        seen.add(key)
        if index.find(key) is None:
            yield caption


if __name__ == "__main__":
    exit_with_sentence(main)
