"""The moving average of weights: its equation, its steps, and that swapping it in leaves no trace."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prx_model import EMA


def make_model(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(5, 3).to(dtype)


def move(model: nn.Module) -> None:
    """Stands for an optimizer step: other values, written in place."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape).to(parameter.dtype))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_average_follows_its_equation_over_several_updates(decay: float) -> None:
    model = make_model()
    ema = EMA(model.named_parameters(), decay=decay, every=1)
    by_hand = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    for step in range(20):
        move(model)
        ema.update(step)
        for name, parameter in model.named_parameters():
            by_hand[name] = decay * by_hand[name] + (1 - decay) * parameter.detach().double()
    for name, average in ema.state_dict().items():
        assert average.dtype == torch.float32
        # Twenty float32 updates of values of order 4, each off by at most half a unit of 2.4e-7.
        torch.testing.assert_close(average.double(), by_hand[name], rtol=0, atol=1e-5)


def test_average_starts_at_the_weights_and_does_not_alias_them() -> None:
    model = make_model()
    ema = EMA(model.named_parameters())
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    move(model)
    assert all(torch.equal(ema.state_dict()[name], value) for name, value in start.items())


def test_average_moves_every_tenth_step_from_step_zero() -> None:
    model = make_model()
    ema = EMA(model.named_parameters(), decay=0.9, every=10)
    moved = []
    for step in range(31):
        before = ema.state_dict()["weight"].clone()
        move(model)
        ema.update(step)
        if not torch.equal(before, ema.state_dict()["weight"]):
            moved.append(step)
    assert moved == [0, 10, 20, 30]


def test_the_last_of_ten_steps_moves_the_average_as_prx_s_update_interval_does() -> None:
    """Composer's batch counter is 1-based at the end of a batch: batches 10, 20 and 30 are steps 9, 19 and 29."""
    model = make_model()
    ema = EMA(model.named_parameters(), decay=0.9, every=10, phase="last")
    by_hand = model.weight.detach().double().clone()
    for step in range(31):
        move(model)
        ema.update(step)
        if (step + 1) % 10 == 0:
            by_hand = 0.9 * by_hand + 0.1 * model.weight.detach().double()
        torch.testing.assert_close(ema.state_dict()["weight"].double(), by_hand, rtol=0, atol=1e-6)


def test_a_slow_average_of_bfloat16_weights_moves_because_it_is_float32() -> None:
    model = make_model(torch.bfloat16)
    ema = EMA(model.named_parameters(), decay=0.999, every=1)
    before = ema.state_dict()["weight"].clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    ema.update(0)
    # bfloat16 could not hold a thousandth of the change; the change itself is rounded by 2^-8.
    torch.testing.assert_close(ema.state_dict()["weight"] - before, torch.full((3, 5), 1e-3), rtol=2**-7, atol=1e-6)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapping_in_and_out_is_bitwise_and_keeps_the_same_parameters(dtype: torch.dtype) -> None:
    model = make_model(dtype)
    ema = EMA(model.named_parameters(), decay=0.9, every=1)
    move(model)
    ema.update(0)
    trained, averages, objects = bits(model), ema.state_dict(), [id(p) for p in model.parameters()]
    kept = {name: a.clone() for name, a in averages.items()}
    with ema.swapped_in():
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, averages[name].to(dtype))
            assert not torch.equal(parameter, trained[name])
    assert all(torch.equal(p, trained[name]) for name, p in model.named_parameters())
    assert [id(p) for p in model.parameters()] == objects
    assert all(torch.equal(ema.state_dict()[name], value) for name, value in kept.items())


def test_trained_weights_come_back_when_something_fails_inside() -> None:
    model = make_model()
    ema = EMA(model.named_parameters(), decay=0.9, every=1)
    move(model)
    ema.update(0)
    trained = bits(model)
    with pytest.raises(RuntimeError, match="drawing failed"), ema.swapped_in():
        raise RuntimeError("drawing failed")
    assert all(torch.equal(p, trained[name]) for name, p in model.named_parameters())


def test_swapping_leaves_gradients_and_their_flag_alone() -> None:
    model = make_model()
    ema = EMA(model.named_parameters())
    model(torch.ones(1, 5)).sum().backward()
    with ema.swapped_in():
        pass
    assert model.weight.requires_grad
    assert torch.equal(model.weight.grad, torch.ones(3, 5))  # type: ignore[arg-type]
    model(torch.ones(1, 5)).sum().backward()
    assert torch.equal(model.weight.grad, torch.full((3, 5), 2.0))  # type: ignore[arg-type]


def test_state_goes_round_into_another_average_and_continues_alike() -> None:
    model, other = make_model(), make_model()
    ema = EMA(model.named_parameters(), decay=0.9, every=1)
    for step in range(3):
        move(model)
        ema.update(step)
    copy = {name: a.clone() for name, a in ema.state_dict().items()}
    other.load_state_dict(model.state_dict())
    resumed = EMA(other.named_parameters(), decay=0.9, every=1)
    resumed.load_state_dict(copy)
    move(model)
    other.load_state_dict(model.state_dict())
    for one in (ema, resumed):
        one.update(3)
    assert ema.state_dict().keys() == {"weight", "bias"}
    for name, average in ema.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], average)
        assert not torch.equal(copy[name], average), "loading must copy, and the update must move"


def test_a_ramp_forgets_the_first_weights_and_ends_in_the_decay() -> None:
    """Weights that grow by 1 a step: their mean by t² is 3/4 of the last one, and the decay's lags by 1/(1 - decay)."""
    model = nn.Linear(1, 1, bias=False)
    ema = EMA(model.named_parameters(), decay=0.99, every=1, ramp=True)
    for step in range(2_000):
        with torch.no_grad():
            model.weight.fill_(step + 1.0)
        ema.update(step)
        average = float(ema.averages[0])
        if step == 0:
            assert average == 1.0
        if step == 200:
            assert average == pytest.approx(0.75 * 201, rel=0.02)
    assert ema.rate(297) == pytest.approx(0.01)
    assert ema.rate(296) > 0.01 == pytest.approx(ema.rate(10_000))
    assert average == pytest.approx(2_000 - 99, rel=1e-3)


def test_a_ramp_counts_updates_and_not_steps() -> None:
    ema = EMA(make_model().named_parameters(), decay=0.999, every=10, phase="last", ramp=True)
    assert [ema.rate(step) for step in (9, 19, 29)] == pytest.approx([1.0, 0.75, 0.6])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, r"ema.decay must lie in \[0, 1\), got 1.0"),
        ({"decay": -0.1}, r"ema.decay must lie in \[0, 1\), got -0.1"),
        ({"decay": float("nan")}, r"ema.decay must lie in \[0, 1\), got nan"),
        ({"every": 0}, "ema.every must be at least 1, got 0"),
        ({"phase": "middle"}, 'ema.phase must be "first" or "last", got \'middle\''),
    ],
)
def test_settings_out_of_range_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EMA(make_model().named_parameters(), **options)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": torch.zeros(3, 5)}, "EMA names differ from the model's: bias"),
        (
            {"weight": torch.zeros(3, 5), "bias": torch.zeros(3), "scale": torch.zeros(1)},
            "EMA names differ from the model's: scale",
        ),
        # Tensor.copy_ would spread one number over the whole weight without a word.
        (
            {"bias": torch.zeros(3), "weight": torch.zeros(1)},
            r"EMA of weight has shape \(1,\), the model's is \(3, 5\)",
        ),
    ],
)
def test_a_state_of_another_model_is_refused_and_changes_nothing(state: dict[str, Tensor], message: str) -> None:
    ema = EMA(make_model().named_parameters())
    before = {name: a.clone() for name, a in ema.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        ema.load_state_dict(state)
    assert all(torch.equal(ema.state_dict()[name], value) for name, value in before.items())
