"""Single-label classification. Dimensions: B batch, K classes."""

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

from errors import UserError
from lit_models.base import LitModel

TTA = Literal["none", "mirror", "mirror_translate"]


class LitClassifier(LitModel):
    """Inputs in, one of ``num_classes`` out.

    Args:
        network: Maps the inputs to logits (B, K).
        optimizer: Makes the optimizer from the trainable parameters.
        num_classes: Number of classes K.
        lr_scheduler: Makes the schedule from the optimizer.
        label_smoothing: Share of the target probability spread over all classes, in training.
        tta: Test-time augmentation of images in ``validate``, ``test`` and prediction: logits are
            averaged over the mirrored image, and over translations by a pixel. The validation
            inside ``fit`` does without, because it would cost as much as training.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerCallable,
        num_classes: int = 10,
        lr_scheduler: LRSchedulerCallable | None = None,
        label_smoothing: float = 0.0,
        tta: TTA = "none",
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
        super().__init__(network, optimizer, lr_scheduler, MetricCollection(metrics))
        if not 0 <= label_smoothing < 1:
            raise UserError(f"label_smoothing must be in [0, 1), got {label_smoothing}.")
        if tta not in get_args(TTA):
            raise UserError(f"tta must be one of {', '.join(get_args(TTA))}, got {tta!r}.")
        self.label_smoothing = label_smoothing
        self.tta = tta

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        *inputs, target = batch
        logits = self(*inputs)  # (B, K)
        loss = F.cross_entropy(logits, target, label_smoothing=self.label_smoothing)
        correct = (logits.argmax(1) == target).float().mean()
        self.record(loss=loss.detach(), accuracy=correct)
        return loss

    def evaluation_step(self, batch: list[Tensor]) -> dict[str, Tensor]:
        *inputs, target = batch
        logits = self.logits(*inputs)
        loss = F.cross_entropy(logits, target)
        return {"loss": loss, "logits": logits, "preds": logits.softmax(1)}

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> tuple[Tensor, Tensor]:
        """Ids (B,) and class probabilities (B, K) of one batch."""
        *inputs, ids = batch
        return ids, self.logits(*inputs).softmax(1)

    def logits(self, *inputs: Tensor) -> Tensor:
        """Logits (B, K) in float32, averaged over the views of test-time augmentation."""
        if self.tta == "none" or self.trainer.state.fn == "fit":
            return self(*inputs).float()
        (images,) = inputs
        weighted = [weight * self(view).float() for weight, view in views(images, self.tta)]
        return torch.stack(weighted).sum(0)


def views(images: Tensor, tta: TTA) -> list[tuple[float, Tensor]]:
    """Weighted views of images (B, C, H, W); the weights add up to one.

    ``mirror_translate`` is the six views of arXiv:2404.00498, section 3.5: the image and its shifts
    by one pixel up-left and down-right, half the weight on the unshifted one, each also mirrored.
    """
    shifts = [(1.0, images)]
    if tta == "mirror_translate":
        height, width = images.shape[2:]
        padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
        shifts = [
            (0.5, images),
            (0.25, padded[:, :, :height, :width]),
            (0.25, padded[:, :, 2:, 2:]),
        ]
    layout = torch.channels_last
    return [
        (weight / 2, view.contiguous(memory_format=layout))
        for weight, shifted in shifts
        for view in (shifted, shifted.flip(3))
    ]
