"""How well spike detectors find the labelled spikes of logs of real training runs.

    python -m benchmarks.real_logs FOLDER

The folder holds ``index.csv`` (a line for each series: id, source, file, key, kind), the files with
the values, and ``labels.csv`` (id, start, end, tail_end, sure): events that are ``certain``, and
``doubtful`` ones. Indices count the values of a series and are inclusive.

An event is found by a flag on one of its steps or on the one after it. Flags in the tail of an
event, on doubtful ones and on the first 30 values are passed over; any other is a false alarm.
F1 is a mean over sources, those with one to four events taken together; quiet is the mean of the
false alarms per 1000 over the sources without any. Our detector is told what kind of signal it is.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from benchmarks.spike_detectors import RULES, Counts, Detector, add
from steadyfit.detector import LOSS_MIN_SCALE, NORM_MIN_SCALE, SpikeDetector

FIRST = 30  # values of a series that are not judged
FEW = 5  # events; a source with fewer has no F1 of its own
OTHERS = ("RobustLogZ", "OLMo-core SkipStep", "median/MAD", "log median/MAD")

Rule = Callable[[str], Detector]  # makes a detector for a kind: "loss" or "grad_norm"


class Series(NamedTuple):
    """A signal of one run, with its events as [start, end, tail_end]."""

    source: str
    kind: str
    values: np.ndarray
    certain: list[list[int]]
    doubtful: list[list[int]]


def read_series(folder: Path) -> list[Series]:
    """The series of ``index.csv``, in its order.

    Raises:
        FileNotFoundError: The folder lacks a file that is named here or in the index.
    """
    labels = pd.read_csv(folder / "labels.csv")
    found = []
    for row in pd.read_csv(folder / "index.csv").to_dict("records"):
        own = labels[labels["id"] == row["id"]]
        certain, doubtful = (
            own.loc[own["sure"] == sure, ["start", "end", "tail_end"]].values.tolist()
            for sure in ("certain", "doubtful")
        )
        values = np.load(folder / row["file"])[row["key"]]
        found.append(Series(row["source"], row["kind"], values, certain, doubtful))
    return found


def count(detector: Detector, series: Series) -> Counts:
    """Events found and missed, false alarms, and the steps on which there could be one."""
    flags = np.array([detector.update(value) for value in series.values.tolist()])
    free = np.ones(len(flags), bool)  # where a flag is a false alarm
    free[:FIRST] = False
    hits = 0
    events = [(start, end) for start, end, _ in series.certain if start >= FIRST]
    for start, end in events:
        hits += bool(flags[start : end + 2].any())
    for start, end, tail in [*series.certain, *series.doubtful]:
        free[start : max(end + 1, tail) + 1] = False  # the tail may end with the event
    return Counts(hits, int((flags & free).sum()), len(events) - hits, int(free.sum()))


def by_source(rule: Rule, logs: list[Series]) -> dict[str, Counts]:
    found: dict[str, list[Counts]] = {}
    for series in logs:
        found.setdefault(series.source, []).append(count(rule(series.kind), series))
    return {source: add(counts) for source, counts in found.items()}


class Summary(NamedTuple):
    f1: dict[str, float]  # of each source with events enough, and of the rest together
    quiet: float  # false alarms per 1000, the mean over the sources without events

    @property
    def mean(self) -> float:
        return statistics.mean(self.f1.values())

    @property
    def worst(self) -> float:
        return min(self.f1.values())


def summarize(counts: dict[str, Counts]) -> Summary:
    events = {source: found.hits + found.misses for source, found in counts.items()}
    f1 = {source: found.f1 for source, found in counts.items() if events[source] >= FEW}
    few = [found for source, found in counts.items() if 0 < events[source] < FEW]
    if few:
        f1["the rest"] = add(few).f1
    quiet = [found.alarms_per_1000 for source, found in counts.items() if not events[source]]
    return Summary(f1, statistics.mean(quiet) if quiet else 0.0)


def ours(kind: str) -> Detector:
    return SpikeDetector(min_scale=LOSS_MIN_SCALE if kind == "loss" else NORM_MIN_SCALE)


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    logs = read_series(parser.parse_args(args).folder)
    rules: dict[str, Rule] = {"SpikeDetector (ours)": ours}
    rules |= {name: lambda kind, name=name: RULES[name]() for name in OTHERS}  # type: ignore[misc]
    tables = {name: by_source(rule, logs) for name, rule in rules.items()}

    print(f"{len(logs)} series of {len({series.source for series in logs})} sources\n")
    print(f"{'':<22}{'F1':>7}{'worst':>7} {'source':<18}{'quiet':>8}")
    for name, counts in tables.items():
        summary = summarize(counts)
        worst = min(summary.f1, key=summary.f1.__getitem__)
        print(f"{name:<22}{summary.mean:>7.3f}{summary.worst:>7.3f} {worst:<18}", end="")
        print(f"{summary.quiet:>8.3f}")

    print(f"\n{'ours':<22}{'steps':>7}{'events':>8}{'F1':>7}{'recall':>8}{'FA':>5}{'FA/1000':>9}")
    for source, found in sorted(tables["SpikeDetector (ours)"].items()):
        events = found.hits + found.misses
        print(f"{source:<22}{found.steps:>7}{events:>8}", end="")
        print(f"{found.f1:>7.3f}{found.recall:>8.3f}" if events else f"{'-':>7}{'-':>8}", end="")
        print(f"{found.false_alarms:>5}{found.alarms_per_1000:>9.3f}")


if __name__ == "__main__":
    main()
