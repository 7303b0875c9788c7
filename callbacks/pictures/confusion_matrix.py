"""Confusion matrix of validation and test. Dimensions: B batch, K classes."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from callbacks.pictures.base import PictureCallback
from core.files import atomic_write

READABLE = 20  # classes; with more of them the numbers would overlap


class ConfusionMatrix(PictureCallback):
    """Count the predictions of ``test`` and ``validate`` by true and predicted class.

    Written to ``confusion_matrix_test`` or ``confusion_matrix_val``, as PNG and as CSV. It needs a
    datamodule with ``class_names`` and steps that return ``logits`` (B, K); else it does nothing.
    The validation inside ``fit`` goes uncounted.
    """

    def __init__(self) -> None:
        self.counts: Tensor | None = None  # (K * K,), while a test or a validation runs
        self.class_names: tuple[str, ...] = ()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.class_names = getattr(self.data, "class_names", ())
        if self.class_names:
            size = len(self.class_names) ** 2
            self.counts = torch.zeros(size, dtype=torch.long, device=pl_module.device)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any, **__: Any
    ) -> None:
        if self.counts is not None:
            # not by torch.bincount, as torchmetrics does: on a GPU it reads the device twice
            cells = outputs["target"] * len(self.class_names) + outputs["logits"].argmax(1)
            self.counts.scatter_add_(0, cells, torch.ones_like(cells))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.finish(trainer, "test")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self.on_test_start(trainer, pl_module)

    on_validation_batch_end = on_test_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.finish(trainer, "val")

    def finish(self, trainer: Trainer, split: str) -> None:
        """Add up the counts of all ranks; the first one writes them."""
        if self.counts is None:
            return
        table = self.counts.reshape(len(self.class_names), -1)
        counts = trainer.strategy.reduce(table, reduce_op="sum").cpu().numpy()
        self.counts = None
        if trainer.is_global_zero and self.folder is not None:
            name = f"confusion_matrix_{split}"
            _write_table(self.folder / f"{name}.csv", counts, self.class_names)
            self.save(trainer, name, confusion_matrix(counts, self.class_names))


def _write_table(path: Path, counts: np.ndarray, class_names: Sequence[str]) -> None:
    """Write counts (K, K) with the predicted classes in the header, the true ones at the left."""
    with atomic_write(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["true/predicted", *class_names])
        writer.writerows([name, *row] for name, row in zip(class_names, counts, strict=True))


def confusion_matrix(counts: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Draw counts (K, K), coloured by the share of the true class that each cell holds."""
    size = len(class_names)
    side = np.clip(0.6 * size, 4, 14)
    figure = Figure(figsize=(side + 2.2, side + 1), layout="constrained")
    axes = figure.subplots()
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    # the square root shows the few percent of a mistake beside the many of the diagonal
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1))
    bar = figure.colorbar(image, label="share of the true class", shrink=0.8)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1))
    crowded = size > READABLE
    axes.set_xticks(range(size), class_names, rotation=90 if crowded else 45)
    axes.set_yticks(range(size), class_names)
    for label in axes.get_xticklabels():  # the end of a slanted name belongs at its tick
        label.set(ha="right", va="center", rotation_mode="anchor")
    axes.tick_params(labelsize="xx-small" if crowded else "medium")
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(f"{counts.trace():,} of {counts.sum():,} right")
    if not crowded:
        for row, column in np.argwhere(counts):
            colour = "white" if shares[row, column] > 0.4 else "black"
            axes.text(column, row, counts[row, column], ha="center", va="center", color=colour)
    return figure
