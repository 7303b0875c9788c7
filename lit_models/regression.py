"""Regression of a number, for a whole sequence or for each of its steps.

Dimensions: B batch, T time.
"""

import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError, MetricCollection, R2Score

from core.errors import UserError
from lit_models.base import LitModel
from lit_models.own_loaders import with_ids


class LitRegressor(LitModel):
    """Inputs in, a number out; the loss is the mean squared error.

    Args:
        network: Maps the inputs to (B, 1), one number each, or to (B, T, 1), one at every step.
            Where it gives one and the target is (B, T), the number is meant for the last step.
        optimizer: Makes the optimizer from the trainable parameters.
        lr_scheduler: Makes the schedule from the optimizer.
    """

    monitor = "val/r2"
    outputs = ()  # no classes

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        metrics = MetricCollection({"r2": R2Score(), "mae": MeanAbsoluteError()})
        super().__init__(network, optimizer, lr_scheduler, metrics)

    def predictions(self, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Predictions and their targets, (B,) or (B, T).

        Raises:
            UserError: They do not fit.
        """
        *inputs, target = batch
        preds = self(*inputs).squeeze(-1)
        if preds.ndim < target.ndim:
            target = target[:, -1]
        if preds.shape != target.shape:
            raise UserError(
                f"the network gives numbers of shape {tuple(preds.shape)} for targets of shape "
                f"{tuple(target.shape)}; it needs one output, and read=every or last."
            )
        return preds, target

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        preds, target = self.predictions(batch)
        loss = F.mse_loss(preds, target)
        self.record(loss=loss.detach())
        return loss

    def evaluation_step(self, batch: list[Tensor]) -> dict[str, Tensor]:
        preds, target = self.predictions(batch)
        preds, target = preds.float().flatten(), target.flatten()
        return {"loss": F.mse_loss(preds, target), "preds": preds, "target": target}

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> tuple[Tensor, Tensor]:
        """Ids (B,) and predictions (B, 1) or (B, T, 1) of one batch."""
        *inputs, ids = with_ids(batch)
        return ids, self(*inputs).float()
