"""Parts of figures: colours, panels side by side, lines of many points, marks, legends."""

from collections.abc import Iterable, Sequence, Sized
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# told apart by the colour-blind too (Okabe and Ito, "Color Universal Design", 2008)
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#555555"
ORANGE, SKY, GREEN, PURPLE = "#E69F00", "#56B4E9", "#009E73", "#CC79A7"
LINES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, GREY, "#000000")

_POINTS = 3000  # of a line; what is more is drawn by the largest value of each stretch
_SPIKE: dict[str, Any] = {"marker": "v", "s": 14, "color": VERMILION, "linewidth": 0, "zorder": 3}

Series = tuple[np.ndarray, np.ndarray]  # steps (S,) and values (S,)


def strip_common_prefix(names: Sequence[str]) -> list[str]:
    """Names of parameters without the modules that all of them are in."""
    parts = [name.split(".") for name in names]
    same = 0
    while all(len(p) > same + 1 and p[same] == parts[0][same] for p in parts):
        same += 1
    return [".".join(p[same:]) for p in parts]


def log_norm(maps: Sequence[np.ndarray]) -> LogNorm:
    """A logarithmic scale of colours for all positive values but the lowest percent."""
    values = np.concatenate([table[np.isfinite(table) & (table > 0)] for table in maps])
    if not len(values):
        return LogNorm(0.1, 1)
    return LogNorm(np.quantile(values, 0.01), max(values.max(), np.quantile(values, 0.01) * 10))


def panels(
    count: int,
    heights: Sequence[float],
    beside: float | None = None,
    share: bool = True,
) -> tuple[Figure, np.ndarray]:
    """A figure with a column for each run, and its axes (rows, columns).

    Args:
        count: Number of runs.
        heights: Relative heights of the rows; 1 is about two inches.
        beside: Width of a narrow panel at the right of each, if there should be one.
        share: Whether the panels of a row share their y axis.
    """
    figure = Figure(figsize=(max(8.0, 5.2 * count), 1.0 + 2.1 * sum(heights)), layout="constrained")
    widths = [1.0] * count if beside is None else [1.0, beside] * count
    grid = figure.subplots(
        len(heights),
        len(widths),
        squeeze=False,
        sharey="row" if share else False,
        height_ratios=list(heights),
        width_ratios=widths,
    )
    for axes in grid.flat:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid


def heading(axes: Axes, label: str, lines: int = 1) -> None:
    """Name a column, above as many lines of notes."""
    axes.set_title(label + "\n" * lines, loc="left", fontweight="bold")


def note(axes: Axes, text: str) -> None:
    """Say something above a panel, where it hides nothing."""
    axes.set_title(text, loc="right", fontsize="small", color="#333333")


def label_rows(grid: np.ndarray, labels: Iterable[str]) -> None:
    for axes, label in zip(grid[:, 0], labels, strict=True):
        axes.set_ylabel(label)


def count_axis(column: Sequence[Axes] | np.ndarray, unit: str) -> None:
    """Name below panels what their x axis counts: steps, of which there is no quarter."""
    for axes in column:
        axes.xaxis.set_major_locator(whole_numbers())
    column[-1].set_xlabel(unit)


def whole_numbers() -> MaxNLocator:
    """Ticks where matplotlib has them by default, but on whole numbers alone."""
    return MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=1)


def legend(figure: Figure, grid: np.ndarray) -> None:
    """One legend for all panels, each label once."""
    entries: dict[str, Any] = {}
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    rows = -(-len(entries) // int(figure.get_figwidth() // 2))
    if entries:
        figure.legend(
            entries.values(),
            entries.keys(),
            loc="outside lower center",
            ncols=-(-len(entries) // rows),
            frameon=False,
        )


def dots(points: Sized) -> str:
    """The marker of a line; with few points it is visible, since one alone makes no line."""
    return "." if len(points) < 20 else ""


def draw_line(axes: Axes, series: Series, color: str, label: str | None = None) -> None:
    axes.plot(*decimate(*series), color=color, linewidth=0.7, label=label)


def mask_nonfinite(curve: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(curve), curve, np.nan)


def decimate(steps: np.ndarray, values: np.ndarray, points: int = _POINTS) -> Series:
    """At most ``points`` of a line: the largest value of each stretch, where it was.

    A value that is not finite leaves a gap.
    """
    values = np.where(np.isfinite(values), values, np.nan)
    width = -(-len(values) // points) or 1
    if width == 1:
        return steps, values
    missing = -len(values) % width
    table = np.append(values, np.full(missing, np.nan)).reshape(-1, width)
    where = np.where(np.isnan(table), -np.inf, table).argmax(1)
    index = np.minimum(np.arange(len(table)) * width + where, len(values) - 1)
    return steps[index], values[index]


def mark(axes: Axes, series: Series, spikes: np.ndarray, label: str) -> None:
    """Put a mark on each spike; at the upper edge where the value is not finite."""
    steps, values = series
    if not len(steps) or not len(spikes):
        return
    chosen = np.isin(steps, spikes)
    steps, values = steps[chosen], values[chosen]
    finite = np.isfinite(values)
    axes.scatter(steps[finite], values[finite], **_SPIKE, label=label)
    if not finite.all():
        edge = axes.get_xaxis_transform()
        top = np.full((~finite).sum(), 0.985)
        axes.scatter(
            steps[~finite],
            top,
            marker="x",
            color="black",
            s=20,
            transform=edge,
            label="not finite",
            zorder=4,
        )


def shade(axes: Axes, threshold: Series) -> None:
    """Shade what is above the threshold."""
    steps, values = decimate(*threshold)
    if not np.isfinite(values).any():
        return
    top = axes.get_ylim()[1]
    axes.fill_between(
        steps,
        np.fmin(values, top),
        top,
        color=VERMILION,
        alpha=0.08,
        linewidth=0,
        label="above the threshold of a spike",
    )
    axes.plot(steps, values, color=VERMILION, alpha=0.5, linewidth=0.8)


def same_end(grid: np.ndarray, end: int) -> None:
    for axes in grid.flat:
        axes.set_xlim(0, end)


def same_top(row: np.ndarray, values: Sequence[np.ndarray]) -> None:
    """From zero to above the largest finite value."""
    finite = np.concatenate(values)
    finite = finite[np.isfinite(finite)]
    for axes in row:
        axes.set_ylim(min(0, finite.min(initial=0)), 1.12 * finite.max(initial=0.1))


def same_decades(row: np.ndarray, values: Sequence[np.ndarray]) -> None:
    """A logarithmic axis around all positive values."""
    positive = np.concatenate([v.ravel() for v in values])
    positive = positive[np.isfinite(positive) & (positive > 0)]
    for axes in row:
        if len(positive):
            axes.set_yscale("log")
            axes.set_ylim(np.quantile(positive, 0.001) / 1.5, positive.max() * 3)
