"""Pictures of what GradientSpikeMonitor has seen."""

from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer

from callbacks.pictures.base import PictureCallback
from core.errors import UserError
from steadyfit.lightning import scale_left
from steadyfit.pictures import SpikeRun, spike_pictures
from steadyfit.through_time import WorstStep, is_sequence, through_time


class SpikePictures(PictureCallback):
    """Draw what ``GradientSpikeMonitor`` has seen, at the end of training or where it breaks off.

    The pictures are ``spikes_curves``, ``spikes_norms``, ``spikes_layers`` and, of networks that
    read sequences (B, T, D) of floats, ``spikes_through_time``: the largest gradient of all steps,
    with respect to the input. For that the weights before the step of the largest gradient are kept
    on the device, which takes one copy of the parameters and no read, and are left in
    ``worst_spike.pt``.

    Put it after the monitor and in front of callbacks that clip gradients.

    Args:
        target: Validation accuracy (fraction) from which on the task counts as learned.
    """

    def __init__(self, target: float = 0.95) -> None:
        if not 0 < target <= 1:
            raise UserError(f"target must be in (0, 1], got {target}.")
        self.target = target
        self._kept: dict[str, Tensor] = {}  # parameters by name; none if the input is no sequence
        self._names: list[str] = []  # theirs, from a checkpoint
        self._worst: tuple[Tensor, Tensor] | None = None  # gradient norm and step
        self._weights: list[Tensor] = []  # what the parameters were before that step

    # The weights before the largest gradient

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._kept or self.folder is None or not hasattr(self.data, "training_batch"):
            return
        if is_sequence(batch):
            self._kept = self.trained(pl_module)

    def trained(self, pl_module: LightningModule) -> dict[str, Tensor]:
        """The parameters whose weights are kept: later ones may have been frozen meanwhile."""
        named = dict(pl_module.named_parameters())
        names = self._names or [name for name, p in named.items() if p.requires_grad]
        return {name: named[name] for name in names}

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        gradients = [p.grad for p in self._kept.values() if p.grad is not None]
        if not gradients:
            return
        norm = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).norm()
        if (scale := scale_left(trainer, pl_module, optimizer)) is not None:
            norm = norm / scale
        step = torch.full_like(norm, trainer.global_step, dtype=torch.long)
        if self._worst is None:
            self._worst = torch.zeros_like(norm), torch.full_like(step, -1)
        if not self._weights:
            self._weights = [p.detach().clone() for p in self._kept.values()]
        largest, at = self._worst
        worse = norm.isfinite() & (norm > largest)
        self._worst = torch.where(worse, norm, largest), torch.where(worse, step, at)
        for kept, parameter in zip(self._weights, self._kept.values(), strict=True):
            torch.where(worse, parameter, kept, out=kept)

    def state_dict(self) -> dict[str, Any]:
        names = list(self._kept) or self._names
        return {"worst": self._worst, "weights": self._weights, "names": names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._worst, self._weights = state["worst"], state["weights"]
        self._names = state.get("names", [])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._worst is not None:  # from a checkpoint
            largest, at = self._worst
            self._worst = largest.to(pl_module.device), at.to(pl_module.device)
            self._weights = [w.to(pl_module.device) for w in self._weights]

    # The pictures

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._worst is not None and not self._kept:  # nothing was left to train
            self._kept = self.trained(pl_module)
        self.draw(trainer, pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.draw(trainer, None)  # where training broke, one more pass may break as well

    def draw(self, trainer: Trainer, pl_module: LightningModule | None) -> None:
        if trainer.state.fn != TrainerFn.FITTING or not trainer.is_global_zero or not self.folder:
            return
        for logger in trainer.loggers:
            logger.save()  # what is logged and not yet in the file
        if not (self.folder / "metrics.csv").exists():
            return
        run = SpikeRun.read(self.folder, "/".join(self.folder.parts[-2:]), self.target)
        if not {"epoch", "train/loss"} <= set(run.metrics):
            return
        if worst := self.worst(run, trainer.accumulate_grad_batches):
            worst.save(self.folder)
            if pl_module:
                run.through_time = through_time(pl_module, worst.remake(self.data), worst)
        for name, figure in spike_pictures([run]).items():
            self.save(trainer, name, figure)

    def worst(self, run: SpikeRun, accumulated: int) -> WorstStep | None:
        """The step of the largest gradient with its weights, if they were kept."""
        if self._worst is None or (step := int(self._worst[1])) < 0:
            return None
        if not self._kept:  # it broke off before the first batch of this start
            return None
        worst = WorstStep.locate(run.metrics, step, float(self._worst[0]), accumulated)
        if worst:
            worst.weights = dict(zip(self._kept, self._weights, strict=True))
        return worst
