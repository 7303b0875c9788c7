"""Grey handwritten digits: a set in the shape of MNIST that comes without a download."""

from typing import Any

import numpy as np
import torch

from datamodules.base import Tensors, digest
from datamodules.images.base import ImageDataModule
from datamodules.images.demo import HELD_OUT, handwriting, stretch, tents

FIELD, DIGIT = 28, 20  # sides in pixels; MNIST too has its digits in the middle 20 x 20


class DigitsDataModule(ImageDataModule):
    """The 1,797 handwritten digits of scikit-learn as grey images of 28 x 28, for quick tests.

    1,297 are for training and 500 for test and prediction, with the ids 1 to 500. They are the same
    bytes everywhere.

    Args:
        val_size: Training images kept for validation by one fixed split; 0 trains on all of them.
        mean: Mean of the channel, of pixels scaled to [0, 1].
        std: Standard deviation of the channel, likewise.
        options: What else :class:`ImageDataModule` takes.
    """

    class_names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    image_size = (FIELD, FIELD, 1)

    def __init__(
        self,
        val_size: int = 297,
        mean: tuple[float, ...] = (0.1560,),  # of the 1,297 training images
        std: tuple[float, ...] = (0.2690,),
        **options: Any,
    ) -> None:
        super().__init__(val_size=val_size, mean=mean, std=std, **options)

    def read_train(self) -> Tensors:
        return self.read(slice(None, -HELD_OUT))

    def read_test(self) -> Tensors:
        return self.read(slice(-HELD_OUT, None))

    def read(self, part: slice) -> Tensors:
        originals, targets = handwriting()
        images = torch.from_numpy(_enlarge(originals[part]))
        self.digest = digest(images)
        return images, torch.from_numpy(targets[part])


def _enlarge(originals: np.ndarray) -> np.ndarray:
    """Interpolate originals (N, 8, 8), ink from 0 to 16, to images (N, 28, 28, 1) uint8."""
    start, extent = np.array([(FIELD - DIGIT) // 2]), np.array([DIGIT])
    weights = tents(start, extent, originals.shape[1], FIELD)
    ink = stretch(16 * originals, weights, weights)  # whole numbers: the same bytes everywhere
    return np.minimum(ink, 255).astype(np.uint8)[..., None]
