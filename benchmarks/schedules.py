"""Test accuracy of `configs/cifar10_cpu.yaml` against training time, for several schedule lengths.

    python -m benchmarks.schedules --epochs 6 12 24 --seeds 0 1 2

Every training is a process of its own, as a user starts it; its time is that of the whole command,
imports and validation included. Finished trainings are kept in ``runs/schedules.csv`` and not
repeated. The picture goes to ``runs/schedules.png``.
"""

import argparse
import csv
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from core.files import atomic_write
from core.runs import ROOT

RESULTS = ROOT / "schedules.csv"
CONFIG = "cifar10_cpu"


def train_and_test(epochs: int, seed: int) -> dict[str, float]:
    """Seconds of the training command, and test accuracy with and without augmentation (TTA)."""
    name = f"e{epochs}-s{seed}"
    start = time.perf_counter()
    config = f"--config=configs/{CONFIG}.yaml"
    run("fit", config, "--run", name, f"--trainer.max_epochs={epochs}", f"--seed_everything={seed}")
    seconds = time.perf_counter() - start
    accuracy = {}
    for tta in ("none", "mirror_translate"):
        run("test", "--run", f"{CONFIG}/{name}", f"--model.tta={tta}")
        with (ROOT / CONFIG / name / "metrics.csv").open(newline="") as file:
            tested = [row["test/accuracy"] for row in csv.DictReader(file)]
        accuracy[tta] = next(float(value) for value in tested if value)
    return {"epochs": epochs, "seed": seed, "seconds": seconds, **accuracy}


def run(*args: str) -> None:
    subprocess.run([sys.executable, "train.py", *args], check=True)


def table(results: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over the seeds of each length."""
    return results.groupby("epochs")[["seconds", "none", "mirror_translate"]].agg(
        ["mean", "std", "count"]
    )


def picture(results: pd.DataFrame) -> Figure:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    means = results.groupby("epochs").mean()
    for column, label in (("mirror_translate", "with TTA"), ("none", "without TTA")):
        (line,) = axes.plot(means.seconds / 60, 100 * means[column], label=label)
        axes.plot(results.seconds / 60, 100 * results[column], "o", color=line.get_color(), ms=4)
    for epochs, row in means.iterrows():
        place = (row.seconds / 60, 100 * row.mirror_translate)
        axes.annotate(f"{epochs} epochs", place, (4, -12), textcoords="offset points")
    axes.set(xlabel="minutes of training", ylabel="test accuracy in percent")
    axes.margins(x=0.12)  # room for the last label
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, nargs="+", default=[6, 12, 24])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    rows: list[dict[Any, Any]] = []
    if RESULTS.exists():
        rows = pd.read_csv(RESULTS).to_dict("records")
    for epochs in options.epochs:
        for seed in options.seeds:
            if any((row["epochs"], row["seed"]) == (epochs, seed) for row in rows):
                continue
            rows.append(train_and_test(epochs, seed))
            with atomic_write(RESULTS, "w", newline="") as file:
                pd.DataFrame(rows).to_csv(file, index=False)
    results = pd.DataFrame(rows)
    print(table(results).to_string(float_format="%.4f"))
    with atomic_write(Path(ROOT / "schedules.png")) as file:
        picture(results).savefig(file, format="png", dpi=120)


if __name__ == "__main__":
    main()
