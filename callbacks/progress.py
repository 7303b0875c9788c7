"""The progress bar."""

import time

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar


class ProgressBar(TQDMProgressBar):
    """A bar with the last training values that were read from the device anyway.

    A metric logged with ``prog_bar=True`` would be read at every step, bar or not.

    Args:
        interval: Seconds between two drawings: steps of a millisecond are not drawn each, those of
            seconds are.
    """

    def __init__(self, interval: float = 0.2) -> None:
        super().__init__()
        self.interval = interval
        self._next = 0.0

    def _should_update(self, current: int, total: int | float) -> bool:
        now = time.monotonic()
        if now < self._next and current < total:
            return False
        self._next = now + self.interval
        return self.is_enabled

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        latest = getattr(pl_module, "latest", {})
        return {name.removeprefix("train/"): f"{value:.3f}" for name, value in latest.items()}
