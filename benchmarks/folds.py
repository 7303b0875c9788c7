"""Five folds against five seeds, alone and averaged, on the test set.

    python -m benchmarks.folds --val_size 1556
    python -m benchmarks.folds --config cifar10_cpu --cut data --val_size 800 \\
        --data.batch_size=200 --trainer.max_epochs=2

Each run trains on four fifths: of a fold, or of what ``--val_size`` leaves a seed. ``--cut`` takes
800 images of each batch of CIFAR-10 below that folder, and 2,000 of its test batch. Flags that are
not the script's own go to `train.py fit`.
"""

import argparse
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from lightning import Trainer

from core.runs import ROOT
from datamodules.image_files.safe_pickle import load_arrays
from pipeline.kaggle.prediction_file import wilson_interval
from pipeline.loading import LoadedRun
from pipeline.prediction import average, predict, predict_out_of_fold
from pipeline.studies.out_of_fold import save
from pipeline.trainer import quiet_libraries

NUMBERS = range(5)
SIZES = {f"data_batch_{number}": 800 for number in range(1, 6)} | {"test_batch": 2000}


def cut(source: Path, folder: Path) -> None:
    """Write the first images of each batch of CIFAR-10, in its own format."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in SIZES.items():
        batch = load_arrays(source / name)
        part = {key: batch[key][:size] for key in ("data", "labels")}
        (folder / name).write_bytes(pickle.dumps(part))


def train(config: str, options: argparse.Namespace, flags: list[str]) -> None:
    """Train the runs of the folds and of the seeds; finished ones are not trained again."""
    for number in NUMBERS:
        fold = [f"--run=fold{number}", "--data.folds=5", f"--data.fold={number}"]
        held_out = f"--data.val_size={options.val_size}"
        seed = [f"--run=seed{number}", f"--seed_everything={number}", held_out]
        for kind in (fold, seed):
            command = [sys.executable, "train.py", "fit", config, *kind, *flags]
            subprocess.run(command, check=True)


def score(folder: Path, kind: str) -> np.ndarray:
    """Print the accuracies of the runs of a kind, and return where their average is right."""
    members = [LoadedRun.load(str(folder / f"{kind}{number}"), "best", []) for number in NUMBERS]
    precision = members[0].config["trainer"]["precision"]
    trainer = Trainer(
        precision=precision, logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    with tempfile.TemporaryDirectory() as parts:
        predictions = predict(trainer, members, Path(parts))
        columns = predict_out_of_fold(trainer, members, Path(parts, "out_of_fold"))
    target = members[0].data.read_test()[-1].numpy()
    single = [(outputs["probabilities"].argmax(1) == target).mean() for _, outputs in predictions]
    print(f"test, a {kind} alone: {np.mean(single):.2%} ± {np.std(single, ddof=1):.2%}")
    right = average(members, predictions)[1]["probabilities"].argmax(1) == target
    low, high = wilson_interval(right.mean(), len(right))
    interval = f"95% interval {low:.2%} to {high:.2%}, {len(right)} samples"
    print(f"test, average of the {kind}s: {right.mean():.2%} ({interval})")
    if columns:
        save(folder / "oof.npz", columns, members[0].data.class_names)
    return right


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="demo", help="its name in configs/")
    parser.add_argument("--val_size", type=int, help="samples that a seed holds out")
    parser.add_argument("--cut", type=Path, metavar="DIR", help="holds cifar-10-batches-py")
    parser.add_argument("--score", action="store_true", help="score the runs that are there")
    options, flags = parser.parse_known_args()
    quiet_libraries()
    folder = ROOT / options.config
    if options.cut:
        cut(options.cut / "cifar-10-batches-py", folder / "cut" / "cifar-10-batches-py")
        flags += [f"--data.data_dir={folder / 'cut'}", "--data.verify=false"]
    if not options.score:
        train(f"--config=configs/{options.config}.yaml", options, flags)
    folds, seeds = score(folder, "fold"), score(folder, "seed")
    better, worse = (folds & ~seeds).sum(), (seeds & ~folds).sum()
    print(f"right by the folds alone: {better}, by the seeds alone: {worse}")


if __name__ == "__main__":
    main()
