"""The table and the picture of a study, and learning curves of any runs side by side."""

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from callbacks.pictures.learning_curves import draw_metric
from core.errors import UserError
from core.files import atomic_write
from core.runs import Run
from pipeline.studies.grid import Point, Study, short
from pipeline.studies.metrics import (
    SEED,
    from_folders,
    from_wandb,
    read_metrics,
    steps_until,
    summary,
)
from steadyfit.panels import GREY, LINES, count_axis

PANELS = 6  # runs side by side; with more of them nothing could be read


def cells(
    table: pd.DataFrame, by: Sequence[str], y: str, missing: str
) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of :func:`summary` for people; accuracies in percent.

    Args:
        table: The table.
        by: The columns whose values make a group.
        y: What the means are of.
        missing: What became of the runs without a value.
    """
    percent = y.endswith("accuracy")
    head = [*map(short, by), f"{y}{', %' if percent else ''}", "95 % interval", "runs"]

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


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def points_picture(
    runs: pd.DataFrame, table: pd.DataFrame, x: str, y: str, hue: str | None
) -> Figure:
    """Means with 95 % intervals against a parameter that is a number; each run as a faint dot."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    groups = [(None, table)] if hue is None else table.groupby(hue, sort=False)
    for number, (label, means) in enumerate(groups):
        color = LINES[number % len(LINES)]
        means = means.sort_values(x)
        errors = means["high"] - means["mean"]
        axes.errorbar(
            means[x], means["mean"], errors, color=color, marker="o", ms=5, capsize=3, label=label
        )
        own = runs if hue is None else runs[runs[hue] == label]
        axes.plot(own[x], own["y"], ".", color=color, alpha=0.35, ms=5)
    if hue is not None:
        axes.legend(title=short(hue), frameon=False)
    positive = table[x][table[x] > 0]
    if len(positive) == len(table) and positive.max() > 30 * positive.min():
        axes.set_xscale("log")
    axes.set_xticks(sorted(set(table[x])), [f"{v:g}" for v in sorted(set(table[x]))], minor=False)
    axes.minorticks_off()
    finish(axes, short(x), y)
    return figure


def names_picture(
    runs: pd.DataFrame, table: pd.DataFrame, x: str, y: str, hue: str | None
) -> Figure:
    """A line for each name: its mean with the 95 % interval, and each run as a faint dot."""
    names = list(dict.fromkeys(table[x]))
    figure = Figure(figsize=(7, 1.2 + 0.32 * len(names)), layout="constrained")
    axes = figure.subplots()
    groups = [(None, table)] if hue is None else list(table.groupby(hue, sort=False))
    for number, (label, means) in enumerate(groups):
        color = LINES[number % len(LINES)]
        shift = 0.5 * (number + 0.5) / len(groups) - 0.25
        places = {name: place + shift for place, name in enumerate(names)}
        own = runs if hue is None else runs[runs[hue] == label]
        axes.plot(own["y"], own[x].map(places), ".", color=color, alpha=0.35, ms=5)
        axes.errorbar(
            means["mean"],
            means[x].map(places),
            xerr=means["high"] - means["mean"],
            fmt="o",
            color=color,
            ms=5,
            capsize=3,
            label=label,
        )
    axes.axvline(table["mean"].iloc[0], color=GREY, linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(names)), [str(name) for name in names])
    axes.invert_yaxis()
    axes.locator_params(axis="x", nbins=6)  # labels in percent are long
    if hue is not None:
        axes.legend(title=short(hue), frameon=False)
    finish(axes, y, "", vertical=False)
    return figure


def curves_picture(
    curves: dict[str, list[pd.Series]], y: str, window: int, level: float | None
) -> Figure:
    """The mean curve of each name over its runs, and a band of one standard deviation.

    Args:
        curves: For each name the values of its runs, by optimizer step.
        y: What they are.
        window: Steps that each value is the mean of.
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
    finish(axes, "", f"{y}{of}")
    count_axis([axes], "optimizer step")
    return figure


def finish(axes: Axes, x_label: str, y_label: str, *, vertical: bool = True) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if (y_label if vertical else x_label).endswith("accuracy"):
        (axes.yaxis if vertical else axes.xaxis).set_major_formatter(PercentFormatter(1))


def reported(
    metric: str, means: Sequence[pd.Series], below: float | None, above: float | None
) -> tuple[str, str, list[float]]:
    """What is reported of each run, what became of the runs without it, and its values."""
    if below is not None:
        ends = [steps_until(values < below) for values in means]
        return f"steps until {metric} < {below:g}", "never", ends
    if above is not None:
        ends = [steps_until(values > above) for values in means]
        return f"steps until {metric} > {above:g}", "never", ends
    return metric, "not finite", [float(values.iloc[-1]) for values in means]


def report(options: argparse.Namespace) -> None:
    """Write the table and the picture, print the table, and keep both on a W&B run.

    Raises:
        UserError: A parameter or metric is unknown, a third parameter varies, or there is no run.
    """
    study = Study.load(options.study)
    metric = options.y or study.metric
    if metric is None:
        raise UserError(f"{study.path} names no metric; say which with --y METRIC.")
    where = study.where(options.where)
    x, hue = axes_of(study, options.x, options.hue, set(where))
    if options.sweep:
        found = list(from_wandb(study, options.sweep, metric))
    else:
        found = list(from_folders(study, Path(options.root), metric))
    kept = [(p, values) for p, values in found if all(p[k] == v for k, v in where.items())]
    if not kept:
        raise UserError(
            f"{study.name} has no finished run to report; `python study.py run {study.path}` first."
        )
    window = options.window if metric.startswith("train/") else 1
    means = [values.rolling(window).mean() for _, values in kept]
    level = options.above if options.below is None else options.below
    y, missing, ends = reported(metric, means, options.below, options.above)
    runs = pd.DataFrame([frame_row(study, point) for point, _ in kept])
    runs["y"] = ends
    by = list(dict.fromkeys(key for key in (hue, x) if key not in (None, "step")))
    table = summary(runs, by)
    if x == "step":
        curves: dict[str, list[pd.Series]] = {}
        for name, values in zip(runs[by[0]], means, strict=True):
            curves.setdefault(str(name), []).append(values.dropna())
        figure = curves_picture(curves, metric, window, level)
    elif pd.api.types.is_numeric_dtype(runs[x]):
        figure = points_picture(runs, table, x, y, hue)
    else:
        figure = names_picture(runs, table, x, y, hue)
    folder = options.output or Path(options.root) / study.name / "report"
    shown = [f"{y} by {short(x)}", *([short(hue)] if hue else [])]
    chosen = ", ".join(f"{short(key)}={value}" for key, value in where.items())
    name = " and ".join(shown) + (f" where {chosen}" if chosen else "")
    path = folder / re.sub(r"[^\w.=]+", "-", name)
    text = markdown(*cells(table, by, y, missing))
    save_report(path, table, text, figure)
    print(text, end="")
    if len(found) < len(study.points):
        print(f"{len(study.points) - len(found)} of {len(study.points)} runs are not finished.")
    print(f"{path.name}.png, .csv and .md are in {folder}")
    if options.html:
        from pipeline.page.several import page_of_study  # it reads this module

        page = page_of_study(study, name, runs, by, y, missing, figure)
        page.write(path.with_name(f"{path.name}.html"))
    keep_on_wandb(study, folder, table, path)


def frame_row(study: Study, point: Point) -> Point:
    """A point for a table: lists as text, and 1e-3, which is text to YAML, as a number."""
    row: Point = {"study": study.name}
    for key, value in point.items():
        row[key] = value
        if isinstance(value, list | dict):
            row[key] = str(value)
        elif all(re.fullmatch(r"-?[\d.]+e-?\d+", str(v)) for v in study.parameters[key]):
            row[key] = float(value)
    return row


def axes_of(
    study: Study, x: str | None, hue: str | None, fixed: set[str]
) -> tuple[str, str | None]:
    """What the picture shows: a parameter or ``step`` across, and another one in colours.

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
            f"--where {short(left[0])}=VALUE."
        )
    return x, None if hue == x else hue


def save_report(path: Path, table: pd.DataFrame, text: str, figure: Figure) -> None:
    with atomic_write(path.with_name(f"{path.name}.csv"), "w") as file:
        table.to_csv(file, index=False)
    with atomic_write(path.with_name(f"{path.name}.md"), "w") as file:
        file.write(text)
    with atomic_write(path.with_name(f"{path.name}.png")) as file:
        figure.savefig(file, format="png", dpi=120)


def keep_on_wandb(study: Study, folder: Path, table: pd.DataFrame, path: Path) -> None:
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


def compare(options: argparse.Namespace) -> None:
    """Learning curves of runs side by side, on the same axes.

    Raises:
        UserError: There are too many runs, or not one label for each.
    """
    runs = [Run.find(name, Path(options.root)) for name in options.runs]
    labels = options.labels or [run.folder.name for run in runs]
    if options.labels is None and len(set(labels)) < len(labels):
        labels = [run.label for run in runs]
    if len(labels) != len(runs):
        raise UserError(f"--labels needs one label for each of {len(runs)}, got {len(labels)}.")
    if len(set(labels)) < len(labels):
        raise UserError("two runs have the same label; name each run once, or give --labels.")
    if len(runs) > PANELS:
        raise UserError(f"{len(runs)} runs cannot be read side by side; name {PANELS} at most.")
    figure = learning_curves_of(
        dict(zip(labels, [read_metrics(run.folder) for run in runs], strict=True))
    )
    output = options.output or runs[-1].folder / "comparison" / "learning_curves.png"
    with atomic_write(Path(output)) as file:
        figure.savefig(file, format="png", dpi=120)
    print(f"The learning curves of {len(runs)} runs are in {output}")


def learning_curves_of(runs: dict[str, pd.DataFrame]) -> Figure:
    """A column for each run and a row for loss and accuracy, all with the same axes.

    Raises:
        UserError: The runs have neither.
    """
    logged = {column for metrics in runs.values() for column in metrics}
    rows = [n for n in ("loss", "accuracy") if logged & {f"train/{n}", f"val/{n}"}]
    if not rows:
        raise UserError("the runs have no loss and no accuracy to draw.")
    figure = Figure(figsize=(1 + 3.4 * len(runs), 3 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(runs), sharex=True, sharey="row", squeeze=False)
    for column, (label, metrics) in zip(grid.T, runs.items(), strict=True):
        numbers = metrics.replace("", "nan").astype(float)
        finite = numbers.where(numbers.abs() < float("inf"))
        column[0].set_title(label, loc="left", fontsize="medium")
        for axes, name in zip(column, rows, strict=True):
            draw_metric(axes, name, finite)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        count_axis(column, "optimizer step")
    for axes, name in zip(grid[:, 0], rows, strict=True):
        axes.set_ylabel(name)
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=3, frameon=False)
    return figure
