"""Detectors of a spike in the next value of a signal, and of slow growth."""

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable
from typing import Any, Literal

_Kind = Literal["normal", "warning", "spike", "level_shift", "nonfinite", "nonpositive"]
EVIDENCE = ("kind", "score", "limit", "threshold", "center", "scale", "raised")

_WARM_UP = 8  # values before the first decision
PRIOR_SCALE, PRIOR_WEIGHT, PRIOR_UNTIL = 0.35, 8, 32  # a young stream is taken for a noisy one
LOSS_MIN_SCALE = 0.05  # a smooth loss may still rise by 25 %: exp(4.5 * 0.05)
NORM_MIN_SCALE = 0.15  # a quiet norm may double
NORMAL_Q90, NORMAL_IQR = 1.2816, 1.349  # of the standard normal distribution
TAIL_WINDOW, TAIL_SHARE, TAIL_MIN = 512, 0.05, 64
_TAIL_ODDS = math.log(TAIL_SHARE / 1e-4)  # from the edge of the tail to one value in 10 000
_TAIL_NORMAL = 4.5  # score so extrapolated that normal noise seldom passes
# Where most spikes are rare but small, the tail is made of them: it must not hide the next
TAIL_FACTORS = 0.95, 1.4
_HOLD = 15  # steps after a spike or a level shift: a recovery is not noise
_WARNING = 2 / 3  # of the limit
SHIFT_AFTER = 10  # raised values in a row
STEADY_AFTER, STEADY_RANGE = 6, 3.0  # values, scales
OFTEN, OFTEN_STEPS = 10, 128  # as many spikes in the last steps are no exceptions
RATE_STEPS, RATE_FACTOR = 10, 2.0
_NORMAL_DIFFERENCE = 0.6745 * math.sqrt(2)  # median of |x - y| for standard normal x and y
_DRIFT_WINDOW = 128  # steps the level and the scale are taken from
_DRIFT_LIMIT = 20.0  # of the sum at which to warn: about as many steps well above the level
_DRIFT_HIGHEST = 2.0  # scales above the level that one value counts for: a spike is no drift
_DRIFT_SLACK = 1.0  # scales above the level that are nothing


class _SortedWindow:
    """The last ``size`` values, in the order they came and in ascending order."""

    def __init__(self, size: int, values: Iterable[float] = ()) -> None:
        self.values = deque(values, maxlen=size)
        self.ordered = sorted(self.values)

    def push(self, value: float) -> None:
        if len(self.values) == self.values.maxlen:
            del self.ordered[bisect_left(self.ordered, self.values[0])]
        self.values.append(value)
        insort(self.ordered, value)

    def quantiles(self, *shares: float) -> list[float]:
        last = len(self.ordered) - 1
        return [self.ordered[int(share * last + 0.5)] for share in shares]

    def median(self) -> float:
        return self.ordered[len(self.ordered) // 2]


class SpikeDetector:
    """Say of every value of a positive signal (gradient norm, loss) whether it is a spike.

    Values are compared on the logarithmic scale, where the noise of such signals is about the same
    at every level. The level is the median of the last 32 values. The height of a value above it
    is compared with the last 128 heights: their median, if positive, is how far the level lags
    after a rising signal; their quantiles give the scale. A spike is more than 4.5 scales above
    level and lag. Where the last 512 scores have heavier tails than normal noise, that limit rises
    in proportion, by 40 % at most: the mean excess of their outer 5 %, both sides averaged, is
    extrapolated to one value in 10 000 (peaks over threshold, as in Siffer et al., KDD 2017).

    Spikes are kept out of these statistics, but for the height of the first of a row, and drops as
    large, and the 15 steps after a spike as well, out of scale and tails. Raised values in a row,
    the first of them a spike, are a new level when there are ten, or six as close together as
    ordinary noise: the last of them is a ``level_shift``. If the signal falls back towards its old
    level within ``window`` steps, level and scale are again those before the shift; if not, the
    score of the shift counts. What comes often is ordinary: after ten spikes in 128 steps, a row of
    raised values counted once, no other is called one.

    These attributes tell how the last value was judged; one that is not finite or not positive
    sets only ``kind`` and ``score``:
        kind: ``spike`` or ``nonfinite`` if it is a spike, else ``normal``, ``warning`` (above two
            thirds of the limit), ``level_shift`` or ``nonpositive``. The last has no logarithm and
            is never stored: a signal that is often so cannot be judged.
        score: Height above level and lag, in scales; 0 for the first 8 values.
        limit: Score above which a value is a spike.
        threshold: The same in the signal's units; infinite for the first 8 values.
        center: Level and lag in the signal's units; NaN before the first value.
        scale: Robust standard deviation of the logarithm.
        raised: Values in a row above the warning line, counted from a spike on. The
            ``level_shift`` is the last of this many steps at the new level, and ``center`` and
            ``threshold`` are those of the new level.
        too_often: Spikes have come so often that no more are called so.

    Args:
        window: Steps the scale is taken from, at least 16; the level takes a quarter of them.
        threshold: Limit for normal noise, in robust standard deviations.
        min_scale: Smallest scale, natural logarithm: ``threshold`` times this is the smallest
            height of a spike. ``LOSS_MIN_SCALE``, or ``NORM_MIN_SCALE`` for a norm, to which a
            factor of 1.5 is nothing.

    Raises:
        ValueError: If ``window`` is below 16, or ``threshold`` or ``min_scale`` is not positive
            and finite.
    """

    def __init__(
        self, window: int = 128, threshold: float = 4.5, min_scale: float = LOSS_MIN_SCALE
    ) -> None:
        if window < 16:
            raise ValueError(f"window must be at least 16 steps, got {window}.")
        for name, value in (("threshold", threshold), ("min_scale", min_scale)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}.")
        self.window = window
        self.normal_limit = float(threshold)
        self.min_scale = float(min_scale)

        self.kind: _Kind = "normal"
        self.score = 0.0
        self.limit = self.normal_limit
        self.threshold = math.inf
        self.center = math.nan
        self.scale = PRIOR_SCALE
        self.raised = 0

        self._levels = _SortedWindow(window // 4)  # logarithms
        self._heights = _SortedWindow(window)
        self._scores = _SortedWindow(TAIL_WINDOW)
        self._run: list[float] = []  # logarithms of the raised values
        self._steps = 0
        self._hold_until = 0  # the last step that says nothing of the noise
        self._events: deque[int] = deque(maxlen=OFTEN)  # steps on which a spike began
        self._before: tuple[list[float], list[float]] = ([], [])  # levels, heights before a shift
        self._trial_until = 0  # the step from which a shift is for good
        self._shift_scores: list[float] = []  # of the shifts on trial
        self._rate_steps = 0  # for which the scale stays inflated

    @property
    def too_often(self) -> bool:
        """True if the last 128 steps had so many spikes that another is ordinary."""
        full = len(self._events) == OFTEN
        return full and self._steps - self._events[0] < OFTEN_STEPS

    def update(self, value: float) -> bool:
        """Judge the next value of the signal and return whether it is a spike."""
        value = float(value)
        self._steps += 1
        if not math.isfinite(value):
            self.kind, self.score = "nonfinite", math.inf
            return True
        if value <= 0:
            self.kind, self.score = "nonpositive", 0.0
            return False

        log = math.log(value)
        level = self._levels.median() if self._levels.ordered else log
        height = log - level
        if len(self._heights.values) < _WARM_UP:
            self.kind, self.score, self.center = "normal", 0.0, _exp(level)
            self._levels.push(log)
            self._heights.push(height)
            return False

        lag, self.scale = self._lag_and_scale()
        self.score = (height - lag) / self.scale
        self.limit = self.normal_limit * self._tail_factor()
        self.center = _exp(level + lag)
        self.threshold = _exp(level + lag + self.limit * self.scale)
        self.kind = self._judge(log)
        if self.kind in ("spike", "level_shift"):
            self._hold_until = self._steps + _HOLD
            if self.kind == "level_shift":
                self._shift_level()
            elif self.raised == 1:  # else a second mode of the noise would be spikes for ever
                self._heights.push(height)
            return self.kind == "spike"
        dropped = self.score < -self.limit
        if self._steps >= self._trial_until:
            while self._shift_scores:  # such shifts belong to the signal
                self._scores.push(self._shift_scores.pop())
        elif dropped:
            self._return_from_shift(log, level)
        # a drop, as a recovery, moves the level and says nothing about the noise
        if not dropped and self._steps > self._hold_until:
            self._heights.push(height)
            self._scores.push(self.score)
        self._levels.push(log)
        return False

    def rate_changed(self) -> None:
        """Say that the learning rate has jumped: the scale is doubled for the next ten values."""
        self._rate_steps = RATE_STEPS

    def _lag_and_scale(self) -> tuple[float, float]:
        low, lower, median, upper, high = self._heights.quantiles(0.1, 0.25, 0.5, 0.75, 0.9)
        scale = max(
            (high - median) / NORMAL_Q90,
            (median - low) / NORMAL_Q90,
            (upper - lower) / NORMAL_IQR,
            self.min_scale,
        )
        count = len(self._heights.ordered)
        if count < PRIOR_UNTIL:
            squares = count * scale**2 + PRIOR_WEIGHT * PRIOR_SCALE**2
            scale = math.sqrt(squares / (count + PRIOR_WEIGHT))
        if self._rate_steps:
            self._rate_steps -= 1
            scale *= RATE_FACTOR
        return max(0.0, median), scale

    def _tail_factor(self) -> float:
        """Reach of the scores in that of normal noise, within bounds."""
        scores = self._scores.ordered
        if len(scores) < TAIL_MIN:
            return 1.0
        count = int(TAIL_SHARE * len(scores)) + 1
        low, high = scores[:count], scores[-count:]
        edge = (high[0] - low[-1]) / 2
        excess = (sum(high) - sum(low)) / (2 * count) - edge
        lowest, highest = TAIL_FACTORS
        return min(max(lowest, (edge + excess * _TAIL_ODDS) / _TAIL_NORMAL), highest)

    def _judge(self, log: float) -> _Kind:
        exceeds = self.score > self.limit
        warning = self.score > self.limit * _WARNING
        begins = exceeds and not self._run
        if exceeds or (warning and self._run):
            self._run.append(log)
        else:
            self._run = []
        self.raised = len(self._run)
        if self._at_new_level():
            return "level_shift"
        ordinary = self.too_often
        if begins:
            self._events.append(self._steps)
        if exceeds and not ordinary:
            return "spike"
        return "warning" if warning else "normal"

    def _at_new_level(self) -> bool:
        if len(self._run) < STEADY_AFTER:
            return False
        steady = max(self._run) - min(self._run) < STEADY_RANGE * self.scale
        return steady or len(self._run) >= SHIFT_AFTER

    def _shift_level(self) -> None:
        """Take the raised values for the level, and keep what was there in case it comes back."""
        if self._steps >= self._trial_until:
            self._before = (list(self._levels.values), list(self._heights.values))
            self._trial_until = self._steps + self.window
        self._shift_scores.append(self.score)
        self._levels = _SortedWindow(self.window // 4, self._run)
        self._run = []
        level = self._levels.median()  # of the new one, as center and threshold are
        self.center, self.threshold = _exp(level), _exp(level + self.limit * self.scale)

    def _return_from_shift(self, log: float, level: float) -> None:
        """Go back to what was before a shift if a value is nearer to that level than to this."""
        levels, heights = self._before
        before = _SortedWindow(self.window // 4, levels)
        if 2 * log < before.median() + level:
            self._levels, self._heights = before, _SortedWindow(self.window, heights)
            self._trial_until = 0
            self._shift_scores = []

    def state_dict(self) -> dict[str, Any]:
        """Everything learned from the signal, in lists, numbers and strings."""
        return {name: getattr(self, name) for name in EVIDENCE} | {
            "levels": list(self._levels.values),
            "heights": list(self._heights.values),
            "scores": list(self._scores.values),
            "run": list(self._run),
            "steps": self._steps,
            "hold_until": self._hold_until,
            "events": list(self._events),
            "before": [list(values) for values in self._before],
            "trial_until": self._trial_until,
            "shift_scores": list(self._shift_scores),
            "rate_steps": self._rate_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`, under the arguments of this detector.

        Older states tell nothing of how often spikes came, nor of a shift that may be taken back.
        """
        for name in EVIDENCE:
            setattr(self, name, state[name])
        self._levels = _SortedWindow(self.window // 4, state["levels"])
        self._heights = _SortedWindow(self.window, state["heights"])
        self._scores = _SortedWindow(TAIL_WINDOW, state["scores"])
        self._run = list(state["run"])
        self._steps = state["steps"]
        self._hold_until = state.get("hold_until", 0)
        self._events = deque(state.get("events", ()), OFTEN)
        levels, heights = state.get("before", ([], []))
        self._before = (list(levels), list(heights))
        self._trial_until = state.get("trial_until", 0)
        self._shift_scores = list(state.get("shift_scores", ()))
        self._rate_steps = state["rate_steps"]


class DriftDetector:
    """Warn once when a positive signal (loss) grows slowly, which no single value shows.

    A one-sided cumulative sum (Page, "Continuous inspection schemes", 1954) of the logarithm: each
    value adds its height above the median of the last 128, in scales, less a slack of one scale,
    and the sum never falls below zero. The scale is that of the differences of successive values,
    which a slow growth leaves alone. One value adds one at most. The next warning can come after
    the sum was back at zero: the growth has ended.

    """

    def __init__(self) -> None:
        self.sum = 0.0
        self.warned = False  # of the growth that goes on
        self._levels = _SortedWindow(_DRIFT_WINDOW)  # logarithms
        self._differences = _SortedWindow(_DRIFT_WINDOW)

    def update(self, value: float) -> bool:
        """Take in the next value and return whether to warn; one without logarithm is ignored."""
        value = float(value)
        if not 0 < value < math.inf:
            return False
        log = math.log(value)
        if len(self._levels.values) >= _WARM_UP:
            scale = max(self._differences.median() / _NORMAL_DIFFERENCE, LOSS_MIN_SCALE)
            height = (log - self._levels.median()) / scale
            self.sum = min(
                max(0.0, self.sum + min(height, _DRIFT_HIGHEST) - _DRIFT_SLACK), _DRIFT_LIMIT
            )
        if self._levels.values:
            self._differences.push(abs(log - self._levels.values[-1]))
        self._levels.push(log)
        warn = self.sum == _DRIFT_LIMIT and not self.warned
        self.warned = warn or (self.warned and self.sum > 0)
        return warn

    def state_dict(self) -> dict[str, Any]:
        """Everything learned from the signal, in lists and numbers."""
        return {
            "sum": self.sum,
            "warned": self.warned,
            "levels": list(self._levels.values),
            "differences": list(self._differences.values),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sum, self.warned = state["sum"], state["warned"]
        self._levels = _SortedWindow(_DRIFT_WINDOW, state["levels"])
        self._differences = _SortedWindow(_DRIFT_WINDOW, state["differences"])


def _exp(log: float) -> float:
    """Exponential that does not overflow: e**709 is just below the largest double."""
    return math.exp(min(log, 709.0))
