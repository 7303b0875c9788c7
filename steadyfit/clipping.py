"""Shortening the updates that spikes are made of. Dimensions: P parameters of one optimizer."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .probe import StepProbe


class UpdateLimit:
    """By which factors the updates of a step are to be shortened, computed on the device.

    Args:
        max_rms: Largest root mean square of an update, in learning rates; None for no limit.
        max_decrease: Largest share of the loss that a step may promise to remove; None for no
            limit.

    Attributes:
        loss: The loss () whose gradient the coming step follows; only ``max_decrease`` asks for it.

    Raises:
        ValueError: If a limit is not positive, or there is none.
    """

    def __init__(self, max_rms: float | None = 1.0, max_decrease: float | None = None) -> None:
        for name, value in (("max_rms", max_rms), ("max_decrease", max_decrease)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}; use None for no limit.")
        if max_rms is None and max_decrease is None:
            raise ValueError("there is no limit; set max_rms, max_decrease, or both.")
        self.max_rms = max_rms
        self.max_decrease = max_decrease
        self.loss: Tensor | None = None
        self._roots: dict[StepProbe, list[Tensor]] = {}  # of the sizes, for each parameter group

    def check(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer that overwrites the gradients which ``max_decrease`` needs.

        Raises:
            ValueError: It does.
        """
        if self.max_decrease is not None and overwrites_gradients(optimizer):
            raise ValueError(
                "max_decrease needs the gradients behind the step, and SGD with nesterov "
                "overwrites them; set foreach to False, or max_decrease to None."
            )

    def __call__(self, probe: StepProbe) -> Tensor:
        """The factors (P,) of the step that the probe has seen."""
        lengths = probe.update.norms
        assert lengths is not None
        if self.max_rms is None:
            factors = torch.ones_like(lengths)
        else:
            # where nothing moved the quotient may be 0 / 0, and a NaN is left for all to see
            quotients = self._longest(probe, self.max_rms) / lengths
            factors = quotients.nan_to_num_(nan=1.0, posinf=1.0).clamp_(max=1.0)
        if self.max_decrease is not None and self.loss is not None:
            pairs = zip(probe.deltas, probe.gradients(), strict=True)
            promised = -torch.stack([inner(*pair) for pair in pairs]).to(factors).dot(factors)
            allowed = self.max_decrease * self.loss
            excess = (promised / allowed).nan_to_num_(nan=1.0, posinf=1.0).clamp_(min=1.0)
            factors = torch.where(allowed > 0, factors / excess, factors)
        return factors

    def _longest(self, probe: StepProbe, rms: float) -> Tensor:
        """Norms (P,) of updates whose root mean square is ``rms`` learning rates."""
        roots = self._roots.get(probe, [])
        groups = probe.optimizer.param_groups
        if len(roots) < len(groups):  # at the start, or when a group was added
            assert probe.update.norms is not None
            sizes = [[float(p.numel()) for p in params] for params in probe.groups]
            self._roots[probe] = roots = [probe.update.norms.new_tensor(s).sqrt() for s in sizes]
        longest = [r * (g["lr"] * rms) for r, g in zip(roots, groups, strict=True)]
        return longest[0] if len(longest) == 1 else torch.cat(longest)


def clip_updates(
    optimizer: Optimizer, max_rms: float | None = 1.0, max_decrease: float | None = None
) -> UpdateLimit:
    """Shorten the updates of an optimizer from now on, in any training loop.

    A copy of the optimizer (``copy.deepcopy``, pickle) has no hooks, and so no limit.

    Example::

        limit = clip_updates(optimizer, max_decrease=0.5)
        for x, y in batches:
            limit.loss = loss = loss_function(model(x), y)  # max_rms alone needs no loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    Raises:
        ValueError: If a limit is not positive, or there is none; at a step, if ``max_decrease`` has
            no loss.
    """
    limit = UpdateLimit(max_rms, max_decrease)
    limit.check(optimizer)
    probe, steps = StepProbe.of(optimizer), 0

    def factors(probe: StepProbe) -> Tensor:
        if max_decrease is not None:
            if limit.loss is None:
                raise ValueError("max_decrease needs the loss: set limit.loss before each step.")
            limit.loss = torch.as_tensor(limit.loss).detach()
        found = limit(probe)
        limit.loss = None  # that of the next step is another one
        return found

    def arm(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal steps
        if not probe.is_armed:  # else somebody else watches this step as well
            StepProbe.of(optimizer).arm(steps)
        steps += 1

    probe.limits.append(factors)
    optimizer.register_step_pre_hook(arm)
    return limit


def overwrites_gradients(optimizer: Optimizer) -> bool:
    """Whether gradients are other ones behind a step: torch's SGD adds the momentum to them."""
    return isinstance(optimizer, torch.optim.SGD) and any(
        group["nesterov"] and not group["weight_decay"] and group["foreach"] is not False
        for group in optimizer.param_groups
    )


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner product () of two tensors of one shape; of low precision, summed in float32."""
    if a.dtype in (torch.float16, torch.bfloat16):
        a, b = a.float(), b.float()
    return torch.dot(a.reshape(-1), b.reshape(-1))
