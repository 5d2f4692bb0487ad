"""Every public op of prx_kernels with its inputs: one list for all that must hold of every op.

It is gone through on pretended GPUs (test_launchers.py), under the interpreter (interpreted/test_cases.py), by the
ahead-of-time builds (test_builds.py), and on a GPU by the smoke test (tests/gpu/test_ops.py). A new op adds one
function here: it makes its tensors with `make` and gives what the op gave.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import prx_kernels as kernels
from prx_kernels.muon import passes

from .inputs import LAYOUTS, Inputs

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
INT64, UINT8 = torch.int64, torch.uint8

Dtypes = tuple[tuple[torch.dtype, torch.dtype], ...]
Sizes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Case:
    """One op.

    Attributes:
        call: makes the op's tensors with an `Inputs`, from a size's numbers, and gives the op's results.
        sizes: by name. `aligned`, `ragged` and `empty` are small enough to compute, `recipe` begins what PRX trains
            with, the others are there for a table's row or a limit.
        dtypes: pairs of the op's dtype and of what goes with it; the first is the recipe's.
        layouts: names in LAYOUTS that the op's tensors can have.
    """

    call: Callable[..., Any]
    sizes: Sizes
    dtypes: Dtypes
    layouts: tuple[str, ...]

    def __str__(self) -> str:
        return str(self.call.__name__)  # type: ignore[attr-defined]


CASES: list[Case] = []
SMALL = ("aligned", "ragged", "empty")


def case(dtypes: Dtypes, sizes: Sizes, layouts: tuple[str, ...] = tuple(LAYOUTS)) -> Callable[[Any], Any]:
    def add(call: Callable[..., Any]) -> Callable[..., Any]:
        CASES.append(Case(call, sizes, dtypes, layouts))
        return call

    return add


def alike(*dtypes: torch.dtype) -> Dtypes:
    return tuple((dtype, dtype) for dtype in dtypes)


# --- routing -----------------------------------------------------------------------------------------------------

FLOATS = alike(BF16, FP16, FP32, FP64)
COPIED = (
    *FLOATS,
    (BF16, INT64),
    *alike(INT64, torch.int32, torch.int16, UINT8, torch.bool, torch.float8_e4m3fn, torch.complex64, torch.complex128),
)
# (batch, tokens, kept, width)
ROWS: dict[str, tuple[int, ...]] = {
    "aligned": (2, 64, 32, 128),
    "ragged": (2, 18, 7, 13),
    "empty": (0, 18, 7, 13),
    "recipe-512": (32, 256, 128, 1792),
    "recipe-1024": (16, 1024, 512, 1792),
    "many": (70_000, 4, 2, 8),
    "huge": (2**15, 2**8, 2**7, 2**9),
}
COPIES = {**ROWS, "no width": (2, 33, 16, 0), "wide": (2, 4, 2, 2**26)}


@case(
    ((INT64, INT64),),
    {"aligned": (2, 64), "ragged": (3, 33), "empty": (0, 64), "recipe-512": (32, 256), "recipe-1024": (16, 1024),
     "most tokens": (2, 16_384), "many": (70_000, 2)},
)  # fmt: skip
def sample_keep(make: Inputs, batch: int, tokens: int) -> Tensor:
    return kernels.sample_keep(make.ids(batch), tokens, 0.5, seed=make.seed())


@case(COPIED, COPIES)
def gather_tokens(make: Inputs, batch: int, tokens: int, kept: int, width: int) -> Tensor:
    return kernels.gather_tokens(make(batch, tokens, width), make.keep(batch, tokens, kept))


@case(COPIED, COPIES)
def scatter_tokens(make: Inputs, batch: int, tokens: int, kept: int, width: int) -> Tensor:
    x, y = make(batch, tokens, width), make(batch, kept, width)
    return kernels.scatter_tokens(x, y, make.keep(batch, tokens, kept))


@case(COPIED, COPIES)
def enter_and_exit_route(make: Inputs, batch: int, tokens: int, kept: int, width: int) -> tuple[Tensor, ...]:
    keep = make.keep(batch, tokens, kept)
    y, byp = kernels.enter_route(make(batch, tokens, width), keep)
    return y, kernels.exit_route(y, byp, keep)


@case(
    COPIED,
    {"aligned": (2, 64, 32, 4, 16), "ragged": (2, 18, 7, 3, 5), "empty": (0, 18, 7, 3, 5),
     "recipe-512": (32, 256, 128, 32, 2), "many": (70_000, 4, 2, 2, 2)},
)  # fmt: skip
def route_tables(make: Inputs, batch: int, tokens: int, kept: int, heads: int, width: int) -> tuple[Tensor, ...]:
    """Entries of more than one dimension: rotary tables, features by head; and entries of none."""
    x, keep, flags = make(batch, tokens, heads, width), make.keep(batch, tokens, kept), make(batch, tokens)
    y, byp = kernels.enter_route(x, keep)
    taken = kernels.gather_tokens(flags, keep)
    return y, kernels.exit_route(y, byp, keep), taken, kernels.scatter_tokens(flags, taken, keep)


class _Scale(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


@case(FLOATS, {name: ROWS[name] for name in (*SMALL, "recipe-512", "many")})
def route_blocks(make: Inputs, batch: int, tokens: int, kept: int, width: int) -> Tensor:
    blocks = nn.ModuleList(_Scale(make(width, grad=False)) for _ in range(2))
    make.leaves.extend(blocks.parameters())
    route = kernels.route_blocks(blocks, 0, 1, 0.5)
    route.fixed = make.keep(batch, tokens, kept)
    x = make(batch, tokens, width)
    for block in blocks:
        x = block(x)
    return x


# --- pixels ------------------------------------------------------------------------------------------------------

# (batch, channels, height, width, patch, bottleneck, hidden)
PICTURES = {
    "aligned": (2, 3, 32, 48, 16, 32, 48),
    "ragged": (2, 1, 14, 42, 14, 17, 24),
    "empty": (0, 3, 32, 48, 16, 32, 48),
    "recipe-512": (32, 3, 512, 512, 32, 256, 1792),
    "recipe-1024": (16, 3, 1024, 1024, 32, 256, 1792),
    "bottleneck 128": (4, 3, 256, 256, 16, 128, 256),
    "bottleneck 64": (4, 3, 256, 256, 16, 64, 256),
    "patch 14": (4, 3, 224, 224, 14, 64, 256),
    "patch 14, bottleneck 128": (4, 3, 224, 224, 14, 128, 256),
    "patch 14, bottleneck 256": (4, 3, 224, 224, 14, 256, 256),
    "many": (70_000, 1, 8, 16, 8, 16, 16),
    "huge": (2**12, 3, 512, 512, 32, 16, 16),
}
# (weights, picture)
EMBEDDED = (
    (BF16, UINT8), (BF16, BF16), (BF16, FP32), (FP16, FP16), (FP16, UINT8), (FP32, FP32), (FP32, UINT8), (FP64, FP64),
    (FP32, FP64), (BF16, FP64),
)  # fmt: skip


def _weights(make: Inputs, channels: int, patch: int, bottleneck: int, hidden: int) -> tuple[Tensor, ...]:
    features = channels * patch**2
    return (
        make(bottleneck, features, scale=features**-0.5),
        make(bottleneck),
        make(hidden, bottleneck, scale=bottleneck**-0.5),
        make(hidden),
    )


@case(EMBEDDED, {name: size for name, size in PICTURES.items() if name != "recipe-1024"})
def patch_embed(
    make: Inputs, batch: int, channels: int, height: int, width: int, patch: int, bottleneck: int, hidden: int
) -> Tensor:
    image = make(batch, channels, height, width, dtype=make.other)
    return kernels.patch_embed(image, *_weights(make, channels, patch, bottleneck, hidden), patch)


@case(EMBEDDED, PICTURES)
def patch_embed_with_noise(
    make: Inputs, batch: int, channels: int, height: int, width: int, patch: int, bottleneck: int, hidden: int
) -> Tensor:
    image = make(batch, channels, height, width, dtype=make.other)
    weights = _weights(make, channels, patch, bottleneck, hidden)
    noise = {"t": make.levels(batch), "noise_seed": make.seed(), "sample_ids": make.ids(batch), "noise_scale": 1.5}
    return kernels.patch_embed(image, *weights, patch, **noise)


@case(EMBEDDED, {name: size for name, size in PICTURES.items() if not name.startswith(("recipe", "patch 14,"))})
def patch_embed_in_one_map(
    make: Inputs, batch: int, channels: int, height: int, width: int, patch: int, bottleneck: int, hidden: int
) -> Tensor:
    image = make(batch, channels, height, width, dtype=make.other)
    return kernels.patch_embed(image, make(hidden, channels * patch**2), None, None, None, patch)


# (batch, channels, height, width, patch)
LOSSES = {name: size[:5] for name, size in PICTURES.items() if "bottleneck" not in name}
PREDICTED = (
    (BF16, UINT8), (BF16, BF16), (BF16, FP32), (FP16, FP16), (FP32, FP32), (FP32, UINT8), (FP64, FP64), (FP32, FP64)
)  # fmt: skip


def _prediction(make: Inputs, batch: int, channels: int, height: int, width: int, patch: int) -> tuple[Any, ...]:
    tokens = make(batch, (height // patch) * (width // patch), channels * patch**2)
    image = make(batch, channels, height, width, dtype=make.other, grad=False)
    return tokens, image, make.levels(batch), patch


@case(PREDICTED, {**LOSSES, "few features": (2, 1, 32, 32, 16)})
def x_prediction_loss(make: Inputs, *size: int) -> Tensor:
    return kernels.x_prediction_loss(*_prediction(make, *size))


@case(PREDICTED, LOSSES)
def x_prediction_loss_a_sample(make: Inputs, *size: int) -> tuple[Tensor, Tensor]:
    tokens, *others = _prediction(make, *size)
    with torch.no_grad():
        without_gradient = kernels.x_prediction_loss(tokens, *others, reduction="none")
    return kernels.x_prediction_loss(tokens, *others, reduction="none"), without_gradient


@case(
    ((INT64, INT64),),
    {"aligned": (2, 64), "ragged": (3, 33), "empty": (0, 64), "recipe-512": (32, 3 * 512 * 512), "many": (70_000, 3),
     "huge": (2, 2**31 + 4)},
)  # fmt: skip
def philox_normal(make: Inputs, batch: int, count: int) -> Tensor:
    return kernels.philox_normal(make.seed(), (batch, count), sample_ids=make.ids(batch))


@case(
    ((INT64, INT64),),
    {"aligned": (2, 64), "ragged": (3, 33), "empty": (0, 64), "recipe-512": (32, 10), "many": (70_000, 3)},
)
def philox_uniform(make: Inputs, batch: int, count: int) -> Tensor:
    return kernels.philox_uniform(make.seed(), (batch, count), sample_ids=make.ids(batch))


# --- blocks ------------------------------------------------------------------------------------------------------

# (batch, tokens, heads, D, text of the longest sample)
HEADS = {
    "aligned": (2, 16, 4, 32, 8),
    "ragged": (2, 5, 3, 12, 3),
    "empty": (0, 5, 3, 12, 3),
    "recipe-512": (32, 256, 28, 64, 256),
    "recipe-512, routed": (32, 128, 28, 64, 256),
    "recipe-1024": (16, 1024, 28, 64, 256),
    **{f"heads of {width}": (2, 4, 2048 // width, width, 4) for width in (16, 32, 128, 256)},
    "many": (70_000, 2, 2, 8, 1),
}
NORMED = (*alike(BF16, FP16, FP32, FP64), (BF16, FP32), (FP32, BF16))


def _from_projections(make: Inputs, batch: int, tokens: int, heads: int, width: int) -> list[Tensor]:
    angle = torch.arange(tokens * width // 2, device=make.device).view(1, tokens, width // 2)
    rope = torch.stack((angle.cos(), angle.sin()), dim=-1).to(torch.float64 if make.exact else torch.float32)
    return [make(batch, tokens, 3 * heads * width), *(make(width, dtype=make.other) for _ in range(2)), rope]


@case(NORMED, HEADS, ("dense", "outer", "expanded", "padded", "sliced"))
def qk_norm_rope(make: Inputs, batch: int, tokens: int, heads: int, width: int, length: int) -> tuple[Tensor, ...]:
    """Of an image alone, then with padded text."""
    given = _from_projections(make, batch, tokens, heads, width)
    alone = kernels.qk_norm_rope(*given)
    text = make(batch, length, 2 * heads * width), make(width, dtype=make.other)
    return *alone, *kernels.qk_norm_rope(*given, *text)


@case(NORMED, HEADS, ("dense", "padded", "sliced"))
def qk_norm_rope_packed(
    make: Inputs, batch: int, tokens: int, heads: int, width: int, length: int
) -> tuple[Tensor, ...]:
    """With packed text for padded keys, then for packed ones."""
    given = _from_projections(make, batch, tokens, heads, width)
    text = make(batch * length, 2 * heads * width), make(width, dtype=make.other)
    offsets = torch.arange(batch + 1, dtype=torch.int32, device=make.device) * length
    padded = kernels.qk_norm_rope(*given, *text, txt_offsets=offsets, txt_length=length)
    return *padded, *kernels.qk_norm_rope(*given, *text, txt_offsets=offsets, packed_keys=True)


# (batch, tokens, width)
HALVES = {
    "aligned": (2, 16, 128),
    "ragged": (3, 7, 13),
    "empty": (0, 7, 13),
    "recipe-512": (32, 256, 1792),
    "recipe-512, routed": (32, 128, 1792),
    "recipe-1024": (16, 1024, 1792),
    **{f"row of {width}": (2, 16, width) for width in (512, 1000, 4096, 8192)},
    "many": (70_000, 2, 8),
    "huge": (2**15, 2**8, 2**9),
}


@case(NORMED, HALVES)
def norm_modulate(make: Inputs, batch: int, tokens: int, width: int) -> tuple[Tensor, ...]:
    """On the way through a block, then as a model's last norm, whose stream ends."""
    x, h = kernels.norm_modulate(make(batch, tokens, width), make(batch, 2 * width, dtype=make.other))
    return x, h, kernels.norm_modulate(h, make(batch, 2 * width, dtype=make.other))[1]


@case(NORMED, HALVES)
def residual_gate_norm_modulate(make: Inputs, batch: int, tokens: int, width: int) -> tuple[Tensor, ...]:
    """Before a gated MLP, whose two products read the norm, then before a single product."""
    modulation = make(batch, 3 * width, dtype=make.other)
    x, h, again = kernels.residual_gate_norm_modulate(
        make(batch, tokens, width), make(batch, tokens, width), modulation
    )
    return x, h, again, *kernels.residual_gate_norm_modulate(x, h, modulation)[:2]


# (batch, tokens, width); PRX leaves it to Inductor
GATED = {
    "aligned": (2, 16, 128),
    "ragged": (3, 7, 13),
    "empty": (0, 7, 13),
    "as in PRX": (32, 256, 6272),
    "long rows": (2, 3, 5000),
    "many": (70_000, 2, 8),
    "huge": (2**15, 2**8, 2**9),
}


@case(FLOATS, GATED)
def geglu(make: Inputs, batch: int, tokens: int, width: int) -> tuple[Tensor, ...]:
    """Of two projections; then of one projection's halves, exact."""
    both = make(batch, tokens, 2 * width)
    halves = kernels.geglu(*both.chunk(2, dim=-1), approximate="none")
    return halves, kernels.geglu(make(batch, tokens, width), make(batch, tokens, width))


# --- Muon --------------------------------------------------------------------------------------------------------

# (batch, n, k)
MATRICES = {
    "aligned": (2, 72, 40),
    "ragged": (2, 65, 33),
    "empty": (0, 64, 64),
    "no depth": (2, 64, 0),
    "recipe, one": (1, 1792, 6272),
    "recipe, four": (4, 1792, 1792),
    "recipe, sixteen": (16, 1792, 1792),
    "one number": (1, 1, 1),
    "many": (70_000, 8, 8),
    "huge": (2**13, 1024, 1024),
}
MULTIPLIED = alike(FP16, BF16, FP32, FP64)


@case(MULTIPLIED, MATRICES)
def sym_gemm(make: Inputs, batch: int, n: int, k: int) -> Tensor:
    A = make(batch, n, k, grad=False, scale=max(k, 1) ** -0.5)
    return kernels.sym_gemm(A, A, gamma=2.0)


@case(MULTIPLIED, {name: MATRICES[name] for name in (*SMALL, "recipe, sixteen")})
def sym_gemm_of_one_matrix_for_all(make: Inputs, batch: int, n: int, k: int) -> Tensor:
    """Samples that lie in one place, which descriptors do not describe."""
    A = make(1, n, k, grad=False).expand(batch, n, k)
    return kernels.sym_gemm(A, A)


@case(MULTIPLIED, {name: size for name, size in MATRICES.items() if name != "no depth"})
def sym_gemm_plus_C_into_out(make: Inputs, batch: int, n: int, k: int) -> Tensor:
    """Operands that are symmetric and commute, as the launcher is promised: numbers on the diagonal."""
    A, C, out = (make(batch, n, n, grad=False) for _ in range(3))
    if make.layout == "expanded":
        out = out.clone()  # one matrix cannot take the results of many
    made = [torch.diag_embed(x.diagonal(dim1=-2, dim2=-1)) for x in (A, C)]
    a, c = (x.copy_(y) if make.layout != "expanded" else y for x, y in zip((A, C), made, strict=True))
    return kernels.sym_gemm(a, a, C=c, alpha=0.5, beta=-1.25, out=out)


# (the smaller side, two larger ones, matrices of each)
SHAPES = {
    "aligned": (32, 48, 64, 2),
    "ragged": (9, 17, 11, 1),
    "empty": (8, 16, 16, 0),
    "recipe, one owner": (1792, 6272, 1792, 1),
    "recipe, all": (1792, 6272, 10_752, 4),
}


@case(alike(FP32, BF16, FP16, FP64), SHAPES)
def newton_schulz(make: Inputs, n: int, m: int, k: int, count: int) -> list[Tensor]:
    matrices = [make(n, m, grad=False) for _ in range(count)] + [make(k, n, grad=False) for _ in range(count)]
    matrices.append(make(count, n, n, grad=False))
    chosen = torch.float64 if make.exact else torch.float16
    return kernels.newton_schulz(matrices, dtype=chosen)


@case(((FP32, FP32), (FP32, BF16), (BF16, FP32), (FP64, FP64)), SHAPES)
def muon(make: Inputs, n: int, m: int, k: int, count: int) -> list[Tensor]:
    """One step; the weights behind it. `other` is the dtype of the momentum."""
    return _muon_step(make, [(n, m)] * count + [(k, n)] * count + [(n,)])


@case(((FP32, FP32), (FP64, FP64)), {name: SHAPES[name] for name in (*SMALL, "recipe, one owner")})
def muon_for_a_graph(make: Inputs, n: int, m: int, k: int, count: int) -> list[Tensor]:
    """As a CUDA graph captures it, the rate on the device; query and key in one weight, and no Nesterov."""
    shapes = [(2 * n, m)] * count + [(n,)]
    return _muon_step(make, shapes, capturable=True, split_sizes=(n, n), nesterov=False)


@case(((FP32, FP16), (BF16, FP16), (FP16, FP16), (FP32, FP32)), SHAPES)
def scaled_copy(make: Inputs, n: int, m: int, k: int, count: int) -> list[Tensor]:
    """What owners do with the parts of matrices that came of other ranks: a matrix in two parts, and a whole one."""
    parts = [make(*shape, grad=False).contiguous() for _ in range(count) for shape in ((n, m), (3, m), (k, n))]
    outs = [torch.empty(x.shape, dtype=FP64 if make.exact else make.other, device=x.device) for x in parts]
    scales = torch.full((2 * count,), 0.5, device=make.device)
    counts = [2, 1] * count
    return [*outs, passes.scaled_copy(parts, outs, counts, scales)] if parts else []


def _muon_step(make: Inputs, shapes: list[tuple[int, ...]], split_sizes: Any = None, **settings: Any) -> list[Tensor]:
    params = [nn.Parameter(make(*shape, grad=False).clone()) for shape in shapes]
    for param in params:
        param.grad = make(*param.shape, dtype=param.dtype, grad=False)
    # torch has no fake of its fused AdamW with a rate on the device.
    groups: list[dict[str, Any]] = [{"params": params[-1:], "use_muon": False, "capturable": False}]
    if params[:-1]:
        groups.append({"params": params[:-1], "split_sizes": split_sizes})
    wide = torch.float64 if make.exact else None
    dtypes = {"ns_dtype": wide or torch.float16, "momentum_dtype": wide or make.other}
    kernels.Muon(groups, lr=0.02, weight_decay=0.1, **dtypes, **settings).step()
    return [param.detach() for param in params]
