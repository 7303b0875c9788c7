"""What is usual for the steps of one optimizer, in plain numbers.

Dimensions: K steps, P parameters (tensors) of the optimizer.
"""

import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
from operator import is_
from typing import Any

import numpy as np
from torch import Tensor

from ..detector import NORM_MIN_SCALE, DriftDetector, SpikeDetector
from .history import NormHistory
from .observation import BEHIND, SPIKES, Observation, Verdict
from .ratios import ParameterRatios

PROMISE = 5.0  # times its loss that a step may promise to take off it,
PROMISE_RATIO = 30.0  # or this multiple of what its steps usually promise
BEFORE = 10  # optimizer steps in which the largest update is looked for


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
        self.before: deque[dict[str, Any]] = deque(maxlen=BEFORE)  # the last steps in brief
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
        """What is usual by now, for :meth:`unlearn`."""
        return deepcopy((self.names, self.detectors, self.ratios))

    def unlearn(self, learned: Any) -> None:
        """Go by what was usual then."""
        names, self.detectors, ratios = learned
        if self.names[: len(names)] == names:  # else there are other parameters by now
            self.ratios = ratios
            ratios.grow(len(self.names))

    def is_new(self, active: list[int]) -> bool:
        """Whether some parameters take part for the first time, as those of a layer just thawed."""
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
                self._expect(o, BEHIND)
            if taken and "update" in o.numbers and "update" not in o.judged:
                value = norm(o.numbers["update"])
                o.judged["update"] = Verdict.of(self.detectors["update"], value)
                if "products" in o.numbers and "loss" in o.numbers:
                    self._judge_promise(o)

    def _judge_promise(self, o: Observation) -> None:
        """Judge by how many times its loss a step promises to lower it."""
        if (loss := float(o.numbers["loss"][0])) > 0:
            value = float(o.numbers["products"].sum()) / loss
            verdict = Verdict.of(self.detectors["promise"], value)
            threshold = self.promise_limit()
            kind = "spike" if value > threshold else "normal"  # a NaN is the gradient's
            o.judged["promise"] = verdict._replace(kind=kind, threshold=threshold)

    def limits(self) -> dict[str, float]:
        """The largest value of each signal that is no spike; what comes too often is none."""
        found = {n: math.inf if d.too_often else d.threshold for n, d in self.detectors.items()}
        return found | {"promise": self.promise_limit()}

    def promise_limit(self) -> float:
        """What a step may promise; infinite until it is known what is usual."""
        usual = self.detectors["promise"]
        warm = usual.threshold < math.inf
        return max(PROMISE, PROMISE_RATIO * usual.center) if warm else math.inf

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
                    verdict = verdict._replace(kind="drift")
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
        verdict = Verdict.of(self.detectors["buffer"], float(growth[most]))
        o.judged["buffer"] = verdict._replace(name=names[most])

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
            if o.is_new and name in ("gradient", *BEHIND):
                self.detectors[name] = self._norm_detector()

    def remember(self, steps: Sequence[Observation]) -> None:
        """Put the norms of each parameter into the history."""
        table = np.zeros((len(steps), len(NormHistory.KINDS), len(self.names)))
        for k, o in enumerate(steps):
            table[k, 0] = o.numbers["gradient"]
            table[k, 1] = applied_update_norms(o)
            if "weight" in o.numbers:
                table[k, 2] = o.numbers["weight"]
        self.history.add([o.step for o in steps], table)

    def remember_step(self, o: Observation) -> None:
        """Remember the step as the cause of what may come after it."""
        self.before.append(
            {
                "step": o.step,
                "batches": o.batches,
                "grad_norm": o.judged["gradient"].value,
                "update_norm": norm(applied_update_norms(o)),
                "update_z": o.judged["update"].z if "update" in o.judged else 0.0,
                "parameter": self.names[int(o.numbers["gradient"].argmax())],
            }
        )

    def record(self, o: Observation, top_k: int) -> dict[str, Any]:
        """The evidence about one step."""
        gradient, update = o.numbers["gradient"], o.numbers.get("update")
        finite = np.isfinite(gradient)
        squares = np.where(finite, np.square(gradient), np.inf)
        whole = squares.sum()
        scores = np.zeros(len(gradient)) if o.scores is None else o.scores
        scores = np.where(finite, scores, np.inf)
        spiked = [signal for signal in o.judged if o.spiked(signal)]

        def describe(i: int) -> dict[str, Any]:
            share = squares[i] / whole if 0 < whole < math.inf else float(not finite[i])
            facts = {"name": self.names[i], "grad_norm": float(gradient[i]), "share": float(share)}
            facts["z"] = float(scores[i])
            if update is not None:
                facts["update_norm"] = float(update[i])
                facts["update_rms"] = float(update[i]) / math.sqrt(max(1, self.params[i].numel()))
            return facts

        def largest(by: np.ndarray) -> list[dict[str, Any]]:
            return [describe(i) for i in np.argsort(-by, kind="stable")[:top_k].tolist()]

        return {
            "step": o.step,
            "epoch": o.epoch,
            "batches": o.batches,
            "optimizer": o.optimizer,
            "lr": float(max(o.lrs)),
            "spiked": spiked,
            "signals": {signal: verdict.facts() for signal, verdict in o.judged.items()},
            "clipped_grad_norm": norm(o.numbers["clipped"]) if "clipped" in o.numbers else None,
            "update_factor": float(o.numbers["factor"].min()) if "factor" in o.numbers else None,
            "by_share": largest(squares),
            "by_z": largest(scores),
            "before": max(self.before, key=update_severity, default=None),
            "reaction": o.reaction,
            "confirmed": "loss" in spiked,
            "max_loss_after": None,
            "steps_to_recover": None,
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "detectors": {signal: d.state_dict() for signal, d in self.detectors.items()},
            "drift": self.drift.state_dict(),
            "ratios": self.ratios.state_dict(),
            "history": self.history.state_dict(),
            "before": json.dumps(list(self.before)),
            "lr": self.lr,
            "used": sorted(self.used),
            "buffers": None if self.buffers is None else self.buffers.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for signal, detector in self.detectors.items():
            if signal in state["detectors"]:  # version 0.1 had fewer
                detector.load_state_dict(state["detectors"][signal])
        if "drift" in state:
            self.drift.load_state_dict(state["drift"])
        self.history.load_state_dict(state["history"])
        self.names = self.history.names
        if "ratios" in state:
            self.ratios.load_state_dict(state["ratios"])
        else:
            self.ratios.grow(len(self.names))
            self.ratios.load_rows(state["logs"])
        self.before.extend(json.loads(state["before"]))
        self.lr = state["lr"]
        self.used = set(state.get("used", range(len(self.names))))
        self.begun = True
        buffers = state.get("buffers")
        self.buffers = None if buffers is None else np.array(buffers)


def norm(norms: np.ndarray) -> float:
    """The norm of the whole from the norms of its parts."""
    return math.sqrt(np.square(norms).sum())


def applied_update_norms(o: Observation) -> np.ndarray:
    """Norms (P,) of the update as it was applied; zeros if the step was not taken."""
    if "update" not in o.numbers or was_skipped(o):
        return np.zeros_like(o.numbers["gradient"])
    update = o.numbers["update"]
    return update * o.numbers["factor"] if "factor" in o.numbers else update


def was_skipped(o: Observation) -> bool:
    return "skipped" in o.numbers and bool(o.numbers["skipped"].any())


def update_severity(step: Mapping[str, Any]) -> tuple[float, float]:
    """How far the update of a step was out of the ordinary, then how large it was."""
    return step["update_z"], step["update_norm"]


def row_of(o: Observation, several: bool) -> dict[str, float]:
    """What loggers are told of a judged step, named by its optimizer if there are several."""
    gradient, update = o.judged["gradient"], o.judged.get("update")
    row = {"grad_norm/total": gradient.value}
    # there is no threshold while a detector warms up
    if gradient.threshold < math.inf:
        row["grad_norm/threshold"] = gradient.threshold
    if "clipped" in o.numbers:
        row["grad_norm/clipped"] = norm(o.numbers["clipped"])
    if update:
        row["update_norm/total"] = 0.0 if was_skipped(o) else update.value
        if update.threshold < math.inf:
            row["update_norm/threshold"] = update.threshold
    if "promise" in o.judged:
        row["update_norm/promise"] = o.judged["promise"].value
    if "factor" in o.numbers:
        row["update_norm/clipped"] = norm(applied_update_norms(o))
    return {f"{name}/{o.optimizer}": value for name, value in row.items()} if several else row
