"""Labelled images, each with some of which nobody tells the label.

Dimensions: B labelled images, U unlabelled ones with each, M of them in all; C channels, H height,
W width.
"""

from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.loaders.images import ImageLoader


class SemiSupervisedLoader(ImageLoader):
    """Labelled images, and in each batch more of which nobody tells the label.

    A batch is ``[images, weak, strong, target]``: labelled images (B, C, H, W), augmented; U * B
    others without augmentation; the same ones augmented; the labels (B,) of the first. The others
    come in an order of their own, pass after pass, as many as an epoch needs.

    Args:
        images: Labelled images.
        targets: Their labels.
        unlabelled: The others (M, H, W, C).
        ratio: How many of them come with each labelled one, U.
        options: What :class:`ImageLoader` takes.
    """

    def __init__(
        self, images: Tensor, targets: Tensor, *, unlabelled: Tensor, ratio: int, **options: Any
    ) -> None:
        super().__init__(images, targets, **options)
        size = ratio * self.batch_size
        others = {
            "batch_size": size,
            "epoch_size": size * self.world_size * len(self),
            "seed": int(np.random.SeedSequence((self.seed, 0, 1)).generate_state(1)[0]),
        }
        numbers = torch.arange(len(unlabelled), device=unlabelled.device)  # in place of labels
        self.others = ImageLoader(unlabelled, numbers, **{**options, **others})

    def move_to(self, device: torch.device, *, fits: bool) -> None:
        super().move_to(device, fits=fits)
        self.others.move_to(device, fits=fits)

    def resident_bytes(self) -> int:
        return super().resident_bytes() + self.others.resident_bytes()

    def batch_indices(self) -> Sequence[Any]:
        """Indices of this process's labelled (B,) and other images (U * B,) of every batch."""
        self.others = copy(self.others)  # a copy of this loader must not draw for the original
        self.others.set_epoch(self.epoch)
        return list(
            zip(super().batch_indices()[: len(self)], self.others.batch_indices(), strict=True)
        )

    def rows(self, batch_idx: int) -> list[int]:
        """Those of the labelled images, then of the others, which count on after them."""
        others = [self.samples + row for row in self.others.rows(batch_idx)]
        return super().rows(batch_idx) + others

    def gather(self, index: Any) -> list[Tensor]:
        labelled, other = index
        plain = self.take(self.others.tensors[0], self.others.sample(other))
        return [plain, *self.others.gather(other), *super().gather(labelled)]

    def transform(self, index: Any, rows: list[Tensor]) -> list[Tensor]:
        labelled, other = index
        weak = self.normalize(rows[0].flatten(2))
        strong, _ = self.others.transform(other, rows[1:3])
        images, target = super().transform(labelled, rows[3:])
        return [images, weak, strong, target]
