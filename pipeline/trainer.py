"""Settings that no configuration names: those of the machine, and a quick and quiet Trainer."""

import logging
import os
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from torch.distributed.constants import default_pg_timeout

from callbacks.run.run_folder import MetricsCSV
from callbacks.run.termination import Termination
from core.errors import ErrorScope, UserError
from core.hosts import TIMEOUT
from core.runs import Run
from core.wandb_runs import describe
from pipeline.fast_loop import speed_up
from pipeline.studies.grid import DEFAULTS, read_yaml

# what the Trainer refuses to have among its callbacks when they are switched off
_NEEDS = {
    "logger": "LearningRateMonitor",
    "enable_progress_bar": "ProgressBar",
    "enable_checkpointing": "BestCheckpoint",
}
_METRICS = ("callbacks.MetricsCSV", f"{MetricsCSV.__module__}.MetricsCSV")


def resolve_trainer_config(trainer: Namespace) -> None:
    """Fill in what depends on the machine, and leave out what a Trainer would refuse."""
    if trainer.precision is None and not _has_precision_plugin(trainer):
        trainer.precision = fastest_precision(trainer.accelerator)
    for several in ("logger", "callbacks"):
        if isinstance(trainer[several], Namespace):  # one alone, as it is typed
            trainer[several] = [trainer[several]]
    trainer.callbacks = _deduplicate(trainer.callbacks or [])
    if trainer.logger in (True, None):  # to Lightning a logger of its own choice
        trainer.logger = []
    if isinstance(trainer.logger, list) and find_spec("wandb") is None:
        kept = [x for x in trainer.logger if not x.class_path.endswith("WandbLogger")]
        if len(kept) < len(trainer.logger):
            rank_zero_only(print)("wandb is not installed, so there will be no W&B run.")
        trainer.logger = kept
    loggers = trainer.logger
    if isinstance(loggers, list) and not any(x.class_path in _METRICS for x in loggers):
        settings = Namespace(class_path=_METRICS[0], init_args=Namespace(save_dir="."))
        loggers.insert(0, settings)  # what a run keeps is not asked of the list
    idle = tuple(name for switch, name in _NEEDS.items() if trainer[switch] is False)
    trainer.callbacks = [c for c in trainer.callbacks if not c.class_path.endswith(idle)]


def resolve_wandb_config(logger: Namespace, config: Namespace, run: Run, subcommand: str) -> None:
    """Give the W&B run of a run its place, id and name, and a new one group, tags and notes.

    Whoever joins a W&B run leaves these as they are: people edit them on its page.

    Args:
        logger: The logger's settings.
        config: All settings of the subcommand.
        run: Where everything is written.
        subcommand: Of ``train.py``.

    Raises:
        UserError: The W&B run would be elsewhere.
    """
    if logger.save_dir != str(run.folder):
        raise UserError(
            f"the W&B run is kept in {run.folder}, where the next start looks for it; leave its "
            "save_dir out."
        )
    if "WANDB_SWEEP_ID" not in os.environ:  # an agent has given the run its id
        logger.id = logger.id or run.wandb_id
    logger.name = logger.name or run.label
    if run.wandb_is_begun:
        return
    trainer, file = config.trainer, next(filter(None, config.config or []), None)
    name = Run.parent(Path(file.relative)).name if file else run.folder.absolute().parent.name
    job_type = "train" if subcommand == "fit" else subcommand
    data = config.data.class_path.rpartition(".")[2]
    tags = (name, data, trainer.precision, device(trainer.accelerator))
    for key, fact in describe(run, job_type, *tags).items():
        if logger.get(key) is None:
            logger[key] = fact


def _has_precision_plugin(trainer: Namespace) -> bool:
    """Return true if a plugin decides on the precision, as for float16 with a scaler on a CPU."""
    plugins = trainer.plugins if isinstance(trainer.plugins, list) else [trainer.plugins]
    paths = [getattr(plugin, "class_path", "") for plugin in plugins]
    return any(path.endswith("Precision") for path in paths)


def _deduplicate(callbacks: list[Namespace]) -> list[Namespace]:
    """Keep of a class that the defaults have the last callback alone, in the first's place."""
    of_defaults = {entry["class_path"] for entry in read_yaml(DEFAULTS)["trainer"]["callbacks"]}
    shorts = {path.rpartition(".")[2] for path in of_defaults}
    kept: dict[Any, Namespace] = {}
    for number, callback in enumerate(callbacks):
        short = callback.class_path.rpartition(".")[2]
        kept[short if short in shorts else number] = callback
    return list(kept.values())


class EndOfSetup(Callback):
    """Mark where setup ends: from there on a ValueError is no longer taken for the user's."""

    def __init__(self, errors: ErrorScope) -> None:
        self.errors = errors

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.errors.setting_up = False

    on_validation_start = on_test_start = on_predict_start = on_train_start


def prepare_trainer(trainer: Trainer, errors: ErrorScope, *, termination: bool = True) -> None:
    """Give a trainer what no configuration names: the answer to SIGTERM, and a quick loop."""
    trainer.callbacks.append(EndOfSetup(errors))  # type: ignore[attr-defined]
    if termination:  # now, since Lightning would take it for a ModelCheckpoint
        trainer.callbacks.append(Termination())  # type: ignore[attr-defined]
    speed_up(trainer)
    # a lost host ends the others soon; Lightning's default is half an hour
    if getattr(trainer.strategy, "_timeout", None) == default_pg_timeout:
        setattr(trainer.strategy, "_timeout", TIMEOUT)  # noqa: B010
    # With max_steps Lightning takes every resumed epoch for one that is not finished, and counts
    # epochs and logged steps one too far (Lightning-AI/pytorch-lightning#19617).
    if hasattr(loop := trainer.fit_loop, "_iteration_based_training"):
        setattr(loop, "_iteration_based_training", lambda: False)  # noqa: B010


def quiet_libraries() -> None:
    """Leave on the terminal what a user can act on."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    # on a full disk W&B's own log cannot be written: ours is the sentence that says what to do
    logging.raiseExceptions = False
    os.environ.setdefault("WANDB_SILENT", "true")  # train.py says itself where the run is
    # a call of Lightning 2.6 itself, which torch has renamed
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.* is deprecated")
    # train.py says what follows from it
    warnings.filterwarnings("ignore", "You defined a `validation_step` but have no `val_data")
    warnings.filterwarnings("ignore", ".*could not find the monitored key")
    # a run that has moved, or goes by another path: BestCheckpoint remembers what was best
    warnings.filterwarnings("ignore", "The dirpath has changed from")
    # `fit --run NAME` is meant to go on in its folder
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
    # a run goes on without those that only look or end, and is refused without others
    warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint need to be provid")
    # datamodules/base.py does it itself
    warnings.filterwarnings("ignore", "You requested to overfit but enabled .* shuffling")
    # a test needs none: the weights in a checkpoint are the averaged ones
    warnings.filterwarnings("ignore", ".*The WeightAveraging state cannot be restored")
    # what is recorded is also written at the end of each epoch
    warnings.filterwarnings("ignore", "The number of training batches .* is smaller than")


def fastest_precision(accelerator: str) -> str:
    """Return bf16 where matrix units multiply it, else float32; fp16 only where asked for.

    On a CPU that is AMX. AVX-512 BF16 alone took 1.05 to 1.5 times as long as float32
    (docs/speed.md). What the processor is decides, and no clock: a training that is started again
    gets the same weights.
    """
    if device(accelerator) == "cuda":
        native = torch.cuda.get_device_capability()[0] >= 8
    else:
        native = device(accelerator) == "cpu" and torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if native else "32-true"


def device(accelerator: Any) -> str:
    """Return what a Trainer trains on: ``cuda``, ``mps``, ``cpu`` or its own name."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "cuda"
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return "mps"
    return "cpu" if accelerator == "auto" else str(getattr(accelerator, "class_path", accelerator))
