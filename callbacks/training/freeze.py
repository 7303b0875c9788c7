"""Parameters that are trained for some epochs only."""

from collections.abc import Sequence

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer


class Freeze(Callback):
    """Stop training some parameters after a number of epochs.

    Layers in front that have learnt what they can need no gradient any more: where no parameter
    before a layer is trained, the backward pass ends there. Several processes compute the gradient
    and drop it, because DistributedDataParallel waits for every one that it knows.

    Args:
        parameters: Beginnings of the parameters' names, such as ``network.whiten``.
        from_epoch: The first epoch without them, counted from 0.

    Raises:
        MisconfigurationException: ``from_epoch`` is negative, or no parameter has such a name.
    """

    def __init__(self, parameters: Sequence[str], from_epoch: int) -> None:
        if from_epoch < 0:
            raise MisconfigurationException(f"from_epoch must not be negative, got {from_epoch}.")
        self.prefixes = tuple(parameters)
        self.from_epoch = from_epoch
        self.frozen: list[nn.Parameter] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        names = [name for name, _ in pl_module.named_parameters()]
        for prefix in self.prefixes:
            if not any(name.startswith(prefix) for name in names):
                raise MisconfigurationException(
                    f"no parameter's name begins with {prefix!r}; there are {', '.join(names)}."
                )
        # a run that goes on in the middle of an epoch does not start one
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch < self.from_epoch or self.frozen:
            return
        for name, p in pl_module.named_parameters():
            if name.startswith(self.prefixes) and p.requires_grad:
                p.requires_grad_(trainer.world_size > 1)
                p.grad = None
                self.frozen.append(p)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        for p in self.frozen:
            p.grad = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for p in self.frozen:
            p.requires_grad_(True)
        self.frozen.clear()
