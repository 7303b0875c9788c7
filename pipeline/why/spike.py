"""The spike of a run that is asked about, and the test that a training is without it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from core.errors import UserError
from pipeline.why.again import Course, Rows
from steadyfit.watching.black_box import LEAD
from steadyfit.watching.records import FOLLOW, SpikeRecord, read_records
from steadyfit.watching.spike_log import CONFIRM

_USUAL = 32  # steps before a spike, whose median loss is the usual one


@dataclass(frozen=True)
class Spike:
    """An episode: spikes of a run with no more than ``CONFIRM`` calm steps between two of them.

    Attributes:
        first: Its first optimizer step.
        peak: That of the highest loss in the ``FOLLOW`` steps from there.
        usual: Median loss before it.
        height: Loss of the peak.
        own: Loss of the first step, before the update that is taken with it.
        signals: Of its records up to the peak.
        record: The first one.
    """

    first: int
    peak: int
    usual: float
    height: float
    own: float
    signals: frozenset[str]
    record: SpikeRecord

    @classmethod
    def of(cls, records: Sequence[SpikeRecord], rows: Rows) -> "Spike":
        first = records[0].step
        losses = {s: _loss_at(rows, s) for s in range(first, first + FOLLOW + 1) if s in rows}
        peak = max(losses, key=lambda step: losses[step], default=first)
        before = [_loss_at(rows, s) for s in range(first - _USUAL, first) if s in rows]
        finite = [loss for loss in before if math.isfinite(loss)] or [math.nan]
        upto = [r for r in records if r.step <= peak] or records[:1]
        signals = frozenset(signal for r in upto for signal in r.spiked)
        height, own = losses.get(peak, math.nan), losses.get(first, math.nan)
        return cls(first, peak, median(finite), height, own, signals, records[0])

    @property
    def is_own(self) -> bool:
        """True if it is in the loss of its first batch already, not made by an update with it."""
        return "loss" not in self.signals or not self.own < self.height / 2

    @property
    def onset(self) -> int:
        """The first step that is looked at: a hard batch that only sets a spike off is none."""
        return self.first if self.is_own else self.first + 1

    @property
    def end(self) -> int:
        """The last step that is looked at."""
        return self.peak + CONFIRM

    @property
    def start(self) -> int:
        """The step that forks begin with."""
        return max(0, self.first - LEAD)

    @property
    def limit(self) -> float:
        """Half the height of the spike, on the logarithmic scale in which losses are compared."""
        if not math.isfinite(self.height):
            return math.inf
        return math.sqrt(max(self.usual, 0.0) * max(self.height, 0.0))

    def is_in(self, course: Course, first: int, last: int) -> bool:
        """Look for it in these steps: a loss above the limit, or a record of the monitor."""
        if "loss" in self.signals or not math.isfinite(self.height):
            losses = course.losses(first, last)
            return any(not loss < self.limit for loss in losses) if losses else True
        seen = [r for r in course.spikes if first <= r.step <= last]
        return any(self.signals.intersection(r.spiked) for r in seen)


def _loss_at(rows: Rows, step: int) -> float:
    loss = rows[step].get("train/loss", math.nan)
    return math.inf if math.isnan(loss) else loss  # NaN has no order


def find_spike(folder: Path, rows: Rows, step: int | None) -> Spike:
    """The worst spike of a run, or the one at a step.

    Raises:
        UserError: There is none.
    """
    records = [r for r in read_records(folder / "spikes.jsonl") if r.spiked]
    if not records:
        raise UserError(f"{folder} has recorded no spike, so there is nothing to explain.")
    episodes: list[list[SpikeRecord]] = []
    for record in records:
        if episodes and record.step - episodes[-1][-1].last_step <= CONFIRM:
            episodes[-1].append(record)
        else:
            episodes.append([record])
    if step is None:
        spikes = [Spike.of(episode, rows) for episode in episodes]
        return max(spikes, key=lambda s: s.height / s.usual if s.usual > 0 else 0.0)
    if step not in rows:
        raise UserError(f"--step {step} is outside the run, whose last step is {max(rows)}.")
    near = [e for e in episodes if e[0].step - CONFIRM <= step <= e[-1].last_step + CONFIRM]
    if not near:
        nearest = min(episodes, key=lambda e: abs(e[0].step - step))[0].step
        raise UserError(f"no spike at step {step}; the nearest one began at step {nearest}.")
    return Spike.of(min(near, key=lambda e: abs(e[0].step - step)), rows)
