"""The monitor in a loop of plain torch."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from steadyfit import SpikeMonitor, read_records
from steadyfit.watching.records import format_spike


class Norms(nn.Module):
    """One weight whose gradient has the norm it is told; its loss is another number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def train_with(
        self,
        monitor: SpikeMonitor,
        norms: list[float],
        losses: list[float] | None = None,
        scaled: bool = False,
    ) -> None:
        for norm, loss in zip(norms, losses or [1.0] * len(norms), strict=True):
            self.weight.grad = torch.tensor([norm])
            monitor.before_step(torch.tensor(loss), scaled=scaled)
            monitor.optimizers[0].step()
        monitor.flush()


def make(**settings: Any) -> tuple[Norms, SpikeMonitor]:
    model = Norms()
    return model, SpikeMonitor(model, torch.optim.SGD(model.parameters(), lr=0.0), **settings)


def quiet(steps: int, level: float = 1.0) -> list[float]:
    noise = torch.randn(steps, generator=torch.Generator().manual_seed(0))
    return (level * (0.1 * noise).exp()).tolist()


def spiked(monitor: SpikeMonitor) -> list[int]:
    return [record.step for record in monitor.records if record.spiked]


def test_a_new_level_that_lasts_leaves_no_spikes() -> None:
    """Its first steps look like spikes until it is seen that they stay."""
    model, monitor = make()
    model.train_with(monitor, quiet(100))
    model.train_with(monitor, quiet(3, level=10.0))
    assert monitor.counts["gradient"] == 3
    model.train_with(monitor, quiet(20, level=10.0))
    assert (monitor.counts["gradient"], monitor.counts["level_shift"]) == (0, 1)
    assert spiked(monitor) == []


def test_a_spike_within_a_new_level_stays_one() -> None:
    model, monitor = make()
    model.train_with(monitor, [*quiet(100), *quiet(3, 10.0), 1e4, *quiet(20, 10.0)])
    assert spiked(monitor) == [103]


def test_an_overflow_that_the_scaler_throws_away_says_nothing_of_the_loss() -> None:
    model, monitor = make()
    model.train_with(monitor, quiet(100), scaled=True)
    model.train_with(monitor, [math.inf], [math.inf], scaled=True)
    assert (monitor.counts["overflow"], monitor.counts["loss"]) == (1, 0)
    assert "loss" not in monitor.records[-1].signals


@pytest.mark.parametrize("reaction", ["log", "skip"])
def test_a_step_that_promises_more_than_its_loss_can_fall_is_a_spike(reaction: Any) -> None:
    """A steep place: the next loss jumps, and nothing but this product has announced it."""
    torch.manual_seed(0)
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = SpikeMonitor(model, optimizer, reaction=reaction, every=10)
    before = model.weight.item()
    for step in range(60):
        model.weight.grad = torch.tensor([[1.0 if step == 50 else 0.1]])
        kept = model.weight.item()
        monitor.before_step(torch.tensor(0.01))
        optimizer.step()
        if step == 50:
            taken = kept - model.weight.item()
    monitor.flush()
    [record] = monitor.records
    assert (record.step, before > kept) == (50, True)
    assert "promise" in record.spiked
    assert record.signals["promise"].value == pytest.approx(0.1 / 0.01)
    assert "nan" not in format_spike(record)
    assert taken == (0 if reaction == "skip" else pytest.approx(0.1))


def test_the_count_of_spikes_grows_at_their_steps() -> None:
    """Pictures find them by it."""
    rows: dict[int, dict[str, float]] = {}
    model, monitor = make(log=lambda found: rows.update(found), every=20)
    model.train_with(monitor, [*quiet(50), 30.0, *quiet(15)])
    counted = {step: row["spikes/gradient"] for step, row in rows.items() if "spikes/loss" in row}
    assert counted == {19: 0, 39: 0, 50: 1, 59: 1, 65: 1}


def test_a_loss_that_is_zero_promises_nothing() -> None:
    model, monitor = make()
    with pytest.warns(UserWarning, match="the loss of step 0 is 0"):
        model.train_with(monitor, quiet(60), [0.0] * 60)
    assert monitor.counts["promise"] == 0
    assert not any("promise" in record.signals for record in monitor.records)


def test_a_loss_that_grows_slowly_is_told() -> None:
    model, monitor = make()
    losses = [loss * 1.01 ** max(0, step - 100) for step, loss in enumerate(quiet(200))]
    model.train_with(monitor, quiet(200), losses)
    [record] = monitor.records
    assert (record.spiked, record.signals["loss"].kind) == ([], "drift")
    assert 100 < record.step < 170  # before it has doubled
    assert monitor.counts["drift"] == 1
    last = f"The loss grew slowly up to step {record.step}."
    assert monitor.finish() == f"No spike in 200 optimizer steps. {last}"


def test_what_was_learned_goes_on() -> None:
    norms = [*quiet(150), 10.0, *quiet(50)]
    model, whole = make()
    model.train_with(whole, norms)
    model, first = make()
    model.train_with(first, norms[:100])
    model, second = make()
    second.load_state_dict(first.state_dict())
    assert second.global_step == first.global_step == 100
    model.train_with(second, norms[100:])
    assert second.records == whole.records
    assert spiked(second) == [150]


def test_the_file_of_records_grows_and_is_whole_after_every_read(tmp_path: Path) -> None:
    """A record was written again, with all the others, at each read."""
    model, monitor = make(folder=tmp_path, every=10)
    sizes = []
    for _ in range(8):
        model.train_with(monitor, [*quiet(90), 50.0, *quiet(9)])
        assert [r.step for r in read_records(tmp_path / "spikes.jsonl")] == spiked(monitor)
        sizes.append((tmp_path / "spikes.jsonl").stat().st_size)
    assert sizes == sorted(sizes)
    assert read_records(tmp_path / "spikes.jsonl") == monitor.records


def test_steps_without_a_finite_value_are_one_record(tmp_path: Path) -> None:
    """There was one for each, 160 MB of them in 100,000 steps."""
    model, monitor = make(folder=tmp_path)
    model.train_with(monitor, quiet(100))
    model.train_with(monitor, [math.nan] * 1000)
    (record,) = read_records(tmp_path / "spikes.jsonl")
    assert (record.step, record.until) == (100, 1099)
    assert monitor.counts["gradient"] == 1000
