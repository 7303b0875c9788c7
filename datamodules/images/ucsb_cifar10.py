"""The course competition of UCSB CS 291K, fall 2022: CIFAR-10 images that nobody has seen."""

from pathlib import Path

import numpy as np
import torch

from core.errors import UserError
from core.files import sha256
from core.sample_file import SampledSubmission, read_table
from core.submission import KNOWN_LABELS, Submission
from datamodules.base import Tensors
from datamodules.images.cifar10 import CIFAR10DataModule


class UCSBCIFAR10DataModule(CIFAR10DataModule):
    """Train and test on CIFAR-10 and predict the competition's own images.

    ``data_dir/ucsb`` holds ``test.npy``, N images of uint8 (N, 32, 32, 3), and
    ``sample_submission.csv`` with the ids 0 to N - 1. Labels are handed in as digits.
    """

    competition = "ucsb-cs291k-hw2-2022-fall"

    @property
    def sample(self) -> Path:
        return self.data_dir / "ucsb" / "sample_submission.csv"

    def read_predict(self) -> Tensors:
        path = self.sample.with_name("test.npy")
        try:
            images = np.lib.format.open_memmap(path, mode="c")  # reads no pickles
        except FileNotFoundError:
            raise UserError(
                f"{path} does not exist; run `kaggle competitions download -c {self.competition} "
                f"-p {path.parent}` and unzip the file there."
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} is not a whole array of numbers ({error}); download it again."
            ) from error
        if images.dtype != np.uint8 or images.shape[1:] != self.image_size:
            raise UserError(
                f"{path}: expected uint8 of shape (N, 32, 32, 3), found {images.dtype} of shape "
                f"{images.shape}; download it again."
            )
        ids = read_table(self.sample, numbered=True).ids
        if sorted(ids) != list(range(len(images))):
            raise UserError(
                f"{self.sample} must list the ids 0 to {len(images) - 1}, one for each image of "
                f"{path.name}, found {len(ids)} rows from {min(ids)} to {max(ids)}."
            )
        self.digest = sha256(path)
        return torch.from_numpy(images), torch.arange(len(images))

    def submission(self) -> Submission:
        return SampledSubmission(labels=KNOWN_LABELS[self.competition], sample=self.sample)
