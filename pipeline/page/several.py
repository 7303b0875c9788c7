"""The page of several runs, and that of a study."""

import argparse
import math
from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from core.errors import UserError
from pipeline.continuing import CALLBACKS_MAY_CHANGE, named, shown
from pipeline.page.facts import RESULTS, STAGES, Facts, shown_value
from pipeline.page.one import CAPTIONS, CURVES, alt_of, page_of_run
from pipeline.page.parts import Page, Part, Picture, Section, Table, drawable
from pipeline.studies.grid import Study, last_part
from pipeline.studies.metrics import SEED, difference, summary
from pipeline.studies.report import cells, curves_picture
from steadyfit.pictures import SpikeRun, spike_pictures

_SIDE_BY_SIDE = 4  # columns of a picture; with more of them nothing could be read
# where a run lies and what it tells, which makes no difference to it
_IDLE = (
    *("trainer.default_root_dir", "trainer.logger", "trainer.enable_", "data.data_dir"),
    *(f"trainer.callbacks.{name}" for name in CALLBACKS_MAY_CHANGE),
)
_NAMED_BY = 2  # settings in the name of a group
_LEVEL = 0.05  # of p, below which a difference counts

Groups = Mapping[str, list[Facts]]  # runs that differ in nothing but the seed, by a name


def page(options: argparse.Namespace) -> None:
    """Write the page of a run, or of several side by side.

    Raises:
        UserError: A run is not there, or the file cannot be written.
    """
    runs = [Facts.find(name) for name in options.runs]
    if len(runs) == 1:
        page_of_run(runs[0]).write(options.output or runs[0].folder / "page.html")
    else:
        beside = runs[-1].folder / "comparison" / "page.html"
        _page_of_runs(runs).write(options.output or beside)


def _page_of_runs(runs: list[Facts]) -> Page:
    settings = differing(runs)
    groups = grouped(runs, settings)
    try:
        result, told = compared(groups)
    except UserError as error:
        result, told = f"No result: {error}", []
    if "data" in settings:  # its class
        result = f"Of different data: {result}"
    sections = [
        Section("The difference", [*told]),
        Section.of("What differs in the settings", _differences(groups, settings)),
        Section.of("The runs", _each(groups)),
        Section.of("Curves on the same axes", _curves(groups)),
        Section.of("Spikes side by side", _spikes(groups)),
    ]
    return Page(result, f"{len(runs)} runs: {', '.join(run.label for run in runs)}", sections)


def differing(runs: list[Facts]) -> list[str]:
    """Names of the settings in which the runs differ, the seed left out."""
    flat = [dict(named(run.settings)) for run in runs]
    names = list(dict.fromkeys(name for settings in flat for name in settings))
    chosen = [n for n in names if n != SEED and not n.startswith(_IDLE)]
    return [n for n in chosen if any(s.get(n) != flat[0].get(n) for s in flat)]


def grouped(runs: list[Facts], settings: list[str]) -> dict[str, list[Facts]]:
    """The runs of each combination of settings, by these if they are few, else by a run's name."""
    groups: dict[str, tuple[str, list[Facts]]] = {}
    for run in runs:
        flat = dict(named(run.settings))
        values = {name: flat.get(name) for name in settings}
        name = ", ".join(f"{last_part(key)}={shown(value)}" for key, value in values.items())
        if not 0 < len(settings) <= _NAMED_BY or name in [known for known, _ in groups.values()]:
            name = str(run.folder) if len({r.label for r in runs}) < len(runs) else run.label
        groups.setdefault(repr(values), (name, []))[1].append(run)
    return dict(groups.values())


def compared(groups: Groups) -> tuple[str, list[Part]]:
    """Title of a page of several runs, and the parts of its first section.

    Raises:
        UserError: The runs have no metric in common.
    """
    common = _metric_of(groups)
    rows = [
        {"group": name, SEED: run.seed, "y": run.result((common,)).value}
        for name, group in groups.items()
        for run in group
    ]
    return _judged(pd.DataFrame(rows), common, "not finite")


def _metric_of(groups: Groups) -> str:
    """The first metric, in the order in which a run is known by one, that all runs have."""
    runs = [run for group in groups.values() for run in group]
    if common := [name for name in RESULTS if all(len(run.values(name)) for run in runs)]:
        return common[0]
    raise UserError("the runs have no metric in common by which they could be judged.")


def _judged(runs: pd.DataFrame, y: str, missing: str) -> tuple[str, list[Part]]:
    """Title of a page of several runs, and comparisons with the noise of seeds.

    Args:
        runs: A row a run: ``group``, ``seed_everything`` and a value ``y``.
        y: The name of the value.
        missing: The reason why a run has no finite value.
    """
    table = summary(runs, ["group"])
    head, rows = cells(table, ["group"], y, missing)
    parts: list[Part] = [Table("Means over the seeds", head, rows)]
    finite = runs[np.isfinite(runs["y"])].groupby("group", sort=False)
    values = {str(name): group.set_index(SEED)["y"] for name, group in finite}
    if not values:
        return f"No result: {y}: {missing} in any of the runs", parts
    first, *others = values
    told = [_verdict(first, name, values[first], values[name], y) for name in others]
    lower = "loss" in y or y.startswith("steps until")
    best = rows[int((table["mean"].argmin if lower else table["mean"].argmax)())]
    which = f"{'lowest' if lower else 'highest'} mean of {len(rows)}, " if len(rows) > 1 else ""
    unit = " %" if y.endswith("accuracy") else ""
    result = (
        f"{y} {best[1]}{unit}, 95 % interval {best[2]}{unit} ({which}{best[0]}, {best[3]} runs)"
    )
    parts += told
    if (tests := sum("p = " in text for text in told)) > 1:
        parts.append(f"Each p is that of one comparison alone; there are {tests}.")
    return told[0] if len(told) == 1 else result, parts


def _verdict(first: str, second: str, reference: pd.Series, values: pd.Series, y: str) -> str:
    """Compare two groups of runs with the noise of seeds, in a sentence."""
    found = difference(reference, values)
    scale, unit = (100, " points") if y.endswith("accuracy") else (1, "")
    before, after = (shown_value(y, mean) for mean in found.means)
    apart, low, high = (f"{scale * x:+.3g}" for x in (found.means[1] - found.means[0], *found.ends))
    text = f"{second} against {first}: {y} {before} -> {after}, {apart}{unit}"
    runs = "{} and {} runs".format(*found.n)
    if min(found.n) < 2:
        return (
            f"{text}; {runs} cannot tell it from seed noise: train both with the same two seeds "
            "or more."
        )
    if found.paired:
        runs = f"{found.n[0]} pairs of one seed"
    if math.isnan(found.p):
        return f"{text}; equal in every run ({runs})."
    said = "more than seed noise" if found.p < _LEVEL else "not to be told from seed noise"
    return f"{text}, 95 % interval {low} to {high}; {said} ({runs}, p = {found.p:.2g})."


def _differences(groups: Groups, settings: list[str]) -> Iterator[Part]:
    if not settings:
        yield "Nothing but the seed."
        return
    flat = {name: dict(named(group[0].settings)) for name, group in groups.items()}
    rows = [[key, *(shown(own.get(key)) for own in flat.values())] for key in settings]
    yield Table("Settings that differ", ["setting", *flat], rows)


def _each(groups: Groups) -> Iterator[Part]:
    metric = _metric_of(groups)
    rows = []
    for name, run in ((name, run) for name, group in groups.items() for run in group):
        found, git = run.result((metric,)), run.origin.get("git") or {}
        value, commit = shown_value(metric, found.value), str(git.get("commit"))[:12]
        rows.append([run.label, name, str(run.seed), value, found.interval, commit])
    head = ["run", "group", "seed", metric, "95 % interval over its samples", "commit"]
    stage, _, name = metric.partition("/")
    yield Table(f"Every run, by its {STAGES[stage]} {name}", head, rows)
    yield "python study.py page RUN has all of one run."


def _curves(groups: Groups) -> Iterator[Part]:
    for name in CURVES:
        every = {drawable(g): [run.values(name) for run in runs] for g, runs in groups.items()}
        there = {g: [c for c in own if len(c)] for g, own in every.items() if any(map(len, own))}
        if not there:
            continue
        shortest = min(len(curve) for own in there.values() for curve in own)
        window = 1 + shortest // 30 if name.startswith("train/") else 1
        smooth = {
            g: [c.where(c.abs() < math.inf).rolling(window).mean().dropna() for c in own]
            for g, own in there.items()
        }
        ends = {g: float(np.mean([c.iloc[-1] for c in own])) for g, own in there.items()}
        told = ", ".join(f"{g} ends at {shown_value(name, end)}" for g, end in ends.items())
        alt = f"{name} against the optimizer step, mean and standard deviation of seeds: {told}."
        figure = curves_picture(smooth, name, window, None)
        yield Picture.of(figure, f"{name} on the same axes", alt)


def _spikes(groups: Groups) -> Iterator[Part]:
    """The first run of each group side by side; of one group its runs."""
    first = [(name, group[0]) for name, group in groups.items()]
    if len(groups) == 1:
        first = [(run.label, run) for group in groups.values() for run in group]
    shown_runs = [SpikeRun.read(r.folder, drawable(n)) for n, r in first[:_SIDE_BY_SIDE]]
    if len(first) > _SIDE_BY_SIDE:
        yield f"The first {_SIDE_BY_SIDE} of {len(first)}."
    alt = " ".join(alt_of(run) for run in shown_runs)
    for name, figure in spike_pictures(shown_runs).items():
        yield Picture.of(figure, CAPTIONS[name], f"{CAPTIONS[name]}. {alt}")


def page_of_study(
    study: Study,
    title: str,
    runs: pd.DataFrame,
    by: list[str],
    y: str,
    missing: str,
    figure: Figure,
) -> Page:
    """The page of a study.

    Args:
        study: The study.
        title: Of the report.
        runs: A row a run: the point and the value ``y``.
        by: The columns whose values make a group.
        y: The name of the value.
        missing: The reason why a run has no finite value.
        figure: The picture of the report.
    """
    group = [
        ", ".join(f"{last_part(key)}={row[key]}" for key in by) for row in runs.to_dict("records")
    ]
    seeds = runs[SEED] if SEED in runs else range(len(runs))
    result, told = _judged(runs.assign(group=group, **{SEED: seeds}), y, missing)
    rows = [[key, ", ".join(map(str, values))] for key, values in study.parameters.items()]
    picture = Picture.of(figure, title, f"{title}; the means are in the table above.")
    count = f"{len(runs)} of {len(study.points)} runs of {study.path} are in this report."
    command = f"Command: train.py fit {' '.join(study.template)}"
    grid = Table("Parameters of the grid", ["parameter", "values"], rows)
    sections = [
        Section("The difference", [*told, picture]),
        Section("What was trained", [count, grid, command]),
    ]
    return Page(result, f"Study {study.name}: {title}", sections)
