"""What the spike monitor has seen of the spikes of finished runs, and what came just before.

    python -m benchmarks.spike_episodes runs/temporal_order_lstm/*

An excursion is a stretch of steps whose loss is above twice the rolling median and 0.25 above it;
those within 10 steps are one. It counts as seen if a step of it, or one of the 5 before, is a spike
in ``spikes.jsonl``; spikes elsewhere are false alarms. An episode is a row of loss spikes within 10
steps of one another.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from steadyfit.measures import excursions, stretches
from steadyfit.watching.optimizer_monitor import BEFORE
from steadyfit.watching.records import read_records
from steadyfit.watching.spike_log import CONFIRM

GAP = 10  # optimizer steps


def merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same spans, those less than ``GAP`` steps apart as one."""
    found: list[tuple[int, int]] = []
    for start, end in spans:
        if found and start - found[-1][1] <= GAP:
            start = found.pop()[0]
        found.append((start, end))
    return found


def recall(loss: np.ndarray, flagged: np.ndarray) -> tuple[int, int, int]:
    """Excursions that were seen, all of them, and rows of false alarms."""
    spans = merged(excursions(loss))
    elsewhere = flagged.copy()
    for start, end in spans:
        elsewhere[max(0, start - CONFIRM) : end + CONFIRM + 1] = False
    seen = sum(bool(flagged[max(0, start - CONFIRM) : end + 1].any()) for start, end in spans)
    return seen, len(spans), len(stretches(elsewhere))


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    totals, steps = np.zeros(3, int), 0
    onsets: list[dict[str, Any]] = []
    for run in parser.parse_args(args).runs:
        loss = pd.read_csv(run / "metrics.csv").sort_values("step")["train/loss"].to_numpy()
        records = [r for r in read_records(run / "spikes.jsonl") if r["spiked"]]
        flagged = np.zeros(len(loss), bool)
        flagged[[record["step"] for record in records]] = True
        totals += recall(loss, flagged)
        steps += len(loss)
        last = -GAP - 1
        for record in records:
            if "loss" in record["spiked"]:
                if record["step"] - last > GAP:
                    onsets.append(record)
                last = record["step"]
    seen, excursed, alarms = totals
    print(
        f"{seen} of {excursed} excursions seen, {1000 * alarms / steps:.2f} false alarms per 1000"
    )
    one = sum(record["step"] - record["before"]["step"] == 1 for record in onsets)
    print(f"{len(onsets)} episodes; in {one} the largest update of {BEFORE} steps came one before")
    parameters = pd.Series([record["before"]["parameter"] for record in onsets]).value_counts()
    print(
        "largest gradient of that step in: " + ", ".join(f"{n} {k}" for k, n in parameters.items())
    )


if __name__ == "__main__":
    main()
