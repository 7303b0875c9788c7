"""Changes to a training, one callback each, which stand after those of the run.

``at`` is the first optimizer step that is another one. Dimensions: B samples of a batch.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer

from datamodules.loaders.resident import ResidentLoader
from lit_models.base import LitModel

SECOND_MOMENTS = ("square_avg", "exp_avg_sq")  # of torch's optimizers
MOMENTA = ("momentum_buffer", "exp_avg")
MEMORY = 10  # steps of a short second moment

Slot = tuple[int, int]  # epoch, and place in the order of its samples
Act = Callable[[LightningModule, Optimizer], None]


class Noise(Callback):
    """Weights times ``1 + size * noise``: the neutral change."""

    def __init__(self, at: int, size: float, seed: int) -> None:
        self.at, self.size, self.seed = at, size, seed

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.at and self.size:
            generator, size, self.size = torch.Generator().manual_seed(self.seed), self.size, 0.0
            with torch.no_grad():
                for p in module.parameters():
                    noise = torch.randn(p.shape, generator=generator)
                    p.mul_(1 + size * noise.to(p))


class OtherSamples(Callback):
    """Other samples in some places of the order.

    Args:
        sources: The places whose samples come instead, by the places they come to.
    """

    def __init__(self, sources: Mapping[Slot, Slot]) -> None:
        self.sources = sources

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        loader: ResidentLoader = trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
        usual = loader.order

        def order(generator: torch.Generator) -> Tensor:
            index = usual(generator)
            found = index.clone()
            for (epoch, to), (_, place) in self.sources.items():
                if epoch == loader.epoch:
                    found[to] = index[place]
            return found

        vars(loader)["order"] = order

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        del vars(trainer.datamodule.train_dataloader())["order"]  # type: ignore[attr-defined]


class KeptBuffers(Callback):
    """Buffers as they were before the fork, in every forward pass."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.kept = {name: b.clone() for name, b in _network_of(module).named_buffers()}

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        for name, buffer in _network_of(module).named_buffers():
            buffer.copy_(self.kept[name])


class OtherDropout(Callback):
    """Other seeds of dropout."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.usual = cast(LitModel, module).seed
        module.seed = self.seed  # type: ignore[assignment]

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        module.seed = self.usual  # type: ignore[assignment]


class StepChange(Callback):
    """Call ``act`` when the gradients are there, before each update from ``at`` to ``last``."""

    def __init__(self, act: Act, at: int, last: float = math.inf) -> None:
        self.act, self.at, self.last = act, at, last

    def on_before_optimizer_step(
        self, trainer: Trainer, module: LightningModule, optimizer: Optimizer
    ) -> None:
        if self.at <= trainer.global_step <= self.last:
            self.act(module, optimizer)


def scaled_rate(factor: float) -> Act:
    """The learning rate times ``factor``; its schedule does not see it."""

    def act(module: LightningModule, optimizer: Optimizer) -> None:
        usual = [group["lr"] for group in optimizer.param_groups]

        def restore(*_: Any) -> None:
            for group, rate in zip(optimizer.param_groups, usual, strict=True):
                group["lr"] = rate
            handle.remove()

        handle = getattr(optimizer, "optimizer", optimizer).register_step_post_hook(restore)
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * factor

    return act


def fresh_moment(module: LightningModule, optimizer: Optimizer) -> None:
    """A second moment that is never below the square of the gradient that it divides."""
    for p, moment in _states(optimizer, SECOND_MOMENTS):
        if p.grad is not None:
            torch.maximum(moment, p.grad.square().to(moment), out=moment)


def short_memory(module: LightningModule, optimizer: Optimizer) -> None:
    """A second moment that looks back over ``MEMORY`` steps."""
    decay = 1 - 1 / MEMORY
    for group in optimizer.param_groups:
        if "alpha" in group:
            group["alpha"] = min(decay, group["alpha"])
        if "betas" in group:
            group["betas"] = group["betas"][0], min(decay, group["betas"][1])


def no_momentum(module: LightningModule, optimizer: Optimizer) -> None:
    """Momentum that begins anew."""
    for _, moment in _states(optimizer, MOMENTA):
        moment.zero_()


def left_out(name: str) -> Act:
    """One parameter that is not updated."""

    def act(module: LightningModule, optimizer: Optimizer) -> None:
        module.get_parameter(name).grad = None

    return act


def _network_of(module: LightningModule) -> nn.Module:
    return cast(LitModel, module).network


def _states(optimizer: Optimizer, names: Iterable[str]) -> Iterable[tuple[Tensor, Tensor]]:
    """Parameters of an optimizer with what it keeps of each under one of the names."""
    for p, state in optimizer.state.items():
        for name in names:
            if isinstance(found := state.get(name), Tensor):
                yield p, found
