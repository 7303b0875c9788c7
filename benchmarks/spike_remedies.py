"""Why do real runs spike, and is what `spikes.py why` advises worth anything?

    python -m benchmarks.spike_remedies DATA [--minutes 40]

DATA holds `gutenberg/` and CIFAR-10. The untouched LSTM of `configs/temporal_order_lstm.yaml` is
asked about its `EPISODES` worst excursions of the loss, for seeds 1 to 10; the small GPT of
`benchmarks/spike_gpt.py` and `configs/cifar10_cpu.yaml` at three times its rate about the worst
spike, and trained on by the command that is printed. Each run is a line of
`benchmarks/records/spike_remedies.jsonl`; what has a line is not trained again.
"""

import argparse
import json
import shlex
import sys
import tempfile
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from benchmarks.recorded import RECORDS, RunRecord, Setting
from benchmarks.spike_gpt import Books
from benchmarks.spike_why import ask
from core.errors import UserError
from datamodules.base import Tensors
from datamodules.sequences.synthetic import Split, SyntheticDataModule
from pipeline.cli import run as train_command
from steadyfit.measures import excursions, measure
from steadyfit.watching.spike_log import CONFIRM

EPISODES = 6  # of a run, those of the highest loss
QUIET = ["--trainer.logger=callbacks.MetricsCSV", "--trainer.enable_progress_bar=false"]
RATE = 3  # times that of cifar10_cpu.yaml
UNTOUCHED = "untouched LSTM"
SEEDS = {"small GPT": range(1, 4), UNTOUCHED: range(1, 11), "cifar10_cpu x 3": range(1)}


class BooksDataModule(SyntheticDataModule):
    """Random stretches of bytes (B, T) of the Gutenberg books, and the bytes that follow (B, T)."""

    class_names = tuple(f"byte {i}" for i in range(256))

    def __init__(
        self,
        data_dir: str = "data",
        epoch_size: int = 2000,
        batch_size: int = 8,
        eval_batch_size: int = 256,
        val_size: int = 256,
    ) -> None:
        super().__init__(epoch_size, batch_size, eval_batch_size, val_size, data_dir)
        self.books = Books(self.data_dir / "gutenberg")

    def draw(self, split: Split, epoch: int) -> Tensors:
        if split == "train":
            tokens = self.books.batch(self.generator(split, epoch), self.samples(split))
        else:
            tokens = self.books.validation(self.samples(split))
        return shifted(tokens)


def shifted(tokens: Tensor) -> Tensors:
    """Tokens (N, T + 1) without the last, and without the first."""
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def gpt(seed: int, data: Path) -> dict[str, Any]:
    """The run of `benchmarks/spike_gpt.py` without a fix, at its highest rate but one."""
    optimizer = {
        "class_path": "torch.optim.AdamW",
        "init_args": {"lr": 1.2e-2, "weight_decay": 0.1},
    }
    schedule = {"class_path": "lit_models.schedules.Triangle", "init_args": {"peak": 0.05}}
    return {
        "seed_everything": seed,
        "model": {
            "class_path": "LitClassifier",
            "init_args": {
                "network": {"class_path": "benchmarks.spike_gpt.GPT"},
                "optimizer": optimizer,
                "lr_scheduler": schedule,
            },
        },
        "data": {
            "class_path": "benchmarks.spike_remedies.BooksDataModule",
            "init_args": {"data_dir": str(data)},
        },
        "trainer": {"max_epochs": 4, "precision": "32-true"},
    }


def arguments(setting: Setting, data: Path, folder: Path) -> list[str]:
    """What `train.py` is told to train a run."""
    name, seed = setting["run"], setting["seed"]
    common = [f"--seed_everything={seed}", f"--trainer.default_root_dir={folder}", "--run=run"]
    if name == UNTOUCHED:
        return ["fit", "--config=configs/temporal_order_lstm.yaml", *common, *QUIET]
    if name == "small GPT":
        path = folder / "gpt.yaml"
        path.write_text(json.dumps(gpt(seed, data)))
        return ["fit", f"--config={path}", *common, *QUIET]
    rates = {"lr": 0.24, "bias_lr": 106.0, "head_lr": 1.75}
    options = [f"--model.optimizer.{key}={RATE * rate:g}" for key, rate in rates.items()]
    config = ["--config=configs/cifar10_cpu.yaml", f"--data.data_dir={data}"]
    return ["fit", *config, *options, *common, *QUIET]


def found(run: Path, before: pd.DataFrame | None = None, since: int = 0) -> dict[str, float]:
    """Measures of a run, with what came before it if it goes on from there."""
    rows = pd.read_csv(run / "metrics.csv").sort_values("step")
    if before is not None:
        rows = pd.concat([before[before["step"] < since], rows[rows["step"] >= since]])
    measures = measure(rows)
    last = float(rows["train/loss"].tail(50).median())
    return {
        "excess": measures.excess,
        "excursions": measures.excursions,
        "val_accuracy": measures.final_accuracy,
        "last_loss": last,
    }


def train(setting: Setting, data: Path) -> dict[str, Any]:
    """Train a run, ask why it spiked, and take the advice."""
    out = StringIO()
    with tempfile.TemporaryDirectory() as root, redirect_stdout(out), redirect_stderr(out):
        folder = Path(root)
        train_command(arguments(setting, data, folder))
        (run,) = folder.glob("*/run")
        if setting["run"] == UNTOUCHED:
            return {"episodes": episodes(run)} | found(run)
        report = ask(run)
        said = report.remedy()
        answer: dict[str, Any] = {
            "verdict": str(report.verdict),
            "cause": report.verdict.cause,
            "remedy": said,
        }
        answer |= {"step": report.spike.first, "exact": report.control.is_exact}
        answer |= {"counts": {t.name: str(t) for t in report.tallies}, "before": found(run)}
        command = said.rpartition("python train.py ")[2]
        if command == said:  # no command
            return answer
        train_command([*shlex.split(command), "--trust"])
        since = 0
        if report.control.since and "--ckpt_path" in command:
            state = torch.load(run / report.control.since, weights_only=True)
            since = int(state["global_step"])
        (new,) = folder.glob("*/run_why")
        before = pd.read_csv(run / "metrics.csv").sort_values("step")
        answer["remedy"] = said.replace(root, "RUNS")
        return answer | {"since": since, "after": found(new, before, since)}


def episodes(run: Path) -> list[dict[str, Any]]:
    """Causes of the worst excursions of the loss."""
    rows = pd.read_csv(run / "metrics.csv").sort_values("step")
    loss = rows["train/loss"].to_numpy()
    spans: list[tuple[int, int]] = []
    for start, end in excursions(loss):
        if spans and start - spans[-1][1] <= CONFIRM:
            start = spans.pop()[0]
        spans.append((start, end))
    spans.sort(key=lambda span: -np.max(loss[slice(*span)]))
    told: list[dict[str, Any]] = []
    for start, end in spans[:EPISODES]:
        entry: dict[str, Any] = {"step": int(rows["step"].iloc[start])}
        entry["height"] = float(np.max(loss[start:end]))
        try:
            report = ask(run, entry["step"])
        except UserError as error:
            told.append(entry | {"cause": "not flagged", "said": str(error)})
            continue
        told.append(
            entry
            | {"first": report.spike.first, "peak": report.spike.peak}
            | {"cause": report.verdict.cause, "said": str(report.verdict)}
            | {"counts": {t.name: str(t) for t in report.tallies}}
            | {"one_before": is_one_before(report.spike.record)}
            | {"exact": report.control.is_exact, "repeated": report.control.steps}
            | {"forked": report.trials.steps if report.trials else 0}
        )
    return told


def is_one_before(record: dict[str, Any]) -> bool | None:
    """Whether the largest update of the ten steps came in the last one of them."""
    return record["step"] - record["before"]["step"] == 1 if record.get("before") else None


def settings() -> list[Setting]:
    return [{"run": name, "seed": seed} for name, seeds in SEEDS.items() for seed in seeds]


def show(record: RunRecord) -> None:
    print("| run | seed | cause | excess loss | with the remedy | end | with the remedy |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: |")
    lstm = []
    for line in record.lines:
        run, m = line["run"], line["measures"]
        if "episodes" in m:
            lstm += m["episodes"]
            continue
        after = m.get("after", {})
        cells = [f"{d['excess']:.2f}" if d else "-" for d in (m["before"], after)]
        cells += [f"{d['last_loss']:.3f}" if d else "-" for d in (m["before"], after)]
        print(f"| {run['run']} | {run['seed']} | {m['cause']} | {' | '.join(cells)} |")
    counts = Counter(e["cause"] for e in lstm)
    print(f"\n{len(lstm)} episodes of untouched LSTMs: {dict(counts)}")
    asked = [e for e in lstm if "one_before" in e]
    print(f"largest update one step before: {sum(bool(e['one_before']) for e in asked)}")
    exact = sum(e["exact"] for e in asked)
    print(f"control equal in {exact} of {len(asked)}")
    if asked:
        print(f"steps of forks: at most {max(e['forked'] for e in asked)}")
    print(RunRecord.origins(record.lines))


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of the data sets")
    parser.add_argument("--minutes", type=float)
    options = parser.parse_args(args)
    record = RunRecord(RECORDS / "spike_remedies.jsonl")
    left = record.complete(settings(), lambda s: train(s, options.data.resolve()), options.minutes)
    show(record)
    print(f"{left} runs left", file=sys.stderr)


if __name__ == "__main__":
    main()
