"""Image sets on the resident loader: augmentation on whole batches, on the device.

Dimensions: N images, B batch, H height, W width, C channels. Images are kept as uint8 (N, H, W, C),
which is what a channels_last batch (B, C, H, W) looks like in memory.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from datamodules.base import BaseDataModule
from datamodules.resident import ResidentLoader, Stage
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

    Padded and mirrored images are resident too, so that a batch is one gather of windows of them.
    One table of uniform numbers (N, 5) per epoch decides the augmentation of every image: flip,
    crop row and column, cutout row and column. It is drawn on the CPU, so a GPU run and any number
    of processes see the same augmented images.
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
        **loader: Any,
    ) -> None:
        super().__init__([images, targets], **loader)
        _, height, width, self.channels = images.shape
        self.scale = (1 / (255 * std)).repeat(width).to(images.device)  # (W * C,)
        self.shift = (mean / std).repeat(width).to(images.device)
        self.crop = crop
        self.flip = flip
        self.cutout = cutout
        self.augmenting = self.stage == "train" and (crop > 0 or flip != "none" or cutout > 0)
        if self.augmenting:
            padded = reflect_pad(images, crop) if crop else images
            if flip != "none":
                padded = torch.cat([padded, padded.flip(2)])  # image i mirrored is N + i
            self.padded_size = padded.shape[1:3]
            self.windows = windows(padded, height, width)

    def begin_epoch(self, generator: torch.Generator) -> None:
        if not self.augmenting:
            return
        draws = torch.rand(self.samples, 5, generator=generator)
        if self.flip == "alternating":
            # a fair first epoch, then each image turns round every epoch (arXiv:2404.00498, 3.6)
            first = torch.rand(self.samples, generator=torch.Generator().manual_seed(self.seed))
            draws[:, 0] = (first + 0.5 * (self.epoch % 2)) % 1.0
        image = torch.arange(self.samples)
        if self.flip != "none":
            image += self.samples * (draws[:, 0] < 0.5)
        row, column = (draws[:, 1:3] * (2 * self.crop + 1)).long().unbind(1)
        height, width = self.padded_size
        self.starts = ((image * height + row) * width + column).to(self.device)
        self.centers = draws[:, 3:].to(self.device)

    def batch(self, index: Tensor) -> list[Tensor]:
        images, targets = self.tensors
        target = targets.index_select(0, index)
        if not self.augmenting:
            return [self.normalize(images.index_select(0, index).flatten(2)), target]
        # index_select copies whole rows; windows[...] would go value by value, 14 times slower
        batch = self.normalize(self.windows.index_select(0, self.starts[index]))
        if self.cutout:
            batch = cutout(batch, self.cutout, self.centers[index])
        return [batch, target]

    def normalize(self, rows: Tensor) -> Tensor:
        """uint8 (B, H, W * C) -> float32 (B, C, H, W) in channels_last.

        Rows are whole, because a loop over three channels takes a CPU seven times as long.
        """
        floats = rows.to(torch.float32).mul_(self.scale).sub_(self.shift)
        return floats.unflatten(2, (-1, self.channels)).permute(0, 3, 1, 2)


class ImageDataModule(BaseDataModule):
    """Images of ``num_classes`` kinds; a subclass reads them, this class serves them.

    Args:
        data_dir: Root folder of all data sets.
        batch_size: Images in a training batch of one process.
        eval_batch_size: Images in a batch of validation, test and prediction.
        val_size: Training images kept for validation by one fixed split; 0 trains on all of them.
        mean: Mean of each channel, of pixels scaled to [0, 1].
        std: Standard deviation of each channel, likewise.
        crop: Random crops from images padded by this many mirrored pixels.
        flip: Mirror left and right: never, at random, or at random once and then alternating.
        cutout: Side in pixels of a random square set to the mean; 0 leaves it out.
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
    ) -> None:
        super().__init__(data_dir, batch_size, eval_batch_size, val_size)
        channels = self.image_size[2]
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != channels:
                raise UserError(
                    f"{name} must have one value for each of the {channels} channels, got "
                    f"{list(values)}."
                )
        self.mean = torch.tensor(mean)
        self.std = torch.tensor(std)
        self.augmentation: dict[str, Any] = {"crop": crop, "flip": flip, "cutout": cutout}

    def make_loader(self, tensors: tuple[Tensor, ...], stage: Stage) -> ImageLoader:
        images, targets = tensors
        options = self.loader_arguments(stage) | (self.augmentation if stage == "train" else {})
        return ImageLoader(images, targets, mean=self.mean, std=self.std, **options)

    def denormalize(self, batch: Tensor) -> Tensor:
        """(B, C, H, W) as a network sees it -> uint8 (B, H, W, C) as a person does."""
        pixels = batch.permute(0, 2, 3, 1).float() * self.std.to(batch) + self.mean.to(batch)
        return (pixels * 255).round().clamp(0, 255).to(torch.uint8)
