"""Learning rate schedules that torch does not have."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from errors import UserError


class InverseSquareRoot(LambdaLR):
    """The schedule of the first Transformer (arXiv:1706.03762, equation 3), for any peak.

    The learning rate rises in a line to the optimizer's own and falls with the inverse square root
    of the step from there. It needs no length of training, so a run can be prolonged.

    Args:
        optimizer: What is scheduled.
        warmup_steps: Optimizer steps up to the peak.

    Raises:
        UserError: ``warmup_steps`` is less than 1.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int = 400) -> None:
        if warmup_steps < 1:
            raise UserError(f"warmup_steps must be at least 1, got {warmup_steps}.")
        self.warmup_steps = warmup_steps
        super().__init__(optimizer, self.share)

    def share(self, step: int) -> float:
        """Of the peak, at a step counted from 0."""
        step += 1
        return min(step / self.warmup_steps, (self.warmup_steps / step) ** 0.5)
