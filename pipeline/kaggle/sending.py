"""Sending a prediction file at most once, and waiting for its score."""

import hashlib
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime

from core import kaggle_client
from core.errors import UserError
from core.kaggle_client import KaggleError, Result
from pipeline.kaggle import ledger
from pipeline.kaggle.ledger import Record
from pipeline.kaggle.prediction_file import Prediction, mark

POLL_SECONDS = 10.0  # the official client's own shortest interval
WAIT_SECONDS = 1800.0  # a score comes in a minute or two
SETTLE_SECONDS = 120.0  # a request without an answer may still be at work; beyond TIMEOUT
SEEK = "the same command again looks at Kaggle before it sends anything."


def sent_before(prediction: Prediction, wait: bool) -> Record | None:
    """Return the submission of these bytes to go on with, or what may have become one.

    Raises:
        UserError: Kaggle has them, and there is no score to wait for.
    """
    sent = ledger.last_sent(prediction.sha256, prediction.competition)
    if sent and sent.ref and not (wait and sent.status == "PENDING"):
        raise UserError(
            f"these bytes went to {sent.competition} on {sent.minute} as submission {sent.ref} "
            f"({sent.public_score or sent.status}); add --again to send them a second time."
        )
    return sent


def send(
    api: "kaggle_client.KaggleApi", prediction: Prediction, message: str, again: bool, wait: bool
) -> Record:
    """Send a file, unless Kaggle has it from before; ``again`` sends it whatever there is.

    Raises:
        UserError: Kaggle has these bytes, does not take them, or does not say whether it has them.
    """
    with ledger.sending():
        sent = None if again else sent_before(prediction, wait)
        if sent and not sent.ref:
            sent = find_unconfirmed(api, sent)
        return sent or submit_file(api, prediction, message)


def find_unconfirmed(api: "kaggle_client.KaggleApi", record: Record) -> Record | None:
    """Return the submission that an attempt without an answer has left at Kaggle, if it has.

    Raises:
        UserError: Kaggle does not hand out its list of submissions.
    """
    age = datetime.now().astimezone() - datetime.fromisoformat(record.time).astimezone()
    late = min(max(SETTLE_SECONDS - age.total_seconds(), 0.0), SETTLE_SECONDS)
    end = time.monotonic() + late
    print(
        f"The attempt of {record.minute} ended without an answer: looking for it among Kaggle's "
        f"submissions, for {late:.0f} s as it may come late.",
        flush=True,
    )
    while True:
        left = end - time.monotonic()
        try:
            found = match_submission(record, kaggle_client.results(api, record.competition))
        except KaggleError as error:
            raise UserError(
                "nothing was sent: Kaggle may have these bytes from before, and its list of "
                f"submissions is not to be had ({error.said}); run the same command again in a few "
                "minutes, or add --again to send them nevertheless."
            ) from None
        if found or left <= 0:
            return found
        time.sleep(min(POLL_SECONDS, left))


def match_submission(record: Record, results: Iterable[Result]) -> Record | None:
    """Find an unclear submission among Kaggle's by the digest in its message, and record it."""
    known = {record.ref for record in ledger.read()}
    marked = (x for x in results if mark(record.sha256) in x.message)
    found = next((x for x in marked if str(x.ref) not in known), None)
    if found is None:
        return None
    print(f"Kaggle has it as submission {found.ref}; it was not sent again.")
    return record_result(replace(record, ref=str(found.ref)), found)


def submit_file(api: "kaggle_client.KaggleApi", prediction: Prediction, message: str) -> Record:
    """Upload the file and make a submission of it, of which the list knows before Kaggle does."""
    content = prediction.path.read_bytes()
    if hashlib.sha256(content).hexdigest() != prediction.sha256:
        raise UserError(f"{prediction.path} has just been changed; run the same command again.")
    token = kaggle_client.upload(api, content, prediction.path, prediction.competition)
    record = Record(
        time=datetime.now().astimezone().isoformat(timespec="milliseconds"),
        run=prediction.run,
        competition=prediction.competition,
        ref="",
        status=ledger.UNCLEAR,
        public_score="",
        val_accuracy="" if prediction.val_accuracy is None else f"{prediction.val_accuracy:.4f}",
        file=str(prediction.path),
        sha256=prediction.sha256,
        message=message,
    )
    earlier = ledger.last_sent(record.sha256, record.competition)
    ledger.append(record)
    try:
        ref = kaggle_client.create(api, token, message, prediction.competition)
    except KaggleError as error:
        if error.refused:
            if earlier and not earlier.ref:  # --again: that one may still be at Kaggle
                ledger.append(earlier)
            else:
                ledger.append(replace(record, status=ledger.UNSENT))
            raise
        raise UserError(f"Kaggle may have made a submission or not: {error.said}; {SEEK}") from None
    except KeyboardInterrupt:
        print(f"Kaggle may have made a submission or not; {SEEK}", file=sys.stderr)
        raise
    print(f"Sent: Kaggle calls it submission {ref}.")  # before anything else can go wrong
    record = replace(record, ref=str(ref), status="PENDING")
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
        UserError: Kaggle could not score the file, or takes longer than ``WAIT_SECONDS``.
    """
    print("Waiting for the score. Ctrl-C is safe: python submit.py --list shows it later.")
    ref, end = int(record.ref), time.monotonic() + WAIT_SECONDS
    while record.status == "PENDING":
        left = end - time.monotonic()
        result = kaggle_client.persistently(lambda: kaggle_client.result(api, ref), left)
        if result.status != "PENDING":
            record = record_result(record, result)
        elif left < POLL_SECONDS:
            raise UserError(
                f"Kaggle has not scored submission {ref} in {WAIT_SECONDS / 60:.0f} minutes; go on "
                "with the same command, or see python submit.py --list later."
            )
        else:
            time.sleep(POLL_SECONDS)
    if record.status == "ERROR":
        raise UserError(f"Kaggle could not score submission {record.ref}: {record.error}")
    compared = f"; validation accuracy was {record.val_accuracy}" if record.val_accuracy else ""
    print(f"Public score {record.public_score}{compared}.")


def record_result(record: Record, result: Result) -> Record:
    """Put Kaggle's verdict into the files and onto the W&B run."""
    record = replace(
        record, status=result.status, public_score=result.public_score, error=result.error
    )
    ledger.save(record)
    if record.status == "COMPLETE":
        ledger.log_to_wandb(record)
    return record


def refresh(records: list[Record]) -> list[Record]:
    """Ask Kaggle for what is still out; without Kaggle, what is known stands."""
    waiting = [record for record in records if record.status in ("PENDING", ledger.UNCLEAR)]
    if not waiting:
        return records
    try:
        api = kaggle_client.authenticate()
        for record in waiting:
            if not record.ref:
                match_submission(record, kaggle_client.results(api, record.competition))
            elif (result := kaggle_client.result(api, int(record.ref))).status != "PENDING":
                record_result(record, result)
    except UserError as error:
        print(f"note: scores still out were not fetched: {error}")
    return ledger.read()
