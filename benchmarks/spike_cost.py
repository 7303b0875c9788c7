"""What the spike monitor and update clipping add to a training step, in time and in memory.

    python -m benchmarks.spike_cost [--quick] [--only NAME ...]

All are added to what ``train.py fit`` runs without W&B: the LSTM of the temporal-order task, the
network of ``configs/cifar10_cpu.yaml``, a Transformer of 150 parameter tensors, and 5,000 tensors
that do next to nothing; with SGD and momentum. Times are medians over rounds in which all ways take
turns; the share is that of each round over the run without them of the same round. Only the steps
of the LSTM have log steps among them.

Memory is the highest resident size of a process that takes three steps of SGD with a matrix of 200
MB, in units of that matrix, above the same without monitor and limits.
"""

import argparse
import os
import platform
import resource
import statistics
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
import torch.multiprocessing as mp
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from benchmarks.step_overhead import RandomImages, Task, measure, steadyfit
from callbacks import GradientSpikeMonitor, UpdateClipping
from datamodules import TemporalOrderDataModule
from lit_models.networks import LSTM, Recurrent, WhitenedCNN
from pipeline.trainer import quiet_libraries
from steadyfit import SpikeMonitor, clip_updates

SIDE = 7168  # of the matrix


def sequences(samples: int, **options: Any) -> TemporalOrderDataModule:
    return TemporalOrderDataModule(epoch_size=samples - options["batch_size"], **options)


class Patches(nn.Module):
    """A Transformer on 64 patches of an image: 12 layers of 12 tensors, and six more."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, width, kernel_size=4, stride=4)
        self.place = nn.Parameter(torch.zeros(64, width))
        layer = nn.TransformerEncoderLayer(
            width, nhead=4, dim_feedforward=2 * width, dropout=0.0, batch_first=True
        )
        self.layers = nn.TransformerEncoder(layer, num_layers=12)
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, 32, 32) to logits (B, 10)."""
        x = self.cut(images.float()).flatten(2).transpose(1, 2) + self.place
        return self.head(self.norm(self.layers(x).mean(1)))


class Many(nn.Module):
    """As many tensors as the largest networks have, of ten elements each."""

    def __init__(self, tensors: int = 5000) -> None:
        super().__init__()
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(10)) for _ in range(tensors))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, 32, 32) to logits (B, 10)."""
        pixels = images.flatten(1)[:, :10].float()
        return pixels + torch.stack(list(self.biases)).sum(0)


class Case(NamedTuple):
    """A task, and how many steps and rounds of it are enough to time it."""

    task: Task
    steps: int
    rounds: int


CASES = {
    "LSTM, 12 units, batch 32": Case(
        Task(lambda: Recurrent(LSTM(8, 12), 4), sequences, 32), 300, 15
    ),
    "CIFAR-10 network, batch 512": Case(
        Task(partial(WhitenedCNN, widths=[32, 128, 128]), RandomImages, 512), 6, 5
    ),
    "Transformer, 150 tensors, batch 32": Case(Task(Patches, RandomImages, 32), 10, 3),
    "5,000 tensors, batch 4": Case(Task(Many, RandomImages, 4), 20, 3),
}
WAYS: dict[str, Callable[[], list[Callback]]] = {
    "without": list,
    "monitor": lambda: [GradientSpikeMonitor()],
    "update clipping": lambda: [UpdateClipping(max_decrease=0.1)],
    "both": lambda: [GradientSpikeMonitor(), UpdateClipping(max_decrease=0.1)],
    "monitor that skips": lambda: [GradientSpikeMonitor(reaction="skip")],
}


def print_times(case: Case, rounds: int) -> None:
    ways = {w: partial(steadyfit, watched=False, more_callbacks=c) for w, c in WAYS.items()}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, train in ways.items():
            seconds[way].append(measure(train, case.task, case.steps, count=False).seconds)
    for way, train in ways.items():
        cost = measure(train, case.task, min(case.steps, 100), count=True)
        more = [own / bare - 1 for own, bare in zip(seconds[way], seconds["without"], strict=True)]
        print(f"{way:<36}{cost.reads:>11.2f}{cost.operators:>11.1f}", end="")
        print(f"{1000 * statistics.median(seconds[way]):>10.3f}{statistics.median(more):>8.1%}")


def highest(way: str, results: Any) -> None:
    """Put the highest resident size of three steps (bytes) into a queue."""
    model = nn.Linear(SIDE, SIDE, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    monitor = None
    if "monitor" in way or way == "both":
        reaction: Any = "skip" if "skips" in way else "log"
        monitor = SpikeMonitor(model, optimizer, reaction=reaction)
    limited = "clipping" in way or way == "both"
    limit = clip_updates(optimizer, max_decrease=0.1) if limited else None
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(torch.randn(1, SIDE)).square().mean()
        loss.backward()
        if monitor:
            monitor.before_step(loss)
        if limit:
            limit.loss = loss
        optimizer.step()
    results.put(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def print_memory() -> None:
    context = mp.get_context("spawn")
    sizes = {}
    for way in WAYS:
        results = context.Queue()
        process = context.Process(target=highest, args=(way, results))
        process.start()
        sizes[way] = results.get()
        process.join()
    for way, size in sizes.items():
        print(f"{way:<36}{(size - sizes['without']) / (4 * SIDE**2):>8.2f}")


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round: a trial run")
    names = [*CASES, "memory"]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    quiet_libraries()
    print(f"Python {platform.python_version()}, torch {version('torch')}, ", end="")
    print(f"lightning {version('lightning')}, {os.cpu_count()} cores, 1 thread\n")
    for name in options.only:
        if name == "memory":
            print(f"{'memory, one matrix of 200 MB':<36}{'copies':>8}")
            print_memory()
        else:
            print(f"{name:<36}{'reads/step':>11}{'operators':>11}{'ms/step':>10}{'more':>8}")
            print_times(CASES[name], 1 if options.quick else CASES[name].rounds)
        print()


if __name__ == "__main__":
    main()
