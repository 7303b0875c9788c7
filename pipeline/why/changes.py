"""One change to a training each: callbacks that stand behind those of the run.

``at`` is the first optimizer step that is another one. Dimensions: B samples of a batch.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
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


class StepChange(Callback, ABC):
    """Changes what an optimizer is about to use, from step ``at`` to ``last``, if there is one."""

    def __init__(self, at: int, last: float = math.inf) -> None:
        self.at, self.last = at, last

    def on_before_optimizer_step(
        self, trainer: Trainer, module: LightningModule, optimizer: Optimizer
    ) -> None:
        if self.at <= trainer.global_step <= self.last:
            self.act(module, optimizer)

    @abstractmethod
    def act(self, module: LightningModule, optimizer: Optimizer) -> None:
        """Change something, when the gradients of the step are there."""


class Rate(StepChange):
    """The learning rate times ``factor``, behind the back of its schedule."""

    def __init__(self, at: int, factor: float) -> None:
        super().__init__(at)
        self.factor = factor

    def act(self, module: LightningModule, optimizer: Optimizer) -> None:
        usual = [group["lr"] for group in optimizer.param_groups]

        def restore(*_: Any) -> None:
            for group, rate in zip(optimizer.param_groups, usual, strict=True):
                group["lr"] = rate
            handle.remove()

        handle = getattr(optimizer, "optimizer", optimizer).register_step_post_hook(restore)
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * self.factor


class FreshMoment(StepChange):
    """A second moment that is never below the square of the gradient that it divides."""

    def act(self, module: LightningModule, optimizer: Optimizer) -> None:
        for p, moment in states(optimizer, SECOND_MOMENTS):
            if p.grad is not None:
                torch.maximum(moment, p.grad.square().to(moment), out=moment)


class ShortMemory(StepChange):
    """A second moment that looks back over ``MEMORY`` steps."""

    def act(self, module: LightningModule, optimizer: Optimizer) -> None:
        decay = 1 - 1 / MEMORY
        for group in optimizer.param_groups:
            if "alpha" in group:
                group["alpha"] = min(decay, group["alpha"])
            if "betas" in group:
                group["betas"] = group["betas"][0], min(decay, group["betas"][1])


class NoMomentum(StepChange):
    """Momentum that begins anew."""

    def act(self, module: LightningModule, optimizer: Optimizer) -> None:
        self.last = self.at  # once
        for _, moment in states(optimizer, MOMENTA):
            moment.zero_()


class LeftOut(StepChange):
    """One parameter that is not updated."""

    def __init__(self, at: int, last: int, name: str) -> None:
        super().__init__(at, last)
        self.name = name

    def act(self, module: LightningModule, optimizer: Optimizer) -> None:
        module.get_parameter(self.name).grad = None


class KeptBuffers(Callback):
    """Buffers as they were before the fork, in every forward pass."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.kept = {name: b.clone() for name, b in network_of(module).named_buffers()}

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        for name, buffer in network_of(module).named_buffers():
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


def network_of(module: LightningModule) -> nn.Module:
    return cast(LitModel, module).network


def states(optimizer: Optimizer, names: Iterable[str]) -> Iterable[tuple[Tensor, Tensor]]:
    """Parameters of an optimizer with what it keeps of each under one of the names."""
    for p, state in optimizer.state.items():
        for name in names:
            if isinstance(found := state.get(name), Tensor):
                yield p, found
