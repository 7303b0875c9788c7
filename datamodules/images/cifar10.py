"""CIFAR-10 as its authors publish it: six pickled batches of 10,000 images."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn

from core.errors import UserError
from core.files import temporary
from core.submission import KNOWN_LABELS
from datamodules.base import Tensors
from datamodules.image_files.safe_pickle import load_arrays
from datamodules.images.base import ImageDataModule

CLASS_NAMES = KNOWN_LABELS["cifar-10"]

# SHA-1 of the same batches in the official binary version, as published in MXNet Gluon: it covers
# what is learned from, labels and pixels in order, and not how a pickle happens to be written.
TRAIN_SHA1 = {
    "data_batch_1": "aadd24acce27caa71bf4b10992e9e7b2d74c2540",
    "data_batch_2": "c0ba65cce70568cd57b4e03e9ac8d2a5367c1795",
    "data_batch_3": "1dd00a74ab1d17a6e7d73e185b69dbf31242f295",
    "data_batch_4": "aab85764eb3584312d3c7f65fd2fd016e36a258e",
    "data_batch_5": "26e2849e66a845b7f1e4614ae70f4889ae604628",
}
TEST_SHA1 = {"test_batch": "67eb016db431130d61cd03c7ad570b013799c88c"}


class CIFAR10DataModule(ImageDataModule):
    """CIFAR-10 (Krizhevsky, 2009): 50,000 training and 10,000 test images of ten classes.

    Validation images are taken from the training set; the official test set is read by ``test``
    alone. Predicting runs over the test images too, with the ids 1, 2, ...

    Args:
        verify: Compare labels and pixels with the published digests; false reads other data of the
            same format.
        download: Fetch the archive (170 MB) where ``data_dir`` has no ``cifar-10-batches-py``.
        options: What :class:`ImageDataModule` takes.
    """

    class_names = CLASS_NAMES

    def __init__(self, verify: bool = True, download: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.verify = verify
        self.download = download
        self.folder = self.data_dir / "cifar-10-batches-py"

    def prepare_data(self) -> None:
        if self.download and not self.folder.exists():
            fetch(self.folder)

    def read_train(self) -> Tensors:
        batches, differences = self.read_batches(TRAIN_SHA1)
        if self.verify and differences:
            raise UserError(
                f"{differences[0]}; fetch CIFAR-10 again, or read other data of its format with "
                "--data.verify=false."
            )
        return batches

    def read_test(self) -> Tensors:
        batches, differences = self.read_batches(TEST_SHA1)
        if self.verify and differences:
            rank_zero_warn(
                f"{differences[0]}; accuracy on it may differ from what others report for CIFAR-10."
            )
        return batches

    def read_batches(self, published: dict[str, str]) -> tuple[Tensors, list[str]]:
        """Read batches given as name and SHA-1.

        Returns:
            Images (N, 32, 32, 3) uint8 with labels (N,), and what differs from the digests.
        """
        if not self.folder.exists():
            raise UserError(
                f"{self.folder} does not exist; the same command with --data.download=true "
                "fetches CIFAR-10 (170 MB)."
            )
        batches = [_read_batch(self.folder / name) for name in published]
        digests = [hashlib.sha1(batch.data).hexdigest() for batch in batches]
        differences = [
            f"{self.folder / name} is not the official batch: expected SHA-1 {expected} of labels "
            f"and pixels, found {found}"
            for (name, expected), found in zip(published.items(), digests, strict=True)
            if found != expected
        ]
        self.digest = hashlib.sha256("".join(digests).encode()).hexdigest()
        records = torch.from_numpy(np.concatenate(batches))  # (N, 1 + 3072)
        planes = records[:, 1:].unflatten(1, (3, 32, 32))
        images = planes.permute(0, 2, 3, 1).contiguous()
        return (images, records[:, 0].long()), differences


def _read_batch(path: Path) -> np.ndarray:
    """One batch as records (N, 1 + 3072) uint8: a label, then planes of red, green and blue.

    Raises:
        UserError: The file is missing, broken, asks to run code, or does not hold such images.
    """
    batch = load_arrays(path)
    try:
        data, labels = batch["data"], batch["labels"]
        found = f"{data.dtype} of shape {data.shape} and {len(labels)} labels"
    except (TypeError, KeyError, AttributeError):
        data, labels, found = np.zeros(0), [], "no 'data' and 'labels'"
    if data.dtype != np.uint8 or data.shape != (len(labels), 3072) or not labels:
        raise UserError(
            f"{path}: expected pixels, uint8 of shape (N, 3072), and N labels, found {found}."
        )
    if strange := [label for label in labels if label not in range(len(CLASS_NAMES))]:
        raise UserError(f"{path}: expected labels from 0 to 9, found {strange[0]!r}.")
    return np.column_stack([np.array(labels, np.uint8), data])


def fetch(folder: Path) -> None:
    """Download CIFAR-10 from its authors, compare its MD5 and unpack it, whole or not at all.

    Raises:
        UserError: It could not be downloaded, has another MD5, or the disk is full.
    """
    from torchvision.datasets import CIFAR10  # seconds of imports, for the first run only
    from torchvision.datasets.utils import download_and_extract_archive

    try:
        with temporary(folder, folder=True) as place:
            download_and_extract_archive(CIFAR10.url, place, md5=CIFAR10.tgz_md5)
            (place / CIFAR10.base_folder).rename(folder)
    except (OSError, RuntimeError) as error:  # torchvision's word for a wrong MD5 is RuntimeError
        raise UserError(
            f"{CIFAR10.url} (MD5 {CIFAR10.tgz_md5}) could not be downloaded to {folder.parent} "
            f"({error}); run the same command again, or unpack the archive there yourself."
        ) from error
