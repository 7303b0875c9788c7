"""Spikes of finished runs side by side."""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd
import yaml
from lightning import seed_everything
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from core.errors import UserError
from core.files import atomic_write
from core.runs import Run, load_checkpoint
from pipeline.loading import LoadedRun
from pipeline.trainer import quiet_libraries
from steadyfit.measures import SpikeMeasures
from steadyfit.panels import BLUE, GREY, VERMILION, heading, legend
from steadyfit.pictures import SpikeRun, spike_pictures
from steadyfit.through_time import THAT_STEP, ThroughTime, WorstStep, is_sequence, through_time

_LABEL_WIDTH = 26  # of 80 columns
_COLUMNS = 4  # runs side by side; with more of them nothing could be read

# One entry of the comparison: the label it goes by, and its runs by seed.
Groups = dict[str, dict[int, Run]]


def group(runs: list[Run], labels: list[str] | None) -> Groups:
    """Put the runs that differ in nothing but the seed under one label.

    Without labels it is those of one config, unless two of them have the same seed.

    Raises:
        UserError: There is not one label for each run, or two runs of a label have the same seed.
    """
    if labels is None:
        configs = [run.folder.resolve().parent.name for run in runs]
        seeds = [(config, _seed_of(run)) for config, run in zip(configs, runs, strict=True)]
        repeated = {config for config, seed in seeds if seeds.count((config, seed)) > 1}
        if len(set(configs)) == 1:  # there is nothing but the seeds to be compared
            repeated = set(configs)
        pairs = zip(configs, runs, strict=True)
        labels = [run.label if config in repeated else config for config, run in pairs]
    elif len(labels) != len(runs):
        raise UserError(
            f"--labels needs one label for each of the {len(runs)} runs, got {len(labels)}."
        )
    groups: Groups = {}
    for label, run in zip(labels, runs, strict=True):
        own = groups.setdefault(label, {})
        if _seed_of(run) in own:
            raise UserError(
                f"{run.folder} and {own[_seed_of(run)].folder} are both labelled {label} and have "
                "the same seed; give them different labels with --labels."
            )
        own[_seed_of(run)] = run
    return groups


def _seed_of(run: Run) -> int:
    seed = yaml.safe_load(run.config.read_text()).get("seed_everything")
    return seed if isinstance(seed, int) else 0


def read(run: Run, label: str, target: float) -> SpikeRun:
    """Read the spikes and curves of a run.

    Raises:
        UserError: The run has no metrics.
    """
    path = run.folder / "metrics.csv"
    try:
        found = SpikeRun.read(run.folder, label, target)
        _ = found.curves
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; train the run with callbacks.MetricsCSV among its loggers."
        ) from None
    except (ValueError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise UserError(f"{path} cannot be compared: {error}") from error
    return found


def table(groups: dict[str, dict[int, SpikeMeasures]], runs: Groups) -> pd.DataFrame:
    """Return a row for each run: what it is judged by, and first of all whether it learned."""
    rows = [
        {"label": label, "seed": seed, "run": str(runs[label][seed].folder), **asdict(measures)}
        for label, own in groups.items()
        for seed, measures in own.items()
    ]
    return pd.DataFrame(rows)


def sentence(
    first: str,
    label: str,
    means: dict[str, pd.Series],
    own: dict[int, SpikeMeasures],
    target: float,
) -> str:
    """Say what became of the excess, and never without what became of the accuracy."""
    was, now = means[first], means[label]
    failed = [seed for seed, found in own.items() if not found.learned]
    text = (
        f"{label} against {first}: excess loss {was['excess']:.2f} -> {now['excess']:.2f}, "
        f"final accuracy {was['final_accuracy']:.1%} -> {now['final_accuracy']:.1%}"
    )
    if failed:
        return (
            f"{text}; NOT FIXED: {len(failed)} of {len(own)} end below {target:.0%} accuracy, "
            "and a calm curve that has not learned is no fix."
        )
    kinks = now["kinks_last"] + now["kinks_val"]
    return f"{text}; " + ("no kinks." if kinks == 0 else f"kinks left: {kinks:g} a run.")


def replay(run: Run) -> ThroughTime:
    """Return the gradient through time at the largest gradient of a run.

    With the weights of that very step if ``SpikePictures`` has kept them, else with those of the
    nearest checkpoint before it, else with the last ones.

    Raises:
        UserError: The run recorded no such step, or does not read sequences of floats.
    """
    worst = WorstStep.read(run.folder)
    if worst is None:
        raise UserError("it has neither worst_spike.pt nor a gradient spike in spikes.jsonl")
    paths = {load_checkpoint(p)["global_step"]: p for p in run.folder.glob("checkpoints/*.ckpt")}
    at = max((step for step in paths if step <= worst.step), default=None)
    path = run.checkpoint("last") if at is None else paths[at]
    seed_everything(_seed_of(run), verbose=False)  # it decides which batches are made
    member = LoadedRun.load(str(path), "last", [])
    apart = member.checkpoint["global_step"] - worst.step
    origin = f"{abs(apart)} steps {'later' if apart > 0 else 'before'}"
    if apart == 0 or worst.weights:
        origin = THAT_STEP
    member.data.prepare_data()
    member.data.setup("fit")
    batches = worst.remake(member.data)
    if not is_sequence(batches[0]):
        raise UserError("its inputs are no sequences (B, T, D) of floats")
    return through_time(member.model, batches, worst, origin)


def show(groups: dict[str, dict[int, SpikeMeasures]], target: float) -> None:
    """Print accuracy beside excess for each run, and what became of it against the first label.

    The table is no wider than a terminal; ``spikes.csv`` has the other columns.
    """
    width = min(_LABEL_WIDTH, max(len(label) for label in groups))
    print(f"{'':{width}}  seed  accuracy  {f'{target:.0%} in':>10}  excess loss  excursions")
    for label, own in groups.items():
        short = label if len(label) <= width else f"…{label[1 - width :]}"
        for seed, found in own.items():
            epoch = "never" if found.first_epoch is None else f"epoch {found.first_epoch}"
            print(
                f"{short:{width}}  {seed:4d}  {found.final_accuracy:8.1%}  {epoch:>10}  "
                f"{found.excess:11.2f}  {found.excursions:10d}"
            )
    means = {
        label: pd.DataFrame([asdict(found) for found in own.values()]).mean(numeric_only=True)
        for label, own in groups.items()
    }
    first, *others = means
    for label in others:
        print(sentence(first, label, means, groups[label], target))


def compare(options: argparse.Namespace) -> None:
    """Compare the runs that ``spikes.py`` is given: print, draw, and leave a table."""
    quiet_libraries()
    runs = [Run.find(name) for name in options.runs]
    if len({run.folder.resolve() for run in runs}) < 2:
        raise UserError("a comparison needs two runs or more; name another run folder.")
    groups = group(runs, options.labels)
    found = {
        label: {seed: read(run, label, options.target) for seed, run in own.items()}
        for label, own in groups.items()
    }
    measures = {
        label: {seed: run.measures for seed, run in own.items()} for label, own in found.items()
    }
    show(measures, options.target)
    shown = []
    for label, own in list(groups.items())[:_COLUMNS]:
        seed, run = next(iter(own.items()))
        shown.append(found[label][seed])
        try:
            shown[-1].through_time = replay(run)
        except ValueError as error:
            reason = str(error).rstrip(".")
            print(f"No gradient through time of {label}: {reason}.")
    if len(groups) > _COLUMNS:
        print(f"Drawn are the first {_COLUMNS} of {len(groups)}; the table has all.")
    pictures = spike_pictures(shown)
    if any(len(own) > 1 for own in groups.values()):
        pictures["spikes_seeds"] = seeds_picture(measures, options.target)
    output = options.output or runs[-1].folder / "comparison"
    for name, figure in pictures.items():
        with atomic_write(output / f"{name}.png") as file:
            figure.savefig(file, format="png", dpi=120)
    with atomic_write(output / "spikes.csv", "w") as file:
        table(measures, groups).to_csv(file, index=False)
    print(f"{', '.join(f'{name}.png' for name in pictures)} and spikes.csv are in {output}")


# ---- a picture of all seeds


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
    strip_plot(left, excess, [f"mean {_mean(g):.2f}" for g in excess.values()])
    right.set_ylim(0, 1.04)
    right.yaxis.set_major_formatter(PercentFormatter(1))
    right.axhline(target, color=GREY, linestyle=":", linewidth=1)
    heading(right, "final accuracy", lines=0)
    learned = [f"{sum(m.learned for m in g.values())} of {len(g)}" for g in groups.values()]
    means = [f"mean {_mean(g):.1%}" for g in final.values()]
    numbers = [f"{m}\n{k} at {target:.0%}" for m, k in zip(means, learned, strict=True)]
    strip_plot(right, final, numbers)
    legend(figure, np.array([[left, right]]))
    return figure


def _mean(group: Mapping[int, float]) -> float:
    return float(np.mean(list(group.values())))


def strip_plot(
    axes: Axes, groups: Mapping[str, Mapping[int, float]], numbers: Sequence[str]
) -> None:
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
        mean = min(_mean(group), top)
        ends = [place - 0.22, place + 0.22]
        axes.plot(ends, [mean] * 2, color=VERMILION, linewidth=2, label="mean", zorder=2)
    ticks = [f"{label}\n{number}" for label, number in zip(groups, numbers, strict=True)]
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set_xlim(-0.5, len(ticks) - 0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3, axis="y")
