"""What a training step costs with 1, 2, ... processes, here and in Lightning as it comes.

    python -m benchmarks.scaling [--quick] [--processes 1 2]

Every process trains LeNet-5 on batches of 64, so that more of them mean more samples in a step:
on a CPU over gloo and with one thread each, where there are GPUs over NCCL. Counted are the
gradients that are summed over the processes, all other collectives, at which the processes wait for
each other, and the device reads, at which the loop waits for the device. Times are medians over
rounds in which all ways take turns, in several starts in which all numbers of processes do.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.step_overhead import (
    TASKS,
    Mark,
    Meter,
    measure,
    steadyfit,
    usual_lightning,
)
from pipeline.trainer import quiet_libraries

WAYS: dict[str, Callable[..., None]] = {
    "steadyfit": steadyfit,
    "steadyfit, Lightning's SIGTERM": partial(steadyfit, termination=False),
    "Trainer() with self.log and bar": usual_lightning,
}
TASK = TASKS["LeNet5"]
COUNTED = 100  # steps, with two log steps among them


class Cost(NamedTuple):
    """What a step costs besides its time.

    Attributes:
        gradient_bytes: Of gradients that are summed over the processes.
        gradient_sums: Collectives in which they are.
        collectives: All others.
        reads: Reads of the device.
    """

    gradient_bytes: float
    gradient_sums: float
    collectives: float
    reads: float


class ScalingMeter(Meter):
    """A meter that also marks the collectives so far."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic = CollectiveCount()
        self.traffic_marks: list[tuple[int, int, int]] = []

    def mark(self, network: nn.Module, inputs: object) -> None:
        super().mark(network, inputs)
        if network.training:
            now = self.traffic
            self.traffic_marks.append((now.gradient_bytes, now.gradient_sums, now.others))

    @contextmanager
    def counting(self) -> Iterator[None]:
        with super().counting(), self.traffic:
            yield

    def cost(self) -> Cost:
        """Mean cost of the measured steps."""
        first, last = self.ends
        start, end = self.traffic_marks[first], self.traffic_marks[last]
        size, sums, others = ((b - a) / (last - first) for a, b in zip(start, end, strict=True))
        return Cost(size, sums, others, self.per_step(first, last).reads)


class CollectiveCount(TorchDispatchMode):
    """Counts the operations of a process group; those in the backward pass sum gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.gradient_bytes = self.gradient_sums = self.others = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            if torch._C._current_graph_task_id() == -1:
                self.others += 1
            else:
                self.gradient_sums += 1
                tensors = [x for x in tree_leaves(args[0]) if isinstance(x, Tensor)]
                self.gradient_bytes += sum(x.nbytes for x in tensors)
        return func(*args, **(kwargs or {}))


# In each process


def take_part(steps: int, rounds: int, result: Path) -> None:
    """Measure all ways together with the other processes; the first one writes what it saw."""
    torch.set_num_threads(1)
    os.environ["WANDB_MODE"] = "disabled"
    quiet_libraries()
    warnings.simplefilter("ignore")  # of the Trainer as it comes
    count = int(os.environ["WORLD_SIZE"])
    devices = {
        "accelerator": "gpu" if torch.cuda.is_available() else "cpu",
        "devices": count,
        "strategy": "ddp" if count > 1 else "auto",
    }
    ways = {name: partial(way, devices=devices) for name, way in WAYS.items()}

    def run(name: str, steps: int, count: bool) -> tuple[Mark, ScalingMeter]:
        meter = ScalingMeter()
        return measure(ways[name], TASK, steps, count=count, meter=meter), meter

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name in ways:
            seconds[name].append(run(name, steps, count=False)[0].seconds)
    costs = {name: run(name, COUNTED, count=True)[1].cost() for name in ways}
    if os.environ["RANK"] == "0":
        result.write_text(json.dumps({"seconds": seconds, "costs": costs}))


# In front of them


def measured(processes: int, steps: int, rounds: int) -> dict[str, Any]:
    """What ``take_part`` wrote, from as many processes."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={processes}", "--module", "--", "benchmarks.scaling"]
        command += [f"--steps={steps}", f"--rounds={rounds}", f"--result={result}"]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}  # torchrun would say that it sets it
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"{processes} processes failed:\n{run.stderr}")
        return json.loads(result.read_text())


def compare(counts: Sequence[int], steps: int, rounds: int, starts: int) -> Table:
    results: dict[int, list[dict[str, Any]]] = {count: [] for count in counts}
    for _ in range(starts):
        for count in counts:
            results[count].append(measured(count, steps, rounds))
    table = Table("processes", "way", "ms / step", "lowest to highest", "samples / s")
    for column in ("gradients / step", "collectives / step", "reads / step"):
        table.add_column(column)
    for count, runs in results.items():
        for name in WAYS:
            times = [1000 * seconds for run in runs for seconds in run["seconds"][name]]
            median = statistics.median(times)
            cost = Cost(*runs[-1]["costs"][name])
            table.add_row(
                str(count),
                name,
                f"{median:.3f}",
                f"{min(times):.3f} to {max(times):.3f}",
                f"{1000 * count * TASK.batch_size / median:,.0f}",
                f"{cost.gradient_bytes:,.0f} B in {cost.gradient_sums:.2f}",
                f"{cost.collectives:.2f}",
                f"{cost.reads:.2f}",
            )
        table.add_section()
    return table


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps, one round: a trial run")
    parser.add_argument("--processes", type=int, nargs="+", help="1, 2, 4, ... up to what is there")
    parser.add_argument("--steps", type=int, help="measured steps of a round")
    parser.add_argument("--rounds", type=int, help="rounds after each start")
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)  # for one of the processes
    options = parser.parse_args(args)
    steps = options.steps or (60 if options.quick else 500)
    rounds = options.rounds or (1 if options.quick else 3)
    starts = 1 if options.quick else 3
    if options.result:
        take_part(steps, rounds, options.result)
        return
    gpus = torch.cuda.device_count()
    most = gpus or os.cpu_count() or 1
    counts = options.processes or [n for n in (1, 2, 4, 8, 16) if n <= most]
    console = Console()
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning"))
    device = f"{gpus} x {torch.cuda.get_device_name()}, NCCL" if gpus else "on the CPU, gloo"
    processor = platform.processor() or platform.machine()
    console.print(f"Python {platform.python_version()}, {libraries}")
    console.print(f"{processor}, {os.cpu_count()} cores, one thread for each process; {device}")
    console.print(f"LeNet5, batch 64, fp32; {starts} x {rounds} rounds of {steps} steps")
    console.print(compare(counts, steps, rounds, starts))


if __name__ == "__main__":
    main()
