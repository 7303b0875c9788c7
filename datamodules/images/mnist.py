"""MNIST as torchvision leaves it on disk: four idx files."""

import gzip
import hashlib
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.errors import UserError
from core.files import temporary
from datamodules.base import Tensors
from datamodules.images.base import ImageDataModule

# SHA-256 of the files in the archives whose MD5 torchvision publishes
SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


class MNISTDataModule(ImageDataModule):
    """MNIST (LeCun et al., 1998): 60,000 training and 10,000 test images of digits, 28 x 28, grey.

    The default split is ``random_split(train, [50000, 10000], Generator().manual_seed(0))`` of
    torch; the test set is read by ``test`` alone. Predicting runs over the test images too, with
    the ids 1, 2, ...

    Args:
        verify: Compare the files with the published ones; false reads other data of their format.
        download: Fetch the files (12 MB) that ``data_dir/MNIST/raw`` lacks.
        val_size: Training images kept for validation by one fixed split; 0 trains on all of them.
        mean: Mean of the channel, of pixels scaled to [0, 1].
        std: Standard deviation of the channel, likewise.
        options: What else :class:`ImageDataModule` takes.
    """

    class_names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    image_size = (28, 28, 1)

    def __init__(
        self,
        verify: bool = True,
        download: bool = False,
        val_size: int = 10_000,
        mean: tuple[float, ...] = (0.1307,),  # of the 60,000 training images
        std: tuple[float, ...] = (0.3081,),
        **options: Any,
    ) -> None:
        super().__init__(val_size=val_size, mean=mean, std=std, **options)
        self.verify = verify
        self.download = download
        self.folder = self.data_dir / "MNIST" / "raw"

    def prepare_data(self) -> None:
        if self.download and not all(_locate(self.folder / name) for name in SHA256):
            fetch(self.folder)

    def read_train(self) -> Tensors:
        return self.read("train")

    def read_test(self) -> Tensors:
        return self.read("t10k")

    def read(self, part: str) -> Tensors:
        """Images (N, 28, 28, 1) uint8 and classes (N,) of ``train`` or ``t10k``.

        Raises:
            UserError: A file is missing, broken, does not hold such images or classes, or is not
                the published one.
        """
        paths = [self.folder / f"{part}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")]
        contents = [read_bytes(path) for path in paths]
        digests = [hashlib.sha256(content).hexdigest() for content in contents]
        for path, digest in zip(paths, digests, strict=True):
            if self.verify and digest != SHA256[path.name]:
                raise UserError(
                    f"{path} is not the official file: expected SHA-256 {SHA256[path.name]}, found "
                    f"{digest}; delete it and fetch it again with --data.download=true, or read "
                    "other data of its format with --data.verify=false."
                )
        images = _parse_idx(paths[0], contents[0], self.image_size[:2])
        labels = _parse_idx(paths[1], contents[1], ())
        if len(images) != len(labels) or labels.max() >= self.num_classes:
            raise UserError(
                f"{paths[1]}: expected a label from 0 to 9 for each of {len(images)} images, found "
                f"{len(labels)} up to {labels.max()}."
            )
        self.digest = hashlib.sha256("".join(digests).encode()).hexdigest()
        return torch.from_numpy(images[..., None]), torch.from_numpy(labels).long()


def _locate(path: Path) -> Path | None:
    """The file itself or, where it was not unpacked, its ``.gz``."""
    packed = path.with_name(f"{path.name}.gz")
    return next((p for p in (path, packed) if p.exists()), None)


def read_bytes(path: Path) -> bytes:
    """The content of a file, which may lie there as ``.gz``.

    Raises:
        UserError: It is missing or cannot be read.
    """
    found = _locate(path)
    if found is None:
        raise UserError(
            f"{path} does not exist; the same command with --data.download=true fetches MNIST "
            "(12 MB)."
        )
    try:
        content = found.read_bytes()
        return gzip.decompress(content) if found.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{found} cannot be read ({error}); delete it and run the same command with "
            "--data.download=true."
        ) from error


def _parse_idx(path: Path, content: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """The array (N, *shape) of an idx file of uint8.

    The format (http://yann.lecun.com/exdb/mnist/): two zero bytes, 8 for uint8, the number of
    dimensions, the size of each as big-endian uint32, then the values.

    Raises:
        UserError: It is no such file, or too short or too long.
    """
    header = 4 * (2 + len(shape))
    count, rest = divmod(len(content) - header, math.prod(shape))
    sizes = np.array([max(count, 0), *shape], ">u4").tobytes()
    expected = bytes([0, 0, 8, 1 + len(shape)]) + sizes
    if rest or count < 1 or content[:header] != expected:
        raise UserError(
            f"{path}: expected an idx file of uint8 of the shape {('N', *shape)}, found "
            f"{len(content)} bytes that begin with {content[:header].hex(' ') or 'nothing'}; "
            "delete it and run the same command with --data.download=true."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(-1, *shape).copy()


def fetch(folder: Path) -> None:
    """Download MNIST from torchvision's mirrors, compare the MD5 and unpack it.

    Raises:
        UserError: It could not be downloaded, has another MD5, or the disk is full.
    """
    from torchvision.datasets import MNIST  # seconds of imports, for the first run only

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary(folder, folder=True) as place:
            raw = Path(MNIST(place, download=True).raw_folder)
            for name in SHA256:
                (raw / name).rename(folder / name)
    except (OSError, RuntimeError) as error:  # torchvision's word for a wrong MD5 is RuntimeError
        reason = " ".join(str(error).split())  # torchvision's takes several lines
        raise UserError(
            f"MNIST could not be downloaded from {' or '.join(MNIST.mirrors)} to {folder} "
            f"({reason}); run the same command again, or put the four files there yourself."
        ) from error
