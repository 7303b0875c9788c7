"""Schedules: the first Transformer's, and the triangle."""

from typing import Any

import pytest
import torch

from lit_models.schedules import InverseSquareRoot, Triangle


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
    with pytest.raises(ValueError, match="warmup_steps must be at least 1, got 0"):
        InverseSquareRoot(optimizer, warmup_steps=0)


# Triangle


def rates(schedule_options: dict[str, float], total_steps: int = 10) -> list[list[float]]:
    """The learning rates of two groups at every step."""
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 0.5}, {"params": [b], "lr": 32.0}])
    schedule = Triangle(optimizer, total_steps, **schedule_options)
    seen = []
    for _ in range(total_steps):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return seen


def test_a_triangle_rises_to_the_peak_and_falls_in_lines() -> None:
    small = [first for first, _ in rates({"peak": 0.4, "start": 0.2, "end": 0.1})]
    shares = [0.2, 0.4, 0.6, 0.8, 1.0, 0.85, 0.7, 0.55, 0.4, 0.25]
    assert small == pytest.approx([0.5 * share for share in shares])


def test_groups_keep_their_proportions() -> None:
    assert all(b == pytest.approx(64 * a) for a, b in rates({"peak": 0.2}))


def test_a_peak_at_the_start_only_falls() -> None:
    assert [a for a, _ in rates({"peak": 0.0})] == pytest.approx(
        [0.05 * n for n in range(10, 0, -1)]
    )


def test_a_peak_at_the_end_only_rises() -> None:
    assert [a for a, _ in rates({"peak": 1.0})] == pytest.approx([0.05 * n for n in range(10)])


def test_the_end_of_training_is_planned_and_kept() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    assert Triangle(optimizer, total_steps=7).state_dict()["total_steps"] == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": None}, "total_steps must be at least 1, got None"),
        ({"total_steps": 3, "peak": 1.5}, r"peak must be in \[0, 1\], got 1.5"),
        ({"total_steps": 3, "start": -1.0}, r"start must be in \[0, 1\], got -1.0"),
        ({"total_steps": 3, "end": 2.0}, r"end must be in \[0, 1\], got 2.0"),
    ],
)
def test_a_triangle_that_cannot_be(options: dict[str, Any], message: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    with pytest.raises(ValueError, match=message):
        Triangle(optimizer, **options)
