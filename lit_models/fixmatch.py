"""Semi-supervised classification.

Dimensions: B labelled images, U unlabelled images, K classes, M members of an ensemble.
"""

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from core.errors import UserError
from datamodules.images.base import ImageDataModule
from datamodules.loaders.semi_supervised import SemiSupervisedLoader
from lit_models.classification import LitClassifier


class LitFixMatch(LitClassifier):
    """A few labelled images and many without: FixMatch (Sohn et al., arXiv:2001.07685).

    A confident prediction of a weakly augmented image is the target for a strongly augmented
    version of the same image (section 2.2). All images of a step pass the network
    together, so that batch normalisation sees both kinds, as in the paper's code. Each member of an
    Ensemble has its own opinions and learns from them alone.

    ``train/loss`` is the labelled part of the loss, ``train/consistency`` the unlabelled one, and
    ``train/confident`` the share of unlabelled images that have a target.

    Args:
        network: Maps images to logits (B, K).
        optimizer: Makes the optimizer from the trainable parameters.
        threshold: Probability from which on an opinion is a target.
        unlabelled_weight: Factor on the unlabelled part of the loss.
        **options: Those of LitClassifier.

    Raises:
        UserError: If an argument is out of range, or a training batch has no unlabelled images.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerCallable,
        threshold: float = 0.95,
        unlabelled_weight: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(network, optimizer, **options)
        if not 0 <= threshold <= 1:
            raise UserError(f"threshold must be in [0, 1], got {threshold}.")
        if not unlabelled_weight >= 0:
            raise UserError(f"unlabelled_weight must not be negative, got {unlabelled_weight}.")
        self.threshold = threshold
        self.unlabelled_weight = unlabelled_weight

    def setup(self, stage: str) -> None:
        if stage == "fit" and isinstance(self.datamodule, ImageDataModule):
            self.datamodule.unlabelled_loader = SemiSupervisedLoader
        super().setup(stage)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if len(batch) != 4:
            raise UserError(
                "LitFixMatch needs unlabelled images; set --data.unlabelled=N and a "
                "--data.train_fraction below 1, or train a LitClassifier."
            )
        images, weak, strong, target = batch  # (B, ...), (U, ...), (U, ...), (B,)
        together = torch.cat([images, weak, strong])
        logits = self(together).unflatten(0, (-1, len(together)))  # (M, B + 2 U, K)
        members = len(logits)
        parts = logits.split([len(images), len(weak), len(strong)], dim=1)
        labelled, opinion, answer = (part.flatten(0, 1) for part in parts)  # (M * B, K), ...

        if members > 1:
            target = target.repeat(members)
        loss = F.cross_entropy(labelled, target, label_smoothing=self.label_smoothing)
        probability, pseudo_label = opinion.detach().softmax(1).max(1)
        confident = (probability >= self.threshold).float()
        consistency = (F.cross_entropy(answer, pseudo_label, reduction="none") * confident).mean()

        self.record(
            loss=loss.detach(),
            accuracy=(labelled.argmax(1) == target).float().mean(),
            consistency=consistency.detach(),
            confident=confident.mean(),
        )
        return self.objective(loss + self.unlabelled_weight * consistency, members)
