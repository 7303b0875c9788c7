"""Classification of mixed images. Dimensions: B batch, K classes, M members of an ensemble."""

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from core.errors import UserError
from lit_models.classification import LitClassifier


class LitCutMix(LitClassifier):
    """Images with one label each, some of them mixed: CutMix (Yun et al., arXiv:1905.04899).

    ``train/loss`` and ``train/accuracy`` are against the first image's label alone, and so look
    worse.

    Args:
        network: Maps images to logits (B, K).
        optimizer: Makes the optimizer from the trainable parameters.
        cutmix: Share of the training batches in which a rectangle of every image is another
            image's, and the target likewise shared.
        **options: Those of LitClassifier.

    Raises:
        UserError: ``cutmix`` is out of range, or the batches are no images with one label each.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerCallable,
        cutmix: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(network, optimizer, **options)
        if not 0 <= cutmix <= 1:
            raise UserError(f"cutmix must be in [0, 1], got {cutmix}; 0 is without.")
        self.cutmix = cutmix

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if len(batch) != 2 or batch[0].ndim != 4 or batch[1].ndim != 1:
            raise UserError("LitCutMix needs images with one label each; train a LitClassifier.")
        images, target = batch
        images, kept = cutmix(images, self.cutmix)
        logits = self(images)  # (M * B, K)
        members = len(logits) // len(target)
        target = target.repeat(members)
        own, other = (
            F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
            for labels in (target, _partners(target))
        )
        self.record(loss=own.detach(), accuracy=(logits.argmax(1) == target).float().mean())
        return self.objective(torch.lerp(other, own, kept), members)


def _partners(batch: Tensor) -> Tensor:
    """Another sample for each; batches are in random order already."""
    return batch.flip(0)


def cutmix(images: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    """Put the same rectangle of its partner into every image of a batch, or of none (CutMix).

    The rectangle has the image's proportions; the share of the image that is kept is drawn evenly,
    and so is the centre (arXiv:1905.04899, section 3.1). All is drawn on the device of the images.

    Args:
        images: Images (B, C, H, W).
        probability: Of mixing this batch at all.

    Returns:
        The images and the share () that each of them has kept.
    """
    height, width = images.shape[2:]
    draw, share, y, x = torch.rand(4, device=images.device).unbind()
    half = (1 - share).sqrt() / 2 * (draw < probability)  # of a side, as a fraction
    rows = torch.arange(height, device=images.device) + 0.5 - y * height
    columns = torch.arange(width, device=images.device) + 0.5 - x * width
    inside = (rows.abs() < half * height)[:, None] & (columns.abs() < half * width)
    return torch.where(inside, _partners(images), images), 1 - inside.float().mean()
