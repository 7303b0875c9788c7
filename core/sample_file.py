"""Submissions in the form of a competition's sample file."""

import csv
import io
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from core.errors import UserError
from core.submission import Submission


@dataclass(frozen=True)
class SampledSubmission(Submission):
    """A submission with header, ids and order of the competition's sample file."""

    def header_and_order(self, ids: Collection[int]) -> tuple[tuple[str, str], list[int]]:
        """Those of the sample file.

        Raises:
            UserError: The ids are not those of the sample file.
        """
        assert self.sample is not None
        table = read_table(self.sample)
        if differing := set(table.ids) ^ set(ids):
            raise UserError(
                f"{len(differing)} ids differ between the predictions and {self.sample}, "
                f"the first is {min(differing)}; check that all test images are there."
            )
        return table.header, table.ids


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
    rows = csv.reader(io.StringIO(text.rstrip("\r\n"), newline=""))  # blank lines at the end
    header = next(rows, None)
    if not header:
        raise UserError(f"{path} is empty.")
    if len(header) != 2:
        raise UserError(f"{path}: the header must name two columns, got {','.join(header)!r}.")
    ids, labels = [], []
    try:
        for row in rows:
            if len(row) != 2 or not (row[0].isascii() and row[0].isdecimal()):
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
