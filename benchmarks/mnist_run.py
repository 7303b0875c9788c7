"""A whole LeNet run on MNIST here, and as the usual Lightning example trains it, side by side.

    python -m benchmarks.mnist_run --data_dir data
    python -m benchmarks.mnist_run --quick  # a tenth of an epoch, random digits, one round

The same network, batch size, optimizer, number of steps and validations. Ours is what ``train.py
fit --config configs/mnist_lenet.yaml`` does, with metrics.csv, W&B offline, checkpoints and
pictures; the example has a ``DataLoader`` with torchvision transforms for each image, ``self.log``
in each step and torchmetrics, Lightning's default logger and bar. Each run is a process of its own,
timed from start to end; the ratio is that of the two runs of a round, which follow each other.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, random_split
from torchmetrics.classification import MulticlassAccuracy
from torchvision import transforms
from torchvision.datasets import MNIST, FakeData

from lit_models.networks import LeNet5

ROOT = Path(__file__).parent.parent
CONFIG = "configs/mnist_lenet.yaml"
RATE = 0.2  # of configs/mnist_lenet.yaml


class UsualClassifier(LightningModule):
    """MNIST as most tutorials write it."""

    def __init__(self) -> None:
        super().__init__()
        self.network = LeNet5(in_channels=1, padding=2)
        self.val_accuracy = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, target = batch
        loss = F.cross_entropy(self.network(images), target)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, target = batch
        logits = self.network(images)
        self.val_accuracy(logits, target)
        self.log("val_loss", F.cross_entropy(logits, target), prog_bar=True)
        self.log("val_accuracy", self.val_accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=RATE)


def usual(data_dir: str, epochs: int, folder: str, *, quick: bool) -> None:
    """Train the example, with the course's split."""
    seed_everything(0, verbose=False)
    steps = [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    if quick:
        grey = [transforms.Grayscale(), *steps]
        data = FakeData(6000, (1, 28, 28), 10, transforms.Compose(grey))
    else:
        data = MNIST(data_dir, transform=transforms.Compose(steps))
    train, val = random_split(data, [5 / 6, 1 / 6], torch.Generator().manual_seed(0))
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", default_root_dir=folder)
    loaders = DataLoader(train, batch_size=64, shuffle=True), DataLoader(val, batch_size=64)
    trainer.fit(UsualClassifier(), *loaders)


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        env=os.environ | {"WANDB_MODE": "offline"},
    )
    if done.returncode:
        raise SystemExit(done.stderr.decode()[-2000:])
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", default="data", help="root folder of the data sets")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="little data, one epoch, one round")
    parser.add_argument("--usual", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    epochs, rounds = (1, 1) if options.quick else (options.epochs, options.rounds)
    data_dir = str(Path(options.data_dir).absolute())
    if options.usual:
        usual(data_dir, epochs, options.usual, quick=options.quick)
        return
    flags = [f"--data.data_dir={data_dir}", f"--trainer.max_epochs={epochs}"]
    if options.quick:
        flags = ["--data=DigitsDataModule", *flags, "--data.epoch_size=5000"]
    example = ["-m", "benchmarks.mnist_run", f"--data_dir={data_dir}", f"--epochs={epochs}"]
    example += ["--quick"] if options.quick else []
    times: dict[str, list[float]] = {"steadyfit": [], "usual example": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            root = f"--trainer.default_root_dir={folder}"
            ours = ["train.py", "fit", f"--config={CONFIG}", *flags, root]
            times["steadyfit"].append(seconds(ours))
            theirs = [*example, f"--usual={folder}"]
            times["usual example"].append(seconds(theirs))
    print(f"torch {version('torch')}, lightning {version('lightning')}, {os.cpu_count()} cores")
    print(f"seconds of the whole command; {torch.get_num_threads()} threads, {epochs} epochs")
    ratios = [b / a for a, b in zip(times["steadyfit"], times["usual example"], strict=True)]
    for name, values in {**times, "ratio": ratios}.items():
        each = " ".join(f"{value:.1f}" for value in values)
        print(f"{name:<14} median {statistics.median(values):6.2f}  rounds {each}")


if __name__ == "__main__":
    main()
