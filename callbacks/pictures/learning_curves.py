"""Learning curves as a picture, for those who have no dashboard."""

import gc
import time
from typing import TYPE_CHECKING, Any

from lightning import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from callbacks.pictures.base import PictureCallback
from steadyfit.panels import BLUE, GREY, VERMILION, count_axis, dots

if TYPE_CHECKING:  # a third of a second of imports, which only a picture needs
    import pandas as pd


class LearningCurves(PictureCallback):
    """Draw ``metrics.csv`` of the run folder to ``learning_curves.png``.

    While training the picture follows the validation, or the epochs where there is none; it is
    brought up to date at the end, and when training breaks off.
    """

    min_interval = 30.0  # seconds before the first picture and between two
    next_time = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.next_time = time.monotonic() + self.min_interval

    def on_validation_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if not trainer.sanity_checking and time.monotonic() >= self.next_time:
            self.refresh(trainer)
            # a figure is a web of cycles: tens of MiB that Python would come for after hours
            gc.collect()

    on_train_epoch_end = on_validation_end

    def refresh(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if trainer.state.fn != TrainerFn.FITTING or not trainer.is_global_zero or not self.folder:
            return
        for logger in trainer.loggers:
            logger.save()  # what is logged and not yet in the file
        path = self.folder / "metrics.csv"
        if not path.exists():
            return
        import pandas as pd

        self.save(trainer, "learning_curves", learning_curves(pd.read_csv(path)))
        self.next_time = time.monotonic() + self.min_interval

    on_fit_end = on_exception = refresh


def learning_curves(metrics: "pd.DataFrame") -> Figure:
    """Draw loss, accuracy and learning rate against the optimizer step.

    Args:
        metrics: A row per log call: ``step``, ``train/<name>`` and ``val/<name>`` of loss and
            accuracy, ``lr-<optimizer>``; a cell is NaN where nothing was logged. All but ``step``
            may be missing, and so are values that are not finite.
    """
    metrics = metrics.set_index("step").sort_index()
    metrics = metrics.filter(regex="^(train|val)/(loss|accuracy)$|^lr-")
    metrics = metrics.where(metrics.abs() < float("inf"))
    rates = metrics.filter(regex="^lr-")
    panels = ["loss"]
    if not metrics.filter(regex="/accuracy$").empty:
        panels.append("accuracy")
    if not rates.empty:
        panels.append("learning rate")
    heights = [1.0 if name == "learning rate" else 2.5 for name in panels]
    figure = Figure(figsize=(8, 1 + 1.1 * sum(heights)), layout="constrained")
    grid = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, name in zip(grid, panels, strict=True):
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if name == "learning rate":
            _draw_rates(axes, rates)
        else:
            draw_metric(axes, name, metrics)
    count_axis(grid, "optimizer step")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    return figure


def draw_metric(axes: Axes, name: str, metrics: "pd.DataFrame") -> None:
    """Draw one metric in training and validation; a loss that fell a long way on a log scale."""
    both = metrics.reindex(columns=[f"train/{name}", f"val/{name}"])
    train, val = (both[column].dropna() for column in both)
    # a median, so that a spike stands out of the smooth line and does not bend it
    smooth = train.rolling(1 + len(train) // 30, center=True, min_periods=1).median()
    axes.plot(train, color=BLUE, alpha=0.4, linewidth=0.8, label="training, each step")
    axes.plot(smooth, marker=dots(smooth), color=BLUE, label="training, smoothed")
    style = ".2%" if name == "accuracy" else ".4f"
    if not val.empty:
        axes.plot(val, "o-", color=VERMILION, markersize=4, label="validation")
        axes.set_title(f"last validation: {val.iloc[-1]:{style}}", loc="right", fontsize="medium")
    if name == "accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    elif both.min().min() > 0 and both.max().max() > 30 * both.min().min():
        axes.set_yscale("log")


def _draw_rates(axes: Axes, rates: "pd.DataFrame") -> None:
    """Draw the learning rate of each parameter group; far apart, they need a log scale."""
    styles = ["-", "--", ":", "-."]
    for position, column in enumerate(rates):
        rate = rates[column].dropna()
        style = styles[position % len(styles)]
        label = str(column).removeprefix("lr-")
        axes.plot(rate, style, marker=dots(rate), color=GREY, label=label)
    highest = rates.max()
    if highest.min() > 0 and highest.max() > 10 * highest.min():
        axes.set_yscale("log")
        axes.set_ylim(bottom=highest.min() / 100)  # the end of a schedule is zero
    else:
        axes.set_ylim(bottom=0)
    if len(rates.columns) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize="small")
