"""Averages of weights that have not begun."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, WeightAveraging


class CurrentUntilAveraged(Callback):
    """Before an average of weights begins, the current weights take its place.

    Lightning's ``WeightAveraging`` has the initial weights there, and validates, saves and tests
    them (Lightning-AI/pytorch-lightning#21724). To be dropped when that is closed.

    Args:
        averaging: What averages; this callback stands in front of it.
    """

    def __init__(self, averaging: WeightAveraging) -> None:
        self.averaging = averaging

    def copy(self, trainer: Trainer, pl_module: LightningModule) -> None:
        average = self.averaging._average_model
        if average is not None and average.n_averaged == 0:
            average.module.load_state_dict(pl_module.state_dict())

    on_validation_epoch_start = on_train_end = copy

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.copy(trainer, pl_module)
