"""Learning rate schedules that multiply the optimizer's own rate; any schedule is made here."""

import math
from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any, Literal

from lightning.pytorch.cli import LRSchedulerCallable
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from core.errors import UserError

Shape = Literal["cosine", "linear"]
SHAPES: dict[Shape, Callable[[float], float]] = {
    "cosine": lambda way: (1 - math.cos(math.pi * way)) / 2,
    "linear": lambda way: way,
}


class InverseSquareRoot(LambdaLR):
    """The schedule of the first Transformer (arXiv:1706.03762, equation 3), for any peak.

    The learning rate rises in a line to the optimizer's own and falls with the inverse square root
    of the step from there. It needs no length of training, so a run can be prolonged.

    Args:
        optimizer: The optimizer to schedule.
        warmup_steps: Optimizer steps up to the peak.

    Raises:
        ValueError: ``warmup_steps`` is less than 1.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int = 400) -> None:
        if warmup_steps < 1:
            raise ValueError(f"warmup_steps must be at least 1, got {warmup_steps}.")
        self.warmup_steps = warmup_steps
        super().__init__(optimizer, self.share)

    def share(self, step: int) -> float:
        """Share of the peak at a step counted from 0."""
        step += 1
        return min(step / self.warmup_steps, (self.warmup_steps / step) ** 0.5)


class OneCycle(LambdaLR):
    """A learning rate that rises to the optimizer's own and falls from there (arXiv:1708.07120).

    Rate and momentum are those of torch's ``OneCycleLR`` at every step, where ``lr`` is its
    ``max_lr`` and ``momentum`` its ``max_momentum``. They are multiplied instead of replaced: each
    is set in one place, the optimizer, and parameter groups keep their proportions.

    Args:
        optimizer: The optimizer to schedule.
        total_steps: Optimizer steps of the whole training.
        peak: Share of training after which the learning rate is at its highest; 0 only falls.
        start: Learning rate of the first step, in units of the highest.
        end: Learning rate of the last step, likewise.
        shape: Of the way up and of the way down.
        momentum_dip: Decrease of the momentum, or Adam's first beta, at the highest rate.

    Raises:
        ValueError: A share is out of range, or the optimizer has no momentum to be lowered.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | None = None,
        peak: float = 0.3,
        start: float = 0.04,
        end: float = 4e-6,
        shape: Shape = "cosine",
        momentum_dip: float = 0.0,
    ) -> None:
        if not total_steps or total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {total_steps}.")
        for name, value in (("peak", peak), ("start", start), ("end", end)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}.")
        if shape not in SHAPES:
            raise ValueError(f"shape must be {' or '.join(SHAPES)}, got {shape!r}.")
        self.total_steps = total_steps
        self.peak, self.start, self.end = peak, start, end
        self.shape = shape
        self.momentum_dip = momentum_dip
        self.momenta = [momentum_of(group) for group in optimizer.param_groups]
        if momentum_dip and not all(0 <= momentum_dip <= own for own in self.momenta):
            raise ValueError(
                f"momentum_dip must be between 0 and the optimizer's momentum, got {momentum_dip} "
                f"for {', '.join(f'{own:g}' for own in self.momenta)}."
            )
        super().__init__(optimizer, self.share)

    @property
    def top(self) -> float:
        """The step of the peak, which may lie between two of them."""
        return self.peak * self.total_steps - 1

    def height(self, step: int) -> float:
        """0 at the first and the last step, 1 at the peak."""
        top, last = self.top, self.total_steps - 1
        way = step / top if step < top else (last - step) / (last - top) if last > top else 1.0
        return SHAPES[self.shape](max(0.0, way))

    def share(self, step: int) -> float:
        """Share of the highest learning rate at a step counted from 0."""
        floor = self.start if step < self.top else self.end
        return floor + (1 - floor) * self.height(step)

    def get_lr(self) -> list[float | Tensor]:
        if self.momentum_dip:
            dip = self.momentum_dip * self.height(self.last_epoch)
            for group, own in zip(self.optimizer.param_groups, self.momenta, strict=True):
                if "betas" in group:
                    group["betas"] = own - dip, *group["betas"][1:]
                else:
                    group["momentum"] = own - dip
        return super().get_lr()


class Triangle(OneCycle):
    """A learning rate that rises in a line to the optimizer's own and falls in a line from there.

    Its turning points come a step after those of OneCycle: the rate would be ``end`` after the last
    step.

    Args:
        optimizer: The optimizer to schedule.
        total_steps: Optimizer steps of the whole training.
        peak: Share of training after which the learning rate is at its highest; 0 only falls.
        start: Learning rate of the first step, in units of the highest.
        end: Learning rate after the last step, likewise.

    Raises:
        ValueError: A share is out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | None = None,
        peak: float = 0.2,
        start: float = 0.0,
        end: float = 0.0,
    ) -> None:
        super().__init__(optimizer, total_steps, peak, start, end, shape="linear")

    def share(self, step: int) -> float:
        done = step / self.total_steps
        if done < self.peak:
            return self.start + (1 - self.start) * done / self.peak
        left = (1 - done) / (1 - self.peak) if self.peak < 1 else 0.0
        return self.end + (1 - self.end) * max(0.0, left)


def momentum_of(group: dict[str, Any]) -> float:
    """Momentum of a parameter group, or Adam's first beta; 0 if it has neither."""
    return group["betas"][0] if "betas" in group else group.get("momentum", 0.0)


def make_schedule(
    make: LRSchedulerCallable, optimizer: Optimizer, total_steps: int, *, recorded: bool = False
) -> LRScheduler:
    """Make the schedule of an optimizer.

    Args:
        make: Makes it; an argument ``total_steps`` that it leaves open is given.
        optimizer: The optimizer to schedule.
        total_steps: Optimizer steps of the whole training; -1 if it has no end.
        recorded: A run goes on with it, even if the learning rate that its optimizer was given is
            not used.

    Raises:
        UserError: The training has no end, or is too short for the schedule; the schedule has a
            learning rate of its own, and the optimizer another.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    length = {"total_steps": total_steps} if wants_total_steps(make) else {}
    if length and total_steps < 1:
        raise UserError(
            "the learning rate schedule is laid over the whole training, which has no end; set "
            "--trainer.max_epochs or --trainer.max_steps, or --model.lr_scheduler=null."
        )
    try:
        schedule = make(optimizer, **length)
    except ZeroDivisionError:  # OneCycleLR, whose way up or down would be of no length
        raise UserError(
            f"the learning rate schedule cannot be laid over {total_steps} optimizer steps; train "
            "longer, or set --model.lr_scheduler=null."
        ) from None
    name, other = type(schedule).__name__, type(optimizer).__name__
    for setting in ("step_size", "T_max", "T_0"):
        if getattr(schedule, setting, 1) == 0:
            raise UserError(f"{name} divides by {setting}, which must not be 0.")
    if isinstance(schedule, OneCycleLR) and schedule.total_steps < total_steps:
        raise UserError(
            f"{name} is over after {schedule.total_steps} of {total_steps} optimizer steps; leave "
            "its length out."
        )
    groups = zip(optimizer.param_groups, rates, strict=True)
    # of OneCycleLR and SWALR; CyclicLR has a list
    own = [group.get("max_lr", group.get("swa_lr", rate)) for group, rate in groups]
    own = getattr(schedule, "max_lrs", own)
    if own != rates and not recorded:
        if len(set(own)) < len(set(rates)):
            raise UserError(
                f"{name} gives every parameter the same learning rate, but {other} has several; "
                "use lit_models.schedules.OneCycle or Triangle, which multiply them."
            )
        raise UserError(
            f"{name} trains with a rate of its own, {own[0]:g}, so that lr={rates[0]:g} of {other} "
            "would not be used; give both the same value, or use lit_models.schedules.OneCycle, "
            "which multiplies the optimizer's."
        )
    return schedule


def wants_total_steps(make: LRSchedulerCallable) -> bool:
    """Return True if a schedule has an argument ``total_steps`` that is still open."""
    bound = make.keywords if isinstance(make, partial) else {}
    if bound.get("epochs") and bound.get("steps_per_epoch"):  # of OneCycleLR, their product
        return False
    if "total_steps" in bound:  # the command line binds all arguments of the class
        return bound["total_steps"] is None
    return "total_steps" in signature(make).parameters
