"""The list of what was sent to Kaggle and what came back.

One list of all submissions, ``runs/submissions.csv``, that only grows: a row before a submission is
made, one when its reference is known, one with its score; of each, the last row counts.
``score.json`` lies beside each file that ``predict.py`` made; and the score is on the W&B run.
"""

import csv
import errno
import io
import json
import math
import os
from contextlib import AbstractContextManager
from dataclasses import asdict, astuple, dataclass, fields
from datetime import datetime
from pathlib import Path

from core import wandb_runs
from core.errors import UserError
from core.files import atomic_write, sha256
from core.locks import locked
from core.runs import ROOT, Run, is_file
from core.wandb_runs import Piece

LEDGER = ROOT / "submissions.csv"
UNCLEAR = "SENDING"  # nobody knows whether Kaggle made a submission of it
UNSENT = "UNSENT"  # Kaggle refused: it made none
_LOCK_SECONDS = 60.0  # far more than it takes to append a row


@dataclass(frozen=True)
class Record:
    """A submission as one row of ``runs/submissions.csv``, all of it text."""

    time: str
    run: str
    competition: str
    ref: str  # empty until Kaggle has named one
    status: str
    public_score: str
    val_accuracy: str
    file: str
    sha256: str
    message: str
    error: str = ""

    @property
    def minute(self) -> str:
        return self.time[:16].replace("T", " ")

    @property
    def key(self) -> tuple[str, ...]:
        return (self.ref,) if self.ref else (self.sha256, self.competition)

    def check(self) -> None:
        """Raise a ValueError or TypeError if it is no row of the list."""
        datetime.fromisoformat(self.time)
        if not (self.ref.isdecimal() if self.ref else self.status in (UNCLEAR, UNSENT)):
            raise ValueError(self.ref)


FIELDS = [field.name for field in fields(Record)]


def sending() -> AbstractContextManager[None]:
    """Keep other programs from sending, from the look into the list to the new row.

    Raises:
        UserError: Another one is at it.
    """
    busy = "another submit.py is sending from this folder; wait for it, then run this one again."
    return locked(ROOT / ".sending.lock", LEDGER, busy)


def read() -> list[Record]:
    """Read all submissions, oldest first, and what may have become one.

    Raises:
        UserError: The file cannot be read, or has been changed by hand into something else.
    """
    records: dict[tuple[str, ...], Record] = {}
    if not os.path.lexists(LEDGER):
        return []
    try:
        with LEDGER.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            rows = csv.reader(file, strict=True)
            if next(rows, FIELDS) != FIELDS:
                raise UserError(
                    f"{LEDGER} is not a list of submissions; move it away to start a new one."
                )
            for row in filter(None, rows):
                record = Record(*row)
                record.check()
                if record.status == UNSENT or record.key not in records:
                    records.pop((record.sha256, record.competition), None)  # it became this one
                if record.status != UNSENT:
                    records[record.key] = record
    except OSError as error:
        raise UserError(f"{LEDGER} cannot be read ({error.strerror}); mend it.") from None
    except UserError:
        raise
    except (TypeError, ValueError, csv.Error):
        raise UserError(
            f"{LEDGER}, line {rows.line_num}: not a submission; mend the row or remove it."
        ) from None
    return list(records.values())


def last_sent(sha256: str, competition: str) -> Record | None:
    """Return the last submission of the same bytes to the same competition, or what may be one."""
    key = (sha256, competition)
    same = [record for record in read() if (record.sha256, record.competition) == key]
    same = [record for record in same if record.ref] or same
    return same[-1] if same else None


def append(record: Record) -> None:
    """Add a row to the list, whole or not at all.

    Raises:
        UserError: The list cannot be written.
    """
    busy = f"another program writes {LEDGER} for a minute already; end it."
    try:
        with (
            locked(ROOT / ".submissions.lock", LEDGER, busy, _LOCK_SECONDS),
            LEDGER.open("a+b", buffering=0) as file,
        ):
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 1, 0))
            whole = file.read() in (b"", b"\n")  # an editor may have left out the last line's end
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerows([astuple(record)] if size else [FIELDS, astuple(record)])
            content = ("\n" * (not whole) + text.getvalue()).encode(errors="surrogateescape")
            try:  # one write at the end loses no row of others, even where there are no locks
                if file.write(content) < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise
    except OSError as error:
        raise UserError(
            f"{LEDGER} could not be written ({error.strerror or error}); free space or make it "
            "writable."
        ) from error


def save(record: Record) -> None:
    """Add the state of a submission to the list of all, and write it to the run."""
    append(record)
    path = Path(record.file)
    if path.with_suffix(".json").is_file():  # a file of the user's own gets nothing beside it
        numbers = {
            "ref": int(record.ref),
            "public_score": _as_number(record.public_score),
            "val_accuracy": _as_number(record.val_accuracy),
        }
        with atomic_write(path.with_name("score.json"), "w") as file:
            file.write(json.dumps(asdict(record) | numbers, indent=2) + "\n")


def _as_number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def log_to_wandb(record: Record) -> None:
    """Put reference and score onto the W&B run; an ensemble has no run of its own.

    Offline, W&B makes a second folder with the same run id, which a later sync merges.
    """
    run = Run(Path(record.run))
    if not record.run or run.wandb_id is None:
        return
    facts = {"kaggle/ref": int(record.ref), "kaggle/public_score": _as_number(record.public_score)}
    if wandb_run := wandb_runs.join(run, "the score is"):
        wandb_run.summary.update(facts)
        wandb_run.finish()
    path = Path(record.file)
    if is_file(path) and sha256(path) == record.sha256:  # not predicted anew meanwhile
        used = Piece("predictions", run.wandb_id, path)
        made = Piece("score", run.wandb_id, path.with_name("score.json"), metadata=facts)
        wandb_runs.record(run, "submit", [used], [made])
