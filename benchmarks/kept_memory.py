"""What a training step on a CPU gains when malloc keeps the memory that tensors free.

    python -m benchmarks.kept_memory
    python -m benchmarks.kept_memory --quick    # small batches, one round

The networks of ``cifar10_cpu.yaml`` and ``cifar10_speedrun.yaml`` are trained on random images in a
bare loop, with malloc as it comes and with ``train.keep_freed_memory``, in turns and each time in a
process of its own.
"""

import argparse
import multiprocessing
import platform
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lit_models.networks import WhitenedCNN
from pipeline.trainer import fastest_precision, keep_freed_memory

CONFIGS = Path(__file__).parent.parent / "configs"


class Cost(NamedTuple):
    """Seconds and page faults of a step, and the largest resident memory in MB."""

    seconds: float
    page_faults: float
    peak: float


def measure(widths: list[int], batch: int, steps: int, keep: bool) -> Cost:
    """Train ``steps`` steps, and two before them that do not count."""
    if keep:
        keep_freed_memory()
    network = WhitenedCNN(widths=widths).to(memory_format=torch.channels_last)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-4, momentum=0.9)
    images = torch.randn(batch, 3, 32, 32).to(memory_format=torch.channels_last)
    target = torch.arange(batch) % 10
    half = fastest_precision("cpu") == "bf16-mixed"
    times, before = [], 0
    for step in range(2 + steps):
        if step == 2:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = F.cross_entropy(network(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    faults = (usage.ru_minflt - before) / steps
    return Cost(statistics.median(times[2:]), faults, usage.ru_maxrss / 1024)


def in_own_process(widths: list[int], batch: int, steps: int, keep: bool) -> Cost:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, widths, batch, steps, keep).result()


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the batch, one round")
    options = parser.parse_args(args)
    rounds, steps, divisor = (1, 3, 10) if options.quick else (5, 5, 1)
    libc = "-".join(platform.libc_ver())
    print(f"{torch.get_num_threads()} threads, torch {version('torch')}, {libc}; ", end="")
    print(f"{fastest_precision('cpu')}, medians of {rounds} rounds of {steps} steps")
    table = Table("network", "batch", "freed memory", "ms", "ratio", "page faults", "peak, MB")
    for name in ("cifar10_cpu", "cifar10_speedrun"):
        config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        widths = config["model"]["init_args"]["network"]["init_args"]["widths"]
        size = config["data"]["init_args"]["batch_size"] // divisor
        costs: dict[bool, list[Cost]] = {False: [], True: []}
        for _ in track(range(rounds), name, transient=True):
            for keep, measured in costs.items():
                measured.append(in_own_process(widths, size, steps, keep))
        pairs = zip(costs[True], costs[False], strict=True)
        ratio = statistics.median(kept.seconds / returned.seconds for kept, returned in pairs)
        for keep, measured in costs.items():
            median = Cost(*map(statistics.median, zip(*measured, strict=True)))
            table.add_row(
                *(name, f"{size:,}", "kept" if keep else "handed back"),
                *(f"{1000 * median.seconds:,.0f}", f"{ratio:.2f}" if keep else "1"),
                *(f"{median.page_faults:,.0f}", f"{median.peak:,.0f}"),
            )
    Console().print(table)


if __name__ == "__main__":
    main()
