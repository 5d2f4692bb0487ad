"""One op's folder, `launch.py` and the folders below it, copied into another code base: they work there, alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_imports import OPS

from .conftest import ROOT

# Each computes a result and gradients on the CPU with the copy and with the installed package, which must agree.
ROUTING = """
def run(ops):
    x = torch.linspace(-1, 1, 96).view(2, 8, 6).requires_grad_()
    keep = ops.sample_keep(torch.arange(2), 8, 0.5, seed=torch.tensor(7))
    y, byp = ops.enter_route(x, keep)
    out = ops.exit_route(y.exp(), byp, keep)
    model = torch.nn.Sequential(*(torch.nn.Linear(6, 6, dtype=torch.float64) for _ in range(3)))
    for value in model.parameters():
        torch.nn.init.constant_(value, 0.2)
    ops.route_blocks(model, 0, 1, 0.5).fixed = keep
    routed = model(out.double())
    routed.square().sum().backward()
    return [keep, out, routed, x.grad, model[0].weight.grad]
"""
NEWTON_SCHULZ = """
def run(ops):
    matrices = [torch.sin(torch.arange(rows * 6.0)).view(rows, 6) for rows in (4, 6)]
    return [*ops.newton_schulz(matrices, dtype=torch.float32), ops.sym_gemm(matrices[0], matrices[0])]
"""
MUON = """
def run(ops):
    weight, bias = torch.ones(4, 6).tril().requires_grad_(), torch.ones(4, requires_grad=True)
    optimizer = ops.Muon([{"params": [weight]}, {"params": [bias], "use_muon": False}], lr=0.1)
    for _ in range(2):
        torch.nn.functional.linear(torch.linspace(0, 1, 12).view(2, 6), weight, bias).square().sum().backward()
        optimizer.step()
    return [weight.detach(), bias.detach(), optimizer.state[weight]["momentum_buffer"]]
"""
PATCH_EMBED = """
def run(ops):
    torch.manual_seed(0)
    layer = ops.BottleneckPatchEmbed(3, 4, 8, 16)
    image = torch.linspace(-1, 1, 384).view(2, 3, 8, 8).requires_grad_()
    tokens = layer(image, t=torch.tensor([0.2, 0.7]), noise_seed=torch.tensor(5))
    tokens.square().sum().backward()
    return [tokens, image.grad, *(value.grad for value in layer.parameters())]
"""
PIXEL_LOSS = """
def run(ops):
    image = torch.linspace(-1, 1, 384).view(2, 3, 8, 8)
    tokens = (0.5 * ops.patchify(image, 4)).requires_grad_()
    loss = ops.x_prediction_loss(tokens, image, torch.tensor([0.2, 0.7]), 4)
    loss.backward()
    return [loss, tokens.grad, ops.unpatchify(tokens, 4, 8, 8)]
"""
NOISE = """
def run(ops):
    return [ops.philox_normal(torch.tensor(3), (2, 3, 5), sample_ids=torch.tensor([9, 4]))]
"""
BLOCKS = """
def run(ops):
    img = torch.linspace(-1, 1, 144).sin().view(2, 3, 24).requires_grad_()
    txt = torch.linspace(-1, 1, 64).cos().view(4, 16).requires_grad_()
    weights = [torch.full((4,), value, requires_grad=True) for value in (0.5, 1.0, 1.5)]
    angle = torch.linspace(0, 3, 6).view(1, 3, 2)
    offsets = torch.tensor([0, 1, 3], dtype=torch.int32)
    rope = torch.stack((angle.cos(), angle.sin()), dim=-1)
    out = ops.qk_norm_rope(img, *weights[:2], rope, txt, weights[2], txt_offsets=offsets, txt_length=3)
    stream = torch.linspace(0, 2, 48).cos().view(2, 3, 8).requires_grad_()
    projection = torch.linspace(-1, 1, 80).view(2, 40).requires_grad_()
    x, h = ops.norm_modulate(stream, projection[:, :16])
    out = *out, *ops.residual_gate_norm_modulate(x, h.sin(), projection[:, 16:])[:2]
    out = *out, ops.geglu(projection[:, ::2], projection[:, 1::2])
    sum((i + 1) * x.square().sin().sum() for i, x in enumerate(out)).backward()
    return [*out, img.grad, txt.grad, stream.grad, projection.grad, *(weight.grad for weight in weights)]
"""
USES = {"routing": ROUTING, "newton_schulz": NEWTON_SCHULZ, "muon": MUON, "patch_embed": PATCH_EMBED}
USES |= {"blocks": BLOCKS, "pixel_loss": PIXEL_LOSS, "noise": NOISE}
PROGRAM = """
import importlib, sys
import torch
{use}
alone = run(importlib.import_module("their.code.{op}"))
assert not any(name.split(".")[0] in ("prx_kernels", "prx_model") for name in sys.modules), "the original was loaded"
import prx_kernels
beside = run(prx_kernels)
assert len(alone) == len(beside) and all(torch.equal(a, b) for a, b in zip(alone, beside))
print(len(alone), "equal,", "nan" if any(x.isnan().any() for x in alone) else "finite,", len(set(map(str, alone))))
"""


def test_every_op_is_taken_home() -> None:
    assert set(USES) == set(OPS)


@pytest.mark.parametrize("op", USES)
def test_a_folder_and_what_is_below_it_work_in_another_code_base(op: str, tmp_path: Path) -> None:
    theirs = tmp_path / "their" / "code"
    theirs.mkdir(parents=True)
    for package in (theirs, theirs.parent):
        (package / "__init__.py").write_text("")
    shutil.copy(ROOT / "prx_kernels" / "launch.py", theirs)
    for folder in {op, *OPS[op]}:
        shutil.copytree(ROOT / "prx_kernels" / folder, theirs / folder, ignore=shutil.ignore_patterns("__pycache__"))
    program = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]" + PROGRAM.format(use=USES[op], op=op)
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    count = done.stdout.split()[0]
    assert done.stdout.strip() == f"{count} equal, finite, {count}"
