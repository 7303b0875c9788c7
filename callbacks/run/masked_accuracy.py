"""Accuracy of masked tokens, and of next sentences."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from datamodules.text.masked_books import MaskedBooksDataModule
from datamodules.text.subwords import IS_NEXT, NOT_NEXT


class MaskedAccuracy(Callback):
    """Log the accuracy of masked tokens and that of next sentences apart.

    Logged in validation as ``val/masked_accuracy`` and, with ``next_sentence``,
    ``val/next_sentence_accuracy``; after a test likewise, which is printed. ``val/accuracy`` counts
    both together. Other data than :class:`MaskedBooksDataModule` are left alone.
    """

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any, **__: Any
    ) -> None:
        if not isinstance(trainer.datamodule, MaskedBooksDataModule):  # type: ignore[attr-defined]
            return
        stage = "test" if trainer.testing else "val"
        target = outputs["target"]
        right = (outputs["logits"].argmax(1) == target).float()
        of_sentences = (target == IS_NEXT) | (target == NOT_NEXT)
        parts = {"masked_accuracy": right[~of_sentences]}
        if len(found := right[of_sentences]):
            parts["next_sentence_accuracy"] = found
        for name, part in parts.items():
            pl_module.log(
                f"{stage}/{name}",
                part.mean(),
                on_step=False,
                on_epoch=True,
                batch_size=len(part),  # by which Lightning weighs the batches
                sync_dist=True,
                logger=stage == "val",  # the step of a test is the checkpoint's, see LitModel
            )

    on_test_batch_end = on_validation_batch_end
