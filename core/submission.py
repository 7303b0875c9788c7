"""The prediction file of a competition: how it is written, and what a valid one looks like."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from core.errors import UserError
from core.files import atomic_write


@dataclass(frozen=True)
class Submission:
    """The form of a submission: two columns, an id and a label, one row a sample.

    Args:
        labels: What is written for class 0, 1, ...: names, or digits where integers are asked for.
        sample: The competition's sample file, which gives header, ids and their order.
    """

    filename: ClassVar[str] = "submission.csv"
    sendable: ClassVar[bool] = True  # whether submit.py takes it

    labels: tuple[str, ...]
    sample: Path | None = None

    def write_predictions(self, path: Path, ids: np.ndarray, probabilities: np.ndarray) -> None:
        """Write the most probable classes of the samples ``ids`` (N,), given (N, K) of them all.

        Raises:
            UserError: What was predicted are no probabilities of these K labels.
        """
        if probabilities.shape[1:] != (len(self.labels),):
            raise UserError(
                f"predictions of shape {probabilities.shape} are no probabilities of "
                f"{len(self.labels)} classes; only runs that classify whole samples make this file."
            )
        self.write(path, ids, probabilities.argmax(1))

    def count(self, ids: np.ndarray) -> int:
        """How many predictions there are for people, given the ids (N,)."""
        return len(ids)

    def write(self, path: Path, ids: np.ndarray, classes: np.ndarray) -> None:
        """Write the classes (N,) of the samples ``ids`` (N,) in the sample file's order.

        Raises:
            UserError: The ids are not those of the sample file.
        """
        label_of = dict(zip(ids.tolist(), (self.labels[c] for c in classes.tolist()), strict=True))
        if self.sample is None:
            header, order = ("id", "label"), sorted(label_of)
        else:
            table = read_table(self.sample)
            header, order = table.header, table.ids
            if order_differs := set(order) ^ set(label_of):
                raise UserError(
                    f"{len(order_differs)} ids differ between the predictions and {self.sample}, "
                    f"the first is {min(order_differs)}; check that all test images are there."
                )
        rows = "".join(f"{i},{label_of[i]}\n" for i in order)
        with atomic_write(path, "w", newline="") as file:
            file.write(f"{','.join(header)}\n{rows}")


@dataclass(frozen=True)
class FileTable(Submission):
    """A table ``file,label,probability`` for people, not for a competition.

    Args:
        files: The files through which the ids count: 0, 1, ...
    """

    filename: ClassVar[str] = "predictions.csv"
    sendable: ClassVar[bool] = False

    files: tuple[str, ...] = ()

    def write_predictions(self, path: Path, ids: np.ndarray, probabilities: np.ndarray) -> None:
        # names that are not UTF-8 get back the bytes that they have on disk
        with atomic_write(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as out:
            table = csv.writer(out, lineterminator="\n")
            table.writerow(["file", "label", "probability"])
            for i, row in zip(ids.tolist(), probabilities, strict=True):
                label = int(row.argmax())
                table.writerow([self.files[i], self.labels[label], f"{row[label]:.4f}"])


@dataclass(frozen=True)
class Table:
    """A submission or sample file as read: the header, and ids and labels in the file's order."""

    header: tuple[str, str]
    ids: list[int]
    labels: list[str]


def read_table(path: Path) -> Table:
    """Read a two-column file of ids and labels.

    A byte-order mark and CRLF line ends are accepted: the courses' own files have them.

    Raises:
        UserError: The file is missing, empty, not UTF-8, or a row is not an integer and a label.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a UTF-8 text file.") from None
    rows = csv.reader(io.StringIO(text, newline=""))
    header = next(rows, None)
    if not header:
        raise UserError(f"{path} is empty.")
    if len(header) != 2:
        raise UserError(f"{path}: the header must name two columns, got {','.join(header)!r}.")
    ids, labels = [], []
    try:
        for row in rows:
            if len(row) != 2 or not row[0].isdecimal():
                raise UserError(
                    f"{path}, line {rows.line_num}: expected an integer id and a label, "
                    f"got {','.join(row)!r}."
                )
            ids.append(int(row[0]))
            labels.append(row[1])
    except csv.Error as error:  # a quote that is never closed
        raise UserError(f"{path}, line {rows.line_num}: {error}.") from None
    if not ids:
        raise UserError(f"{path} has a header but no rows.")
    return Table((header[0], header[1]), ids, labels)
