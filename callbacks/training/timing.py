"""Speed of training, its wait for data, its memory and its end."""

import math
from time import perf_counter
from typing import Any

import torch
from lightning import LightningModule, Trainer

from callbacks.run.folder import FolderCallback
from callbacks.run.run_folder import MetricsCSV

MIB = 2**20


class _TimingCSV(MetricsCSV):
    """The times of a run, which ``metrics.csv`` has none of: it is the same after a resume."""

    filename = "timing.csv"


class Timing(FolderCallback):
    """Measure the speed of training, for ``timing.csv``, all other loggers and the progress bar.

    A row is of the steps since the row before, without validation, checkpoints and pictures, and
    stands at the last of them: at log steps, at the end of an epoch that has none, and of training.
    The module has then read the values of its steps, so a device has done its work, and nothing is
    read for the times. Lightning's ``ThroughputMonitor`` waits for the device in every step, and
    its ``DeviceStatsMonitor`` writes to all loggers, ``metrics.csv`` among them.

    - ``time/samples_per_second``: of all processes.
    - ``time/data_wait``: share of the time that training waited for its loader, unless a profiler
      is set, which measures it too.
    - ``time/memory``: in MiB; on a GPU the most that tensors took since training began, elsewhere
      what the process holds now (RSS).
    - ``time/elapsed`` and ``time/left``: seconds of the whole training, from its first start on and
      up to its last step at the pace since the last start, validation and all included. What came
      after the last row before an interruption is not counted.
    """

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}
        self._table: _TimingCSV | None = None
        self._seconds = self._waited = 0.0  # since the last row; the loader's clock at that time
        self._samples = 0
        self._running: float | None = None  # since when; None while the clock stands still
        self._last = -1  # step of the last row
        self._done = 0  # optimizer steps in the checkpoint that training goes on from
        self._due = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.folder and trainer.loggers and trainer.is_global_zero and stage == "fit":
            self._table = _TimingCSV(str(self.folder))

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._done = checkpoint["global_step"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # not on_train_start: a run killed after its last step has nothing left to train
        if self._table is not None:
            self._table.restart_from(self._done, trainer.loggers)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began, self._first = perf_counter(), trainer.global_step
        self._last = self._first - 1
        self._running = None
        self._total = getattr(pl_module, "total_steps", -1)
        rows = self._table.rows.values() if self._table else ()
        self._before = max((row["time/elapsed"] for row in rows), default=0.0)

    def on_train_epoch_start(self, *_: Any) -> None:
        self._running = perf_counter()

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self._running is None:  # after a pause the loader was the first to go on
            self._running = getattr(trainer.profiler, "since", perf_counter())  # type: ignore[attr-defined]
        if self._due:
            self._write(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._samples += len(batch[-1])
        step, every = trainer.global_step, trainer.log_every_n_steps or math.inf  # type: ignore[attr-defined]
        of_epoch = (batch_idx + 1) // trainer.accumulate_grad_batches
        if step - 1 > self._last and (
            step % every == 0 or (trainer.is_last_batch and step % every >= of_epoch)
        ):
            self._due = True  # once the module has read its values

    def on_validation_start(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if self._due:
            self._write(trainer)
        elif self._running is not None:
            self._seconds += perf_counter() - self._running
        self._running = None

    on_train_epoch_end = on_validation_start

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step - 1 > self._last:
            self._write(trainer)

    def _row(self, trainer: Trainer) -> dict[str, float]:
        now, seconds = perf_counter(), self._seconds
        if self._running is not None:
            seconds += now - self._running
        row = {"time/samples_per_second": self._samples * trainer.world_size / seconds}
        clock = getattr(trainer.profiler, "waited", None)  # type: ignore[attr-defined]
        if clock is not None:
            row["time/data_wait"] = (clock - self._waited) / seconds
        row["time/memory"] = memory(trainer.strategy.root_device) / MIB
        row["time/elapsed"] = self._before + now - self._began
        if self._total > 0:
            pace = (now - self._began) / (trainer.global_step - self._first)
            row["time/left"] = pace * (self._total - trainer.global_step)
        return {name: round(value, 4) for name, value in row.items()}

    def _write(self, trainer: Trainer) -> None:
        self.latest = self._row(trainer)
        self._running, self._seconds, self._samples = perf_counter(), 0.0, 0
        self._waited = getattr(trainer.profiler, "waited", 0.0)  # type: ignore[attr-defined]
        self._last, self._due = trainer.global_step - 1, False
        if self._table is None:
            return
        self._table.log_metrics(self.latest, self._last)
        for logger in trainer.loggers:
            if not isinstance(logger, MetricsCSV):
                logger.log_metrics(self.latest, self._last)

    def on_save_checkpoint(self, trainer: Trainer, *_: Any) -> None:
        self.on_validation_start(trainer)  # what the checkpoint has seen is in the file
        if self._table is not None and trainer.global_step == self._total > self._last + 1:
            # the end of training writes this row for all loggers, but it may never be reached
            self._table.log_metrics(self._row(trainer), self._total - 1)
        self._save()

    def _save(self, *_: Any, **__: Any) -> None:
        if self._table is not None:
            self._table.save()

    on_fit_end = on_exception = _save


def memory(device: torch.device) -> int:
    """Bytes, without waiting for the device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import psutil  # it takes a while, and only a training needs it

    return psutil.Process().memory_info().rss
