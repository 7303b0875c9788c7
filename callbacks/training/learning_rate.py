"""The learning rate of every step."""

from typing import Any, Literal

from lightning import LightningModule, Trainer
from lightning.pytorch import callbacks


class LearningRateMonitor(callbacks.LearningRateMonitor):
    """Lightning's, with the rate that each optimizer step is taken with, in the row of the step.

    Lightning's own logs it on log steps alone, and so nothing of a warm-up of fewer steps.

    Args:
        logging_interval: ``epoch``, or null and ``step``: every optimizer step.
        kwargs: What Lightning's takes.
    """

    def __init__(
        self, logging_interval: Literal["step", "epoch"] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(logging_interval or "step", **kwargs)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **options: Any
    ) -> None:
        add = getattr(pl_module, "add_to_rows", None)
        if add is None or self.logging_interval == "epoch":
            super().on_train_batch_start(trainer, pl_module, *args, **options)
            return
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if len(groups) != len(self.lrs) or (every and (trainer.global_step + 1) % every == 0):
            # on log steps momentum and weight decay too; later groups get a name in here
            rates = self._extract_stats(trainer, "any")
        else:
            rates = {name: float(group["lr"]) for name, group in zip(self.lrs, groups, strict=True)}
        add({trainer.global_step: rates})
