"""Image sets on the resident loader: augmentation on whole batches, on the device.

Dimensions: N images, B batch, H height, W width, C channels. Images are kept as uint8 (N, H, W, C),
which is what a channels_last batch (B, C, H, W) looks like in memory.
"""

import math
from collections.abc import Sequence
from copy import copy
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from datamodules.augment import Effects
from datamodules.base import BaseDataModule
from datamodules.resident import ResidentLoader, Stage
from datamodules.trivial_augment import TrivialAugment
from errors import UserError

Flip = Literal["none", "random", "alternating"]


def reflect_pad(images: Tensor, border: int) -> Tensor:
    """(N, H, W, C) -> (N, H + 2 border, W + 2 border, C), mirrored at the edges, any dtype."""
    for axis in (1, 2):
        size = images.shape[axis]
        source = torch.arange(-border, size + border).abs()
        source = torch.where(source < size, source, 2 * (size - 1) - source)
        images = images.index_select(axis, source.to(images.device))
    return images


def windows(images: Tensor, height: int, width: int) -> Tensor:
    """Every window of contiguous images (N, H, W, C), as a view (P, height, width * C).

    Window p starts at pixel p, counted through all images row by row. The numbers in between belong
    to windows that reach over an edge; nobody asks for those.
    """
    _, _, row, channels = images.shape
    extent = ((height - 1) * row + width) * channels  # from its first value to its last
    count = (images.numel() - extent) // channels + 1
    return images.as_strided((count, height, width * channels), (channels, row * channels, 1))


def balanced_order(targets: Tensor) -> Tensor:
    """Numbers (N,) of the samples with classes (N,), so that the classes take turns.

    Within a class the order is random, by a seed that is always the same.
    """
    shuffled = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    classes, by_class = targets[shuffled].sort(stable=True)
    counts = classes.bincount()
    turn = torch.arange(len(targets)) - (counts.cumsum(0) - counts)[classes]
    return shuffled[by_class[(turn * len(counts) + classes).argsort()]]


def cutout(images: Tensor, size: int, centers: Tensor) -> Tensor:
    """Set a square of ``size`` pixels to the mean (DeVries and Taylor, arXiv:1708.04552), in place.

    Args:
        images: Normalised images (B, C, H, W).
        size: Side of the square in pixels; it may reach over the edge.
        centers: Row and column of each square as fractions (B, 2) in [0, 1).
    """
    height, width = images.shape[2:]
    top = (centers[:, 0] * height).floor() - size // 2
    left = (centers[:, 1] * width).floor() - size // 2
    rows = torch.arange(height, device=images.device) - top[:, None]  # (B, H)
    columns = torch.arange(width, device=images.device) - left[:, None]  # (B, W)
    inside_rows = (rows >= 0) & (rows < size)
    inside_columns = (columns >= 0) & (columns < size)
    return images.masked_fill_((inside_rows[:, :, None] & inside_columns[:, None, :])[:, None], 0.0)


class ImageLoader(ResidentLoader):
    """Resident images, augmented and normalised a batch at a time.

    Padded and mirrored images are resident too, so that a batch is one gather of windows of them;
    where they are too many for the device, a batch alone is padded and mirrored, when it is there.
    One table of uniform numbers (N, 5) per epoch decides the augmentation of every image: flip,
    crop row and column, cutout row and column. Where an epoch goes over the images in P passes, it
    has P * N rows. ``effects``, which come between crop and cutout, have a second table. Both are
    drawn on the CPU, so a GPU run and any number of processes see the same augmented images.
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        *,
        mean: Tensor,
        std: Tensor,
        crop: int = 0,
        flip: Flip = "none",
        cutout: int = 0,
        effects: Effects | TrivialAugment | None = None,
        **loader: Any,
    ) -> None:
        super().__init__([images, targets], **loader)
        _, self.height, self.width, self.channels = images.shape
        self.scale = (1 / (255 * std)).repeat(self.width).to(images.device)  # (W * C,)
        self.shift = (mean / std).repeat(self.width).to(images.device)
        self.crop = crop
        self.flip = flip
        self.cutout = cutout
        self.effects = effects or None
        changing = crop > 0 or flip != "none" or cutout > 0 or self.effects is not None
        self.augmenting = self.stage == "train" and changing
        self.sides = 1 if flip == "none" else 2
        self.padded_size = self.height + 2 * crop, self.width + 2 * crop

    def place(self, device: torch.device, *, fits: bool) -> None:
        super().place(device, fits=fits)
        self.scale, self.shift = self.scale.to(device), self.shift.to(device)

    def kept_bytes(self) -> int:
        copies = self.sides * math.prod(self.padded_size) / (self.height * self.width)
        return super().kept_bytes() + round(self.augmenting * copies * self.tensors[0].nbytes)

    def padded(self, images: Tensor) -> Tensor:
        """Padded images, each followed by its mirror image: (N, H, W, C) -> (sides * N, ...)."""
        if self.crop:
            images = reflect_pad(images, self.crop)
        if self.sides == 2:
            images = torch.stack([images, images.flip(2)], 1).flatten(0, 1)
        return images

    @cached_property
    def windows(self) -> Tensor:
        """Every window of all padded images."""
        return windows(self.padded(self.tensors[0]), self.height, self.width)

    def begin_epoch(self, generator: torch.Generator) -> None:
        if not self.augmenting:
            return
        rows = self.passes * self.samples
        draws = torch.rand(rows, 5, generator=generator)
        if self.flip == "alternating":
            # a fair first pass, then each image turns round every time (arXiv:2404.00498, 3.6)
            first = torch.rand(self.samples, generator=torch.Generator().manual_seed(self.seed))
            turns = self.epoch * self.passes + torch.arange(self.passes)
            draws[:, 0] = ((first + 0.5 * (turns[:, None] % 2)) % 1.0).flatten()
        image = torch.arange(rows) % self.samples * self.sides
        if self.flip != "none":
            image += draws[:, 0] < 0.5
        row, column = (draws[:, 1:3] * (2 * self.crop + 1)).long().unbind(1)
        height, width = self.padded_size
        self.starts = ((image * height + row) * width + column).to(self.device)
        self.centers = draws[:, 3:].to(self.device)
        if self.effects:
            draws = torch.rand(rows, self.effects.draws, generator=generator)
            self.parameters = self.effects.parameters(draws).to(self.device)

    def gather(self, index: Tensor) -> list[Tensor]:
        if not self.augmenting or self.copies_to is not None:
            return super().gather(index)
        # index_select copies whole rows; windows[...] would go value by value, 14 times slower
        rows = self.windows.index_select(0, self.starts[index])
        return [rows, self.tensors[1].index_select(0, self.sample(index))]

    def transform(self, index: Tensor, rows: list[Tensor]) -> list[Tensor]:
        images, target = rows
        if not self.augmenting:
            return [self.normalize(images.flatten(2)), target]
        pixels = images if self.copies_to is None else self.cropped(index, images)
        if self.effects:
            parameters = self.on_device(self.parameters[index])
            pixels = self.effects(self.planes(pixels / 255), parameters)
            pixels = pixels.permute(0, 2, 3, 1).flatten(2) * 255
        batch = self.normalize(pixels)
        if self.cutout:
            batch = cutout(batch, self.cutout, self.on_device(self.centers[index]))
        return [batch, target]

    def cropped(self, index: Tensor, images: Tensor) -> Tensor:
        """The windows (B, H, W * C) of images (B, H, W, C) that were gathered as they are kept."""
        places = torch.arange(len(index)) - self.sample(index)  # of a batch instead of the whole
        starts = self.starts[index] + places * self.sides * math.prod(self.padded_size)
        every = windows(self.padded(images), self.height, self.width)
        return every.index_select(0, self.on_device(starts))

    def normalize(self, rows: Tensor) -> Tensor:
        """Pixels from 0 to 255 (B, H, W * C) -> float32 (B, C, H, W) in channels_last.

        Rows are whole, because a loop over three channels takes a CPU seven times as long.
        """
        return self.planes(rows.to(torch.float32).mul_(self.scale).sub_(self.shift))

    def planes(self, rows: Tensor) -> Tensor:
        """(B, H, W * C) -> (B, C, H, W), a view."""
        return rows.unflatten(2, (-1, self.channels)).permute(0, 3, 1, 2)


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

    def place(self, device: torch.device, *, fits: bool) -> None:
        super().place(device, fits=fits)
        self.others.place(device, fits=fits)

    def kept_bytes(self) -> int:
        return super().kept_bytes() + self.others.kept_bytes()

    def shares(self) -> Sequence[Any]:
        """Indices of this process's labelled (B,) and other images (U * B,) of every batch."""
        self.others = copy(self.others)  # a copy of this loader must not draw for the original
        self.others.set_epoch(self.epoch)
        return list(zip(super().shares()[: len(self)], self.others.shares(), strict=True))

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


class ImageDataModule(BaseDataModule):
    """Images of ``num_classes`` kinds; a subclass reads them, this class serves them.

    Args:
        data_dir: Root folder of all data sets.
        batch_size: Images in a training batch of one process.
        eval_batch_size: Images in a batch of validation, test and prediction.
        val_size: Training images kept for validation by one fixed split; 0 trains on all of them.
        mean: Mean of each channel, of pixels scaled to [0, 1].
        std: Standard deviation of each channel, likewise.
        crop: Random crops from images padded by this many mirrored pixels, fewer than a side has.
        flip: Mirror left and right: never, at random, or at random once and then alternating.
        cutout: Side in pixels of a random square set to the mean; 0 leaves it out.
        rotate: Largest angle in degrees by which images are turned, either way; 10 to 15 is usual.
        scale: Largest relative change of size; 0.1 is usual.
        shear: Largest angle in degrees by which images are slanted; 5 to 10 is usual.
        elastic: Standard deviation in pixels of the displacements of 4 x 4 control points, between
            which images bend; 1 suits digits of 28 x 28, and 2 makes some of them hard to read.
        brightness: Largest relative change of all pixels; 0.2 to 0.4 is usual, as for the next two.
        contrast: Largest relative change of the distance from the image's mean grey.
        saturation: Largest relative change of the distance from grey.
        hue: Largest turn of the hue in HSV, either way, where 0.5 is half of the circle; 0.05 to
            0.1 is usual.
        blur: Largest standard deviation in pixels of a Gaussian blur; it is drawn from 0.1 up, and
            1 is usual.
        trivial: Change each image in one of 14 ways at random (:class:`TrivialAugment`), instead of
            the nine settings above.
        train_fraction: Share of the training part that is trained on: the first of one fixed order
            in which the classes take turns, so that 20 % is contained in 50 %.
        epoch_size: Training images in an epoch; by default each one once. Where there are fewer,
            they come again and again, augmented anew, so that any ``train_fraction`` has the same
            number of optimizer steps and validations.
        unlabelled: Images without label in a training batch for each labelled one, from what
            ``train_fraction`` leaves out. The batch is ``[images, weak, strong, target]`` then, see
            :class:`SemiSupervisedLoader`.
    """

    image_size: tuple[int, int, int] = (32, 32, 3)  # (H, W, C)

    def __init__(
        self,
        data_dir: str = "data",
        batch_size: int = 512,
        eval_batch_size: int = 1000,
        val_size: int = 5000,
        mean: tuple[float, ...] = (0.4914, 0.4822, 0.4465),
        std: tuple[float, ...] = (0.2470, 0.2435, 0.2616),
        crop: int = 0,
        flip: Flip = "none",
        cutout: int = 0,
        rotate: float = 0.0,
        scale: float = 0.0,
        shear: float = 0.0,
        elastic: float = 0.0,
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
        hue: float = 0.0,
        blur: float = 0.0,
        trivial: bool = False,
        train_fraction: float = 1.0,
        epoch_size: int | None = None,
        unlabelled: int = 0,
    ) -> None:
        super().__init__(data_dir, batch_size, eval_batch_size, val_size)
        if not 0 < train_fraction <= 1:
            raise UserError(
                f"train_fraction must be above 0 and at most 1, got {train_fraction}; 1 trains on "
                "all images."
            )
        if epoch_size is not None and epoch_size < 1:
            raise UserError(f"epoch_size must be at least 1, got {epoch_size}.")
        if unlabelled < 0:
            raise UserError(f"unlabelled must not be negative, got {unlabelled}.")
        channels = self.image_size[2]
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != channels:
                raise UserError(
                    f"{name} must have one value for each of the {channels} channels, got "
                    f"{list(values)}."
                )
        self.mean = torch.tensor(mean)
        self.std = torch.tensor(std)
        largest = min(self.image_size[:2]) - 1  # the edge itself is not mirrored
        if not 0 <= crop <= largest:
            raise UserError(
                f"crop must be from 0 to {largest}, got {crop}; mirrored pixels can pad an image "
                "by at most its smaller side - 1."
            )
        if cutout < 0:
            raise UserError(f"cutout must not be negative, got {cutout}; 0 leaves it out.")
        effects = Effects(
            rotate, scale, shear, elastic, brightness, contrast, saturation, hue, blur
        )
        if channels != 3 and (saturation or hue):
            raise UserError(
                f"saturation and hue need images of 3 channels, these have {channels}; leave them "
                "out."
            )
        if trivial and effects:
            raise UserError("trivial takes the place of rotate to blur; leave one of them out.")
        self.augmentation: dict[str, Any] = {
            "crop": crop,
            "flip": flip,
            "cutout": cutout,
            "effects": TrivialAugment() if trivial else effects,
        }
        self.train_fraction = train_fraction
        self.epoch_size = epoch_size
        self.unlabelled = unlabelled

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage in ("fit", "validate") and self.train_fraction < 1:
            images, targets = self.splits["train"]
            order = balanced_order(targets)
            count = max(1, round(self.train_fraction * len(order)))
            self.splits["train"] = images[order[:count]], targets[order[:count]]
            if self.unlabelled:
                self.splits["unlabelled"] = (images[order[count:]],)

    def loader_arguments(self, stage: Stage) -> dict[str, Any]:
        arguments = super().loader_arguments(stage) | {"mean": self.mean, "std": self.std}
        if stage == "train":
            arguments |= {"epoch_size": self.epoch_size, **self.augmentation}
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
        options = self.loader_arguments(stage) | {"unlabelled": unlabelled}
        images, targets = self.splits[split]
        loader = SemiSupervisedLoader(images, targets, ratio=self.unlabelled, **options)
        return loader.to(self.device)

    def denormalize(self, batch: Tensor) -> Tensor:
        """(B, C, H, W) as a network sees it -> uint8 (B, H, W, C) as a person does."""
        pixels = batch.permute(0, 2, 3, 1).float() * self.std.to(batch) + self.mean.to(batch)
        return (pixels * 255).round().clamp(0, 255).to(torch.uint8)
