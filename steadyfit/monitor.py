"""What the steps of a training say together: which spiked, and what followed.

In plain numbers; where they come from, and when they are read from the device, is for the training
loop. Dimensions: P parameters (tensors) of one optimizer.
"""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .detector import SpikeDetector
from .probe import StepProbe
from .records import FOLLOW
from .watch import SPIKES, Numbers, Observation, Watch, shortened, total

SIGNALS = ("gradient", "parameter", "update", "loss")
RECORDED = (*SPIKES, "level_shift", "overflow")
CONFIRM = 5  # optimizer steps within which the loss must spike too, for a spike to be confirmed


class SpikeMonitor:
    """Judges observed steps, and keeps a record of every spike and of what followed.

    Args:
        window: Steps over which a signal's usual level is taken.
        threshold: Robust standard deviations of the logarithm beyond which a value is a spike.
        top_k: Parameters named in a record.

    Attributes:
        optimizers: Those whose steps are observed.
        names: Names of their parameters, by ``id``.
        records: Of all spikes, oldest first.
        counts: Spikes so far, by signal.
        now: Optimizer steps so far.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, window: int = 64, threshold: float = 4.5, top_k: int = 3) -> None:
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}.")
        SpikeDetector(window, threshold)  # refuses what it does not take
        self.window = window
        self.threshold = threshold
        self.top_k = top_k
        self.optimizers: Sequence[Optimizer] = ()
        self.names: dict[int, str] = {}
        self.watches: dict[int, Watch] = {}  # by optimizer
        self.counts = dict.fromkeys((*SIGNALS, "overflow", "level_shift"), 0)
        self.records: list[dict[str, Any]] = []
        self.now = 0
        self._changed = False  # the records, since they were written
        self._last_spike = -math.inf

    def watch(self, index: int) -> Watch:
        """What is known of this optimizer's steps."""
        if index not in self.watches:
            self.watches[index] = Watch(self.window, self.threshold)
        watch = self.watches[index]
        parameters = StepProbe.of(self.optimizers[index]).params
        if len(watch.sizes) != len(parameters):  # at the start, and when parameters were added
            names = [self.names.get(id(p), f"parameter {i}") for i, p in enumerate(parameters)]
            watch.look_at(names, [p.numel() for p in parameters])
        return watch

    @staticmethod
    def read(
        pending: Sequence[Observation], average: Callable[[Tensor], Tensor] | None = None
    ) -> list[Numbers]:
        """The numbers of some steps; the one device read for all of them.

        Args:
            pending: The steps.
            average: Averages a tensor over the processes, if there are several.
        """
        parts = [observation.tensors() for observation in pending]
        table = torch.cat([tensor for part in parts for tensor in part.values()])
        if average:  # gradients are the same everywhere, the loss is not
            table = average(table)
        values, position = table.tolist(), 0
        names = ("loss", "gradient", "scale", "update", "clipped", "factor", "weight")
        read = []
        for part in parts:
            numbers: Numbers = {name: [] for name in names}
            for name, tensor in part.items():
                numbers[name] = values[position : position + len(tensor)]
                position += len(tensor)
            if numbers["scale"]:
                numbers["gradient"] = [norm / numbers["scale"][0] for norm in numbers["gradient"]]
            read.append(numbers)
        return read

    def spikes_before_step(self, observation: Observation, numbers: Numbers) -> bool:
        """Judge gradient and loss of a step that is not yet taken; True if one is a spike."""
        self.watch(observation.optimizer).judge_gradient_and_loss(observation, numbers)
        spiked = any(verdict["kind"] in SPIKES for verdict in observation.judged.values())
        if spiked:
            self._last_spike = observation.step
        return spiked

    def judge(self, observation: Observation, numbers: Numbers) -> dict[str, float]:
        """Judge one step and return what the loggers are told of it."""
        watch, judged = self.watch(observation.optimizer), observation.judged
        if not judged:
            watch.judge_gradient_and_loss(observation, numbers)
        watch.judge_update(observation, numbers)
        if "loss" in judged:
            self._follow(observation, judged["loss"])
        if any(verdict["kind"] in RECORDED for verdict in judged.values()):
            self._count(observation)
            self.records.append(watch.record(observation, numbers, self.top_k))
            self._changed = True
        watch.brief(observation, numbers)
        self.now = observation.step + 1
        return self._row(observation, numbers)

    def _count(self, observation: Observation) -> None:
        for signal, verdict in observation.judged.items():
            kind = verdict["kind"]
            if kind in RECORDED:
                self.counts[signal if kind in SPIKES else kind] += 1
            if kind == "level_shift" and signal != "loss":  # a loss that stays high did spike
                self._relabel(observation, signal, verdict)

    def _relabel(self, observation: Observation, signal: str, shift: dict[str, Any]) -> None:
        """What looked like spikes were the first steps at a new level."""
        for record in self.records:
            passed = observation.step - record["step"]
            same = record["optimizer"] == observation.optimizer and signal in record["spiked"]
            if same and passed < shift["raised"]:
                verdict = record["signals"][signal]
                if verdict["value"] <= shift["threshold"]:  # else it stands out of that one, too
                    record["spiked"].remove(signal)
                    verdict["kind"] = "level_shift"
                    self.counts[signal] -= 1

    def _follow(self, observation: Observation, loss: dict[str, Any]) -> None:
        """Write what followed into the records of the last steps."""
        value = loss["value"] if math.isfinite(loss["value"]) else math.inf  # NaN has no order
        for record in reversed(self.records):
            passed = observation.step - record["step"]
            if passed > FOLLOW:
                break
            if not record["spiked"] or record["optimizer"] != observation.optimizer:
                continue
            self._changed = True
            worst = record["max_loss_after"]
            record["max_loss_after"] = value if worst is None else max(worst, value)
            if loss["kind"] in SPIKES and passed <= CONFIRM:
                record["confirmed"] = True
            ordinary = record["signals"].get("loss", {}).get("threshold", math.inf)
            if record["steps_to_recover"] is None and loss["value"] <= ordinary:
                record["steps_to_recover"] = passed

    def remember(self, pending: list[Observation], numbers: list[Numbers]) -> None:
        """Put the norms of each parameter into the histories."""
        for index in {observation.optimizer for observation in pending}:
            steps, rows = [], []
            for observation, read in zip(pending, numbers, strict=True):
                if observation.optimizer == index:
                    none = [0.0] * len(read["gradient"])
                    steps.append(observation.step)
                    rows.append([read["gradient"], shortened(read) or none, read["weight"] or none])
            self.watches[index].history.add(steps, rows)

    def _row(self, observation: Observation, numbers: Numbers) -> dict[str, float]:
        gradient, update = (observation.judged.get(s) for s in ("gradient", "update"))
        assert gradient is not None
        row = {"grad_norm/total": gradient["value"]}
        # there is no threshold while a detector warms up
        if gradient.get("threshold", math.inf) < math.inf:
            row["grad_norm/threshold"] = gradient["threshold"]
        if numbers["clipped"]:
            row["grad_norm/clipped"] = total(numbers["clipped"])
        if update:
            row["update_norm/total"] = update["value"]
            if update["threshold"] < math.inf:
                row["update_norm/threshold"] = update["threshold"]
        if numbers["factor"]:
            row["update_norm/clipped"] = total(shortened(numbers))
        for signal in SIGNALS:
            row[f"spikes/{signal}"] = float(self.counts[signal])
        if len(self.optimizers) == 1:
            return row
        return {f"{name}/{observation.optimizer}": value for name, value in row.items()}

    def state_dict(self) -> dict[str, Any]:
        """What was learned from the run, and the records that may still change."""
        open_since = (self.now if self.watches else 0) - FOLLOW - 1
        return {
            "watches": {str(i): watch.state_dict() for i, watch in self.watches.items()},
            "counts": self.counts,
            "open": json.dumps([r for r in self.records if r["step"] >= open_since]),
            "last_spike": self._last_spike,
            "now": self.now,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, watch in state["watches"].items():
            self.watches[int(key)] = Watch(self.window, self.threshold)
            self.watches[int(key)].load_state_dict(watch)
        self.counts = dict(state["counts"])
        self.records = json.loads(state["open"])
        self._last_spike = state["last_spike"]
        self.now = state.get("now", 0)  # callbacks of Lightning learn it from the trainer
