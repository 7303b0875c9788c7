"""Metrics of the runs of a study, from their folders or from the W&B server."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from callbacks.run.wandb_logger import STEP
from core.errors import UserError
from pipeline.studies.grid import Point, PointRecord, Study

SEED = "seed_everything"


def read_metrics(folder: Path) -> pd.DataFrame:
    """The metrics of a run as text, a row an optimizer step; empty where nothing was logged.

    As text, because to pandas a loss that is not a number is a cell without a number.

    Raises:
        UserError: The run has none.
    """
    path = folder / "metrics.csv"
    try:
        metrics = pd.read_csv(path, dtype=str, keep_default_na=False)
        return metrics.set_index(metrics.pop("step").astype(int)).sort_index()
    except (OSError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); train the run first, with its loggers."
        ) from None


def metric_of(folder: Path, name: str) -> pd.Series:
    """The values of one metric, by optimizer step.

    Raises:
        UserError: The run has no such metric.
    """
    metrics = read_metrics(folder)
    filled = metrics != ""
    if name not in metrics or not filled[name].any():
        known = ", ".join(str(column) for column in metrics.columns[filled.any()])
        raise UserError(f"{folder} has no metric {name}; it has {known}.")
    return metrics.loc[filled[name], name].astype(float)


def last_value(folder: Path, name: str) -> float | None:
    """The last value of a metric, or None where a run has none."""
    try:
        return float(metric_of(folder, name).iloc[-1])
    except UserError:
        return None


def steps_until(reached: pd.Series) -> float:
    """Optimizer steps until the first that is true, of truth values by step; NaN if none is."""
    steps = reached.index[reached]
    return float(steps[0]) + 1 if len(steps) else float("nan")


Found = Iterator[tuple[Point, pd.Series]]  # finished runs, each metric by optimizer step


def from_folders(study: Study, root: Path, metric: str) -> Found:
    """The finished runs below ``root``, made here or by agents.

    Raises:
        UserError: A run has no such metric, or two were trained with different settings that a
            study's runs have in common.
    """
    first: tuple[Path, str | None] | None = None
    for point in study.points:
        folder = root / study.name / study.name_of(point)
        record = PointRecord(folder).read()
        if record is None or not record["finished"]:
            continue
        common = record.get("common")
        first = first or (folder, common)
        if common != first[1]:
            raise UserError(
                f"{folder} and {first[0]} were trained with different settings, which the study "
                "has changed in between; delete the older one."
            )
        yield point, metric_of(folder, metric)


def from_wandb(study: Study, sweep: str, metric: str) -> Found:
    """The finished runs of a sweep on the W&B server, ``entity/project/id``.

    Raises:
        UserError: The sweep cannot be read, two runs are of one point, or one lacks the metric.
    """
    import wandb

    try:
        runs = list(wandb.Api().sweep(sweep).runs)
    except (wandb.Error, ValueError) as error:
        raise UserError(f"sweep {sweep} cannot be read: {' '.join(str(error).split())}.") from None
    seen: dict[str, str] = {}
    for run in runs:
        if run.state != "finished":
            continue
        point = {key: study.value(key, str(run.config.get(key))) for key in study.parameters}
        name = study.name_of(point)
        if name in seen:
            raise UserError(
                f"{seen[name]} and {run.name} are both runs of the point {name}; delete one of "
                "them on W&B."
            )
        seen[name] = run.name
        rows = list(run.scan_history(keys=[STEP, metric]))
        if not rows:
            raise UserError(f"the W&B run {run.name} has no metric {metric}.")
        yield point, pd.DataFrame(rows).set_index(STEP)[metric].sort_index()


def summary(runs: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Mean, standard deviation and 95 % interval of the column ``y`` for each group of runs.

    The interval is Student's for the mean of a few independent runs; with one run it is NaN.

    Args:
        runs: A row a run.
        by: The columns whose values make a group.

    Returns:
        A row for each group in order of appearance: its values, ``mean``, ``sd``, ``low``,
        ``high``, ``n``, and in ``missing`` the number of runs without a finite value.
    """
    finite = runs["y"].where(np.isfinite(runs["y"]))
    groups = runs.assign(y=finite).groupby(list(by), sort=False)["y"]
    table = groups.agg(mean="mean", sd="std", n="count").reset_index()
    half = table["sd"] / np.sqrt(table["n"]) * stats.t.ppf(0.975, table["n"] - 1)
    table.insert(len(by) + 2, "low", table["mean"] - half)
    table.insert(len(by) + 3, "high", table["mean"] + half)
    return table.assign(missing=groups.size().to_numpy() - table["n"])


@dataclass(frozen=True)
class Difference:
    """Difference between the mean of a second group of runs and that of a first.

    Attributes:
        means: Of both groups.
        ends: Of the 95 % interval of the difference; NaN if no run differs from another.
        p: Of a difference as large by chance, two-sided; NaN likewise.
        n: Runs of both groups.
        paired: Whether runs of the same seed were compared; others are then left out.
    """

    means: tuple[float, float]
    ends: tuple[float, float]
    p: float
    n: tuple[int, int]
    paired: bool


def difference(first: pd.Series, second: pd.Series) -> Difference:
    """Compare groups of runs: Student's test of pairs where they share seeds, else Welch's.

    With a single run in a group nobody knows what another seed gives: all is NaN but the means.

    Args:
        first: A finite value for each run, by seed.
        second: Likewise.
    """
    shared = first.index.intersection(second.index)
    paired = len(shared) > 1 and first.index.is_unique and second.index.is_unique
    if paired:
        first, second = first[shared], second[shared]
    p = low = high = float("nan")
    if min(len(first), len(second)) > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of runs that are equal
            welch = {} if paired else {"equal_var": False}
            test = (stats.ttest_rel if paired else stats.ttest_ind)(second, first, **welch)
            p, (low, high) = float(test.pvalue), test.confidence_interval()
    means = float(first.mean()), float(second.mean())
    return Difference(means, (float(low), float(high)), p, (len(first), len(second)), paired)
