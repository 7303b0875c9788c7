"""The callbacks of Lightning without its name: `lightning.py` and `pytorch_lightning.py` derive
theirs from these classes, since the two packages have a ``Callback`` each.

A trainer and a module are those of either package. Dimensions: P parameters of one optimizer.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import processes
from .clipping import Floor, UpdateLimit
from .probe import Factors, StepProbe, refuse_complex

SHARDING = ("FSDPStrategy", "DeepSpeedStrategy")


class StepHooks(ABC):
    """Values of each step wait on the device until a log step.

    A subclass collects in its hooks and writes in ``flush``, which is called every
    ``trainer.log_every_n_steps``, at the end of an epoch, before a checkpoint, and when training
    ends or breaks off.
    """

    trainer: Any  # set when training is set up, as are module and folder
    module: Any
    folder: Path | None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        self.trainer, self.module = trainer, pl_module
        self.folder = _run_folder(trainer)  # Lightning broadcasts the answer: all ranks have to ask
        name, strategy = type(self).__name__, type(trainer.strategy).__name__
        if strategy in SHARDING:
            self.refuse(
                f"{name} needs whole gradients, and {strategy} shards them; use the strategy ddp, "
                "or ModelParallelStrategy and fully_shard."
            )
        parameters = list(pl_module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            self.refuse(
                f"{name} has nothing to watch: every parameter of {type(pl_module).__name__} is "
                "frozen; set requires_grad on some."
            )
        try:
            refuse_complex(name, parameters)
        except ValueError as error:
            self.refuse(str(error))

    def refuse(self, why: str) -> None:
        """End training, since this cannot do its part in it.

        Raises:
            ValueError: Always.
        """
        raise ValueError(why)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        watched = [StepProbe.of(optimizer).params for optimizer in trainer.optimizers]
        if not watched or not all(any(p.requires_grad for p in params) for params in watched):
            self.refuse(
                f"{type(self).__name__} has nothing to watch: an optimizer of "
                f"{type(pl_module).__name__} has no parameter to train."
            )

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every = trainer.log_every_n_steps
        if trainer.is_last_batch or (every and trainer.global_step % every == 0):
            self.on_log_step()

    def on_log_step(self) -> None:
        self.flush()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.flush()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.flush()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.flush(alone=True)

    def state_dict(self) -> dict[str, Any]:
        self.flush()  # what the checkpoint has seen, the loggers have seen
        return {}

    @abstractmethod
    def flush(self, *, alone: bool = False) -> None:
        """Read and write what is pending.

        Args:
            alone: The other processes may not be listening, so do not wait for them.
        """

    def log_rows(self, rows: Mapping[int, Mapping[str, float]]) -> None:
        """Give each step its values, in rows that the module writes if it has ``add_to_rows``."""
        if add := getattr(self.module, "add_to_rows", None):
            add(rows)
            return
        for logger in self.trainer.loggers:
            for step, values in rows.items():
                logger.log_metrics(dict(values), step)


class UpdateClippingHooks(StepHooks):
    """Shorten the updates that spikes are made of; gradients and optimizer stay as they are.

    Two limits, the second applied to what the first leaves:

    - ``max_rms``: of each parameter tensor, ``rms(delta theta) <= max_rms * lr``. An optimizer that
      normalises (RMSprop, Adam) makes updates of about ``lr``, and larger ones only where its
      second moment is out of date. This is the update clipping of Adafactor (Shazeer and Stern,
      arXiv:1804.04235, section 6) and StableAdamW; of embeddings it holds for each row. For SGD it
      is an absolute limit on the gradient.
    - ``max_decrease``: to first order a step promises to lower the loss by
      ``-<gradient, delta theta>``. A loss that cannot fall below ``floor`` cannot keep a promise
      larger than its distance from it; the whole update is shortened until it promises at most
      ``max_decrease`` times that. It is the Polyak step size taken as an upper bound, as in SPS_max
      (Loizou et al., arXiv:2002.10542), with any optimizer's direction in place of the gradient.

    It acts on what the optimizer has done to the parameters, so it is exact for every optimizer;
    decoupled weight decay of torch's optimizers is left whole. Where it does not act, the run is
    the one without, bit for bit. After gradient clipping, promises are those of the clipped
    gradient. The smallest factor of each step is logged as ``clip/update_factor``.

    Args:
        max_rms: Largest root mean square of an update, in learning rates; None for no limit.
        max_decrease: Largest share of the loss above ``floor`` that a step may promise to remove;
            None for no limit.
        floor: What the loss cannot fall below; ``auto`` takes the lowest loss seen less its usual
            scatter.
    """

    def __init__(
        self,
        max_rms: float | None = 1.0,
        max_decrease: float | None = None,
        floor: Floor = 0.0,
    ) -> None:
        self.limit = UpdateLimit(max_rms, max_decrease, floor)
        self.steps = 0
        self.acted = 0  # steps that were shortened
        self.unlimited = 0  # steps whose loss was not above the floor
        self._losses = Losses()
        self._pending: list[tuple[int, Tensor | float, Tensor | None]] = []  # step, factor, loss

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for optimizer in trainer.optimizers:
            limits = StepProbe.of(optimizer).limits
            if self.factors not in limits:  # else it is the optimizer of an earlier fit
                limits.append(self.factors)
            self.limit.attach(optimizer, pl_module)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        if self.limit.max_decrease is not None:
            self._losses.add(trainer, pl_module, loss)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        StepProbe.of(optimizer).snapshot(trainer.global_step, self)
        loss = self._losses.take(trainer, optimizer)
        # the gradient is that of the mean over all processes
        self.limit.loss = None if loss is None else processes.average(loss)

    def factors(self, probe: StepProbe) -> Factors:
        """By which factor each update of this step has to be shortened (A,)."""
        factors = self.limit(probe)
        smallest = factors.amin() if isinstance(factors, Tensor) else min(factors, default=1.0)
        self._pending.append((self.trainer.global_step, smallest, self.limit.loss))
        return factors

    def flush(self, *, alone: bool = False) -> None:
        pending, self._pending = self._pending, []
        tensors = [t for _, *both in pending for t in both if isinstance(t, Tensor)]
        read = iter(torch.stack(tensors).tolist() if tensors else [])
        rows = {}
        for step, factor, loss in pending:
            smallest = next(read) if isinstance(factor, Tensor) else factor
            rows[step] = {"clip/update_factor": smallest}
            self.steps += 1
            self.acted += smallest < 1
            if loss is not None:
                value, floor = next(read), self.limit.floor
                self.unlimited += floor != "auto" and value <= floor
        if rows and self.trainer.is_global_zero:
            self.log_rows(rows)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_end(trainer, pl_module)
        if trainer.is_global_zero and self.steps:
            print(f"{type(self).__name__} acted in {self.acted / self.steps:.1%} of the steps.")
        if trainer.is_global_zero and self.unlimited:
            print(
                f"max_decrease left {self.unlimited} steps alone, whose loss was not above its "
                f"floor of {self.limit.floor}; set floor to a lower bound of the loss, or to auto."
            )

    def state_dict(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in ("steps", "acted", "unlimited")}
        return super().state_dict() | counts | {"seen": self.limit.seen.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.acted = state["steps"], state["acted"]
        if "seen" in state:  # before there was a floor
            self.limit.seen, self.unlimited = torch.tensor(state["seen"]), state["unlimited"]


class Losses:
    """The losses whose backward passes made the gradients of the coming step.

    With several optimizers a loss is known to be that of one if it alone was about to be trained
    (``toggle_optimizer``), or if there was no other backward pass since the last step. Others are
    given to none.
    """

    def __init__(self) -> None:
        self._found: list[tuple[int | None, Tensor]] = []  # optimizer, if known, and loss ()

    def add(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Take in the loss of ``on_before_backward``."""
        owners = list(range(len(trainer.optimizers)))
        if len(owners) > 1:
            params = [StepProbe.of(optimizer).params for optimizer in trainer.optimizers]
            owners = [i for i in owners if any(p.requires_grad for p in params[i])]
        owner = owners[0] if len(owners) == 1 else None
        self._found.append((owner, _unscaled_loss(trainer, pl_module, loss)))

    def take(self, trainer: Any, optimizer: Optimizer) -> Tensor | None:
        """The mean loss () of the optimizer that takes a step, None if it is not known."""
        index = trainer.optimizers.index(optimizer)
        found, self._found = self._found, []
        if len(found) == 1 and found[0][0] is None:
            return found[0][1]
        own = [loss for owner, loss in found if owner == index]
        self._found = [(owner, loss) for owner, loss in found if owner not in (index, None)]
        if not own:
            return None
        return torch.stack(own).mean() if len(own) > 1 else own[0]


# What a trainer knows


def _run_folder(trainer: Any) -> Path | None:
    """The folder of this run alone; None if the trainer has none, as without a logger."""
    folder = trainer.log_dir
    logger = trainer.loggers[0] if trainer.loggers else None
    if logger is None:
        return None
    if not hasattr(logger, "log_dir") and logger.name is not None and logger.version is not None:
        root = logger.save_dir or trainer.default_root_dir  # W&B, MLflow: many runs in a folder
        folder = Path(root, str(logger.name), str(logger.version))
    return Path(folder) if folder else None


def wandb_loggers(trainer: Any) -> list[Any]:
    """The loggers of a trainer that write to W&B."""
    return [
        logger
        for logger in trainer.loggers
        if any(cls.__name__ == "WandbLogger" for cls in type(logger).__mro__)
    ]


def has_own_hook(pl_module: Any, name: str) -> bool:
    """Tell if a module has a hook of its own, which Lightning's has not."""
    owner = next(c for c in type(pl_module).__mro__ if name in vars(c))
    return owner.__name__ not in ("LightningModule", "ModelHooks")


def _unscaled_loss(trainer: Any, pl_module: Any, loss: Tensor) -> Tensor:
    """The loss of a batch () from what ``on_before_backward`` is given."""
    value = loss.detach().float()
    if pl_module.automatic_optimization and trainer.accumulate_grad_batches > 1:
        value = value * trainer.accumulate_grad_batches  # Lightning has divided it
    scaler = grad_scaler(trainer)
    return value if scaler is None else value / scaler.scale(torch.ones_like(value))


def grad_scaler(trainer: Any) -> Any:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def scale_left(trainer: Any, pl_module: Any, optimizer: Optimizer) -> Tensor | None:
    """The scale () of gradients that the optimizer itself unscales, inside its step."""
    scaler = grad_scaler(trainer)
    if scaler is None or not _unscales_itself(optimizer):
        return None
    return scaler.scale(torch.ones((), device=pl_module.device))


def _unscales_itself(optimizer: Optimizer) -> bool:
    """Tell if gradients are still scaled when an optimizer gets them.

    torch's own optimizers do it where they are fused; GradScaler goes by their private attribute,
    which those of other libraries may have as well.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        return True
    return any(group.get("fused") for group in optimizer.param_groups)
