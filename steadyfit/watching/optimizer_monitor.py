"""Usual levels of the steps of one optimizer, in plain numbers.

Dimensions: K steps, P parameters (tensors) of the optimizer.
"""

import json
import math
from collections import deque
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from operator import is_
from typing import Any

import numpy as np
from torch import Tensor

from ..detector import NORM_MIN_SCALE, DriftDetector, SpikeDetector
from .history import NormHistory
from .observation import AFTER_STEP, Observation
from .ratios import ParameterRatios
from .records import SPIKES, EarlierStep, ParameterEvidence, SpikeRecord, Verdict

_PROMISE = 5.0  # times its loss that a step may promise to take off it,
_PROMISE_RATIO = 30.0  # or this multiple of what its steps usually promise
TOP_K = 3  # parameters named in a record
_BEFORE = 10  # optimizer steps in which the largest update is looked for


class OptimizerMonitor:
    """Judge the steps of one optimizer, and say what is known of a spike.

    Args:
        window: Steps over which a signal's usual level is taken.
        threshold: Robust standard deviations beyond which a value is a spike.
    """

    def __init__(self, window: int, threshold: float) -> None:
        self.names: list[str] = []
        self.params: Sequence[Tensor] = ()  # as the probe lists them
        self.used: set[int] = set()  # those that have had a gradient
        self._active: list[int] = []  # in the last step
        self.begun = False  # whether there was one
        self._norm_detector = partial(SpikeDetector, window, threshold, NORM_MIN_SCALE)
        self.detectors = {
            "gradient": self._norm_detector(),
            "update": self._norm_detector(),
            "loss": SpikeDetector(window, threshold),
            "promise": self._norm_detector(),  # of the usual level alone
            "buffer": self._norm_detector(),
        }
        self.drift = DriftDetector()  # of the loss
        # one of many parameters goes further astray by chance than one signal
        self.ratios = ParameterRatios(window, limit=threshold * 4 / 3)
        self.history = NormHistory([])
        self.before: deque[EarlierStep] = deque(maxlen=_BEFORE)
        self.lr: float | None = None
        self.buffers: np.ndarray | None = None  # norms (Q,) in the last step
        self._last_buffers: np.ndarray | None = None  # and in the one before

    def set_parameters(self, names: list[str], params: Sequence[Tensor]) -> None:
        """Take these parameters (P) from now on; what others have taught is forgotten."""
        is_other = names[: len(self.names)] != self.names
        if is_other:
            self.history = NormHistory([])
        if is_other or not all(map(is_, self.params, params)):
            self.ratios = ParameterRatios(self.ratios.window, self.ratios.limit)
            self.used = set()
        self.names, self.params = names, params
        self.history.grow(names)
        self.ratios.grow(len(names))

    def learned(self) -> Any:
        """Copy of what is usual by now, for :meth:`unlearn`."""
        return deepcopy((self.names, self.detectors, self.ratios))

    def unlearn(self, learned: Any) -> None:
        """Go by what was usual then."""
        names, self.detectors, ratios = learned
        if self.names[: len(names)] == names:  # else there are other parameters by now
            self.ratios = ratios
            ratios.grow(len(self.names))

    def is_new(self, active: list[int]) -> bool:
        """Tell if some parameters take part for the first time, as those of a layer just thawed."""
        if active is self._active:
            return False
        new, begun = set(active) - self.used, self.begun
        self._active, self.used, self.begun = active, self.used | new, True
        return begun and bool(new)

    def judge(self, steps: Sequence[Observation], buffer_names: Sequence[str] = ()) -> None:
        """Judge what has been read of some steps and not been judged yet."""
        before = [o for o in steps if "gradient" not in o.judged]
        if before:
            self._judge_before(before, buffer_names)
        for o in steps:
            taken = o.judged["gradient"].kind != "overflow" and not o.left_out
            if "update" not in o.judged:
                self._expect(o, AFTER_STEP)
            if taken and "update" in o.numbers and "update" not in o.judged:
                value = _norm(o.numbers["update"])
                o.judged["update"] = Verdict.of(self.detectors["update"], value)
                if "products" in o.numbers and "loss" in o.numbers:
                    self._judge_promise(o)

    def _judge_promise(self, o: Observation) -> None:
        """Judge by how many times its loss a step promises to lower it."""
        if (loss := float(o.numbers["loss"][0])) > 0:
            value = float(o.numbers["products"].sum()) / loss
            verdict = Verdict.of(self.detectors["promise"], value)
            verdict.threshold = self._promise_limit()
            verdict.kind = "spike" if value > verdict.threshold else "normal"  # NaN: the gradient's
            o.judged["promise"] = verdict

    def limits(self) -> dict[str, float]:
        """The largest value of each signal that is no spike; what comes too often is none."""
        found = {n: math.inf if d.too_often else d.threshold for n, d in self.detectors.items()}
        return found | {"promise": self._promise_limit()}

    def _promise_limit(self) -> float:
        """The most that a step may promise; infinite until it is known what is usual."""
        usual = self.detectors["promise"]
        warm = usual.threshold < math.inf
        return max(_PROMISE, _PROMISE_RATIO * usual.center) if warm else math.inf

    def _judge_before(self, steps: Sequence[Observation], buffer_names: Sequence[str]) -> None:
        """Judge what is known before a step is taken."""
        gradients = np.stack([o.numbers["gradient"] for o in steps])  # (K, P)
        totals = np.sqrt(np.square(gradients).sum(1)).tolist()
        scores, spikes = self.ratios.update(gradients)
        first = scores.argmax(1).tolist()
        spiked = np.asarray(spikes.any(1)).tolist()
        for k, o in enumerate(steps):
            rate, last, self.lr = float(max(o.lrs)), self.lr, float(max(o.lrs))
            o.rate_jumps = last not in (None, rate) and not 2 * last < 3 * rate < 4.5 * last
            self._expect(o, ("gradient", "loss", "buffer"))
            if o.scaled and not math.isfinite(totals[k]):
                # the scaler throws this step away: no spike, and never in the statistics
                o.judged["gradient"] = Verdict(totals[k], "overflow")
                continue
            o.judged["gradient"] = Verdict.of(self.detectors["gradient"], totals[k])
            o.scores = scores[k]
            p = first[k]
            kind = "spike" if spiked[k] else "normal"
            o.judged["parameter"] = Verdict(
                float(gradients[k, p]), kind, float(scores[k, p]), name=self.names[p]
            )
            if "loss" in o.numbers:
                value = float(o.numbers["loss"][0])
                verdict = Verdict.of(self.detectors["loss"], value)
                if self.drift.update(value) and verdict.kind not in SPIKES:
                    verdict.kind = "drift"
                o.judged["loss"] = verdict
            if "buffers" in o.numbers:
                self._judge_buffers(o, buffer_names)

    def _judge_buffers(self, o: Observation, names: Sequence[str]) -> None:
        """Judge by which factor the norm of a buffer has grown, that of the one that grew most."""
        norms, last = o.numbers["buffers"], self.buffers
        if not was_skipped(o):
            self.buffers, self._last_buffers = norms, last
        if last is None or not len(last) == len(norms) == len(names):
            return
        with np.errstate(divide="ignore", invalid="ignore"):
            growth = np.where(last > 0, norms / last, 1.0)
        growth = np.where(np.isfinite(norms), growth, np.inf)
        growth = np.where(np.isfinite(last), growth, 1.0)  # a mask may be infinite
        most = int(growth.argmax())
        o.judged["buffer"] = Verdict.of(self.detectors["buffer"], float(growth[most]))
        o.judged["buffer"].name = names[most]

    def forget_buffers(self) -> None:
        """The buffers are what they were before the last step."""
        self.buffers = self._last_buffers

    def _expect(self, o: Observation, signals: Sequence[str]) -> None:
        """Another level of signals is no spike if the rate has jumped or there are new gradients.

        It is said when their values of this step are next: those of a block are judged together.
        """
        for name in signals:
            if o.rate_jumps:
                self.detectors[name].rate_changed()
            if o.is_new and name in ("gradient", *AFTER_STEP):
                self.detectors[name] = self._norm_detector()

    def remember(self, steps: Sequence[Observation]) -> None:
        """Put the norms of each parameter into the history."""
        table = np.zeros((len(steps), len(NormHistory.KINDS), len(self.names)))
        for k, o in enumerate(steps):
            table[k, 0] = o.numbers["gradient"]
            table[k, 1] = _applied_update_norms(o)
            if "weight" in o.numbers:
                table[k, 2] = o.numbers["weight"]
        self.history.add([o.step for o in steps], table)

    def remember_step(self, o: Observation) -> None:
        """Remember the step as the cause of what may come after it."""
        gradient = o.judged["gradient"].value
        update = o.judged["update"].z if "update" in o.judged else 0.0
        largest = self.names[int(o.numbers["gradient"].argmax())]
        applied = _norm(_applied_update_norms(o))
        self.before.append(EarlierStep(o.step, o.batches, gradient, applied, update, largest))

    def record(self, o: Observation) -> SpikeRecord:
        """Collect the evidence about one step."""
        gradient, update = o.numbers["gradient"], o.numbers.get("update")
        finite = np.isfinite(gradient)
        squares = np.where(finite, np.square(gradient), np.inf)
        whole = squares.sum()
        scores = np.zeros(len(gradient)) if o.scores is None else o.scores
        scores = np.where(finite, scores, np.inf)
        spiked = [signal for signal in o.judged if o.spiked(signal)]

        def describe(i: int) -> ParameterEvidence:
            share = squares[i] / whole if 0 < whole < math.inf else not finite[i]
            found = ParameterEvidence(
                self.names[i], float(gradient[i]), float(share), float(scores[i])
            )
            if update is not None:
                found.update_norm = float(update[i])
                found.update_rms = found.update_norm / math.sqrt(max(1, self.params[i].numel()))
            return found

        def largest(by: np.ndarray) -> list[ParameterEvidence]:
            return [describe(i) for i in np.argsort(-by, kind="stable")[:TOP_K].tolist()]

        return SpikeRecord(
            step=o.step,
            epoch=o.epoch,
            batches=o.batches,
            optimizer=o.optimizer,
            lr=float(max(o.lrs)),
            spiked=spiked,
            signals=o.judged,
            clipped_grad_norm=_norm(o.numbers["clipped"]) if "clipped" in o.numbers else None,
            update_factor=float(o.numbers["factor"].min()) if "factor" in o.numbers else None,
            by_share=largest(squares),
            by_z=largest(scores),
            before=max(self.before, key=lambda step: step.severity, default=None),
            reaction=o.reaction,
            confirmed="loss" in spiked,
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "detectors": {signal: d.state_dict() for signal, d in self.detectors.items()},
            "drift": self.drift.state_dict(),
            "ratios": self.ratios.state_dict(),
            "history": self.history.state_dict(),
            "before": json.dumps([asdict(step) for step in self.before]),
            "lr": self.lr,
            "used": sorted(self.used),
            "buffers": None if self.buffers is None else self.buffers.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`.

        An earlier version knew less: of its states the norms alone are taken, the rest is learned
        anew.
        """
        self.history.load_state_dict(state["history"])
        self.names = self.history.names
        self.ratios.grow(len(self.names))
        self.begun = True
        self.used = set(state.get("used", range(len(self.names))))
        if not state.keys() >= self.state_dict().keys():
            return
        for signal, detector in self.detectors.items():
            detector.load_state_dict(state["detectors"][signal])
        self.drift.load_state_dict(state["drift"])
        self.ratios.load_state_dict(state["ratios"])
        self.before.extend(EarlierStep(**facts) for facts in json.loads(state["before"]))
        self.lr = state["lr"]
        self.buffers = None if state["buffers"] is None else np.array(state["buffers"])


def _norm(norms: np.ndarray) -> float:
    """The norm of the whole from the norms of its parts."""
    return math.sqrt(np.square(norms).sum())


def _applied_update_norms(o: Observation) -> np.ndarray:
    """Norms (P,) of the update as it was applied; zeros if the step was not taken."""
    if "update" not in o.numbers or was_skipped(o):
        return np.zeros_like(o.numbers["gradient"])
    update = o.numbers["update"]
    return update * o.numbers["factor"] if "factor" in o.numbers else update


def was_skipped(o: Observation) -> bool:
    return "skipped" in o.numbers and bool(o.numbers["skipped"].any())


def row_of(o: Observation, several: bool) -> dict[str, float]:
    """Values of a judged step for the loggers, named by its optimizer if there are several."""
    gradient, update = o.judged["gradient"], o.judged.get("update")
    row = {"grad_norm/total": gradient.value}
    # there is no threshold while a detector warms up
    if gradient.threshold < math.inf:
        row["grad_norm/threshold"] = gradient.threshold
    if "clipped" in o.numbers:
        row["grad_norm/clipped"] = _norm(o.numbers["clipped"])
    if update:
        row["update_norm/total"] = 0.0 if was_skipped(o) else update.value
        if update.threshold < math.inf:
            row["update_norm/threshold"] = update.threshold
    if "promise" in o.judged:
        row["update_norm/promise"] = o.judged["promise"].value
    if "factor" in o.numbers:
        row["update_norm/clipped"] = _norm(_applied_update_norms(o))
    return {f"{name}/{o.optimizer}": value for name, value in row.items()} if several else row
