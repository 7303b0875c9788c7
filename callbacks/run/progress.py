"""The progress bar."""

import time

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

INTERVAL = 0.2  # seconds between two drawings


class ProgressBar(TQDMProgressBar):
    """A bar with the last training values that were read from the device anyway.

    A metric logged with ``prog_bar=True`` would be read at every step, bar or not. It is drawn five
    times a second at most, so that steps of seconds are drawn each and those of a millisecond not.

    Args:
        refresh_rate: Steps between two drawings, if they take that long; 0 is without a bar.
    """

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._next = 0.0

    def _should_update(self, current: int, total: int | float | None) -> bool:
        now = time.monotonic()
        if now < self._next and current != total:  # a run resumed within an epoch has no total
            return False
        self._next = now + INTERVAL
        return super()._should_update(current, total)  # type: ignore[arg-type]

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        latest = getattr(pl_module, "latest", {})
        return {name.removeprefix("train/"): f"{value:.3f}" for name, value in latest.items()}
