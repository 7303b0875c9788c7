"""Gradients of single parameters that are out of proportion to those of the others.

Dimensions: K steps, P parameters of one optimizer, W steps that are remembered of each.
"""

import math
from typing import Any

import numpy as np
import torch

from ..detector import NORMAL_Q90, SHIFT_AFTER, TAIL_SHARE

_ARRAYS = ("logs", "median", "spread", "uses", "raised", "rate")
_FORGET = 1 / 128  # weight of one use in a parameter's rate of spikes


class ParameterRatios:
    """Find the parameter whose gradient is out of proportion to that of all the others.

    The logarithm of this ratio is compared with its last values by median and spread. What makes
    all gradients larger leaves it alone, so it is far less noisy than a norm, and a parameter that
    holds little of the whole norm is seen as well. A parameter without gradient in a step (a head
    of another task, an expert) is not judged there and remembers nothing of it. One that would
    spike in more than 5 % of its uses is ordinary, and after ten spikes in a row begins anew.

    Args:
        window: Ordinary uses that are remembered of each parameter.
        limit: Robust standard deviations of the logarithm beyond which a ratio is a spike.
    """

    REFRESH = 16  # ordinary steps after which medians and spreads are taken anew; least uses
    MIN_SCALE = 0.1
    LEAST = 0.1  # of a ratio that may spike: below it a parameter holds 1 % of the squared gradient
    FLOOR = 1e-6  # of a ratio

    def __init__(self, window: int, limit: float) -> None:
        self.window = window
        self.limit = limit
        self.rows = 0  # ordinary steps since the last refresh
        self.logs = np.empty((0, window))  # (P, W) of the last uses, a ring; NaN where none was
        self.median, self.spread = np.empty(0), np.empty(0)  # (P,), NaN while unknown
        self.uses = np.empty(0, np.int64)  # (P,) that were remembered
        self.raised = np.empty(0, np.int64)  # (P,) uses in a row with a spike
        self.rate = np.empty(0)  # (P,) moving share of uses beyond the limit

    def grow(self, count: int) -> None:
        """Take in more parameters, after the ones there are."""
        new = count - len(self.uses)
        self.logs = np.concatenate([self.logs, np.full((new, self.window), np.nan)])
        for name, empty in (("median", np.nan), ("spread", np.nan), ("rate", 0.0)):
            setattr(self, name, np.append(getattr(self, name), np.full(new, empty)))
        for name in ("uses", "raised"):
            setattr(self, name, np.append(getattr(self, name), np.zeros(new, np.int64)))

    def update(self, gradient: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores (K, P), 0 where a parameter is not judged, and which of them are spikes (K, P).

        Args:
            gradient: Norms (K, P); zero where a parameter has no gradient.
        """
        logs = self.log_ratios(gradient)
        scores, spikes = np.zeros_like(logs), np.zeros(logs.shape, bool)
        start = 0
        while start < len(logs):
            block = slice(start, start + self.REFRESH - self.rows)
            scores[block] = np.nan_to_num((logs[block] - self.median) / self.spread)
            beyond = (scores[block] > self.limit) & (logs[block] > math.log(self.LEAST))
            hits = np.asarray(beyond.any(1))
            ordinary = int(hits.argmax()) if hits.any() else len(hits)
            self._remember(logs[start : start + ordinary])
            start += ordinary
            if ordinary < len(hits):
                spikes[start] = self._judge(logs[start], beyond[ordinary])
                start += 1
        return scores, spikes

    def _judge(self, logs: np.ndarray, beyond: np.ndarray) -> np.ndarray:
        """Find the parameters (P,) that spike in a step that has some beyond the limit."""
        self.rate[beyond] += _FORGET * (1 - self.rate[beyond])
        spikes = beyond & (self.rate <= TAIL_SHARE)
        if not spikes.any():
            self._remember(logs[None])
            return spikes
        used = ~np.isnan(logs)
        self.raised = np.where(spikes, self.raised + 1, np.where(used, 0, self.raised))
        lasting = self.raised >= SHIFT_AFTER  # it is no spike but the new proportion
        self.logs[lasting] = self.median[lasting] = self.spread[lasting] = np.nan
        self.uses[lasting] = self.raised[lasting] = 0
        return spikes

    def _remember(self, logs: np.ndarray) -> None:
        """Take in ordinary steps (at most ``REFRESH``, P)."""
        used = ~np.isnan(logs)
        counts = used.sum(0)
        places = (self.uses + used.cumsum(0) - 1) % self.window
        self.logs[np.nonzero(used)[1], places[used]] = logs[used]
        self.uses += counts
        self.raised[counts > 0] = 0
        self.rate *= (1 - _FORGET) ** counts
        self.rows += len(logs)
        if self.rows < self.REFRESH:
            return
        self.rows = 0
        known = np.flatnonzero(self.uses >= self.REFRESH)
        values = np.sort(self.logs[known], axis=1)  # NaN comes last
        count = np.minimum(self.uses[known], self.window)
        row = np.arange(len(known))
        low, median, high = (values[row, (count * q).astype(int)] for q in (0.1, 0.5, 0.9))
        spread = np.maximum(high - median, median - low) / NORMAL_Q90
        self.median[known], self.spread[known] = median, np.maximum(spread, self.MIN_SCALE)

    def log_ratios(self, gradient: np.ndarray) -> np.ndarray:
        """Logarithms (K, P) of the norm of each over that of the others, NaN where there is none.

        A step whose norm is not finite, or which has one gradient alone, has none.
        """
        squares = np.square(gradient)
        whole = squares.sum(1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = gradient / np.sqrt(np.maximum(whole - squares, 0))
            logs = np.log(np.clip(ratios, self.FLOOR, 1 / self.FLOOR))
        several = np.count_nonzero(squares, axis=1, keepdims=True) > 1
        return np.where((squares > 0) & several & np.isfinite(whole), logs, np.nan)

    def thresholds(self) -> np.ndarray:
        """Ratios (P,) beyond which a parameter is a spike; infinite while it is not judged."""
        limits = np.exp(np.minimum(self.median + self.limit * self.spread, 709))
        limits = np.maximum(limits, self.LEAST)
        return np.where(np.isnan(limits) | (self.rate > TAIL_SHARE), np.inf, limits)

    def state_dict(self) -> dict[str, Any]:
        state = {name: torch.from_numpy(getattr(self, name).copy()) for name in _ARRAYS}
        return {"rows": self.rows, **state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`; one of another window is left, and all learned anew."""
        if state["logs"].shape[1] != self.window:
            return
        self.rows = state["rows"]
        for name in _ARRAYS:
            setattr(self, name, state[name].numpy().copy())
