"""Single-label classification, of a whole input or of each step of a sequence.

Dimensions: B batch, T time, K classes, M members of an ensemble.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassF1Score,
)

from core.errors import UserError
from datamodules.base import IGNORED
from lit_models.base import LitModel
from lit_models.own_loaders import with_ids

TTA = Literal["none", "mirror", "translate", "mirror_translate"]


class LitClassifier(LitModel):
    """Inputs in, one of ``num_classes`` out, or one for each step of a sequence.

    Args:
        network: Maps the inputs to logits (B, K), or (B, T, K) where the target is (B, T). An
            Ensemble gives in training those of its members one after the other (M * B, K), and
            each is trained as if it were alone.
        optimizer: Makes the optimizer from the trainable parameters.
        num_classes: Number of classes K.
        lr_scheduler: Makes the schedule from the optimizer.
        label_smoothing: Share of the target probability spread over all classes, in training.
        tta: Test-time augmentation of images in ``validate``, ``test`` and prediction: logits are
            averaged over the mirrored image, and over translations by a pixel; ``translate`` alone
            is for digits and letters, which no mirror keeps. The validation inside ``fit`` does
            without, because it would cost as much as training.
        l1_penalty: Factor on the sum of the absolute values of all trained weights of two or more
            dimensions, which is added to the loss that is minimised (Tibshirani, "Regression
            shrinkage and selection via the lasso", 1996). ``train/loss`` is the loss without it.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerCallable,
        num_classes: int = 10,
        lr_scheduler: LRSchedulerCallable | None = None,
        label_smoothing: float = 0.0,
        tta: TTA = "none",
        l1_penalty: float = 0.0,
    ) -> None:
        # validate_args would read the device in every update
        top_k = min(3, num_classes)
        metrics: dict[str, Metric | MetricCollection] = {
            "accuracy": MulticlassAccuracy(num_classes, average="micro", validate_args=False),
            f"top{top_k}": MulticlassAccuracy(
                num_classes, top_k=top_k, average="micro", validate_args=False
            ),
            "macro_f1": MulticlassF1Score(num_classes, average="macro", validate_args=False),
            "calibration_error": MulticlassCalibrationError(num_classes, validate_args=False),
        }
        # groups are found on the first batch: were it all right, top 3 would be accuracy for good
        collection = MetricCollection(metrics, compute_groups=False)
        super().__init__(network, optimizer, lr_scheduler, collection)
        if not 0 <= label_smoothing < 1:
            raise UserError(f"label_smoothing must be in [0, 1), got {label_smoothing}.")
        if tta not in get_args(TTA):
            raise UserError(f"tta must be one of {', '.join(get_args(TTA))}, got {tta!r}.")
        if not l1_penalty >= 0:
            raise UserError(f"l1_penalty must not be negative, got {l1_penalty}; 0 turns it off.")
        self.label_smoothing = label_smoothing
        self.l1_penalty = l1_penalty
        self.tta = tta

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        *inputs, target = batch
        logits = self(*inputs)  # (M * B, K) or (B, T, K)
        if aligned := target.ndim == 2:
            logits, target = logits.flatten(0, 1), target.flatten()
        members = len(logits) // len(target)
        if members > 1:
            target = target.repeat(members)
        loss = F.cross_entropy(logits, target, label_smoothing=self.label_smoothing)
        correct = (logits.argmax(1) == target).float()
        accuracy = correct.sum() / (target != IGNORED).sum() if aligned else correct.mean()
        self.record(loss=loss.detach(), accuracy=accuracy)
        return self.objective(loss, members)

    def objective(self, loss: Tensor, members: int) -> Tensor:
        """Objective of the optimizer, given the mean loss of all members."""
        if members > 1:  # by the mean each would get 1 / M of the gradient that it has alone
            loss = loss * members
        if self.l1_penalty:
            trained = [p for p in self.parameters() if p.requires_grad and p.ndim > 1]
            norms = torch._foreach_norm(tuple(trained), 1)
            loss = loss + self.l1_penalty * torch.stack(norms).sum()
        return loss

    def evaluation_step(self, batch: list[Tensor]) -> dict[str, Tensor]:
        *inputs, target = batch
        logits = self.logits(*inputs)
        if target.ndim == 2:
            counted = target != IGNORED
            logits, target = logits[counted], target[counted]
        loss = F.cross_entropy(logits, target)
        return {"loss": loss, "logits": logits, "preds": logits.softmax(1), "target": target}

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> tuple[Tensor, Tensor]:
        """Ids (B,) and class probabilities (B, K) of one batch."""
        *inputs, ids = with_ids(batch)
        return ids, self.logits(*inputs).softmax(1)

    def logits(self, *inputs: Tensor) -> Tensor:
        """Logits (B, K) in float32, averaged over the views of test-time augmentation."""
        if self.tta == "none" or self.fitting:
            return self(*inputs).float()
        if len(inputs) != 1 or inputs[0].ndim != 4:
            raise UserError("test-time augmentation needs images; set tta to none for others.")
        (images,) = inputs
        weighted = [weight * self(view).float() for weight, view in views(images, self.tta)]
        return torch.stack(weighted).sum(0)


def views(images: Tensor, tta: TTA) -> list[tuple[float, Tensor]]:
    """Weighted views of images (B, C, H, W); the weights add up to one.

    ``mirror_translate`` is the six views of arXiv:2404.00498, section 3.5: the image and its shifts
    by one pixel up-left and down-right, half the weight on the unshifted one, each also mirrored.
    """
    parts = [(1.0, images)]
    if "translate" in tta:
        height, width = images.shape[2:]
        padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
        parts = [
            (0.5, images),
            (0.25, padded[:, :, :height, :width]),
            (0.25, padded[:, :, 2:, 2:]),
        ]
    if "mirror" in tta:
        parts = [(weight / 2, side) for weight, view in parts for side in (view, view.flip(3))]
    layout = torch.channels_last
    return [(weight, view.contiguous(memory_format=layout)) for weight, view in parts]
