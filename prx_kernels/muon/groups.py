"""Which parameters of a model Muon updates, and which AdamW: the matrices inside its blocks, and all others.

Weights that hold several matrices one above the other (query, key and value; gate and up; the shifts, scales and gates
of adaLN) are told by their names and shapes, so that each of them is orthogonalised for itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

# Lists of blocks by the last part of their names: DiT, SiT, REPA, LightningDiT, JiT, PRX, Wan ("blocks"), diffusers'
# Flux, SD3, Qwen-Image ("transformer_blocks", "single_transformer_blocks"), Flux by its authors ("double_blocks").
BLOCKS = re.compile(r"(^|\.)(\w*_)?(blocks|layers)$")
# Modules whose weight holds several matrices: by a part of the name, how many. adaLN has as many as its shape says.
FUSED = (
    (re.compile(r"(^|[._])(w?qkv|qkv_proj|qkv_mlp)([._]|$)", re.IGNORECASE), 3),
    (re.compile(r"(^|[._])kv([._]|$)", re.IGNORECASE), 2),
    (re.compile(r"(^|[._])(w12|gate_up|gate_up_proj|w1w2)([._]|$)"), 2),
)
GATED = ("GEGLU", "SwiGLU", "GluMlp", "SwiGLUPacked")  # classes whose `proj` or `fc1` is gate and value in one
MODULATION = re.compile(
    r"(adaln|ada_ln|modulation|(^|[._])(img|txt)_mod([._]|$)|(^|\.)norm\d?(_context)?\.linear$)", re.IGNORECASE
)


EMBEDDING = re.compile(r"embed", re.IGNORECASE)  # of time or of a class, also inside a block


def muon_groups(
    model: nn.Module,
    *,
    lr: float | None = None,
    weight_decay: float | None = None,
    adamw_lr: float | None = None,
    adamw_betas: tuple[float, float] = (0.9, 0.95),
    split_sizes: Mapping[str, Sequence[int]] | None = None,
    blocks: Sequence[str] = (),
    verbose: bool = True,
) -> list[dict[str, Any]]:
    """Parameter groups for `Muon`: `Muon(muon_groups(model), lr=1e-4)`.

    Muon gets the weights of two dimensions inside lists of blocks. AdamW gets everything else, without weight decay:
    embeddings of patches, text, time and places, norms, biases, tables, heads, and weights with one row or column.
    Parameters that need no gradient are left out.

    Args:
        model: also wrapped in DDP, compiled, or sharded by FSDP2.
        lr, weight_decay: of Muon's group; where none are given those of the optimizer hold.
        adamw_lr: of AdamW's group; the optimizer's `lr` if it is not given, which is of the right size with
            adjust_lr_fn="match_rms_adamw".
        adamw_betas: of AdamW's group.
        split_sizes: {name: rows of each matrix}, beside or instead of those that are recognised; (rows,) keeps one
            whole.
        blocks: names of the lists of blocks, as `named_modules` has them; found by their names unless given.
        verbose: print what went where.

    Returns:
        Groups with named parameters, Muon's first; one that would be empty is left out.

    Raises:
        ValueError: there is no list of blocks, or `split_sizes` names what is no matrix of a block or does not fit.
    """
    lists = _lists(model, blocks)
    owners = dict(model.named_modules())
    muon: list[tuple[str, Any]] = []
    adam: list[tuple[str, Any]] = []
    for name, param in model.named_parameters():
        if param.requires_grad:
            owner = owners[name.rpartition(".")[0]]
            inside = [name.removeprefix(found) for found in lists if name.startswith(f"{found}.")]
            matrix = bool(inside) and not EMBEDDING.search(inside[0]) and _is_matrix(name, param, owner)
            (muon if matrix else adam).append((name, param))
    given = dict(split_sizes or {})
    shapes = {name: tuple(param.shape) for name, param in muon}
    for name, rows in given.items():
        if name not in shapes:
            raise ValueError(f"split_sizes names {name!r}, which is no matrix of a block")
        if sum(rows) != shapes[name][0] or min(rows) < 1:
            raise ValueError(
                f"split_sizes of {name!r} must be positive and add up to its {shapes[name][0]} rows, got {tuple(rows)}"
            )
    splits = {name: tuple(given.get(name) or _parts(name, shape, owners)) for name, shape in shapes.items()}
    if verbose:
        print("\n".join(_table(muon, adam, splits, lists)))
    first: dict[str, Any] = {"params": muon, "split_sizes": {n: rows for n, rows in splits.items() if len(rows) > 1}}
    first |= {key: value for key, value in (("lr", lr), ("weight_decay", weight_decay)) if value is not None}
    second: dict[str, Any] = {"params": adam, "use_muon": False, "betas": adamw_betas, "weight_decay": 0.0}
    second |= {} if adamw_lr is None else {"lr": adamw_lr}
    return [group for group in (first, second) if group["params"]]


def _lists(model: nn.Module, blocks: Sequence[str]) -> list[str]:
    """Names of the lists of blocks."""
    known = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList | nn.Sequential)
    }
    if blocks:
        for name in blocks:
            if name not in known:
                raise ValueError(f"blocks names {name!r}; the lists of {type(model).__name__} are {', '.join(known)}")
        return list(blocks)
    found = [name for name, module in known.items() if BLOCKS.search(name) and len(module)]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no list of blocks: name one as blocks=(…), of {', '.join(known) or 'none'}"
        )
    return found


def _is_matrix(name: str, param: nn.Parameter, owner: nn.Module) -> bool:
    weight = name.rpartition(".")[2] == "weight" and not isinstance(owner, nn.Embedding | nn.EmbeddingBag)
    return weight and param.ndim == 2 and min(param.shape) > 1


def _parts(name: str, shape: tuple[int, ...], owners: Mapping[str, nn.Module]) -> tuple[int, ...]:
    """Rows of the matrices that a weight holds."""
    rows, columns = shape
    module, _, last = name.rpartition(".")[0].rpartition(".")
    for pattern, count in FUSED:
        if pattern.search(f"{module}.{last}"):
            return (rows // count,) * count if rows % count == 0 else (rows,)
    if type(owners[module]).__name__ in GATED and last in ("proj", "fc1") and rows % 2 == 0:
        return (rows // 2,) * 2
    if MODULATION.search(f"{module}.{last}") and rows > columns and rows % columns == 0:
        return (columns,) * (rows // columns)
    return (rows,)


def _table(
    muon: list[tuple[str, Any]],
    adam: list[tuple[str, Any]],
    splits: Mapping[str, tuple[int, ...]],
    lists: Sequence[str],
) -> list[str]:
    """What went where: a line for each name without the block's number, and one for all norms, biases and the like."""
    numbers = re.compile(rf"^({'|'.join(map(re.escape, lists))})\.\d+\.")
    lines: dict[tuple[str, str, str], int] = {}
    for kind, named in (("Muon", muon), ("AdamW", adam)):
        for name, param in named:
            rows = splits.get(name, tuple(param.shape[:1]))
            shape = " × ".join(map(str, (rows[0], *param.shape[1:]))) if len(set(rows)) == 1 else f"{rows} rows"
            text = f"{len(rows)} of {shape}" if len(rows) > 1 else shape
            key = (kind, numbers.sub(r"\1.*.", name), text)
            if param.ndim < 2:
                key = (kind, "norms, biases and other vectors", "")
            lines[key] = lines.get(key, 0) + 1
    width = max(len(name) for _, name, _ in lines)
    out = [
        f"{kind:<6} {name:<{width}} {count:>4}{' × ' * bool(text)}{text}" for (kind, name, text), count in lines.items()
    ]
    sizes = [sum(math.prod(param.shape) for _, param in named) / 1e6 for named in (muon, adam)]
    return [*out, f"Muon updates {sizes[0]:.4g} M numbers, AdamW {sizes[1]:.4g} M"]
