"""Samples that a training leaves out, by their ids."""

import re
from collections.abc import Sequence

from lightning.pytorch.utilities import rank_zero_only

from core.errors import UserError
from core.files import read_lines
from datamodules.loaders.resident import SampleId


def excluded_ids(exclude: str) -> str:
    """The ids that ``exclude`` stands for, sorted, each with the end of its line.

    Args:
        exclude: A text file with an id a line; a ``#`` before a line or after a blank begins
            a comment. Or such lines themselves, as this function gives them.

    Raises:
        UserError: The file cannot be read, or names no sample.
    """
    try:
        lines = exclude.split("\n") if exclude.endswith("\n") else read_lines(exclude)
    except UserError as error:
        raise UserError(f"exclude takes a text file of ids: {error}") from None
    ids = {re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip() for line in lines} - {""}
    if not ids:
        raise UserError(f"{exclude} names no sample to exclude; write an id a line.")
    return "".join(f"{sample}\n" for sample in sorted(ids))


def are_left_in(exclude: str, ids: Sequence[SampleId]) -> list[bool]:
    """True for each sample of a set that may be trained on.

    Raises:
        UserError: A sample to exclude is not in the set.
    """
    excluded = set(excluded_ids(exclude)[:-1].split("\n"))
    if unknown := sorted(excluded.difference(map(str, ids))):
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise UserError(
            f"exclude names samples that the set does not have: {', '.join(unknown[:3])}{more}; "
            f"take ids from the samples in spikes.jsonl, such as {ids[0]}."
        )
    return [str(sample) not in excluded for sample in ids]


def say_left_out(exclude: str, count: int, left: int) -> None:
    """Say how many of the samples to exclude were left out of training.

    Raises:
        UserError: Nothing is left to train on.
    """
    if not left:
        raise UserError("exclude leaves no sample to train on; list fewer.")
    listed = excluded_ids(exclude).count("\n")
    others = "" if count == listed else "; the others are not in it, and validation keeps its own"
    rank_zero_only(print)(f"Left out of training: {count} of {listed} samples to exclude{others}.")
