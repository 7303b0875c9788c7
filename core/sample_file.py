"""Submissions in the form of a competition's sample file."""

import csv
import io
import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.errors import UserError
from core.submission import Submission

INTEGER = re.compile(r"[+-]?\d+")


@dataclass(frozen=True)
class SampledSubmission(Submission):
    """A submission with header, ids, order and kind of values of the competition's sample file.

    It asks for probabilities if it has a column for each class, or fractions in its only one;
    otherwise for labels. Ids that are no numbers go by their row in it, 0, 1, ...

    Args:
        probability_of: Label whose probability is asked for, if the sample file does not show that
            it is one; of two classes otherwise the second.
    """

    probability_of: str | None = None

    @property
    def accepted(self) -> tuple[str, ...]:
        return () if self.asked_for() else self.labels

    def asked_for(self) -> list[int]:
        """Return the classes whose probabilities are asked for, in the order of the columns.

        Raises:
            UserError: The sample file fits no form of these labels.
        """
        table = self.table()
        columns, fractions = table.header[1:], any(map(is_fraction, table.labels))
        if self.probability_of is not None and len(columns) == 1:
            columns, fractions = (self.probability_of,), True
        elif fractions and len(columns) == 1 and len(self.labels) == 2:
            columns = self.labels[1:]
        elif len(columns) == 1 and not fractions:
            return []
        if unknown := set(columns) - set(self.labels):
            raise UserError(
                f"{self.sample} asks for probabilities of {', '.join(columns)}, and "
                f"{min(unknown)} is none of the classes {', '.join(self.labels)}; name the classes "
                "as there, or set --data.probability_of=CLASS."
            )
        return [self.labels.index(name) for name in columns]

    def check(self, *outputs: np.ndarray) -> None:
        super().check(*outputs)
        self.asked_for()

    def write_predictions(self, path: Path, ids: np.ndarray, probabilities: np.ndarray) -> None:
        if not (classes := self.asked_for()):
            return super().write_predictions(path, ids, probabilities)
        values = [[f"{p:.6g}" for p in row] for row in probabilities[:, classes].tolist()]
        self.write_values(path, ids, values)

    def table(self) -> "Table":
        assert self.sample is not None
        return read_table(self.sample)

    def header_and_rows(
        self, ids: Collection[int]
    ) -> tuple[Sequence[str], Iterable[tuple[int, int | str]]]:
        """Return header and rows of the sample file.

        Raises:
            UserError: The ids are not those of the sample file.
        """
        table = self.table()
        expected = [i if isinstance(i, int) else row for row, i in enumerate(table.ids)]
        if differing := set(expected) ^ set(ids):
            raise UserError(
                f"{len(differing)} ids differ between the predictions and {self.sample}, "
                f"the first is {min(differing)}; check that all test images are there."
            )
        return table.header, zip(expected, table.ids, strict=True)


@dataclass(frozen=True)
class Table:
    """A submission, sample file or table of labels as read, in the order of its rows.

    Ids are integers if all are, otherwise texts.
    """

    header: tuple[str, ...]
    ids: Sequence[int | str]
    columns: list[list[str]]  # after the ids

    @property
    def labels(self) -> list[str]:
        """All values after the ids, row by row where there is one column of them."""
        return [value for column in self.columns for value in column]

    @property
    def numbered(self) -> bool:
        return isinstance(self.ids[0], int)


def read_table(path: Path, numbered: bool | None = None) -> Table:
    """Read a file of ids and of one or more values after each.

    A byte-order mark and CRLF line ends are accepted: the courses' own files have them.

    Args:
        path: The file.
        numbered: Every id has to be an integer, or is a text; None takes what they are.

    Raises:
        UserError: The file is missing, empty, not UTF-8, or a row is not an id and its values.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a UTF-8 text file.") from None
    rows = csv.reader(io.StringIO(text.rstrip("\r\n"), newline=""))  # blank lines at the end
    header = next(rows, None)
    if not header:
        raise UserError(f"{path} is empty.")
    if len(header) < 2:
        raise UserError(f"{path}: the header must name two columns, got {','.join(header)!r}.")
    values = "a label" if len(header) == 2 else f"{len(header) - 1} values"
    read: list[list[str]] = []
    try:
        for row in rows:
            if len(row) != len(header) or not row[0] or (numbered and not is_number(row[0])):
                kind = "an integer id" if numbered else "an id"
                raise UserError(
                    f"{path}, line {rows.line_num}: expected {kind} and "
                    f"{values}, got {','.join(row)!r}."
                )
            read.append(row)
    except csv.Error as error:  # a quote that is never closed
        raise UserError(f"{path}, line {rows.line_num}: {error}.") from None
    if not read:
        raise UserError(f"{path} has a header but no rows.")
    names, *columns = map(list, zip(*read, strict=True))
    if numbered is None:
        numbered = all(map(is_number, names))
    return Table(tuple(header), list(map(int, names)) if numbered else names, columns)


def is_number(name: str) -> bool:
    """Return true for an integer id; of ``007`` the zeros would be lost."""
    return name.isascii() and name.isdecimal() and (name == "0" or name[0] != "0")


def is_fraction(value: str) -> bool:
    try:
        return not INTEGER.fullmatch(value) and math.isfinite(float(value))
    except ValueError:
        return False
