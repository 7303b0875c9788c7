"""The monitor in loops that were found to break it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from steadyfit import SpikeMonitor, clip_updates, read_records
from steadyfit.probe import StepProbe
from steadyfit.watching import optimizer_monitor


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))


def train(
    model: nn.Module, monitor: SpikeMonitor, steps: int, spikes: tuple[int, ...] = (), of: float = 0
) -> None:
    draw = torch.Generator().manual_seed(1)
    for step in range(steps):
        x = torch.randn(32, 8, generator=draw)
        loss = mse_loss(model(x), x[:, :1] + of) * (1000 if step in spikes else 1)
        monitor.optimizers[0].zero_grad()
        loss.backward()
        monitor.before_step(loss)
        monitor.optimizers[0].step()


def test_the_first_steps_may_promise_what_they_want() -> None:
    """All steps until the first read were taken back, and the training never began."""
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    monitor = SpikeMonitor(model, optimizer, reaction="skip", every=50)
    for _ in range(40):
        loss = 0.01 + 0 * model(torch.zeros(1, 8)).sum() + 3 * sum(
            (p - p.detach()).sum() for p in model.parameters()
        )  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        monitor.before_step(0.01)
        optimizer.step()
    monitor.flush()
    assert monitor.counts["skipped"] == 0


def test_a_new_level_is_not_taken_back_for_long() -> None:
    """47 ordinary steps were, up to the next read."""
    model = small()
    monitor = SpikeMonitor(model, torch.optim.Adam(model.parameters()), reaction="skip", every=100)
    train(model, monitor, 100)
    train(model, monitor, 99, spikes=tuple(range(99)))
    said = monitor.finish()
    assert monitor.counts["skipped"] == 10
    assert "10 steps taken back" in said


def test_optimizers_that_are_announced_together_are_taken_back_together() -> None:
    model = small()
    first = torch.optim.AdamW(model[0].parameters())
    second = torch.optim.AdamW(model[2].parameters())
    monitor = SpikeMonitor(model, [first, second], reaction="skip", every=10)
    for step in range(60):
        x = torch.randn(32, 8)
        loss = mse_loss(model(x), x[:, :1]) * (float("nan") if step == 45 else 1)
        model.zero_grad()
        loss.backward()
        monitor.before_step(loss, first)
        monitor.before_step(loss, second)
        first.step()
        second.step()
    assert all(p.isfinite().all() for p in model.parameters())
    monitor.flush()
    assert monitor.counts["skipped"] == 2


def test_a_resumed_loop_keeps_its_records_and_a_new_one_none_of_another(tmp_path: Path) -> None:
    model = small()
    optimizer = torch.optim.Adam(model.parameters())
    monitor = SpikeMonitor(model, optimizer, folder=tmp_path, every=10)
    train(model, monitor, 100, spikes=(30,))
    state = monitor.state_dict()
    monitor.finish()
    resumed = SpikeMonitor(model, optimizer, folder=tmp_path, every=10)
    resumed.load_state_dict(state)
    train(model, resumed, 60, spikes=(40,))
    resumed.finish()
    found = [r.step for r in read_records(tmp_path / "spikes.jsonl") if r.spiked]
    assert (found[0], found[-1] >= 140) == (30, True)
    other = SpikeMonitor(model, optimizer, folder=tmp_path, every=10)
    train(model, other, 20)
    other.finish()
    assert read_records(tmp_path / "spikes.jsonl") == []


def test_clip_updates_says_that_it_takes_no_closure() -> None:
    """It did nothing, and said nothing."""
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clip_updates(optimizer)
    with pytest.raises(ValueError, match="without a closure"):
        optimizer.step(lambda: 0.0)


@pytest.mark.parametrize("reaction", ["rollback", "stop", "log"])
def test_parameters_that_are_added_between_reads(reaction: Any) -> None:
    model = small()
    optimizer = torch.optim.Adam(model[0].parameters())
    monitor = SpikeMonitor(model, optimizer, reaction=reaction, every=20)
    train(model, monitor, 65)
    optimizer.add_param_group({"params": list(model[2].parameters())})
    train(model, monitor, 30, spikes=(25,))
    assert "spike" in monitor.finish()


def test_an_empty_parameter_has_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_monitor, "TOP_K", 9)
    model = small()
    model.register_parameter("nothing", nn.Parameter(torch.zeros(0, 5)))
    monitor = SpikeMonitor(model, torch.optim.SGD(model.parameters(), lr=0.01))
    train(model, monitor, 60, spikes=(50,))
    monitor.flush()
    assert monitor.counts["gradient"] == 1


def test_a_forgotten_training_leaves_no_hook() -> None:
    model = small()
    optimizer = torch.optim.Adam(model.parameters())
    monitor = SpikeMonitor(model, optimizer, reaction="skip")
    monitor.forget()
    monitor.attach(model, [optimizer])
    assert len(StepProbe.of(optimizer).after_step) == 1


def test_a_loss_of_many_elements_is_refused() -> None:
    model = small()
    monitor = SpikeMonitor(model, torch.optim.Adam(model.parameters()))
    with pytest.raises(ValueError, match=r"one element, got the shape \(3,\)"):
        monitor.before_step(torch.ones(3))
