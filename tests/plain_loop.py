"""A loop of plain torch: a small model, batches of noise, and a training that is looked at."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import Optimizer

from steadyfit import SpikeMonitor

Batch = tuple[Tensor, Tensor]


def make_model(*more: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), *more, nn.Tanh(), nn.Linear(16, 1))


def make_data(steps: int = 60, factors: Mapping[int, float] | None = None) -> list[Batch]:
    """Batches of noise, in some of which the targets are multiplied."""
    generator = torch.Generator().manual_seed(1)
    data = [
        (torch.randn(16, 8, generator=generator), torch.randn(16, 1, generator=generator))
        for _ in range(steps)
    ]
    for step, factor in (factors or {}).items():
        data[step][1].mul_(factor)
    return data


def no_scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", enabled=False)


def training(
    model: nn.Module,
    optimizer: Optimizer,
    monitor: SpikeMonitor | None,
    data: Sequence[Batch],
    scaler: torch.amp.GradScaler | None = None,
    accumulate: int = 1,
) -> Iterator[int]:
    """Train; yields before each optimizer step, and once more after the last."""
    scaler = scaler or no_scaler()
    for step, start in enumerate(range(0, len(data), accumulate)):
        yield step
        losses = []
        for x, y in data[start : start + accumulate]:
            losses.append(mse_loss(model(x), y))
            scaler.scale(losses[-1] / accumulate).backward()
        scaler.unscale_(optimizer)
        if monitor:
            loss = torch.stack(losses).mean()
            monitor.before_step(loss, scaled=scaler.is_enabled())
        scaler.step(optimizer)
        if scaler.is_enabled():
            scaler.update()
        optimizer.zero_grad()
    if monitor:
        monitor.flush()
    yield step + 1


def state_of(model: nn.Module, optimizer: Optimizer) -> list[Any]:
    return copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"]])


def spiked(monitor: SpikeMonitor) -> list[int]:
    return [record.step for record in monitor.records if record.spiked]
