"""A loss that grows slowly, and much that does not."""

import math

import numpy as np
import pytest

from benchmarks.slow_drift import growing, main, warnings
from steadyfit.detector import DriftDetector


def noise(steps: int, seed: int = 0, sigma: float = 0.1) -> list[float]:
    return np.exp(sigma * np.random.default_rng(seed).standard_normal(steps)).tolist()


@pytest.mark.parametrize("before", [0, 100, 500])
def test_slow_growth_is_noticed_before_the_loss_has_doubled(before: int) -> None:
    found = [warnings(growing(seed, before)) for seed in range(20)]
    assert sum(len(steps) == 1 and steps[0] >= before for steps in found) >= 19


def test_growth_is_told_once_until_it_ends() -> None:
    logs = np.log(noise(1000))
    logs[200:300] += 0.01 * np.arange(100)  # up, stays there, and up again
    logs[300:] += 1
    logs[700:800] += 0.01 * np.arange(100)
    logs[800:] += 1
    first, second = warnings(np.exp(logs))
    assert 200 < first < 270
    assert 700 < second < 770


def test_noise_a_fall_and_spikes_are_no_growth() -> None:
    values = noise(4000, sigma=0.3) + [
        0.999**step * value for step, value in enumerate(noise(2000))
    ]
    for step in range(100, 5000, 40):
        values[step] *= 50
    assert warnings(values) == []


def test_values_without_a_logarithm_change_nothing() -> None:
    clean, broken = DriftDetector(), DriftDetector()
    for value in growing(0, 100):
        for bad in (math.nan, math.inf, 0.0, -1.0):
            assert not broken.update(bad)
        assert broken.update(value) == clean.update(value)
    assert broken.state_dict() == clean.state_dict()
    assert clean.warned


def test_resumed_equals_uninterrupted() -> None:
    values = growing(1, 150) + noise(200, seed=2)
    whole, resumed = DriftDetector(), DriftDetector()
    for value in values:
        state = resumed.state_dict()
        resumed = DriftDetector()
        resumed.load_state_dict(state)
        assert resumed.update(value) == whole.update(value)
    assert resumed.state_dict() == whole.state_dict()


@pytest.mark.slow
def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert all(int(line[1]) >= 95 for line in lines[1:4])
    assert all(float(line[-1]) <= 1 for line in lines[6:])
