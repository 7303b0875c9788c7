"""The images a classifier is most wrong about.

Dimensions: B batch, M mistakes kept, K classes, H height, W width, C channels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor

from callbacks.pictures.base import PictureCallback
from core.errors import UserError

COLUMNS = 5


class MostConfident:
    """The ``count`` mistakes with the highest probability, kept on the device and never read there.

    Args:
        count: Mistakes to keep (M).
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.kept: list[Tensor] = []  # images, target, preds, probability; each (M, ...)

    def update(self, images: Tensor, logits: Tensor, target: Tensor) -> None:
        """Look at one batch: images (B, C, H, W), logits (B, K) and target (B,)."""
        probability, preds = logits.float().softmax(1).max(1)
        probability = probability.nan_to_num(0.0)  # a network that diverged is not confident
        probability = torch.where(preds == target, -1.0, probability)  # below every mistake
        self.merge([images, target, preds, probability])

    def merge(self, candidates: list[Tensor]) -> None:
        """Keep the best of what was kept and of the candidates (any number, ...)."""
        if not self.kept:
            # free slots look like right answers; full from the start, all ranks keep equally many
            self.kept = [t.new_full((self.count, *t.shape[1:]), -1) for t in candidates]
        joined = [torch.cat(pair) for pair in zip(self.kept, candidates, strict=True)]
        best = joined[-1].topk(self.count).indices
        self.kept = [t[best] for t in joined]

    def found(self) -> list[Tensor]:
        """What is kept, the most probable first, on the CPU: the one read of the device."""
        images, target, preds, probability = (t.cpu() for t in self.kept)
        wrong = probability >= 0
        return [images[wrong], target[wrong], preds[wrong], probability[wrong]]


class Mistakes(PictureCallback):
    """Draw the most confident mistakes of ``test`` to ``mistakes.png``.

    It needs an image set and test steps that return ``logits`` (B, K); other data it
    leaves alone.

    Args:
        count: Mistakes to draw.
    """

    def __init__(self, count: int = 25) -> None:
        if count < 1:
            raise UserError(f"count must be at least 1, got {count}.")
        self.count = count
        self.mistakes = MostConfident(count)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.mistakes = MostConfident(self.count)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: list[Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.images is not None:
            images, target = batch
            self.mistakes.update(images, outputs["logits"], target)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = self.images
        if data is None or not self.mistakes.kept:
            return
        gathered = MostConfident(self.count)
        gathered.merge([of_all_ranks(t, trainer.world_size) for t in self.mistakes.kept])
        if not trainer.is_global_zero:
            return
        images, target, preds, probability = gathered.found()
        names = data.class_names
        figure = mistakes_sheet(
            data.denormalize(images).numpy(),
            [names[k] for k in target],
            [names[k] for k in preds],
            probability.tolist(),
        )
        self.save(trainer, "mistakes", figure)


def of_all_ranks(tensor: Tensor, world_size: int) -> Tensor:
    """Join the tensors (M, ...) of all ranks to (world_size * M, ...).

    Lightning's all_gather rests on a function that torch deprecates, and says so.
    """
    if world_size == 1:
        return tensor
    parts = list(tensor.new_empty(world_size, *tensor.shape))
    torch.distributed.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def mistakes_sheet(
    images: np.ndarray,
    true: Sequence[str],
    predicted: Sequence[str],
    probability: Sequence[float],
) -> Figure:
    """Draw images uint8 (M, H, W, C), each under the prediction and the true class."""
    rows = max(1, -(-len(images) // COLUMNS))
    figure = Figure(figsize=(1.8 * COLUMNS, 2.3 * rows + 0.4), layout="constrained")
    figure.suptitle("most confident mistakes" if len(images) else "no mistakes")
    grid = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, image, label, taken_for, p in zip(
        grid,
        images,
        true,
        predicted,
        probability,
        strict=False,  # the last row may not be full
    ):
        axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(f"{p:.1%} {taken_for}\ntrue: {label}", fontsize="medium")
    return figure
