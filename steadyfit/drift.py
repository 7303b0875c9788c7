"""Whether a signal grows slowly, step by step, without a spike."""

import math
from typing import Any

from .detector import LOSS_MIN_SCALE, SortedWindow

WARM_UP = 8  # values before the sum begins
MAD_OF_DIFFERENCES = 0.6745 * math.sqrt(2)  # median of |x - y| for standard normal x and y
HIGHEST = 2.0  # scales above the level that one value counts for: a spike is no drift
SLACK = 1.0  # scales above the level that are nothing


class DriftDetector:
    """Warn once when a positive signal (loss) grows slowly, which no single value shows.

    A one-sided cumulative sum (Page, "Continuous inspection schemes", 1954) of the logarithm: each
    value adds its height above the median of the last 128, in scales, less a slack of one scale,
    and the sum never falls below zero. The scale is that of the differences of successive values,
    which a slow growth leaves alone. One value adds one at most. The next warning can come after
    the sum was back at zero: the growth has ended.

    Args:
        window: Steps the level and the scale are taken from, at least 16.
        limit: Sum at which to warn: about as many steps well above the level.
        min_scale: Smallest scale, natural logarithm; growth by less of it is nothing.

    Raises:
        ValueError: If ``window`` is below 16, or ``limit`` or ``min_scale`` is not positive and
            finite.
    """

    def __init__(
        self, window: int = 128, limit: float = 20.0, min_scale: float = LOSS_MIN_SCALE
    ) -> None:
        if window < 16:
            raise ValueError(f"window must be at least 16 steps, got {window}.")
        for name, number in (("limit", limit), ("min_scale", min_scale)):
            if not 0 < number < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {number}.")
        self.window = window
        self.limit = float(limit)
        self.min_scale = float(min_scale)

        self.sum = 0.0
        self.warned = False  # of the growth that goes on
        self._levels = SortedWindow(window)  # logarithms
        self._differences = SortedWindow(window)

    def update(self, value: float) -> bool:
        """Take in the next value and return whether to warn; one without logarithm is ignored."""
        value = float(value)
        if not 0 < value < math.inf:
            return False
        log = math.log(value)
        if len(self._levels.values) >= WARM_UP:
            scale = max(self._differences.median() / MAD_OF_DIFFERENCES, self.min_scale)
            height = (log - self._levels.median()) / scale
            self.sum = min(max(0.0, self.sum + min(height, HIGHEST) - SLACK), self.limit)
        if self._levels.values:
            self._differences.push(abs(log - self._levels.values[-1]))
        self._levels.push(log)
        warn = self.sum == self.limit and not self.warned
        self.warned = warn or (self.warned and self.sum > 0)
        return warn

    def state_dict(self) -> dict[str, Any]:
        """What was learned from the signal, in lists and numbers."""
        return {
            "sum": self.sum,
            "warned": self.warned,
            "levels": list(self._levels.values),
            "differences": list(self._differences.values),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`, under the arguments of this detector."""
        self.sum, self.warned = state["sum"], state["warned"]
        self._levels = SortedWindow(self.window, state["levels"])
        self._differences = SortedWindow(self.window, state["differences"])
