"""Out-of-fold predictions: of each labelled sample by the one run that was not trained on it.

Dimensions: N samples, K classes.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import UserError
from core.files import atomic_write, sha256
from pipeline.kaggle.prediction_file import wilson_interval
from pipeline.loading import LoadedRun

Columns = dict[str, Any]  # arrays: ids (N,), probabilities (N, K), labels (N,) and folds (N,)


def refuse_overlap(members: Sequence[LoadedRun]) -> None:
    """Refuse runs of which one may have been trained on samples that it is to predict.

    Raises:
        UserError: They are not the runs of all folds of one split, each from the beginning.
    """
    of_fold: dict[int, Path] = {}
    for member in members:
        name, (_, fold) = member.source, member.folds
        if not member.split:
            raise UserError(f"{name} was trained without folds.")
        if member.split != members[0].split:
            raise UserError(f"{members[0].source} and {name} were trained with different folds.")
        if source := member.config.get("init_from"):
            raise UserError(f"{name} began with the weights of {source}, which may know its fold.")
        if fold in of_fold:
            raise UserError(f"{of_fold[fold]} and {name} both hold out fold {fold}.")
        of_fold[fold] = name
    folds = range(members[0].folds[0])
    if missing := [str(fold) for fold in folds if fold not in of_fold]:
        raise UserError(f"no run holds out fold {', '.join(missing)} of {len(folds)}.")


def join(members: Sequence[LoadedRun], predictions: Sequence[tuple[np.ndarray, Any]]) -> Columns:
    """Put together what each run predicts of its own fold, in the order of the samples.

    Args:
        members: The runs, whose data are those of :meth:`BaseDataModule.held_out`.
        predictions: Of each, the numbers of the samples in ascending order, and its outputs.

    Raises:
        UserError: The folds of the data are not those that a run was trained with.
    """
    targets = []
    for member in members:
        if member.data.split_digest != member.split:
            raise UserError(
                f"{member.source} was trained with other folds than its data have now; name those "
                "that it was trained on with --data_dir."
            )
        numbers, target = (member.data.splits[part][-1] for part in ("predict", "val"))
        targets.append(target[numbers.argsort()].numpy())
    order = np.concatenate([numbers for numbers, _ in predictions]).argsort()
    return {
        "ids": np.array(members[0].data.ids[: len(order)]),
        "probabilities": np.concatenate([x["probabilities"] for _, x in predictions])[order],
        "labels": np.concatenate(targets)[order],
        "folds": np.repeat([m.data.fold for m in members], [len(t) for t in targets])[order],
    }


def remove(path: Path, recorded: Path) -> None:
    """Remove what belongs to the predictions whose record is to be replaced, and no other's."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        if json.loads(recorded.read_text())["out_of_fold"]["sha256"] == sha256(path):
            path.unlink()


def save(path: Path, columns: Columns, class_names: Sequence[str]) -> dict[str, Any]:
    """Write what was put together, print its accuracy, and return the record of both.

    The interval takes the samples for independent, and the runs of all folds for one.
    """
    with atomic_write(path) as file:
        np.savez(file, **columns, classes=np.array(class_names))
    right = columns["probabilities"].argmax(1) == columns["labels"]
    accuracy, samples = float(right.mean()), len(right)
    low, high = wilson_interval(accuracy, samples)
    interval = f"95% interval {low:.2%} to {high:.2%}, {samples} samples"
    print(f"{path}: out-of-fold accuracy {accuracy:.2%} ({interval})")
    measured = {"accuracy": accuracy, "interval": [low, high], "samples": samples}
    return {"file": path.name, "sha256": sha256(path), **measured}
