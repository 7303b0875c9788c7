"""What is a spike and what is not: planted values, broken values, new levels, and resumed runs."""

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import spike_detectors as bench
from benchmarks import spike_streams as streams
from steadyfit.detector import EVIDENCE, NORM_MIN_SCALE, TAIL_FACTORS, SpikeDetector

finite = st.floats(allow_nan=False, allow_infinity=False)
anything = st.one_of(st.floats(), st.floats(0.5, 2), st.sampled_from([0.0, -1.0, 1.0, 1e300]))


def noise(steps: int, seed: int = 0, sigma: float = 0.2) -> list[float]:
    return np.exp(sigma * np.random.default_rng(seed).standard_normal(steps)).tolist()


def feed(detector: SpikeDetector, values: list[float]) -> list[int]:
    """Steps that were said to be spikes."""
    return [step for step, value in enumerate(values) if detector.update(value)]


def kinds(detector: SpikeDetector, values: list[float]) -> list[str]:
    found: list[str] = []
    for value in values:
        detector.update(value)
        found.append(detector.kind)
    return found


def evidence(detector: SpikeDetector) -> tuple[Any, ...]:
    return tuple(getattr(detector, name) for name in EVIDENCE)


def test_planted_spikes_are_found() -> None:
    values = noise(1000)
    planted = [20, 21, 300, 305, 999]
    for step in planted:
        values[step] *= 8
    assert feed(SpikeDetector(), values) == planted


def test_evidence_of_a_spike() -> None:
    detector = SpikeDetector()
    feed(detector, [10 * value for value in noise(500)])
    assert detector.update(100.0)
    assert detector.kind == "spike"
    assert detector.raised == 1
    assert detector.center == pytest.approx(10, rel=0.15)
    assert detector.scale == pytest.approx(0.2, rel=0.4)
    assert detector.score == pytest.approx(math.log(100 / detector.center) / detector.scale)
    limit = detector.center * math.exp(detector.limit * detector.scale)
    assert detector.threshold == pytest.approx(limit)
    assert detector.center < detector.threshold < 100


def test_threshold_is_where_spikes_begin() -> None:
    detector = SpikeDetector()
    feed(detector, noise(200))
    state = detector.state_dict()
    detector.update(1.0)
    threshold = detector.threshold
    for factor, spike in ((1 - 1e-9, False), (1 + 1e-9, True)):
        detector.load_state_dict(state)
        assert detector.update(factor * threshold) == spike


def test_a_warning_comes_before_a_spike_and_is_not_one() -> None:
    detector = SpikeDetector()
    feed(detector, noise(200))
    detector.update(1.0)
    value = detector.center * math.exp(0.9 * detector.limit * detector.scale)
    assert not detector.update(value)
    assert detector.kind == "warning"


def test_nothing_is_a_spike_before_there_is_something_to_compare_with() -> None:
    detector = SpikeDetector()
    assert feed(detector, [1, 1e9, 1e-9, 1, 1e5, 1, 1, 1]) == []
    assert detector.score == 0
    assert detector.threshold == math.inf


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_nonfinite_values_are_spikes_and_do_not_blind(broken: float) -> None:
    """The mean and the standard deviation of a window become NaN by one such value."""
    values = noise(400)
    values[100] = values[101] = values[250] = broken
    values[102] = values[251] = 20.0
    detector = SpikeDetector()
    assert feed(detector, values) == [100, 101, 102, 250, 251]
    stored = detector.state_dict()
    assert all(map(math.isfinite, stored["levels"] + stored["heights"] + stored["scores"]))


def test_nonfinite_values_change_no_later_decision() -> None:
    clean, broken = SpikeDetector(), SpikeDetector()
    for value in noise(300):
        clean.update(value)
        assert broken.update(math.nan)
        assert broken.kind == "nonfinite"
        broken.update(value)
        assert evidence(broken)[2:] == pytest.approx(evidence(clean)[2:], nan_ok=True)


def test_only_nan() -> None:
    detector = SpikeDetector()
    assert feed(detector, [math.nan] * 50) == list(range(50))
    assert feed(detector, [*noise(50), 20.0]) == [50]


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_values_without_a_logarithm_are_passed_over(value: float) -> None:
    detector = SpikeDetector()
    assert set(kinds(detector, [value] * 20)) == {"nonpositive"}
    mixed = [x for pair in zip(noise(100), [value] * 100, strict=True) for x in pair]
    assert feed(detector, mixed) == []
    assert detector.update(20.0)


def test_a_young_stream_is_taken_for_a_noisy_one() -> None:
    young, old = SpikeDetector(), SpikeDetector()
    feed(young, [1.0] * 10)
    feed(old, [1.0] * 40)
    assert old.update(2.0)
    assert not young.update(2.0)
    assert young.update(10.0)


def test_constant_signal() -> None:
    detector = SpikeDetector()
    assert feed(detector, [3.0] * 500) == []
    assert not detector.update(3.0 * 1.2)
    assert detector.update(3.0 * 1.3)
    assert feed(detector, [3.0] * 500) == []


def test_a_new_level_is_one_level_shift_and_then_quiet() -> None:
    found = kinds(SpikeDetector(), noise(300, seed=1) + [10 * v for v in noise(300, seed=2)])
    assert found.count("level_shift") == 1
    shift = found.index("level_shift")
    assert 305 <= shift <= 309
    assert set(found[300:shift]) == {"spike"}
    assert set(found[:300] + found[shift + 1 :]) <= {"normal", "warning"}


def test_a_level_shift_tells_how_long_it_has_lasted() -> None:
    detector = SpikeDetector()
    found = kinds(detector, [1.0] * 100 + [10.0] * 6)
    assert found[-6:] == ["spike"] * 5 + ["level_shift"]
    assert detector.raised == 6
    assert not detector.update(10.0)
    assert detector.raised == 0
    assert detector.center == pytest.approx(10)


def test_an_uneven_burst_is_spikes_until_it_lasts() -> None:
    burst = [5.0, 40, 9, 70, 20, 6, 50, 10, 30, 8]
    found = kinds(SpikeDetector(), noise(100) + burst)
    assert found[100:] == ["spike"] * 9 + ["level_shift"]


def test_a_lower_level_is_no_spike() -> None:
    values = noise(200, seed=1) + [0.05 * value for value in noise(200, seed=2)]
    assert feed(SpikeDetector(), values) == []


def test_a_drop_hides_no_spike() -> None:
    """The drop itself must not pass for noise, which would widen scale and limit."""
    values = noise(300) + [0.1 * value for value in noise(300, seed=1)]
    for step in (320, 350, 420, 590):
        values[step] *= 6
    detector = SpikeDetector()
    assert feed(detector, values) == [320, 350, 420, 590]
    assert detector.limit < 5


@pytest.mark.parametrize("growth", [0.9, 0.99, 1.01, 1.1])
def test_a_trend_is_no_spike_and_hides_none(growth: float) -> None:
    values = [growth**step * value for step, value in enumerate(noise(400))]
    values[300] *= 30
    assert feed(SpikeDetector(), values) == [300]


def test_decaying_loss_is_quiet() -> None:
    values = [(0.3 + 8 / (1 + step / 5)) * value for step, value in enumerate(noise(2000, 0, 0.05))]
    assert feed(SpikeDetector(), values) == []


def often(steps: int) -> list[float]:
    """After 200 ordinary values, every eighth is ten times as large."""
    factors = [10 if step > 200 and step % 8 == 0 else 1 for step in range(steps)]
    return [value * factor for value, factor in zip(noise(steps), factors, strict=True)]


def test_what_comes_often_is_ordinary() -> None:
    """A detector that stores no spike must not call one batch in eight a spike for ever."""
    detector = SpikeDetector()
    found = feed(detector, often(4000))
    assert 10 <= len(found) < 50
    assert not [step for step in found if step > 1000]
    assert detector.scale > 0.5  # the large values have become part of the noise


def test_a_spike_in_fifty_is_not_too_often() -> None:
    values = noise(2000, sigma=0.1)
    planted = list(range(150, 2000, 50))
    for step in planted:
        values[step] *= 4
    detector = SpikeDetector()
    assert feed(detector, values) == planted
    assert not detector.too_often


def test_the_recovery_from_spikes_hides_no_spike() -> None:
    """The raised values after a spike went into the tail of the scores; the limit rose to 8."""
    values = noise(2000, seed=4)
    planted = list(range(200, 1900, 100))
    for step in planted:
        for after in range(25):
            values[step + after] *= math.exp(3 * (1 - after / 25))
        values[step + 50] *= 6
    found = feed(SpikeDetector(), values)
    assert {step + 50 for step in planted} <= set(found)
    assert set(planted) <= set(found)


def test_trains_of_raised_steps_hide_no_spike() -> None:
    """The score of a level shift, which ends a train of six, was stored as noise."""
    values = noise(2000, seed=2)
    for step in range(200, 1900, 100):
        for after in range(7):
            values[step + after] *= 20
        values[step + 50] *= 5
    detector = SpikeDetector()
    found = feed(detector, values)
    assert {step + 50 for step in range(200, 1900, 100)} <= set(found)
    assert detector.limit < 5


@pytest.mark.parametrize("inner", [1.0, 30.0], ids=["steady", "in two levels"])
def test_an_explosion_blinds_no_longer_than_it_lasts(inner: float) -> None:
    """A loss of 0.12 at 2e4 for 40 steps: it was taken for the level, for 60 steps and more."""
    values = [0.12 * value for value in noise(700, sigma=0.1)]
    for step in range(300, 340):
        values[step] *= 2e5
    for step in range(320, 340):
        values[step] *= inner
    planted = [343, 360, 400, 500]
    for step in planted:
        values[step] *= 4
    detector = SpikeDetector()
    assert [step for step in feed(detector, values) if step >= 340] == planted
    assert detector.limit < 5


def test_a_level_that_stays_is_the_level() -> None:
    """What was there before a shift comes back within a window or never."""
    detector = SpikeDetector()
    feed(detector, noise(300) + [10 * value for value in noise(200, seed=1)])
    found = kinds(detector, noise(100, seed=2) + [10 * value for value in noise(100, seed=3)])
    assert "level_shift" in found[100:]


def test_a_small_rise_of_a_quiet_norm_is_nothing() -> None:
    """A gradient norm of 0.32 amid 0.23 was called a spike; of a loss that is much."""
    values = [0.23 * value for value in noise(300, sigma=0.01)]
    loss, norm = SpikeDetector(), SpikeDetector(min_scale=NORM_MIN_SCALE)
    feed(loss, values)
    feed(norm, values)
    state = norm.state_dict()
    assert loss.update(0.32)
    for value, spike in ((0.32, False), (0.35, False), (0.5, True)):
        norm.load_state_dict(state)
        assert norm.update(value) == spike


def test_small_spikes_do_not_raise_the_limit_beyond_bounds() -> None:
    """The loss of one rank of a large run: its limit rose to 8, and 16 of 58 spikes were below."""
    rng = np.random.default_rng(0)
    logs = 0.08 * rng.standard_normal(2000)
    logs[rng.random(2000) < 0.03] += 0.35
    detector = SpikeDetector()
    limits = []
    for value in np.exp(logs).tolist():
        detector.update(value)
        limits.append(detector.limit)
    assert max(limits) <= 4.5 * TAIL_FACTORS[1]


def test_heavy_tails_raise_the_limit() -> None:
    rng = np.random.default_rng(0)
    heavy, normal = SpikeDetector(), SpikeDetector()
    feed(heavy, np.exp(0.2 * rng.standard_t(3, 1000)).tolist())
    feed(normal, noise(1000))
    assert heavy.limit > 5.8
    assert normal.limit == pytest.approx(4.5, rel=0.1)


def test_learning_rate_jump_widens_the_scale_for_ten_values() -> None:
    detector, other = SpikeDetector(), SpikeDetector()
    for value in noise(200):
        detector.update(value)
        other.update(value)
    detector.rate_changed()
    ratios = []
    for _ in range(12):
        detector.update(1.0)
        other.update(1.0)
        ratios.append(detector.scale / other.scale)
    assert ratios == pytest.approx([2.0] * 10 + [1.0] * 2)


def test_learning_rate_jump_forgives_a_jump_of_the_signal() -> None:
    values = noise(200)
    told, untold = SpikeDetector(), SpikeDetector()
    feed(told, values)
    feed(untold, values)
    told.rate_changed()
    value = 4 * told.center
    assert untold.update(value)
    assert not told.update(value)


@given(st.lists(anything, max_size=150), st.data())
@settings(max_examples=40, deadline=None)
def test_resumed_equals_uninterrupted(values: list[float], data: st.DataObject) -> None:
    values = noise(20) + values
    stop = data.draw(st.integers(0, len(values)))
    whole, first = SpikeDetector(), SpikeDetector()
    feed(whole, values[:stop])
    feed(first, values[:stop])
    if data.draw(st.booleans()):
        whole.rate_changed()
        first.rate_changed()
    resumed = SpikeDetector()
    resumed.load_state_dict(first.state_dict())
    for value in values[stop:]:
        assert resumed.update(value) == whole.update(value)
        assert repr(evidence(resumed)) == repr(evidence(whole))
    assert repr(resumed.state_dict()) == repr(whole.state_dict())


def test_resumed_at_every_step_of_a_stream() -> None:
    """The state is saved and loaded between any two values, in a new level and a burst too."""
    values = noise(600) + [9 * value for value in noise(100)] + often(1000)
    values[60:64] = [20.0, 90.0, math.nan, 30.0]
    values[400:420] = [1e4 * value for value in values[400:420]]  # a shift that is taken back
    whole, resumed = SpikeDetector(), SpikeDetector()
    for value in values:
        state = resumed.state_dict()
        resumed = SpikeDetector()
        resumed.load_state_dict(state)
        assert resumed.update(value) == whole.update(value)
        assert repr(evidence(resumed)) == repr(evidence(whole))
    assert repr(resumed.state_dict()) == repr(whole.state_dict())


def test_state_is_a_copy() -> None:
    detector = SpikeDetector()
    feed(detector, noise(50))
    state = detector.state_dict()
    before = repr(state)
    other = SpikeDetector()
    other.load_state_dict(state)
    feed(detector, noise(50))
    feed(other, noise(50))
    assert repr(state) == before


def test_state_survives_torch_weights_only() -> None:
    detector = SpikeDetector()
    feed(detector, [*noise(700), math.nan, 30.0])
    file = io.BytesIO()
    torch.save(detector.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert state == detector.state_dict()


def test_resumed_detector_obeys_its_own_arguments() -> None:
    detector = SpikeDetector()
    feed(detector, noise(700))
    other = SpikeDetector(window=32, threshold=9.0, min_scale=0.5)
    other.load_state_dict(detector.state_dict())
    other.update(1.0)
    assert other.limit >= 9 * TAIL_FACTORS[0]
    assert other.scale == 0.5
    assert len(other.state_dict()["heights"]) == 32
    assert len(other.state_dict()["levels"]) == 8


def test_a_state_of_the_detector_before_this_one_is_taken() -> None:
    """It had 64 heights, 24 levels, steps that exceeded the limit, and no events or old levels."""
    detector = SpikeDetector(window=64)
    feed(detector, noise(400))
    state = detector.state_dict()
    for name in ("hold_until", "events", "before", "trial_until", "shift_scores"):
        del state[name]
    state |= {"levels": np.log(noise(24)).tolist(), "exceeded": [120, 300]}
    resumed = SpikeDetector()
    resumed.load_state_dict(state)
    assert feed(resumed, [*noise(100, seed=1), 20.0, *noise(100, seed=2)]) == [100]


@given(st.integers(-60, 60), st.integers(0, 5))
@settings(max_examples=12, deadline=None)
def test_units_do_not_matter(power: int, seed: int) -> None:
    values = noise(300, seed)
    for step in (50, 51, 200):
        values[step] *= 10
    scaled = [value * 2.0**power for value in values]
    assert feed(SpikeDetector(), scaled) == feed(SpikeDetector(), values) != []


@given(st.lists(finite, max_size=80))
@settings(max_examples=60, deadline=None)
def test_any_finite_values_are_taken(values: list[float]) -> None:
    """Nothing raises, and all the evidence but a young threshold and center stays finite."""
    detector = SpikeDetector()
    for value in values:
        detector.update(value)
        assert math.isfinite(detector.score)
        assert 0 < detector.scale < math.inf
        assert detector.limit >= 4.5 * TAIL_FACTORS[0]
        assert detector.kind != "nonfinite"


def test_takes_what_can_be_a_float() -> None:
    detector = SpikeDetector()
    assert not detector.update(torch.tensor(1.0))  # type: ignore[arg-type]
    assert not detector.update(np.float32(1))  # type: ignore[arg-type]
    assert detector.update(torch.tensor(math.nan))  # type: ignore[arg-type]


@pytest.mark.parametrize("window", [0, 15, -1])
def test_window_too_short(window: int) -> None:
    with pytest.raises(ValueError, match=f"window must be at least 16 steps, got {window}."):
        SpikeDetector(window=window)


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.nan, math.inf])
def test_threshold_out_of_range(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold must be positive and finite, got"):
        SpikeDetector(threshold=threshold)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_min_scale_out_of_range(scale: float) -> None:
    with pytest.raises(ValueError, match="min_scale must be positive and finite, got"):
        SpikeDetector(min_scale=scale)


@pytest.mark.slow
def test_beats_the_best_public_rules() -> None:
    """One seed of the benchmark; nothing was tuned on these streams."""
    seeds = bench.SEEDS["test"][:1]
    ours = bench.add(bench.evaluate(SpikeDetector, seeds).values()).f1
    assert ours > 0.85
    for name in ("OLMo-core StabilityMonitor", "Lightning SpikeDetection", "log median/MAD"):
        theirs = bench.add(bench.evaluate(bench.RULES[name], seeds).values()).f1
        assert ours > theirs + 0.02, name


FAMILIES = [*streams.SPIKY, *streams.QUIET, *streams.TUNED, *streams.HELD_OUT]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_streams_are_reproducible(family: streams.Family) -> None:
    first, second = streams.make(family, 5), streams.make(family, 5)
    assert repr(first) == repr(second) != repr(streams.make(family, 6))
    assert any(first.spikes) != family.__name__.startswith("quiet_")
    assert {len(part) for part in first} == {streams.STEPS}
    assert not any(spike and out for spike, out in zip(first.spikes, first.ignored, strict=True))


def test_the_tail_of_a_spike_is_neither_found_nor_a_false_alarm() -> None:
    class Always:
        def update(self, value: float) -> bool:
            return True

    stream = streams.marked(np.zeros(streams.STEPS), np.array([500]), np.arange(501, 531))
    counts = bench.count(Always(), stream)
    assert (counts.hits, counts.false_alarms, counts.steps) == (1, 1969, 1970)


@pytest.mark.parametrize("make", bench.RULES.values(), ids=bench.RULES)
def test_every_rule_survives_broken_values(make: Callable[[], bench.Detector]) -> None:
    rule = make()
    for value in [*noise(300), math.nan, math.inf, *noise(300)]:
        assert rule.update(value) in (True, False)
