"""Dependence of the loss of a batch on each time step of its input.

Dimensions: B batch, T time, D features.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from .watching.records import read_records, save

if TYPE_CHECKING:
    import pandas as pd

THAT_STEP = "of that step"


@dataclass
class WorstStep:
    """The optimizer step with the largest gradient.

    Attributes:
        step: Counted from 0, as all others.
        epoch: Its epoch.
        batches: The batches of its gradient, by their number in the epoch.
        grad_norm: The norm of that gradient, as it was recorded.
        weights: The parameters before the step, by name; none if they were not kept.
    """

    step: int
    epoch: int
    batches: list[int]
    grad_norm: float
    weights: dict[str, Tensor] | None = None

    @classmethod
    def locate(
        cls, metrics: "pd.DataFrame", step: int, grad_norm: float, accumulated: int = 1
    ) -> "WorstStep | None":
        """Find the batches of a step in the metrics of all steps, if it is among them.

        Args:
            metrics: ``step`` and ``epoch`` of each optimizer step.
            step: The step.
            grad_norm: Its gradient norm.
            accumulated: Batches in an optimizer step; the last one of an epoch may have fewer.
        """
        epochs = metrics.set_index("step")["epoch"].dropna()
        if step not in epochs:
            return None
        epoch = int(epochs[step])
        first = int((step - epochs.index[epochs == epoch].min()) * accumulated)
        return cls(step, epoch, list(range(first, first + accumulated)), grad_norm)

    @classmethod
    def read(cls, folder: Path) -> "WorstStep | None":
        """Read it from ``worst_spike.pt`` of a run folder, or else from ``spikes.jsonl``."""
        if (path := folder / "worst_spike.pt").exists():
            return cls(**torch.load(path, map_location="cpu", weights_only=True))
        found = [
            cls(record.step, record.epoch, record.batches, gradient.value)
            for record in read_records(folder / "spikes.jsonl")
            if (gradient := record.signals.get("gradient")) and gradient.kind == "spike"
        ]
        return max(found, key=lambda worst: worst.grad_norm, default=None)

    def save(self, folder: Path) -> None:
        save(vars(self), folder / "worst_spike.pt")

    def remake(self, data: Any) -> list[list[Tensor]]:
        """Make its batches again, by a datamodule of this process."""
        count = len(data.train_dataloader())
        return [data.training_batch(self.epoch, b) for b in self.batches if b < count]


@dataclass
class ThroughTime:
    """Gradients |dL/dx_t| at the worst step.

    Attributes:
        worst: That step.
        norms: Of each sample (B, T), with L the mean loss of the batch.
        grad_norm: Norm of the gradient of all parameters, made again.
        origin: Where the weights come from, in words.
    """

    worst: WorstStep
    norms: np.ndarray
    grad_norm: float
    origin: str

    @property
    def of_batch(self) -> np.ndarray:
        """The same of all samples together, (T,)."""
        return np.linalg.norm(self.norms, axis=0)

    @property
    def proof(self) -> str:
        """Comparison of what was made again with what happened, in words."""
        recorded = self.worst.grad_norm
        if math.isclose(self.grad_norm, recorded, rel_tol=1e-3):
            return f"gradient norm {recorded:.4g}, reproduced"
        made = f"{self.grad_norm:.3g} with the weights {self.origin}"
        return f"gradient norm {recorded:.3g}; {made}"


def is_sequence(batch: Any) -> bool:
    """Tell if a batch is float sequences (B, T, D) and their targets."""
    first = batch[0] if isinstance(batch, (list, tuple)) and len(batch) == 2 else None
    return isinstance(first, Tensor) and first.is_floating_point() and first.ndim == 3


class _Loss(nn.Module):
    """The loss () of a LitModel as a module, so that it can be called with other weights."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: list[Tensor]) -> Tensor:
        return self.module.evaluation_step(batch)["loss"]  # type: ignore[operator]


def through_time(
    module: nn.Module, batches: list[list[Tensor]], worst: WorstStep, origin: str = THAT_STEP
) -> ThroughTime:
    """Differentiate the loss by the input, with one more forward and backward pass per batch.

    The states inside a fused LSTM cannot be asked for their gradients; its input can.

    Args:
        module: Has ``evaluation_step(batch) -> {"loss": ...}``; its weights are used where
            ``worst`` has none, and left as they are.
        batches: The batches of the step, each ``[x (B, T, D), target (B,)]``.
        worst: The step.
        origin: Where the weights come from, in words.
    """
    weights = dict(module.named_parameters()) | (worst.weights or {})
    device = batches[0][0].device
    weights = {f"module.{n}": w.detach().to(device).requires_grad_() for n, w in weights.items()}
    norms, gradient = [], [torch.zeros_like(w) for w in weights.values()]
    for x, target in batches:
        x = x.detach().requires_grad_()
        with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):  # also in eval mode
            loss = functional_call(_Loss(module), weights, ([x, target],)) / len(batches)
            by_input, *by_weight = torch.autograd.grad(
                loss, [x, *weights.values()], materialize_grads=True
            )
        norms.append(by_input.norm(dim=2).cpu().numpy())
        gradient = [a + b for a, b in zip(gradient, by_weight, strict=True)]
    grad_norm = torch.stack([part.norm() for part in gradient]).norm().item()
    return ThroughTime(worst, np.concatenate(norms), grad_norm, origin)
