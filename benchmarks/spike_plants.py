"""Causes of spikes that can be planted into a training, for `benchmarks/spike_why.py`.

Each is a callback or a layer of the configuration, so that a run which is trained again has it
again; all but the flipped bit, which is a fault of the machine and does not come twice.
"""

import os
from abc import ABC, abstractmethod
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.spike_gpt import Block

ONCE = "SPIKE_PLANT_ONCE"  # environment variable under which what does not come twice happens


class BatchNormCNN(nn.Module):
    """Two convolutions with BatchNorm, on images (B, C, H, W)."""

    def __init__(self, num_classes: int = 10, in_channels: int = 1, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
        )
        self.output = nn.Linear(2 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.output(self.layers(images).mean((2, 3)))


class AttentionClassifier(nn.Module):
    """Two blocks of a small GPT on sequences (B, T, 8), which are classified by their last step."""

    def __init__(self, num_classes: int = 4, length: int = 9, width: int = 32) -> None:
        super().__init__()
        self.inputs = nn.Linear(8, width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(Block(width, heads=2), Block(width, heads=2))
        self.output = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_classes))

    def forward(self, sequences: Tensor) -> Tensor:
        return self.output(self.blocks(self.inputs(sequences) + self.places)[:, -1])


class Scaled(nn.Module):
    """A network whose logits are multiplied by a buffer, and pass through a gain that cancels.

    The buffer is 1, until it is poisoned; the gain overflows in float16 and never in float32.
    """

    scale: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("scale", torch.ones(()))
        self.gain = 1.0

    def forward(self, *inputs: Tensor) -> Tensor:
        logits = self.network(*inputs) * self.scale
        return logits if self.gain == 1.0 else logits * self.gain / self.gain


def scaled(module: LightningModule) -> Scaled:
    network = module.network
    assert isinstance(network, Scaled)
    return network


class Samples(Callback, ABC):
    """Spoil the samples of one batch, wherever they are in that epoch.

    Args:
        epoch: The only one in which they are spoiled.
        batch_idx: The batch they are in as it comes.
        number: Which sample of the batch; None for all.
    """

    def __init__(self, epoch: int, batch_idx: int, number: int | None = None) -> None:
        self.epoch, self.batch_idx, self.number = epoch, batch_idx, number

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: list[Tensor], batch_idx: int
    ) -> None:
        loader: Any = trainer.train_dataloader
        if trainer.current_epoch != self.epoch:
            return
        order = type(loader).order(loader, loader.generator())  # as it comes
        size = loader.batch_size
        chosen = loader.sample(order[self.batch_idx * size : (self.batch_idx + 1) * size]).tolist()
        if self.number is not None:
            chosen = [chosen[self.number]]
        for place, row in enumerate(loader.rows(batch_idx)):
            if row in chosen:
                self.spoil(batch, place)

    @abstractmethod
    def spoil(self, batch: list[Tensor], place: int) -> None:
        """Change a sample of a batch in its place."""


class LoudSample(Samples):
    """Inputs times 100."""

    def spoil(self, batch: list[Tensor], place: int) -> None:
        batch[0][place] *= 100


class WrongLabels(Samples):
    """Each label is that of the next class."""

    def __init__(self, epoch: int, batch_idx: int, num_classes: int) -> None:
        super().__init__(epoch, batch_idx)
        self.num_classes = num_classes

    def spoil(self, batch: list[Tensor], place: int) -> None:
        batch[-1][place] = (batch[-1][place] + 1) % self.num_classes


class At(Callback, ABC):
    """Something that happens before optimizer step ``step``."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            self.act(trainer, pl_module)

    @abstractmethod
    def act(self, trainer: Trainer, module: LightningModule) -> None:
        """Let it happen."""


class RateJump(At):
    """The learning rate times ``factor``, from then on."""

    def __init__(self, step: int, factor: float = 20.0) -> None:
        super().__init__(step)
        self.factor = factor

    def act(self, trainer: Trainer, module: LightningModule) -> None:
        for group in trainer.optimizers[0].param_groups:
            group["lr"] *= self.factor


class PoisonedBuffer(At):
    """The scale of the logits is another one."""

    def __init__(self, step: int, value: float = 30.0) -> None:
        super().__init__(step)
        self.value = value

    def act(self, trainer: Trainer, module: LightningModule) -> None:
        scaled(module).scale.fill_(self.value)


class Overflow(Callback):
    """Logits that are too large for float16 on the way, in one step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        scaled(pl_module).gain = 1e6 if trainer.global_step == self.step else 1.0


class FlippedBit(At):
    """The highest bit of an exponent, of one weight; once, as a fault of memory is."""

    def act(self, trainer: Trainer, module: LightningModule) -> None:
        if ONCE in os.environ:
            weight = next(p for p in reversed(list(module.parameters())) if p.ndim > 1)
            with torch.no_grad():
                weight.view(torch.int32).flatten()[0] ^= 1 << 30


class CalmStretch(Callback):
    """Gradients a hundredth of their size for a while, to which the second moment gets used."""

    def __init__(self, first: int, last: int, factor: float = 0.01) -> None:
        self.first, self.last, self.factor = first, last, factor

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if self.first <= trainer.global_step < self.last:
            for p in pl_module.parameters():
                if p.grad is not None:
                    p.grad *= self.factor
