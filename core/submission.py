"""The prediction file of a competition: how it is written, and what a valid one looks like."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from core.errors import UserError
from core.files import atomic_write

# what is written for class 0, 1, ..., by competition; here, as submit.py does without torch
KNOWN_LABELS = {
    "cifar-10": (
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    ),
    "ucsb-cs291k-hw2-2022-fall": tuple("0123456789"),
}


@dataclass(frozen=True)
class Submission:
    """The form of a submission: two columns, an id and a label, one row a sample.

    Args:
        labels: What is written for class 0, 1, ...: names, or digits where integers are asked for.
        sample: The competition's sample file, where there is one.
    """

    filename: ClassVar[str] = "submission.csv"
    sendable: ClassVar[bool] = True  # whether submit.py takes it

    labels: tuple[str, ...]
    sample: Path | None = None

    def check(self, *outputs: np.ndarray) -> None:
        """Refuse what was predicted before anything is written.

        Raises:
            UserError: It is no probabilities (N, K) of these K labels.
        """
        shape = outputs[0].shape
        if shape[1:] != (len(self.labels),):
            raise UserError(
                f"predictions of shape {shape} are no probabilities of {len(self.labels)} classes; "
                "only runs that classify whole samples make this file."
            )

    def write_predictions(self, path: Path, ids: np.ndarray, probabilities: np.ndarray) -> None:
        """Write the most probable classes of the samples ``ids`` (N,), given (N, K) of them all."""
        self.write(path, ids, probabilities.argmax(1))

    def count(self, ids: np.ndarray) -> int:
        """How many predictions there are for people, given the ids (N,)."""
        return len(ids)

    def write(self, path: Path, ids: np.ndarray, classes: np.ndarray) -> None:
        """Write the classes (N,) of the samples ``ids`` (N,)."""
        label_of = dict(zip(ids.tolist(), (self.labels[c] for c in classes.tolist()), strict=True))
        header, order = self.header_and_order(label_of)
        rows = "".join(f"{i},{label_of[i]}\n" for i in order)
        with atomic_write(path, "w", newline="") as file:
            file.write(f"{','.join(header)}\n{rows}")

    def header_and_order(self, ids: Collection[int]) -> tuple[tuple[str, str], list[int]]:
        """Hook: the first line, and the ids in the order of the rows."""
        return ("id", "label"), sorted(ids)
