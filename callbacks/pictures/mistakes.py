"""The images a classifier is wrong about.

Dimensions: N images of the test, M mistakes, B batch, K classes, H height, W width, C channels.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor

from callbacks.pictures.base import PictureCallback
from core.files import atomic_write

if TYPE_CHECKING:  # not needed before the end of a test
    import pandas as pd

_COLUMNS = 5
_ID_LENGTH = 24  # characters of an id that fit below an image

Answers = list[Tensor]  # target, prediction and its probability, each (B,) or (N,)


class Mistakes(PictureCallback):
    """List all mistakes of ``test`` in ``mistakes.csv``, and draw the most confident ones.

    A row has the image's ``id`` (its file, or its number in the set, from 0 on), ``label``,
    ``prediction``, ``probability`` of the prediction and ``set``; the most confident come first, as
    in ``mistakes.png``. It needs an image set and test steps that return ``logits`` (B, K); other
    data it leaves alone.
    """

    count = 25  # mistakes to draw

    def __init__(self) -> None:
        self.answers: list[Answers] = []  # of each batch, kept on the device and not read there

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.answers = []

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: list[Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.images is not None:
            self.answers.append([batch[-1], *most_probable(outputs["logits"])])

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = self.images
        if data is None or not self.answers:
            return
        loader: Any = trainer.test_dataloaders
        numbers = torch.cat(list(loader.batch_indices())[: len(self.answers)])  # of this process
        mine = [torch.cat(column).cpu() for column in zip(*self.answers, strict=True)]
        parts = _of_all_ranks([numbers.cpu(), *mine], trainer.world_size)
        if not trainer.is_global_zero or self.folder is None:
            return
        columns = [torch.cat(column) for column in zip(*parts, strict=True)]
        rows, table = mistakes(columns, data.class_names, data.ids)
        with atomic_write(self.folder / "mistakes.csv", "w", encoding="utf-8") as file:
            table.to_csv(file, index=False, lineterminator="\n")
        images = data.splits["test"][0][rows[: self.count]]
        self.save(trainer, "mistakes", mistakes_sheet(images.numpy(), table, len(columns[0])))


def most_probable(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Predictions (B,) and their probability (B,) from logits (B, K)."""
    probability, preds = logits.float().softmax(1).max(1)
    return preds, probability.nan_to_num(0.0)  # a network that diverged is not confident


def _of_all_ranks(tensors: list[Tensor], world_size: int) -> list[list[Tensor]]:
    """Tensors (n, ...) of each process, n of any size."""
    if world_size == 1:
        return [tensors]
    parts: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(parts, tensors)
    return parts


def mistakes(
    columns: list[Tensor], class_names: Sequence[str], ids: Sequence[Any]
) -> tuple[Tensor, "pd.DataFrame"]:
    """Numbers (M,) of the mistaken images, the most confident first, and a row for each.

    Args:
        columns: Number of each image, its target, prediction, and the probability of that; (N,).
        class_names: Of the classes.
        ids: Of the images by number; where there are none, the number is the id.
    """
    import pandas as pd

    wrong = [column[columns[1] != columns[2]].numpy() for column in columns]
    numbers, target, preds, probability = (
        column[np.lexsort((wrong[0], -wrong[3]))] for column in wrong
    )
    table = pd.DataFrame(
        {
            "id": [ids[n] if ids else n for n in numbers],
            "label": [class_names[k] for k in target],
            "prediction": [class_names[k] for k in preds],
            "probability": probability.round(6),
            "set": "test",
        }
    )
    return torch.from_numpy(numbers), table


def mistakes_sheet(images: np.ndarray, table: "pd.DataFrame", samples: int) -> Figure:
    """Draw images uint8 (m, H, W, C), each under its row of the table of all M mistakes."""
    rows = max(1, -(-len(images) // _COLUMNS))
    figure = Figure(figsize=(1.8 * _COLUMNS, 2.5 * rows + 0.4), layout="constrained")
    count = f"{len(table):,} mistakes" if len(table) else "no mistakes"
    first = "the most confident of " if len(images) < len(table) else ""
    figure.suptitle(f"{first}{count} in {samples:,} images")
    grid = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    # the last row may not be full
    for axes, image, row in zip(grid, images, table.itertuples(), strict=False):
        axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        id = str(row.id)
        shown = id if len(id) <= _ID_LENGTH else f"…{id[1 - _ID_LENGTH :]}"
        caption = f"{row.probability:.1%} {row.prediction}\ntrue: {row.label}\n{shown}"
        axes.set_title(caption, fontsize="small")
    return figure
