"""What ``UpdateClipping`` costs in accuracy and time where nothing spikes: CIFAR-10 on a CPU.

    python -m benchmarks.calm_clipping DATA --seeds 0 1  # what has no line yet, in turns
    python -m benchmarks.calm_clipping                   # the table of the record alone

DATA is the root folder of the data sets. Every run is ``train.py fit --test=true`` with
``configs/cifar10_cpu.yaml``, some minutes on one core; a finished one is a line of
``records/calm_clipping.jsonl``. The time is that of the whole command.
"""

import argparse
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.recorded import RECORDS, RunRecord, Setting
from benchmarks.time_to_accuracy import cold

CONFIG = "configs/cifar10_cpu.yaml"
ADD = "--trainer.callbacks+=UpdateClipping"
WAYS: dict[str, list[str]] = {
    "without": [],
    "update rms at most 1 lr": [ADD],
    "both": [ADD, "--trainer.callbacks.max_decrease=0.1"],
}


def train(run: Setting, data_dir: Path) -> dict[str, Any]:
    options = argparse.Namespace(
        config=CONFIG, data_dir=data_dir, quick=False, settings=WAYS[run["way"]]
    )
    seconds, accuracy = cold(options, run["seed"])
    return {"accuracy": accuracy, "command_seconds": round(seconds, 1)}


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data_dir", type=Path, nargs="?", help="without: no runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--minutes", type=float, help="begin no run that would end later")
    parser.add_argument("--record", type=Path, default=RECORDS / "calm_clipping.jsonl")
    options = parser.parse_args(args)
    record = RunRecord(options.record)
    runs = [{"way": way, "seed": seed} for seed in options.seeds for way in WAYS]
    if options.data_dir:
        record.complete(runs, lambda run: train(run, options.data_dir), options.minutes)
    lines = [line for run in runs if (line := record.find(run))]
    print("| UpdateClipping | seeds | test accuracy % | seconds, mean |\n|" + " --- |" * 4)
    for way in WAYS:
        found = [line["measures"] for line in lines if line["run"]["way"] == way]
        if found:
            hits = [each["accuracy"] for each in found]
            spread = f" ± {stdev(hits):.2f}" if len(hits) > 1 else ""
            seconds = mean(each["command_seconds"] for each in found)
            print(f"| {way} | {len(found)} | {mean(hits):.2f}{spread} | {seconds:.1f} |")
    print(f"\nseeds {' '.join(map(str, options.seeds))}; {RunRecord.origins(lines)}")


if __name__ == "__main__":
    main()
