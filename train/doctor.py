"""Look at data and a preset before anyone pays: buckets, captions, broken files, hours, dollars, memory, disk.

    python train/doctor.py prx-512 --data.path FOLDER [--gpus 32] [--sample 500 | --all] [--json]

Takes the words that speedrun.py takes, and those of its --dry-run. Needs no GPU, no network and no weights. Leaves with
exit code 1 where training would stop or lose data, 0 where nothing was found, and 2 with a sentence for a mistake in
the command or data that cannot be opened, as every program here.
"""

import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from prx_model.captions import clean_caption  # noqa: E402
from train.commandline import DryRun, parse  # noqa: E402
from train.errors import UserError, exit_with_sentence  # noqa: E402
from train.recipes import Recipe, TwoStages  # noqa: E402
from train.shown import tell  # noqa: E402

if TYPE_CHECKING:
    from train.data.readers import ImageDataset

_SAMPLE = 200
"""Pictures decoded unless told."""
_CAPTIONS = 200_000
"""Captions that are measured: the first ones, for reading all of a remote set would take as long as training on it."""
_PERCENTILES = (50, 90, 99, 100)
_LONG_OPENING = 30.0
"""Seconds of opening data above which keeping what was read is worth a note: each rank opens them at each start."""
_MANY_EPOCHS = 100
"""Times that a picture is seen above which that is worth a note."""
_ENLARGED = 1.05
"""Times a picture's side grows above which it counts as enlarged; to a hair larger none is blurred."""
_LARGE_GROUP = 64 << 20
"""Bytes of a parquet row group above which random access is worth a warning."""


@dataclass(frozen=True)
class Options:
    """What doctor.py takes beside the recipe."""

    sample: int | None = _SAMPLE
    """Pictures to decode; None decodes all."""
    as_json: bool = False


@dataclass
class Findings:
    """What was found, as plain values, and what is wrong."""

    values: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    """Sentences: what would stop a run or lose data."""
    advice: list[str] = field(default_factory=list)
    """Sentences: what costs speed or quality."""


def main() -> int:
    words = sys.argv[1:]
    if "--help" in words or "-h" in words or not words:
        print(__doc__)
        return 0
    words, options = take_options(words)
    command = parse(words if "--dry-run" in words else [*words, "--dry-run"])
    recipe = command.recipe
    stages = [recipe.stage1, recipe.stage2] if isinstance(recipe, TwoStages) else [recipe]
    found = [examine(stage, command.dry_run, options) for stage in stages]
    if options.as_json:
        listed = [{**f.values, "wrong": f.wrong, "advice": f.advice} for f in found]
        print(json.dumps(listed if len(listed) > 1 else listed[0], indent=2))
    else:
        tell("\n\n".join(render(f) for f in found), lines=True)
    return int(any(f.wrong for f in found))


def take_options(words: Sequence[str]) -> tuple[list[str], Options]:
    """Take --sample N, --all and --json out of the words.

    Raises:
        UserError: a sample that is no positive number.
    """
    rest, sample, as_json = [], _SAMPLE, False
    everything, waiting = False, iter(words)
    for word in waiting:
        name, equals, value = word.partition("=")
        if name == "--sample":
            value = value if equals else next(waiting, "")
            if not value.isdigit() or int(value) < 1:
                raise UserError(f"--sample takes a number of pictures, at least 1, got {value!r}")
            sample = int(value)
        elif word == "--all":
            everything = True
        elif word == "--json":
            as_json = True
        else:
            rest.append(word)
    return rest, Options(None if everything else sample, as_json)


def examine(recipe: Recipe, assumed: DryRun, options: Options) -> Findings:
    """Look at the data of one stage, and at what the stage will cost.

    Raises:
        UserError: data that cannot be opened, or settings that do not fit.
    """
    from train.data.loader import bucket_counts, notes, open_dataset, open_validation
    from train.data.mixture import MixedIndex, places
    from train.data.readers import ImageDataset

    found = Findings({"preset": recipe.preset})
    if recipe.data.kind != "images":
        found.values["data"] = f"{recipe.data.kind} are drawn on the fly: there is nothing to read"
        _costs(found, recipe, assumed, {}, None)
        return found
    began = time.monotonic()
    dataset = open_dataset(recipe.data, recipe.train.seed, recipe.model.patch_size)
    validation = open_validation(recipe.data, recipe.model.patch_size)
    assert isinstance(dataset, ImageDataset)
    index = dataset.index
    found.values |= {
        "path": places(recipe.data),
        "samples": len(dataset),
        "account": {**vars(dataset.index.account), "left": dict(dataset.index.account.left)},
        "validation": 0 if validation is None else len(validation),
        "columns": list(dataset.index.columns),
        "opened_in_seconds": round(time.monotonic() - began, 2),
        "epochs": round(recipe.train.steps * recipe.train.batch / len(dataset), 2),
        "sources": index.told(recipe.train.steps * recipe.train.batch) if isinstance(index, MixedIndex) else [],
    }
    found.wrong += dataset.index.problems
    if validation is None:
        found.advice.append("there is no validation split: no held-out loss and no distances will be measured")
    if found.values["epochs"] > _MANY_EPOCHS:
        found.advice.append(
            f"each picture would be seen {found.values['epochs']:,.0f} times, and the model may learn them by heart: "
            "give more data, or fewer --train.steps"
        )
    counts = bucket_counts(dataset)
    try:
        merged = [note for note in notes(dataset, recipe.train.batch) if note not in dataset.index.problems]
        found.advice += merged
    except UserError as error:
        found.wrong.append(str(error))
    found.values["buckets"] = _buckets(dataset, counts, recipe.train.batch)
    length = _captions(found, dataset, recipe)
    _pictures(found, dataset, recipe, options.sample)
    _storage(found, dataset, recipe)
    _costs(found, recipe, assumed, counts, length)
    return found


def _buckets(dataset: "ImageDataset", counts: dict[tuple[int, int], int], batch: int) -> list[dict[str, Any]]:
    """Size, pictures and, where a bucket is too small, the one that takes them; no empty ones."""
    from train.data.loader import merges_of

    try:
        into = {m.size: m.into for m in merges_of(dataset, batch)}
    except UserError:  # told already
        into = {}
    return [
        {"height": size[0], "width": size[1], "pictures": count, "merged_into": into.get(size)}
        for size, count in counts.items()
        if count
    ]


def _captions(found: Findings, dataset: "ImageDataset", recipe: Recipe) -> float | None:
    """Lengths of captions; gives the mean in tokens where it can be told."""
    from train.data.loader import most_captions

    missing: list[str] = []
    unread: list[str] = []
    captions = list(islice(dataset.captions(missing.append, unread.append), _CAPTIONS))
    if recipe.text.clean:
        captions = list(map(clean_caption, captions))
    if not captions:
        found.wrong.append(f"no caption in {', '.join(dataset.caption_columns)} of any row")
        return None
    sizes = [len(caption.encode(errors="replace")) for caption in captions]
    values: dict[str, Any] = {"read": len(captions), "most": most_captions(dataset), "bytes": _percentiles(sizes)}
    if (repeated := len(captions) - len(set(captions))) > 0:
        values["repeated"] = repeated
    if unread:
        values["unread"] = len(unread)
        found.advice.append(f"{len(unread):,} texts cannot be read (first {unread[0]})")
    if missing:
        values["rows_without"] = len(missing)
        share = len(missing) / (len(missing) + len(captions))
        note = f"{len(missing):,} rows have no caption (first {missing[0]}); other rows stand in their places"
        (found.wrong if share > recipe.data.bad_limit else found.advice).append(note)
    tokens = list(map(_byte_tokens, sizes)) if recipe.text.kind == "bytes" else _t5_tokens(captions, recipe)
    if tokens is not None:
        cut = sum(n > recipe.text.max_tokens for n in tokens)
        values |= {"tokens": _percentiles(tokens), "longer_than_max_tokens": cut}
        if cut:
            share = cut / len(tokens)
            found.advice.append(f"{share:.1%} of captions are longer than text.max_tokens {recipe.text.max_tokens}")
    found.values["captions"] = values
    return None if tokens is None else sum(min(n, recipe.text.max_tokens) for n in tokens) / len(tokens)


def _byte_tokens(size: int) -> int:
    return size + 1  # with the end token


def _t5_tokens(captions: Sequence[str], recipe: Recipe) -> list[int] | None:
    """Tokens of each caption by the encoder's tokenizer, where it lies on this machine; nothing is downloaded."""
    try:
        from prx_model.text import load_tokenizer

        tokenizer = load_tokenizer(recipe.text.name, revision=recipe.text.revision or None, local_files_only=True)
    except Exception:  # missing, gated or damaged in one of the library's many ways: then lengths stay in bytes
        return None
    return [len(ids) for first in range(0, len(captions), 1024) for ids in tokenizer(captions[first : first + 1024])["input_ids"]]  # fmt: skip  # noqa: E501


def _pictures(found: Findings, dataset: "ImageDataset", recipe: Recipe, sample: int | None) -> None:
    """Decode some or all pictures at their sizes: which are broken, how fast it goes, which are the same."""
    from train.data.rows import BadSample
    from train.data.sampler import draw_order

    count = len(dataset) if sample is None else min(sample, len(dataset))
    rows = range(len(dataset)) if sample is None else sorted(draw_order(0, len(dataset), 0)[:count].tolist())
    bad: list[str] = []
    seen: dict[bytes, int] = {}
    growth: list[float] = []
    seconds = 0.0
    for row in rows:
        began = time.process_time()
        try:
            example = dataset.example(row, row, dataset.size_of(row))
            digest = hashlib.blake2b(example.image.tobytes(), digest_size=16).digest()
            seen[digest] = seen.get(digest, 0) + 1
        except BadSample as error:
            bad.append(str(error).removeprefix(f"{dataset.index.path}: "))
        else:
            growth.append(_growth(dataset, row))
        seconds += time.process_time() - began
    low, high = wilson(len(bad), count) if count < len(dataset) else (len(bad) / count, len(bad) / count)
    found.values["pictures"] = {
        "decoded": count,
        "broken": len(bad),
        "broken_share_95_percent": [round(low, 5), round(high, 5)],
        "broken_first": bad[:5],
        "the_same_pixels_again": sum(n - 1 for n in seen.values()),
        "decoded_a_second_and_core": round(count / max(seconds, 1e-9), 1),
    }
    larger = sorted(times for times in growth if times > _ENLARGED)
    found.values["pictures"]["enlarged_share"] = round(len(larger) / max(len(growth), 1), 4)
    if larger:
        median = larger[len(larger) // 2]
        found.values["pictures"]["enlarged_times"] = round(median, 2)
        found.advice.append(
            f"{len(larger) / len(growth):.1%} of the pictures are smaller than they are trained at, and are enlarged: "
            f"half of those {median:.1f} times a side or more, the smallest {larger[-1]:.1f} times; give larger ones, "
            "or a smaller --data.height and --data.width"
        )
    if low > recipe.data.bad_limit:
        found.wrong.append(
            f"{len(bad)} of {count} pictures cannot be read ({low:.2%} to {high:.2%} of all), more than data.bad_limit "
            f"{recipe.data.bad_limit:g}: the run would stop; the first: {bad[0]}"
        )
    elif bad:
        found.advice.append(
            f"{len(bad)} of {count} pictures cannot be read ({low:.2%} to {high:.2%} of all); the first: {bad[0]}"
        )


def _growth(dataset: "ImageDataset", row: int) -> float:
    """How many times longer a readable picture's sides become; of a stretched one by the areas."""
    from train.data.sizes import size_of_file, upright_size

    image = dataset.index.row(row).image
    high, wide = size_of_file(image) if isinstance(image, Path) else upright_size(lambda count: image[:count])
    height, width = dataset.size_of(row)
    if not high or not wide:
        return 1.0  # a header that cannot be told
    return math.sqrt(height * width / (high * wide)) if dataset.fit == "stretch" else max(height / high, width / wide)


def wilson(hits: int, count: int) -> tuple[float, float]:
    """95 % interval of a share from `hits` of `count` (Wilson 1927, equation of the score interval)."""
    z = 1.959964
    share, spread = hits / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def _storage(found: Findings, dataset: "ImageDataset", recipe: Recipe) -> None:
    """Whether opening takes long, or random access reads much more than a picture."""
    from train.data.formats.parquet import ParquetIndex
    from train.data.mixture import MixedIndex

    seconds = found.values["opened_in_seconds"]
    if seconds > _LONG_OPENING and not recipe.data.index_cache:
        told = all(name in dataset.index.columns for name in recipe.data.size_columns)
        columns = "" if told or not recipe.data.buckets else f", or columns {' and '.join(recipe.data.size_columns)}"
        found.advice.append(
            f"opening took {seconds:.0f} s, and each rank does it at every start: "
            f"give --data.index-cache FOLDER{columns}"
        )
    parts = dataset.index.parts if isinstance(dataset.index, MixedIndex) else [dataset.index]
    size = max(part.group_bytes() if isinstance(part, ParquetIndex) else 0 for part in parts)
    if size > _LARGE_GROUP:
        found.advice.append(
            f"parquet row groups have up to {size / 2**20:.0f} MiB, and each picture may read a whole one: write them "
            "anew with about 100 rows a group, or as WebDataset tar files"
        )


def _costs(
    found: Findings, recipe: Recipe, assumed: DryRun, counts: dict[tuple[int, int], int], length: float | None
) -> None:
    """Time, money, memory and disk of a stage on the assumed GPUs."""
    from train.data.text_cache import MEAN_TOKENS, cache_bytes
    from train.learner.build import check_ranks
    from train.run.plan import peak_memory, project

    cost = project(recipe, assumed, counts)
    share = cost.state_bytes / cost.shards
    peak, peak_known = peak_memory(recipe, assumed, cost)
    try:
        check_ranks(recipe, assumed.gpus)
    except UserError as error:
        found.advice.append(f"the run would refuse to start on {assumed.gpus} GPUs: {error}")
    found.values["cost"] = {
        "gpus": assumed.gpus,
        "image_tokens": round(cost.tokens, 1),
        "step_seconds": cost.expected.seconds,
        "hours": cost.expected.hours,
        "dollars": cost.expected.dollars,
        "summary": cost.expected.line(),
        "state_bytes_a_gpu_sharded": share,
        "shards": cost.shards,
        "state_bytes_a_gpu_whole": cost.state_bytes,
        "activation_bytes_a_gpu": cost.activation_bytes,
        "peak_bytes_a_gpu": peak,
        "peak_known": peak_known,
        # One more than are kept exists while a new one is written.
        "checkpoint_bytes_on_disk": cost.checkpoint_bytes * (recipe.checkpoint.keep + 1),
    }
    if "decoded_a_second_and_core" in (pictures := found.values.get("pictures", {})):
        needed = recipe.train.batch / cost.expected.seconds / pictures["decoded_a_second_and_core"]
        found.values["cost"]["cores_for_decoding"] = round(needed, 1)
        found.values["cost"]["cores_for_decoding_a_gpu"] = round(needed / assumed.gpus, 2)
    if recipe.text.kind == "t5gemma" and "captions" in found.values:
        captions = found.values["captions"]["most"]
        tokens = MEAN_TOKENS if length is None else round(length)
        size = cache_bytes(captions, recipe.model.context_in_dim, recipe.text.storage, tokens)
        found.values["cost"] |= {"text_cache_bytes": size, "text_cache_tokens_a_caption": tokens}
        if length is None:
            found.advice.append(
                f"the tokenizer of {recipe.text.name} is not on this machine: the text cache assumes {tokens} tokens a "
                "caption; give --text.name FOLDER"
            )


def _percentiles(values: Sequence[int]) -> dict[str, int]:
    ordered = sorted(values)
    return {f"p{p}": ordered[min(len(ordered) - 1, math.ceil(p / 100 * len(ordered)) - 1)] for p in _PERCENTILES}


def render(found: Findings) -> str:
    """The findings as lines of text."""
    return "\n".join(_lines(found))


def _lines(found: Findings) -> Iterator[str]:
    from train.data.rows import Account
    from train.run.plan import in_units

    values, cost = found.values, found.values["cost"]
    if "data" in values:
        yield f"{values['preset']}: {values['data']}"
    else:
        yield (
            f"{values['preset']}: {values['path']}: {values['samples']:,} samples and {values['validation']:,} for "
            f"validation, opened in {values['opened_in_seconds']:g} s"
            + ("" if values["sources"] else f"; {values['epochs']:g} epochs")
        )
        if not values["sources"]:
            yield f"  {Account(**values['account']).sentence()}"
        for source in values["sources"]:
            yield (
                f"  source {source['name']}: {source['share']:.2%} of the samples, {source['epochs']:g} epochs of its "
                f"{source['samples']:,}; captions from {', '.join(source['captions'])}; {source['account']}"
            )
        yield f"  columns: {', '.join(values['columns'])}"
        for bucket in values["buckets"]:
            share = bucket["pictures"] / values["samples"]
            into = (
                f"  merged into {bucket['merged_into'][0]}x{bucket['merged_into'][1]}" if bucket["merged_into"] else ""
            )
            yield f"  bucket {bucket['height']:>5}x{bucket['width']:<5}{bucket['pictures']:>12,} {share:7.2%}{into}"
        for unit in ("bytes", "tokens"):
            if unit in (captions := values.get("captions", {})):
                listed = ", ".join(f"{name} {value}" for name, value in captions[unit].items())
                repeated = captions.get("repeated", 0)
                yield f"  captions, {unit}: {listed} of {captions['read']:,} read, {repeated:,} repeated"
        pictures = values["pictures"]
        low, high = pictures["broken_share_95_percent"]
        yield (
            f"  pictures: {pictures['broken']:,} of {pictures['decoded']:,} decoded are broken ({low:.2%} to "
            f"{high:.2%} of all, 95 %), {pictures['the_same_pixels_again']:,} repeat another's pixels"
        )
        yield (
            f"  decoding: {pictures['decoded_a_second_and_core']:g} pictures a second and core of this machine, so "
            f"{cost['cores_for_decoding']:g} cores ({cost['cores_for_decoding_a_gpu']:g} a GPU) to keep up"
        )
    yield f"  {cost['summary']}"
    yield (
        f"  memory a GPU: {in_units(cost['state_bytes_a_gpu_sharded'])} of weights, gradients, optimizer and EMA "
        f"sharded over {cost['shards']} ({in_units(cost['state_bytes_a_gpu_whole'])} whole), "
        f"activations about {in_units(cost['activation_bytes_a_gpu'])}"
    )
    yield f"  at the peak {in_units(cost['peak_bytes_a_gpu'])} a GPU, {cost['peak_known']}"
    cache = f", text cache {in_units(cost['text_cache_bytes'])}" if "text_cache_bytes" in cost else ""
    yield f"  disk: checkpoints {in_units(cost['checkpoint_bytes_on_disk'])}{cache}"
    yield from (f"  note: {sentence}" for sentence in found.advice)
    yield from (f"  WRONG: {sentence}" for sentence in found.wrong)
    yield "  nothing found that would stop a run" if not found.wrong else f"  {len(found.wrong)} things to mend first"


if __name__ == "__main__":
    exit_with_sentence(main)
