"""The table and the picture of a study."""

import argparse
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from core.errors import UserError
from core.files import atomic_write
from pipeline.studies.grid import Study, last_part
from pipeline.studies.metrics import SEED, from_folders, from_wandb, steps_until, summary
from steadyfit.panels import GREY, LINES, count_axis


def report(options: argparse.Namespace) -> None:
    """Write the table and the picture, print the table, and keep both on a W&B run.

    Raises:
        UserError: A parameter or metric is unknown, a third parameter varies, or there is no run.
    """
    study = Study.load(options.study)
    metric = options.y or study.metric
    if metric is None:
        raise UserError(f"{study.path} names no metric; say which with --y METRIC.")
    where, root = study.where(options.where), Path(options.root)
    x, hue = _axes_of(study, options.x, options.hue, set(where))
    read = from_wandb(study, options.sweep, metric) if options.sweep else None
    found = list(read or from_folders(study, root, metric))
    kept = [(point, values) for point, values in found if where.items() <= point.items()]
    if not kept:
        raise UserError(
            f"{study.name} has no finished run to report; `python study.py run {study.path}` first."
        )
    window = options.window if metric.startswith("train/") else 1
    curves = [values.rolling(window).mean() for _, values in kept]
    y, missing, ends = _measured(metric, curves, options.below, options.above)
    points = [
        {k: str(v) if isinstance(v, list | dict) else v for k, v in p.items()} for p, _ in kept
    ]
    runs = pd.DataFrame(points).assign(study=study.name, y=ends)
    by = list(dict.fromkeys(key for key in (hue, x) if key not in (None, "step")))
    table = summary(runs, by)
    if x == "step":
        level = options.above if options.below is None else options.below
        figure = curves_picture(_by_name(runs[by[0]], curves), metric, window, level)
    elif pd.api.types.is_numeric_dtype(runs[x]):
        figure = _points_picture(runs, table, x, y, hue)
    else:
        figure = _names_picture(runs, table, x, y, hue)
    shown = " and ".join([f"{y} by {last_part(x)}", *([last_part(hue)] if hue else [])])
    chosen = ", ".join(f"{last_part(key)}={value}" for key, value in where.items())
    title = shown + (f" where {chosen}" if chosen else "")
    folder = options.output or root / study.name / "report"
    path = folder / re.sub(r"[^\w.=]+", "-", title)
    text = _markdown(*cells(table, by, y, missing))
    _save(path, table, text, figure)
    print(text, end="")
    if len(found) < len(study.points):
        print(f"{len(study.points) - len(found)} of {len(study.points)} runs are not finished.")
    print(f"{path.name}.png, .csv and .md are in {folder}")
    if options.html:
        from pipeline.page.several import page_of_study  # it reads this module

        page = page_of_study(study, title, runs, by, y, missing, figure)
        page.write(path.with_name(f"{path.name}.html"))
    _keep_on_wandb(study, folder, table, path)


def _axes_of(
    study: Study, x: str | None, hue: str | None, fixed: set[str]
) -> tuple[str, str | None]:
    """Choose the axes: a parameter or ``step`` across, and another parameter in colours.

    Args:
        study: The study.
        x: As typed; by default the first parameter that varies.
        hue: As typed, or None; for curves by default the first parameter that varies.
        fixed: Parameters of which one value alone is shown.

    Raises:
        UserError: A parameter is unknown, or a third one varies.
    """
    hue = hue and study.parameter(hue)
    varied = [key for key, values in study.parameters.items() if len(values) > 1]
    varied = [key for key in varied if key not in {SEED, hue, *fixed}]
    first = varied[0] if varied else "study"  # nothing but seeds: one mean of all runs
    if x == "step":
        hue = hue or first
    else:
        x = study.parameter(x) if x else first
    if left := [key for key in varied if key not in (x, hue)]:
        raise UserError(
            f"{left[0]} varies as well; show it with --hue, or keep one value with "
            f"--where {last_part(left[0])}=VALUE."
        )
    return x, None if hue == x else hue


def _measured(
    metric: str, curves: Sequence[pd.Series], below: float | None, above: float | None
) -> tuple[str, str, list[float]]:
    """The quantity that is reported, the reason why a run has none, and its value of each run."""
    if below is not None:
        ends = [steps_until(values < below) for values in curves]
        return f"steps until {metric} < {below:g}", "never", ends
    if above is not None:
        ends = [steps_until(values > above) for values in curves]
        return f"steps until {metric} > {above:g}", "never", ends
    return metric, "not finite", [float(values.iloc[-1]) for values in curves]


def _by_name(names: pd.Series, curves: Sequence[pd.Series]) -> dict[str, list[pd.Series]]:
    found: dict[str, list[pd.Series]] = {}
    for name, values in zip(names, curves, strict=True):
        found.setdefault(str(name), []).append(values.dropna())
    return found


def cells(
    table: pd.DataFrame, by: Sequence[str], y: str, missing: str
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of :func:`summary` as text; accuracies in percent.

    Args:
        table: The table.
        by: The columns whose values make a group.
        y: The quantity of the means.
        missing: The reason why a run has no value.
    """
    percent = y.endswith("accuracy")
    head = [*map(last_part, by), f"{y}{', %' if percent else ''}", "95 % interval", "runs"]

    def say(value: float) -> str:
        if np.isnan(value):
            return "-"
        return f"{100 * value:.2f}" if percent else f"{value:.4g}"

    rows = []
    for row in table.to_dict("records"):
        spread = "" if np.isnan(row["sd"]) else f" ± {say(row['sd'])}"
        interval = "-" if np.isnan(row["low"]) else f"{say(row['low'])} to {say(row['high'])}"
        lost = f", {row['missing']} more {missing}" if row["missing"] else ""
        measured = [f"{say(row['mean'])}{spread}", interval, f"{row['n']}{lost}"]
        rows.append([*(str(row[key]) for key in by), *measured])
    return head, rows


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _groups(
    runs: pd.DataFrame, table: pd.DataFrame, hue: str | None
) -> Iterator[tuple[Any, pd.DataFrame, pd.DataFrame, dict[str, Any]]]:
    """Of each value of ``hue`` its name, means, runs, and how they are drawn."""
    groups = [(None, table)] if hue is None else table.groupby(hue, sort=False)
    for number, (label, means) in enumerate(groups):
        own = runs if hue is None else runs[runs[hue] == label]
        style = {"color": LINES[number % len(LINES)], "ms": 5}
        yield label, means, own, style


def _points_picture(
    runs: pd.DataFrame, table: pd.DataFrame, x: str, y: str, hue: str | None
) -> Figure:
    """Means with 95 % intervals against a parameter that is a number; each run as a faint dot."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, means, own, style in _groups(runs, table, hue):
        means = means.sort_values(x)
        errors = means["high"] - means["mean"]
        axes.errorbar(means[x], means["mean"], errors, marker="o", capsize=3, label=label, **style)
        axes.plot(own[x], own["y"], ".", alpha=0.35, **style)
    values = sorted(set(table[x]))
    if 0 < values[0] < values[-1] / 30:
        axes.set_xscale("log")
    axes.set_xticks(values, [f"{value:g}" for value in values], minor=False)
    axes.minorticks_off()
    _finish(axes, last_part(x), y, hue)
    return figure


def _names_picture(
    runs: pd.DataFrame, table: pd.DataFrame, x: str, y: str, hue: str | None
) -> Figure:
    """A line for each name: its mean with the 95 % interval, and each run as a faint dot."""
    names = list(dict.fromkeys(table[x]))
    figure = Figure(figsize=(7, 1.2 + 0.32 * len(names)), layout="constrained")
    axes = figure.subplots()
    groups = list(_groups(runs, table, hue))
    for number, (label, means, own, style) in enumerate(groups):
        shift = 0.5 * (number + 0.5) / len(groups) - 0.25
        places = {name: place + shift for place, name in enumerate(names)}
        errors = means["high"] - means["mean"]
        rows = means[x].map(places)
        axes.plot(own["y"], own[x].map(places), ".", alpha=0.35, **style)
        axes.errorbar(means["mean"], rows, xerr=errors, fmt="o", capsize=3, label=label, **style)
    axes.axvline(table["mean"].iloc[0], color=GREY, linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(names)), [str(name) for name in names])
    axes.invert_yaxis()
    axes.locator_params(axis="x", nbins=6)  # labels in percent are long
    _finish(axes, y, "", hue)
    return figure


def curves_picture(
    curves: dict[str, list[pd.Series]], y: str, window: int, level: float | None
) -> Figure:
    """The mean curve of each name over its runs, and a band of one standard deviation.

    Args:
        curves: For each name the values of its runs, by optimizer step.
        y: The quantity.
        window: Number of steps that each value is the mean of.
        level: Draw a line there.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    lowest = np.inf
    for number, (name, runs) in enumerate(curves.items()):
        color = LINES[number % len(LINES)]
        style = ["-", "--", ":"][number // len(LINES) % 3]
        together = pd.concat(runs, axis=1)
        mean, sd = together.mean(axis=1), together.std(axis=1).fillna(0)
        axes.plot(mean, style, color=color, label=name)
        axes.fill_between(mean.index, mean - sd, mean + sd, color=color, alpha=0.2, linewidth=0)
        lowest = min(lowest, float(mean.min()))
    if level is not None:
        axes.axhline(level, color=GREY, linewidth=0.8, linestyle=":")
    high = axes.get_ylim()[1]
    if lowest > 0 and high > 30 * lowest:
        axes.set_yscale("log")
    axes.legend(frameon=False)
    of = f", mean of {window} steps" if window > 1 else ""
    _finish(axes, "", f"{y}{of}")
    count_axis([axes], "optimizer step")
    return figure


def _finish(axes: Axes, x_label: str, y_label: str, hue: str | None = None) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if hue is not None:
        axes.legend(title=last_part(hue), frameon=False)
    for axis, label in ((axes.xaxis, x_label), (axes.yaxis, y_label)):
        if label.endswith("accuracy"):
            axis.set_major_formatter(PercentFormatter(1))


def _save(path: Path, table: pd.DataFrame, text: str, figure: Figure) -> None:
    with atomic_write(path.with_name(f"{path.name}.csv"), "w") as file:
        table.to_csv(file, index=False)
    with atomic_write(path.with_name(f"{path.name}.md"), "w") as file:
        file.write(text)
    with atomic_write(path.with_name(f"{path.name}.png")) as file:
        figure.savefig(file, format="png", dpi=120)


def _keep_on_wandb(study: Study, folder: Path, table: pd.DataFrame, path: Path) -> None:
    """Table and picture on a W&B run of their own, in the group of the study's runs.

    Raises:
        UserError: W&B does not take them.
    """
    import wandb

    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_SILENT", "true")
    name = f"{study.name}/report"
    try:
        with wandb.init(
            project="steadyfit", group=study.name, job_type="report", name=name, dir=folder
        ) as run:
            picture = wandb.Image(f"{path}.png")
            run.log({path.name: picture, f"{path.name} table": wandb.Table(dataframe=table)})
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the report is written, but W&B does not take it: {reason}") from None
