"""Folds of a labelled set: each is the validation part of one run. Dimensions: N samples."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from core.errors import UserError
from datamodules.loaders.resident import SampleId


def check_folds(folds: int | None, fold: int | None) -> None:
    """Refuse a fold that there cannot be.

    Raises:
        UserError: One of the two is missing or out of range.
    """
    if folds is None and fold is None:
        return
    if folds is None or folds < 2:
        raise UserError(f"folds must be at least 2, got {folds}; 5 is usual.")
    if fold is None or not 0 <= fold < folds:
        raise UserError(f"fold must be from 0 to {folds - 1}, as folds is {folds}, got {fold}.")


def assign_folds(targets: Tensor, folds: int, copies: int = 1) -> Tensor:
    """Fold (N,) of each sample, with the same share of every class; no seed of a run changes it.

    Args:
        targets: Classes (N,).
        folds: How many there are.
        copies: So many samples side by side are made of one original and share its fold.

    Raises:
        UserError: Every class has fewer samples than there are folds.
    """
    from sklearn.model_selection import StratifiedKFold  # a second of imports

    classes = targets[::copies].numpy()
    if (most := int(targets[::copies].bincount().max())) < folds:
        raise UserError(f"folds is {folds}, but no class has more than {most} samples; take fewer.")
    fold_of = torch.empty(len(classes), dtype=torch.int64)
    splits = StratifiedKFold(folds, shuffle=True, random_state=0).split(classes, classes)
    for fold, (_, held_out) in enumerate(splits):
        fold_of[held_out] = fold
    return fold_of.repeat_interleave(copies)[: len(targets)]


def split_digest(ids: Sequence[SampleId], targets: Tensor, fold_of: Tensor) -> str:
    """SHA-256 of the id, class and fold of each sample: the same wherever the data lie."""
    rows = list(zip(ids, targets.tolist(), fold_of.tolist(), strict=False))
    return hashlib.sha256(repr(rows).encode()).hexdigest()
