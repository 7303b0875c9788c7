"""The monitor in plain numbers, without a training loop."""

import math

import pytest
import torch
from torch import nn

from steadyfit import SpikeMonitor, StepProbe
from steadyfit.probe import Update
from steadyfit.watch import NormHistory, Numbers, Observation


def watch_norms(monitor: SpikeMonitor, norms: list[float], scaled: bool = False) -> None:
    """Show the monitor a training of one parameter whose gradient has these norms."""
    for step, norm in enumerate(norms, start=monitor.now):
        numbers: Numbers = {
            name: [] for name in ("scale", "update", "clipped", "factor", "weight")
        } | {"gradient": [norm], "loss": [norm if math.isinf(norm) else 1.0]}
        observation = Observation(
            step=step,
            epoch=0,
            batches=[step],
            optimizer=0,
            lrs=[0.1],
            losses=[],
            gradient=torch.tensor([norm]),
            scale=None,
            scaled=scaled,
            update=Update(),
            weight=None,
        )
        monitor.judge(observation, numbers)


@pytest.fixture
def monitor() -> SpikeMonitor:
    monitor = SpikeMonitor()
    parameter = nn.Parameter(torch.zeros(1))
    monitor.optimizers = [torch.optim.SGD([parameter], lr=0.1)]
    monitor.names = {id(StepProbe.of(monitor.optimizers[0]).params[0]): "weight"}
    return monitor


def quiet(steps: int, level: float = 1.0) -> list[float]:
    noise = torch.randn(steps, generator=torch.Generator().manual_seed(0))
    return (level * (0.1 * noise).exp()).tolist()


def test_a_new_level_that_lasts_leaves_no_spikes(monitor: SpikeMonitor) -> None:
    """Its first steps look like spikes until it is seen that they stay."""
    watch_norms(monitor, quiet(100))
    watch_norms(monitor, quiet(3, level=10.0))
    assert monitor.counts["gradient"] == 3
    watch_norms(monitor, quiet(20, level=10.0))
    assert (monitor.counts["gradient"], monitor.counts["level_shift"]) == (0, 1)
    assert [r["step"] for r in monitor.records if r["spiked"]] == []


def test_a_spike_within_a_new_level_stays_one(monitor: SpikeMonitor) -> None:
    watch_norms(monitor, [*quiet(100), *quiet(3, 10.0), 1e4, *quiet(20, 10.0)])
    assert [r["step"] for r in monitor.records if r["spiked"]] == [103]


def test_an_overflow_that_the_scaler_throws_away_says_nothing_of_the_loss(
    monitor: SpikeMonitor,
) -> None:
    watch_norms(monitor, quiet(100), scaled=True)
    watch_norms(monitor, [math.inf], scaled=True)
    assert monitor.counts["overflow"] == 1
    assert monitor.counts["loss"] == 0
    assert "loss" not in monitor.records[-1]["signals"]


def test_what_was_learned_goes_on(monitor: SpikeMonitor) -> None:
    watch_norms(monitor, quiet(100))
    other = SpikeMonitor()
    other.optimizers, other.names = monitor.optimizers, monitor.names
    other.load_state_dict(monitor.state_dict())
    assert other.now == monitor.now == 100
    for each in (monitor, other):
        watch_norms(each, [5.0, *quiet(3)])
    assert other.records == monitor.records
    assert other.counts == monitor.counts == {**monitor.counts, "gradient": 1}


def test_an_infinite_norm_stays_infinite_in_the_history() -> None:
    history = NormHistory(["a"], bins=4)
    history.add([0, 1], [[[1.0], [math.nan], [0.0]], [[math.inf], [2.0], [0.0]]])
    assert history.table[:, 0, 0].tolist() == [1.0, math.inf]
    assert history.table[0, 1, 0].item() == math.inf  # NaN is as bad


@pytest.mark.parametrize("top_k", [0, -1])
def test_it_names_a_parameter_at_least(top_k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k must be at least 1, got {top_k}"):
        SpikeMonitor(top_k=top_k)
