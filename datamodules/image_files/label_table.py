"""Tables of the classes of images, as data sets bring them along."""

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from core.errors import UserError
from core.sample_file import read_table


def read_label_table(path: Path) -> dict[str, str]:
    """The class of each id, in the order of the rows.

    Classes are the values of the second column, or the names of the columns where each row has
    a 1 in one of them and a 0 in the others.

    Raises:
        UserError: It is no such table, or has an id twice.
    """
    table = read_table(path, numbered=False)
    rows = [list(row) for row in zip(*table.columns, strict=True)]
    labels = [row[0] for row in rows]
    if len(table.columns) > 1:
        ones = [[value in ("1", "1.0") for value in row] for row in rows]
        if any(sum(row) != 1 for row in ones):
            raise UserError(
                f"{path} has the columns {', '.join(table.header)}; keep two, the names of the "
                "images and their classes, or one of 0 and 1 for each class."
            )
        labels = [table.header[1 + row.index(True)] for row in ones]
    class_of: dict[str, str] = {}
    for name, label in zip(table.ids, labels, strict=True):
        if str(name) in class_of:
            raise UserError(f"{path}: the id {name} comes more than once.")
        class_of[str(name)] = label
    return class_of


def look_up(class_of: dict[str, str], file: str) -> str | None:
    """The class of an image, which a table names with or without its ending."""
    name = PurePosixPath(file).name
    return class_of.get(name, class_of.get(name.rpartition(".")[0]))


def find_label_table(folders: Iterable[Path], files: list[str]) -> Path | None:
    """The table in one of the folders that names some of the files, or None.

    Raises:
        UserError: There are several.
    """
    found = []
    for path in (path for folder in folders for path in sorted(folder.glob("*.csv"))):
        try:
            class_of = {} if "sample" in path.name.lower() else read_label_table(path)
        except UserError:  # a table of something else
            continue
        if any(look_up(class_of, file) is not None for file in files):
            found.append(path)
    if len(found) > 1:
        raise UserError(
            f"both {found[0]} and {found[1]} name the images; choose with --data.labels=FILE."
        )
    return found[0] if found else None
