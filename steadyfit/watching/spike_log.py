"""The records of a training's spikes: what is counted, and what followed."""

import json
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .observation import Observation
from .optimizer_monitor import OptimizerMonitor, was_skipped
from .records import FOLLOW, SPIKES, RecordFile, SpikeRecord, Verdict, format_spike, read_records

_SIGNALS = ("gradient", "parameter", "update", "promise", "loss", "buffer")
COUNTED = (*_SIGNALS, "drift")  # number of these is logged
_RECORDED = (*SPIKES, "level_shift", "overflow", "drift")
CONFIRM = 5  # optimizer steps within which the loss must spike too, for a spike to be confirmed


class SpikeLog:
    """Records of all spikes, oldest first, in memory and in a file.

    Attributes:
        records: Of all spikes, oldest first.
        counts: Spikes so far, by signal.
        samples_of: If set, names the samples of a record's batches, for its ``samples``.
    """

    samples_of: Callable[[SpikeRecord], list[Any]] | None = None

    def __init__(self) -> None:
        self.records: list[SpikeRecord] = []
        self.counts = dict.fromkeys((*_SIGNALS, "overflow", "level_shift", "drift", "skipped"), 0)
        self.file = RecordFile(None)
        self._last: dict[int, int] = {}  # the last step of each optimizer
        self.begun = False
        self._told = False  # that a loss is not positive

    def open(self, path: Path | None) -> None:
        """Write to a file from now on."""
        self.file = RecordFile(path)
        self.begun = False

    def begin(self) -> None:
        """Let the file hold the records that there are, and none of another training."""
        self.file.begin(self.records)
        self.begun = True

    def resume(self, step: int) -> None:
        """Put the records before ``step`` that the file has in front; forget what comes again."""
        since = self.records[0].step if self.records else step
        earlier = [r for r in read_records(self.file.path) if r.step < since]
        self.records = [*earlier, *self.records]

    def add(self, o: Observation, monitor: OptimizerMonitor) -> None:
        """Take in a judged step, and record it if it is notable."""
        if "loss" in o.judged:
            self._tell_once(o)
            self._follow(o)
        # a step that overflowed was thrown away by the scaler
        if skipped := was_skipped(o) and o.judged["gradient"].kind != "overflow":
            o.reaction = "skip"
            self.counts["skipped"] += 1
        if skipped or any(verdict.kind in _RECORDED for verdict in o.judged.values()):
            self._count(o)
            self._record(monitor.record(o))
        self._last[o.optimizer] = o.step
        monitor.remember_step(o)

    def write(self, since: int, until: int) -> None:
        """Bring the file up to date with the records of these steps and of what they followed."""
        if self.records and self.records[-1].last_step >= since - FOLLOW:
            self.file.write(self.records, until - FOLLOW)

    def _tell_once(self, o: Observation) -> None:
        """Say of a loss that it cannot be watched."""
        loss = o.judged["loss"]
        if loss.kind == "nonpositive" and not self._told:
            self._told = True
            said = f"the loss of step {o.step} is {loss.value:.3g}; only positive are compared."
            warnings.warn(said, stacklevel=2)

    def _record(self, record: SpikeRecord) -> None:
        """Keep a record; steps in a row without a finite value are one."""
        for last in self.records[-1:]:
            goes_on = last.last_step == self._last.get(record.optimizer)
            goes_on = goes_on and last.is_nonfinite and record.is_nonfinite
            one, other = ((r.optimizer, r.spiked, r.reaction) for r in (last, record))
            if goes_on and one == other:
                last.until = record.step
                return
        if self.samples_of:
            record.samples = self.samples_of(record) or None
        self.records.append(record)

    def _count(self, o: Observation) -> None:
        for signal, verdict in o.judged.items():
            kind = verdict.kind
            if kind in _RECORDED:
                self.counts[signal if kind in SPIKES else kind] += 1
            if kind == "level_shift" and signal != "loss":  # a loss that stays high did spike
                self._relabel(o, signal, verdict)

    def _recent(self, o: Observation) -> Iterator[SpikeRecord]:
        """Records of the same optimizer's last steps, latest first."""
        for record in reversed(self.records):
            if o.step - record.last_step > FOLLOW:
                return
            if record.optimizer == o.optimizer and record.spiked:
                yield record

    def _relabel(self, o: Observation, signal: str, shift: Verdict) -> None:
        """Take back spikes that were the first steps at a new level."""
        for record in self._recent(o):
            if signal in record.spiked and o.step - record.step < shift.raised:
                verdict = record.signals[signal]
                if verdict.value <= shift.threshold:  # else it stands out of that one, too
                    record.spiked.remove(signal)
                    verdict.kind = "level_shift"
                    self.counts[signal] -= 1

    def _follow(self, o: Observation) -> None:
        """Write what followed into the records of the last steps."""
        loss = o.judged["loss"]
        value = loss.value if math.isfinite(loss.value) else math.inf  # NaN has no order
        for record in self._recent(o):
            passed = o.step - record.step
            if passed > FOLLOW:
                continue
            worst = record.max_loss_after
            record.max_loss_after = value if worst is None else max(worst, value)
            if loss.kind in SPIKES and passed <= CONFIRM:
                record.confirmed = True
            ordinary = record.signals["loss"].threshold if "loss" in record.signals else math.inf
            if record.steps_to_recover is None and loss.value <= ordinary:
                record.steps_to_recover = passed

    def summary(self, steps: int) -> str:
        """Say what was seen in so many optimizer steps."""
        spikes = [record for record in self.records if record.spiked]
        drifts = [record.step for record in self.records if "drift" in record.kinds]
        grew = f" The loss grew slowly up to step {drifts[0]}." if drifts else ""
        skipped = f", {self.counts['skipped']} steps taken back" if self.counts["skipped"] else ""
        if not spikes:
            return f"No spike in {steps:,} optimizer steps{skipped}.{grew}"
        confirmed = sum(record.confirmed for record in spikes)
        worst = max(spikes, key=lambda record: record.max_loss_after or 0.0)
        where = f", in {self.file.path}" if self.file.path else ""
        return (
            f"{len(spikes)} spike{'s' * (len(spikes) > 1)} in {steps:,} optimizer steps, "
            f"{confirmed} followed by the loss{skipped}{where}; the worst: "
            f"{format_spike(worst)}{grew}"
        )

    def state_dict(self, step: int) -> dict[str, Any]:
        """The counts, and the records that may still change after ``step`` steps."""
        facts = [r.facts() for r in self.records if r.last_step >= step - FOLLOW - 1]
        return {"counts": self.counts, "open": json.dumps(facts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts |= state["counts"]
        self.records = [SpikeRecord.of(facts) for facts in json.loads(state["open"])]
