"""A small network, its batches, planted spikes, and what a training of it leaves."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from callbacks import MetricsCSV
from steadyfit import read_records
from steadyfit.watching.records import SpikeRecord


class Batches:
    """Twenty batches of points (B, 8) and which side of a plane they are on; a share for each rank.

    Args:
        size: Points in a global batch.
    """

    def __init__(self, size: int = 32, count: int = 20, rank: int = 0, world_size: int = 1) -> None:
        generator = torch.Generator().manual_seed(5)
        points = torch.randn(size * count, 8, generator=generator)
        target = (points[:, 0] > 0).long()
        self.batches = [
            (x[rank::world_size], y[rank::world_size])
            for x, y in zip(points.split(size), target.split(size), strict=True)
        ]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)


sgd = partial(SGD, lr=0.05)


class Plain(LightningModule):
    """A small network as any Lightning project might have it."""

    def __init__(self, optimizer: Callable[..., Optimizer] = sgd, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.network = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
        self.optimizer = optimizer

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())

    def train_dataloader(self) -> Any:
        return Batches(rank=self.trainer.global_rank, world_size=self.trainer.world_size)


FIRST, LAST = "network.0.weight", "network.2.weight"  # of Plain


class Plant(Callback):
    """Multiplies the gradient of one parameter in some optimizer steps, before it is watched."""

    def __init__(self, steps: list[int], name: str = LAST, factor: float = 100.0) -> None:
        self.steps = steps
        self.name = name
        self.factor = factor

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if trainer.global_step in self.steps:
            gradient = pl_module.get_parameter(self.name).grad
            assert gradient is not None
            gradient.mul_(self.factor)


class EarlyPlant(Plant):
    """The same wherever it stands in the list, unless gradients are accumulated."""

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_before_optimizer_step(trainer, pl_module, trainer.optimizers[0])

    def on_before_optimizer_step(self, *args: Any) -> None:
        pass


@dataclass
class Each(Callback):
    """Calls a function before every optimizer step, or after every batch."""

    before_step: Callable[[Trainer, LightningModule, Optimizer], None] | None = None
    after_batch: Callable[[Trainer, LightningModule], None] | None = None

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if self.before_step:
            self.before_step(trainer, pl_module, optimizer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self.after_batch:
            self.after_batch(trainer, pl_module)


def fit(
    folder: Path,
    model: LightningModule,
    *callbacks: Callback,
    data: Any = None,
    ckpt_path: Path | None = None,
    **options: Any,
) -> Trainer:
    """Train for three epochs on the CPU, with ``metrics.csv`` and ``spikes.jsonl`` in a folder."""
    settings: dict[str, Any] = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "devices": 1,
        "logger": MetricsCSV(str(folder)),
        "default_root_dir": folder,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 7,
    }
    trainer = Trainer(callbacks=list(callbacks), **(settings | options))
    trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def rows(trainer: Trainer) -> dict[int, dict[str, float]]:
    """What was logged, by optimizer step."""
    (logger,) = trainer.loggers
    assert isinstance(logger, MetricsCSV)
    return logger.rows


def column(trainer: Trainer, name: str) -> list[float]:
    return [row[name] for _, row in sorted(rows(trainer).items()) if name in row]


def spikes(folder: Path) -> list[SpikeRecord]:
    return [r for r in read_records(folder / "spikes.jsonl") if r.spiked]


def steps(folder: Path) -> list[int]:
    return [record.step for record in spikes(folder)]


def snapshot(trainer: Trainer, model: nn.Module) -> Any:
    """Copies of parameters and optimizer state."""
    parameters = [p.detach().clone() for p in model.parameters()]
    return parameters, copy.deepcopy([o.state_dict()["state"] for o in trainer.optimizers])


def same(a: Any, b: Any) -> bool:
    """Equal in every bit, NaN to NaN, in nested containers."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def scaled(scale: float, **options: Any) -> list[MixedPrecision]:
    """Training in float16 on the CPU, with a real gradient scaler."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, **options)
    return [MixedPrecision("16-mixed", "cpu", scaler)]
