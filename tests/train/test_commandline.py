"""The command line: presets, fields, help, the plan; and one sentence for whatever is wrong."""

import subprocess
import sys
import time
from dataclasses import replace

import pytest

from tests.train.commands import ROOT, TINY, run_program
from train.commandline import field_names, parse
from train.errors import UserError, exit_with_sentence
from train.recipes import PRESETS, Recipe, TwoStages


def test_no_words_give_the_shapes_preset() -> None:
    recipe = parse([]).recipe
    assert isinstance(recipe, Recipe)
    assert recipe.preset == "shapes"


def test_a_field_is_set_alone() -> None:
    default, changed = PRESETS["shapes"](), parse(["shapes", "--flow.shift", "4"]).recipe
    assert isinstance(default, Recipe)
    assert isinstance(changed, Recipe)
    assert changed.flow.shift == 4.0
    assert changed.model == default.model
    assert changed.train == default.train


def test_stages_are_set_apart() -> None:
    recipe = parse(["prx-24h", "--stage2.train.steps", "7"]).recipe
    assert isinstance(recipe, TwoStages)
    assert (recipe.stage1.train.steps, recipe.stage2.train.steps) == (100_000, 7)


@pytest.mark.parametrize("name", ["routing", "repa", "lpips", "pdino", "muon"])
def test_an_ingredient_is_left_out_by_one_flag_in_every_stage(name: str) -> None:
    whole = parse(["prx-24h", f"--no-{name}"]).recipe
    assert isinstance(whole, TwoStages)
    default = PRESETS["prx-24h"]()
    assert isinstance(default, TwoStages)
    for stage, before in ((whole.stage1, default.stage1), (whole.stage2, default.stage2)):
        off = replace(getattr(before, name), enabled=False)
        assert stage == replace(before, **{name: off})
    single = parse(["prx-512", f"--no_{name}", "--train.steps", "7"]).recipe
    assert isinstance(single, Recipe)
    assert (getattr(single, name).enabled, single.train.steps) == (False, 7)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["shape"], "unknown preset 'shape'; did you mean 'shapes'?"),
        (["shapes", "--train.step", "3"], "unknown field --train.step; did you mean 'train.steps'?"),
        (["shapes", "--sampling.t-min", "2"], "sampling.t_min must lie in (0, 1), got 2.0"),
        (["shapes", "--model.num-heads", "3"], "must be a multiple of num_heads 3"),
        (["shapes", "--preset", "prx-512"], "--preset cannot be set"),
        (["shapes", "--no-routin"], "unknown field --no-routin; did you mean 'no-routing'?"),
        (["shapes", "--no-repa=yes"], "--no-repa takes no value, got --no-repa=yes"),
        (["shapes", "--gpus", "4"], "--gpus goes with --dry-run"),
        (["shapes", "--dry-run", "--gpus", "many"], "--gpus takes a number, got 'many'"),
    ],
)
def test_a_wrong_word_is_one_sentence(words: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        parse(words)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_user_error_leaves_with_code_2_and_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise UserError("the sky is green")

    with pytest.raises(SystemExit) as left:
        exit_with_sentence(main)
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: the sky is green\n"


def test_help_comes_without_torch_in_under_two_seconds() -> None:
    for _ in range(3):
        began = time.monotonic()
        done = run_program("speedrun", "--help")
        seconds = time.monotonic() - began
        assert done.returncode == 0
        if seconds < 6:
            break
    assert all(preset in done.stdout for preset in PRESETS)
    assert "--flow.caption-drop" in done.stdout
    assert "--no-routing" in done.stdout
    # docs/layout.md's bound, with room for a loaded machine.
    assert seconds < 6
    code = "import sys; from train.commandline import parse; parse(['prx-512']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_a_plan(preset: str) -> None:
    done = run_program("speedrun", preset, "--dry-run", "--gpus", "32", "--mfu", "0.25")
    assert done.returncode == 0, done.stderr
    for part in ("parameters, model", "Muon: ", "AdamW: ", "memory:", "TFLOP a step", "32 GPUs", " h, $"):
        assert part in done.stdout


def test_the_plan_of_the_whole_run_has_the_published_size() -> None:
    done = run_program("speedrun", "prx-24h", "--dry-run", "--gpus", "32", "--mfu", "0.25")
    assert "parameters, model: 1,177,215,744" in done.stdout
    # 26.8 TFLOP for 32 pictures (docs/recipe.md) x 32 GPUs at 512 px with routing.
    line = next(line for line in done.stdout.splitlines() if "denoiser:" in line)
    assert float(line.split()[1]) == pytest.approx(26.8 * 32, rel=0.01)
    assert "both stages:" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["pictograms"], "give their folder with --data.path"),
        (["pictograms", "--data.path", "/nowhere"], "there is nothing at /nowhere"),
        (["shapes", "--data.width", "36"], "36 is not a multiple of the patch size 8; 32x32 would be"),
        (["shapes", "--train.device", "cuda"], "no CUDA device is visible"),
        (["shapes", "--train.attention", "varlen"], "needs a CUDA device"),
        (["shapes", "--routing.enabled", "--routing.end", "9"], "the model has blocks 0 to 3"),
        (["prx-512", "--data.path", "docs"], "docs holds only"),
    ],
)
def test_bad_input_is_one_sentence_with_code_2(arguments: list[str], sentence: str, tmp_path) -> None:
    done = run_program("speedrun", *arguments, "--output.folder", str(tmp_path / "runs"), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_every_field_of_the_recipe_has_a_known_name() -> None:
    names = set(field_names(PRESETS["prx-512"]()))
    assert {"routing.selection_ratio", "repa.weight", "muon.lr", "ema.decay", "train.clip"} <= names
    assert len(names) > 60
    assert TINY
