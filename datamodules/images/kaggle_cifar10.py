"""CIFAR-10 as the Kaggle competition `cifar-10` hands it out: numbered PNG files and two tables."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from core.errors import UserError
from core.sample_file import SampledSubmission, read_table
from core.submission import Submission
from datamodules.base import Tensors
from datamodules.image_files.image_cache import Cache, decode_once
from datamodules.image_files.named_images import find_competition, find_images, images_by_id
from datamodules.images.base import ImageDataModule
from datamodules.images.cifar10 import CLASS_NAMES


class Part(NamedTuple):
    """The images of a folder in the order of their ids."""

    images: Tensor  # (N, 32, 32, 3) uint8
    ids: Tensor  # (N,)
    classes: Tensor  # (N,)
    digest: str  # SHA-256 of the images


class KaggleCIFAR10DataModule(ImageDataModule):
    """Train on the 50,000 labelled images of the competition and predict the other 300,000.

    ``data_dir/kaggle-cifar10`` holds ``trainLabels.csv``, ``sampleSubmission.csv`` and the images
    in ``train/`` and ``test/`` or, as they are downloaded, in ``train.7z`` and ``test.7z``; so may
    ``data_dir/cifar-10``, or ``data_dir`` itself. Of the test images 10,000 are those of CIFAR-10;
    the rest are not scored.

    Args:
        data_dir: Root folder of all data sets, or the competition's own.
        cache_dir: Where unpacked and decoded images are kept; by default beside the data or, where
            that cannot be written, in the user's cache folder.
        options: What :class:`ImageDataModule` takes.
    """

    class_names = CLASS_NAMES
    competition = "cifar-10"

    def __init__(
        self, data_dir: str = "data", cache_dir: str | None = None, **options: Any
    ) -> None:
        super().__init__(data_dir, **options)
        self.cache_dir = Path(cache_dir) if cache_dir else None
        self.prepared: dict[str, Part] = {}

    @property
    def folder(self) -> Path:
        names, tables = ("kaggle-cifar10", "cifar-10"), ("trainLabels.csv", "sampleSubmission.csv")
        return find_competition(self.data_dir, names, tables)

    @property
    def sample(self) -> Path:
        return self.folder / "sampleSubmission.csv"

    def prepare_data(self) -> None:
        """Download, unpack and decode what the running stage needs and the disk lacks."""
        if not self.folder.exists():
            from core import kaggle_client  # imported only where an account is asked for

            if kaggle_client.has_credentials():
                kaggle_client.download_competition(self.competition, self.folder)
        predicting = self.trainer is not None and self.trainer.predicting
        split = "test" if predicting else "train"
        self.prepared = {split: self.read_split(split)}  # what setup in this process asks for next

    def read_train(self) -> Tensors:
        part = self.part("train")
        digest = part.digest.encode() + part.classes.numpy().tobytes()
        self.digest = hashlib.sha256(digest).hexdigest()
        self.ids = part.ids.tolist()
        return part.images, part.classes

    def read_predict(self) -> Tensors:
        part = self.part("test")
        self.digest = part.digest
        return part.images, part.ids

    def submission(self) -> Submission:
        return SampledSubmission(labels=self.class_names, sample=self.sample)

    def part(self, split: str) -> Part:
        return self.prepared.pop(split, None) or self.read_split(split)

    def read_split(self, split: str) -> Part:
        """The images of ``train`` or ``test``.

        Raises:
            UserError: Something is missing, broken, or in the table and not in the folder.
        """
        table = self.folder / "trainLabels.csv" if split == "train" else self.sample
        folder = self.folder / split
        images_in = find_images(folder, self.cache_dir) if table.exists() else None
        if images_in is None:
            raise UserError(
                f"{folder if table.exists() else table} does not exist; run `kaggle competitions "
                f"download -c {self.competition} -p {self.folder}` and unzip the file there."
            )
        listed, classes = read_classes(table)
        images = images_by_id(images_in)
        known = {str(i) for i in listed}
        if strange := [file for name, file in images.items() if name not in known]:
            raise UserError(
                f"{table} has no row for {images_in / strange[0]}; download it again, or move the "
                "image away."
            )
        if missing := [i for i in listed if str(i) not in images]:
            raise UserError(
                f"{images_in} has no image of the id {missing[0]}, which {table.name} lists; "
                f"unpack or download {folder} again."
            )
        files = [images[str(i)] for i in listed]
        cache = Cache(folder, self.folder, self.cache_dir)
        decoded = decode_once(images_in, files, self.image_size[:2], "exact", cache)
        pixels, numbers, targets = map(torch.from_numpy, (decoded.pixels, listed, classes))
        return Part(pixels, numbers, targets, decoded.sha256)


def read_classes(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Ascending ids (N,) and their classes (N,) in a table of ids and class names.

    Raises:
        UserError: Another header, an id that comes twice, or a name that is not a class.
    """
    table = read_table(path, numbered=True)
    if table.header != ("id", "label"):
        raise UserError(f"{path}: the columns must be id,label, got {','.join(table.header)}.")
    ids, rows, counts = np.unique(table.ids, return_index=True, return_counts=True)
    if counts.max() > 1:
        raise UserError(f"{path}: the id {ids[counts.argmax()]} comes more than once.")
    index_of = {name: index for index, name in enumerate(CLASS_NAMES)}
    if set(table.labels) - index_of.keys():
        i, name = next(x for x in zip(table.ids, table.labels, strict=True) if x[1] not in index_of)
        raise UserError(
            f"{path}: the label {name!r} of id {i} is not one of {', '.join(CLASS_NAMES)}."
        )
    return ids, np.array([index_of[name] for name in table.labels])[rows]
