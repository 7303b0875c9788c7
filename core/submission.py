"""The prediction file of a competition: how it is written, and what a valid one looks like."""

import csv
from collections.abc import Collection, Iterable, Sequence
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

    @property
    def accepted(self) -> tuple[str, ...]:
        """The labels that may stand in the file; none if it holds other values."""
        return self.labels

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

    def answers(self, ids: np.ndarray, *outputs: np.ndarray) -> tuple[list[str], np.ndarray]:
        """Return the labels of the samples ``ids`` (N,), and what they were chosen by.

        Raises:
            UserError: As :meth:`check`, but for what the sample file of a competition says.
        """
        Submission.check(self, *outputs)
        return [self.labels[k] for k in outputs[0].argmax(1)], outputs[0]

    def count(self, ids: np.ndarray) -> int:
        """Return the number of predictions for people, given the ids (N,)."""
        return len(ids)

    def write(self, path: Path, ids: np.ndarray, classes: np.ndarray) -> None:
        """Write the classes (N,) of the samples ``ids`` (N,)."""
        self.write_values(path, ids, [[self.labels[c]] for c in classes.tolist()])

    def write_values(self, path: Path, ids: np.ndarray, values: list[list[str]]) -> None:
        """Write the values after the ids (N,), one for each further column."""
        values_of = dict(zip(ids.tolist(), values, strict=True))
        header, rows = self.header_and_rows(values_of)
        with atomic_write(path, "w", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(header)
            table.writerows([name, *values_of[i]] for i, name in rows)

    def header_and_rows(
        self, ids: Collection[int]
    ) -> tuple[Sequence[str], Iterable[tuple[int, int | str]]]:
        """Hook: the first line, and in the order of the rows the ids and how they are written."""
        return ("id", "label"), ((i, i) for i in sorted(ids))
