"""Sending a prediction file, and waiting for its score."""

import time
from dataclasses import replace
from datetime import datetime

from rich.console import Console

from core import kaggle_client
from core.errors import UserError
from pipeline.kaggle import ledger
from pipeline.kaggle.ledger import Record
from pipeline.kaggle.prediction_file import Prediction

POLL_SECONDS = 10.0  # the official client's own shortest interval
PENDING = kaggle_client.Result("PENDING", "", "")  # so is a submission that is not listed yet


def send(api: "kaggle_client.KaggleApi", prediction: Prediction, message: str) -> Record:
    ref = kaggle_client.send(api, prediction.path, message, prediction.competition)
    print(f"Sent: Kaggle calls it submission {ref}.")  # before anything else can go wrong
    record = Record(
        time=datetime.now().isoformat(timespec="seconds"),
        run=prediction.run,
        competition=prediction.competition,
        ref=str(ref),
        status="PENDING",
        public_score="",
        val_accuracy="" if prediction.val_accuracy is None else f"{prediction.val_accuracy:.4f}",
        file=str(prediction.path),
        sha256=prediction.sha256,
        message=message,
    )
    try:
        ledger.save(record)
    except UserError as error:
        raise UserError(
            f"submission {ref} is at Kaggle, do not send it again; but {error}"
        ) from None
    return record


def wait_for_score(api: "kaggle_client.KaggleApi", record: Record) -> None:
    """Ask until Kaggle has scored the submission; Ctrl-C loses nothing.

    Raises:
        UserError: Kaggle could not score the file.
    """

    def ask() -> kaggle_client.Result:
        return kaggle_client.results(api, record.competition).get(int(record.ref), PENDING)

    print("Waiting for the score. Ctrl-C is safe: python submit.py --list shows it later.")
    try:
        with Console().status(f"Kaggle is scoring submission {record.ref}"):
            while (result := ask()).status == "PENDING":
                time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # as a shell reports a program ended by Ctrl-C
    record = settle(record, result)
    if record.status == "ERROR":
        raise UserError(f"Kaggle could not score submission {record.ref}: {record.error}")
    compared = f"; validation accuracy was {record.val_accuracy}" if record.val_accuracy else ""
    print(f"Public score {record.public_score}{compared}.")


def settle(record: Record, result: kaggle_client.Result) -> Record:
    """Put Kaggle's verdict into the files and onto the W&B run."""
    record = replace(
        record, status=result.status, public_score=result.public_score, error=result.error
    )
    ledger.save(record)
    if record.status == "COMPLETE":
        ledger.tell_wandb(record)
    return record


def refresh(records: list[Record]) -> list[Record]:
    """Ask Kaggle for the scores that are still out; without Kaggle, what is known stands."""
    pending = [record for record in records if record.status == "PENDING"]
    if not pending:
        return records
    competitions = {record.competition for record in pending}
    try:
        api = kaggle_client.authenticate()
        found = {name: kaggle_client.results(api, name) for name in competitions}
        for record in pending:
            result = found[record.competition].get(int(record.ref), PENDING)
            if result.status != "PENDING":
                settle(record, result)
    except UserError as error:
        print(f"note: scores still out were not fetched: {error}")
    return ledger.read()
