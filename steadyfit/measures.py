"""Measures of how spiky a training was and of what it learned, by which runs are compared.

Curves are those of ``metrics.csv``. A loss that is not finite counts as infinite.
Dimensions: S optimizer steps, E epochs.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # a third of a second of imports, and this file only reads the columns
    import pandas as pd

HEIGHT = 0.25  # nats by which a loss has to stand out to count
_WINDOW = 128  # optimizer steps of the rolling median

_Spans = list[tuple[int, int]]  # first and last index of stretches


@dataclass(frozen=True)
class Curves:
    """The loss of each step, and the curves over the epochs; numbers count from 0."""

    steps: np.ndarray  # (S,)
    loss: np.ndarray  # (S,)
    epochs: np.ndarray  # (E,)
    last: np.ndarray  # (E,) loss of the last step of each epoch, which the course notebook plots
    mean: np.ndarray  # (E,) mean loss of each epoch
    accuracy: np.ndarray  # (E,) mean accuracy of each epoch in training; NaN if it is unknown
    steps_per_epoch: int
    val_epochs: np.ndarray  # of the validations (V,)
    val_loss: np.ndarray  # (V,)
    val_accuracy: np.ndarray  # (V,); NaN if it is unknown

    @classmethod
    def of(cls, metrics: "pd.DataFrame") -> "Curves":
        """Take the curves out of ``metrics.csv``.

        Raises:
            ValueError: The table has no training loss of each step with its epoch.
        """
        for name in ("epoch", "train/loss"):
            if name not in metrics:
                raise ValueError(f"it has no column {name}; train the run with train.py.")
        table = metrics.sort_values("step")
        table = table[table["epoch"].notna()]  # every training step has it, even if its loss is NaN

        def column(name: str) -> np.ndarray:
            missing = np.full(len(table), np.nan)
            return table[name].to_numpy(float) if name in table else missing

        loss, epoch = finite_or_infinite(column("train/loss")), column("epoch").astype(int)
        epochs, first, counts = np.unique(epoch, return_index=True, return_counts=True)
        validated = table[["val/loss"]].notna().any(axis=1) if "val/loss" in table else epoch < 0
        if "val/accuracy" in table:  # a validation whose loss is NaN is one too
            validated = validated | table["val/accuracy"].notna()
        where = np.flatnonzero(validated)
        return cls(
            steps=column("step").astype(int),
            loss=loss,
            epochs=epochs,
            last=loss[first + counts - 1],
            mean=np.add.reduceat(loss, first) / counts,
            accuracy=np.add.reduceat(column("train/accuracy"), first) / counts,
            steps_per_epoch=int(counts.max()),
            val_epochs=epoch[where],
            val_loss=finite_or_infinite(column("val/loss")[where]),
            val_accuracy=column("val/accuracy")[where],
        )


@dataclass(frozen=True)
class SpikeMeasures:
    """The measures of one run; the first lines mean nothing without the last ones."""

    excess: float  # see `excess_loss`
    excursions: int  # of the loss of each step
    kinks_last: int  # of the loss of the last step of each epoch
    kinks_mean: int  # of the mean loss of each epoch
    kinks_val: int  # of the validation loss
    first_epoch: int | None  # how many epochs it took until validation reached the target
    final_accuracy: float  # of the last validation; NaN if it is unknown
    lowest_after: float | None  # worst validation accuracy after the first one at the target
    learned: bool  # whether the last validation reaches the target


def measure(metrics: "pd.DataFrame", target: float = 0.95) -> SpikeMeasures:
    """Measure a run by its ``metrics.csv``.

    Args:
        metrics: A row for each optimizer step: ``step``, ``epoch``, ``train/loss``, and on the
            steps of a validation ``val/loss`` and ``val/accuracy``.
        target: Validation accuracy (fraction) from which on the task counts as learned.
    """
    curves = Curves.of(metrics)
    reached = np.flatnonzero(curves.val_accuracy >= target)
    first = int(reached[0]) if len(reached) else None
    later = curves.val_accuracy[first + 1 :] if first is not None else np.empty(0)
    final = float(curves.val_accuracy[-1]) if len(curves.val_accuracy) else float("nan")
    return SpikeMeasures(
        excess=excess_loss(curves.loss, curves.steps_per_epoch),
        excursions=len(excursions(curves.loss)),
        kinks_last=len(kinks(curves.last)),
        kinks_mean=len(kinks(curves.mean)),
        kinks_val=len(kinks(curves.val_loss)),
        first_epoch=None if first is None else int(curves.val_epochs[first]) + 1,
        final_accuracy=final,
        lowest_after=float(later.min()) if len(later) else None,
        learned=final >= target,
    )


def kinks(curve: np.ndarray, height: float = HEIGHT, window: int = 10) -> _Spans:
    """Stretches of an epoch curve (E,) above the lowest of the ``window`` epochs before.

    Epochs in a row are one kink.
    """
    curve = finite_or_infinite(curve)
    lowest = [curve[max(0, i - window) : i].min() for i in range(1, len(curve))]
    return _stretches(np.concatenate([[False], curve[1:] > np.array(lowest) + height]))


def excursions(loss: np.ndarray, factor: float = 2.0, height: float = HEIGHT) -> _Spans:
    """Stretches of steps (S,) whose loss is far above what was usual just before.

    That is above ``factor`` times the rolling median, and more than ``height`` above it.
    """
    loss = finite_or_infinite(loss)
    usual = rolling_median(loss)
    usual = np.concatenate([loss[:1], usual[:-1]])
    return _stretches((loss > factor * usual) & (loss > usual + height))


def excess_loss(loss: np.ndarray, steps_per_epoch: int, height: float = HEIGHT) -> float:
    """Loss (S,) above the lowest rolling median so far + ``height``, summed over an epoch's worth.

    In nats times epochs: a run one nat too high for a whole epoch has an excess of 1.
    """
    loss = finite_or_infinite(loss)
    lowest = np.minimum.accumulate(rolling_median(loss))
    if not np.isfinite(lowest).all():
        return float("inf")
    return float(np.maximum(0, loss - (lowest + height)).sum() / steps_per_epoch)


def rolling_median(values: np.ndarray, window: int = _WINDOW) -> np.ndarray:
    """Median of each value (S,) and the ``window - 1`` before it, or as many as there are."""
    short = [np.median(values[: i + 1]) for i in range(min(window - 1, len(values)))]
    if len(values) < window:
        return np.array(short)
    whole = np.median(np.lib.stride_tricks.sliding_window_view(values, window), axis=1)
    return np.concatenate([short, whole])


def finite_or_infinite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.inf)


def _stretches(marked: np.ndarray) -> _Spans:
    """First and last index of each run of ones (S,)."""
    edges = np.diff(np.concatenate([[False], marked, [False]]).astype(int))
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1) - 1
    return [(int(a), int(b)) for a, b in zip(starts, ends, strict=True)]
