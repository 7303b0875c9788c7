"""What one optimizer step does to the parameters. Dimensions: P parameters of one optimizer."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

DECOUPLED = tuple(
    getattr(torch.optim, name)
    for name in ("AdamW", "Adafactor", "Muon")
    if hasattr(torch.optim, name)
)


@dataclass
class Update:
    """What a step did, on the device; None until the step is taken."""

    norms: Tensor | None = None  # (P,) of the proposed update
    grad_norms: Tensor | None = None  # (P,) as the optimizer used them; None if nobody clips
    factors: Tensor | None = None  # (P,) by which the update was shortened; None if nobody would


class StepProbe:
    """Compares the parameters of one optimizer before and after its step, once for all callbacks.

    ``arm`` copies them on the device before the step, a hook of the optimizer compares after it. A
    gradient scaler that leaves out a step leaves the hook uncalled, so that needs no device read.

    Who wants to shorten updates adds a function to ``limits``: it is given the probe, when
    ``deltas`` and ``update.norms`` are known, and returns a factor for each parameter (P,).
    A step with all factors at 1 is left as it is, bit for bit.

    Parameters that are frozen at the start are taken in only with a new parameter group. An
    optimizer that overwrites its gradients (SGD with nesterov and foreach) shows others in
    ``update.grad_norms``.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._collect()
        self.limits: list[Callable[[StepProbe], Tensor]] = []
        self.gradients_are_clipped = False
        self.deltas: list[Tensor] = []
        self.update = Update()
        self._armed: int | None = None  # the step about to be taken
        optimizer.register_step_post_hook(self._compare)

    @classmethod
    def of(cls, optimizer: Optimizer) -> "StepProbe":
        """The probe of this optimizer."""
        probe = getattr(optimizer, "step_probe", None)
        if probe is None:
            probe = optimizer.step_probe = cls(optimizer)  # type: ignore[attr-defined]
        if len(probe.groups) < len(optimizer.param_groups):  # as in fine-tuning
            probe._collect()
        return probe

    def _collect(self) -> None:
        self.groups = [
            [p for p in group["params"] if p.requires_grad] for group in self.optimizer.param_groups
        ]
        self.params = [p for group in self.groups for p in group]
        self.before = [torch.empty_like(p) for p in self.params]

    def gradients(self) -> list[Tensor]:
        return [dense_gradient(p) for p in self.params]

    def gradient_norms(self) -> Tensor:
        """L2 norms (P,) of the gradients, on the device."""
        return norms(self.gradients())

    def arm(self, step: int) -> Update:
        """Copy the parameters and return what optimizer step ``step``, the next, will fill in."""
        if self._armed != step:  # an earlier one may never have been taken
            self._armed = step
            self.update = Update()
            self.copy()
        return self.update

    @property
    def is_armed(self) -> bool:
        """Whether the coming step is compared."""
        return self._armed is not None

    def copy(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.before, self.params)

    @torch.no_grad()
    def _compare(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._armed is None:
            return
        self._armed = None
        self._take_decay_off()
        self.deltas = list(torch._foreach_sub(self.params, self.before))
        self.update.norms = norms(self.deltas)
        if self.gradients_are_clipped:
            self.update.grad_norms = self.gradient_norms()
        if self.limits:
            factors = [limit(self) for limit in self.limits]
            self.update.factors = factors[0] if len(factors) == 1 else torch.stack(factors).amin(0)
            pairs = zip(self.update.factors.unbind(), self.params, strict=True)
            weights = [factor.to(parameter.dtype) for factor, parameter in pairs]
            # where the weight is 1 these end at the parameters, bit for bit
            torch._foreach_lerp_(self.before, self.params, weights)
            torch._foreach_copy_(self.params, self.before)
        self.deltas = []

    def _take_decay_off(self) -> None:
        """Decoupled weight decay is not a part of the update."""
        decoupled = isinstance(self.optimizer, DECOUPLED)
        before = iter(self.before)
        for group, params in zip(self.optimizer.param_groups, self.groups, strict=True):
            own = list(itertools.islice(before, len(params)))
            if not (group.get("decoupled_weight_decay", decoupled) and group.get("weight_decay")):
                continue
            pairs = zip(params, own, strict=True)
            decaying = [old for p, old in pairs if p.grad is not None]  # others do not decay
            if decaying:
                torch._foreach_mul_(decaying, 1 - group["lr"] * group["weight_decay"])


def dense_gradient(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros_like(parameter)
    return gradient if gradient.layout is torch.strided else gradient.to_dense()


def norms(tensors: list[Tensor]) -> Tensor:
    """L2 norms (P,) of P tensors; bfloat16 and float16 are summed in float32."""
    is_double = any(tensor.dtype is torch.float64 for tensor in tensors)
    dtype = torch.float64 if is_double else torch.float32
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=dtype))
