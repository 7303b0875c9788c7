"""Seconds until CIFAR-10 is learnt, and how well it is learnt, over several seeds.

    python -m benchmarks.time_to_accuracy --seeds 25
    python -m benchmarks.time_to_accuracy --seeds 25 --cold --peer airbench94_muon.py
    python -m benchmarks.time_to_accuracy --quick    # a tenth of the network, one epoch, one seed

The hot time is what airbench counts: whitening, training, and the evaluation with test-time
augmentation; not reading the data, and on a GPU not the first run, which warms up. All that an
ordinary run does besides is in it: loggers, checkpoints, progress bar, and the validation of a
config that has one. The cold time (``--cold``) is that of the whole command, from the start of the
process to its end.

``--peer`` is the file ``airbench94_muon.py`` of KellerJordan/cifar10-airbench: one training step of
its network and one of ours run in turns in a bare loop, in channels_last, and on a CPU in its
fastest precision. Whole runs of both need a GPU: ``benchmarks.gpu_check``. Nothing of it is part of
this project.
"""

import argparse
import contextlib
import importlib.util
import io
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from torch import nn

from datamodules import CIFAR10DataModule
from lit_models.networks import WhitenedCNN
from pipeline import cli
from pipeline.trainer import fastest_precision

HERE = Path(__file__).parent.parent
QUICK = [
    *("--model.network.init_args.widths=[8,16,16]", "--trainer.max_epochs=1"),
    *("--trainer.limit_test_batches=2", "--trainer.callbacks.from_epoch=0"),
]


class Stopwatch(Callback):
    """Seconds of a run that count, each part from an idle device to an idle device."""

    seconds: ClassVar[list[float]] = []  # of each part of this run

    def __init__(self) -> None:
        self.started = 0.0

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        wait_for(trainer.strategy.root_device)
        self.started = time.perf_counter()

    def stop(self, trainer: Trainer, pl_module: LightningModule) -> None:
        wait_for(trainer.strategy.root_device)
        self.seconds.append(time.perf_counter() - self.started)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":  # the data are read, the layers that ask for data come next
            self.start(trainer, pl_module)

    on_fit_start = stop
    on_train_start = start
    on_train_end = stop
    on_test_start = start
    on_test_end = stop


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def command(options: argparse.Namespace, seed: int, folder: str) -> list[str]:
    return [
        *("fit", f"--config={options.config}", f"--run=seed{seed}", "--test=true"),
        *(f"--seed_everything={seed}", f"--data.data_dir={options.data_dir}"),
        *(f"--trainer.default_root_dir={folder}", *(QUICK if options.quick else [])),
        *options.settings,
    ]


def hot(options: argparse.Namespace, seed: int) -> tuple[float, float]:
    """Seconds that count and test accuracy in percent of one run in this process."""
    from benchmarks.time_to_accuracy import Stopwatch  # not that of __main__, which is this file

    Stopwatch.seconds.clear()
    printed = io.StringIO()
    watch = "--trainer.callbacks+=benchmarks.time_to_accuracy.Stopwatch"
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(printed):
        cli.run([*command(options, seed, folder), watch])
        if wandb := sys.modules.get("wandb"):
            wandb.finish()  # or the next seed would go on with this run
    return sum(Stopwatch.seconds), accuracy(printed.getvalue())


def cold(options: argparse.Namespace, seed: int) -> tuple[float, float]:
    """The same of the command in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run = [sys.executable, "train.py", *command(options, seed, folder)]
        done = subprocess.run(run, cwd=HERE, check=True, stdout=subprocess.PIPE, text=True)
        return time.perf_counter() - start, accuracy(done.stdout)


def accuracy(printed: str) -> float:
    """Test accuracy in percent, from what train.py prints."""
    found = re.search(r"test/accuracy\s+([\d.]+)", printed)
    assert found, printed
    return 100 * float(found[1])


# The peer


@contextlib.contextmanager
def without_half(on_gpu: bool) -> Iterator[None]:
    """Let a script that is written for a GPU build its network on a CPU, in float32."""
    kept = nn.Module.half, nn.Module.cuda
    if not on_gpu:
        nn.Module.half = nn.Module.cuda = lambda self, *_: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.half, nn.Module.cuda = kept  # type: ignore[method-assign]


def load_peer(file: Path, on_gpu: bool) -> tuple[types.ModuleType, nn.Module]:
    """The module airbench94_muon.py, not run, and its network."""
    spec = importlib.util.spec_from_file_location("airbench94_muon", file)
    assert spec
    assert spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # for torch.compile
    spec.loader.exec_module(module)
    with without_half(on_gpu):
        network = module.CifarNet().to(memory_format=torch.channels_last)
        return module, network.cuda()


def save_for_peer(data_dir: str, folder: Path) -> None:
    """Put CIFAR-10 where the peer, run in this folder, finds it instead of downloading it."""
    data = CIFAR10DataModule(data_dir=data_dir)
    (folder / "cifar10").mkdir()
    for name, (images, labels) in (("train", data.read_train()), ("test", data.read_test())):
        content = {"images": images, "labels": labels, "classes": list(data.class_names)}
        torch.save(content, folder / "cifar10" / f"{name}.pt")


class Peer:
    """airbench94_muon.py on a GPU, compiled as its author runs it, on the data that ours read.

    Args:
        file: It.
        data_dir: Root folder of our data sets.
        folder: An empty one, where it finds the data.
    """

    def __init__(self, file: Path, data_dir: str, folder: Path) -> None:
        self.module, self.network = load_peer(file, on_gpu=True)
        self.network.compile(mode="max-autotune")
        self.folder = folder
        save_for_peer(data_dir, folder)

    def run(self) -> tuple[float, float]:
        """Seconds that it counts and accuracy in percent, from the last row that it prints."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.chdir(self.folder):
            self.module.main("run", self.network)
        rows = [line for line in printed.getvalue().splitlines() if "eval" in line]
        *_, tta, seconds = re.findall(r"\d+\.\d+", rows[-1])
        return float(seconds), 100 * float(tta)


def step_of(network: nn.Module, device: torch.device, batch: int) -> Callable[[], float]:
    """A function that trains one step of random images in a bare loop and returns its seconds."""
    network = network.to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        [p for p in network.parameters() if p.requires_grad], lr=1e-4, momentum=0.9, nesterov=True
    )
    dtype = next(p.dtype for p in network.parameters() if p.ndim == 4)
    images = torch.randn(batch, 3, 32, 32, device=device, dtype=dtype)
    images = images.to(memory_format=torch.channels_last)
    target = torch.arange(batch, device=device) % 10
    fast = fastest_precision("auto") == "bf16-mixed" and dtype == torch.float32

    def step() -> float:
        wait_for(device)
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=fast):
            loss = F.cross_entropy(network(images).float(), target, label_smoothing=0.2)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wait_for(device)
        return time.perf_counter() - start

    return step


def compare_steps(peer: nn.Module, device: torch.device, batch: int, rounds: int) -> Table:
    ours: nn.Module = WhitenedCNN(widths=[64, 256, 256])
    if device.type == "cuda":  # as the peer's: half precision but for the normalisation
        ours.half()
        for layer in ours.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.float()
    steps = {"steadyfit": step_of(ours, device, batch), "airbench94": step_of(peer, device, batch)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for measured in [False, *[True] * rounds]:  # the first round warms up
        for name, step in steps.items():
            taken = step()
            if measured:
                seconds[name].append(taken)
    table = Table(f"one step of {batch}", "ms", "lowest to highest", "of the peer's")
    theirs = seconds["airbench94"]
    for name, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(values, theirs, strict=True))
        spread = f"{1000 * min(values):,.1f} to {1000 * max(values):,.1f}"
        table.add_row(name, f"{1000 * statistics.median(values):,.1f}", spread, f"{ratio:.3f}")
    return table


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/cifar10_speedrun.yaml")
    parser.add_argument("--data_dir", default="data", help="root folder of the data sets")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on")
    parser.add_argument("--cold", action="store_true", help="also time whole commands")
    parser.add_argument("--peer", type=Path, help="airbench94_muon.py, see above")
    parser.add_argument("--steps_only", action="store_true", help="only compare with the peer's")
    parser.add_argument("--quick", action="store_true", help="a trial run")
    options, settings = parser.parse_known_args(args)
    options.settings = settings  # of train.py
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning"))
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    threads = torch.get_num_threads()
    console = Console()
    console.print(f"{name or platform.machine()}, {threads} threads; {libraries}")
    if options.peer:
        _, peer = load_peer(options.peer, device.type == "cuda")
        rounds, batch = (3, 64) if options.quick else (9, 512)
        console.print(compare_steps(peer, device, batch, rounds))
    if options.steps_only:
        return
    ways: dict[str, Callable[[int], tuple[float, float]]] = {"hot": lambda seed: hot(options, seed)}
    if options.cold:
        ways["cold"] = lambda seed: cold(options, seed)
    if device.type == "cuda":
        hot(options, 0)  # warms up
    results: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for seed in range(1 if options.quick else options.seeds):
        for way, run in ways.items():
            results[way].append(run(seed))
            console.print(f"seed {seed}, {way}: %.2f s, %.2f %%" % results[way][-1])
    table = Table("way", "runs", "median s", "lowest to highest", "test accuracy in %")
    for way, pairs in results.items():
        seconds, hits = zip(*pairs, strict=True)
        deviation = f" ± {statistics.stdev(hits):.2f}" if len(hits) > 1 else ""
        spread = f"{min(seconds):,.2f} to {max(seconds):,.2f}"
        mean = f"{statistics.mean(hits):.2f}{deviation}"
        table.add_row(way, str(len(hits)), f"{statistics.median(seconds):,.2f}", spread, mean)
    console.print(table)


if __name__ == "__main__":
    main()
