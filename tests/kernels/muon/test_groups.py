"""Which parameters `muon_groups` gives to Muon, how it cuts them, and what it prints."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from prx_kernels import Muon, muon_groups
from prx_model import PRXTransformer
from prx_model.config import prx_1_2b

D = 8


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.q_norm = nn.Linear(D, 3 * D), nn.Linear(D, D), nn.LayerNorm(4)


class Block(nn.Module):
    """Names as in DiT, SiT and REPA; LightningDiT and JiT have SwiGLU's `w12`."""

    def __init__(self, *, swiglu: bool) -> None:
        super().__init__()
        self.attn = Attention()
        mlp = {"w12": nn.Linear(D, 4 * D), "w3": nn.Linear(2 * D, D)}
        self.mlp = nn.ModuleDict(mlp if swiglu else {"fc1": nn.Linear(D, 4 * D), "fc2": nn.Linear(4 * D, D)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        self.scale_shift_table = nn.Parameter(torch.zeros(6, D))
        self.gate = nn.Linear(D, 1)


class DiT(nn.Module):
    def __init__(self, *, swiglu: bool = False) -> None:
        super().__init__()
        self.x_embedder, self.y_embedder = nn.Conv2d(4, D, 2), nn.Embedding(10, D)
        self.t_embedder = nn.Sequential(nn.Linear(4, D), nn.SiLU(), nn.Linear(D, D))
        self.blocks = nn.ModuleList(Block(swiglu=swiglu) for _ in range(2))
        self.projectors = nn.ModuleList([nn.Sequential(nn.Linear(D, D))])  # REPA's
        self.final_layer = nn.Linear(D, 16)


def names(group) -> set[str]:
    return {name for name, _ in group["params"]}


@pytest.mark.parametrize("swiglu", [False, True])
def test_matrices_inside_blocks_go_to_muon_cut_into_what_they_are(swiglu):
    model = DiT(swiglu=swiglu)
    muon, adam = muon_groups(model, verbose=False)
    wide, narrow = ("w12", "w3") if swiglu else ("fc1", "fc2")
    weights = ("attn.qkv", "attn.proj", f"mlp.{wide}", f"mlp.{narrow}", "adaLN_modulation.1")
    assert names(muon) == {f"blocks.{i}.{name}.weight" for i in range(2) for name in weights}
    assert names(muon) | names(adam) == {name for name, _ in model.named_parameters()}
    expected = {"attn.qkv": (D,) * 3, "adaLN_modulation.1": (D,) * 6, **({"mlp.w12": (2 * D,) * 2} if swiglu else {})}
    assert muon["split_sizes"] == {f"blocks.{i}.{n}.weight": rows for i in range(2) for n, rows in expected.items()}
    assert (adam["use_muon"], adam["weight_decay"]) == (False, 0.0)


def test_a_step_is_that_of_the_separate_matrices():
    """Through `Muon`, wrapped as by DDP or torch.compile: the cut weights move as matrices of their own."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"module": DiT()})
    fused = model["module"].blocks[0].attn.qkv.weight
    parts = [nn.Parameter(part.detach().clone()) for part in fused.split(D)]
    optimizer, separate = Muon(muon_groups(model, verbose=False), lr=0.1), Muon(parts, lr=0.1)
    fused.grad = torch.randn(3 * D, D)
    for part, grad in zip(parts, fused.grad.split(D), strict=True):
        part.grad = grad.clone()
    optimizer.step()
    separate.step()
    torch.testing.assert_close(fused, torch.cat(parts), rtol=0, atol=1e-6)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["split_sizes"]["module.blocks.0.attn.qkv.weight"] == (D, D, D)


def test_rates_and_cuts_may_be_given_and_are_printed(capsys):
    model = DiT()
    cuts = {"blocks.0.attn.qkv.weight": (D, 2 * D), "blocks.1.adaLN_modulation.1.weight": (6 * D,)}
    model.blocks[1].attn.proj.weight.requires_grad_(False)
    muon, adam = muon_groups(model, lr=1e-3, weight_decay=0.2, adamw_lr=1e-4, adamw_betas=(0.8, 0.9), split_sizes=cuts)
    assert (muon["lr"], muon["weight_decay"], adam["lr"], adam["betas"]) == (1e-3, 0.2, 1e-4, (0.8, 0.9))
    assert muon["split_sizes"]["blocks.0.attn.qkv.weight"] == (D, 2 * D)
    assert "blocks.1.adaLN_modulation.1.weight" not in muon["split_sizes"]
    assert "blocks.1.attn.proj.weight" not in names(muon) | names(adam)
    said = capsys.readouterr().out
    for line in (
        r"Muon   blocks.*.attn.qkv.weight             1 × 2 of (8, 16) rows",
        r"Muon   blocks.*.attn.qkv.weight             1 × 3 of 8 × 8",
        r"AdamW  t_embedder.2.weight                  1 × 8 × 8",
        r"AdamW  norms, biases and other vectors 21",
    ):
        assert re.sub(" +", " ", line) in re.sub(" +", " ", said), said


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"Linear has no list of blocks: name one as blocks=\(…\), of none"):
        muon_groups(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="blocks names 'layers'; the lists of DiT are t_embedder, blocks"):
        muon_groups(DiT(), blocks=["layers"])
    with pytest.raises(ValueError, match=r"split_sizes names 'final_layer.weight', which is no matrix of a block"):
        muon_groups(DiT(), split_sizes={"final_layer.weight": (8, 8)})
    with pytest.raises(ValueError, match=r"must be positive and add up to its 24 rows, got \(8, 8\)"):
        muon_groups(DiT(), split_sizes={"blocks.0.attn.qkv.weight": (8, 8)})
    lists = muon_groups(DiT(), blocks=["projectors"], verbose=False)
    assert names(lists[0]) == {"projectors.0.0.weight"}


def cuts_of(model: nn.Module) -> dict[str, int]:
    """How many matrices each weight of the first blocks is cut into."""
    group = muon_groups(model, verbose=False)[0]
    first = re.compile(r"(?<=blocks\.)0(?=\.)")
    found = {first.sub("*", name): 1 for name in names(group) if first.search(name)}
    return found | {first.sub("*", n): len(rows) for n, rows in group["split_sizes"].items() if first.search(n)}


def test_prx():
    with torch.device("meta"):
        model = PRXTransformer(prx_1_2b())
    found = cuts_of(model)
    assert found == {
        "blocks.*.attention.img_qkv_proj.weight": 3, "blocks.*.attention.txt_kv_proj.weight": 2,
        "blocks.*.attention.to_out.0.weight": 1, "blocks.*.modulation.lin.weight": 6,
        "blocks.*.gate_proj.weight": 1, "blocks.*.up_proj.weight": 1, "blocks.*.down_proj.weight": 1,
    }  # fmt: skip


SMALL = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}


@pytest.mark.parametrize(
    ("kind", "settings", "matrices", "cut"),
    [
        ("FluxTransformer2DModel", {**SMALL, "num_single_layers": 1, "axes_dims_rope": (4, 6, 6)}, 20,
         {"transformer_blocks.*.norm1.linear": 6, "transformer_blocks.*.norm1_context.linear": 6,
          "single_transformer_blocks.*.norm.linear": 3}),
        ("SD3Transformer2DModel", {**SMALL, "num_layers": 2}, 14,
         {"transformer_blocks.*.norm1.linear": 6, "transformer_blocks.*.norm1_context.linear": 6}),
        ("WanTransformer3DModel", SMALL, 10, {}),
        ("QwenImageTransformer2DModel", {**SMALL, "axes_dims_rope": (4, 6, 6)}, 14,
         {"transformer_blocks.*.img_mod.1": 6, "transformer_blocks.*.txt_mod.1": 6}),
    ],
)  # fmt: skip
def test_models_of_diffusers(kind, settings, matrices, cut):
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = getattr(diffusers, kind)(**settings)
    found = cuts_of(model)
    assert len(found) == matrices, sorted(found)
    assert {name.removesuffix(".weight"): n for name, n in found.items() if n > 1} == cut
