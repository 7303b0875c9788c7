"""The schedule with warm-up of the first Transformer."""

import pytest
import torch

from errors import UserError
from lit_models.schedules import InverseSquareRoot


def test_rises_in_a_line_and_falls_with_the_root() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = InverseSquareRoot(optimizer, warmup_steps=4)
    rates = []
    for _ in range(16):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:4] == pytest.approx([0.125, 0.25, 0.375, 0.5])
    assert rates[15] == pytest.approx(0.25)
    # equation 3: proportional to min(step ** -0.5, step * warmup ** -1.5)
    expected = [min(s**-0.5, s * 4**-1.5) for s in range(1, 17)]
    assert [rate / rates[0] for rate in rates] == pytest.approx([e / expected[0] for e in expected])


def test_goes_on_where_it_was() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = InverseSquareRoot(optimizer, warmup_steps=4)
    for _ in range(6):
        optimizer.step()
        schedule.step()
    again = InverseSquareRoot(optimizer, warmup_steps=4)
    again.load_state_dict(schedule.state_dict())
    again.step()
    schedule.step()
    assert again.get_last_lr() == schedule.get_last_lr()


def test_warmup_of_no_step() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    with pytest.raises(UserError, match="warmup_steps must be at least 1, got 0"):
        InverseSquareRoot(optimizer, warmup_steps=0)
