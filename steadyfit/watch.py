"""What is known about the steps of one optimizer, in plain numbers.

Dimensions: P parameters (tensors) of the optimizer.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .detector import NORMAL_Q90, SHIFT_AFTER, SpikeDetector
from .probe import Update

SPIKES = ("spike", "nonfinite")
LOSS_RATIO = 2.0  # a loss is a spike only above this multiple of its usual level
BEFORE = 10  # optimizer steps in which the largest update is looked for

Numbers = dict[str, list[float]]  # what was read of one step, by name; empty where there was none


@dataclass
class Observation:
    """One optimizer step, as far as it is known without reading the device."""

    step: int
    epoch: int
    batches: list[int]  # indices in the epoch; several when gradients are accumulated
    optimizer: int
    lrs: list[float | Tensor]  # of the parameter groups
    losses: list[Tensor]
    gradient: Tensor  # norms (P,)
    scale: Tensor | None  # (), if a gradient scaler leaves it to the optimizer to unscale
    scaled: bool  # a gradient scaler watches over this step
    update: Update
    weight: Tensor | None  # norms (P,), now and then
    judged: dict[str, dict[str, Any]] = field(default_factory=dict)  # by signal
    reaction: str = "log"

    def tensors(self) -> dict[str, Tensor]:
        """All that is to be read, one-dimensional, by the names of ``Numbers``."""
        found = {
            "gradient": self.gradient,
            "loss": mean(self.losses)[None] if self.losses else None,
            "scale": None if self.scale is None else self.scale[None],
            "update": self.update.norms,
            "clipped": self.update.grad_norms,
            "factor": self.update.factors,
            "weight": self.weight,
        }
        return {name: tensor for name, tensor in found.items() if tensor is not None}


class NormHistory:
    """The largest norms of each parameter in at most ``bins`` equal stretches of training.

    Args:
        names: The parameters (P).
        bins: When so many stretches are full, each two become one.
    """

    KINDS = ("gradient", "update", "weight")

    def __init__(self, names: list[str], bins: int = 512) -> None:
        self.names = names
        self.bins = bins
        self.width = 1  # optimizer steps in a stretch
        self.table = torch.zeros(0, len(self.KINDS), len(names))

    def grow(self, names: list[str]) -> None:
        """Take in more parameters, named behind the ones there are."""
        self.table = nn.functional.pad(self.table, (0, len(names) - len(self.names)))
        self.names = names

    def add(self, steps: list[int], norms: list[list[list[float]]]) -> None:
        """Take in the norms of some steps, for each a list (P,) for each of ``KINDS``."""
        while steps[-1] // self.width >= self.bins:
            self._extend(len(self.table) + len(self.table) % 2)
            self.table = self.table.unflatten(0, (-1, 2)).amax(1)
            self.width *= 2
        self._extend(steps[-1] // self.width + 1)
        stretches = torch.tensor(steps) // self.width
        rows = torch.tensor(norms).nan_to_num(nan=math.inf, posinf=math.inf)
        self.table.scatter_reduce_(0, stretches[:, None, None].expand_as(rows), rows, "amax")

    def _extend(self, length: int) -> None:
        missing = self.table.new_zeros(max(0, length - len(self.table)), *self.table.shape[1:])
        self.table = torch.cat([self.table, missing])

    def state_dict(self) -> dict[str, Any]:
        return {"names": self.names, "width": self.width, "table": self.table}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.names, self.width, self.table = state["names"], state["width"], state["table"]


class ParameterRatios:
    """Finds the parameter whose gradient is out of proportion to that of all the others.

    The logarithm of this ratio is compared with its last values by median and spread. What makes
    all gradients larger leaves it alone, so it is far less noisy than a norm, and a parameter that
    holds little of the whole norm is seen as well.

    Args:
        window: Ordinary steps that are remembered; every ``REFRESH`` of them are looked at anew.
        limit: Robust standard deviations of the logarithm beyond which a ratio is a spike.
    """

    REFRESH = 16
    MIN_SCALE = 0.1
    FLOOR = 1e-6  # of a ratio; a gradient of exactly zero has no logarithm

    def __init__(self, window: int, limit: float) -> None:
        self.window = window
        self.limit = limit
        self.logs: list[list[float]] = []  # of the last ordinary steps, each (P,)
        self.usual: list[tuple[float, float]] = []  # median and spread of each parameter
        self.fresh = 0  # ordinary steps since `usual` was taken
        self.raised = 0  # steps in a row with a spike

    def update(self, gradient: list[float]) -> list[float]:
        """Scores of the parameters (P,) from their norms; zeros until there is a usual ratio."""
        logs = self._log_ratios(gradient)
        if self.logs and len(self.logs[-1]) != len(logs):  # parameters were added
            self.forget()
        scores = [(x - m) / s for x, (m, s) in zip(logs, self.usual, strict=bool(self.usual))]
        if max(scores, default=0.0) > self.limit:
            self.raised += 1
            if self.raised >= SHIFT_AFTER:  # it is no spike but the new proportion
                self.forget()
            return scores
        self.raised = 0
        self.logs.append(logs)
        del self.logs[: -self.window]
        self.fresh += 1
        if self.fresh >= self.REFRESH:
            self.fresh = 0
            self.usual = [
                self._median_and_spread(column) for column in zip(*self.logs, strict=True)
            ]
        return scores or [0.0] * len(logs)

    def forget(self) -> None:
        """Begin anew."""
        self.logs, self.usual, self.fresh, self.raised = [], [], 0, 0

    def _log_ratios(self, gradient: list[float]) -> list[float]:
        squares = [g * g for g in gradient]
        whole = sum(squares)
        others = [math.sqrt(max(whole - square, 0.0)) for square in squares]
        floor, ceiling = self.FLOOR, 1 / self.FLOOR
        return [
            math.log(min(max(g / other, floor), ceiling)) if other else 0.0
            for g, other in zip(gradient, others, strict=True)
        ]

    def _median_and_spread(self, values: Iterable[float]) -> tuple[float, float]:
        ordered = sorted(values)
        median, high = ordered[len(ordered) // 2], ordered[int(0.9 * len(ordered))]
        low = ordered[int(0.1 * len(ordered))]
        return median, max(
            (high - median) / NORMAL_Q90, (median - low) / NORMAL_Q90, self.MIN_SCALE
        )


class Watch:
    """Judges the steps of one optimizer, in plain numbers, and says what is known of a spike.

    Args:
        window: Steps over which a signal's usual level is taken.
        threshold: Robust standard deviations beyond which a value is a spike.
    """

    def __init__(self, window: int, threshold: float) -> None:
        self.names: list[str] = []
        self.sizes: list[int] = []
        self.detectors = {
            "gradient": SpikeDetector(window, threshold),
            "update": SpikeDetector(window, threshold),
            # the loss does not scatter as norms do, and it has to double as well
            "loss": SpikeDetector(window, threshold * 2 / 3),
        }
        # one of many parameters goes further astray by chance than one signal
        self.ratios = ParameterRatios(window, limit=threshold * 4 / 3)
        self.scores: list[float] = []  # of the parameters in the last step
        self.history = NormHistory([])
        self.before: list[dict[str, Any]] = []  # the last steps in brief
        self.lr: float | None = None

    def look_at(self, names: list[str], sizes: list[int]) -> None:
        """Take these parameters (P) from now on; what was there keeps its place."""
        self.names, self.sizes = names, sizes
        self.history.grow(names)

    def judge_gradient_and_loss(self, observation: Observation, numbers: Numbers) -> None:
        """Judge what is known before the step is taken."""
        self._notice_rate(float(max(observation.lrs)))
        gradient, judged = numbers["gradient"], observation.judged
        norm = total(gradient)
        if observation.scaled and not math.isfinite(norm):
            # the scaler throws this step away: no spike, and never in the statistics
            judged["gradient"] = {"value": norm, "kind": "overflow"}
        else:
            judged["gradient"] = self._judge("gradient", norm)
            if math.isfinite(norm) and len(gradient) > 1:
                judged["parameter"] = self._judge_parameters(gradient)
        if numbers["loss"] and judged["gradient"]["kind"] != "overflow":
            loss = judged["loss"] = self._judge("loss", numbers["loss"][0])
            if loss["kind"] == "spike" and loss["value"] <= LOSS_RATIO * loss["center"]:
                loss["kind"] = "warning"

    def judge_update(self, observation: Observation, numbers: Numbers) -> None:
        if numbers["update"] and observation.judged["gradient"]["kind"] != "overflow":
            observation.judged["update"] = self._judge("update", total(numbers["update"]))

    def _notice_rate(self, lr: float) -> None:
        """A jump of the learning rate is no spike of what follows from it."""
        if self.lr is not None and lr != self.lr and not 2 * self.lr < 3 * lr < 4.5 * self.lr:
            for detector in self.detectors.values():
                detector.rate_changed()
        self.lr = lr

    def _judge(self, signal: str, value: float) -> dict[str, Any]:
        detector = self.detectors[signal]
        detector.update(value)
        return {
            "value": value,
            "kind": detector.kind,
            "z": detector.score,
            "threshold": detector.threshold,
            "center": detector.center,
            "scale": detector.scale,
            "raised": detector.raised,
        }

    def _judge_parameters(self, gradient: list[float]) -> dict[str, Any]:
        self.scores = self.ratios.update(gradient)
        first = max(range(len(gradient)), key=self.scores.__getitem__)
        return {
            "value": gradient[first],
            "kind": "spike" if self.scores[first] > self.ratios.limit else "normal",
            "z": self.scores[first],
            "name": self.names[first],
        }

    def brief(self, observation: Observation, numbers: Numbers) -> None:
        """Remember the step as the cause of what may come after it."""
        gradient = numbers["gradient"]
        self.before.append(
            {
                "step": observation.step,
                "batches": observation.batches,
                "grad_norm": observation.judged["gradient"]["value"],
                "update_norm": total(shortened(numbers)),
                "update_z": observation.judged.get("update", {}).get("z", 0.0),
                "parameter": self.names[max(range(len(gradient)), key=gradient.__getitem__)],
            }
        )
        del self.before[:-BEFORE]

    def record(self, observation: Observation, numbers: Numbers, top_k: int) -> dict[str, Any]:
        """The evidence about one step."""
        gradient, update = numbers["gradient"], numbers["update"]
        squares = [g * g if math.isfinite(g) else math.inf for g in gradient]
        whole = sum(squares)
        scores = self.scores if "parameter" in observation.judged else [0.0] * len(gradient)
        spiked = [s for s, verdict in observation.judged.items() if verdict["kind"] in SPIKES]

        def describe(i: int) -> dict[str, Any]:
            share = 1.0 if squares[i] == math.inf else squares[i] / whole if whole else 0.0
            facts = {"name": self.names[i], "grad_norm": gradient[i], "share": share}
            facts["z"] = math.inf if squares[i] == math.inf else scores[i]
            if update:
                facts["update_norm"] = update[i]
                facts["update_rms"] = update[i] / math.sqrt(self.sizes[i])
            return facts

        def largest(by: list[float]) -> list[dict[str, Any]]:
            return [describe(i) for i in sorted(range(len(by)), key=lambda i: -by[i])[:top_k]]

        return {
            "step": observation.step,
            "epoch": observation.epoch,
            "batches": observation.batches,
            "optimizer": observation.optimizer,
            "lr": float(max(observation.lrs)),
            "spiked": spiked,
            "signals": observation.judged,
            "clipped_grad_norm": total(numbers["clipped"]) if numbers["clipped"] else None,
            "update_factor": min(numbers["factor"]) if numbers["factor"] else None,
            "by_share": largest(squares),
            "by_z": largest(
                [d if math.isfinite(g) else math.inf for d, g in zip(scores, gradient, strict=True)]
            ),
            "before": max(self.before, key=out_of_range, default=None),
            "reaction": observation.reaction,
            "confirmed": "loss" in spiked,
            "max_loss_after": None,
            "steps_to_recover": None,
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "detectors": {signal: d.state_dict() for signal, d in self.detectors.items()},
            "logs": self.ratios.logs,
            "usual": [list(pair) for pair in self.ratios.usual],
            "fresh": self.ratios.fresh,
            "raised": self.ratios.raised,
            "history": self.history.state_dict(),
            "before": json.dumps(self.before),
            "lr": self.lr,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for signal, detector in self.detectors.items():
            detector.load_state_dict(state["detectors"][signal])
        self.ratios.logs = [list(row) for row in state["logs"]]
        self.ratios.usual = [(median, spread) for median, spread in state["usual"]]
        self.ratios.fresh, self.ratios.raised = state["fresh"], state["raised"]
        self.history.load_state_dict(state["history"])
        self.names = self.history.names
        self.before = json.loads(state["before"])
        self.lr = state["lr"]


def mean(losses: list[Tensor]) -> Tensor:
    return torch.stack(losses).mean() if len(losses) > 1 else losses[0]


def total(norms: Iterable[float]) -> float:
    """The norm of the whole from the norms of its parts."""
    return math.sqrt(sum(norm * norm for norm in norms))


def shortened(numbers: Numbers) -> list[float]:
    """Norms (P,) of the update as it was applied."""
    update, factor = numbers["update"], numbers["factor"]
    return [n * f for n, f in zip(update, factor, strict=True)] if factor else update


def out_of_range(step: Mapping[str, Any]) -> tuple[float, float]:
    """How far the update of a step was out of the ordinary, then how large it was."""
    return step["update_z"], step["update_norm"]
