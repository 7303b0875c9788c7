"""What a training step costs here, over the same step in a bare PyTorch loop.

    python -m benchmarks.step_overhead [--quick]

Device reads and operators are counted, which says the same on every machine: a read makes the loop
wait for the device, an operator costs some microseconds to issue. Times are medians over rounds in
which all ways take turns; the ratio is that of each round to the bare loop of the same round.
"""

import argparse
import contextlib
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import yaml
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from callbacks import GradientSpikeMonitor
from core.errors import ErrorScope
from datamodules.base import BaseDataModule
from datamodules.images.base import ImageDataModule
from lit_models import LitClassifier
from lit_models.networks import LeNet5
from pipeline.studies.grid import DEFAULTS
from pipeline.trainer import prepare_trainer, quiet_libraries

aten = torch.ops.aten
# operators whose result decides a shape or a Python value, so that the host waits for the device
READS = {
    aten._local_scalar_dense,  # item(), float(), bool(), int()
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
}
# on a CPU these are no operators at all, elsewhere each is a copy from the device
COPIES = {Tensor.cpu, Tensor.numpy, Tensor.tolist}


class Mark(NamedTuple):
    """Where a program is: the time in seconds, the operators and the device reads so far."""

    seconds: float
    operators: float
    reads: float


@dataclass
class Meter:
    """Marks the start of every forward pass in training; between two of them is one step."""

    operators: int = 0
    reads: int = 0
    marks: list[Mark] = field(default_factory=list)
    ends: tuple[int, ...] = ()  # marks between which the time is taken: a GPU is waited for there

    def watch(self, network: nn.Module) -> nn.Module:
        # compiled, it would be compiled anew at every step, since it is another one
        network.register_forward_pre_hook(torch.compiler.disable(self.mark))
        return network

    def mark(self, network: nn.Module, inputs: object) -> None:
        if not network.training:
            return
        if len(self.marks) in self.ends and torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append(Mark(time.perf_counter(), self.operators, self.reads))

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        with OperatorCount(self), CopyCount(self):
            yield

    def per_step(self, first: int, last: int) -> Mark:
        """Mean cost of the steps ``first`` to ``last - 1``."""
        start, end = self.marks[first], self.marks[last]
        return Mark(*((b - a) / (last - first) for a, b in zip(start, end, strict=True)))


class OperatorCount(TorchDispatchMode):
    """Counts the operators that reach a kernel, those of the backward pass included."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.meter.operators += 1
        by_mask = func.overloadpacket is aten.index and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        self.meter.reads += func.overloadpacket in READS or by_mask
        return func(*args, **(kwargs or {}))


class CopyCount(TorchFunctionMode):
    """Counts the calls that copy to the host without an operator of their own."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.meter.reads += func in COPIES
        if func is torch.tensor and isinstance(args[0], list):  # it reads each tensor in a list
            self.meter.reads += sum(isinstance(item, Tensor) for item in args[0])
        return func(*args, **(kwargs or {}))


# What is trained


class RandomImages(ImageDataModule):
    """Noise in the shape of CIFAR-10."""

    class_names = tuple("abcdefghij")

    def __init__(self, samples: int, **options: Any) -> None:
        super().__init__(**options)
        self.samples = samples

    def read_train(self) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        size = (self.samples, *self.image_size)
        images = torch.randint(256, size, dtype=torch.uint8, generator=generator)
        return images, torch.arange(self.samples) % 10


class RandomNumbers(BaseDataModule):
    """One number in, one of two classes out."""

    class_names = ("a", "b")

    def __init__(self, samples: int, **options: Any) -> None:
        super().__init__(**options)
        self.samples = samples

    def read_train(self) -> tuple[Tensor, ...]:
        return torch.linspace(-1, 1, self.samples)[:, None], torch.arange(self.samples) % 2


class Task(NamedTuple):
    """A network and its data."""

    network: Callable[[], nn.Module]
    data: Callable[..., BaseDataModule]
    batch_size: int = 64

    def make_data(self, steps: int, processes: int = 1) -> BaseDataModule:
        """Data for one epoch of ``steps`` batches of each process, and one more to validate on."""
        size = self.batch_size
        samples = (steps * processes + 1) * size
        return self.data(samples=samples, batch_size=size, val_size=size)


TASKS = {
    "LeNet5": Task(LeNet5, RandomImages),
    "one 1x2 Linear": Task(partial(nn.Linear, 1, 2), RandomNumbers),
}
ONE_CPU = {"accelerator": "cpu", "devices": 1}  # arguments of a Trainer
WARM_UP = 10  # steps that are not measured
make_optimizer = partial(torch.optim.SGD, lr=0.001, momentum=0.9)


# Ways to train it


def raw_loop(
    task: Task, steps: int, meter: Meter, folder: Path, *, devices: Mapping[str, Any] = ONE_CPU
) -> None:
    """The loss and nothing else, on the same loader."""
    data = task.make_data(steps)
    data.setup("fit")
    device = torch.device("cuda" if devices["accelerator"] == "gpu" else "cpu")
    half = torch.autocast(device.type, torch.bfloat16, devices.get("precision") == "bf16-mixed")
    network = meter.watch(task.network()).to(device).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(p for p in network.parameters() if p.requires_grad)
    for inputs, target in data.train_dataloader().to(device):
        with half:
            loss = F.cross_entropy(network(inputs), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def steadyfit(
    task: Task,
    steps: int,
    meter: Meter,
    folder: Path,
    *,
    with_wandb: bool = False,
    watched: bool = True,
    lit_model: type[LitClassifier] = LitClassifier,
    more_callbacks: Callable[[], list[Callback]] = list,
    devices: Mapping[str, Any] = ONE_CPU,
    termination: bool = True,
) -> None:
    """What ``train.py fit`` runs: the loggers and callbacks of ``configs/defaults.yaml``."""
    settings = yaml.safe_load(DEFAULTS.read_text())["trainer"]
    for logger in settings["logger"]:
        logger.setdefault("init_args", {})["save_dir"] = str(folder)
    if not with_wandb:
        settings["logger"] = [x for x in settings["logger"] if "Wandb" not in x["class_path"]]
    settings |= {
        "default_root_dir": str(folder),
        "precision": "32-true",
        "max_epochs": 1,
        **devices,
    }
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(Trainer, "trainer")
    parts = parser.instantiate(parser.parse_object({"trainer": settings})).trainer
    data = task.make_data(steps, devices["devices"])
    model = lit_model(meter.watch(task.network()), make_optimizer, num_classes=data.num_classes)
    kept = [c for c in parts.callbacks if watched or not isinstance(c, GradientSpikeMonitor)]
    parts.callbacks = [*kept, *more_callbacks()]
    trainer = Trainer(**parts)
    prepare_trainer(trainer, ErrorScope(), termination=termination)
    trainer.fit(model, data)


class Usual(LightningModule):
    """A LightningModule as most tutorials write it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, target = batch
        loss = F.cross_entropy(self.network(inputs), target)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.parameters())


def usual_lightning(
    task: Task, steps: int, meter: Meter, folder: Path, *, devices: Mapping[str, Any] = ONE_CPU
) -> None:
    """A Trainer as it comes, with ``self.log`` and the progress bar."""
    network = meter.watch(task.network()).to(memory_format=torch.channels_last)
    trainer = Trainer(max_epochs=1, default_root_dir=folder, **devices)
    trainer.fit(Usual(network), task.make_data(steps, devices["devices"]))


WAYS: dict[str, Callable[[Task, int, Meter, Path], None]] = {
    "raw PyTorch loop": raw_loop,
    "steadyfit, metrics.csv": steadyfit,
    "steadyfit, metrics.csv and W&B": partial(steadyfit, with_wandb=True),
    "the same without spike monitor": partial(steadyfit, with_wandb=True, watched=False),
    "Trainer() with self.log and bar": usual_lightning,
}


def measure(
    way: Callable[[Task, int, Meter, Path], None],
    task: Task,
    steps: int,
    *,
    count: bool,
    meter: Meter | None = None,
) -> Mark:
    """Cost per step of the last ``steps`` steps, after some to warm up, log steps included.

    Counting makes a step slower, so that either the time or the counts mean something.
    """
    meter = meter or Meter()
    meter.ends = WARM_UP, WARM_UP + steps
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        silence = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(silence))
        stack.enter_context(contextlib.redirect_stderr(silence))
        if count:
            stack.enter_context(meter.counting())
        way(task, WARM_UP + steps + 1, meter, folder)
    return meter.per_step(*meter.ends)


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps and rounds: a trial run")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch")
    options = parser.parse_args(args)
    torch.set_num_threads(options.threads)
    os.environ.setdefault("WANDB_MODE", "offline")
    quiet_libraries()
    warnings.simplefilter("ignore")  # of the Trainer as it comes
    steps, rounds = (100, 3) if options.quick else (500, 9)

    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "wandb"))
    print(f"Python {platform.python_version()}, {libraries}")
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, ", end="")
    print(
        f"{options.threads} threads; {rounds} rounds of {steps} steps, batch 64, fp32 on the CPU\n"
    )
    for name, task in TASKS.items():
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(rounds):
            for way, train in WAYS.items():
                times[way].append(measure(train, task, steps, count=False).seconds)
        print(f"{name:<32}{'reads/step':>11}{'operators':>11}{'ms/step':>10}{'ratio':>8}")
        for way, train in WAYS.items():
            cost = measure(train, task, 100, count=True)
            milliseconds = 1000 * statistics.median(times[way])
            pairs = zip(times[way], times["raw PyTorch loop"], strict=True)
            ratio = statistics.median(own / raw for own, raw in pairs)
            print(f"{way:<32}{cost.reads:>11.2f}{cost.operators:>11.1f}", end="")
            print(f"{milliseconds:>10.3f}{ratio:>8.2f}")
        print()


if __name__ == "__main__":
    main()
