"""Checkpoints that a run cannot do without, safe from a crash."""

from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from callbacks.run.termination import another_batch_follows
from core.files import atomic_write
from lit_models.base import LitModel


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that take their name only when they are complete.

    Lightning writes to the system's temporary folder and moves from there, which is a copy, and can
    be interrupted, where that folder is another file system.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        with atomic_write(Path(path)) as file:
            torch.save(checkpoint, file)


class BestCheckpoint(ModelCheckpoint):
    """Keep the epoch that did best on the validation part, by the model's own measure."""

    def __init__(self) -> None:
        super().__init__(
            filename="best",
            monitor=LitModel.monitor,
            mode="max",
            save_top_k=1,
            enable_version_counter=False,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(pl_module, LitModel):
            self.monitor = pl_module.monitor
        super().setup(trainer, pl_module, stage)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning forgets what was best when the run's folder has moved or goes by another path
        folder = Path(self.dirpath or ".")
        best = folder / Path(state_dict["best_model_path"]).name
        if best.is_file():
            state_dict = state_dict | {
                "dirpath": self.dirpath,
                "best_model_path": str(best),
                "kth_best_model_path": str(best),
                "best_k_models": {str(best): state_dict["best_model_score"]},
            }
        super().load_state_dict(state_dict)
        self.current_score = state_dict["current_score"]  # Lightning leaves it out


class LastCheckpoint(ModelCheckpoint):
    """Keep the state to resume from: of the last epoch, or of where training ended inside one.

    Lightning counts an epoch that a time limit or ``max_steps`` cuts short as done, and whoever
    goes on would never see the rest of its samples.
    """

    def __init__(self) -> None:
        super().__init__(
            filename="last",
            save_top_k=1,
            every_n_epochs=1,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
        self.stopping = False  # somebody has asked for it
        self.cut = False  # this epoch ends early

    @property
    def state_key(self) -> str:
        return type(self).__qualname__  # whatever the settings of another ModelCheckpoint are

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        super().on_train_batch_end(trainer, *args)
        loop = trainer.fit_loop
        self.stopping |= trainer.should_stop
        if loop.epoch_loop._num_ready_batches_reached():
            return
        ends = trainer.global_step == trainer.max_steps
        if self.stopping and loop._can_stop_early and not ends:
            trainer.should_stop = False
            ends = trainer.should_stop = another_batch_follows(trainer)  # or a batch later
        if ends:
            self.cut = True
            trainer.save_checkpoint(Path(str(self.dirpath)) / "last.ckpt")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.cut:
            super().on_train_epoch_end(trainer, pl_module)


def is_last_checkpoint(callback: Callback) -> bool:
    """Return whether a callback is the predecessor of LastCheckpoint in older configurations."""
    return isinstance(callback, ModelCheckpoint) and callback.filename == "last"
