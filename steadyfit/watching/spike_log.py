"""The records of a training's spikes: what is counted, and what followed."""

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .observation import SPIKES, Observation, Verdict
from .optimizer_monitor import OptimizerMonitor, was_skipped
from .records import FOLLOW, RecordFile, format_spike, last_step, read_records

SIGNALS = ("gradient", "parameter", "update", "promise", "loss", "buffer")
COUNTED = (*SIGNALS, "drift")  # what loggers are told the number of
RECORDED = (*SPIKES, "level_shift", "overflow", "drift")
CONFIRM = 5  # optimizer steps within which the loss must spike too, for a spike to be confirmed


class SpikeLog:
    """Records of all spikes, oldest first, in memory and in a file.

    Attributes:
        records: Of all spikes, oldest first.
        counts: Spikes so far, by signal.
        samples_of: If set, names the samples of a record's batches, for its ``samples``.
    """

    samples_of: Callable[[Mapping[str, Any]], list[Any]] | None = None

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.counts = dict.fromkeys((*SIGNALS, "overflow", "level_shift", "drift", "skipped"), 0)
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
        since = self.records[0]["step"] if self.records else step
        earlier = [r for r in read_records(self.file.path) if r["step"] < since]
        self.records = [*earlier, *self.records]

    def add(self, o: Observation, monitor: OptimizerMonitor, top_k: int) -> None:
        """Take in a judged step, and record it if it is notable."""
        if "loss" in o.judged:
            self._tell_once(o)
            self._follow(o)
        # a step that overflowed was thrown away by the scaler
        if skipped := was_skipped(o) and o.judged["gradient"].kind != "overflow":
            o.reaction = "skip"
            self.counts["skipped"] += 1
        if skipped or any(verdict.kind in RECORDED for verdict in o.judged.values()):
            self._count(o)
            self._record(monitor.record(o, top_k))
        self._last[o.optimizer] = o.step
        monitor.remember_step(o)

    def write(self, since: int, until: int) -> None:
        """Bring the file up to date with the records of these steps and of what they followed."""
        if self.records and last_step(self.records[-1]) >= since - FOLLOW:
            self.file.write(self.records, until - FOLLOW)

    def _tell_once(self, o: Observation) -> None:
        """Say of a loss that it cannot be watched."""
        loss = o.judged["loss"]
        if loss.kind == "nonpositive" and not self._told:
            self._told = True
            said = (
                f"the loss of step {o.step} is {loss.value:.3g}; only positive ones are compared."
            )
            warnings.warn(said, stacklevel=2)

    def _record(self, record: dict[str, Any]) -> None:
        """Keep a record; steps in a row without a finite value are one."""
        same = ("optimizer", "spiked", "reaction")
        for last in self.records[-1:]:
            goes_on = last_step(last) == self._last.get(record["optimizer"])
            goes_on = goes_on and broken(last) and broken(record)
            if goes_on and all(last[key] == record[key] for key in same):
                last["until"] = record["step"]
                return
        if self.samples_of and (samples := self.samples_of(record)):
            record["samples"] = samples
        self.records.append(record)

    def _count(self, o: Observation) -> None:
        for signal, verdict in o.judged.items():
            kind = verdict.kind
            if kind in RECORDED:
                self.counts[signal if kind in SPIKES else kind] += 1
            if kind == "level_shift" and signal != "loss":  # a loss that stays high did spike
                self._relabel(o, signal, verdict)

    def _recent(self, o: Observation) -> Iterator[dict[str, Any]]:
        """Records of the same optimizer's last steps, latest first."""
        for record in reversed(self.records):
            if o.step - last_step(record) > FOLLOW:
                return
            if record["optimizer"] == o.optimizer and record["spiked"]:
                yield record

    def _relabel(self, o: Observation, signal: str, shift: Verdict) -> None:
        """What looked like spikes were the first steps at a new level."""
        for record in self._recent(o):
            if signal in record["spiked"] and o.step - record["step"] < shift.raised:
                verdict = record["signals"][signal]
                if verdict["value"] <= shift.threshold:  # else it stands out of that one, too
                    record["spiked"].remove(signal)
                    verdict["kind"] = "level_shift"
                    self.counts[signal] -= 1

    def _follow(self, o: Observation) -> None:
        """Write what followed into the records of the last steps."""
        loss = o.judged["loss"]
        value = loss.value if math.isfinite(loss.value) else math.inf  # NaN has no order
        for record in self._recent(o):
            passed = o.step - record["step"]
            if passed > FOLLOW:
                continue
            worst = record["max_loss_after"]
            record["max_loss_after"] = value if worst is None else max(worst, value)
            if loss.kind in SPIKES and passed <= CONFIRM:
                record["confirmed"] = True
            ordinary = record["signals"].get("loss", {}).get("threshold", math.inf)
            if record["steps_to_recover"] is None and loss.value <= ordinary:
                record["steps_to_recover"] = passed

    def summary(self, steps: int) -> str:
        """What was seen in so many optimizer steps, in words."""
        spikes = [record for record in self.records if record["spiked"]]
        drifts = [r["step"] for r in self.records if "drift" in kinds_of(r)]
        grew = f" The loss grew slowly up to step {drifts[0]}." if drifts else ""
        skipped = f", {self.counts['skipped']} steps taken back" if self.counts["skipped"] else ""
        if not spikes:
            return f"No spike in {steps:,} optimizer steps{skipped}.{grew}"
        confirmed = sum(record["confirmed"] for record in spikes)
        worst = max(spikes, key=lambda record: record["max_loss_after"] or 0.0)
        where = f", in {self.file.path}" if self.file.path else ""
        return (
            f"{len(spikes)} spike{'s' * (len(spikes) > 1)} in {steps:,} optimizer steps, "
            f"{confirmed} followed by the loss{skipped}{where}; the worst: "
            f"{format_spike(worst)}{grew}"
        )

    def state_dict(self, step: int) -> dict[str, Any]:
        """The counts, and the records that may still change after ``step`` steps."""
        open_since = step - FOLLOW - 1
        records = [r for r in self.records if last_step(r) >= open_since]
        return {"counts": self.counts, "open": json.dumps(records)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts |= state["counts"]
        self.records = json.loads(state["open"])


def broken(record: Mapping[str, Any]) -> bool:
    """Whether nothing but values that are not finite makes this a spike."""
    return {record["signals"][signal]["kind"] for signal in record["spiked"]} == {"nonfinite"}


def kinds_of(record: Mapping[str, Any]) -> set[str]:
    """How the signals of a step were judged."""
    return {verdict["kind"] for verdict in record["signals"].values()}
