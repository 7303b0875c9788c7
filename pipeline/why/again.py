"""A finished run trained again, in this process, from a state of its own.

It is ``fit`` itself: the same command line reads the run's ``config.yaml``, the same Trainer
restores a checkpoint in the midst of an epoch. Only callbacks that look and keep are left out.
"""

import io
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from copy import deepcopy
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
from steadyfit.watching.records import SpikeRecord

Rows = dict[int, dict[str, float]]  # logged metrics, by optimizer step


class _RowLogger(Logger):
    """Keep in memory the metrics that would go to ``metrics.csv``."""

    name = version = None

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.setdefault(step or 0, {}).update(metrics)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: it is the run's configuration."""


class Course(Callback):
    """Record of a stretch of training; keeps the state at one step, and ends at another.

    Args:
        stop: Optimizer steps after which training ends.
        save: Optimizer steps after which the state goes to ``path``.
        path: A file.
        keep: Optimizer steps before which the weights are copied.

    Attributes:
        rows: Logged metrics, by optimizer step.
        rates: The largest learning rate of each optimizer step.
        places: Epoch and batches of each optimizer step.
        weights: All parameters, flat, before the steps of ``keep``.
        spikes: Records of the monitor.
    """

    def __init__(
        self, stop: int, save: int | None = None, path: Path | None = None, keep: Sequence[int] = ()
    ) -> None:
        self.stop, self.save, self.path, self.keep = stop, save, path, keep
        self.rows: Rows = {}
        self.rates: dict[int, float] = {}
        self.places: dict[int, tuple[int, list[int]]] = {}
        self.weights: dict[int, Tensor] = {}
        self.spikes: list[SpikeRecord] = []

    def losses(self, first: int, last: int) -> list[float]:
        found = [self.rows.get(step, {}).get("train/loss") for step in range(first, last + 1)]
        return [loss for loss in found if loss is not None]

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        step, (_, number) = trainer.global_step, args
        self.places.setdefault(step, (trainer.current_epoch, []))[1].append(number)
        rates = [float(group["lr"]) for o in trainer.optimizers for group in o.param_groups]
        self.rates[step] = max(rates)
        if step in self.keep and step not in self.weights:
            # not parameters_to_vector, which cannot read kernels in channels_last
            flat = [p.detach().float().flatten().cpu() for p in module.parameters()]
            self.weights[step] = torch.cat(flat)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self.save == 0 and self.path:
            trainer.save_checkpoint(self.path, weights_only=False)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if step == self.save and self.path:
            trainer.save_checkpoint(self.path, weights_only=False)
            self.save = None  # the next batch may be accumulated for the same step
        if step >= self.stop:
            trainer.should_stop = True


class Again(CLI):
    """The model and the data of a run, to be trained over a stretch again.

    Args:
        config: The run's ``config.yaml``.
        scratch: A folder for the files of callbacks.
        trust: Import any class that the run names.

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
        course: Course,
        extra: Sequence[Callback] = (),
        **options: Any,
    ) -> Course:
        """Train from a checkpoint, or from the start, and record the course."""
        self.extra = [*extra, course]
        if "precision" in options:  # a plugin may have it
            plugins = self.config_init.fit.trainer.plugins or []
            options["plugins"] = [p for p in plugins if not isinstance(p, MixedPrecision)]
        self.model.float()  # a half precision makes itself what it needs
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = self.instantiate_trainer(logger=_RowLogger(course.rows), **options)
            trainer.fit(self.model, self.datamodule, ckpt_path=checkpoint, weights_only=True)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, GradientSpikeMonitor):
                course.spikes = callback.records
        return course
