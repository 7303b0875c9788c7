"""The spikes of several seeds, group by group."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from steadyfit.measures import SpikeMeasures
from steadyfit.panels import BLUE, GREY, VERMILION, heading, legend


def seeds_picture(groups: Mapping[str, Mapping[int, SpikeMeasures]], target: float) -> Figure:
    """Excess loss of every seed, and beside it how accurate that seed is at the end.

    Args:
        groups: The runs of each label, by their seed; equal seeds are joined by a line.
        target: Accuracy (fraction) from which on a task counts as learned.
    """
    figure = Figure(figsize=(max(9.0, 4 * len(groups)), 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    excess = {k: {s: m.excess for s, m in g.items()} for k, g in groups.items()}
    final = {k: {s: m.final_accuracy for s, m in g.items()} for k, g in groups.items()}
    finite = [x for g in excess.values() for x in g.values() if math.isfinite(x)]
    left.set_yscale("symlog", linthresh=0.1, linscale=0.5)
    left.set_ylim(-0.02, 2 * max([0.5, *finite]))
    left.yaxis.set_major_formatter("{x:g}")
    heading(left, "excess loss", lines=0)
    strip(left, excess, [f"mean {mean_of(g):.2f}" for g in excess.values()])
    right.set_ylim(0, 1.04)
    right.yaxis.set_major_formatter(PercentFormatter(1))
    right.axhline(target, color=GREY, linestyle=":", linewidth=1)
    heading(right, "final accuracy", lines=0)
    learned = [f"{sum(m.learned for m in g.values())} of {len(g)}" for g in groups.values()]
    means = [f"mean {mean_of(g):.1%}" for g in final.values()]
    strip(right, final, [f"{m}\n{k} at {target:.0%}" for m, k in zip(means, learned, strict=True)])
    legend(figure, np.array([[left, right]]))
    return figure


def mean_of(group: Mapping[int, float]) -> float:
    return float(np.mean(list(group.values())))


def strip(axes: Axes, groups: Mapping[str, Mapping[int, float]], numbers: Sequence[str]) -> None:
    """Draw the value of each seed as a dot, group by group, and their mean as a bar."""
    top = axes.get_ylim()[1]
    seeds = sorted({seed for group in groups.values() for seed in group})
    for position, seed in enumerate(seeds):
        beside = 0.05 * (position % 3 - 1)  # so that equal ones are told apart
        own = np.minimum([group.get(seed, math.nan) for group in groups.values()], top)
        places = np.arange(len(own)) + beside
        axes.plot(places, own, color=GREY, alpha=0.35, linewidth=0.8, zorder=1)
        axes.scatter(
            places, own, s=30, color=BLUE, alpha=0.75, label="a seed", zorder=3, clip_on=False
        )
    for place, group in enumerate(groups.values()):
        mean = min(mean_of(group), top)
        ends = [place - 0.22, place + 0.22]
        axes.plot(ends, [mean] * 2, color=VERMILION, linewidth=2, label="mean", zorder=2)
    ticks = [f"{label}\n{number}" for label, number in zip(groups, numbers, strict=True)]
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set_xlim(-0.5, len(ticks) - 0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3, axis="y")
