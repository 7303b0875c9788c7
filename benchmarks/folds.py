"""Five folds against five seeds, alone and averaged, on the test set.

    python -m benchmarks.folds --val_size 1556
    python -m benchmarks.folds --config cifar10_cpu --cut data --val_size 800 --data.batch_size=200

Each run trains on four fifths: of a fold, or of what ``--val_size`` leaves a seed. ``--cut`` takes
800 images of each batch of CIFAR-10 below that folder, and 2,000 of its test batch. Flags that are
not the script's own go to `train.py fit`. Finished runs are not trained again.
"""

import argparse
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np

from core.runs import ROOT
from datamodules.image_files.safe_pickle import load_arrays
from pipeline.kaggle.prediction_file import wilson_interval
from pipeline.loading import Member

NUMBERS = range(5)
SIZES = {f"data_batch_{number}": 800 for number in range(1, 6)} | {"test_batch": 2000}


def cut(source: Path, folder: Path) -> None:
    """Write the first images of each batch of CIFAR-10, in its own format."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in SIZES.items():
        batch = load_arrays(source / name)
        part = {key: batch[key][:size] for key in ("data", "labels")}
        (folder / name).write_bytes(pickle.dumps(part))


def run(*args: str | Path) -> None:
    subprocess.run([sys.executable, *map(str, args)], check=True)


def predicted(runs: list[Path], output: Path) -> np.ndarray:
    """Whether each test sample is classified right by the average of some runs."""
    run("predict.py", *runs, f"--output={output}")
    target = Member.load(str(runs[0]), "best", []).data.read_test()[-1].numpy()
    return np.load(output.with_suffix(".npz"))["probabilities"].argmax(1) == target


def show(name: str, accuracy: float, samples: int) -> None:
    low, high = wilson_interval(accuracy, samples)
    print(f"{name:32} {accuracy:.2%}, 95% interval {low:.2%} to {high:.2%}, {samples} samples")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="demo", help="its name in configs/")
    parser.add_argument("--val_size", type=int, required=True, help="samples that a seed holds out")
    parser.add_argument("--cut", type=Path, metavar="DIR", help="holds cifar-10-batches-py")
    options, flags = parser.parse_known_args()
    folder = ROOT / options.config
    if options.cut:
        cut(options.cut / "cifar-10-batches-py", folder / "cut" / "cifar-10-batches-py")
        flags += [f"--data.data_dir={folder / 'cut'}", "--data.verify=false"]
    fit = ["train.py", "fit", f"--config=configs/{options.config}.yaml", *flags]
    for number in NUMBERS:
        run(*fit, f"--run=fold{number}", "--data.folds=5", f"--data.fold={number}")
        seed = [f"--seed_everything={number}", f"--data.val_size={options.val_size}"]
        run(*fit, f"--run=seed{number}", *seed)
    right = {}
    for kind in ("fold", "seed"):
        runs = [folder / f"{kind}{number}" for number in NUMBERS]
        single = [predicted([each], folder / f"{each.name}.csv").mean() for each in runs]
        right[kind] = predicted(runs, folder / f"{kind}s.csv")
        print(f"test, a {kind} alone: {np.mean(single):.2%} ± {np.std(single, ddof=1):.2%}")
    found = json.loads((folder / "folds.json").read_text())["out_of_fold"]
    show("out of fold", found["accuracy"], found["samples"])
    for kind, hits in right.items():
        show(f"test, average of the {kind}s", hits.mean(), len(hits))
    better, worse = (right["fold"] > right["seed"]).sum(), (right["fold"] < right["seed"]).sum()
    print(f"right by the folds alone: {better}, by the seeds alone: {worse}")


if __name__ == "__main__":
    main()
