"""The predictions for files, for people."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from core.files import atomic_write
from core.submission import Submission


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
