"""What waiting threads cost:  python -m benchmarks.spinning_threads

A training step by two threads, with libgomp's threads spinning as long as they do as it comes
(300,000 rounds) and for fewer rounds, on idle cores and beside processes that compute. Settings
take turns, each in a process of its own, because libgomp reads GOMP_SPINCOUNT when it is loaded.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import track

SETTINGS = {
    "as it comes": {},
    "20,000 spins": {"GOMP_SPINCOUNT": "20000"},
    "5,000 spins": {"GOMP_SPINCOUNT": "5000"},
    "1,000 spins": {"GOMP_SPINCOUNT": "1000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
STEPS = {"LeNet5, 64 images": 60, "WhitenedCNN, 250 images": 5, "LSTM of 12, 80 steps": 60}


def measure() -> dict[str, float]:
    """Median milliseconds of a step for each network, after a warm-up."""
    import torch
    from torch import Tensor, nn

    from lit_models.networks import LSTM, LeNet5, Recurrent, WhitenedCNN

    def step_of(network: nn.Module, *inputs: Tensor) -> float:
        optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=1e-4)
        target = torch.arange(len(inputs[0])) % 4
        start = time.perf_counter()
        nn.functional.cross_entropy(network(*inputs), target).backward()
        optimizer.step()
        return 1000 * (time.perf_counter() - start)

    torch.manual_seed(0)
    tasks = zip(
        STEPS.items(),
        [
            (LeNet5(), torch.randn(64, 3, 32, 32)),
            (WhitenedCNN(widths=(32, 128, 128)), torch.randn(250, 3, 32, 32)),
            (Recurrent(LSTM(8, 12), 4), torch.randn(32, 80, 8)),
        ],
        strict=True,
    )
    found = {}
    for (name, steps), (network, inputs) in tasks:
        times = [step_of(network, inputs) for _ in range(steps + steps // 4)]
        found[name] = statistics.median(times[steps // 4 :])
    return found


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Some processes that only compute."""
    alone = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"
    program = [sys.executable, "-c", alone]  # ends with this process, however that ends
    others = [subprocess.Popen(program) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="of all settings (default: 3)")
    parser.add_argument("--once", action="store_true", help="measure in this process, as JSON")
    options = parser.parse_args()
    if options.once:
        print(json.dumps(measure()))
        return
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("GOMP_", "OMP_"))}
    states = {"idle": 0, "one busy process": 1, f"{os.cpu_count()} busy processes": os.cpu_count()}
    print(f"{'':24}{'beside it':>20}" + "".join(f"{name:>15}" for name in SETTINGS))
    for state, count in states.items():
        found: dict[str, list[dict[str, float]]] = {name: [] for name in SETTINGS}
        with busy(count or 0):
            turns = [name for _ in range(options.rounds) for name in SETTINGS]
            for name in track(turns, description=state, transient=True):
                command = [sys.executable, "-m", "benchmarks.spinning_threads", "--once"]
                done = subprocess.run(
                    command, env=clean | SETTINGS[name], check=True, capture_output=True
                )
                found[name].append(json.loads(done.stdout))
        for task in STEPS:
            row = [statistics.median(turn[task] for turn in found[name]) for name in SETTINGS]
            print(f"{task:24}{state:>20}" + "".join(f"{ms:15.1f}" for ms in row), flush=True)


if __name__ == "__main__":
    main()
