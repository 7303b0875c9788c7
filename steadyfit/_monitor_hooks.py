"""The callback that watches for spikes, without the name of Lightning (see `_hooks.py`)."""

import io
import itertools
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._hooks import (
    StepHooks,
    clips_gradients_itself,
    grad_scaler,
    learning_rate,
    scale_left,
    unscaled_loss,
    wandb_loggers,
)
from .monitor import CONFIRM, SpikeMonitor
from .probe import StepProbe, norms
from .reactions import REACTIONS, Reaction, ReactionName
from .records import finite_line, read_records, replace_file, sentence, suspect
from .watch import Observation


class MonitorHooks(SpikeMonitor, StepHooks):
    """Watch gradient, update and loss of every optimizer step, and name what spiked.

    Four signals are watched for each optimizer, the first, third and fourth by a
    :class:`SpikeDetector`, the second by :class:`ParameterRatios`:

    - ``gradient``: L2 norm over all parameters, after unscaling and before clipping;
    - ``parameter``: the norm of one parameter's gradient against that of all the others;
    - ``update``: L2 norm of what the optimizer did with it;
    - ``loss``: mean over the batches of the step and over all processes. It has to double, and
      two thirds of the threshold are enough then.

    Every spike becomes a line of ``spikes.jsonl`` in ``trainer.log_dir``: when (step, epoch,
    batches), which signal and how far out, the parameters with the largest share and those furthest
    out of proportion, the largest update just before, and what followed. The norms of each
    parameter over the whole training go to ``norms.pt``, binned over time.

    With the reaction ``log`` nothing is read from the device between log steps. The others read
    once a step, before it is taken, and act on gradient, parameter and loss; they are ``skip``,
    ``rollback``, ``stop``, or an own :class:`Reaction`. Values that a gradient scaler is going to
    throw away (overflow in float16) are recorded and neither counted nor acted upon.

    Put it in front of callbacks that clip gradients.

    Args:
        reaction: What to do about a spike.
        window: Steps over which a signal's usual level is taken.
        threshold: Robust standard deviations of the logarithm beyond which a value is a spike.
        top_k: Parameters named in a record.
        weight_norm_every: Optimizer steps between two readings of the weight norms.
        alert: Send a W&B alert about spikes, at most every ten minutes.
    """

    def __init__(
        self,
        reaction: ReactionName | Reaction = "log",
        window: int = 64,
        threshold: float = 4.5,
        top_k: int = 3,
        weight_norm_every: int = 10,
        alert: bool = True,
    ) -> None:
        super().__init__(window, threshold, top_k)
        if weight_norm_every < 1:
            raise ValueError(f"weight_norm_every must be at least 1, got {weight_norm_every}.")
        if reaction not in get_args(ReactionName) and not isinstance(reaction, Reaction):
            raise ValueError(
                f"reaction must be one of {', '.join(get_args(ReactionName))}, or a Reaction, got "
                f"{reaction!r}."
            )
        if isinstance(reaction, str):
            self.reaction = REACTIONS[reaction]() if reaction in REACTIONS else None
        else:
            self.reaction = reaction
        self.weight_norm_every = weight_norm_every
        self.alert = alert
        self._pending: list[Observation] = []
        self._batches: list[int] = []
        self._stepped = False  # an optimizer has, since the last batch began
        self._losses: list[Tensor] = []

    @property
    def path(self) -> Path | None:
        return Path(self.folder) / "spikes.jsonl" if self.folder else None

    # Collecting, without a read from the device

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.names = {id(p): name for name, p in pl_module.named_parameters()}
        callbacks = trainer.callbacks
        clipping = [c for c in callbacks if getattr(c, "clips_gradients", False)]
        for callback in itertools.takewhile(lambda c: c is not self, callbacks):
            if callback in clipping:
                raise ValueError(
                    f"GradientSpikeMonitor stands behind {type(callback).__name__} and would see "
                    "clipped gradients; put it first in trainer.callbacks."
                )
        self.optimizers, self.now = trainer.optimizers, trainer.global_step
        own = clips_gradients_itself(pl_module)
        for optimizer in trainer.optimizers:
            probe = StepProbe.of(optimizer)
            probe.gradients_are_clipped = bool(clipping or own or trainer.gradient_clip_val)
        if self.reaction:
            self.reaction.start(trainer, pl_module)
        open_since = self.records[0]["step"] if self.records else trainer.global_step
        earlier = [r for r in read_records(self.path) if r["step"] < open_since]
        self.records = [*earlier, *self.records]
        self._changed = bool(self.path and self.path.exists())
        if trainer.is_global_zero:
            self._save(trainer.global_step)  # without what is going to be trained again

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._stepped:
            self._batches, self._stepped = [], False
        self._batches.append(batch_idx)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        self._losses.append(unscaled_loss(trainer, pl_module, loss))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        probe = StepProbe.of(optimizer)
        step = trainer.global_step
        observation = Observation(
            step=step,
            epoch=trainer.current_epoch,
            batches=self._batches,
            optimizer=trainer.optimizers.index(optimizer),
            lrs=[learning_rate(group) for group in optimizer.param_groups],
            losses=self._losses,
            gradient=probe.gradient_norms(),
            scale=scale_left(trainer, pl_module, optimizer),
            scaled=grad_scaler(trainer) is not None,
            update=probe.arm(step),
            weight=norms(probe.before) if step % self.weight_norm_every == 0 else None,
        )
        self._losses, self._stepped = [], True
        self._pending.append(observation)
        if self.reaction:
            self._react(self.reaction, observation, optimizer)

    def _react(self, reaction: Reaction, observation: Observation, optimizer: Optimizer) -> None:
        """Read gradient and loss of the coming step, and act if one of them is a spike."""
        (numbers,) = self.read([observation], self._average)
        if self.spikes_before_step(observation, numbers):
            observation.reaction = type(reaction).__name__.lower()
            if observation.scale is not None:
                # without gradients, the scaler could not say later that they were finite
                grad_scaler(self.trainer).unscale_(optimizer)
            reaction.react(self.trainer, self.module, optimizer)

    def _average(self, table: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(table, reduce_op="mean")

    def on_train_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self.reaction and self._stepped:
            calm = trainer.global_step - self._last_spike > CONFIRM
            self.reaction.after_step(trainer, pl_module, calm)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    # Reading and judging

    def flush(self, *, alone: bool = False) -> None:
        pending, self._pending = self._pending, []
        if not pending:
            return
        numbers = self.read(pending, None if alone else self._average)
        rows = {o.step: self.judge(o, n) for o, n in zip(pending, numbers, strict=True)}
        self.remember(pending, numbers)
        if self.trainer.is_global_zero:
            self.log_rows(rows)
            self._save(pending[0].step)

    # Writing

    def _save(self, since: int) -> None:
        """Bring the file of spikes up to date and say what is new, on the first process."""
        if self.path and self._changed:
            self._changed = False
            lines = [finite_line(record) for record in self.records]
            replace_file(self.path, "".join(lines).encode())
        fresh = [r for r in self.records if r["step"] >= since and r["spiked"]]
        for logger in wandb_loggers(self.trainer) if fresh and self.alert else []:
            logger.experiment.alert(
                title="gradient spikes",  # W&B waits between alerts of one title
                text=sentence(fresh[0]),
                wait_duration=600,
            )

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_end(trainer, pl_module)
        self._finish()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._finish()

    def _finish(self) -> None:
        """Leave the norms of each parameter and the table of spikes, and say what was seen."""
        if not self.watches or not self.trainer.is_global_zero:
            return
        if self.folder:
            content = io.BytesIO()
            histories = {str(i): watch.history.state_dict() for i, watch in self.watches.items()}
            torch.save(histories, content)
            replace_file(Path(self.folder) / "norms.pt", content.getvalue())
        spikes = [record for record in self.records if record["spiked"]]
        if not spikes:
            return
        table = [
            {
                "step": r["step"],
                "epoch": r["epoch"],
                "batches": str(r["batches"]),
                "spiked": ", ".join(r["spiked"]),
                "parameter": suspect(r)["name"],
                "confirmed": r["confirmed"],
                "max_loss_after": r["max_loss_after"],
            }
            for r in spikes
        ]
        for logger in wandb_loggers(self.trainer):
            rows = [list(row.values()) for row in table]
            logger.log_table("spikes", columns=list(table[0]), data=rows)
        confirmed = sum(record["confirmed"] for record in spikes)
        worst = max(spikes, key=lambda record: record["max_loss_after"] or 0.0)
        print(
            f"{len(spikes)} spikes, {confirmed} of them followed by the loss, in {self.path}; the "
            f"worst: {sentence(worst)}"
        )

    # Resuming

    def state_dict(self) -> dict[str, Any]:
        self.flush()  # what the checkpoint has seen, the loggers have seen
        return super().state_dict()
