"""The language of a last name: a linear classifier, and the networks beside it.

    python -m benchmarks.last_names --data_dir data               # what has no line yet
    python -m benchmarks.last_names --data_dir data --minutes 0   # the table of the record alone

Each network is trained as ``train.py fit`` does, on all training names; the linear classifier has
no seed. All are scored by :func:`scores` on the same evaluation part. Standard errors and intervals
are about other names: those of the evaluation part are drawn 1,000 times with replacement, the same
draws for all, and each time the mean over the seeds is taken. Dimensions: N names, R draws, K
classes.
"""

import argparse
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.recorded import RECORDS, RunRecord, Setting
from datamodules import LastNamesDataModule
from datamodules.sequences.last_names import normalize
from lit_models import load
from pipeline.cli import run as train_command

LINEAR = "linear SVC"
NETWORKS: dict[str, list[str]] = {  # by name, the flags of `train.py fit`
    "RNN": ["--config=configs/last_names_course.yaml"],
    "BiLSTM": ["--config=configs/last_names.yaml"],
    "BiLSTM, balanced": ["--config=configs/last_names.yaml", "--data.balanced=0.25"],
}
DRAWS = 1000
FLAGS = ["--trainer.callbacks=[]", "--trainer.logger=callbacks.MetricsCSV",
         "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]  # fmt: skip


def measure(run: Setting, data: LastNamesDataModule) -> dict[str, Any]:
    """Classes of the evaluation part, as letters from A on, and the parameters that found them."""
    if run["model"] == LINEAR:
        found, parameters = linear_baseline(data), None
    else:
        found, parameters = trained(run, data)
    return {"parameters": parameters, "classes": "".join(chr(65 + k) for k in found.tolist())}


def linear_baseline(data: LastNamesDataModule) -> torch.Tensor:
    """Classes (N,) that a linear classifier finds for the evaluation part; takes a few seconds.

    A linear support vector machine on TF-IDF weights of the 1- to 5-grams within words, whose ends
    are marked, of the symbols that networks see. Penalty, marks and capital letters did best of
    ten settings in four-fold cross-validation of the training part, all of which it is fitted to.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer  # a second of imports
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    classifier = make_pipeline(
        TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 5), lowercase=False),
        LinearSVC(random_state=0),
    )
    *_, classes = data.read("train")
    classifier.fit([normalize(name) for name in data.predicted], classes.numpy())
    data.read("test")
    return torch.from_numpy(classifier.predict([normalize(name) for name in data.predicted]))


def trained(run: Setting, data: LastNamesDataModule) -> tuple[torch.Tensor, int]:
    """Classes (N,) that a network finds for the evaluation part, and its parameters."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        own = [f"--trainer.default_root_dir={folder}", f"--data.data_dir={data.data_dir}"]
        seed = f"--seed_everything={run['seed']}"
        train_command(["fit", *run["flags"], *FLAGS, *own, seed, "--run=x"])
        (place,) = Path(folder).glob("*/x")
        model = load(place)
    data.read("test")
    found = model.predict(data.predicted).probabilities.argmax(1)
    return torch.from_numpy(found), sum(p.numel() for p in model.parameters())


def scores(found: np.ndarray, target: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Accuracy and macro F1, as fractions.

    Args:
        found: Classes (N,).
        target: Classes (N,).
        weights: How often each name counts (R, N).

    Returns:
        Both scores (2, R). Classes that are neither found nor there do not count.
    """
    classes = np.arange(max(found.max(), target.max()) + 1)
    is_found, is_target = (each[:, None] == classes for each in (found, target))  # (N, K)
    right, guesses, names = (
        weights @ each.astype(float) for each in (is_found & is_target, is_found, is_target)
    )
    with np.errstate(invalid="ignore"):
        f1 = 2 * right / (guesses + names)  # (R, K)
    return np.stack([right.sum(1) / weights.sum(1), np.nanmean(f1, 1)])


def show(record: RunRecord, target: np.ndarray) -> None:
    """Print accuracy and macro F1 of each model, and how far it is ahead of the linear one."""
    size = len(target)
    draws = np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), DRAWS)
    weights = np.concatenate([np.ones((1, size), int), draws])  # first each name once
    runs: dict[str, list[np.ndarray]] = {}
    for line in record.lines:
        found = np.frombuffer(line["measures"]["classes"].encode(), np.uint8).astype(int) - 65
        runs.setdefault(line["run"]["model"], []).append(scores(found, target, weights))
    print(f"{size:,} names; mean ± deviation of the seeds (standard error); 95 % intervals\n")
    for number, score in enumerate(("accuracy", "macro F1")):
        print(f"| {score} | seeds | | ahead of the {LINEAR} |\n| --- | ---: | --- | --- |")
        linear = np.mean(runs[LINEAR], 0)[number]
        for model, own in runs.items():
            each = np.stack(own)[:, number]  # (seeds, R)
            mean, spread = each.mean(0), each[:, 0].std(ddof=min(1, len(each) - 1))
            ahead = mean - linear
            low, high = np.quantile(ahead[1:], (0.025, 0.975))
            print(
                f"| {model} | {len(each)} | {mean[0]:.4f} ± {spread:.4f} ({mean[1:].std():.4f}) "
                f"| {ahead[0]:+.4f}, {low:+.4f} to {high:+.4f} |"
            )
        print()
    print(RunRecord.origins(record.lines))


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, default="data", help="holds names/")
    parser.add_argument("--models", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(5)))
    parser.add_argument("--minutes", type=float, help="begin no run that would end later")
    parser.add_argument("--record", type=Path, default=RECORDS / "last_names.jsonl")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    data = LastNamesDataModule(str(options.data_dir))
    record = RunRecord(options.record)
    runs: list[Setting] = [{"model": LINEAR}] + [
        {"model": model, "flags": NETWORKS[model], "seed": seed}
        for seed in options.seeds
        for model in options.models
    ]
    record.complete(runs, lambda run: measure(run, data), options.minutes)
    show(record, data.read("test")[-1].numpy())


if __name__ == "__main__":
    main()
