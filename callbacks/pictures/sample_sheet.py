"""A look at the training images before training starts.

Dimensions: N images, K classes, V images of each class, H height, W width, C channels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor

from callbacks.pictures.base import PictureCallback

_GAP = 2  # white pixels between images


class SampleSheet(PictureCallback):
    """Draw images of every class, as they are stored and as the network sees them.

    Written to ``sample_sheet.png`` when ``fit`` starts. Other data than images it leaves alone. The
    augmentation is drawn by a small loader of its own, so training goes on as it would without.
    """

    per_class = 6  # images

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = self.images
        if not trainer.is_global_zero or data is None:
            return
        classes, index = from_each_class(data.splits["train"][-1], self.per_class)
        names = [data.class_names[k] for k in classes]
        self.save(trainer, "sample_sheet", sample_sheet(*seen_by_network(data, index), names))


def from_each_class(targets: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Choose ``count`` samples of each class that occurs in targets (N,), spread over the set.

    Returns:
        The classes (K,) and the samples' indices (K, V), repeated where a class has fewer.
    """
    classes = targets.unique()
    members = [(targets == k).nonzero()[:, 0] for k in classes]
    return classes, torch.stack([m[torch.arange(count) * len(m) // count] for m in members])


def seen_by_network(data: Any, index: Tensor) -> tuple[Tensor, Tensor]:
    """Training images of an image set, stored and augmented, both uint8 (*index.shape, H, W, C)."""
    images, targets = (tensor[index.flatten()] for tensor in data.splits["train"])
    loader = data.make_loader((images, targets), "train")
    loader.begin_epoch(loader.generator())
    augmented = data.denormalize(loader.batch(torch.arange(len(images)))[0])
    return images.unflatten(0, index.shape), augmented.unflatten(0, index.shape)


def sample_sheet(stored: Tensor, augmented: Tensor, class_names: Sequence[str]) -> Figure:
    """Draw images uint8 (K, V, H, W, C), a row for each class, stored ones at the left."""
    rows, columns, height = stored.shape[:3]
    figure = Figure(figsize=(1.5 + 1.2 * columns, 0.8 + 0.6 * rows), layout="constrained")
    blocks = {"as stored": stored, "as the network sees them": augmented}
    for axes, (title, images) in zip(
        figure.subplots(1, 2, sharey=True), blocks.items(), strict=True
    ):
        axes.imshow(mosaic(images), interpolation="nearest")
        axes.set_title(title)
        axes.set_xticks([])
        axes.set_yticks(np.arange(rows) * (height + _GAP) + height / 2, class_names)
        axes.tick_params(length=0, labelsize="large")
        axes.spines[:].set_visible(False)
    return figure


def mosaic(images: Tensor) -> np.ndarray:
    """Lay out images (K, V, H, W, C), of one channel or three, as a single one on white."""
    colour = images.expand(*images.shape[:-1], 3)
    padded = np.pad(
        colour.numpy(), ((0, 0), (0, 0), (0, _GAP), (0, _GAP), (0, 0)), constant_values=255
    )
    rows, columns, height, width, _ = padded.shape
    return padded.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)
