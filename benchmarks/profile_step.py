"""Profile a training step of the denoiser at PRX size: the most expensive kernels, and where the time goes by kind.

python -m benchmarks.profile_step --out DIR [--size 512] [--batch 32] [--tiny]

Writes DIR/profile-<size>.json (kernels, shares, milliseconds a step, peak memory) and prints the table. With --tiny a
small model runs on any device, to see that everything works; its figures mean nothing.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import machine
from prx_kernels import sample_keep, x_prediction_loss
from prx_model import EMA, PRXConfig, PRXTransformer, flow
from prx_model.config import Routing, prx_1_2b
from train import parallel
from train.data.loader import to_float
from train.optimizers import Optimizers, clip_gradients, named_parameters
from train.recipes import Compile, Parallel, Recipe, Train, prx_512

_KINDS = (
    ("matrix", ("gemm", "cutlass", "nvjet", "wgmma", "sm90_xmma", "ampere_", "addmm", "::mm", "bmm", "matmul")),
    ("attention", ("flash", "attention", "fmha", "attn")),
    ("copies and memory sets", ("memcpy", "memset")),
)
TINY = PRXConfig(context_in_dim=24, hidden_size=64, num_heads=2, depth=3, axes_dim=(16, 16), bottleneck_size=16)


class Step:
    """One training step without teachers: draw, predict, learn, average; captions are cached embeddings."""

    def __init__(self, config: PRXConfig, size: int, batch: int, text_tokens: int) -> None:
        self.device, self.config = machine.device(), config
        self.routing = Routing(enabled=True, start=1, end=config.depth - 2, selection_ratio=0.5)
        self.model = PRXTransformer(config)
        self.model.init_weights(torch.Generator().manual_seed(0))
        self.model.to(self.device)
        preset = prx_512()
        self.recipe = Recipe(preset.preset, preset.data, config, muon=preset.muon, adam=preset.adam)
        parameters = named_parameters({"model": self.model})
        self.trained = [p for _, p in parameters]
        self.optimizers = Optimizers(parameters, self.recipe)
        self.ema = EMA(parameters, decay=0.999, every=10)
        self.image = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=self.device)
        self.text = torch.randn(batch, text_tokens, config.context_in_dim, device=self.device).bfloat16()
        real = torch.arange(text_tokens, device=self.device) < round(0.4 * text_tokens)
        self.mask = real.expand(batch, -1).contiguous()
        self.tokens, self.count = config.tokens(size, size), 0
        self.world = parallel.World(0, 1, self.device)
        parallel.shard(self.model, self.world, Parallel(), Train(), Compile())

    def __call__(self) -> Tensor:
        ids = torch.arange(self.image.shape[0], device=self.device) + self.count * self.image.shape[0]
        seed = torch.full((), self.count, dtype=torch.int64, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            image = to_float(self.image)
            t = flow.sample_t(seed, ids)
            noisy = flow.add_noise(image, flow.draw_noise(seed, ids, image), t)
            keep = sample_keep(ids, self.tokens, self.routing.selection_ratio, seed=seed)
            route = self.routing.start, self.routing.end
            predicted = self.model.forward_tokens(noisy, t, self.text, self.mask, keep=keep, route=route)
            loss = x_prediction_loss(predicted, image, t, self.config.patch_size)
        loss.backward()
        clip_gradients(self.trained, 0.2, self.world)
        self.optimizers.step(1.0)
        self.ema.update(self.count)
        self.count += 1
        return loss.detach()


def kind_of(kernel: str) -> str:
    """What a kernel does, by its name."""
    name = kernel.lower()
    return next((kind for kind, words in _KINDS if any(word in name for word in words)), "other memory-bound")


def summarise(events: Any, on_gpu: bool, steps: int) -> dict[str, Any]:
    """Time by kernel and by kind, in microseconds a step, from a profiler's averages."""
    by_kernel: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in events:
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if spent and (not on_gpu or str(event.device_type).endswith("CUDA")):
            by_kernel[event.key][0] += spent / steps
            by_kernel[event.key][1] += event.count / steps
    by_kind: dict[str, float] = defaultdict(float)
    for name, (spent, _) in by_kernel.items():
        by_kind[kind_of(name)] += spent
    ranked = sorted(by_kernel.items(), key=lambda item: -item[1][0])
    kernels = [{"kernel": name, "us": spent, "launches": count} for name, (spent, count) in ranked]
    return {"kernels": kernels, "kinds_us": dict(by_kind), "busy_us": sum(by_kind.values())}


def measure(step: Step, steps: int) -> dict[str, Any]:
    """Run, time and profile the step."""
    on_gpu = step.device.type == "cuda"
    for _ in range(3):
        step()
    from benchmarks.clock import wall_timing

    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    timing = wall_timing(step, [()], synchronize, min_seconds=0.0)
    seconds = sorted(timing.seconds() for _ in range(steps))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as recorded:
        for _ in range(steps):
            step()
        synchronize()
    result = summarise(recorded.key_averages(), on_gpu, steps)
    result |= {"ms": seconds[steps // 2] * 1e3, "ms_min": seconds[0] * 1e3, "ms_max": seconds[-1] * 1e3}
    result["peak_bytes"] = torch.cuda.max_memory_allocated() if on_gpu else None
    result["gap_ms"] = result["ms"] - result["busy_us"] / 1e3 if on_gpu else None
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--text-tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    config = TINY if asked.tiny else prx_1_2b()
    result = measure(Step(config, asked.size, asked.batch, asked.text_tokens), asked.steps)
    result |= {"size": asked.size, "batch": asked.batch, "tiny": asked.tiny, "machine": machine.describe()}
    target = asked.out / f"profile-{asked.size}.json"
    target.write_text(json.dumps(result, indent=1))
    note = " (tiny model: not a result)" if asked.tiny else ""
    print(f"step without teachers, {asked.size} px x {asked.batch}: {result['ms']:.2f} ms{note}")
    for kind, spent in sorted(result["kinds_us"].items(), key=lambda item: -item[1]):
        print(f"  {kind:<24}{spent / 1e3:9.3f} ms")
    for row in result["kernels"][:20]:
        print(f"  {row['us'] / 1e3:9.3f} ms {row['launches']:7.1f}x  {row['kernel'][:90]}")


if __name__ == "__main__":
    main()
