"""What the spike monitor and update clipping add to a training step.

    python -m benchmarks.spike_cost [--quick]

Both are added to what ``train.py fit`` runs without W&B, for the LSTM of the temporal-order task
and the network of ``configs/cifar10_cpu.yaml``, with SGD and momentum. Times are medians over
rounds in which all ways take turns; the share is that of each round over the run without them of
the same round. The few steps of the CIFAR-10 network have no log step among them, the LSTM's have.
"""

import argparse
import os
import platform
import statistics
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from lightning.pytorch.callbacks import Callback

from benchmarks.step_overhead import RandomImages, Task, measure, steadyfit
from callbacks.clipping import UpdateClipping
from callbacks.gradient_spikes import GradientSpikeMonitor
from datamodules import TemporalOrderDataModule
from lit_models.networks import LSTM, Recurrent, WhitenedCNN
from pipeline.trainer import quiet_libraries


def sequences(samples: int, **options: Any) -> TemporalOrderDataModule:
    return TemporalOrderDataModule(epoch_size=samples - options["batch_size"], **options)


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
}
WAYS: dict[str, Callable[[], list[Callback]]] = {
    "without": list,
    "monitor": lambda: [GradientSpikeMonitor()],
    "update clipping": lambda: [UpdateClipping(max_decrease=0.1)],
    "both": lambda: [GradientSpikeMonitor(), UpdateClipping(max_decrease=0.1)],
    "monitor that skips": lambda: [GradientSpikeMonitor(reaction="skip")],
}


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round: a trial run")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    quiet_libraries()
    print(f"Python {platform.python_version()}, torch {version('torch')}, ", end="")
    print(f"lightning {version('lightning')}, {os.cpu_count()} cores, 1 thread\n")
    for name, case in CASES.items():
        ways = {way: partial(steadyfit, more_callbacks=more) for way, more in WAYS.items()}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(1 if options.quick else case.rounds):
            for way, train in ways.items():
                seconds[way].append(measure(train, case.task, case.steps, count=False).seconds)
        print(f"{name:<30}{'reads/step':>11}{'operators':>11}{'ms/step':>10}{'more':>8}")
        for way, train in ways.items():
            cost = measure(train, case.task, min(case.steps, 100), count=True)
            more = [
                own / bare - 1 for own, bare in zip(seconds[way], seconds["without"], strict=True)
            ]
            print(f"{way:<30}{cost.reads:>11.2f}{cost.operators:>11.1f}", end="")
            print(f"{1000 * statistics.median(seconds[way]):>10.3f}{statistics.median(more):>8.1%}")
        print()


if __name__ == "__main__":
    main()
