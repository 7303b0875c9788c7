"""Any image competition on Kaggle. Dimensions: N images, H height, W width, C channels."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from core.errors import UserError
from core.files import sha256
from core.sample_file import SampledSubmission, is_number, read_table
from core.submission import Submission
from datamodules.base import Tensors
from datamodules.image_files.image_cache import decode_once, tell
from datamodules.image_files.layouts import Labelled, inner, read_labels
from datamodules.image_files.named_images import find_competition, find_images, images_by_id
from datamodules.image_files.pixel_table import is_pixel_table, read_pixel_table
from datamodules.images.base import ImageDataModule

_FOLDERS = {
    "train": ("train", "train_images", "images"),
    "test": ("test", "test1", "test_images", "images"),
}


class Part(NamedTuple):
    """Images of a competition, in the order of their ids."""

    images: np.ndarray  # (N, H, W, C) uint8
    ids: list[Any]  # N integers or, of training images, paths
    labels: list[str]  # of the training images
    digest: str  # SHA-256 of the images


class CompetitionDataModule(ImageDataModule):
    """Train on the labelled images of a competition and predict its test images.

    ``data_dir/COMPETITION``, or ``data_dir`` itself, holds what Kaggle hands out: the sample file;
    the images in ``train`` and ``test``, folders or archives, or in ``train.csv`` and ``test.csv``,
    a column for each pixel; and the classes in a table of ids and labels, in folders or in the
    names of the images (:mod:`datamodules.image_files.layouts`). Header, ids and whether labels or
    probabilities are handed in follow the sample file.

    Args:
        competition: Kaggle's name of it, the end of its address.
        data_dir: Root folder of all data sets, or the competition's own.
        image_size: Height, width and channels; other images than tables are cropped and scaled.
        class_names: The classes as they are handed in; null takes those of the training images in
            alphabetical order. A checkpoint knows them.
        labels: Table (CSV) of ids and labels; null finds it.
        sample: The sample file; null finds it.
        probability_of: Class whose probability is handed in, where the sample file has whole
            numbers; of two classes and fractions it is the second.
        cache_dir: Where unpacked and decoded images are kept; by default beside the data or, where
            that cannot be written, in the user's cache folder.
        options: What :class:`ImageDataModule` takes.
    """

    finds_classes = True
    folder_names: ClassVar[tuple[str, ...]] = ()  # other names than the competition's

    def __init__(
        self,
        competition: str,
        data_dir: str = "data",
        image_size: tuple[int, int, int] = (64, 64, 3),
        class_names: list[str] | None = None,
        labels: str | None = None,
        sample: str | None = None,
        probability_of: str | None = None,
        cache_dir: str | None = None,
        **options: Any,
    ) -> None:
        self.image_size = image_size
        super().__init__(data_dir=data_dir, **options)
        self.competition: str = competition
        self.cache_dir = Path(cache_dir) if cache_dir else None
        self.label_table = Path(labels) if labels else None
        self.given_sample = Path(sample) if sample else None
        self.probability_of = probability_of
        self.prepared: dict[str, Part] = {}
        self.class_names = tuple(class_names or sorted(set(self.training_labels())))

    @property
    def folder(self) -> Path:
        assert self.competition is not None
        signs = ("*ubmission*.csv", "*abels*.csv", "train.csv")
        return find_competition(self.data_dir, (*self.folder_names, self.competition), signs)

    @property
    def sample(self) -> Path:
        found = sorted(self.folder.glob("*ample*ubmission*.csv"))
        if self.given_sample is None and len(found) > 1:
            raise UserError(
                f"both {found[0]} and {found[1]} may be the sample file; choose with "
                "--data.sample=FILE."
            )
        return self.given_sample or (found or [self.folder / "sample_submission.csv"])[0]

    def prepare_data(self) -> None:
        """Download, unpack and decode what the running stage needs and the disk lacks."""
        if not self.folder.exists():
            from core import kaggle_client  # imported only where an account is asked for

            if kaggle_client.has_credentials():
                kaggle_client.download_competition(self.competition, self.folder)
        predicting = self.trainer is not None and self.trainer.predicting
        split = "test" if predicting and not self.predicts_val else "train"
        self.prepared = {split: self.read(split)}  # what setup in this process asks for next

    def read(self, split: str) -> Part:
        return self.read_training() if split == "train" else self.read_test_images()

    def part(self, split: str) -> Part:
        return self.prepared.pop(split, None) or self.read(split)

    def read_train(self) -> Tensors:
        part = self.part("train")
        classes = torch.tensor([self.class_names.index(label) for label in part.labels])
        self.digest = hashlib.sha256(part.digest.encode() + classes.numpy().tobytes()).hexdigest()
        self.ids = part.ids
        return torch.from_numpy(part.images), classes

    def read_predict(self) -> Tensors:
        part = self.part("test")
        self.digest = part.digest
        return torch.from_numpy(part.images), torch.tensor(part.ids)

    def submission(self) -> Submission:
        return SampledSubmission(self.class_names, self.sample, self.probability_of)

    # ---- what is trained on

    @property
    def pixel_table(self) -> Path | None:
        path = self.folder / "train.csv"
        return path if is_pixel_table(path, self.image_size) else None

    @cached_property
    def labelled(self) -> tuple[Path, Labelled]:
        """The folder of the training images, and their classes."""
        table = self.label_table
        if table and not table.exists():
            raise self.missing(table)
        folder = inner(self.images_in("train"))
        return folder, read_labels(folder, self.folder, table)

    def training_labels(self) -> list[str]:
        return self.read_training().labels if self.pixel_table else self.labelled[1].labels

    def known(self, labels: list[str], table: str) -> None:
        """Refuse labels of other classes; before these are taken from them, there are no others."""
        names = getattr(self, "class_names", labels)
        if unknown := set(labels).difference(names):
            raise UserError(
                f"{self.folder}: the label {min(unknown)!r} in {table} is not one of "
                f"{', '.join(names)}."
            )

    def read_training(self) -> Part:
        """The images with labels.

        Raises:
            UserError: Something is missing, broken, or in the table and not in the folder.
        """
        if table := self.pixel_table:
            labels, pixels = read_pixel_table(table, self.image_size)
            if labels is None:
                raise UserError(f"{table} has no column of labels; download it again.")
            self.known(labels, table.name)
            return Part(pixels, list(range(len(labels))), labels, sha256(table))
        folder, labelled = self.labelled
        tell(f"{folder}: {labelled}")
        self.known(labelled.labels, labelled.source)
        own = folder.name == "images"  # not that of the test images too
        self.compare(folder, labelled.source, labelled.missing, [] if own else labelled.left_out)
        pairs = sorted(zip(labelled.files, labelled.labels, strict=True), key=_natural)
        files = [file for file, _ in pairs]
        labels = [label for _, label in pairs]
        return self.decode(folder, files, [_id_of(file) for file in files], labels)

    # ---- what is predicted

    def read_test_images(self) -> Part:
        """The images of the sample file, with its ids or, where these are texts, its rows.

        Raises:
            UserError: Something is missing, broken, or in the sample file and not in the folder.
        """
        if not self.sample.exists():
            raise self.missing(self.sample)
        table = read_table(self.sample)
        ids = list(table.ids) if table.numbered else list(range(len(table.ids)))
        path = self.folder / "test.csv"
        if is_pixel_table(path, self.image_size):
            names, pixels = read_pixel_table(path, self.image_size)
            if len(pixels) != len(ids) or (names and names != list(map(str, table.ids))):
                raise UserError(
                    f"{path} has {len(pixels)} rows, which are not those of the {len(ids)} ids in "
                    f"{self.sample}; download both again."
                )
            return Part(pixels, ids, [], sha256(path))
        folder = self.images_in("test")
        images = images_by_id(folder)
        stems = [str(i) if str(i) in images else str(i).rpartition(".")[0] for i in table.ids]
        left_out = [] if folder.name == "images" else sorted(images.keys() - set(stems))
        missing = [str(i) for i, stem in zip(table.ids, stems, strict=True) if stem not in images]
        self.compare(folder, self.sample.name, missing, [images[name] for name in left_out])
        rows = sorted(zip(ids, stems, strict=True))
        return self.decode(folder, [images[stem] for _, stem in rows], [i for i, _ in rows], [])

    # ---- what both have in common

    def images_in(self, split: str) -> Path:
        """The folder of some images, unpacked.

        Raises:
            UserError: There is neither a folder nor an archive of it.
        """
        for name in _FOLDERS[split]:
            if found := find_images(self.folder / name, self.cache_dir):
                return found
        raise self.missing(self.folder / split)

    def missing(self, path: Path) -> UserError:
        return UserError(
            f"{path} does not exist; run `kaggle competitions download -c {self.competition} -p "
            f"{self.folder}` and unzip the file there."
        )

    def compare(
        self, folder: Path, table: str, missing: Sequence[str], left_out: list[str]
    ) -> None:
        if left_out:
            raise UserError(
                f"{table} has no row for {folder / left_out[0]}; download it again, or move the "
                "image away."
            )
        if missing:
            raise UserError(
                f"{folder} has no image of the id {missing[0]}, which {table} lists; unpack or "
                "download the images again."
            )

    def decode(self, folder: Path, files: list[str], ids: list[Any], labels: list[str]) -> Part:
        size = self.image_size[:2]
        decoded = decode_once(folder, files, size, self.folder, self.cache_dir, strict=True)
        return Part(decoded.pixels, ids, labels, decoded.sha256)


def _id_of(file: str) -> int | str:
    """The id of an image, an integer if it is named by one: as texts, 10 would come before 2."""
    name = file.rpartition(".")[0]
    return int(name) if is_number(name) else file


def _natural(pair: tuple[str, str]) -> tuple[bool, int, str]:
    """Order of files: numbers by size, then names."""
    key = _id_of(pair[0])
    return (False, key, "") if isinstance(key, int) else (True, 0, key)
