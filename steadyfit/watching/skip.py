"""Taking back a step that spikes, without reading the device.

Dimensions: A of P parameters of one optimizer have a gradient, Q buffers of the model.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import processes
from ..detector import SHIFT_AFTER
from ..probe import StepProbe
from .kept import Choice, Kept
from .observation import Observation
from .optimizer_monitor import OptimizerMonitor

_LARGEST = torch.finfo(torch.float32).max  # of a value that no threshold is known for
_SIGNALS = ("gradient", "loss", "buffer", "update", "promise")


class Skip:
    """Take back the steps of one optimizer that spike: parameters, optimizer states and buffers.

    Nothing is read: values are compared on the device with the thresholds of the last log step, and
    what the step has changed is chosen there between old and new. A step that is left out leaves
    all of it equal bit for bit, which a gradient times 0 would not (it is NaN where it was NaN, and
    AdamW moves on gradients of zero). It takes the memory of the copies, for the length of a step.
    Read is once where a step creates optimizer states or changes them by other than tensors
    (numbers in a parameter group, lists), and where these lie in main memory: the count of steps of
    torch's Adam, unless it is fused or capturable.

    Attributes:
        signals: Largest ordinary value of each signal that it looks at.
        ratios: Largest ordinary ratio of each parameter's gradient norm to that of the others (P,).
        flag: Whether the last step was taken back ().
    """

    def __init__(self) -> None:
        self.signals = [_LARGEST] * len(_SIGNALS)
        self.ratios: list[float] = []
        self.flag = torch.tensor(False)
        self._row = torch.tensor(0)  # () steps taken back one after another
        self._open = torch.tensor(False)  # () whether that was enough, until thresholds are new
        self._loss = torch.tensor(math.inf)  # () of the step, if it is known
        self._limits: dict[torch.device, tuple[Tensor, Tensor]] = {}  # signals and ratios
        self._buffers: Tensor | None = None  # norms (Q,) after the last step
        self._kept: list[Kept] = []  # what the coming step may change

    def refresh(self, monitor: OptimizerMonitor) -> None:
        """Take the thresholds that hold from now on."""
        limits = monitor.limits()
        self.signals = [min(limits[name], _LARGEST) for name in _SIGNALS]
        self.ratios = np.minimum(monitor.ratios.thresholds(), _LARGEST).tolist()
        self._limits, self._open = {}, torch.tensor(False)

    @torch.no_grad()
    def before_step(self, o: Observation, buffers: Kept) -> None:
        """Judge gradient, loss and buffers, and copy what the step may change.

        Args:
            o: The step.
            buffers: Those of the model, before the forward pass.
        """
        whole = processes.average_all(o.tensors())  # each process has to decide the same
        self._open = self._open | o.is_new  # nothing is known of what is thawed
        self.flag = self._is_beyond(o, whole)
        active = [o.probe.params[i] for i in o.active]
        self._kept = [Kept(active, [o.probe.optimizer], groups=True), buffers]
        if (norms := whole.get("buffers")) is not None:
            last = self._last_buffers(norms)
            self._buffers = torch.where(self.flag, norms if last is None else last, norms)

    @torch.no_grad()
    def after_step(self, probe: StepProbe) -> None:
        """Judge the update as well, and choose between the old and the new."""
        if (update := probe.update.squares) is not None:
            products = probe.update.products
            products = torch.zeros_like(update) if products is None else products
            squares, promises = probe.reduce(update, products)
            *_, largest, promise = self._on(squares.device)[0]
            total = squares.sum().sqrt()
            beyond = (promises.sum() > promise * self._loss) & (self._loss > 0) | (total > largest)
            self.flag = self.flag | (beyond & ~self._open) | ~total.isfinite()
        self._row = torch.where(self.flag, self._row + 1, 0)
        self._open = self._open | (self._row >= SHIFT_AFTER)
        choice = Choice(self.flag)
        for kept in self._kept:
            kept.restore(choice)
        self._kept = []

    def _is_beyond(self, o: Observation, whole: Mapping[str, Tensor]) -> Tensor:
        """Tell if gradient, loss or buffers of a step are beyond a threshold or not finite ().

        Ten steps in a row beyond one are a new level, not spikes: the next are taken.
        """
        gradient = whole["gradient"].sqrt()
        if "scale" in whole:
            gradient = gradient / whole["scale"]
        signals, ratios = self._on(gradient.device)
        zero = gradient.new_zeros(())
        loss = whole["loss"].squeeze().to(gradient) if "loss" in whole else zero
        self._loss = loss if "loss" in whole else zero + math.inf
        growth = self._growth(whole.get("buffers"), zero)
        values = torch.stack([gradient.norm(), loss, growth])
        beyond = ~(values <= signals[:3]).all()  # a NaN is not below anything
        if len(self.ratios) == len(o.probe.params) > 1:
            squares = gradient.square()
            others = (squares.sum() - squares).clamp(min=0).sqrt()
            own = ratios if len(gradient) == len(ratios) else ratios[o.active]
            beyond = beyond | ((gradient > own * others) & (others > 0)).any()
        self._open, self._row = self._open.to(beyond.device), self._row.to(beyond.device)
        return (beyond & ~self._open) | ~values.isfinite().all()

    def _growth(self, norms: Tensor | None, none: Tensor) -> Tensor:
        """The largest factor () by which the norm of a buffer has grown."""
        if norms is None or (last := self._last_buffers(norms)) is None:
            return none
        growth = torch.where(last > 0, norms / last, 1.0)
        growth = torch.where(norms.isfinite(), growth, math.inf)
        return torch.where(last.isfinite(), growth, 1.0).amax().to(none)  # a mask may be infinite

    def _last_buffers(self, like: Tensor) -> Tensor | None:
        """The norms after the last step, if it had as many."""
        if self._buffers is None or self._buffers.shape != like.shape:
            return None
        return self._buffers.to(like.device)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._limits:
            signals, ratios = torch.tensor(self.signals), torch.tensor(self.ratios)
            self._limits[device] = signals.to(device), ratios.to(device)
        return self._limits[device]

    def state_dict(self) -> dict[str, Any]:
        buffers = None if self._buffers is None else self._buffers.tolist()
        row = {"row": int(self._row), "open": bool(self._open)}
        return {"signals": self.signals, "ratios": self.ratios, "buffers": buffers, **row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.signals[: len(state["signals"])] = state["signals"]
        self.ratios, self._limits = state["ratios"], {}
        if "row" in state:
            self._row, self._open = torch.tensor(state["row"]), torch.tensor(state["open"])
            norms = state["buffers"]
            self._buffers = None if norms is None else torch.tensor(norms)
