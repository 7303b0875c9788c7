"""The way of a training step's values to the loggers."""

from collections.abc import Mapping

import torch
from lightning import Trainer
from torch import Tensor


class StepRecords:
    """Values of training steps, from the device to the loggers.

    They wait on the device and are read together, so the loop never stops for a number, and yet
    each of them reaches the loggers with its own optimizer step.

    Attributes:
        pending: Optimizer step and values of each batch that has not been read.
        latest: Values read last, for the progress bar.
    """

    def __init__(self) -> None:
        self.pending: list[tuple[int, dict[str, Tensor]]] = []
        self.latest: dict[str, float] = {}
        self._rows: dict[int, dict[str, float]] = {}  # of callbacks, by optimizer step

    def add(self, rows: Mapping[int, Mapping[str, float]]) -> None:
        for step, values in rows.items():
            self._rows.setdefault(step, {}).update(values)

    def flush(self, trainer: Trainer, *, alone: bool = False) -> None:
        """Write all values of finished optimizer steps; see ``LitModel.flush_records``."""
        now = trainer.global_step  # a step whose batches are still being accumulated waits for them
        pending = [(step, values) for step, values in self.pending if alone or step < now]
        del self.pending[: len(pending)]
        rows = {step: row for step, row in self._rows.items() if alone or step < now}
        self._rows = {step: row for step, row in self._rows.items() if step not in rows}
        for step, means in self._read(pending, trainer, alone).items():
            rows[step] = {**means, **rows.get(step, {}), "epoch": trainer.current_epoch}
        for logger in trainer.loggers if rows else []:
            if log_rows := getattr(logger, "log_rows", None):  # ours to W&B takes all at once
                log_rows(rows)
                continue
            for step, values in sorted(rows.items()):
                logger.log_metrics(values, step)

    def _read(
        self, pending: list[tuple[int, dict[str, Tensor]]], trainer: Trainer, alone: bool
    ) -> dict[int, dict[str, float]]:
        """Mean values of each optimizer step, read from the device at once."""
        if not pending:
            return {}
        table = torch.stack([torch.stack(list(v.values())) for _, v in pending]).float()
        if not alone:
            table = trainer.strategy.reduce(table, reduce_op="mean")
        batches: dict[int, list[list[float]]] = {}  # accumulated ones share an optimizer step
        for (step, _), row in zip(pending, table.tolist(), strict=True):
            batches.setdefault(step, []).append(row)
        names = [f"train/{name}" for name in pending[0][1]]
        means = {
            step: {
                name: sum(column) / len(column)
                for name, column in zip(names, zip(*rows, strict=True), strict=True)
            }
            for step, rows in batches.items()
        }
        self.latest = means[pending[-1][0]]
        return means
