"""A table of corrected sentences."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger

from core.files import atomic_write
from datamodules.text.grammar import GrammarDataModule
from metrics.edits import apply_edits
from metrics.m2 import M2Sentence

if TYPE_CHECKING:  # a quarter of a second of imports, for grammar alone
    import pandas as pd

_SHOWN = 100  # rows on W&B


class CorrectionTable(Callback):
    """Write ``corrections.csv`` after validation and ``corrections_test.csv`` after a test.

    A row is a sentence, what the network made of it, and what people made of it. The first rows are
    a table on W&B as well, ``tables/corrections``. Other data than a :class:`GrammarDataModule` are
    left alone.
    """

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.write(trainer, "corrections")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.write(trainer, "corrections_test")

    def write(self, trainer: Trainer, name: str) -> None:
        data, folder = trainer.datamodule, trainer.log_dir  # type: ignore[attr-defined]
        if not isinstance(data, GrammarDataModule) or folder is None or trainer.sanity_checking:
            return
        if not trainer.is_global_zero:
            return
        rows = corrections(data.examples, data.corrected)
        with atomic_write(Path(folder) / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
            rows.to_csv(file, index=False, lineterminator="\n")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table(f"tables/{name}", dataframe=rows.head(_SHOWN))


def corrections(examples: list[M2Sentence], corrected: Sequence[str | None]) -> "pd.DataFrame":
    """Columns ``source``, ``output``, and ``reference``, or ``reference0``, ... of several people.

    People who did not see a sentence have no correction of it, and neither has the network.
    """
    import pandas as pd

    people = sorted({person for example in examples for person in example.edits})
    names = ["reference"] if len(people) == 1 else [f"reference{person}" for person in people]
    table = pd.DataFrame({"source": [e.source for e in examples], "output": corrected})
    for person, name in zip(people, names, strict=True):
        table[name] = [
            apply_edits(e.source, e.edits[person]) if person in e.edits else None for e in examples
        ]
    return table
