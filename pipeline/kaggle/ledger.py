"""What was sent to Kaggle and what came back.

One list of all submissions, ``runs/submissions.csv``; ``score.json`` beside each file that
``predict.py`` made; and the score on the W&B run.
"""

import csv
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import yaml

from core.errors import UserError
from core.files import atomic_write
from core.runs import ROOT, Run

LEDGER = ROOT / "submissions.csv"


@dataclass(frozen=True)
class Record:
    """A submission as one row of ``runs/submissions.csv``, all of it text."""

    time: str
    run: str
    competition: str
    ref: str
    status: str
    public_score: str
    val_accuracy: str
    file: str
    sha256: str
    message: str
    error: str = ""


FIELDS = [field.name for field in fields(Record)]


def read() -> list[Record]:
    """All submissions, oldest first.

    Raises:
        UserError: The file has been changed by hand into something else.
    """
    if not LEDGER.is_file():
        return []
    with LEDGER.open(newline="") as file:
        rows = csv.DictReader(file)
        if rows.fieldnames != FIELDS:
            raise UserError(
                f"{LEDGER} is not a list of submissions; move it away to start a new one."
            )
        return [Record(**row) for row in rows]


def last_sent(sha256: str, competition: str) -> Record | None:
    """The last submission of the same bytes to the same competition."""
    key = (sha256, competition)
    same = [record for record in read() if (record.sha256, record.competition) == key]
    return same[-1] if same else None


def save(record: Record) -> None:
    """Write the submission into the list of all, in place of its former row, and to the run."""
    records = {known.ref: known for known in read()} | {record.ref: record}
    with atomic_write(LEDGER, "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(known) for known in records.values())
    path = Path(record.file)
    if path.with_suffix(".json").is_file():  # a file of the user's own gets nothing beside it
        numbers = {
            "ref": int(record.ref),
            "public_score": as_number(record.public_score),
            "val_accuracy": as_number(record.val_accuracy),
        }
        with atomic_write(path.with_name("score.json"), "w") as file:
            file.write(json.dumps(asdict(record) | numbers, indent=2) + "\n")


def as_number(text: str) -> float | None:
    return float(text) if text else None


def tell_wandb(record: Record) -> None:
    """Put reference and score onto the W&B run; an ensemble has no run of its own.

    Offline, W&B makes a second folder with the same run id, which a later sync merges.
    """
    run = Run(Path(record.run))
    if not record.run or run.wandb_id is None:
        return
    import wandb

    os.environ.setdefault("WANDB_MODE", "offline")
    try:
        with wandb.init(
            id=run.wandb_id,
            project=wandb_project(run),
            dir=run.folder,
            resume="allow",
            settings=wandb.Settings(console="off", silent=True),
        ) as wandb_run:
            score = as_number(record.public_score)
            wandb_run.summary.update({"kaggle/ref": int(record.ref), "kaggle/public_score": score})
    except wandb.Error as error:
        print(f"note: the score is not on the W&B run: {error}")


def wandb_project(run: Run) -> str | None:
    """Project of the run's W&B logger, without which a sync would not find the run again."""
    loggers = yaml.safe_load(run.config.read_text())["trainer"]["logger"]
    for logger in loggers if isinstance(loggers, list) else []:
        if logger["class_path"].endswith("WandbLogger"):
            return logger["init_args"]["project"]
    return None
