"""One optimizer step as it is seen: on the device at first, in numbers once it has been read.

Dimensions: P parameters of the optimizer, A of them with a gradient in this step, Q buffers of the
model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..probe import StepProbe, Update
from .records import SPIKES, Verdict

AFTER_STEP = ("update", "promise")  # signals that are known after the step
_NORMS = ("gradient", "update", "clipped", "weight")  # of parameters

_Numbers = dict[str, np.ndarray]  # by name; norms are (P,), 0 where a parameter has no gradient


@dataclass
class Observation:
    """One optimizer step; what stands in tensors waits to be read."""

    step: int
    epoch: int
    batches: list[int]  # indices in the epoch; several when gradients are accumulated
    optimizer: int
    probe: StepProbe
    lrs: list[float | Tensor]  # of the parameter groups
    loss: Tensor | None  # ()
    gradient: Tensor  # squared norms (A,)
    update: Update
    scale: Tensor | None = None  # (), of gradients that are not unscaled yet
    scaled: bool = False  # a gradient scaler watches over this step
    weight: Tensor | None = None  # squared norms (A,), now and then
    buffers: Tensor | None = None  # norms (Q,)
    skipped: Tensor | None = None  # (), whether a reaction took the step back
    is_left_scaled: bool = False  # its gradients, until the optimizer unscales them itself
    rate_jumps: bool = False  # its learning rate is another one than that of the step before
    is_new: bool = False  # some of its parameters take part for the first time
    count: int = 0  # of all parameters (P)
    active: list[int] = field(default_factory=list)  # those with a gradient (A)
    numbers: _Numbers = field(default_factory=dict)  # what has been read
    judged: dict[str, Verdict] = field(default_factory=dict)  # by signal
    scores: np.ndarray | None = None  # (P,) of the parameters
    reaction: str = "log"
    left_out: bool = False  # by a reaction, before it was taken

    def __post_init__(self) -> None:
        self.is_left_scaled = self.scale is not None
        self.active, self.count = self.probe.layout.active, len(self.probe.params)
        # how often the squares of this process's part make up the mean over the processes
        sharded = self.probe.is_sharded
        self.parts = self.probe.shard_counts(self.gradient) if sharded else None

    @property
    def is_coming(self) -> bool:
        """True once the step has been observed, until it is taken."""
        return self.probe.is_armed and self.probe.update is self.update and not self.scaled

    def spiked(self, signal: str) -> bool:
        """Tell if this signal was judged to spike."""
        return signal in self.judged and self.judged[signal].kind in SPIKES

    def tensors(self) -> dict[str, Tensor]:
        """All that is there and not yet read, by name, one-dimensional."""
        update = self.update
        found = {
            "gradient": self.gradient,
            "update": update.squares,
            "clipped": update.gradient,
            "products": update.products,
            "weight": self.weight,
            "factor": update.factors,
            "loss": self.loss,
            "scale": self.scale,
            "buffers": self.buffers,
            "skipped": self.skipped,
        }
        there = {k: t for k, t in found.items() if t is not None and k not in self.numbers}
        if self.parts is not None:
            there |= {k: there[k] * self.parts for k in (*_NORMS, "products") if k in there}
        return {name: tensor.reshape(-1) for name, tensor in there.items()}

    def take(self, name: str, values: np.ndarray) -> None:
        """Keep what was read under this name."""
        if name in _NORMS:
            values = np.sqrt(values)
        of_parameters = name in _NORMS or name == "factor"
        if of_parameters and len(self.active) < self.count:
            whole = np.full(self.count, 1.0 if name == "factor" else 0.0)
            whole[self.active] = values
            values = whole
        self.numbers[name] = values

    def unscale(self) -> None:
        """Divide by the scale which the optimizer itself takes off."""
        if "scale" in self.numbers:
            # what is known after the step is of gradients that were unscaled in place
            self.numbers["gradient"] /= self.numbers.pop("scale")
            self.scale = None


def read(pending: Sequence[Observation], average: Callable[[Tensor], Tensor] | None = None) -> None:
    """Read what some steps have on the device: one device read, and one collective at most.

    Args:
        pending: The steps.
        average: Averages a tensor over the processes, if there are several: gradients are the same
            everywhere, the loss is not, and of sharded parameters the squares add up.
    """
    parts = [(o, name, tensor) for o in pending for name, tensor in o.tensors().items()]
    if not parts:
        return
    table = torch.cat([tensor for _, _, tensor in parts])
    values = np.array((average(table) if average else table).tolist())
    start = 0
    for observation, name, tensor in parts:
        observation.take(name, values[start : start + len(tensor)])
        start += len(tensor)
    for observation in pending:
        observation.unscale()


def scalar(loss: Tensor | float | None) -> Tensor | None:
    """A loss as a tensor (), if it is known.

    Raises:
        ValueError: It has more than one element.
    """
    if loss is None:
        return None
    value = torch.as_tensor(loss).detach().float()
    if value.numel() != 1:
        raise ValueError(f"the loss must have one element, got the shape {tuple(value.shape)}.")
    return value.reshape(())


def learning_rate(group: Mapping[str, Any]) -> float | Tensor:
    """The learning rate of now; schedulers write new ones into a tensor."""
    rate = group["lr"]
    return rate.clone() if isinstance(rate, Tensor) else rate
