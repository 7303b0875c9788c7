"""The callbacks of Lightning without its name: `lightning.py` and `pytorch_lightning.py` derive
theirs from these classes, since the two packages have a ``Callback`` each.

A trainer and a module are those of either package. Dimensions: P parameters of one optimizer.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .clipping import UpdateLimit
from .probe import StepProbe
from .watch import mean

SHARDING = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")


class StepHooks(ABC):
    """Values of each step wait on the device until a log step.

    A subclass collects in its hooks and writes in ``flush``, which is called every
    ``trainer.log_every_n_steps``, at the end of an epoch, before a checkpoint, and when training
    ends or breaks off.
    """

    trainer: Any  # set when training is set up, as are module and folder
    module: Any
    folder: str | None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        self.trainer, self.module = trainer, pl_module
        self.folder = trainer.log_dir  # Lightning broadcasts the answer: all ranks have to ask
        sharding = type(trainer.strategy).__name__
        if sharding in SHARDING:
            raise ValueError(
                f"{type(self).__name__} needs whole gradients, and {sharding} shards them; "
                "use the strategy ddp."
            )
        parameters = list(pl_module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            raise ValueError(
                f"{type(self).__name__} has nothing to watch: every parameter of "
                f"{type(pl_module).__name__} is frozen; set requires_grad on some."
            )
        if any(p.is_complex() for p in parameters):
            raise ValueError(
                f"{type(self).__name__} does not take complex parameters; train them as pairs of "
                "real ones with torch.view_as_real."
            )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        watched = [StepProbe.of(optimizer).params for optimizer in trainer.optimizers]
        if not watched or not all(watched):
            raise ValueError(
                f"{type(self).__name__} has nothing to watch: an optimizer of "
                f"{type(pl_module).__name__} has no parameter to train."
            )

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every = trainer.log_every_n_steps
        if trainer.is_last_batch or (every and trainer.global_step % every == 0):
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


class ClippingHooks(StepHooks):
    """Shortens something in every optimizer step, on the device, and logs by how much.

    The smallest factor of each step is logged as ``clip/<name>``; 1 means that it did not act.
    """

    name: str
    clips_gradients = False  # whether gradients are other ones behind this callback

    def __init__(self) -> None:
        self.steps = 0
        self.acted = 0
        self._pending: list[tuple[int, Tensor]] = []  # (optimizer step, factors (P,) or ())

    def keep(self, trainer: Any, factors: Tensor) -> None:
        self._pending.append((trainer.global_step, factors))

    def flush(self, *, alone: bool = False) -> None:
        pending, self._pending = self._pending, []
        if not pending:
            return
        smallest = torch.stack([factors.amin() for _, factors in pending]).tolist()
        self.steps += len(smallest)
        self.acted += sum(factor < 1 for factor in smallest)
        if self.trainer.is_global_zero:
            steps = [step for step, _ in pending]
            rows = {s: {f"clip/{self.name}": f} for s, f in zip(steps, smallest, strict=True)}
            self.log_rows(rows)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_end(trainer, pl_module)
        if trainer.is_global_zero and self.steps:
            print(f"{type(self).__name__} acted in {self.acted / self.steps:.1%} of the steps.")

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"steps": self.steps, "acted": self.acted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.acted = state["steps"], state["acted"]


class UpdateClippingHooks(ClippingHooks):
    """Shortens the updates that spikes are made of; gradients and optimizer stay as they are.

    Two limits, the second applied to what the first leaves:

    - ``max_rms``: of each parameter tensor, ``rms(delta theta) <= max_rms * lr``. An optimizer that
      normalises (RMSprop, Adam) makes updates of about ``lr``, and larger ones only where its
      second moment is out of date. This is the update clipping of Adafactor (Shazeer and Stern,
      arXiv:1804.04235, section 6) and StableAdamW. For SGD it is an absolute limit on the gradient.
    - ``max_decrease``: to first order a step promises to lower the loss by
      ``-<gradient, delta theta>``. A loss that cannot fall below zero cannot keep a promise larger
      than itself; the whole update is shortened until it promises at most ``max_decrease`` times
      the loss. It is the Polyak step size taken as an upper bound, as in SPS_max (Loizou et al.,
      arXiv:2002.10542), with any optimizer's direction in place of the gradient.

    It acts on what the optimizer has done to the parameters, so it is exact for every optimizer;
    decoupled weight decay of torch's optimizers is left whole. Where it does not act, the run is
    the one without, bit for bit. Behind gradient clipping, promises are those of the clipped
    gradient.

    Args:
        max_rms: Largest root mean square of an update, in learning rates; None for no limit.
        max_decrease: Largest share of the loss that a step may promise to remove; None for no
            limit.
    """

    name = "update_factor"

    def __init__(self, max_rms: float | None = 1.0, max_decrease: float | None = None) -> None:
        super().__init__()
        self.limit = UpdateLimit(max_rms, max_decrease)
        self._losses: list[Tensor] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for optimizer in trainer.optimizers:
            limits = StepProbe.of(optimizer).limits
            if self.factors not in limits:  # else it is the optimizer of an earlier fit
                limits.append(self.factors)
            self.limit.check(optimizer)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        if self.limit.max_decrease is not None:
            self._losses.append(unscaled_loss(trainer, pl_module, loss))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        StepProbe.of(optimizer).arm(trainer.global_step)
        self.limit.loss = mean(self._losses) if self._losses else None
        self._losses = []
        if self.limit.loss is not None and trainer.world_size > 1:
            # the gradient is that of the mean over all processes; strategy.reduce has a barrier
            self.limit.loss = self.limit.loss / trainer.world_size
            torch.distributed.all_reduce(self.limit.loss)

    def factors(self, probe: StepProbe) -> Tensor:
        """By which factor each update of this step has to be shortened (P,)."""
        factors = self.limit(probe)
        self.keep(self.trainer, factors)
        return factors


# What a trainer knows


def wandb_loggers(trainer: Any) -> list[Any]:
    """The loggers of a trainer that write to W&B."""
    return [
        logger
        for logger in trainer.loggers
        if any(cls.__name__ == "WandbLogger" for cls in type(logger).__mro__)
    ]


def clips_gradients_itself(pl_module: Any) -> bool:
    """Whether a module has a hook of its own in which gradients are clipped."""
    owner = next(c for c in type(pl_module).__mro__ if "configure_gradient_clipping" in vars(c))
    return owner.__name__ != "LightningModule"


def unscaled_loss(trainer: Any, pl_module: Any, loss: Tensor) -> Tensor:
    """The loss of a batch () from what ``on_before_backward`` is given."""
    value = loss.detach().float()
    if pl_module.automatic_optimization and trainer.accumulate_grad_batches > 1:
        value = value * trainer.accumulate_grad_batches  # Lightning has divided it
    scaler = grad_scaler(trainer)
    return value if scaler is None else value / scaler.scale(torch.ones_like(value))


def learning_rate(group: Mapping[str, Any]) -> float | Tensor:
    """The learning rate of now; schedulers write new ones into a tensor."""
    rate = group["lr"]
    return rate.clone() if isinstance(rate, Tensor) else rate


def grad_scaler(trainer: Any) -> Any:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def scale_left(trainer: Any, pl_module: Any, optimizer: Optimizer) -> Tensor | None:
    """The scale () of gradients that the optimizer itself unscales, inside its step."""
    scaler = grad_scaler(trainer)
    if scaler is None or not unscales_itself(optimizer):
        return None
    return scaler.scale(torch.ones((), device=pl_module.device))


def unscales_itself(optimizer: Optimizer) -> bool:
    """Whether gradients are still scaled when an optimizer gets them.

    torch's own optimizers do it where they are fused; GradScaler goes by their private attribute,
    which those of other libraries may have as well.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        return True
    return any(group.get("fused") for group in optimizer.param_groups)
