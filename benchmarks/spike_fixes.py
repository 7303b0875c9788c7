"""Ways to be rid of the spikes of the temporal-order LSTM, over several seeds.

    python -m benchmarks.spike_fixes --seeds 1 2 3 4 5 6 7 8 9 10    # what has no line yet
    python -m benchmarks.spike_fixes --minutes 20                    # as much as ends in 20 minutes
    python -m benchmarks.spike_fixes --stream notebook --fixes untouched steady --seeds 1 2 3 4 5
    python -m benchmarks.spike_fixes --tables                        # of the record alone

Every training is ``train.py fit`` in a process of its own, half a minute on one core; a finished
one is a line of ``records/spike_fixes.jsonl``. The plan: all fixes with seeds 1 to 10 on the clean
stream, seed by seed; ``untouched`` and ``steady`` with the same seeds on the notebook's. Ours were
tuned on seeds 101 to 110; the remedies of others have the settings of their papers.
"""

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import pandas as pd
import yaml

from benchmarks.recorded import RECORDS, RunRecord, Setting
from steadyfit.measures import SpikeMeasures, measure

TARGET = 0.95  # accuracy at which the task counts as solved
NEVER = 101  # epochs, of a run that does not get there in 100
ADD = "--trainer.callbacks+="


def monitor(**settings: str) -> str:
    """The monitor as the only callback: it logs the loss of every step, and pictures take time."""
    entry = {"class_path": "callbacks.GradientSpikeMonitor", "init_args": settings}
    return f"--trainer.callbacks={json.dumps([entry])}"


def optimizer(name: str, **settings: Any) -> list[str]:
    given = [f"--model.optimizer.{key}={value}" for key, value in settings.items()]
    return [f"--model.optimizer={name}", *given]


def decrease(share: float) -> list[str]:
    """UpdateClipping with ``max_decrease`` alone."""
    limits = {"max_rms": "null", "max_decrease": share}
    return [f"{ADD}UpdateClipping", *(f"--trainer.callbacks.{k}={v}" for k, v in limits.items())]


PLAIN = ["--config=configs/temporal_order_lstm.yaml"]  # and the monitor as the only callback
STEADY = ["--config=configs/temporal_order_lstm_steady.yaml"]
ADAM = [*PLAIN, *optimizer("torch.optim.Adam", betas=[0.9, 0.99])]
RMS = {"betas": [0.0, 0.99], "weight_decay": 0.0}  # RMSprop with the correction of Adam
MOMENTUM = {"betas": [0.9, 0.999], "weight_decay": 0.0}  # as published
RIVALS = "benchmarks.spike_rivals"
# the record has these by the names of callbacks that left the library after its runs
FORMER = {
    "GradientNormClipping --trainer.callbacks.rule=autoclip": f"{RIVALS}.AutoClip",
    "GradientNormClipping": f"{RIVALS}.ZClip",
    "AdaptiveGradientClipping": f"{RIVALS}.AGC",
}
FIXES: dict[str, list[str]] = {
    "untouched": PLAIN,
    "gradient norm at most 1": [*PLAIN, "--trainer.gradient_clip_val=1"],
    "gradient norm at most 0.25": [*PLAIN, "--trainer.gradient_clip_val=0.25"],
    "ZClip": [*PLAIN, f"{ADD}GradientNormClipping"],
    "AutoClip": [*PLAIN, f"{ADD}GradientNormClipping", "--trainer.callbacks.rule=autoclip"],
    "AGC 0.1": [*PLAIN, f"{ADD}AdaptiveGradientClipping"],
    "AdaGC": [*PLAIN, f"{ADD}{RIVALS}.AdaGC"],
    "SPAM without momentum": [*PLAIN, *optimizer(f"{RIVALS}.SPAM", **RMS)],
    "SPAM": [*PLAIN, *optimizer(f"{RIVALS}.SPAM", **MOMENTUM)],
    "StableAdamW without momentum": [*PLAIN, *optimizer(f"{RIVALS}.StableAdamW", **RMS)],
    "StableAdamW": [*PLAIN, *optimizer(f"{RIVALS}.StableAdamW", **MOMENTUM)],
    "reaction skip": [*PLAIN, monitor(reaction="skip")],
    "reaction rollback": [*PLAIN, monitor(reaction="rollback")],
    "learning rate 3e-4": [*PLAIN, "--model.optimizer.lr=3e-4"],
    "update rms at most 1 lr": [*PLAIN, f"{ADD}UpdateClipping"],
    "decrease at most 0.02 loss": [*PLAIN, *decrease(0.02)],
    "decrease at most 0.1 loss": [*PLAIN, *decrease(0.1)],
    "decrease at most 0.5 loss": [*PLAIN, *decrease(0.5)],
    "decrease at most 2 loss": [*PLAIN, *decrease(2)],
    "Adam": ADAM,
    "Adam, decrease at most 0.02 loss": [*ADAM, *decrease(0.02)],
    "Adam, decrease at most 0.1 loss": [*ADAM, *decrease(0.1)],
    "Adam, decrease at most 0.5 loss": [*ADAM, *decrease(0.5)],
    "Adam, decrease at most 2 loss": [*ADAM, *decrease(2)],
    "both": [*PLAIN, f"{ADD}UpdateClipping", "--trainer.callbacks.max_decrease=0.1"],
    "steady without UpdateClipping": STEADY,
    "steady": [*STEADY, f"{ADD}UpdateClipping", "--trainer.callbacks.max_decrease=0.1"],
}


def run_of(fix: str, seed: int, stream: str, flags: list[str]) -> Setting:
    """A run of the record. A config that says something else makes another one."""
    arguments = [*FIXES[fix], f"--data.stream={stream}", *flags]
    content = yaml.safe_load(Path(arguments[0].removeprefix("--config=")).read_text())
    del content["trainer"]["callbacks+"]  # the flags say which
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    run = {"fix": fix, "stream": stream, "seed": seed}
    return run | {"flags": shlex.join(arguments), "config": digest[:12]}


def train(run: Setting, output: Path | None) -> dict[str, Any]:
    """Train in a process of its own, and measure what it leaves."""
    name = f"{run['fix'].replace(' ', '_').replace(',', '')}-{run['seed']}"
    with tempfile.TemporaryDirectory() as scratch:
        folder = output or Path(scratch)
        typed = run["flags"]
        for former, now in FORMER.items():
            typed = typed.replace(f"{ADD}{former}", f"{ADD}{now}")
        config, *flags = shlex.split(typed)
        arguments = [config, "--trainer.logger=callbacks.MetricsCSV", monitor(), *flags]
        arguments += [f"--seed_everything={run['seed']}", f"--run={name}"]
        arguments += [f"--trainer.default_root_dir={folder}"]
        subprocess.run(
            [sys.executable, "train.py", "fit", *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        (metrics,) = folder.glob(f"temporal_order_lstm*/{name}/metrics.csv")
        return asdict(measure(pd.read_csv(metrics), TARGET))


def row(fix: str, found: list[SpikeMeasures], plain: list[SpikeMeasures]) -> str:
    """One line of the Markdown table; ``plain`` are untouched runs of the same seeds."""
    clean = sum(m.kinks_last == m.kinks_val == 0 for m in found)
    clean_mean = sum(m.kinks_mean == m.kinks_val == 0 for m in found)
    excess = mean(m.excess for m in found)
    reached = [NEVER if m.first_epoch is None else m.first_epoch for m in found]
    accuracies = [100 * m.final_accuracy for m in found]
    times_less = f"{mean(m.excess for m in plain) / excess:.1f}" if excess and plain else "-"
    if plain and not excess:
        times_less = "all"
    spread = f" ± {stdev(accuracies):.1f}" if len(found) > 1 else ""
    cells = [
        fix,
        f"{len(found)}",
        f"{mean(accuracies):.1f}{spread}",
        f"{sum(m.learned for m in found)}/{len(found)}",
        f"{excess:.3f}",
        times_less,
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
    "seeds",
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
    parser.add_argument("--minutes", type=float, help="begin no run that would end later")
    parser.add_argument("--tables", action="store_true", help="run nothing")
    parser.add_argument("--record", type=Path, default=RECORDS / "spike_fixes.jsonl")
    parser.add_argument("--output", type=Path, help="keep the folders of the runs here")
    options, flags = parser.parse_known_args(args)  # other flags go to train.py
    record = RunRecord(options.record)
    runs = [
        run_of(fix, seed, options.stream, flags) for seed in options.seeds for fix in options.fixes
    ]
    if not options.tables:
        output = options.output and options.output.absolute()
        record.complete(runs, lambda run: train(run, output), options.minutes)
    print_table(record, runs, options)


def print_table(record: RunRecord, runs: list[Setting], options: argparse.Namespace) -> None:
    """A row for each fix; it is compared with the untouched runs of the same seeds."""
    lines = [line for run in runs if (line := record.find(run))]

    def of(fix: str) -> dict[int, SpikeMeasures]:
        own = [line for line in lines if line["run"]["fix"] == fix]
        return {line["run"]["seed"]: SpikeMeasures(**line["measures"]) for line in own}

    plain = of("untouched")
    print(f"| {' | '.join(HEADER)} |\n|{' --- |' * len(HEADER)}")
    for fix in options.fixes:
        if found := of(fix):
            print(row(fix, list(found.values()), [plain[s] for s in found if s in plain]))
    print(f"\n{len(lines)} of {len(runs)} runs, {options.stream} stream")
    print(f"seeds {' '.join(map(str, options.seeds))}; {RunRecord.origins(lines)}")


if __name__ == "__main__":
    main()
