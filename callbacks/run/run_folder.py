"""What keeps a run folder whole: its configuration and its metrics."""

import csv
import io
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from callbacks.run.wandb_logger import ResumableWandbLogger
from core.files import atomic_write
from core.provenance import code_patch, hardware
from lit_models.base import LitModel
from steadyfit.lightning import StepCallback


class MetricsCSV(Logger):
    """All metrics in ``metrics.csv``: one row per optimizer step, one column per metric.

    Unlike Lightning's CSVLogger it goes on with the file of an interrupted run. The whole file is
    replaced at every checkpoint, at the end, and between them about every half minute.

    Args:
        save_dir: The run folder.
    """

    filename = "metrics.csv"
    # to ModelCheckpoint these are folders below save_dir, and none are wanted
    name = ""
    version = ""

    def __init__(self, save_dir: str = ".") -> None:
        super().__init__()
        self._save_dir = save_dir
        self._rows: dict[int, dict[str, float]] | None = None  # by step; read when first needed
        self._forget_text()
        self._next_save = 0.0

    @property
    def save_dir(self) -> str:
        return self._save_dir

    @property
    def path(self) -> Path:
        return Path(self._save_dir) / self.filename

    @property
    def rows(self) -> dict[int, dict[str, float]]:
        """The metrics of each optimizer step."""
        if self._rows is None:
            self._rows = {}
            if self.path.exists():
                with self.path.open(newline="") as file:
                    for row in csv.DictReader(file):
                        step = int(row.pop("step"))
                        self._rows[step] = {name: float(x) for name, x in row.items() if x}
        return self._rows

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the run's configuration is in ``config.yaml``."""

    def _forget_text(self) -> None:
        """Let the next save make the lines of all rows; with very many it is a second's work."""
        self._columns: list[str] = []
        self._texts: list[str] = []  # header and the lines of all steps before `_end`
        self._end = 0

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        step = step or 0
        self.rows.setdefault(step, {}).update(metrics)
        if step < self._end or not metrics.keys() <= set(self._columns):
            self._forget_text()
        if time.monotonic() > self._next_save:
            self.save()

    @rank_zero_only
    def restart_from(self, step: int, loggers: Iterable[Logger] = ()) -> None:
        """Forget the rows of ``step`` and after it, which a resumed run is about to repeat.

        W&B among the loggers gets the others, of which a killed process may have sent it few.
        """
        self._rows = {s: row for s, row in self.rows.items() if s < step}
        self._forget_text()
        for logger in loggers:
            if isinstance(logger, ResumableWandbLogger):
                logger.log_history(self._rows)

    @rank_zero_only
    def save(self) -> None:
        start = time.monotonic()
        if not self._columns:
            self._columns = sorted({name for row in self.rows.values() for name in row})
        lines = io.StringIO()
        writer = csv.DictWriter(lines, ["step", *self._columns], lineterminator="\n")
        if not self._texts:
            writer.writeheader()
        before_last, step = 0, self._end
        for step in sorted(step for step in self.rows if step >= self._end):
            before_last = lines.tell()
            row = self.rows[step]  # 9 digits hold a float32 exactly
            writer.writerow({"step": step} | {k: f"{v:.9g}" for k, v in row.items()})
        if self._columns:
            new = lines.getvalue()
            with atomic_write(self.path, "w", newline="") as file:
                file.writelines([*self._texts, new])
            self._texts.append(new[:before_last])  # the last row may still grow
            self._end = step
        end = time.monotonic()
        self._next_save = end + 30 + 50 * (end - start)  # a long file is written less often

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()


class RunRecord(Callback):
    """The run's configuration in ``config.yaml``, in every checkpoint, and on the W&B run.

    Args:
        text: The resolved configuration as YAML.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.done = 0  # optimizer steps in the checkpoint that training goes on from

    def write(self, trainer: Trainer, *, only_if_missing: bool = False) -> None:
        folder = trainer.log_dir  # asked on all ranks: Lightning broadcasts the answer
        if not trainer.is_global_zero or folder is None:
            return
        if only_if_missing and (Path(folder) / "config.yaml").exists():
            return
        with atomic_write(Path(folder) / "config.yaml", "w") as file:
            file.write(self.text)
        patch = Path(folder) / "code.patch"
        if text := code_patch():
            with atomic_write(patch, "w") as file:
                file.write(text)
        else:
            patch.unlink(missing_ok=True)  # of an earlier start
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                config = yaml.safe_load(self.text)
                logger.experiment.config.update(config, allow_val_change=True)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self.done = checkpoint["global_step"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EarlyStopping) and has_stopped(callback):
                trainer.should_stop = True  # Lightning would train one more epoch
        where = hardware(trainer.strategy.root_device, trainer.world_size)
        self.text = f"# hardware: {json.dumps(where)}\n{self.text}"
        if split := trainer.datamodule.split_digest:  # type: ignore[attr-defined]
            self.text = f"# split: {split}\n{self.text}"
        # not on_train_start: a run killed behind its last step has nothing left to train
        for table in trainer.loggers:
            if isinstance(table, MetricsCSV):
                table.restart_from(self.done, trainer.loggers)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.write(trainer)  # now something is trained with these settings

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.write(trainer, only_if_missing=True)  # nothing was left to train

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["config"] = self.text
        # whoever goes on from it has every step that it has seen in the file, whatever comes now
        if isinstance(pl_module, LitModel):
            pl_module.flush_records()
        for table in trainer.loggers:
            if isinstance(table, MetricsCSV):
                table.save()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, StepCallback):
                callback.flush(alone=True)  # they add to the rows that the model writes
        if isinstance(pl_module, LitModel):
            pl_module.flush_records(alone=True)


def has_stopped(callback: EarlyStopping) -> bool:
    """Whether it has ended the training that it was restored from."""
    reason = getattr(callback, "stopping_reason", None)
    return callback.stopped_epoch > 0 if reason is None else bool(reason.value)
