"""Any folder of photos of classes. Dimensions: N images, H height, W width."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.errors import UserError
from core.file_table import FileTable
from datamodules.base import Tensors, digest, require_at_least
from datamodules.image_files.decode_images import SUFFIXES
from datamodules.image_files.image_cache import decode_all, decode_once, tell
from datamodules.image_files.layouts import Labelled, Part, find_parts, image_files, read_labels
from datamodules.image_files.photo_folder import Photos, halves, readable, split_off, whole_photos
from datamodules.images.base import ImageDataModule


class ImageFolderDataModule(ImageDataModule):
    """Photos of any size and the classes of which they are.

    ``data_dir`` holds ``cat/*.jpg``, ``dog/*.jpg`` and so on, with any folders below these; or
    photos with the classes in their names (``cat.0.jpg``) or in a table ``id,label``; or it holds
    ``train/``, ``validation/`` and ``test/``, or such as ``Training/`` and ``test_set/``, with one
    of these. A folder may be doubled (``training_set/training_set/``). What is missing is split off
    by a generator that no seed changes: validation and test from the training photos, the same
    share of each class; but a validation folder without a test is split in half. Classes and their
    counts are printed; what fits no layout is refused.

    Photos become squares once (:mod:`datamodules.image_files`), kept as bytes until a file changes:
    in ``data_dir/.cache`` or, where that cannot be written, in the user's cache folder. Those that
    cannot be read are left out with a warning.
    Predicting runs over the test part, or over the photos in ``images``.

    Args:
        data_dir: The folder of photos.
        image_size: Side of the squares in pixels.
        val_size: Photos kept for validation: a number or, below 1, a share. Where there is a
            validation folder, it is that. 0 trains on the photos for validation, in either case.
        test_size: Photos kept for the test, likewise; 0 keeps none.
        images: Folder of photos to predict, with any folders below; nothing is written there.
        cache_dir: Where the squares are kept instead; sets may share it.
        class_names: The classes; null takes those of the training photos in alphabetical order. A
            checkpoint knows them, so that predicting needs no training photos.
        labels: Table (CSV) of the names of the photos and their classes; null finds it beside them.
        options: What :class:`ImageDataModule` takes.
    """

    finds_classes = True

    def __init__(
        self,
        data_dir: str = "photos",
        image_size: int = 64,
        val_size: float = 0.15,
        test_size: float = 0.15,
        images: str | None = None,
        cache_dir: str | None = None,
        class_names: list[str] | None = None,
        labels: str | None = None,
        **options: Any,
    ) -> None:
        require_at_least(1, image_size=image_size)
        require_at_least(0, test_size=test_size)
        self.image_size = (image_size, image_size, 3)  # by which the base class checks the options
        # the base class counts in photos, but asks no more than whether there are any
        super().__init__(data_dir=data_dir, val_size=val_size, **options)  # type: ignore[arg-type]
        self.test_size = test_size
        self.images = Path(images) if images else None
        self.cache_dir = Path(cache_dir) if cache_dir else None
        self.labels = Path(labels) if labels else None
        self._labelled: dict[Path, Labelled] = {}  # by folder
        self.class_names = tuple(class_names or sorted(set(self.labelled("train").labels)))
        self.predicted: list[str] = []  # the files through which the ids of predictions count
        self._photos: dict[Path, Photos] = {}  # by folder

    @cached_property
    def folders(self) -> dict[Part, Path]:
        folders, left_out = find_parts(self.data_dir, self.labels)
        if left_out:
            tell(f"{self.data_dir}: left out, neither training nor classes: {', '.join(left_out)}/")
        return folders

    def labelled(self, part: Part) -> Labelled:
        folder = self.folders[part]
        if folder not in self._labelled:
            self._labelled[folder] = read_labels(folder, self.data_dir, self.labels)
        return self._labelled[folder]

    def prepare_data(self) -> None:
        """Decode, in one process, what the running stage needs."""
        stage = "fit" if self.trainer is None or self.predicts_val else self.trainer.state.fn
        if stage in ("fit", "validate"):
            self.photos("train")
            self.photos("val")
        elif stage == "test" or self.images is None:
            self.photos("test")

    def read_train(self) -> Tensors:
        return self.photos("train").tensors

    def split(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        """The training photos and those for validation, which folds put together and divide."""
        train, photos = tensors, self.photos("val")
        val: Tensors = *photos.tensors, len(train[-1]) + torch.arange(len(photos.files))
        if not self.val_size:
            train = tuple(torch.cat(pair) for pair in zip(train, val, strict=True))
            val = tuple(t[:0] for t in val)
        self.digest = digest(*train[:2], *val[:2])
        # those for the test too, if they have been read
        parts = ("train", "val", *(("test",) if self.folders["test"] in self._photos else ()))
        self.ids = [name for part in parts for name in self.sample_names(part)]
        return super().split(train) if self.folds else (train, val)

    def sample_names(self, part: Part) -> list[str]:
        """Paths of the photos of one part below ``data_dir``."""
        below = self.folders[part].relative_to(self.data_dir)
        return [(below / file).as_posix() for file in self.photos(part).files]

    def read_test(self) -> Tensors:
        images, classes = self.photos("test").tensors
        if not len(classes):
            raise UserError(f"no photos of {self.data_dir} were kept for the test; test_size is 0.")
        self.digest = digest(images, classes)
        self.ids = self.sample_names("test")
        return images, classes

    def read_predict(self) -> Tensors:
        if self.images is None:
            images, _ = self.read_test()
            self.predicted = self.photos("test").files
            return images, torch.arange(len(images))
        images, ids = self.read_unlabelled(self.images)
        self.digest = digest(images)
        return images, ids

    def submission(self) -> FileTable:
        return FileTable(self.class_names, files=tuple(self.predicted))

    def photos(self, part: Part) -> Photos:
        """The photos of one part, from the folder that it has for itself or shares with others."""
        folder = self.folders[part]
        if folder not in self._photos:
            self._photos[folder] = self.read_photos(folder, self.labelled(part))
        photos = self._photos[folder]
        sharing = [name for name, other in self.folders.items() if other == folder]
        if part == "test" and not self.test_size:
            return photos.take(torch.arange(0))
        if "train" in sharing:
            sizes: dict[Part, float] = {"test": self.test_size, "val": self.val_size}
            kept = {name: size for name, size in sizes.items() if name in sharing}
            return photos.take(split_off(photos.classes, kept)[part])
        if sharing == ["val", "test"] and self.test_size:
            return photos.take(halves(len(photos.files))[part == "test"])
        return photos

    def read_photos(self, folder: Path, labelled: Labelled) -> Photos:
        """The photos of a folder, decoded the first time and mapped afterwards.

        Raises:
            UserError: The classes are others, or nothing of one can be read.
        """
        tell(f"{folder}: {labelled}")
        if strange := sorted(set(labelled.labels) ^ set(self.class_names)):
            state = "missing" if strange[0] in self.class_names else "too many"
            raise UserError(
                f"{folder} must have photos of each of the classes {', '.join(self.class_names)}, "
                f"but {strange[0]} is {state} there; if its photos have no classes, predict them: "
                "predict.py RUN --images FOLDER."
            )
        size, beside = self.image_size[:2], self.data_dir / ".cache"
        decoded = decode_once(folder, labelled.files, size, beside, self.cache_dir)
        return whole_photos(folder, labelled, self.class_names, decoded)

    def read_unlabelled(self, folder: Path) -> tuple[Tensor, Tensor]:
        """Images (N, H, W, 3) of a folder and their positions (N,) among its files.

        Files that cannot be read are listed on stderr.
        """
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder; name a folder of photos.")
        self.predicted, others = image_files(folder)
        if others:
            more = f" and {len(others) - 5} more" if len(others) > 5 else ""
            tell(f"{folder}: left out, not named as photos: {', '.join(others[:5])}{more}")
        if not self.predicted:
            raise UserError(f"{folder} holds no photos ({', '.join(SUFFIXES)}).")
        size, title = self.image_size[:2], f"Decoding {folder.resolve().name}/"
        pixels: list[bytes] = []
        unreadable: dict[int, str] = {}
        for chunk, reasons in decode_all(folder, self.predicted, size, title):
            pixels.append(chunk)
            unreadable |= reasons
        for position, reason in unreadable.items():
            tell(f"{folder / self.predicted[position]} is left out: {reason}")
        ids = readable(len(self.predicted), unreadable)
        if not len(ids):
            raise UserError(f"none of the {len(self.predicted)} photos in {folder} can be read.")
        images = np.frombuffer(b"".join(pixels), np.uint8).reshape(-1, *self.image_size)
        return torch.from_numpy(images[ids.numpy()]), ids
