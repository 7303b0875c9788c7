"""Signals that may announce a spike, on records whose numbers are known."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import spike_predictors
from benchmarks.spike_predictors import Record, main, near, row, signals, threshold, train


def quadratic(curvature: float, rate: float, steps: int = 20) -> Record:
    """Gradient descent on curvature / 2 * x**2 from x = 1."""
    x = (1 - rate * curvature) ** np.arange(steps)
    gradient, update = curvature * x, -rate * curvature * x
    last = np.concatenate([[0], update[:-1]])
    after = curvature / 2 * (x + update) ** 2
    return {
        "loss": curvature / 2 * x**2,
        "own_loss": after,
        "gradient": abs(gradient),
        "update": abs(update),
        "slope": gradient * update,
        "last_slope": gradient * last,
    }


@pytest.mark.parametrize("product", [0.5, 1.9, 2.1])
def test_turn_is_curvature_times_learning_rate(product: float) -> None:
    found = signals(quadratic(curvature=3.0, rate=product / 3))
    assert found["turn"][1:] == pytest.approx(np.full(19, product))
    ratio = found["same batch again: loss ratio"]
    assert (ratio > 1).all() == (product > 2)


def test_a_promised_decrease_is_in_units_of_the_loss() -> None:
    found = signals(quadratic(curvature=3.0, rate=0.1))
    assert found["promised decrease / loss"] == pytest.approx(np.full(20, 2 * 0.3))


def spiky(at: tuple[int, ...], steps: int = 600) -> Record:
    record = {name: np.ones(steps) for name in quadratic(1, 1)}
    record["loss"][list(at)] = 3.0
    return record


def test_flags_before_an_excursion_announce_it() -> None:
    record = spiky((300, 400, 500))
    flags = np.zeros(600, bool)
    flags[[299, 393, 411]] = True  # one before, seven before, none of the third but one too many
    announced, _, one_before, earlier, alarms = map(float, row([record], lambda _: flags).split())
    assert (announced, one_before, earlier) == (67, 33, 67)
    assert alarms == pytest.approx(1.67)


def test_steps_around_an_excursion_are_no_false_alarms() -> None:
    assert np.flatnonzero(near([(20, 22)], 50)).tolist() == list(range(10, 28))


def test_threshold_gives_the_alarms_it_is_asked_for() -> None:
    record = spiky((300,), steps=2000)
    record["gradient"] = np.arange(2000.0)
    assert threshold([record], "gradient norm") == 1999 - 4


def test_records_are_made_once_and_a_table_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(spike_predictors, "EPOCHS", 1)
    assert {values.shape for values in train(3).values()} == {(31,)}
    np.savez(tmp_path / "1.npz", **spiky((300,)))  # type: ignore[arg-type]
    main(["--output", str(tmp_path), "--tuning", "1", "--seeds", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 runs, 1 excursions; shares in %"
    assert lines[-1].split()[0] == "any"
