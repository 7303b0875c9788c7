"""Whether the next value of a signal is a spike."""

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable
from typing import Any, Literal

Kind = Literal["normal", "warning", "spike", "level_shift", "nonfinite", "nonpositive"]
EVIDENCE = ("kind", "score", "limit", "threshold", "center", "scale", "raised")

WARM_UP = 8  # values before the first decision
PRIOR_SCALE, PRIOR_WEIGHT, PRIOR_UNTIL = 0.35, 8, 32  # a young stream is taken for a noisy one
MIN_SCALE = 0.05  # a smooth signal may still rise by 25 %: exp(4.5 * 0.05)
NORMAL_Q90, NORMAL_IQR = 1.2816, 1.349  # of the standard normal distribution
TAIL_WINDOW, TAIL_SHARE, TAIL_MIN = 512, 0.05, 64
TAIL_ODDS = math.log(TAIL_SHARE / 1e-4)  # from the edge of the tail to one value in 10 000
TAIL_NORMAL = 4.5  # score so extrapolated that normal noise seldom passes
WARNING = 2 / 3  # of the limit
SHIFT_AFTER = 10  # raised values in a row
STEADY_AFTER, STEADY_RANGE = 6, 3.0  # values, scales
RATE_STEPS, RATE_FACTOR = 10, 2.0


class SortedWindow:
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
    at every level. The level is the median of the last 24 values. The height of a value above it
    is compared with the last 64 heights: their median, if positive, is how far the level lags
    behind a rising signal; their quantiles give the scale. A spike is more than 4.5 scales above
    level and lag. Where the last 512 scores have heavier tails than normal noise, that limit rises
    in proportion: the mean excess of their outer 5 %, both sides averaged, is extrapolated to one
    value in 10 000 (peaks over threshold, as in Siffer et al., KDD 2017).

    Spikes are kept out of all these statistics, and drops as large are kept out of scale and tails,
    with two exceptions. Raised values in a row, the first of them a spike, are a new level when
    there are ten, or six as close together as ordinary noise: the last of them is a
    ``level_shift``. What would be a spike on more than 5 % of the last 512 steps is ordinary. NaN
    and infinities are spikes; they, zeros and negative values are never stored.

    These attributes tell how the last value was judged; one that is not finite or not positive
    sets only ``kind`` and ``score``:
        kind: ``spike`` or ``nonfinite`` if it is a spike, else ``normal``, ``warning`` (above two
            thirds of the limit), ``level_shift`` or ``nonpositive``.
        score: Height above level and lag, in scales; 0 for the first 8 values.
        limit: Score above which a value is a spike.
        threshold: The same in the signal's units; infinite for the first 8 values.
        center: Level and lag in the signal's units; NaN before the first value.
        scale: Robust standard deviation of the logarithm.
        raised: Values in a row above the warning line, counted from a spike on. The
            ``level_shift`` is the last of this many steps at the new level, and ``center`` and
            ``threshold`` are those of the new level.

    Args:
        window: Steps the scale is taken from, at least 16; the level takes 3/8 of them.
        threshold: Limit for normal noise, in robust standard deviations.

    Raises:
        ValueError: If ``window`` is below 16, or ``threshold`` is not positive and finite.
    """

    def __init__(self, window: int = 64, threshold: float = 4.5) -> None:
        if window < 16:
            raise ValueError(f"window must be at least 16 steps, got {window}.")
        if not 0 < threshold < math.inf:
            raise ValueError(f"threshold must be positive and finite, got {threshold}.")
        self.window = window
        self.normal_limit = float(threshold)

        self.kind: Kind = "normal"
        self.score = 0.0
        self.limit = self.normal_limit
        self.threshold = math.inf
        self.center = math.nan
        self.scale = PRIOR_SCALE
        self.raised = 0

        self._levels = SortedWindow(window * 3 // 8)  # logarithms
        self._heights = SortedWindow(window)
        self._scores = SortedWindow(TAIL_WINDOW)
        self._run: list[float] = []  # logarithms of the raised values
        self._steps = 0
        self._exceeded: deque[int] = deque(maxlen=int(TAIL_SHARE * TAIL_WINDOW))  # at these steps
        self._rate_steps = 0  # for which the scale stays inflated

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
        if len(self._heights.values) < WARM_UP:
            self.kind, self.score, self.center = "normal", 0.0, exp(level)
            self._levels.push(log)
            self._heights.push(height)
            return False

        lag, self.scale = self._lag_and_scale()
        self.score = (height - lag) / self.scale
        self.limit = self.normal_limit * self._tail_factor()
        self.center = exp(level + lag)
        self.threshold = exp(level + lag + self.limit * self.scale)
        self.kind = self._judge(log)
        if self.kind == "spike":
            return True
        if self.kind == "level_shift":
            self._levels = SortedWindow(self.window * 3 // 8, self._run)
            self._run = []
            level = self._levels.median()  # of the new one, as center and threshold are
            self.center, self.threshold = exp(level), exp(level + self.limit * self.scale)
            self._scores.push(self.score)
            return False
        self._levels.push(log)
        if self.score > -self.limit:  # a drop moves the level and says nothing about the noise
            self._heights.push(height)
            self._scores.push(self.score)
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
            MIN_SCALE,
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
        """How much further the scores reach than those of normal noise, at least 1."""
        scores = self._scores.ordered
        if len(scores) < TAIL_MIN:
            return 1.0
        count = int(TAIL_SHARE * len(scores)) + 1
        low, high = scores[:count], scores[-count:]
        edge = (high[0] - low[-1]) / 2
        excess = (sum(high) - sum(low)) / (2 * count) - edge
        return max(1.0, (edge + excess * TAIL_ODDS) / TAIL_NORMAL)

    def _judge(self, log: float) -> Kind:
        exceeds = self.score > self.limit
        warning = self.score > self.limit * WARNING
        if exceeds or (warning and self._run):
            self._run.append(log)
        else:
            self._run = []
        self.raised = len(self._run)
        if self._at_new_level():
            return "level_shift"
        if exceeds and not self._too_often():
            return "spike"
        return "warning" if warning else "normal"

    def _at_new_level(self) -> bool:
        if len(self._run) < STEADY_AFTER:
            return False
        steady = max(self._run) - min(self._run) < STEADY_RANGE * self.scale
        return steady or len(self._run) >= SHIFT_AFTER

    def _too_often(self) -> bool:
        """Note that this step exceeds the limit; True if more than 5 % of the last 512 did."""
        full = len(self._exceeded) == self._exceeded.maxlen
        oldest = self._exceeded[0] if full else -TAIL_WINDOW
        self._exceeded.append(self._steps)
        return self._steps - oldest < TAIL_WINDOW

    def state_dict(self) -> dict[str, Any]:
        """What was learned from the signal, in lists, numbers and strings."""
        return {name: getattr(self, name) for name in EVIDENCE} | {
            "levels": list(self._levels.values),
            "heights": list(self._heights.values),
            "scores": list(self._scores.values),
            "run": list(self._run),
            "steps": self._steps,
            "exceeded": list(self._exceeded),
            "rate_steps": self._rate_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`, under the arguments of this detector."""
        for name in EVIDENCE:
            setattr(self, name, state[name])
        self._levels = SortedWindow(self.window * 3 // 8, state["levels"])
        self._heights = SortedWindow(self.window, state["heights"])
        self._scores = SortedWindow(TAIL_WINDOW, state["scores"])
        self._run = list(state["run"])
        self._steps = state["steps"]
        self._exceeded = deque(state["exceeded"], self._exceeded.maxlen)
        self._rate_steps = state["rate_steps"]


def exp(log: float) -> float:
    """Exponential that does not overflow: e**709 is just below the largest double."""
    return math.exp(min(log, 709.0))
