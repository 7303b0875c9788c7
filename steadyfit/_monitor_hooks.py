"""The callback that watches for spikes, without the name of Lightning (see `_hooks.py`)."""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import processes
from ._hooks import (
    SHARDING,
    Losses,
    StepHooks,
    grad_scaler,
    has_own_hook,
    scale_left,
    wandb_loggers,
)
from .probe import StepProbe
from .watching.black_box import BlackBox
from .watching.monitor import SpikeMonitor
from .watching.observation import Observation
from .watching.reactions import Reaction, ReactionName
from .watching.records import SpikeRecord, format_spike

_ALERT_SECONDS = 600  # between two W&B alerts


class BlackBoxHooks:
    """Copies for the black box of a monitor, on log steps: then the device is read in any case.

    It stands after all other callbacks, so that a copy holds what they have learned of the step.
    """

    def __init__(self, monitor: "MonitorHooks", keep: int) -> None:
        self._spikes = monitor
        self.box = BlackBox(keep)
        self.step = 0  # whose end was seen

    def stand_last(self, trainer: Any) -> None:
        if type(trainer.strategy).__name__ in (*SHARDING, "ModelParallelStrategy"):
            self._spikes.refuse(
                "black_box keeps whole states, and the strategy shards them; use ddp."
            )
        if not hasattr(getattr(trainer, "_checkpoint_connector", None), "dump_checkpoint"):
            self._spikes.refuse(
                "black_box cannot ask this version of Lightning for the state of a training; "
                "leave it out."
            )
        trainer.callbacks[:] = [*(c for c in trainer.callbacks if c is not self), self]

    @property
    def is_on(self) -> bool:
        return not self._spikes.off and self._spikes.folder is not None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.step, self.box.due = trainer.global_step, 0
        folder = self._spikes.folder
        if folder and self.is_on and processes.is_first():
            self.box.open(folder / "black_box", self.step, self._spikes.records)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        step = trainer.global_step
        if not self.is_on or step % self._spikes.every or step == self.step:
            return  # or another batch is accumulated for the next step
        self.step = step
        self.box.judge(step, self._spikes.records)
        if step >= self.box.due:
            # as trainer.save_checkpoint does, in every process, but without the file
            state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            trained = sum(len(StepProbe.of(o).params) for o in trainer.optimizers)
            self.box.take(step, state, trained, self._spikes.every)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.is_on:
            self.box.judge(math.inf, self._spikes.records)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)


class MonitorHooks(SpikeMonitor, StepHooks):
    """Watch gradient, update, loss and buffers of every optimizer step, and name what spiked.

    It is the :class:`SpikeMonitor` of any loop, with the names of Lightning: ``spikes.jsonl`` and
    ``norms.pt`` go to the folder of the run (without a logger there is none, and records stay in
    memory), the values of each step to the loggers, read every ``trainer.log_every_n_steps``.

    A training loader may have a method ``sample_ids(epoch, batch_idx)``: the ids of the samples of
    a batch, or None. A record then names all ``samples`` of its step, in the order of the batches,
    since any of them may be the one that spiked, and only whole lists can be compared; that takes
    as long a line as the step has samples. It is asked in the epoch of the step, when the record is
    made and never otherwise.

    Put it in front of callbacks that clip gradients.

    Args:
        reaction: What to do about a spike.
        window: Steps over which a signal's usual level is taken.
        threshold: Robust standard deviations of the logarithm beyond which a value is a spike.
        alert: Send a W&B alert with the evidence of a spike, at most every ten minutes.
        optional: A training that cannot be watched is not refused: a line says why, once.
        black_box: Keep the states before so many of the worst spikes in ``black_box/`` of the run's
            folder, each a checkpoint; see :class:`~steadyfit.watching.black_box.BlackBox`.
    """

    black_box_callback: type["BlackBoxHooks"]  # a callback of the same package

    def __init__(
        self,
        reaction: ReactionName | Reaction = "log",
        window: int = 128,
        threshold: float = 4.5,
        alert: bool = True,
        optional: bool = False,
        black_box: int = 0,
    ) -> None:
        if black_box < 0 or black_box != int(black_box):
            raise ValueError(
                f"black_box must be a whole number of states to keep, or 0, got {black_box}."
            )
        super().__init__(
            nn.Module(),  # until there is one
            (),
            reaction=reaction,
            window=window,
            threshold=threshold,
        )
        self.alert = alert
        self.optional = optional
        self.off = False
        self._next_alert = -math.inf  # by the clock, in seconds
        self._batches: list[int] = []
        self._stepped = False  # an optimizer has, since the last batch began
        self._losses = Losses()
        self._early: dict[int, Tensor] = {}  # squared gradient norms (A,) after the backward pass
        self._looks_early = False
        self._black_box = self.black_box_callback(self, black_box) if black_box else None

    @property
    def loop(self) -> Any:
        return self.trainer

    def refuse(self, why: str) -> None:
        if not self.optional:
            super().refuse(why)
        if not self.off and self.trainer.is_global_zero:
            print(f"Spikes are not watched: {why}")
        self.off = True

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self.forget()  # what an earlier training has left; a checkpoint is loaded after this
            self.off = False
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self._black_box:
            self._black_box.stand_last(trainer)

    # Collecting, without a read from the device

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.off:
            return
        own = has_own_hook(pl_module, "configure_gradient_clipping")
        self._looks_early = has_own_hook(pl_module, "on_after_backward") or not (
            pl_module.automatic_optimization
        )
        self.every = trainer.log_every_n_steps or self.every
        for optimizer in trainer.optimizers:
            clipped = bool(own or trainer.gradient_clip_val or self._looks_early)
            StepProbe.of(optimizer).gradients_are_clipped = clipped
        self._begin(trainer, pl_module)

    def _begin(self, trainer: Any, pl_module: Any) -> None:
        self.global_step = trainer.global_step
        self.attach(pl_module, trainer.optimizers)
        self.spikes.samples_of = self.samples_of
        self.spikes.resume(trainer.global_step)
        if trainer.is_global_zero:  # without what is going to be trained again
            self.spikes.begin()

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._stepped or not self._batches:
            self._batches, self._stepped = [], False
            self.keep_buffers()
        self._batches.append(batch_idx)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        if not self.off:
            self._losses.add(trainer, pl_module, loss)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if not self._looks_early or self.off:
            return
        scaler = grad_scaler(trainer)
        for index, optimizer in enumerate(trainer.optimizers):  # before a module's own clipping
            with torch.no_grad():
                squares = StepProbe.of(optimizer).gradient_squares()
                if scaler is not None and scale_left(trainer, pl_module, optimizer) is None:
                    squares = squares / scaler.scale(squares.new_ones(())).square()
                self._early[index] = squares

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        if self.off:
            return
        self.global_step, self._stepped = trainer.global_step, True
        self.before_step(
            self._losses.take(trainer, optimizer),
            optimizer,
            epoch=trainer.current_epoch,
            batches=self._batches,
            scale=scale_left(trainer, pl_module, optimizer),
            scaled=grad_scaler(trainer) is not None,
            earlier=self._early.pop(trainer.optimizers.index(optimizer), None),
        )

    def before_reaction(self, o: Observation) -> None:
        if o.is_left_scaled:
            # without gradients, the scaler could not say later that they were finite
            grad_scaler(self.trainer).unscale_(self.optimizers[o.optimizer])

    # Reading and judging

    def on_log_step(self) -> None:
        self.flush(refresh=True)

    def flush(self, *, refresh: bool = False, alone: bool = False) -> None:
        if not self.off:
            super().flush(refresh=refresh, alone=alone)

    # Writing

    def samples_of(self, record: SpikeRecord) -> list[Any]:
        """Ids of the samples of a record's batches, if the training loader can tell."""
        ask = getattr(self.trainer.train_dataloader, "sample_ids", None)
        parts = [ask(record.epoch, number) or [] for number in record.batches] if ask else []
        return [sample for part in parts for sample in part]

    log_rows = StepHooks.log_rows

    def on_records(self, fresh: Sequence[SpikeRecord]) -> None:
        spiked = [record for record in fresh if record.spiked]
        if not spiked or not self.alert or time.monotonic() < self._next_alert:
            return
        self._next_alert = time.monotonic() + _ALERT_SECONDS  # offline, W&B keeps each that is sent
        for logger in wandb_loggers(self.trainer):
            logger.experiment.alert(
                title="gradient spikes",  # W&B waits between alerts of one title
                text=format_spike(spiked[0]),
                level="WARN",
                wait_duration=_ALERT_SECONDS,
            )

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_end(trainer, pl_module)
        self._conclude()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave what a training did not that was killed after its last checkpoint."""
        if self.monitors and trainer.is_global_zero and not self.spikes.begun:
            self._begin(trainer, pl_module)
            self._conclude()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._conclude()

    def _conclude(self) -> None:
        """Leave the norms of each parameter and the table of spikes, and say what was seen."""
        if self.off or not self.monitors or not processes.is_first():
            return
        print(self.finish())
        columns = ["step", "epoch", "batches", "spiked", "parameter", "confirmed", "max_loss_after"]
        table = [
            [
                record.step,
                record.epoch,
                str(record.batches),
                ", ".join(record.spiked),
                record.top_parameter.name,
                record.confirmed,
                record.max_loss_after,
            ]
            for record in self.records
            if record.spiked
        ]
        for logger in wandb_loggers(self.trainer) if table else []:
            logger.log_table("spikes", columns=columns, data=table)
