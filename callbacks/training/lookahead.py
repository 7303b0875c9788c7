"""Weights that are pulled back to their own average."""

from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor


class Lookahead(Callback):
    """Every few steps, move a slow copy of the weights towards them and go on from there.

    Zhang et al., arXiv:1907.08610, on all that has a floating-point value, running averages of
    normalisation too, with the schedule of arXiv:2404.00498, section 3.4: the share of the slow
    weights that is kept grows with the cube of the training done, and the last step ends on the
    slow weights alone. Unlike an average that only looks on, it changes the training itself.

    Args:
        every: Optimizer steps between two pulls.
        keep: Share of the slow weights that is kept at the end of training.

    Raises:
        MisconfigurationException: If an argument is out of range, or training has no end.
    """

    def __init__(self, every: int = 5, keep: float = 0.95**5) -> None:
        if every < 1:
            raise MisconfigurationException(f"every must be at least 1 step, got {every}.")
        if not 0 <= keep < 1:
            raise MisconfigurationException(f"keep must be in [0, 1), got {keep}.")
        self.every = every
        self.keep = keep
        self.slow: list[Tensor] = []
        self.steps = 0  # optimizer steps seen: a batch that is only accumulated is none

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.total_steps < 1:  # type: ignore[operator]
            raise MisconfigurationException(
                "Lookahead needs the length of training; set trainer.max_epochs or max_steps."
            )
        fast = _floating(pl_module)
        if not self.slow:
            self.slow = [x.clone() for x in fast]
        self.slow = [slow.to(x.device) for slow, x in zip(self.slow, fast, strict=True)]
        self.steps = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.steps:
            return
        self.steps = trainer.global_step
        total: int = pl_module.total_steps  # type: ignore[assignment]
        last = self.steps == total
        if self.steps % self.every and not last:
            return
        keep = 1.0 if last else self.keep * (self.steps / total) ** 3
        fast = _floating(pl_module)
        torch._foreach_lerp_(self.slow, fast, 1 - keep)
        torch._foreach_copy_(fast, self.slow)

    def state_dict(self) -> dict[str, Any]:
        return {"slow": self.slow}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.slow = state_dict["slow"]


def _floating(pl_module: LightningModule) -> list[Tensor]:
    """Parameters and buffers, but for counters."""
    return [x for x in pl_module.state_dict().values() if x.is_floating_point()]
