"""Schedules: the first Transformer's, the cycle that is torch's, and the triangle."""

from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR

from core.errors import UserError
from lit_models.schedules import (
    InverseSquareRoot,
    OneCycle,
    Triangle,
    make_schedule,
    momentum_of,
)

CONFIGS = Path(__file__).parents[1] / "configs"


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


# OneCycle

STEADY = {"cycle_momentum": False}
FALLING = {"pct_start": 0.01, "div_factor": 1.0, "anneal_strategy": "linear", **STEADY}
FORMER: dict[str, dict[str, Any]] = {  # what the configs gave to torch's OneCycleLR, but max_lr
    "demo": {},
    "echo": {},
    "echo_any_delay": {},
    "grammar": {"pct_start": 0.05, **STEADY},
    "image_folder": STEADY,
    "last_names": STEADY,
    "masked_language": {"pct_start": 0.05, **STEADY},
    "mnist_lenet_fast": FALLING,
    "mnist_lenet_less_data": FALLING,
    "temporal_order_lstm_steady": FALLING,
}
SCHEDULED = sorted(
    path.stem
    for path in CONFIGS.glob("*.yaml")
    if "lr_scheduler" in yaml.safe_load(path.read_text()).get("model", {}).get("init_args", {})
)


def made(setting: dict[str, Any], *given: Any, **typed: Any) -> Any:
    """The object of a setting in a config."""
    module, _, name = setting["class_path"].rpartition(".")
    return getattr(import_module(module), name)(*given, **setting.get("init_args", {}) | typed)


def model_of(config: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())["model"]["init_args"]


def optimizer_of(config: str, **typed: Any) -> Optimizer:
    shapes = [(4, 3), (4,), (2, 4), (2,)]
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    return made(model_of(config)["optimizer"], params, **typed)


def used(optimizer: Optimizer, schedule: LRScheduler, steps: int) -> list[tuple[float, float]]:
    """Learning rate and momentum of each group at each step."""
    seen: list[tuple[float, float]] = []
    for _ in range(steps):
        seen.extend((group["lr"], momentum_of(group)) for group in optimizer.param_groups)
        optimizer.step()
        schedule.step()
    return seen


@pytest.mark.parametrize("steps", [10, 235])
@pytest.mark.parametrize("config", FORMER)
def test_one_cycle_of_each_config_is_that_of_torch(config: str, steps: int) -> None:
    ours, theirs = optimizer_of(config), optimizer_of(config)
    max_lr = theirs.param_groups[0]["lr"]
    cycle = made(model_of(config)["lr_scheduler"], ours, total_steps=steps)
    former = OneCycleLR(theirs, max_lr=max_lr, total_steps=steps, **FORMER[config])
    seen = used(ours, cycle, steps)
    for step, (own, torchs) in enumerate(zip(seen, used(theirs, former, steps), strict=True)):
        assert own == pytest.approx(torchs, abs=1e-12, rel=0), step


@pytest.mark.parametrize("config", SCHEDULED)
def test_the_rate_of_a_config_is_the_one_that_is_used(config: str) -> None:
    """At the peak, as written and as typed; at the first step in the schedule's proportion."""
    factors = []
    for typed in ({}, {"lr": 0.0123}):
        optimizer = optimizer_of(config, **typed)
        settings = model_of(config)["optimizer"].get("init_args", {}) | typed
        rate = optimizer.param_groups[0]["lr"]
        assert rate == pytest.approx(settings["lr"])
        schedule = made(model_of(config)["lr_scheduler"], optimizer, total_steps=200)
        first, *_ = rates = [lr for lr, _ in used(optimizer, schedule, 200)]
        assert max(rates) == pytest.approx(max(g["initial_lr"] for g in optimizer.param_groups))
        factors.append(first / rate)
    assert factors[0] == pytest.approx(factors[1])


def test_momentum_dips_at_the_peak_of_each_group() -> None:
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    groups = [{"params": [a], "momentum": 0.9}, {"params": [b], "momentum": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=0.5)
    seen = used(optimizer, OneCycle(optimizer, 11, peak=6 / 11, momentum_dip=0.1), 11)
    momenta = [momentum for _, momentum in seen]
    assert momenta[:2] == [0.9, 0.5]
    assert momenta[10:12] == pytest.approx([0.8, 0.4])
    assert momenta[-2:] == pytest.approx([0.9, 0.5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum_dip": 0.1}, "momentum_dip must be between 0 and the optimizer's momentum"),
        ({"shape": "round"}, "shape must be cosine or linear, got 'round'"),
    ],
)
def test_a_cycle_that_cannot_be(options: dict[str, Any], message: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    with pytest.raises(ValueError, match=message):
        OneCycle(optimizer, 10, **options)


# Any schedule


@pytest.mark.parametrize(
    "make",
    [
        partial(OneCycleLR, max_lr=0.2),
        partial(CyclicLR, base_lr=0.01, max_lr=0.2, cycle_momentum=False),
    ],
)
def test_a_rate_of_the_schedules_own_is_refused_unless_recorded(make: partial[Any]) -> None:
    def optimizer(lr: float) -> Optimizer:
        return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)

    with pytest.raises(UserError, match=r"with a rate of its own, 0.2, so that lr=0.001 of SGD"):
        make_schedule(make, optimizer(0.001), 10)
    make_schedule(make, optimizer(0.2), 10)
    make_schedule(make, optimizer(0.001), 10, recorded=True)


def test_epochs_and_their_steps_are_the_length_of_torchs_cycle() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2, momentum=0.9)
    make = partial(OneCycleLR, max_lr=0.2, total_steps=None, epochs=2, steps_per_epoch=7)
    assert make_schedule(make, optimizer, 10).total_steps == 14  # type: ignore[attr-defined]


def test_a_training_without_end_has_no_cycle() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
    with pytest.raises(UserError, match=r"which has no end; set --trainer\.max_epochs"):
        make_schedule(OneCycle, optimizer, -1)
