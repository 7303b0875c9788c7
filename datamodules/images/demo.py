"""Handwritten digits in colour: a set in the shape of CIFAR-10 that comes without a download.

Dimensions: N images, S side of an image in pixels, P points along a side of what is drawn.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from core.errors import UserError
from core.sample_file import SampledSubmission
from core.submission import Submission
from datamodules.base import Tensors, digest
from datamodules.images.base import ImageDataModule

_SIDE = 32
HELD_OUT = 500  # originals that only test and prediction see
COPIES = 6  # drawings of each of the other 1,297

_Randint = Callable[..., np.ndarray]  # of low, high and size, as numpy's


class DemoDataModule(ImageDataModule):
    """The 1,797 handwritten digits of scikit-learn, drawn in colour on textured backgrounds.

    Ten classes of 32 x 32 colour images: 7,782 for training and 500 for test and prediction, with
    the ids 1 to 500. They are drawn, not read, and the same bytes everywhere. All drawings of one
    original fall into the same split.

    Args:
        val_size: Training images kept for validation by one fixed split; 0 trains on all of them.
        mean: Mean of each channel, of pixels scaled to [0, 1].
        std: Standard deviation of each channel, likewise.
        options: What else :class:`ImageDataModule` takes.
    """

    class_names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    copies = COPIES

    def __init__(
        self,
        val_size: int = 1000,
        mean: tuple[float, ...] = (0.3704, 0.3634, 0.3695),  # of the 7,782 training images
        std: tuple[float, ...] = (0.2207, 0.2202, 0.2201),
        **options: Any,
    ) -> None:
        super().__init__(val_size=val_size, mean=mean, std=std, **options)
        self.sample = self.data_dir / "demo" / "sample_submission.csv"

    def prepare_data(self) -> None:
        if not self.sample.exists():
            ids = np.arange(1, HELD_OUT + 1)
            Submission(self.class_names).write(self.sample, ids, np.zeros_like(ids))

    def submission(self) -> Submission:
        return SampledSubmission(self.class_names, self.sample)

    def read_train(self) -> Tensors:
        originals, targets = handwriting()
        # the drawings of an original lie side by side, which splits rely on
        drawn = np.arange(len(originals) - HELD_OUT).repeat(COPIES)
        return self.drawings(originals[drawn], targets[drawn], seed=0)

    def read_test(self) -> Tensors:
        originals, targets = handwriting()
        return self.drawings(originals[-HELD_OUT:], targets[-HELD_OUT:], seed=1)

    def drawings(self, originals: np.ndarray, targets: np.ndarray, seed: int) -> Tensors:
        images = torch.from_numpy(draw(originals, seed))
        self.digest = digest(images)
        return images, torch.from_numpy(targets)

    def split_by_size(self, samples: int) -> tuple[Tensor, Tensor]:
        """Numbers of training and validation images, which no seed changes.

        The last images are for validation. Of an original that the cut would tear in two, the
        drawings before the cut are left out.
        """
        cut = samples - self.val_size
        kept = cut - cut % COPIES
        if kept <= 0:
            raise UserError(
                f"val_size is {self.val_size}, but there are {samples} training images in all."
            )
        return torch.arange(kept), torch.arange(cut, samples)


def handwriting() -> tuple[np.ndarray, np.ndarray]:
    """The originals (N, 8, 8), ink from 0 to 16, and which digit each is (N,).

    Part of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, UCI, 1998).
    """
    from sklearn.datasets import load_digits  # a second of imports, for this set alone

    digits = load_digits()
    return digits.images, digits.target.astype(np.int64)


def draw(originals: np.ndarray, seed: int) -> np.ndarray:
    """Draw originals (N, 8, 8), each in a size, place and colours of its own.

    The bytes are the same everywhere: numpy never changes what RandomState draws (NEP 19), and
    all is computed in whole numbers, which float32 too holds exactly below 2^24.

    Returns:
        Images (N, S, S, 3) uint8.
    """
    randint = cast(_Randint, partial(np.random.RandomState(seed).randint, dtype=np.int16))
    count = len(originals)
    width, height = randint(16, 27, count), randint(18, 29, count)
    left, top = randint(0, _SIDE + 1 - width), randint(0, _SIDE + 1 - height)
    ink = stretch(originals, tents(top, height, 8), tents(left, width, 8))
    opacity = np.minimum(ink * 3 // 2, 16)[..., None]  # stretching thins the strokes out

    board = randint(0, 160, (count, 1, 1, 3))
    chalk = board + randint(48, 112, (count, 1, 1, 3))  # brighter, but not always by much
    for _ in range(2):
        grain = _noise(randint, count, 5) + _noise(randint, count, 16) // 2
        board = board + grain[..., None] * randint(-64, 65, (count, 1, 1, 3)) // 128
    return np.clip(board + (chalk - board) * opacity // 16, 0, 255).astype(np.uint8)


def _noise(randint: _Randint, count: int, points: int) -> np.ndarray:
    """Clouds (N, S, S) from -127 to 127, interpolated between ``points`` random values a side."""
    everywhere = tents(np.array([-2]), np.array([_SIDE + 4]), points)
    return stretch(randint(-127, 128, (count, points, points)), everywhere, everywhere)


def stretch(values: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Interpolate values (N, P, P) to (N, S, S) int16 with the weights of rows and columns."""
    exact = rows @ values.astype(np.float32) @ columns.transpose(0, 2, 1)  # in 64ths of 64ths
    return (exact.astype(np.int32) // 64**2).astype(np.int16)


def tents(start: np.ndarray, extent: np.ndarray, points: int, side: int = _SIDE) -> np.ndarray:
    """Weights (N, S, P), in 64ths, of linear interpolation between points that lie evenly.

    Args:
        start: First pixel (N,) of the stretch that the points fill.
        extent: Its length (N,) in pixels.
        points: Number of points P.
        side: Pixels S of a row.
    """
    centers = 2 * np.arange(side) + 1  # of the pixels, in half pixels
    from_start = centers - 2 * start.astype(np.int64)[:, None]
    place = 32 * points * from_start // extent[:, None] - 32  # of the pixels, in 64ths of a point
    distance = np.abs(place[..., None] - 64 * np.arange(points))
    return np.maximum(64 - distance, 0).astype(np.float32)
