"""Ways to be rid of the spikes of the temporal-order LSTM, over several seeds.

    python -m benchmarks.spike_fixes --seeds 1 2 3 4 5 6 7 8 9 10

Every training is ``train.py fit`` in a process of its own; it is kept in ``--output`` and not
repeated. The table is printed and written there as ``fixes.csv`` with a row for each run. Tune on
seeds 101 to 110 and report on others.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median, stdev

import pandas as pd

from core.errors import UserError
from core.runs import ROOT
from steadyfit.measures import SpikeMeasures, measure

TARGET = 0.95  # accuracy at which the task counts as solved
NEVER = 101  # epochs, of a run that does not get there in 100
PLAIN = "--config=configs/temporal_order_lstm.yaml"
STEADY = "--config=configs/temporal_order_lstm_steady.yaml"
ADD = "--trainer.callbacks+="
FIXES: dict[str, list[str]] = {
    "untouched": [PLAIN],
    "gradient norm at most 1": [PLAIN, "--trainer.gradient_clip_val=1"],
    "gradient norm at most 0.25": [PLAIN, "--trainer.gradient_clip_val=0.25"],
    "ZClip": [PLAIN, f"{ADD}GradientNormClipping"],
    "AutoClip": [PLAIN, f"{ADD}GradientNormClipping", "--trainer.callbacks.rule=autoclip"],
    "AGC 0.1": [PLAIN, f"{ADD}AdaptiveGradientClipping"],
    "learning rate 3e-4": [PLAIN, "--model.optimizer.lr=3e-4"],
    "update rms at most 1 lr": [PLAIN, f"{ADD}UpdateClipping"],
    "decrease at most 0.1 loss": [
        PLAIN,
        f"{ADD}UpdateClipping",
        "--trainer.callbacks.max_rms=null",
        "--trainer.callbacks.max_decrease=0.1",
    ],
    "both": [PLAIN, f"{ADD}UpdateClipping", "--trainer.callbacks.max_decrease=0.1"],
    "steady": [STEADY],
}


def train(fix: str, seed: int, flags: list[str], output: Path) -> SpikeMeasures:
    """Train once, or read what an earlier training left."""
    name = f"{fix.replace(' ', '_')}-{seed}"
    arguments = [*FIXES[fix], *flags, f"--seed_everything={seed}", f"--run={name}"]
    folder = f"--trainer.default_root_dir={output}"
    finished = output / "finished" / name
    config = Path(FIXES[fix][0].removeprefix("--config=")).read_text()
    origin = f"{' '.join(arguments)}\n{config}"
    if finished.exists() and finished.read_text() != origin:
        raise UserError(f"{finished} was trained otherwise; choose another --output.")
    if not finished.exists():
        subprocess.run(
            [sys.executable, "train.py", "fit", *arguments, folder],
            check=True,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"},
        )
        finished.parent.mkdir(parents=True, exist_ok=True)
        finished.write_text(origin)
        print(f"{fix}, seed {seed}", file=sys.stderr, flush=True)
    (folder_of_run,) = output.glob(f"temporal_order_lstm*/{name}")
    return measure(pd.read_csv(folder_of_run / "metrics.csv"), TARGET)


def row(fix: str, found: list[SpikeMeasures], plain: list[SpikeMeasures]) -> str:
    """One line of the Markdown table."""
    clean = sum(m.kinks_last == m.kinks_val == 0 for m in found)
    clean_mean = sum(m.kinks_mean == m.kinks_val == 0 for m in found)
    excess = mean(m.excess for m in found)
    reached = [NEVER if m.first_epoch is None else m.first_epoch for m in found]
    accuracies = [100 * m.final_accuracy for m in found]
    spread = f" ± {stdev(accuracies):.1f}" if len(found) > 1 else ""
    cells = [
        fix,
        f"{mean(accuracies):.1f}{spread}",
        f"{sum(m.learned for m in found)}/{len(found)}",
        f"{excess:.3f}",
        f"{mean(m.excess for m in plain) / excess:.1f}" if excess else "all",
        " / ".join(
            f"{mean(getattr(m, name) for m in found):.1f}"
            for name in ("kinks_last", "kinks_mean", "kinks_val")
        ),
        f"{clean}/{len(found)}, {clean_mean}/{len(found)}",
        f"{mean(m.excursions for m in found):.1f}",
        "> 100" if median(reached) >= NEVER else f"{median(reached):g}",
    ]
    return f"| {' | '.join(cells)} |"


HEADER = (
    "fix",
    "final val accuracy %",
    "end ≥ 95 %",
    "excess loss",
    "times less",
    "kinks: last batch / epoch mean / val",
    "no kink: last batch and val, mean and val",
    "excursions",
    "epochs to 95 %, median",
)


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--fixes", nargs="+", choices=FIXES, default=list(FIXES), metavar="FIX")
    parser.add_argument("--stream", choices=("clean", "notebook"), default="clean")
    parser.add_argument("--processes", type=int, default=1, help="trainings at a time")
    parser.add_argument("--output", type=Path, help="default: runs/spike_fixes/STREAM")
    options, flags = parser.parse_known_args(args)  # other flags go to train.py
    output = (options.output or ROOT / "spike_fixes" / options.stream).absolute()
    flags = [f"--data.stream={options.stream}", *flags]
    with ThreadPoolExecutor(options.processes) as pool:
        found = {
            fix: [pool.submit(train, fix, seed, flags, output) for seed in options.seeds]
            for fix in options.fixes
        }
        measures = {fix: [each.result() for each in runs] for fix, runs in found.items()}
    rows = [
        {"fix": fix, "seed": seed, **asdict(each)}
        for fix, runs in measures.items()
        for seed, each in zip(options.seeds, runs, strict=True)
    ]
    pd.DataFrame(rows).to_csv(output / "fixes.csv", index=False)
    print(f"seeds {options.seeds}, {options.stream} stream, torch {version('torch')}\n")
    print(f"| {' | '.join(HEADER)} |\n|{' --- |' * len(HEADER)}")
    for fix, runs in measures.items():
        print(row(fix, runs, measures.get("untouched", runs)))


if __name__ == "__main__":
    main()
