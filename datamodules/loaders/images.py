"""Images on the resident loader: augmentation on whole batches, on the device.

Dimensions: N images, B batch, H height, W width, C channels. Images are kept as uint8 (N, H, W, C),
which is what a channels_last batch (B, C, H, W) looks like in memory.
"""

import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from datamodules.images.augmentation import Augmentation
from datamodules.loaders.resident import ResidentLoader


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
    has P * N rows. The effects between crop and cutout have a second table. Both are drawn on the
    CPU, so a GPU run and any number of processes see the same augmented images.
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        *,
        mean: Tensor,
        std: Tensor,
        augmentation: Augmentation | None = None,
        **loader: Any,
    ) -> None:
        super().__init__([images, targets], **loader)
        _, self.height, self.width, self.channels = images.shape
        self.scale = (1 / (255 * std)).repeat(self.width).to(images.device)  # (W * C,)
        self.shift = (mean / std).repeat(self.width).to(images.device)
        self.augmentation = augmentation or Augmentation()
        self.effects = self.augmentation.effects
        self.augmenting = self.stage == "train" and bool(augmentation)
        self.num_views = (
            1 if self.augmentation.flip == "none" else 2
        )  # of an image: as it is, and mirrored
        border = 2 * self.augmentation.crop
        self.padded_size = self.height + border, self.width + border

    def move_to(self, device: torch.device, *, fits: bool) -> None:
        super().move_to(device, fits=fits)
        self.scale, self.shift = self.scale.to(device), self.shift.to(device)

    def resident_bytes(self) -> int:
        copies = self.num_views * math.prod(self.padded_size) / (self.height * self.width)
        return super().resident_bytes() + round(self.augmenting * copies * self.tensors[0].nbytes)

    def padded(self, images: Tensor) -> Tensor:
        """Pad images and put its mirror image after each: (N, H, W, C) -> (num_views * N, ...)."""
        if self.augmentation.crop:
            images = reflect_pad(images, self.augmentation.crop)
        if self.num_views == 2:
            images = torch.stack([images, images.flip(2)], 1).flatten(0, 1)
        return images

    @cached_property
    def windows(self) -> Tensor:
        """Every window of all padded images."""
        return windows(self.padded(self.tensors[0]), self.height, self.width)

    def begin_epoch(self, generator: torch.Generator) -> None:
        if not self.augmenting:
            return
        rows = self.repeats * self.samples
        draws = torch.rand(rows, 5, generator=generator)
        if self.augmentation.flip == "alternating":
            # a fair first pass, then each image turns round every time (arXiv:2404.00498, 3.6)
            first = torch.rand(self.samples, generator=torch.Generator().manual_seed(self.seed))
            turns = self.epoch * self.repeats + torch.arange(self.repeats)
            draws[:, 0] = ((first + 0.5 * (turns[:, None] % 2)) % 1.0).flatten()
        image = torch.arange(rows) % self.samples * self.num_views
        if self.augmentation.flip != "none":
            image += draws[:, 0] < 0.5
        row, column = (draws[:, 1:3] * (2 * self.augmentation.crop + 1)).long().unbind(1)
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
        pixels = images if self.copies_to is None else self.crops(index, images)
        if self.effects:
            parameters = self.on_device(self.parameters[index])
            pixels = self.effects(self.planes(pixels / 255), parameters)
            pixels = pixels.permute(0, 2, 3, 1).flatten(2) * 255
        batch = self.normalize(pixels)
        if size := self.augmentation.cutout:
            batch = cutout(batch, size, self.on_device(self.centers[index]))
        return [batch, target]

    def crops(self, index: Tensor, images: Tensor) -> Tensor:
        """The windows (B, H, W * C) of images (B, H, W, C) that were gathered as they are kept."""
        places = torch.arange(len(index)) - self.sample(index)  # of a batch instead of the whole
        starts = self.starts[index] + places * self.num_views * math.prod(self.padded_size)
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
