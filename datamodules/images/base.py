"""Base of all image sets: a fixed split, parts of the training images, augmentation.

Dimensions: N images, B batch, H height, W width, C channels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from core.errors import UserError
from datamodules.base import BaseDataModule, Tensors, require_at_least
from datamodules.image_files.given_images import read_images
from datamodules.images.augmentation import Augmentation
from datamodules.loaders.images import ImageLoader
from datamodules.loaders.resident import ResidentLoader, Stage


def balanced_order(targets: Tensor) -> Tensor:
    """Numbers (N,) of the samples with classes (N,), so that the classes take turns.

    Within a class the order is random, by a seed that is always the same.
    """
    shuffled = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    classes, by_class = targets[shuffled].sort(stable=True)
    counts = classes.bincount()
    turn = torch.arange(len(targets)) - (counts.cumsum(0) - counts)[classes]
    return shuffled[by_class[(turn * len(counts) + classes).argsort()]]


class ImageDataModule(BaseDataModule):
    """Images of ``num_classes`` kinds; a subclass reads them, this class serves them.

    Args:
        val_size: Training images kept for validation by one fixed split; 0 trains on all of them.
        mean: Mean of each channel, of pixels scaled to [0, 1].
        std: Standard deviation of each channel, likewise.
        augmentation: Random changes of training images, such as ``crop`` and ``flip``.
        train_fraction: Share of the training part that is trained on: the first of one fixed order
            in which the classes take turns, so that 20 % is contained in 50 %.
        epoch_size: Training images in an epoch; by default each one once. Where there are fewer,
            they come again and again, augmented anew, so that any ``train_fraction`` has the same
            number of optimizer steps and validations.
        unlabelled: Images without label in a training batch for each labelled one, from what
            ``train_fraction`` leaves out, for a model that learns from them (``LitFixMatch``).
        options: What else :class:`BaseDataModule` takes.

    Attributes:
        unlabelled_loader: Makes the loader of labelled and unlabelled images, if the model has put
            one here.
    """

    image_size: tuple[int, int, int] = (32, 32, 3)  # (H, W, C)
    unlabelled_loader: Callable[..., ResidentLoader] | None = None

    def __init__(
        self,
        val_size: int = 5000,
        mean: tuple[float, ...] = (0.4914, 0.4822, 0.4465),
        std: tuple[float, ...] = (0.2470, 0.2435, 0.2616),
        augmentation: Augmentation = Augmentation(),  # noqa: B008  it is frozen
        train_fraction: float = 1.0,
        epoch_size: int | None = None,
        unlabelled: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(val_size=val_size, **options)
        if not 0 < train_fraction <= 1:
            raise UserError(
                f"train_fraction must be above 0 and at most 1, got {train_fraction}; 1 trains on "
                "all images."
            )
        require_at_least(1, epoch_size=epoch_size)
        require_at_least(0, unlabelled=unlabelled)
        channels = self.image_size[2]
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != channels:
                raise UserError(
                    f"{name} must have one value for each of the {channels} channels, got "
                    f"{list(values)}."
                )
        self.mean = torch.tensor(mean)
        self.std = torch.tensor(std)
        augmentation.check(*self.image_size)
        self.augmentation = augmentation
        self.train_fraction = train_fraction
        self.epoch_size = epoch_size
        self.unlabelled = unlabelled

    def read_predict(self) -> Tensors:
        """The test images, with the ids 1, 2, ..."""
        images, _ = self.read_test()
        return images, torch.arange(1, len(images) + 1)

    def read_given(self, given: Any) -> Tensors:
        """Images as uint8 (N, H, W, C): an array of such, or a list of paths or Pillow's images.

        Of others than this size the largest part of its proportions is cut out and scaled.
        """
        images = read_images(given, self.image_size)
        return images, torch.arange(len(images))

    def training_parts(self, train: Tensors) -> dict[str, Tensors]:
        if self.train_fraction == 1:
            return super().training_parts(train)
        images, targets, numbers = train
        order = balanced_order(targets)
        count = max(1, round(self.train_fraction * len(order)))
        parts: dict[str, Tensors] = {"train": tuple(t[order[:count]] for t in train)}
        if self.unlabelled:
            parts["unlabelled"] = images[order[count:]], numbers[order[count:]]
        return parts

    def loader_arguments(self, stage: Stage) -> dict[str, Any]:
        arguments = super().loader_arguments(stage) | {"mean": self.mean, "std": self.std}
        if stage == "train":
            arguments |= {"epoch_size": self.epoch_size, "augmentation": self.augmentation}
        return arguments

    def make_loader(self, tensors: tuple[Tensor, ...], stage: Stage) -> ImageLoader:
        images, targets = tensors
        return ImageLoader(images, targets, **self.loader_arguments(stage))

    def resident(self, split: str, stage: Stage) -> ResidentLoader:
        if split != "train" or not self.unlabelled:
            return super().resident(split, stage)
        (unlabelled,) = self.splits.get("unlabelled", (torch.empty(0),))
        if not len(unlabelled):
            raise UserError(
                f"unlabelled is {self.unlabelled}, but train_fraction {self.train_fraction} leaves "
                "no image out; lower it."
            )
        if self.unlabelled_loader is None:
            raise UserError(
                f"unlabelled is {self.unlabelled}, but the model learns from labelled images "
                "alone; set --model=LitFixMatch, or leave unlabelled out."
            )
        options = self.loader_arguments(stage) | {"unlabelled": unlabelled}
        images, targets = self.splits[split]
        loader = self.unlabelled_loader(images, targets, ratio=self.unlabelled, **options)
        return loader.to(self.device)

    def denormalize(self, batch: Tensor) -> Tensor:
        """(B, C, H, W) as a network sees it -> uint8 (B, H, W, C) as a person does."""
        pixels = batch.permute(0, 2, 3, 1).float() * self.std.to(batch) + self.mean.to(batch)
        return (pixels * 255).round().clamp(0, 255).to(torch.uint8)
