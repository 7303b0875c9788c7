"""Cats against dogs in folders of JPEG files, and what `configs/image_folder.yaml` makes of them.

    python -m benchmarks.cats_and_dogs --data_dir data --seeds 0 1 2 3 4
    python -m benchmarks.cats_and_dogs --data_dir data --make photos --flaws

The shape of the course notebook's ``cats_and_dogs_filtered``: 1,000 photos of each in ``train/``,
500 of each in ``validation/``, here of 32 x 32 pixels. They are CIFAR-10's first 1,500 cats and
dogs in its training batches; its test batch is not touched. ``--flaws`` adds a broken photo, a text
file and an empty folder of a third class; without the folder the rest can be trained on. Flags that
are not the script's own go to `train.py fit`.
"""

import argparse
import csv
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
from PIL import Image

from core.runs import ROOT
from datamodules import CIFAR10DataModule

CONFIG = "image_folder"
CLASSES = {"cats": 3, "dogs": 5}  # CIFAR-10's numbers
SIZES = {"train": 1000, "validation": 500}  # photos of each class
SETTINGS = ["--data.image_size=32"]


def make(folder: Path, data_dir: str, flaws: bool) -> None:
    """Write the photos; files that are there already are written over."""
    images, labels = CIFAR10DataModule(data_dir=data_dir).read_train()
    for name, label in CLASSES.items():
        of_class = iter(images[labels == label].numpy())
        for part, count in SIZES.items():
            target = folder / part / name
            target.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                file = target / f"{name[:-1]}.{number}.jpg"
                Image.fromarray(next(of_class)).save(file, quality=95)
    if flaws:
        whole = (folder / "train" / "cats" / "cat.0.jpg").read_bytes()
        (folder / "train" / "cats" / "half.jpg").write_bytes(whole[: len(whole) // 2])
        (folder / "train" / "dogs" / "notes.txt").write_text("no photo\n")
        (folder / "train" / "birds").mkdir(exist_ok=True)


def train_and_test(folder: Path, seed: int, flags: list[str]) -> dict[str, float]:
    """Accuracy of one seed on training, validation and test photos, and seconds of the training."""
    name = f"cats-dogs-s{seed}-{time.strftime('%H%M%S')}"
    start = time.perf_counter()
    run("fit", f"--config=configs/{CONFIG}.yaml", f"--data.data_dir={folder}", "--run", name,
        f"--seed_everything={seed}", *SETTINGS, *flags)  # fmt: skip
    seconds = time.perf_counter() - start
    run("test", "--run", f"{CONFIG}/{name}")
    with (ROOT / CONFIG / name / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))

    def values(column: str) -> list[float]:
        return [float(row[column]) for row in rows if row.get(column)]

    train = values("train/accuracy")
    epoch = len(train) // len(values("val/accuracy"))
    return {
        "seed": seed,
        "train": sum(train[-epoch:]) / epoch,
        "last val": values("val/accuracy")[-1],
        "best val": max(values("val/accuracy")),
        "test": values("test/accuracy")[-1],
        "seconds": seconds,
    }


def run(*args: str) -> None:
    subprocess.run([sys.executable, "train.py", *args], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_dir", default="data", help="holds cifar-10-batches-py")
    parser.add_argument("--make", type=Path, metavar="FOLDER", help="write the photos, no more")
    parser.add_argument("--flaws", action="store_true", help="with files that are no photos")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    options, flags = parser.parse_known_args()
    folder = options.make or ROOT / "cats_and_dogs"
    make(folder, options.data_dir, options.flaws)
    if options.make:
        return
    results = pd.DataFrame([train_and_test(folder, seed, flags) for seed in options.seeds])
    print(results.to_string(index=False, float_format="%.4f"))
    print(results.drop(columns="seed").agg(["mean", "std"]).to_string(float_format="%.4f"))


if __name__ == "__main__":
    main()
