"""Whether a file is what a competition asks for."""

from collections import Counter
from collections.abc import Collection
from pathlib import Path

from core.errors import UserError
from core.sample_file import Table, read_table


def check_submission(path: Path, sample: Path, labels: Collection[str] | None = None) -> Table:
    """Read a submission and make sure that it is what the competition asks for.

    It has the header of the sample file and each of its ids once, in any order, hence as many rows.

    Args:
        path: The file to be sent.
        sample: The competition's sample file.
        labels: The labels that may occur; None if they are not known.

    Raises:
        UserError: What differs, how often, and where first.
    """
    table, expected = read_table(path), read_table(sample)
    if table.header != expected.header:
        raise UserError(
            f"{path}: the header is {','.join(table.header)}, but {sample} has "
            f"{','.join(expected.header)}; write the first line like that."
        )
    ids, expected_ids = set(table.ids), set(expected.ids)
    if doubled := [i for i, times in Counter(table.ids).items() if times > 1]:
        raise UserError(
            f"{path}: {len(doubled)} ids come more than once, the first is {min(doubled)}; "
            "keep one row of each."
        )
    if missing := expected_ids - ids:
        raise UserError(
            f"{path}: {len(missing)} of the {len(expected_ids)} ids in {sample} are missing, "
            f"the first is {min(missing)}; predict all test samples."
        )
    if foreign := ids - expected_ids:
        raise UserError(
            f"{path}: {len(foreign)} ids are not in {sample}, the first is {min(foreign)}; "
            "is that the sample file of this competition?"
        )
    for i, label in zip(table.ids, table.labels, strict=True):
        if labels is not None and label not in labels:
            raise UserError(
                f"{path}: id {i} has the unknown label {label!r}; allowed are {', '.join(labels)}."
            )
    return table
