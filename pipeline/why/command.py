"""``python spikes.py why RUN``: from a run to a verdict."""

import argparse
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from callbacks.run.run_folder import MetricsCSV
from core.errors import UserError
from core.provenance import provenance, recorded
from core.runs import Run
from pipeline.why.again import Again, Course, Rows
from pipeline.why.control import MORE, Control, compare, repeat
from pipeline.why.experiments import Case
from pipeline.why.report import Report
from pipeline.why.spike import Spike, find_spike
from pipeline.why.trials import Trials
from pipeline.why.verdict import Verdict, decide
from steadyfit.watching.records import read_lines


def why(options: argparse.Namespace) -> Report:
    """Find out why a run spiked, and write the report.

    Raises:
        UserError: There is no spike, or the run cannot be trained again.
    """
    run = Run.find(options.run)
    rows = MetricsCSV(str(run.folder)).rows
    if not rows:
        raise UserError(f"{run.folder} has no metrics.csv to compare with.")
    spike = find_spike(run.folder, rows, options.step)
    _warn_of_versions(run)
    with tempfile.TemporaryDirectory() as scratch, run.lock():
        again = Again(run.config, Path(scratch), trust=options.trust)
        with _progress_bar() as progress:
            report = _explain(run, again, spike, rows, progress)
        report.write()
    return report


def _explain(run: Run, again: Again, spike: Spike, rows: Rows, progress: Progress) -> Report:
    """Repeat the run up to the spike, then try what takes it away."""
    task = progress.add_task("repeating the run", total=None)

    def advance(name: str, steps: int) -> None:
        progress.update(task, description=name, advance=steps)

    # kept until all is done, so that one that is interrupted goes on
    snapshot, path = run.folder / "why.ckpt", run.folder / "why.jsonl"
    header = {"first": spike.first, "config": run.config.read_text(), **provenance()}
    known = next(iter(read_lines(path)), {})
    if snapshot.exists() and header.items() <= known.items():
        control = Control(**known["control"])
    else:
        snapshot.unlink(missing_ok=True)
        control = repeat(run, again, spike, rows, snapshot)
    advance("repeating the run", control.steps)
    report = Report(run, spike, rows, control)
    if not control.spikes:
        snapshot.unlink()
        equal = (
            "and is equal bit for bit up to it" if control.is_exact else f"({control.differing})"
        )
        report.verdict = Verdict("irreproducible", f"an exact repetition does not spike {equal}.")
        return report
    states = torch.load(snapshot, weights_only=True)["optimizer_states"]
    kept = {name for o in states for state in o["state"].values() for name in state}
    course = Course(spike.end + MORE, keep=range(spike.start + 1, spike.peak + 2))
    again.train(snapshot, course)
    if control.is_exact:  # the way of a fork has to be exact as well
        _, control.differing = compare(course.rows, rows)
    before = range(spike.start - len(control.rates), spike.start)
    course.rates |= zip(before, control.rates, strict=True)
    case = Case(spike, again, course, kept)
    trials = Trials(case, snapshot, path, header | {"control": asdict(control)}, advance)
    report.trials = trials
    report.verdict = decide(trials)
    snapshot.unlink()
    return report


def _progress_bar() -> Progress:
    """A line on stderr: which experiment it is, and the optimizer steps so far."""
    columns = (
        TextColumn("{task.description:48.48}"),
        BarColumn(12),
        TextColumn("{task.completed} steps"),
    )
    return Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True)


def _warn_of_versions(run: Run) -> None:
    """Name libraries whose version is another than that of the run."""
    was = recorded(run.config).get("versions") or {}
    now = provenance()["versions"]
    if others := [f"{k} {now[k]} (was {v})" for k, v in was.items() if now.get(k, v) != v]:
        print(f"Other versions than the run's: {', '.join(others)}.", file=sys.stderr)
