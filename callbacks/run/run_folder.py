"""Configuration and metrics of a run folder."""

import csv
import io
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

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

NEWEST = 500  # rows that are written anew: values come as late as the next log step
PIECE = 2**16  # bytes


class MetricsCSV(Logger):
    """All metrics in ``metrics.csv``: one row per optimizer step, one column per metric.

    Unlike Lightning's CSVLogger it goes on with the file of an interrupted run. The whole file is
    replaced at every checkpoint, at the end, and between them about every half minute. Memory holds
    the newest rows alone, which may still grow, so that it does not grow with the steps.

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
        self._open: dict[int, dict[str, float]] | None = None  # by step; read when first needed
        self._first_open = 0  # the rows of earlier steps are in the file alone
        self._closed = 0  # bytes of the file that hold them and the header
        self._size = 0  # bytes of the file
        self._columns: dict[str, None] = {}  # of the file, in order
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
        if self._open is not None and not self._closed:
            return self._open
        return self._read() | (self._open or {})

    def _read(self) -> dict[int, dict[str, float]]:
        rows: dict[int, dict[str, float]] = {}
        if self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    step = int(row.pop("step"))
                    rows[step] = {name: float(x) for name, x in row.items() if x}
        return rows

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the run's configuration is in ``config.yaml``."""

    def _reopen(self, rows: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
        """Take these for the rows of the run: the next save writes all their lines."""
        self._open, self._first_open, self._closed, self._columns = rows, 0, 0, {}
        return rows

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        step, rows = step or 0, self._open
        if rows is None or step < self._first_open or not metrics.keys() <= self._columns.keys():
            rows = self._reopen(self.rows)
        rows.setdefault(step, {}).update(metrics)
        if time.monotonic() > self._next_save:
            self.save()

    @rank_zero_only
    def restart_from(self, step: int, loggers: Iterable[Logger] = ()) -> None:
        """Forget the rows of ``step`` and after it, which a resumed run is about to repeat.

        W&B among the loggers gets the others, of which a killed process may have sent it few.
        """
        rows = self._reopen({s: row for s, row in self.rows.items() if s < step})
        for logger in loggers:
            if isinstance(logger, ResumableWandbLogger):
                logger.log_history(rows)

    @rank_zero_only
    def save(self) -> None:
        start = time.monotonic()
        if self._closed and not (self.path.exists() and self.path.stat().st_size == self._size):
            self._reopen(self.rows)  # somebody else has changed or removed the file
        rows = self._open or {}
        if not self._closed:
            self._columns = dict.fromkeys(sorted({name for row in rows.values() for name in row}))
        if not self._columns:
            return
        lines, end = io.StringIO(), 0
        writer = csv.DictWriter(lines, ["step", *self._columns], lineterminator="\n")
        if not self._closed:
            writer.writeheader()
        steps = sorted(rows)
        for place, step in enumerate(steps, 1):  # 9 digits hold a float32 exactly
            writer.writerow({"step": step} | {k: f"{v:.9g}" for k, v in rows[step].items()})
            if place == len(steps) - NEWEST:
                end = lines.tell()
        text = lines.getvalue()
        with atomic_write(self.path) as file:
            self._copy_closed(file)
            file.write(text.encode())
        self._size = self._closed + len(text.encode())
        if end:
            self._closed += len(text[:end].encode())
            self._open = {step: rows[step] for step in steps[-NEWEST:]}
            self._first_open = steps[-NEWEST]
        now = time.monotonic()
        self._next_save = now + 30 + 50 * (now - start)  # a long file is written less often

    def _copy_closed(self, file: IO[bytes]) -> None:
        if left := self._closed:
            with self.path.open("rb") as old:  # in pieces: memory does not grow with the file
                while piece := old.read(min(left, PIECE)):
                    left -= file.write(piece)

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
            if isinstance(callback, EarlyStopping) and _has_stopped(callback):
                trainer.should_stop = True  # Lightning would train one more epoch
        where = hardware(trainer.strategy.root_device, trainer.world_size)
        self.text = f"# hardware: {json.dumps(where)}\n{self.text}"
        if split := trainer.datamodule.split_digest:  # type: ignore[attr-defined]
            self.text = f"# split: {split}\n{self.text}"
        # not on_train_start: a run killed after its last step has nothing left to train
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


def _has_stopped(callback: EarlyStopping) -> bool:
    """Return whether it has ended the training that it was restored from."""
    reason = getattr(callback, "stopping_reason", None)
    return callback.stopped_epoch > 0 if reason is None else bool(reason.value)
