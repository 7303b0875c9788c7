"""CIFAR-10 as the Kaggle competition `cifar-10` hands it out: numbered PNG files and two tables."""

import hashlib
import re
import tempfile
from lzma import LZMAError
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rich.progress
import torch
from rich.console import Console
from torch import Tensor

from core.errors import UserError, needed
from core.sample_file import SampledSubmission, read_table
from core.submission import Submission
from datamodules.base import Tensors
from datamodules.image_files.png_folder import png_ids, read_images
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
    in ``train/`` and ``test/`` or, as they are downloaded, in ``train.7z`` and ``test.7z``. Of the
    test images 10,000 are those of CIFAR-10; the rest are not scored.
    """

    class_names = CLASS_NAMES
    competition = "cifar-10"

    def __init__(self, data_dir: str = "data", **options: Any) -> None:
        super().__init__(data_dir, **options)
        self.prepared: dict[str, Part] = {}

    @property
    def folder(self) -> Path:
        return self.data_dir / "kaggle-cifar10"

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
        archive = folder.with_suffix(".7z")
        if not table.exists() or not (folder.exists() or archive.exists()):
            raise UserError(
                f"{folder if table.exists() else table} does not exist; run `kaggle competitions "
                f"download -c {self.competition} -p {self.folder}` and unzip the file there."
            )
        listed, classes = read_classes(table)
        if not folder.exists():
            unpack(archive)
        ids = png_ids(folder)
        if len(missing := np.setdiff1d(listed, ids, assume_unique=True)):
            raise UserError(
                f"{folder / str(min(missing))}.png does not exist, though {table.name} lists it; "
                f"unpack or download {folder} again."
            )
        if len(unlisted := np.setdiff1d(ids, listed, assume_unique=True)):
            raise UserError(
                f"{table} has no row for {folder / str(min(unlisted))}.png; download it again."
            )
        pixels, digest = read_images(folder, ids, self.image_size[:2])
        images, numbers, targets = map(torch.from_numpy, (pixels, ids, classes))
        return Part(images, numbers, targets, digest)


def read_classes(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Ascending ids (N,) and their classes (N,) in a table of ids and class names.

    Raises:
        UserError: Another header, an id that comes twice, or a name that is not a class.
    """
    table = read_table(path)
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


def unpack(archive: Path) -> None:
    """Unpack ``<name>.7z`` into the folder ``<name>`` beside it, whole or not at all.

    Raises:
        UserError: The archive is broken or holds anything but ``<name>/<id>.png``, or the disk is
            full; nothing is left of it then.
    """
    folder = archive.with_suffix("")
    expected = re.compile(rf"{folder.name}(/\d+\.png)?")
    py7zr = needed("py7zr", f"unpacking {archive}")
    title, console = f"Unpacking {archive.name}", Console(stderr=True)
    try:
        with (
            tempfile.TemporaryDirectory(dir=archive.parent, prefix=f".{folder.name}.") as temporary,
            rich.progress.open(archive, "rb", description=title, console=console) as file,
            py7zr.SevenZipFile(file) as bundle,
        ):
            for member in bundle.list():
                if member.is_symlink or not expected.fullmatch(member.filename):
                    raise UserError(
                        f"{archive} holds {member.filename!r}, which is no {folder.name}/<id>.png; "
                        "nothing was unpacked, download it again."
                    )
            bundle.extractall(temporary)
            Path(temporary, folder.name).rename(folder)
    except (py7zr.exceptions.ArchiveError, LZMAError, OSError) as error:
        raise UserError(
            f"{archive} could not be unpacked ({error}); free space or download it again."
        ) from error
