"""The run folder, as callbacks know it."""

from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class FolderCallback(Callback):
    """A callback that leaves files in the run folder.

    Attributes:
        folder: None under ``fast_dev_run``, which leaves nothing behind.
    """

    folder: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Lightning broadcasts the answer, so all ranks have to ask, and a rank that fails later,
        # in on_exception, could not ask any more.
        folder = trainer.log_dir
        self.folder = None if folder is None else Path(folder)
