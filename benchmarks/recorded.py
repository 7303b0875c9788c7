"""Finished runs of a benchmark, a line of JSON each, in a small file that is committed."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from core.provenance import provenance

RECORDS = Path(__file__).parent / "records"
Setting = dict[str, Any]
Line = dict[str, Any]


class RunRecord:
    """Lines of finished runs: what was run (``run``), what came out (``measures``), and of what.

    A run is known by all that is in ``run``; delete its line to have it repeated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text() if path.exists() else ""
        self.lines: list[Line] = [json.loads(line) for line in text.splitlines()]

    def find(self, run: Setting) -> Line | None:
        """The line of a run, or None."""
        return next((line for line in self.lines if line["run"] == run), None)

    def add(self, run: Setting, measures: dict[str, Any], seconds: float) -> Line:
        """Append a line; what stands there stays, also that of another process."""
        line = {"run": run, "measures": measures, "seconds": round(seconds, 1), **origin()}
        self.lines.append(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return line

    def complete(
        self,
        runs: Iterable[Setting],
        train: Callable[[Setting], dict[str, Any]],
        minutes: float | None = None,
    ) -> int:
        """Train what has no line yet, in this order; return how many runs are left.

        Args:
            runs: What is to be run.
            train: Trains one of them and returns its measures.
            minutes: No run begins that, as long as the longest so far, would end later.
        """
        end = time.monotonic() + (float("inf") if minutes is None else 60 * minutes)
        missing, longest = [run for run in runs if self.find(run) is None], 0.0
        while missing and time.monotonic() + longest < end:
            run = missing.pop(0)
            start = time.monotonic()
            measures = train(run)
            seconds = time.monotonic() - start
            longest = max(longest, seconds)
            self.add(run, measures, seconds)
            said = f"{len(missing)} left; {seconds:.0f} s; {json.dumps(run)}"
            print(said, file=sys.stderr, flush=True)
        return len(missing)

    @staticmethod
    def origins(lines: Iterable[Line]) -> str:
        """Commits, versions and processors that lines came from, for below a table."""
        found = {
            name: sorted({line[name] for line in lines}) for name in ("commit", "torch", "cpu")
        }
        return "; ".join(f"{name} {', '.join(values)}" for name, values in found.items())


@cache  # the code that runs is that of the start
def origin() -> dict[str, str]:
    """Commit, versions, and the vector instructions that it uses here."""
    found = provenance()
    git = found["git"] or {"commit": "unknown"}
    threads = torch.get_num_threads()
    return {
        "commit": git["commit"][:10],
        "torch": found["versions"]["torch"],
        "lightning": found["versions"]["lightning"],
        "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, "
        f"{threads} thread{'s' * (threads > 1)}",
    }
