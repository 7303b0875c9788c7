"""What the commands cost before they do anything, and which imports it goes to.

    python -m benchmarks.startup [--config configs/mnist_lenet.yaml --data_dir data] [--quick]

CPU seconds (user and system) of whole processes, which a busy machine changes less than the time on
a clock; medians of rounds in which all commands take turns, and their ratio to ``import torch``.
``fit`` ends behind its first optimizer step. Whoever has an optimizer has ``torch._dynamo`` too,
which torch loads then. The imports are those of ``train.py fit``, by ``python -X importtime``: the
seconds of a module include those that it imports first and nothing else has.
"""

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent.parent
LINE = re.compile(
    r"import time: *(\d+) \| *(\d+) \| ( *)(\S+)"
)  # microseconds: own, and with those

FIRST_STEP = """
import os
from core.starting import start
start()
import train
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization as Loop
step = Loop._optimizer_step
Loop._optimizer_step = lambda *args: (step(*args), os._exit(0))
train.main()
"""
COMMANDS = {
    "import torch": ["-c", "import torch"],
    "import torch, torch._dynamo": ["-c", "import torch, torch._dynamo"],
    "import lightning": ["-c", "import lightning"],
    "train.py --help": ["train.py", "--help"],
    "train.py fit, up to its first step": ["-c", FIRST_STEP, "fit"],
    "predict.py --help": ["predict.py", "--help"],
    "submit.py --help": ["submit.py", "--help"],
    "study.py --help": ["study.py", "--help"],
}


def cpu_seconds(command: list[str]) -> float:
    """User and system seconds of a command and of the processes that it waits for."""
    before = os.times()
    subprocess.run([sys.executable, *command], cwd=HERE, check=True, capture_output=True)
    after = os.times()
    return sum(after[2:4]) - sum(before[2:4])


def import_seconds(module: str) -> dict[str, float]:
    """Seconds of each module that is imported, those that it imports first included."""
    statements = f"from core.starting import start; start(); import {module}"
    command = [sys.executable, "-X", "importtime", "-c", statements]
    done = subprocess.run(command, cwd=HERE, check=True, capture_output=True, text=True)
    lines = (LINE.match(line) for line in done.stderr.splitlines())
    return {match[4]: int(match[2]) / 1e6 for match in lines if match}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="one round: a trial run")
    parser.add_argument("--imports", type=int, default=15, help="imports that are shown")
    parser.add_argument("--config", default="configs/demo.yaml", help="what fit trains")
    parser.add_argument("--data_dir", help="root folder of its data sets")
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    seconds: dict[str, list[float]] = defaultdict(list)
    imports: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as runs:
        for _ in range(rounds):
            for name, command in COMMANDS.items():
                flags = [f"--config={options.config}", f"--trainer.default_root_dir={runs}"]
                if options.data_dir:
                    flags += [f"--data.data_dir={options.data_dir}"]
                more = flags if "fit" in command else []
                seconds[name].append(cpu_seconds([*command, *more]))
            for name, value in import_seconds("pipeline.cli").items():
                imports[name].append(value)
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning"))
    print(f"Python {platform.python_version()}, {libraries}, {os.cpu_count()} cores; ", end="")
    print(f"medians of {rounds} rounds")
    commands = Table("command", "CPU s", "lowest to highest", "times import torch")
    least = statistics.median(seconds["import torch"])
    for name, values in seconds.items():
        spread = f"{min(values):.2f} to {max(values):.2f}"
        median = statistics.median(values)
        commands.add_row(name, f"{median:.2f}", spread, f"{median / least:.1f}")
    modules = Table("import", "s")
    medians = {name: statistics.median(values) for name, values in imports.items()}
    packages = [name for name in medians if name.count(".") <= 1]
    for name in sorted(packages, key=lambda name: -medians[name])[: options.imports]:
        modules.add_row(name, f"{medians[name]:.2f}")
    Console().print(commands, modules)


if __name__ == "__main__":
    main()
