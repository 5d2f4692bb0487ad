"""An exported run draws in diffusers what it draws here; generate.py writes pictures and grids."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prx_model.sampler import initial_noise
from tests.train.checkpoint.damage import reseal
from tests.train.commands import TINY, run_program
from train.run.trained import load_trained


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 30 steps: enough for weights that are not zero anywhere."""
    folder = tmp_path_factory.mktemp("run")
    fast = ("--train.steps", "30", "--muon.lr", "0.02", "--ema.decay", "0.5")
    done = run_program("speedrun", "shapes", *TINY, *fast, "--output.folder", str(folder))
    assert done.returncode == 0, done.stderr
    return folder / "shapes"


def test_diffusers_draws_the_same_picture(run: Path, tmp_path: Path) -> None:
    done = run_program("export", str(run), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "num_inference_steps=2, guidance_scale=2, use_resolution_binning=False)" in done.stdout
    os.environ["HF_HUB_OFFLINE"] = "1"
    from diffusers import PRXPixelPipeline, PRXTransformer2DModel

    from prx_model.sampler import sample

    transformer = PRXTransformer2DModel.from_pretrained(tmp_path / "out", subfolder="transformer")
    trained = load_trained(run, torch.device("cpu"))
    ours = trained.modules.model.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in transformer.state_dict().items())
    pipeline = PRXPixelPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    prompt, noise = "a red circle on a blue background, top left", torch.randn(1, 3, 32, 32)
    theirs = pipeline(
        prompt,
        num_inference_steps=6,
        guidance_scale=2.0,
        height=32,
        width=32,
        latents=noise.clone(),
        output_type="pt",
        use_resolution_binning=False,
    ).images
    (text, mask), (null_text, null_mask) = trained.modules.encode([prompt]), trained.modules.encode([""])
    mine = sample(
        trained.modules.model,
        text,
        mask,
        height=32,
        width=32,
        seeds=torch.zeros(1, dtype=torch.int64),
        settings=replace(trained.recipe.sampling, steps=6, guidance=2.0),
        null_text=null_text,
        null_mask=null_mask,
        noise=noise,
    )
    assert theirs.std() > 0.1
    assert (mine - theirs).abs().max() < 1e-3


@pytest.mark.parametrize("prompt", [" a red cat ", "sign “Hi”", "it’s", "cats &amp; dogs"])
def test_generate_and_the_exported_pipeline_draw_one_picture_of_a_prompt_as_people_write(
    run: Path, tmp_path: Path, prompt: str
) -> None:
    assert run_program("export", str(run), "--out", str(tmp_path / "out")).returncode == 0
    out, words = tmp_path / "picture.png", ("--time-grid", "diffusers", "--guidance-kind", "cfg", "--seed", "5")
    done = run_program("generate", str(run), prompt, "--out", str(out), *words)
    assert done.returncode == 0, done.stderr
    from diffusers import PRXPixelPipeline

    pipeline = PRXPixelPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    settings = load_trained(run, torch.device("cpu")).recipe.sampling
    theirs = pipeline(
        prompt,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        height=32,
        width=32,
        latents=initial_noise(torch.tensor([5]), 3, 32, 32),
        output_type="np",
        use_resolution_binning=False,
    ).images[0]
    drawn = np.asarray(Image.open(out)).astype(float)
    assert drawn.std() > 10
    assert np.abs(drawn - 255 * theirs).max() < 1.5
    other = tmp_path / "raw.png"
    plain_run = tmp_path / "uncleaned"
    shutil.copytree(run, plain_run)
    newest = plain_run / "checkpoints/step-00000030"
    config = json.loads((newest / "config.json").read_text())
    del config["text"]["clean"]  # as a run of before has it: its prompts are read as they stand
    (newest / "config.json").write_text(json.dumps(config))
    reseal(newest)
    done = run_program("generate", str(plain_run), prompt, "--out", str(other), *words)
    assert done.returncode == 0, done.stderr
    assert other.read_bytes() != out.read_bytes()
    done = run_program("export", str(plain_run), "--out", str(tmp_path / "raw"))
    assert "note: text.clean is off in this run, but the pipeline cleans every prompt" in done.stdout


def test_export_overwrites_nothing(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    done = run_program("export", str(run), "--out", str(tmp_path))
    assert done.returncode == 2
    assert "is not an empty folder" in done.stderr
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("kind", ["cfg", "self"])
def test_generate_writes_a_picture(run: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "deep" / "picture.png"
    words = ("a red circle", "--out", str(out), "--steps", "3", "--guidance", "2", "--guidance-kind", kind)
    done = run_program("generate", str(run), *words)
    assert done.returncode == 0, done.stderr
    assert Image.open(out).size == (32, 32)


def test_generate_is_the_same_for_a_seed_and_differs_between_seeds(run: Path, tmp_path: Path) -> None:
    pictures = []
    for number, seed in enumerate(("1", "1", "2")):
        out = tmp_path / f"{number}.png"
        checkpoint = run / "checkpoints/step-00000030"
        assert run_program("generate", str(checkpoint), "a", "--out", str(out), "--seed", seed).returncode == 0
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1]
    assert pictures[0] != pictures[2]


def test_generate_draws_grids_and_other_sizes(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    words = ("a red circle", "a blue square", "--grid", "2", "--height", "16", "--width", "48", "--out", str(out))
    done = run_program("generate", str(run), *words)
    assert done.returncode == 0, done.stderr
    width, height = Image.open(out).size
    assert width > 2 * 48
    assert height > 2 * 16


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["{nothing}", "a"], "there is no folder"),
        (["{empty}", "a"], "is neither a run's folder nor a checkpoint"),
        (["{run}"], "give at least one prompt"),
        (["{run}", "a", "--height", "20"], "20x32 is not a multiple of the patch size 8"),
        (["{run}", "a", "--steps", "0"], "sampling.steps must be at least 1"),
        (["{run}", "a", "--grid", "0"], "grid must be at least 1, got 0"),
        (["{run}", "a", "--out", "picture.txt"], "must end in .png"),
        (["{run}", "a", "--heigth", "32"], "Unrecognized options: --heigth"),
        (["{run}", "a", "--guidance", "-1"], "sampling.guidance must not be negative"),
    ],
)
def test_generate_refuses_in_one_sentence(run: Path, tmp_path: Path, words: list[str], sentence: str) -> None:
    places = {"nothing": str(tmp_path / "nothing"), "empty": str(tmp_path), "run": str(run)}
    done = run_program("generate", *(word.format(**places) for word in words), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_misspelled_option_of_export_is_a_sentence(run: Path, tmp_path: Path) -> None:
    done = run_program("export", str(run), "--ouut", "q", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: Unrecognized options: --ouut, q\n")


def test_a_damaged_checkpoint_that_is_passed_over_is_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    checkpoints = tmp_path / "run/checkpoints"
    shutil.copytree(checkpoints / "step-00000030", checkpoints / "step-00000031")
    state = json.loads((checkpoints / "step-00000031/state.json").read_text())
    (checkpoints / "step-00000031/state.json").write_text(json.dumps({**state, "step": 31}))
    reseal(checkpoints / "step-00000031")
    (damaged,) = (checkpoints / "step-00000031").glob("ema*.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:1000])
    trained = load_trained(tmp_path / "run", torch.device("cpu"))
    assert trained.step == 30
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ")
    assert str(damaged) in warning
    assert warning.endswith("; taking the checkpoint before it\n")
