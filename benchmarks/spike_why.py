"""Does `spikes.py why` name what made a spike, where it is known because it was planted?

    python -m benchmarks.spike_why [--minutes 40] [--seeds 1 2 3] [--tasks cnn lstm transformer]

Runs that have a line in `benchmarks/records/spike_why.jsonl` are not trained again. A run counts
as right if its cause is the planted one, and with one sample if it is that sample; "cannot tell"
is not right and not wrong. The spike asked about is the first that the monitor flags in the 20
steps from the planted one. In runs with nothing planted ten random steps are asked about. What is
planted, and the order of causes in `pipeline/why/verdict.py`,
were committed before the first line was scored; seeds from 101 on were for trying.
"""

import argparse
import json
import os
import random
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from copy import deepcopy
from io import StringIO
from pathlib import Path
from typing import Any

from benchmarks.recorded import RECORDS, RunRecord, Setting
from benchmarks.spike_plants import ONCE
from core.errors import UserError
from pipeline.cli import run as train_command
from pipeline.why.command import why
from pipeline.why.report import Report
from pipeline.why.verdict import describe
from steadyfit.watching.records import FOLLOW, read_records

PLANTS = "benchmarks.spike_plants"
LEFT_OUT = {
    ("cnn", "float16 overflow"),  # such convolutions take a CPU minutes
    ("transformer", "sample x 100"),  # its normalisation takes the factor out again
    ("transformer", "calm stretch"),  # no spike comes of it
}
CAUSES = {  # by plant
    "sample x 100": "samples",
    "wrong labels": "samples",
    "rate jump": "jump",
    "calm stretch": "moment",
    "poisoned buffer": "buffer",
    "float16 overflow": "precision",
    "flipped bit": "irreproducible",
}
NOTHING = "nothing"
QUIET_STEPS = 10  # that are asked about in a run with nothing planted
SEEDS = {"cnn": 12, "lstm": 12, "transformer": 4}  # reported of each plant
QUIET_SEEDS = {"cnn": 4, "lstm": 4, "transformer": 2}
SGD = ("torch.optim.SGD", {"lr": 0.05, "momentum": 0.9})
RMSPROP = ("torch.optim.RMSprop", {"lr": 1e-2, "alpha": 0.97})
TASKS: dict[str, dict[str, Any]] = {
    "cnn": {
        "network": {"class_path": f"{PLANTS}.BatchNormCNN"},
        "data": {"class_path": "DigitsDataModule", "init_args": {"batch_size": 32}},
        "classes": 10,
        "batches": 31,  # of an epoch
        "steps": (210, 300),  # between which something is planted
        "optimizer": SGD,
    },
    "lstm": {
        "network": {
            "class_path": "lit_models.networks.Recurrent",
            "init_args": {
                "rnn": {
                    "class_path": "lit_models.networks.LSTM",
                    "init_args": {"input_size": 8, "hidden_size": 12},
                }
            },
        },
        "data": {"class_path": "TemporalOrderDataModule", "init_args": {"level": "easy"}},
        "classes": 4,
        "batches": 31,
        "steps": (260, 400),
        "optimizer": ("torch.optim.Adam", {"lr": 1e-2}),
    },
    "transformer": {
        "network": {"class_path": f"{PLANTS}.AttentionClassifier"},
        "data": {"class_path": "TemporalOrderDataModule", "init_args": {"level": "easy"}},
        "classes": 4,
        "batches": 31,
        "steps": (70, 120),
        "optimizer": ("torch.optim.Adam", {"lr": 1e-3}),
        "jump": 300.0,  # times 20 does it no harm
    },
}


def planted(task: str, plant: str, seed: int) -> tuple[dict[str, Any], int]:
    """The callback that plants a cause, and the optimizer step of it."""
    facts = TASKS[task]
    step = random.Random(f"{task} {plant} {seed}").randint(*facts["steps"])
    epoch, batch = divmod(step, facts["batches"])
    if batch < 8:  # so that samples can be moved inside the epoch
        step, batch = step + 8, batch + 8
    place = {"epoch": epoch, "batch_idx": batch}
    made: dict[str, tuple[str, dict[str, Any]]] = {
        "sample x 100": ("LoudSample", {**place, "number": seed % 32}),
        "wrong labels": ("WrongLabels", {**place, "num_classes": facts["classes"]}),
        "rate jump": ("RateJump", {"step": step, "factor": facts.get("jump", 20.0)}),
        "calm stretch": ("CalmStretch", {"first": step - 180, "last": step}),
        "poisoned buffer": ("PoisonedBuffer", {"step": step}),
        "float16 overflow": ("Overflow", {"step": step}),
        "flipped bit": ("FlippedBit", {"step": step}),
    }
    name, options = made[plant]
    return {"class_path": f"{PLANTS}.{name}", "init_args": options}, step


def configuration(task: str, plant: str, seed: int) -> tuple[dict[str, Any], int]:
    """A configuration of train.py with a planted cause, and its step."""
    facts = TASKS[task]
    callbacks: list[dict[str, Any]] = [{"class_path": "callbacks.GradientSpikeMonitor"}]
    step = facts["steps"][1]
    if plant != NOTHING:
        callback, step = planted(task, plant, seed)
        callbacks.append(callback)
    optimizer, options = RMSPROP if plant == "calm stretch" else facts["optimizer"]
    if plant == "float16 overflow":
        optimizer, options = SGD
    network = deepcopy(facts["network"])
    if plant in ("poisoned buffer", "float16 overflow"):
        network.setdefault("init_args", {})["num_classes"] = facts["classes"]
        network = {"class_path": f"{PLANTS}.Scaled", "init_args": {"network": network}}
    return {
        "seed_everything": seed,
        "model": {
            "class_path": "LitClassifier",
            "init_args": {
                "network": network,
                "optimizer": {"class_path": optimizer, "init_args": options},
            },
        },
        "data": facts["data"],
        "trainer": {
            "max_epochs": -(-(step + 30) // facts["batches"]),
            "precision": "16-true" if plant == "float16 overflow" else "32-true",
            "logger": [{"class_path": "callbacks.MetricsCSV"}],
            "enable_progress_bar": False,
            "callbacks": callbacks,
        },
    }, step


def trained(config: dict[str, Any], folder: str) -> Path:
    """Train by a configuration, as ``train.py fit`` does; the run's folder."""
    path = Path(folder, "planted.yaml")
    path.write_text(json.dumps(config))
    os.environ[ONCE] = "1"
    train_command(["fit", f"--config={path}", f"--trainer.default_root_dir={folder}", "--run=run"])
    del os.environ[ONCE]
    return Path(folder, "planted", "run")


def ask(run: Path, step: int | None = None) -> Report:
    return why(argparse.Namespace(run=str(run), step=step, trust=True))


def measure(setting: Setting, *, shown: bool = False) -> dict[str, Any]:
    """Train a run with a planted cause, ask why it spiked, and say what was answered."""
    out = sys.stderr if shown else StringIO()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(out), redirect_stderr(out):
        return (quiet if setting["plant"] == NOTHING else answered)(setting, folder)


def answered(setting: Setting, folder: str) -> dict[str, Any]:
    """Answer where something was planted."""
    plant = setting["plant"]
    config, step = configuration(setting["task"], plant, setting["seed"])
    run = trained(config, folder)
    flagged = [r.step for r in read_records(run / "spikes.jsonl") if r.spiked]
    seen = [s for s in flagged if 0 <= s - step <= FOLLOW]
    if not seen:
        return {"planted": CAUSES[plant], "step": step, "cause": "not flagged"}
    report = ask(run, seen[0])
    named = None
    if report.trials and plant == "sample x 100":
        case, at = report.trials.case, config["trainer"]["callbacks"][1]["init_args"]
        slot = at["epoch"], at["batch_idx"] * case.batch_size + at["number"]
        named = describe(case, [slot], step) in str(report.verdict)
    return {
        "named": named,
        "planted": CAUSES[plant],
        "step": step,
        "cause": report.verdict.cause,
        "said": str(report.verdict),
        "samples": [str(s) for s in report.verdict.samples],
        "exact": report.control.is_exact,
        "repeated": report.control.steps,
        "forked": report.trials.steps if report.trials else 0,
    }


def quiet(setting: Setting, folder: str) -> dict[str, Any]:
    """Answers about random steps where nothing was planted."""
    config, last = configuration(setting["task"], NOTHING, setting["seed"])
    run = trained(config, folder)
    causes = {}
    for step in sorted(random.Random(setting["seed"]).sample(range(last), QUIET_STEPS)):
        try:
            causes[step] = ask(run, step).verdict.cause
        except UserError:
            causes[step] = "no spike"
    return {"causes": causes}


def settings(options: argparse.Namespace) -> list[Setting]:
    seeds = options.seeds or range(1, max(SEEDS.values()) + 1)
    return [
        {"task": task, "plant": plant, "seed": seed}
        for seed in seeds
        for task in options.tasks
        for plant in options.plants
        if (task, plant) not in LEFT_OUT
        if options.seeds or seed <= (QUIET_SEEDS if plant == NOTHING else SEEDS)[task]
    ]


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of those reported")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    plants = [*CAUSES, NOTHING]
    parser.add_argument("--plants", nargs="+", choices=plants, default=plants)
    parser.add_argument("--try", dest="shown", action="store_true", help="show one, record none")
    options = parser.parse_args(args)
    runs = settings(options)
    if options.shown:
        for setting in runs:
            print(setting, measure(setting, shown=True), sep="\n", flush=True)
        return
    record = RunRecord(RECORDS / "spike_why.jsonl")
    left = record.complete(runs, measure, options.minutes)
    show(record, left)


def show(record: RunRecord, left: int) -> None:
    """The table of what was planted and what was said."""
    print("| network | planted | runs | right | cannot tell | not flagged | wrong |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for task in TASKS:
        for plant, cause in CAUSES.items():
            found = [
                line["measures"]
                for line in record.lines
                if (line["run"]["task"], line["run"]["plant"]) == (task, plant)
            ]
            if not found:
                continue
            said = [m["cause"] for m in found]
            right = sum(m["cause"] == cause and m.get("named") is not False for m in found)
            unsure, none = (said.count(c) for c in ("unknown", "not flagged"))
            wrong = len(said) - right - unsure - none
            print(f"| {task} | {plant} | {len(said)} | {right} | {unsure} | {none} | {wrong} |")
    causes = [c for m in record.lines for c in m["measures"].get("causes", {}).values()]
    counts = ", ".join(f"{causes.count(c)} {c}" for c in sorted(set(causes)))
    print(f"\n{len(causes)} random steps with nothing planted: {counts}")
    exact = [line["measures"]["exact"] for line in record.lines if "exact" in line["measures"]]
    print(f"{left} runs left; control equal in {sum(exact)} of {len(exact)}")
    print(RunRecord.origins(record.lines))


if __name__ == "__main__":
    main()
