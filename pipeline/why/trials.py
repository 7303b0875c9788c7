"""Forks as trials: counts of a spike that is gone, with a change and without."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scipy.stats import fisher_exact
from torch import Tensor

from pipeline.why.again import Course
from pipeline.why.changes import Noise
from pipeline.why.experiments import Case, Experiment
from steadyfit.watching.records import json_safe, read_lines

SEEDS = 10  # of each count
_SCREEN = 3  # forks after which an experiment that does nothing is left
_TINY = 1e-6  # relative noise of the weights that tells apart the forks of one experiment
_LEVEL = 0.01  # of the test

_Line = dict[str, Any]


@dataclass
class Tally:
    """Counts of forks in which a spike is gone, or, when moved, came along."""

    name: str
    cause: str | None = None
    lines: list[_Line] = field(default_factory=list)

    @property
    def count(self) -> int:
        return sum(line["gone"] for line in self.lines)

    @property
    def forks(self) -> int:
        return len(self.lines)

    @property
    def mostly(self) -> bool:
        return 2 * self.count > self.forks

    def more_than(self, other: "Tally") -> bool:
        """Tell whether the count is clearly higher (one-sided exact test)."""
        table = [[t.count, t.forks - t.count] for t in (self, other)]
        return bool(fisher_exact(table, alternative="greater").pvalue < _LEVEL)

    def __str__(self) -> str:
        return f"{self.count} of {self.forks}"


class Trials:
    """Runs forks, each once: a line of ``why.jsonl`` is a fork that need not run again.

    Args:
        case: The spike and its run.
        snapshot: The state that forks start from.
        path: The file of lines.
        header: Origin of the lines; lines of another one are replaced.
        progress: Called after each fork with its name and its number of steps.
    """

    def __init__(
        self,
        case: Case,
        snapshot: Path,
        path: Path,
        header: _Line,
        progress: Callable[[str, int], None],
    ) -> None:
        self.case, self.snapshot, self.path, self.progress = case, snapshot, path, progress
        self.tallies: list[Tally] = []
        lines = read_lines(path)
        if lines[:1] != [header]:
            lines = []
            path.write_text(f"{json.dumps(header)}\n")
        self.known = {(line["experiment"], line["seed"]): line for line in lines[1:]}
        self.neutral = self.run(Experiment("neutral change", lambda seed: [], 0), SEEDS)

    @property
    def steps(self) -> int:
        """Optimizer steps of all forks."""
        return sum(len(line["losses"]) for line in self.known.values())

    def run(self, experiment: Experiment, forks: int, noise: float = _TINY) -> Tally:
        """Bring an experiment to so many forks; ``noise`` comes in its first step."""
        tally = next((t for t in self.tallies if t.name == experiment.name), None)
        if tally is None:
            tally = Tally(experiment.name, experiment.cause)
            self.tallies.append(tally)
        for seed in range(tally.forks, forks):
            key = experiment.name, seed
            if key not in self.known:
                self.known[key] = self.fork(experiment, seed, noise)
                with self.path.open("a") as file:
                    file.write(f"{json.dumps(json_safe(self.known[key]))}\n")
            tally.lines.append(self.known[key])
            self.progress(experiment.name, len(self.known[key]["losses"]))
        return tally

    def screen(self, experiment: Experiment) -> Tally:
        """Run the first forks, which show that most experiments cannot become significant."""
        return self.run(experiment, _SCREEN)

    def fork(self, experiment: Experiment, seed: int, noise: float) -> _Line:
        case, spike = self.case, self.case.spike
        place = experiment.looks_at or (spike.onset, spike.end)
        at = spike.start if noise == _TINY else experiment.at
        last = max(place[1], spike.end)
        asked = [experiment.at + 1] if seed == 0 and experiment.at else []
        extra = [Noise(at, noise, seed), *experiment.make(seed)]
        course = Course(last + 1, keep=asked)
        case.again.train(self.snapshot, course, extra, **experiment.options)
        there = spike.is_in(course, *place)
        line: _Line = {
            "experiment": experiment.name,
            "seed": seed,
            # one that was moved should be there
            "gone": there if experiment.looks_at else not there,
            "losses": course.losses(spike.start, last),
        }
        if course.weights:
            ((step, weights),) = course.weights.items()
            line["difference"] = _difference(weights, case.course.weights.get(step))
        return line

    def counts(self, experiment: Experiment) -> bool:
        """Compare with neutral changes, tiny and as large: does the spike go clearly more often?"""
        if not self.screen(experiment).mostly:
            return False
        tally = self.run(experiment, SEEDS)
        size = tally.lines[0].get("difference") or 0.0
        if not tally.more_than(self.neutral):
            return False
        if size <= _TINY or experiment.looks_at:
            return True
        name = f"noise as large as: {experiment.name}"
        return tally.more_than(
            self.run(Experiment(name, lambda s: [], experiment.at + 1), SEEDS, size)
        )

    def smallest(
        self, places: Sequence[Any], without: Callable[[Sequence[Any]], Experiment]
    ) -> Sequence[Any]:
        """Halve what it takes to lose the spike, as long as one half alone does."""
        while len(places) > 1:
            half = len(places) // 2
            parts = [places[:half], places[half:]]
            found = [self.run(without(part), 1).count for part in parts]
            if sum(found) != 1:
                break
            places = parts[found.index(1)]
        return places


def _difference(weights: Tensor, usual: Tensor | None) -> float:
    """Distance of weights from those without the change, as a share of their norm."""
    if usual is None:
        return 0.0
    share = float((weights - usual).norm() / usual.norm())
    return share if math.isfinite(share) else 0.0
