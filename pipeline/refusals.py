"""Settings of a Trainer that would do nothing here, or not what their name says."""

from importlib.util import find_spec
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.run.checkpoints import BestCheckpoint
from core.errors import UserError

_CALLBACKS = {
    "BatchSizeFinder": "needs a loader that is made anew for each size, and the data lie on the "
    "device; try sizes with --data.batch_size",
    "LearningRateFinder": "moves one rate, and an optimizer may have several; try some with "
    "a study",
    "StochasticWeightAveraging": "keeps its average in no checkpoint; EMAWeightAveraging does",
}
_ENDS = ("EarlyStopping", "Timer")
_SHARDING = ("modelparallel", "fsdp", "xlafsdp", "deepspeed")


def refuse_settings(trainer: Namespace, subcommand: str | None) -> None:
    """Refuse settings of a Trainer that cannot act.

    Raises:
        UserError: There is such a setting.
    """
    if trainer.barebones:
        raise UserError(
            "--trainer.barebones=true leaves nothing of a run; for one without records use "
            "--trainer.logger=false --trainer.enable_checkpointing=false."
        )
    _refuse_sharding(trainer.strategy)
    names = [c.class_path.rpartition(".")[2] for c in trainer.callbacks or []]
    for name in names:
        if name in _CALLBACKS:
            raise UserError(f"{name} {_CALLBACKS[name]}.")
    loggers = trainer.logger if isinstance(trainer.logger, list) else []
    if any(x.class_path.endswith("TensorBoardLogger") for x in loggers) and not (
        find_spec("tensorboard") or find_spec("tensorboardX")
    ):
        raise UserError("TensorBoardLogger needs tensorboard: pip install tensorboard")
    for setting in ("val_check_interval", "check_val_every_n_epoch", "accumulate_grad_batches"):
        if trainer[setting] == 0:
            raise UserError(f"--trainer.{setting} must not be 0.")
    if trainer.gradient_clip_val is None and trainer.gradient_clip_algorithm:
        raise UserError("--trainer.gradient_clip_algorithm needs --trainer.gradient_clip_val.")
    if (trainer.gradient_clip_val or 0) < 0:
        raise UserError("--trainer.gradient_clip_val must not be negative.")
    if subcommand != "fit" and trainer.overfit_batches:
        raise UserError("--trainer.overfit_batches is for fit; leave it out.")
    if subcommand != "fit" or trainer.fast_dev_run:
        return
    every, epochs = trainer.check_val_every_n_epoch or 1, trainer.max_epochs or -1
    if -1 < epochs < every:
        raise UserError(
            f"with --trainer.check_val_every_n_epoch={every} nothing is validated in {epochs} "
            "epochs."
        )
    if trainer.min_epochs and -1 < epochs < trainer.min_epochs:
        raise UserError(f"--trainer.min_epochs={trainer.min_epochs} is more than max_epochs.")
    for setting in ("max_epochs", "max_steps", "limit_train_batches"):
        if trainer[setting] == 0:
            raise UserError(f"with --trainer.{setting}=0 there is nothing to train.")
    endless = trainer.max_epochs == -1 and trainer.max_steps == -1 and trainer.max_time is None
    if endless and not set(names) & set(_ENDS):
        raise UserError(
            "training would not end; set --trainer.max_epochs, --trainer.max_steps or "
            "--trainer.max_time."
        )


def _refuse_sharding(strategy: Namespace | str) -> None:
    """Refuse a strategy by its name or class, before Lightning asks for what it would need.

    Raises:
        UserError: It cuts parameters into parts.
    """
    name = strategy if isinstance(strategy, str) else strategy.class_path.rpartition(".")[2]
    if name.lower().replace("_", "").startswith(_SHARDING):
        raise UserError(
            f"--trainer.strategy={name} cuts parameters into parts, and the models here are whole "
            "in each process; use ddp."
        )


def refuse_val_size(config: Namespace, typed: list[str]) -> None:
    """Refuse folds beside a ``val_size``, whose place they take.

    Args:
        config: A whole configuration that has folds.
        typed: The flags.

    Raises:
        UserError: ``val_size`` is typed, or one file sets both.
    """
    said = [{"folds", *(flag.partition("=")[0].rpartition(".")[2] for flag in typed)}]
    for path in filter(None, config.config or []):  # None: of a run, as text
        data = yaml.safe_load(path.get_content()).get("data")
        settings = data.get("init_args") if isinstance(data, dict) else None  # a class alone
        said.append({name for name, value in (settings or {}).items() if value})
    if any({"folds", "val_size"} <= names for names in said):
        raise UserError("folds and val_size both choose what is for validation; leave one out.")


def refuse_other_part(data: Namespace, trained: dict[str, Any]) -> None:
    """Refuse to validate a run on another part of the samples that it was trained on.

    Raises:
        UserError: Which setting chooses it.
    """
    if data.class_path != trained["class_path"]:
        return
    for name in ("folds", "fold", "val_size"):
        was, now = trained["init_args"].get(name), data.init_args.get(name)
        if was != now:
            raise UserError(
                f"--data.{name}={now}: the run was trained with {was}, and on samples that are for "
                "validation now; leave it out."
            )


class KnownMonitors(Callback):
    """Refuse a metric that nothing measures before training, not after its first epoch."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:  # mostly the sanity check's two batches
            self.check(trainer, set(trainer.callback_metrics))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.datamodule.validates:  # type: ignore[attr-defined]
            self.check(trainer, set())

    def check(self, trainer: Trainer, measured: set[str]) -> None:
        watching: list[tuple[Any, Any]] = [
            (callback, getattr(callback, "monitor", None))
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if not isinstance(callback, BestCheckpoint)
        ]
        watching += [(c.scheduler, c.monitor) for c in trainer.lr_scheduler_configs]
        for watcher, monitor in watching:
            if monitor and monitor not in measured and not monitor.startswith("lr-"):
                there = f"there are {', '.join(sorted(measured))}" if measured else "nothing is"
                raise UserError(
                    f"{type(watcher).__name__} watches {monitor}, which is not measured in "
                    f"validation; {there}."
                )
