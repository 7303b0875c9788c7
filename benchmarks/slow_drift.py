"""How soon a slowly growing loss is noticed, and how often one that does not grow.

    python -m benchmarks.slow_drift [FOLDER]

The loss grows by 1 % a step, with noise of 0.1 on its logarithm, from its first step on or after
some ordinary ones; it has doubled after 70. The folder is that of ``benchmarks.real_logs``: every
loss in it without a spike should be quiet.
"""

import argparse
import math
import statistics
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from benchmarks.real_logs import read_series
from benchmarks.spike_streams import (
    make,
    quiet_decay,
    quiet_heavy_tail,
    quiet_stationary,
    quiet_variance_shift,
)
from steadyfit.detector import DriftDetector

GROWTH, NOISE = 0.01, 0.1
DOUBLED = math.ceil(math.log(2) / math.log(1 + GROWTH))  # steps
QUIET = (quiet_stationary, quiet_decay, quiet_heavy_tail, quiet_variance_shift)
SEEDS = range(300_000, 300_100)


def growing(seed: int, before: int) -> list[float]:
    """Some ordinary steps, then growth until it has doubled."""
    logs = NOISE * np.random.default_rng(seed).standard_normal(before + DOUBLED)
    logs[before:] += math.log(1 + GROWTH) * np.arange(1, DOUBLED + 1)
    return np.exp(logs).tolist()


def warnings(values: Iterable[float]) -> list[int]:
    """Steps of the warnings."""
    detector = DriftDetector()
    return [step for step, value in enumerate(values) if detector.update(value)]


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", metavar="FOLDER")
    folder = parser.parse_args(args).folder
    print(f"{'ordinary steps before':<30}{'warned in time':>16}{'median step':>13}")
    for before in (0, 100, 500):
        found = [[s - before for s in warnings(growing(seed, before))] for seed in SEEDS]
        times = [steps[-1] for steps in found if steps and steps[-1] >= 0]
        median = statistics.median(times) if times else math.nan
        print(f"{before:<30}{f'{len(times)} of {len(found)}':>16}{median:>13.0f}")

    print(f"\n{'no growth':<30}{'steps':>16}{'warnings':>13}{'per 10000':>11}")
    quiet = {f.__name__: [make(f, seed).values for seed in SEEDS] for f in QUIET}
    for series in read_series(folder) if folder else []:
        if series.kind == "loss" and not series.certain:
            quiet.setdefault(series.source, []).append(series.values.tolist())
    for name, streams in quiet.items():
        steps, count = sum(map(len, streams)), sum(len(warnings(values)) for values in streams)
        print(f"{name:<30}{steps:>16}{count:>13}{1e4 * count / steps:>11.2f}")


if __name__ == "__main__":
    main()
