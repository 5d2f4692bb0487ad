"""The whole step as `train/speedrun.py` does it: `train.learner.step`, weights cast by FSDP2, text read from a cache.

Beside `training_step.TrainingStep`, which builds the same step up under autocast, as everyone else's is timed.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

from torch import Tensor

from benchmarks import denoisers
from benchmarks.sizes import Case
from benchmarks.training_step import Draws, TrainingStep, Way, make_inputs, random_teachers, recipe_of
from prx_kernels.muon.owners import local
from train.data.loader import Batch
from train.data.text_cache import Encoding, ShardWriter
from train.learner import step as train_step
from train.learner.step import Learner
from train.ranks import parallel
from train.recipes import Recipe, Text


class TrainerStep:
    """What `TrainingStep` is, by the trainer; close it, as it has a process group on a GPU.

    Captions are read from the cache and copied to the device anew in every step; pictures stay where they are. No
    caption is dropped and rates do not warm up, so that it can be compared with the others.

    Args:
        way: has all ingredients.
        case: sizes.
        precision: as `train.precision`.
    """

    def __init__(self, way: Way, case: Case, *, precision: str = "auto") -> None:
        self.way, self.case, self.count = way, case, 0
        self.inputs = make_inputs(case)
        self._folder = tempfile.TemporaryDirectory(prefix="prx-text-cache-")
        captions = [f"caption {number}" for number in range(case.batch)]
        self.recipe = _recipe(way, case, Path(self._folder.name), precision)
        with ShardWriter(Path(self._folder.name), Encoding.of(self.recipe.text), rank=0) as cache:
            cache.add(captions, self.inputs.packed.tokens[: sum(case.lengths())].cpu(), case.lengths())
            cache.flush()
        with patch.object(train_step, "build_teachers", lambda recipe, device: random_teachers(recipe)):
            self.learner = Learner(self.recipe, parallel.start(self.recipe.train, self.recipe.parallel))
        parallel.fill(self.learner.modules.model, denoisers.random_weights(case.config).items())
        weights = dict(self.learner.parameters)
        self.learner.ema.load_state_dict({name: weights[name] for name in self.learner.ema.names})
        self.named, self.averages = self.learner.parameters, self.learner.ema.averages
        self.parameters = [parameter for _, parameter in self.named]
        self.batch = Batch(self.inputs.image, captions, self.inputs.ids, self.inputs.ids.cpu())

    def __call__(self) -> Tensor:
        """A whole step; gives the loss, a 0-dim tensor."""
        result = self.learner.step(self.batch, self.count)
        self.count += 1
        return result.parts["loss"]

    def backward(self, draws: Draws | None = None) -> Tensor:
        """Loss of the batch, its gradients left in the parameters; draws of its own where none are given."""
        if draws is None:
            return self.learner.backward(self.batch, self.count)[0]["loss"]
        with _seeds(int(draws.seed)):
            return self.learner.backward(self.batch, self.count)[0]["loss"]

    def update(self) -> None:
        """Clip the gradients, update the weights by them, drop them, and average the weights."""
        self.learner.update(self.count)
        self.count += 1

    def gradients(self) -> dict[str, Tensor]:
        """Gradients by the names of the parameters."""
        return {name: local(parameter.grad) for name, parameter in self.named}

    def close(self) -> None:
        """Leave the process group and remove the cache."""
        parallel.finish()
        self._folder.cleanup()


AnyStep = TrainingStep | TrainerStep


def make_step(way: Way, case: Case) -> AnyStep:
    """A way's step, by whom the way says; close it where it is the trainer's."""
    return TrainerStep(way, case) if way.trainer else TrainingStep(way, case)


def _recipe(way: Way, case: Case, cache: Path, precision: str) -> Recipe:
    recipe = recipe_of(way, case)
    text = Text(cache=str(cache), max_tokens=case.text)
    train = replace(recipe.train, warmup=0, precision=precision)  # type: ignore[arg-type]
    flow = replace(recipe.flow, caption_drop=0.0)
    data = replace(recipe.data, buckets=False)
    return replace(recipe, text=text, train=train, flow=flow, data=data)


@contextmanager
def _seeds(seed: int) -> Iterator[None]:
    """Within this context times, tokens and noise are drawn from one seed, as in `training_step.draws_of`."""
    with patch.object(train_step, "derive_seed", lambda *_, **__: seed):
        yield
