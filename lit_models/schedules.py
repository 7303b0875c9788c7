"""Learning rate schedules that torch does not have."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class InverseSquareRoot(LambdaLR):
    """The schedule of the first Transformer (arXiv:1706.03762, equation 3), for any peak.

    The learning rate rises in a line to the optimizer's own and falls with the inverse square root
    of the step from there. It needs no length of training, so a run can be prolonged.

    Args:
        optimizer: What is scheduled.
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
        """Of the peak, at a step counted from 0."""
        step += 1
        return min(step / self.warmup_steps, (self.warmup_steps / step) ** 0.5)


class Triangle(LambdaLR):
    """A learning rate that rises in a line to the optimizer's own and falls in a line from there.

    Unlike ``OneCycleLR`` it multiplies the learning rate of every parameter group, so groups keep
    their proportions.

    Args:
        optimizer: What is scheduled.
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
        if not total_steps or total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {total_steps}.")
        for name, value in (("peak", peak), ("start", start), ("end", end)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}.")
        self.total_steps = total_steps
        self.peak, self.start, self.end = peak, start, end
        super().__init__(optimizer, self.share)

    def share(self, step: int) -> float:
        """Of the highest learning rate, at a step counted from 0."""
        done = step / self.total_steps
        if done < self.peak:
            return self.start + (1 - self.start) * done / self.peak
        left = (1 - done) / (1 - self.peak) if self.peak < 1 else 0.0
        return self.end + (1 - self.end) * max(0.0, left)
