"""Pictures of what spiked, of one run or of several on common axes.

Dimensions: R runs, S optimizer steps, P parameters (tensors), B batch, T time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import NullLocator, PercentFormatter

from .measures import Curves, SpikeMeasures, excursions, kinks, measure
from .panels import (
    BLUE,
    GREY,
    LINES,
    ORANGE,
    SKY,
    VERMILION,
    Series,
    count_axis,
    dots,
    draw_line,
    heading,
    label_rows,
    legend,
    log_norm,
    mark,
    mask_nonfinite,
    note,
    panels,
    same_decades,
    same_end,
    same_top,
    shade,
    strip_common_prefix,
)
from .through_time import ThroughTime

if TYPE_CHECKING:  # a third of a second of imports, which only a picture needs
    import pandas as pd

_READABLE = 24  # names beside a heat map


@dataclass
class SpikeRun:
    """The data of a run that the pictures show.

    Attributes:
        label: What it is called.
        metrics: ``metrics.csv``.
        target: Validation accuracy (fraction) from which on the task counts as learned.
        norms: Parameter names (P), steps in a bin, and a table (bins, 3, P) of the largest
            gradient, update and weight norms; ``norms.pt`` of the monitor.
        through_time: The gradient at the worst spike.
    """

    label: str
    metrics: "pd.DataFrame"
    target: float = 0.95
    norms: tuple[list[str], int, np.ndarray] | None = None
    through_time: ThroughTime | None = None

    @classmethod
    def read(cls, folder: Path, label: str, target: float = 0.95) -> "SpikeRun":
        """The run in a folder, without the gradient through time."""
        import pandas as pd

        metrics = pd.read_csv(folder / "metrics.csv")
        path = folder / "norms.pt"
        norms = None
        if path.exists():
            first = torch.load(path, weights_only=True).get("0")  # of several optimizers, one
            norms = first and (first["names"], first["width"], first["table"].numpy())
        return cls(label, metrics, target, norms)

    @cached_property
    def curves(self) -> Curves:
        return Curves.of(self.metrics)

    @cached_property
    def measures(self) -> SpikeMeasures:
        return measure(self.metrics, self.target)

    @property
    def end(self) -> int:
        """Number of optimizer steps."""
        return int(self.metrics["step"].max()) + 1

    def series(self, name: str) -> Series:
        """Steps and values of a column, without empty cells; of several optimizers, the first."""
        column = next((c for c in (name, f"{name}/0") if c in self.metrics), None)
        if column is None:
            return np.empty(0, int), np.empty(0)
        table = self.metrics[["step", column]].dropna()
        return table["step"].to_numpy(int), table[column].to_numpy(float)

    def spikes(self, signal: str) -> np.ndarray:
        """Steps at which a signal spiked, from the running count."""
        steps, counts = self.series(f"spikes/{signal}")
        return steps[np.diff(counts, prepend=0) > 0]

    def has(self, name: str) -> bool:
        return len(self.series(name)[0]) > 0


def spike_pictures(runs: Sequence[SpikeRun]) -> dict[str, Figure]:
    """All pictures that can be made of these runs, by file name."""
    pictures = {"spikes_curves": curves_picture(runs)}
    if any(run.has("grad_norm/total") for run in runs):
        pictures["spikes_norms"] = norms_picture(runs)
    if any(run.norms for run in runs):
        pictures["spikes_layers"] = layers_picture(runs)
    if any(run.through_time for run in runs):
        pictures["spikes_through_time"] = through_time_picture(runs)
    return pictures


def curves_picture(runs: Sequence[SpikeRun]) -> Figure:
    """Loss and accuracy over the epochs, as the course notebook has them, and each step's loss."""
    figure, grid = panels(len(runs), heights=(1.2, 0.8, 1.2))
    for run, (epochs, accuracies, steps) in zip(runs, grid.T, strict=True):
        heading(epochs, run.label)
        _draw_epoch_losses(epochs, run)
        _draw_accuracies(accuracies, run)
        _draw_step_loss(steps, run)
    label_rows(grid, ("loss", "accuracy", "loss of each step"))
    same_end(grid[:2], max(run.curves.epochs[-1] + 1 for run in runs))
    same_end(grid[2:], max(run.end for run in runs))
    for column in grid.T:
        count_axis(column[:2], "epoch")
        count_axis(column[2:], "optimizer step")
    same_top(grid[0], [x for r in runs for x in (r.curves.last, r.curves.mean, r.curves.val_loss)])
    same_top(grid[2], [r.curves.loss for r in runs])
    legend(figure, grid)
    return figure


def _draw_epoch_losses(axes: Axes, run: SpikeRun) -> None:
    curves = run.curves
    number, val = curves.epochs + 1, curves.val_epochs + 1
    few = dots(number)
    axes.plot(
        number,
        mask_nonfinite(curves.mean),
        marker=few,
        color=SKY,
        label="training, mean of the epoch",
    )
    axes.plot(
        number, mask_nonfinite(curves.last), marker=few, color=BLUE, label="training, last batch"
    )
    axes.plot(val, mask_nonfinite(curves.val_loss), marker=few, color=VERMILION, label="validation")
    for x, curve, colour in ((number, curves.last, BLUE), (val, curves.val_loss, VERMILION)):
        tops = [a + int(np.argmax(curve[a : b + 1])) for a, b in kinks(curve)]
        axes.scatter(x[tops], curve[tops], s=36, facecolor="none", edgecolor=colour, zorder=3)
    found = run.measures
    note(axes, f"kinks: {found.kinks_last} training, {found.kinks_val} validation")
    axes.scatter([], [], s=36, facecolor="none", edgecolor=GREY, label="kink")


def _draw_accuracies(axes: Axes, run: SpikeRun) -> None:
    curves = run.curves
    few = dots(curves.epochs)
    axes.plot(curves.epochs + 1, curves.accuracy, marker=few, color=SKY)
    axes.plot(curves.val_epochs + 1, curves.val_accuracy, marker=few, color=VERMILION)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylim(0, 1.03)
    found = run.measures
    if math.isnan(found.final_accuracy):
        return
    reached = f"{run.target:.0%} never reached"
    if found.first_epoch is not None:
        reached = f"{run.target:.0%} in epoch {found.first_epoch}"
        if found.lowest_after is not None:
            reached += f", lowest after that {found.lowest_after:.1%}"
    note(axes, f"{reached}; at the end {found.final_accuracy:.1%}")


def _draw_step_loss(axes: Axes, run: SpikeRun) -> None:
    curves = run.curves
    series = curves.steps, curves.loss
    draw_line(axes, series, color=BLUE)
    mark(axes, series, run.spikes("loss"), "spike")
    count = len(excursions(curves.loss))
    note(axes, f"excess loss {run.measures.excess:.2f}; excursions: {count}")


def norms_picture(runs: Sequence[SpikeRun]) -> Figure:
    """Norm of gradient and update in each step, and at the right how often which norm occurs."""
    figure, grid = panels(len(runs), heights=(1.2, 1.2), beside=0.14)
    for row, signal in zip(grid, ("gradient", "update"), strict=True):
        values = []
        for run, axes, beside in zip(runs, row[::2], row[1::2], strict=True):
            before, after = _norm_of(run, signal)
            _draw_norm(axes, run, signal, before, after)
            _draw_histograms(beside, before[1], after[1])
            values += [before[1], after[1], run.series(f"{_COLUMNS[signal]}/threshold")[1]]
        same_decades(row, values)
        for run, axes in zip(runs, row[::2], strict=True):
            shade(axes, run.series(f"{_COLUMNS[signal]}/threshold"))
    for run, axes in zip(runs, grid[0, ::2], strict=True):
        heading(axes, run.label)
    label_rows(grid, ("gradient norm", "update norm"))
    same_end(grid[:, ::2], max(run.end for run in runs))
    for column in grid[:, ::2].T:
        count_axis(column, "optimizer step")
    legend(figure, grid)
    return figure


_COLUMNS = {"gradient": "grad_norm", "update": "update_norm"}


def _norm_of(run: SpikeRun, signal: str) -> tuple[Series, Series]:
    """A norm before clipping and after it; the latter is empty if clipping changed nothing."""
    before = run.series(f"{_COLUMNS[signal]}/total")
    after = run.series(f"{_COLUMNS[signal]}/clipped")
    (_, old), (_, new) = before, after
    same = old.shape == new.shape and np.allclose(old, new, rtol=1e-4, equal_nan=True)
    return before, (np.empty(0, int), np.empty(0)) if same else after


def _draw_norm(axes: Axes, run: SpikeRun, signal: str, before: Series, after: Series) -> None:
    draw_line(axes, before, color=BLUE, label="before clipping" if len(after[0]) else None)
    if len(after[0]):
        draw_line(axes, after, color=ORANGE, label="after clipping")
    spikes = run.spikes(signal)
    mark(axes, before, spikes, "spike")
    finite = before[1][np.isfinite(before[1])]
    largest = f"; largest {finite.max():.3g}" if len(finite) else ""
    note(axes, f"spikes: {len(spikes)}{largest}")


def _draw_histograms(axes: Axes, before: np.ndarray, after: np.ndarray) -> None:
    for values, colour in ((before, BLUE), (after, ORANGE)):
        values = values[np.isfinite(values) & (values > 0)]
        if len(values):
            bins = np.geomspace(values.min() / 1.1, values.max() * 1.1, 40).tolist()
            axes.hist(values, bins, orientation="horizontal", color=colour, alpha=0.6)
    axes.tick_params(which="both", left=False, labelleft=False, bottom=False, labelbottom=False)
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)


def layers_picture(runs: Sequence[SpikeRun]) -> Figure:
    """Gradient and relative update of each parameter over time, and the norms of the weights."""
    shown = [(run, run.norms) for run in runs if run.norms]
    tall = float(np.clip(0.12 * max(len(names) for _, (names, _, _) in shown), 0.6, 4))
    figure, grid = panels(len(shown), (tall, tall, 1.2), share=False)
    tables = [
        _fill_forward(table).transpose(1, 2, 0) for _, (_, _, table) in shown
    ]  # each (3, P, bins)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = [np.where(weight > 0, update / weight, 0) for _, update, weight in tables]
    gradients = [gradient for gradient, _, _ in tables]
    for row, title, maps in (
        (grid[0], "gradient norm", gradients),
        (grid[1], "update / weight norm", relative),
    ):
        norm = log_norm(maps)
        for axes, values, (_, (names, width, _)) in zip(row, maps, shown, strict=True):
            image = _heat_map(axes, values, norm, names, width)
            note(axes, f"{title}; {_largest_of(values, names, width)}")
        bar = figure.colorbar(image, ax=list(row), pad=0.01, aspect=12)
        bar.ax.yaxis.set_minor_locator(NullLocator())
    for axes, (_, norms) in zip(grid[2], shown, strict=True):
        _draw_weights(axes, *norms)
    for axes, (run, _) in zip(grid[0], shown, strict=True):
        heading(axes, run.label)
    if all(names == shown[0][1][0] for _, (names, _, _) in shown):
        for axes in grid[:2, 1:].flat:
            axes.tick_params(labelleft=False)
    same_end(grid, max(run.end for run, _ in shown))
    top = max(axes.get_ylim()[1] for axes in grid[2])
    for column in grid.T:
        column[2].set_ylim(0, top)
        count_axis(column, "optimizer step")
    grid[2, 0].set_ylabel("weight norm")
    legend(figure, grid)
    return figure


def _largest_of(table: np.ndarray, names: Sequence[str], width: int) -> str:
    """The largest value of a table (P, bins) and its place, in words."""
    if not table.any():
        return "all zero"
    p, stretch = np.unravel_index(np.argmax(table), table.shape)
    name = strip_common_prefix(names)[p]
    return f"largest {table.max():.3g}, {name}, step {_step_range(int(stretch), width)}"


def _step_range(stretch: int, width: int) -> str:
    return f"{stretch}" if width == 1 else f"{stretch * width} to {(stretch + 1) * width - 1}"


def _fill_forward(table: np.ndarray) -> np.ndarray:
    """The table (bins, 3, P) with weight norms carried on where they were not read."""
    table = table.copy()
    for earlier, later in zip(table[:, 2], table[1:, 2], strict=False):
        if not later.any():
            later[:] = earlier
    return table


def _heat_map(
    axes: Axes, table: np.ndarray, norm: LogNorm, names: Sequence[str], width: int
) -> AxesImage:
    """Draw a table (P, bins), a row for each parameter: white where zero, red where infinite."""
    colours = colormaps["viridis"].with_extremes(over=VERMILION, bad="white")
    finite = np.where(
        np.isfinite(table), table, 10 * (norm.vmax or 1.0)
    )  # a LogNorm takes no infinity
    image = axes.imshow(
        np.ma.masked_where(table <= 0, finite),
        aspect="auto",
        norm=norm,
        cmap=colours,
        extent=(0.0, float(width * table.shape[1]), len(names) - 0.5, -0.5),
        interpolation="nearest",
    )
    every = -(-len(names) // _READABLE)
    axes.set_yticks(
        range(0, len(names), every), strip_common_prefix(names)[::every], fontsize="small"
    )
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return image


def _draw_weights(axes: Axes, names: Sequence[str], width: int, table: np.ndarray) -> None:
    """Draw the weight norms; of many parameters, those whose gradients were the largest."""
    chosen = sorted(np.argsort(-table[:, 0].max(0), kind="stable")[: len(LINES)])
    steps = width * np.arange(len(table))
    for colour, p in zip(LINES, chosen, strict=False):
        axes.plot(
            steps, _fill_forward(table)[:, 2, p], color=colour, label=strip_common_prefix(names)[p]
        )
    if len(chosen) < len(names):
        note(axes, f"the {len(chosen)} of {len(names)} parameters with the largest gradients")


def through_time_picture(runs: Sequence[SpikeRun]) -> Figure:
    """Gradient of the loss by each time step of the input, where it is largest."""
    shown = [(run.label, run.through_time) for run in runs if run.through_time]
    figure, grid = panels(len(shown), heights=(1.6,))
    for axes, (label, seen) in zip(grid[0], shown, strict=True):
        heading(axes, label, lines=2)
        worst = seen.worst
        batches = ", ".join(map(str, worst.batches))
        place = f"step {worst.step} (epoch {worst.epoch}, batch {batches}): {seen.proof}"
        squares = np.square(seen.norms)
        most = int(np.argmax(squares.sum(1)))
        share = squares[most].sum() / squares.sum() if squares.any() else 0
        note(axes, f"{place}\none of the {len(squares)} samples makes {share:.1%} of it (squared)")
        time = 1 + np.arange(seen.norms.shape[1])
        samples = np.where(seen.norms > 0, seen.norms, np.nan)
        axes.plot(time, np.delete(samples, most, 0)[:64].T, color=GREY, alpha=0.3, linewidth=0.6)
        axes.plot([], [], color=GREY, alpha=0.6, linewidth=0.8, label="other samples")
        axes.plot(time, seen.of_batch, color=BLUE, linewidth=2.5, label="the batch")
        axes.plot(time, samples[most], color=ORANGE, linewidth=1, label="its largest sample")
        count_axis([axes], "time step t of the input")
        axes.set_xlim(1, len(time))
    same_decades(grid[0], [x for _, seen in shown for x in (seen.norms, seen.of_batch)])
    label_rows(grid, ("|dL / dx(t)|",))
    legend(figure, grid)
    return figure
