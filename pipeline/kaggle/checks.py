"""Checks of a submission file against what its competition asks for."""

import math
import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from core.errors import UserError
from core.sample_file import INTEGER, Table, read_table

_TYPES = {"an integer", "a number", "text"}
_PRINTED = re.compile(r"(tensor|array|np\.\w+)\(.*\)", re.DOTALL)


def check_submission(path: Path, sample: Path, labels: Collection[str] | None = None) -> Table:
    """Read a submission and make sure that it is what the competition asks for.

    It has the header of the sample file and each of its ids once, in any order, hence as many rows.

    Args:
        path: The file to be sent.
        sample: The competition's sample file.
        labels: The labels that may occur; None if they are not known, and only have to be of the
            sample file's type.

    Raises:
        UserError: What differs, how often, and where first.
    """
    expected = read_table(sample)
    table = read_table(path, expected.numbered)
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
    kinds = {_kind_of(label) for label in expected.labels} & _TYPES or _TYPES
    if "a number" in kinds:
        kinds |= {"an integer"}
    for i, label in zip(len(table.columns) * list(table.ids), table.labels, strict=True):
        if labels is not None and label not in labels:
            raise UserError(
                f"{path}: id {i} has the unknown label {label!r}; allowed are {', '.join(labels)}."
            )
        if not label or (labels is None and _kind_of(label) not in kinds):
            raise UserError(
                f"{path}: the label {label!r} of id {i} is {_kind_of(label)}, but {sample} has "
                f"{' and '.join(sorted(kinds))}; write labels like those."
            )
    return table


def _kind_of(label: str) -> str:
    """Return the type of a label, which may be one that comes from a mistake."""
    if not label or label != label.strip():
        return "empty or padded with spaces"
    if _PRINTED.fullmatch(label):
        return "a printed array"
    try:
        number = float(label)
    except ValueError:
        return "text"
    if not math.isfinite(number):
        return "not finite"
    return "an integer" if INTEGER.fullmatch(label) else "a number"
