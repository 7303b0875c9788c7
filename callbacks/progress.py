"""The progress bar."""

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar


class ProgressBar(TQDMProgressBar):
    """A bar with the last training values that were read from the device anyway.

    A metric logged with ``prog_bar=True`` would be read at every step, bar or not.
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate)

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        latest = getattr(pl_module, "latest", {})
        return {name.removeprefix("train/"): f"{value:.3f}" for name, value in latest.items()}
