"""CIFAR-10 as the Kaggle competition `cifar-10` hands it out: numbered PNG files and two tables."""

import hashlib
import re
import tempfile
from lzma import LZMAError
from pathlib import Path

import py7zr
import rich.progress
import torch
from py7zr.exceptions import ArchiveError
from rich.console import Console
from torch import Tensor

from datamodules.base import Tensors
from datamodules.cifar10 import CLASS_NAMES
from datamodules.images import ImageDataModule
from datamodules.png_folder import png_ids, read_images
from errors import UserError
from submission import Submission, read_table


class KaggleCIFAR10DataModule(ImageDataModule):
    """Train on the 50,000 labelled images of the competition and predict the other 300,000.

    ``data_dir/kaggle-cifar10`` holds ``trainLabels.csv``, ``sampleSubmission.csv`` and the images
    in ``train/`` and ``test/`` or, as they are downloaded, in ``train.7z`` and ``test.7z``. Of the
    test images 10,000 are those of CIFAR-10; the rest are not scored.
    """

    class_names = CLASS_NAMES
    competition = "cifar-10"

    @property
    def folder(self) -> Path:
        return self.data_dir / "kaggle-cifar10"

    @property
    def sample(self) -> Path:
        return self.folder / "sampleSubmission.csv"

    def prepare_data(self) -> None:
        """Download, unpack and decode what the running stage needs and the disk lacks."""
        if not self.folder.exists():
            import kaggle_client  # imported only where an account is asked for

            if kaggle_client.has_credentials():
                kaggle_client.download_competition(self.competition, self.folder)
        if self.trainer is not None and self.trainer.predicting:
            self.read_predict()
        else:
            self.read_train()

    def read_train(self) -> Tensors:
        images, _, classes = self.read_split("train", self.folder / "trainLabels.csv")
        self.digest = hashlib.sha256(self.digest.encode() + classes.numpy().tobytes()).hexdigest()
        return images, classes

    def read_predict(self) -> Tensors:
        images, ids, _ = self.read_split("test", self.sample)
        return images, ids

    def submission(self) -> Submission:
        return Submission(labels=self.class_names, sample=self.sample)

    def read_split(self, split: str, table: Path) -> tuple[Tensor, Tensor, Tensor]:
        """Images (N, 32, 32, 3) uint8 in the order of their ids (N,), and their classes (N,).

        Raises:
            UserError: Something is missing, broken, or in the table and not in the folder.
        """
        folder = self.folder / split
        archive = folder.with_suffix(".7z")
        if not table.exists() or not (folder.exists() or archive.exists()):
            raise UserError(
                f"{folder if table.exists() else table} does not exist; run `kaggle competitions "
                f"download -c {self.competition} -p {self.folder}` and unzip the file there."
            )
        class_of = read_classes(table)
        if not folder.exists():
            unpack(archive)
        ids = png_ids(folder)
        found = set(ids.tolist())
        if missing := class_of.keys() - found:
            raise UserError(
                f"{folder / str(min(missing))}.png does not exist, though {table.name} lists it; "
                f"unpack or download {folder} again."
            )
        if unlisted := found - class_of.keys():
            raise UserError(
                f"{table} has no row for {folder / str(min(unlisted))}.png; download it again."
            )
        pixels, self.digest = read_images(folder, ids, self.image_size[:2])
        classes = torch.tensor([class_of[i] for i in ids.tolist()])
        return torch.from_numpy(pixels), torch.from_numpy(ids), classes


def read_classes(path: Path) -> dict[int, int]:
    """The class of each id in a table of ids and class names.

    Raises:
        UserError: Another header, an id that comes twice, or a name that is not a class.
    """
    table = read_table(path)
    if table.header != ("id", "label"):
        raise UserError(f"{path}: the columns must be id,label, got {','.join(table.header)}.")
    index_of = {name: index for index, name in enumerate(CLASS_NAMES)}
    class_of: dict[int, int] = {}
    for i, name in zip(table.ids, table.labels, strict=True):
        if i in class_of:
            raise UserError(f"{path}: the id {i} comes more than once.")
        if name not in index_of:
            raise UserError(
                f"{path}: the label {name!r} of id {i} is not one of {', '.join(CLASS_NAMES)}."
            )
        class_of[i] = index_of[name]
    return class_of


def unpack(archive: Path) -> None:
    """Unpack ``<name>.7z`` into the folder ``<name>`` beside it, whole or not at all.

    Raises:
        UserError: The archive is broken or holds anything but ``<name>/<id>.png``, or the disk is
            full; nothing is left of it then.
    """
    folder = archive.with_suffix("")
    expected = re.compile(rf"{folder.name}(/\d+\.png)?")
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
    except (ArchiveError, LZMAError, OSError) as error:
        raise UserError(
            f"{archive} could not be unpacked ({error}); free space or download it again."
        ) from error
