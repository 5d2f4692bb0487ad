"""Ten steps of a tiny model with every ingredient that meets sharding, on several ranks of gloo.

python tests/train/ranks/training.py OUT '{"2": {"name": {"micro_batches": 2, …}}}'

The numbers are those of ranks, the settings those of recipes.Parallel; writes OUT/name.
"""

import json
import multiprocessing
import os
import socket
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from safetensors.torch import save_file  # noqa: E402

from train.data.loader import batches, open_dataset  # noqa: E402
from train.learner import optimizers  # noqa: E402
from train.learner.step import Learner  # noqa: E402
from train.ranks import parallel  # noqa: E402
from train.ranks.parallel import World  # noqa: E402
from train.recipes import REPA, Compile, EMASettings, Parallel, Recipe, Routing, shapes  # noqa: E402

STEPS = 10


def recipe(settings: Parallel, *, muon: bool = True, **train: object) -> Recipe:
    """Routing, REPA on kept tokens, Muon, EMA, clipping that clips, text from a trained tower."""
    preset = shapes()
    # Widths that no number of ranks divides: shards are uneven, and some are empty.
    model = replace(preset.model, hidden_size=36, num_heads=3, axes_dim=(6, 6), depth=4, context_in_dim=24)
    return replace(
        preset,
        model=replace(model, bottleneck_size=5),
        text=replace(preset.text, num_heads=3),
        routing=Routing(enabled=True, start=1, end=2),
        muon=replace(preset.muon, enabled=muon),
        repa=REPA(enabled=True, teacher="vit_small_patch16_dinov3", weights="random", layer=1),
        ema=EMASettings(decay=0.9, every=2),
        train=replace(preset.train, steps=STEPS, batch=8, warmup=3, clip=0.05, device="cpu", **train),  # type: ignore[arg-type]
        parallel=settings,
        compile=Compile("no"),
    )


def whole(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def tensors_of(learner: Learner) -> dict[str, torch.Tensor]:
    found = {}
    for section, content in learner.tensors().items():
        found |= {f"{section}/{name}": whole(value) for name, value in content.items()}
    return found


def train(settings: Parallel, world: World | None = None, **changes: Any) -> dict[str, torch.Tensor]:
    """Ten steps in this process and the others of its group; whole tensors, losses and norms."""
    asked = recipe(settings, **changes)
    world = world or parallel.start(asked.train, asked.parallel)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Rounded to bfloat16, Newton-Schulz makes up to 480 times as much of the last bit of a gradient. For the same
        # reason updates travel in float32: they would be rounded between ranks only.
        exact = patch.object(optimizers, "_newton_schulz_dtype", lambda device: torch.float32)
        with exact, patch.object(optimizers, "compute_dtype", lambda *_: torch.float32):
            learner = Learner(asked, world)
    found = {f"initial/{name}": value for name, value in tensors_of(learner).items()}
    losses, norms = [], []
    for number, batch in enumerate(batches(open_dataset(asked.data, 0, 8), asked, world, 0)):
        result = learner.step(batch, number)
        losses.append(parallel.average(torch.stack([result.parts["loss"], result.parts["loss/repa"]]), world))
        norms.append(result.norm)
    return found | tensors_of(learner) | {"losses": torch.stack(losses), "norms": torch.stack(norms)}


def one_rank(rank: int, size: int, port: int, layouts: dict[str, Any], out: Path) -> None:
    """A process of a group, as torchrun would start it."""
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in found.items()} | {"MASTER_ADDR": "127.0.0.1"}
    for name, settings in layouts.items():
        tensors = train(Parallel(**settings))
        if rank == 0:
            save_file({key: value.contiguous() for key, value in tensors.items()}, out / name)
    parallel.finish()


def main() -> None:
    import timm  # noqa: F401  (takes ten seconds: once here, not in every rank)

    torch.set_num_threads(1)
    for size, layouts in json.loads(sys.argv[2]).items():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        arguments = (int(size), port, layouts, Path(sys.argv[1]))
        # Forked before anything of torch's was used, so that all of them share what was imported.
        started = [
            multiprocessing.get_context("fork").Process(target=one_rank, args=(rank, *arguments))
            for rank in range(int(size))
        ]
        for process in started:
            process.start()
        for process in started:
            process.join()
            if process.exitcode:
                sys.exit(process.exitcode)


if __name__ == "__main__":
    main()
