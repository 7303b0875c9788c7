"""Images of any data set of torch. Dimensions: N images, H height, W width, C channels."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import Dataset

from core.errors import UserError
from datamodules.base import Tensors, digest
from datamodules.image_files.given_images import read_images
from datamodules.images.base import ImageDataModule


class TorchDatasetDataModule(ImageDataModule):
    """Images and their classes from any ``torch.utils.data.Dataset``, torchvision's or an own one.

    ``dataset[i]`` is an image and the number of its class. The image is Pillow's, an array (H, W,
    C) or (H, W) of uint8, or a tensor (C, H, W) with values from 0 to 1. All are read once and kept
    as bytes, so crops, flips and normalization are settings here, not transforms of the data set.
    Predicting runs over the test set with the ids 0, 1, ...

    Args:
        train: Makes the training set.
        test: Makes the test set; null goes without.
        val: Makes the validation set; null keeps ``val_size`` training images, or a fold, for it.
        image_size: Height, width and channels, 1 or 3; other images are cropped and scaled.
        class_names: The classes; null takes the ``classes`` of the training set. A checkpoint knows
            them.
        options: What :class:`ImageDataModule` takes.
    """

    finds_classes = True

    def __init__(
        self,
        train: Callable[[], Dataset],
        test: Callable[[], Dataset] | None = None,
        val: Callable[[], Dataset] | None = None,
        image_size: tuple[int, int, int] = (32, 32, 3),
        class_names: list[str] | None = None,
        **options: Any,
    ) -> None:
        self.image_size = image_size
        super().__init__(**options)
        if val and not self.val_size:
            raise UserError("val is a set for validation; leave out folds and val_size=0, or val.")
        self.makers = {"train": train, "test": test, "val": val}
        self.class_names = tuple(class_names or self.classes_of_training())

    def classes_of_training(self) -> list[str]:
        names = getattr(self.dataset("train"), "classes", None)
        if names is None:
            raise UserError(
                "the training set has no attribute classes; name them with "
                "--data.class_names=[A,B]."
            )
        return [str(name) for name in names]

    def read_train(self) -> Tensors:
        return self.read("train")

    def read_test(self) -> Tensors:
        return self.read("test")

    def read_predict(self) -> Tensors:
        images, _ = self.read("test")
        return images, torch.arange(len(images))

    def split(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        if self.makers["val"] is None:
            return super().split(tensors)
        images, targets = self.read("val")
        self.digest = digest(*tensors[:2], images, targets)
        return tensors, (images, targets, len(tensors[-1]) + torch.arange(len(images)))

    def dataset(self, part: str) -> Any:
        make = self.makers[part]
        if make is None:
            raise UserError(f"there is no {part} set; name one with --data.{part}=CLASS.")
        try:
            return make()
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"the {part} set cannot be made: {error}") from error

    def read(self, part: str) -> Tensors:
        """Images (N, H, W, C) uint8 and classes (N,) of one part."""
        dataset, targets = self.dataset(part), []

        def images() -> Iterator[Any]:
            for i in range(len(dataset)):
                image, target = dataset[i]
                targets.append(int(target))
                yield image

        pixels, classes = read_images(images(), self.image_size), torch.tensor(targets)
        if strange := sorted(set(targets) - set(range(self.num_classes))):
            raise UserError(
                f"the {part} set has the class {strange[0]}, but {self.num_classes} are named; "
                "name all with --data.class_names=[A,B]."
            )
        self.digest = digest(pixels, classes)
        return pixels, classes
