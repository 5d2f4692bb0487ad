"""Bytes and operations of every op by formula, floors, and what a step of the recipe costs at the ceiling.

"Least" bytes: each input read once, each output written once. A multiplication and an addition are two operations.
`python -m benchmarks.roofline` prints the table of docs/recipe.md ("Where its time goes"), held to it by a test.
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, field

from prx_kernels import newton_schulz_flop
from prx_model.config import PRXConfig, Routing, prx_1_2b
from prx_model.flops import training_flop

H200_COPY = 4.3e12
"""Bytes/s read plus written, measured through PyTorch on an H200 (docs/recipe.md); benchmarks measure their own."""
H200_MATMUL = 790e12
"""bf16 FLOP/s on random data, measured through PyTorch on an H200 (docs/recipe.md)."""


@dataclass(frozen=True)
class Cost:
    """What an op must move and do at least."""

    nbytes: float
    flop: float = 0.0


# --- token routing (docs/kernels.md, section 1) ----------------------------------------------------------------------


def routing_bytes(which: str, batch: int, tokens: int, kept: int, channels: int, element: int) -> float:
    """Least bytes of the pair: K rows gathered, then N rows merged from two tensors into one; backward the same.

    2K + 2N rows each way: 3 passes over a (batch, N, C) tensor at half the tokens. Each op alone needs more, 4 passes
    each way, as its gradient must be right without the other.
    """
    one_way = (2.0 * kept + 2.0 * tokens) * batch * channels * element
    return one_way * {"forward": 1, "backward": 1, "both": 2}[which]


# --- matrix products -----------------------------------------------------------------------------------------------


def linear(rows: int, inner: int, columns: int, element: int = 2) -> Cost:
    """(rows, inner) times (inner, columns): both read, the product written."""
    return Cost(float(element) * (rows * inner + inner * columns + rows * columns), 2.0 * rows * inner * columns)


def attention(batch: int, heads: int, queries: int, keys: float, head_dim: int, which: str, element: int = 2) -> Cost:
    """Softmax attention over `keys` keys a query (their mean, where padding is skipped); backward is 2.5 forwards.

    Backward forms the scores again, and two gradients for each of the two products
    (https://arxiv.org/abs/2205.14135, section 3.1).
    """
    forward = 4.0 * batch * heads * queries * keys * head_dim
    moved = float(element) * batch * heads * head_dim * (2 * queries + 2 * keys)
    factor = {"forward": 1.0, "backward": 2.5, "both": 3.5}[which]
    passes = {"forward": 1.0, "backward": 2.0, "both": 3.0}[which]
    return Cost(passes * moved, factor * forward)


def newton_schulz(shapes: Iterable[tuple[int, int]], algorithm: str, steps: int = 5) -> float:
    """Operations of Newton-Schulz on matrices, see `prx_kernels.newton_schulz_flop`.

    "plain", "standard" (triangles of the symmetric products only) or "gram" (with the restart of Jordan's five steps).
    """
    restarts = (3,) if algorithm == "gram" and steps > 3 else ()
    return sum(newton_schulz_flop(*shape, steps, algorithm=algorithm, restarts=restarts) for shape in shapes)


def prx_muon_shapes(config: PRXConfig | None = None) -> list[tuple[int, int]]:
    """The 2-D weights inside `blocks`, which Muon updates: 112 at PRX's size."""
    c = config or prx_1_2b()
    h, m = c.hidden_size, c.mlp_size
    block = [(3 * h, h), (2 * h, c.hidden_size), (h, h), (6 * h, h), (m, h), (m, h), (h, m)]
    return block * c.depth


def owner_sample(shapes: Iterable[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """What an owner of `count` matrices may hold: evenly from the most to the least work, as they are handed out."""
    ordered = sorted(shapes, key=lambda shape: -newton_schulz([shape], "gram"))
    return [ordered[i * len(ordered) // count] for i in range(count)]


# --- the optimizer step --------------------------------------------------------------------------------------------


def muon_step(shapes: Iterable[tuple[int, int]], algorithm: str = "gram") -> Cost:
    """Least bytes of Muon in fp32 (gradient read, momentum and weight read and written), and its Newton-Schulz."""
    shapes = list(shapes)
    return Cost(20.0 * sum(rows * columns for rows, columns in shapes), newton_schulz(shapes, algorithm))


def adamw_step(numbers: int) -> Cost:
    """Least bytes of AdamW in fp32: gradient read; weight and both moments read and written."""
    return Cost(28.0 * numbers)


# --- the step of the recipe (docs/recipe.md, "Where its time goes") --------------------------------------------------


@dataclass(frozen=True)
class Vision:
    """A ViT teacher: what one forward of one picture costs."""

    width: int
    depth: int
    patch: int
    extra_tokens: int
    """Class and register tokens."""

    def forward(self, size: int) -> float:
        tokens = (size // self.patch) ** 2 + self.extra_tokens
        blocks = self.depth * (24.0 * tokens * self.width**2 + 4.0 * tokens**2 * self.width)
        return blocks + 2.0 * (size // self.patch) ** 2 * 3 * self.patch**2 * self.width


DINOV2_B = Vision(width=768, depth=12, patch=14, extra_tokens=5)
DINOV3_L = Vision(width=1024, depth=24, patch=16, extra_tokens=5)
# VGG16's convolutions: channels in, channels out, halvings before (https://arxiv.org/abs/1409.1556, configuration D).
_VGG16 = (
    (3, 64, 0), (64, 64, 0), (64, 128, 1), (128, 128, 1), (128, 256, 2), (256, 256, 2), (256, 256, 2),
    (256, 512, 3), (512, 512, 3), (512, 512, 3), (512, 512, 4), (512, 512, 4), (512, 512, 4),
)  # fmt: skip


def vgg16_forward(height: int, width: int) -> float:
    """Operations of VGG16's thirteen convolutions on one picture."""
    return sum(2.0 * 9 * i * o * (height >> halved) * (width >> halved) for i, o, halved in _VGG16)


@dataclass(frozen=True)
class TextEncoder:
    """T5Gemma's 2B encoder (Gemma 2 2B's sizes, https://arxiv.org/abs/2408.00118, table 1)."""

    width: int = 2304
    depth: int = 26
    query_width: int = 2048
    kv_width: int = 1024
    mlp: int = 9216
    vocabulary: int = 256_000

    def forward(self, tokens: int) -> float:
        """Operations for one caption of `tokens` tokens."""
        weights = 2 * self.width * (self.query_width + self.kv_width) + 3 * self.width * self.mlp
        return self.depth * (2.0 * tokens * weights + 4.0 * tokens**2 * self.query_width)

    def forward_with_embedding(self, tokens: int) -> float:
        """The estimate "two operations a parameter and token", embedding table included: what is often quoted."""
        weights = 2 * self.width * (self.query_width + self.kv_width) + 3 * self.width * self.mlp
        return 2.0 * tokens * (self.depth * weights + self.vocabulary * self.width)


@dataclass(frozen=True)
class Step:
    """One stage's step on one GPU."""

    size: int
    batch: int
    repa: bool
    text_tokens: int = 256
    config: PRXConfig = field(default_factory=prx_1_2b)
    routing: Routing = field(default_factory=lambda: Routing(enabled=True, start=1, end=14, selection_ratio=0.5))
    gpus: int = 32

    def parts(self) -> dict[str, float]:
        """Operations a step and GPU of every part, forward and backward."""
        tokens = self.config.tokens(self.size, self.size)
        half = self.size // 2
        # Perceptual losses: features of the picture, features of the prediction, and the gradient by its pixels.
        return {
            "denoiser, dense": self.batch * training_flop(self.config, tokens, self.text_tokens),
            "denoiser, TREAD": self.batch * training_flop(self.config, tokens, self.text_tokens, self.routing),
            "LPIPS": 3 * self.batch * vgg16_forward(half, half),
            "P-DINO": 3 * self.batch * DINOV2_B.forward(224),
            "REPA teacher": self.batch * DINOV3_L.forward(half) if self.repa else 0.0,
            "Newton-Schulz, one GPU": newton_schulz(prx_muon_shapes(self.config), "plain"),
            "Newton-Schulz, spread": newton_schulz(prx_muon_shapes(self.config), "plain") / self.gpus,
            "T5Gemma": self.batch * TextEncoder().forward(self.text_tokens),
            "T5Gemma, embedding counted": self.batch * TextEncoder().forward_with_embedding(self.text_tokens),
        }

    def total(self) -> float:
        """Routed denoiser, teachers and the spread Newton-Schulz; text cached."""
        parts = self.parts()
        return sum(
            parts[name] for name in ("denoiser, TREAD", "LPIPS", "P-DINO", "REPA teacher", "Newton-Schulz, spread")
        )

    def floor_seconds(self, matmul: float = H200_MATMUL) -> float:
        """Time of the sum at a matrix rate (FLOP/s)."""
        return self.total() / matmul


STAGE_1 = Step(size=512, batch=32, repa=True)
STAGE_2 = Step(size=1024, batch=16, repa=False)


def table(matmul: float = H200_MATMUL) -> list[tuple[str, float, float]]:
    """docs/recipe.md's table: (part, TFLOP at stage 1, TFLOP at stage 2), the sums, and their ms at the ceiling."""
    first, second = STAGE_1.parts(), STAGE_2.parts()
    rows = [(name, first[name] / 1e12, second[name] / 1e12) for name in first]
    rows.append(("sum, text cached, Newton-Schulz spread", STAGE_1.total() / 1e12, STAGE_2.total() / 1e12))
    rows.append(("ms at the ceiling", STAGE_1.floor_seconds(matmul) * 1e3, STAGE_2.floor_seconds(matmul) * 1e3))
    return rows


def hours(first_step: float, second_step: float, steps: tuple[int, int] = (100_000, 20_000)) -> float:
    """Hours of both stages at these seconds a step."""
    return (first_step * steps[0] + second_step * steps[1]) / 3600


def lines(matmul: float = H200_MATMUL) -> list[str]:
    """The table as it is printed, and the hours of both stages."""
    out = [f"{'TFLOP a GPU and step':<42}{'512 px x 32':>14}{'1024 px x 16':>14}"]
    out += [f"{name:<42}{one:>14.2f}{two:>14.2f}" for name, one, two in table(matmul)]
    whole = hours(STAGE_1.floor_seconds(matmul), STAGE_2.floor_seconds(matmul))
    return [*out, f"both stages at the ceiling: {whole:.2f} h"]


def main() -> None:
    parser = argparse.ArgumentParser(description="what a step of the recipe costs at the ceiling")
    parser.add_argument("--matmul-tflops", type=float, default=H200_MATMUL / 1e12, help="bf16 matrix rate, TFLOP/s")
    print(*lines(parser.parse_args().matmul_tflops * 1e12), sep="\n")


if __name__ == "__main__":
    main()
