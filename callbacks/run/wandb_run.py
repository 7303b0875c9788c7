"""Summary, code and artifacts of a W&B run, beside the rows of its metrics."""

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from callbacks.run.folder import FolderCallback
from callbacks.run.run_folder import MetricsCSV
from callbacks.run.wandb_logger import STEP, ResumableWandbLogger
from core.errors import UserError
from core.runs import Run
from core.wandb_runs import Piece, link
from lit_models.base import LitModel

if TYPE_CHECKING:
    from wandb import Run as WandbRun


class WandbSummary(FolderCallback):
    """Best values in the summary, uncommitted code, artifacts, and an alert when training ends.

    Args:
        tells_end: Send that alert; the points of a study would send hundreds.
    """

    def __init__(self, *, tells_end: bool = True) -> None:
        self.tells_end = tells_end
        self.best: dict[str, str] = {}  # metrics, and whether their "min" or "max" is wanted
        self.trained = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self.best = {"train/loss": "min", "val/loss": "min"}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if monitor := getattr(callback, "monitor", None):
                self.best[monitor] = getattr(callback, "mode", "min")
        if isinstance(pl_module, LitModel):
            self.best[pl_module.monitor] = "max"
        for run in _wandb_runs(trainer):
            for name, end in self.best.items():
                run.define_metric(name, step_metric=STEP, step_sync=True, summary=f"{end},last")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.trained = True
        patch = (self.folder or Path()) / "code.patch"
        for run in _wandb_runs(trainer) if patch.exists() else []:
            shutil.copy(patch, run.dir)
            run.save(Path(run.dir, patch.name), base_path=run.dir, policy="now")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = self.folder or Path()
        best = self.best_values(trainer)
        for run in _wandb_runs(trainer):
            run.summary.update(best)
            if self.tells_end and self.trained:
                ended = [f"{k} {e} {best[k][e]:.4g}" for k, e in self.best.items() if k in best]
                text = f"{folder} after {trainer.global_step} steps: {', '.join(ended)}"
                run.alert("training has ended", text, level="INFO", wait_duration=600)
        for logger in trainer.loggers if trainer.is_global_zero else []:
            if isinstance(logger, ResumableWandbLogger) and logger.keeps_artifacts:
                data = trainer.datamodule  # type: ignore[attr-defined]
                read = Piece("dataset", type(data).__name__, digest=data.digest)
                try:
                    file = Run(folder).checkpoint()
                except UserError:  # it was to keep none
                    continue
                made = Piece("model", logger.experiment.id, file, metadata=best)
                link(logger.experiment, [read], [made])

    def best_values(self, trainer: Trainer) -> dict[str, dict[str, Any]]:
        """Best and last value of each metric over the whole run, also of parts before a resume.

        What W&B keeps itself begins anew with each offline folder, and a NaN stays its minimum.
        """
        histories = [log.rows for log in trainer.loggers if isinstance(log, MetricsCSV)]
        rows = [row for history in histories for _, row in sorted(history.items())]
        found = {}
        for name, end in self.best.items():
            values = [row[name] for row in rows if name in row]
            if finite := [value for value in values if math.isfinite(value)]:
                best = min(finite) if end == "min" else max(finite)
                last = values[-1]  # to W&B, NaN has no value; its own rows have the word, as JSON
                found[name] = {end: best, "last": last if math.isfinite(last) else json.dumps(last)}
        return found


def _wandb_runs(trainer: Trainer) -> "list[WandbRun]":
    """The W&B runs of a trainer that record anything."""
    if not trainer.is_global_zero:
        return []
    runs = [log.experiment for log in trainer.loggers if isinstance(log, WandbLogger)]
    return [run for run in runs if not run.disabled]
