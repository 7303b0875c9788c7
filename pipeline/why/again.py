"""A finished run trained again, in this process, from a state of its own.

It is ``fit`` itself: the same command line reads the run's ``config.yaml``, the same Trainer
restores a checkpoint in the midst of an epoch. Only what looks and keeps is left out.
"""

import io
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from callbacks.run.run_folder import RunRecord
from callbacks.run.termination import Termination
from core.errors import ErrorScope, UserError
from core.hosts import Hosts
from pipeline.cli import CLI, PLATEAU
from pipeline.continuing import CALLBACKS_MAY_CHANGE, MONITOR
from pipeline.trainer import quiet_libraries, resolve_trainer_config
from steadyfit.lightning import GradientSpikeMonitor

Rows = dict[int, dict[str, float]]  # what loggers are told, by optimizer step


@dataclass
class Course:
    """A stretch of training, as it was seen."""

    rows: Rows = field(default_factory=dict)
    rates: dict[int, float] = field(default_factory=dict)  # the largest of each optimizer step
    places: dict[int, tuple[int, list[int]]] = field(default_factory=dict)  # epoch, batches
    weights: dict[int, Tensor] = field(default_factory=dict)  # flat, before the steps asked for
    spikes: list[dict[str, Any]] = field(default_factory=list)  # records of the monitor
    differing: list[str] = field(default_factory=list)  # checkpoints with other weights

    def losses(self, first: int, last: int) -> list[float]:
        found = [self.rows.get(step, {}).get("train/loss") for step in range(first, last + 1)]
        return [loss for loss in found if loss is not None]


class RowLogger(Logger):
    """Keeps in memory what ``metrics.csv`` would be told."""

    name = None
    version = None

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.setdefault(step or 0, {}).update(metrics)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: it is the run's configuration."""


class Follow(Callback):
    """Note the course of a training, keep its state before one step, and stop before another.

    Args:
        course: What is filled in.
        stop: Optimizer steps after which training ends.
        save: Optimizer steps after which the state goes to ``path``.
        weights: Optimizer steps before which the weights are copied.
        checkpoints: Names and weights of checkpoints to compare with, by optimizer steps.
    """

    def __init__(
        self,
        course: Course,
        stop: int,
        save: int | None = None,
        path: Path | None = None,
        weights: Sequence[int] = (),
        checkpoints: dict[int, tuple[str, dict[str, Tensor]]] | None = None,
    ) -> None:
        self.course, self.stop, self.save, self.path = course, stop, save, path
        self.weights, self.checkpoints = weights, checkpoints or {}

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        step, (_, number) = trainer.global_step, args
        self.course.places.setdefault(step, (trainer.current_epoch, []))[1].append(number)
        rates = [float(group["lr"]) for o in trainer.optimizers for group in o.param_groups]
        self.course.rates[step] = max(rates)
        if step in self.weights and step not in self.course.weights:
            self.course.weights[step] = flat_weights(module)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self.save == 0 and self.path:
            trainer.save_checkpoint(self.path, weights_only=False)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if step == self.save and self.path:
            trainer.save_checkpoint(self.path, weights_only=False)
            self.save = None  # the next batch may be accumulated for the same step
        if step in self.checkpoints:
            name, weights = self.checkpoints.pop(step)
            own = module.state_dict()
            if any(not torch.equal(own[key].cpu(), weights[key]) for key in weights):
                self.course.differing.append(name)
        if step >= self.stop:
            trainer.should_stop = True


class Again(CLI):
    """The model, the data and the trainers of a run, and what trains them over a stretch.

    Args:
        config: The run's ``config.yaml``.
        scratch: A folder for what a callback may write.
        trust: Import whatever the run names.

    Raises:
        UserError: The configuration cannot be read, or is that of several processes.
    """

    def __init__(self, config: Path, scratch: Path, *, trust: bool = False) -> None:
        self.file, self.scratch = config, scratch
        self.extra: list[Callback] = []
        quiet_libraries()
        trusted = ["--trust"] if trust else []
        typed = ["fit", f"--config={config}", *trusted]
        super().__init__(typed, ErrorScope(setting_up=True), ExitStack(), Hosts())
        self.datamodule.prepare_data()
        self.datamodule.setup("fit")
        for hook in ("prepare_data", "setup"):  # reading and checking the data once is enough
            setattr(self.datamodule, hook, lambda *_, **__: None)

    def before_instantiate_classes(self) -> None:
        config = self.config["fit"]
        config.ckpt_path = None
        self.record = RunRecord(self.file.read_text())
        trainer, schedule = config.trainer, config.model.init_args.get("lr_scheduler")
        resolve_trainer_config(trainer)
        looking = set(CALLBACKS_MAY_CHANGE)
        trainer.callbacks = [
            c for c in trainer.callbacks if c.class_path.rpartition(".")[2] not in looking
        ]
        for callback in trainer.callbacks:
            if callback.class_path.endswith(MONITOR):
                callback.init_args.black_box = 0
        trainer.logger, trainer.max_time, trainer.profiler = False, None, None
        trainer.min_epochs = trainer.min_steps = None
        trainer.enable_progress_bar = trainer.enable_checkpointing = False
        trainer.num_sanity_val_steps = 0
        if not (schedule and schedule.class_path == PLATEAU):
            trainer.limit_val_batches = 0
        trainer.default_root_dir = str(self.scratch)

    def instantiate_trainer(self, **options: Any) -> Trainer:
        found = super().instantiate_trainer(**options)
        kept = [c for c in found.callbacks if not isinstance(c, Termination)]  # type: ignore[attr-defined]
        found.callbacks = kept  # type: ignore[attr-defined]
        if found.world_size > 1:
            raise UserError(
                f"the run trains with {found.world_size} processes, and a fork is of one alone."
            )
        return found

    def with_required_callbacks(self, trainer: Any) -> list[Callback]:
        trainer = deepcopy(trainer)  # callbacks carry nothing from one fork into the next
        return [*super().with_required_callbacks(trainer), *self.extra]

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing yet: see :meth:`train`."""

    @property
    def precision(self) -> str:
        return str(self.config.fit.trainer.precision)

    def train(
        self,
        checkpoint: Path | None,
        follow: Follow,
        extra: Sequence[Callback] = (),
        **options: Any,
    ) -> Course:
        """Train from a checkpoint, or from the start, and note the course in ``follow``."""
        self.extra = [*extra, follow]
        if "precision" in options:  # a plugin may have it
            plugins = self.config_init.fit.trainer.plugins or []
            options["plugins"] = [p for p in plugins if not isinstance(p, MixedPrecision)]
        self.model.float()  # a half precision makes itself what it needs
        course = follow.course
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = self.instantiate_trainer(logger=RowLogger(course.rows), **options)
            trainer.fit(self.model, self.datamodule, ckpt_path=checkpoint, weights_only=True)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, GradientSpikeMonitor):
                course.spikes = callback.records
        return course


def flat_weights(module: LightningModule) -> Tensor:
    """All parameters as one tensor on the CPU."""
    return torch.cat([p.detach().float().flatten().cpu() for p in module.parameters()])
