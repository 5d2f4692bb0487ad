"""Numbers: every field of every section takes a number or refuses it in one sentence, before torch is imported."""

import json
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from prx_model.ranges import Range, check_ranges, problems, ranges
from tests.test_imports import run_python
from tests.train.commands import TINY, run_program
from train.commandline import DryRun, parse
from train.errors import EXIT_BAD_INPUT, UserError
from train.learner.build import check
from train.recipes import PRESETS, Recipe, prx_512, shapes
from train.run.folder import read_config, write_config

VALUES = ("0", "-1", "nan", "inf", "100000000000000000000")


def sections() -> dict[str, Any]:
    recipe = prx_512()
    found = {
        item.name: getattr(recipe, item.name) for item in fields(recipe) if is_dataclass(getattr(recipe, item.name))
    }
    return {**found, "dry_run": DryRun()}


def numbers(section: Any) -> list[str]:
    """Fields of a section that hold numbers."""
    hints = get_type_hints(type(section))
    return [name for name, hint in hints.items() if {int, float} & {hint, *get_args(hint)}]


def test_every_number_of_every_section_has_a_range() -> None:
    found = {f"{name}.{field}" for name, section in sections().items() for field in numbers(section)}
    ranged = {f"{name}.{field}" for name, section in sections().items() for field in ranges(type(section))}
    assert found == ranged
    assert len(found) > 70


def given(number: float, value: Any) -> Any:
    return (number, *value[1:]) if isinstance(value, tuple) else number


@pytest.mark.parametrize("name", [name for name in sections() if name != "dry_run"])
@pytest.mark.parametrize("text", VALUES)
def test_a_section_takes_each_number_or_refuses_it_in_one_sentence(name: str, text: str) -> None:
    recipe = shapes()
    section = getattr(recipe, name)
    for field in numbers(section):
        number = float(text) if text in ("nan", "inf") else int(text)
        bounds = ranges(type(section))[field]
        good = bounds.problem(number) is None
        try:
            changed = replace(recipe, **{name: replace(section, **{field: given(number, getattr(section, field))})})
            check_ranges(changed)
            check(changed)
        except (ValueError, UserError) as error:
            told = str(error)
            assert told.count("\n") == 0 and len(told) < 400  # noqa: PT017, PT018
        else:
            assert good, f"{name}.{field} {text} was taken"
        assert text not in ("nan", "inf") or not good, f"{name}.{field} takes {text}"
        assert text != "100000000000000000000" or not good or bounds.high > 1e30, f"{name}.{field} takes {text}"


def test_the_command_line_takes_each_number_or_refuses_it_in_one_sentence() -> None:
    recipe, told = shapes(), list[str]()
    named = [(n, field) for n, section in sections().items() if n != "dry_run" for field in numbers(section)]
    for number, (name, field) in enumerate(named):
        value, text = getattr(getattr(recipe, name), field), VALUES[number % len(VALUES)]
        words = [text, *map(str, value[1:])] if isinstance(value, tuple) else [text]
        try:
            parse(["shapes", f"--{name}.{field}".replace("_", "-"), *words])
        except UserError as error:
            told.append(str(error))
    assert len(told) > len(named) // 2
    assert not [sentence for sentence in told if "\n" in sentence or len(sentence) > 400]


INSTANCES = [
    (["--evaluation.every", "0"], "evaluation.every must be at least 1, got 0"),
    (["--evaluation.every", "-1"], "evaluation.every must be at least 1, got -1"),
    (["--parallel.micro-batches", "0"], "parallel.micro_batches must be at least 1"),
    (["--ema.every", "0"], "ema.every must be at least 1"),
    (["--ema.decay", "1.5"], r"ema.decay must lie in \[0, 1\), got 1.5"),
    (["--flow.shift", "nan"], "flow.shift must be a finite number"),
    (["--flow.shift", "0"], "flow.shift must be positive"),
    (["--adam.lr", "nan"], "adam.lr must be a finite number"),
    (["--adam.lr", "inf"], "adam.lr must be a finite number"),
    (["--muon.lr", "-inf"], "muon.lr must be a finite number"),
    (["--parallel.timeout", "nan"], "parallel.timeout must be a finite number"),
    (["--parallel.timeout", "inf"], "parallel.timeout must be a finite number"),
    (["--parallel.timeout", "1e300"], "parallel.timeout must be at most"),
    (["--data.height", "100000000000000000000"], "data.height must be at most 65536"),
    (["--evaluation.prompts", "0"], "evaluation.prompts must be at least 1"),
    (["--sampling.steps", "1e20"], "sampling.steps"),
    (["--text.max-tokens", "-1"], "text.max_tokens must be at least 1, got -1"),
    (["--evaluation.grid", "-1"], "evaluation.grid must not be negative, got -1"),
    (["--evaluation.grid", "100000000000000000000"], "evaluation.grid must be at most 10000"),
    (["--flow.caption-drop", "2"], "flow.caption_drop is a share from 0 to 1, got 2"),
    (["--model.depth", "100000000000000000000"], "depth must be at most 1024"),
    (["--model.mlp-ratio", "inf"], "mlp_ratio must be a finite number"),
    (["--dry-run", "--mfu", "nan"], "--mfu must be a finite number"),
    (["--dry-run", "--gpus", "100000000000000000000"], "--gpus must be at most"),
]


@pytest.mark.parametrize(("words", "sentence"), INSTANCES)
def test_numbers_that_were_tracebacks_or_accepted_are_refused(words: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parse(["shapes", *words])


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_fits_its_ranges(preset: str) -> None:
    assert list(problems(PRESETS[preset]())) == []


def test_both_stages_are_checked_by_their_names() -> None:
    with pytest.raises(UserError, match="stage2.ema.decay must lie in"):
        parse(["prx-24h", "--stage2.ema.decay", "2"])


def test_help_shows_the_range_of_a_number_and_leaves_the_types_as_they_are() -> None:
    done = run_program("speedrun", "--help")
    assert "--train.steps INT [1, 1000000000]" in done.stdout
    assert "--ema.decay FLOAT [0, 1)" in done.stdout
    assert ranges(type(shapes().ema))["decay"] == Range(0, 1, below=True)


def test_numbers_are_refused_before_torch_is_imported() -> None:
    code = (
        "import sys; from train.commandline import parse\ntry:\n    parse(['shapes', '--adam.lr', 'nan'])\n"
        "except Exception as error:\n    print(type(error).__name__, 'torch' in sys.modules)"
    )
    assert run_python(code).strip() == "UserError False"


def test_a_config_with_a_number_that_cannot_be_is_refused_by_name(tmp_path: Path) -> None:
    write_config(tmp_path, shapes())
    values = asdict(shapes())
    values["ema"]["decay"] = 2.0
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"ema.decay must lie in \[0, 1\), got 2.0"):
        read_config(tmp_path)
    assert isinstance(parse(["shapes"]).recipe, Recipe)


@pytest.mark.parametrize(
    "words", [["--steps", "0"], ["--grid", "0"], ["--height", "100000000000000000000"], ["--seed", "1" * 30]]
)
def test_generate_refuses_numbers_in_a_sentence(tmp_path: Path, words: list[str]) -> None:
    done = run_program("generate", str(tmp_path), "a", "--out", str(tmp_path / "a.png"), *words)
    assert done.returncode == EXIT_BAD_INPUT
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_run_with_the_smallest_numbers_ends_well(tmp_path: Path) -> None:
    """What the ranges let pass at their lower ends is run to its end."""
    words = ["--train.steps", "1", "--evaluation.prompts", "1", "--evaluation.grid", "0", "--evaluation.images", "0"]
    words += ["--text.max-tokens", "1", "--sampling.steps", "1", "--flow.t-floor", "0", "--checkpoint.keep", "1"]
    words += ["--muon.lr", "0", "--ema.decay", "0", "--sampling.guidance", "0", "--train.warmup", "0"]
    done = run_program("speedrun", "shapes", *TINY, *words, "--output.folder", str(tmp_path))
    assert done.returncode == 0, done.stderr
