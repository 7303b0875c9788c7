"""Pictures of a run."""

from typing import Any

from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from matplotlib.figure import Figure

from callbacks.run.folder import FolderCallback
from core.files import atomic_write


class PictureCallback(FolderCallback):
    """A callback that leaves pictures in the run folder and, if there is one, on the W&B run."""

    data: LightningDataModule | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.data = getattr(trainer, "datamodule", None)  # an attribute Lightning does not declare

    @property
    def images(self) -> Any:
        """The datamodule, if it serves images that a person can look at."""
        return self.data if hasattr(self.data, "denormalize") else None

    def save(self, trainer: Trainer, name: str, figure: Figure) -> None:
        """Write ``<name>.png`` and show it as ``pictures/<name>``; for rank 0 alone to call."""
        if self.folder is None:
            return
        path = self.folder / f"{name}.png"
        with atomic_write(path) as file:
            figure.savefig(file, format="png", dpi=120)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                # without a step, W&B puts it at the last optimizer step it knows
                logger.log_image(f"pictures/{name}", [str(path)])
