"""The learning rate of every step."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch import callbacks


class LearningRateMonitor(callbacks.LearningRateMonitor):
    """Lightning's, with the rate that each optimizer step is taken with.

    Lightning's own tells it on log steps alone, and so nothing of a warm-up of fewer steps.
    """

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **options: Any
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, *args, **options)
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        add = getattr(pl_module, "add_to_rows", None)
        # groups that are added later have no name before the next log step
        if add and self.logging_interval != "epoch" and len(groups) == len(self.lrs):
            rates = [float(group["lr"]) for group in groups]
            add({trainer.global_step: dict(zip(self.lrs, rates, strict=True))})
