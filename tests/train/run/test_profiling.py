"""`--profile steps=10:15`: what it writes, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.train.learner.test_teaching import tiny
from train.commandline import parse
from train.errors import UserError
from train.loop import Trainer
from train.ranks import parallel
from train.recipes import Profile, Recipe
from train.run.profiling import steps_of


def test_the_trace_holds_the_parts_of_the_steps_asked_for(tmp_path: Path) -> None:
    recipe = replace(tiny(tmp_path), profile=Profile(steps="1:3", nvtx=True))
    Trainer(recipe, parallel.start(recipe.train)).run()
    (trace,) = (tmp_path / "run/profile").iterdir()
    assert trace.name == "rank-0-steps-1-3.json"
    names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
    for part in ("text", "denoiser", "backward", "optimizer", "ema"):
        assert names.count(part) == 2, f"{part} in {names.count(part)} of 2 steps"


def test_the_short_form_is_the_long_one() -> None:
    short, long = parse(["shapes", "--profile", "steps=10:15"]).recipe, parse(["--profile.steps", "10:15"]).recipe
    assert short == long
    assert isinstance(short, Recipe)
    assert steps_of(short.profile) == (10, 15)
    assert steps_of(Profile()) == (0, 0)


@pytest.mark.parametrize("steps", ["10", "10:", "15:10", "a:b", "5:5", "-1:3"])
def test_other_forms_are_one_sentence(steps: str) -> None:
    with pytest.raises(UserError, match="profile.steps is first:last"):
        steps_of(Profile(steps=steps))
