"""The example's replaced embeddings: the same pictures and gradients as before, and a loss that falls."""

from __future__ import annotations

import re

import pytest
import torch

from examples.patch_embed_dit import REPLACE, build, loss_after, loss_before, main


@pytest.mark.parametrize("name", list(REPLACE))
def test_a_replaced_embedding_gives_the_same_picture_loss_and_gradients(name):
    torch.manual_seed(0)
    model = build(name)
    image, t, seed = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), torch.tensor([0.2, 0.7]), torch.tensor(3)
    x = torch.randn(2, 3, 32, 32)
    picture, loss = model(x, t), loss_before(model, image, t, seed)
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    REPLACE[name](model)
    model.zero_grad()
    # Convolutions and products sum in another order; the loss divides by t down to 0.2.
    torch.testing.assert_close(model(x, t), picture, rtol=1e-4, atol=1e-5)
    after = loss_after(model, image, t, seed)
    torch.testing.assert_close(after, loss, rtol=1e-5, atol=0)
    after.backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient.reshape(parameter.shape), rtol=1e-3, atol=1e-4)


def test_the_example_prints_equal_losses_and_losses_that_fall(capsys):
    main()
    printed = capsys.readouterr().out
    rows = re.findall(r"loss before (\S+), after (\S+); training (\S+) -> (\S+)", printed)
    assert len(rows) == len(REPLACE), printed
    for before, after, first, last in rows:
        assert float(before) == pytest.approx(float(after), rel=1e-4)
        assert float(last) < 0.9 * float(first)
