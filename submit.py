"""Check a prediction file, send it to Kaggle and bring the score back.

examples:
  python submit.py runs/cifar10_cpu/first --dry_run   every check; no account, no network
  python submit.py runs/cifar10_cpu/first --wait      send submission.csv, wait for the score
  python submit.py mine.csv --competition cifar-10 --sample data/kaggle-cifar10/sampleSubmission.csv
  python submit.py --list                             all scores beside their validation accuracy
"""

import argparse
import codecs
import json
import math
import shlex
import time
from collections import Counter
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.bar import Bar
from rich.console import Console
from rich.table import Table

import kaggle_client
import ledger
import submission
from errors import UserError, told_in_one_sentence
from files import sha256
from ledger import Record
from runs import Run

POLL_SECONDS = 10.0  # the official client's own shortest interval
PENDING = kaggle_client.Result("PENDING", "", "")  # so is a submission that is not listed yet


@dataclass(frozen=True)
class Member:
    """A run whose predictions went into the file; accuracy is a fraction of validation samples."""

    run: str
    val_accuracy: float | None
    val_samples: int

    def __str__(self) -> str:
        if self.val_accuracy is None:
            return f"{self.run}: no validation part"
        low, high = wilson_interval(self.val_accuracy, self.val_samples)
        return (
            f"{self.run}: validation accuracy {self.val_accuracy:.2%} "
            f"(95% interval {low:.2%} to {high:.2%}, {self.val_samples} samples)"
        )


@dataclass(frozen=True)
class Prediction:
    """A prediction file, what it is for, and how it came about."""

    path: Path
    sha256: str
    competition: str
    sample: Path
    labels: list[str] | None  # None: a file that predict.py did not make
    members: list[Member]

    @property
    def run(self) -> str:
        """The folder of the run, or the folders of an ensemble."""
        return " + ".join(member.run for member in self.members)

    @property
    def val_accuracy(self) -> float | None:
        """Validation accuracy of the one run; that of an ensemble is not known."""
        return self.members[0].val_accuracy if len(self.members) == 1 else None

    @property
    def message(self) -> str:
        """What Kaggle shows beside the score, unless the user says something better."""
        accuracy = "" if self.val_accuracy is None else f", validation {self.val_accuracy:.4f}"
        return f"{self.run or self.path.name}{accuracy}, sha256 {self.sha256[:8]}"


@told_in_one_sentence()
def main(args: list[str] | None = None) -> None:
    options = make_parser().parse_args(args)
    if options.list:
        show_records(refresh(ledger.read()))
        return
    path = find_csv(options.run_or_csv)
    prediction = read_prediction(path, options.competition, options.sample, options.dry_run)
    message = options.message or prediction.message
    table = submission.check_submission(prediction.path, prediction.sample, prediction.labels)
    show(prediction, table, message)

    sent = None if options.again else ledger.last_sent(prediction.sha256, prediction.competition)
    if sent and not (options.wait and sent.status == "PENDING"):
        raise UserError(
            f"these bytes went to {sent.competition} on {sent.time} as submission {sent.ref} "
            f"({sent.public_score or sent.status}); add --again to send them a second time."
        )
    if options.dry_run:
        print("All checks passed; nothing was sent.")
        return
    api = kaggle_client.authenticate()
    record = sent or send(api, prediction, message)
    if options.wait:
        wait_for_score(api, record)
    else:
        print("See the score in a minute with: python submit.py --list")


def make_parser() -> argparse.ArgumentParser:
    summary, examples = (__doc__ or "").split("\n\n", 1)
    parser = argparse.ArgumentParser(
        prog="submit.py",
        description=summary,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "run_or_csv",
        nargs="?",
        metavar="RUN_OR_CSV",
        help="run folder that holds submission.csv, or a .csv file",
    )
    what.add_argument(
        "--list", action="store_true", help="show all submissions, fetching scores still out"
    )
    parser.add_argument(
        "--competition", metavar="NAME", help="Kaggle's name; default: the one predict.py recorded"
    )
    parser.add_argument(
        "--sample",
        metavar="FILE",
        type=Path,
        help="the competition's sample file; default: the one predict.py recorded",
    )
    parser.add_argument(
        "--message", metavar="TEXT", help="description on Kaggle; default: run and validation"
    )
    parser.add_argument("--dry_run", action="store_true", help="check everything, send nothing")
    parser.add_argument("--wait", action="store_true", help="wait until the score is there")
    parser.add_argument("--again", action="store_true", help="send bytes that were sent before")
    return parser


# ---- what is to be sent


def find_csv(run_or_csv: str) -> Path:
    if run_or_csv.endswith(".csv"):
        return Path(run_or_csv)
    path = Run.find(run_or_csv).folder / "submission.csv"
    table = path.with_name(submission.FileTable.filename)
    if not path.is_file() and table.is_file():
        return table
    if not path.is_file():
        raise UserError(
            f"{path.parent} has no {path.name}; make it: python predict.py {path.parent}"
        )
    return path


def read_prediction(
    path: Path, competition: str | None, sample: Path | None, dry_run: bool = False
) -> Prediction:
    """The file with what ``predict.py`` wrote beside it; what the user says goes first.

    Raises:
        UserError: The file is missing, is not the one that was recorded, or it is not known which
            competition and sample file it belongs to.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; make it with predict.py, or name another file.")
    digest = sha256(path)
    origin = path.with_suffix(".json")
    labels: list[str] | None = None
    members: list[Member] = []
    if origin.is_file():
        try:
            made: dict[str, Any] = json.loads(origin.read_text())
            recorded, labels = made["sha256"], made["labels"]
            sendable = made.get("sendable", True)
            competition = competition or made["competition"]
            sample = sample or (Path(made["sample"]) if made["sample"] else None)
            members = [
                Member(run["run"], run["validation_accuracy"], run["validation_samples"])
                for run in made["runs"]
            ]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{origin} is not whole; run predict.py again.") from None
        if not sendable:
            raise UserError(
                f"{path} is a table of photos and their labels, which no competition asks for; "
                "submit.py sends the predictions for a competition's own data set."
            )
        if digest != recorded:
            raise UserError(
                f"{path} is not the file that {origin} records, its SHA-256 differs; "
                "run predict.py again, or rename the file to send it as your own."
            )
    if competition is None and dry_run:
        competition = "COMPETITION"  # a name to fill in: nothing is sent
    if competition is None or sample is None:
        raise UserError(
            f"{path} is not recorded as made for a competition; "
            "say which with --competition NAME and --sample FILE."
        )
    if not sample.is_file():
        raise UserError(f"{sample} does not exist; name the competition's file: --sample FILE.")
    return Prediction(path, digest, competition, sample, labels, members)


def show(prediction: Prediction, table: submission.Table, message: str) -> None:
    """What the file holds, what is known of its making, and the command that sends it."""
    path = prediction.path
    counts = Counter(table.labels)
    for label in prediction.labels or []:
        counts.setdefault(label, 0)  # a class that is never predicted should be seen
    print(f"{path}: {len(table.ids)} rows for {prediction.competition}")
    for note in oddities(path):
        print(f"note: {note}")
    if prediction.labels is None:
        print(
            "note: predict.py did not make this file: "
            "its labels are not checked and its validation accuracy is not known."
        )
    for member in prediction.members:
        print(member)
    histogram = Table("label", "rows", "share", "", box=None)
    for label, count in sorted(counts.items()):
        bar = Bar(max(counts.values()), 0, count, width=30)
        histogram.add_row(label, str(count), f"{count / len(table.ids):.1%}", bar)
    Console(markup=False, highlight=False).print(histogram)
    command = ["kaggle", "competitions", "submit", "-c", prediction.competition, "-f", str(path)]
    print(f"The same by hand: {shlex.join([*command, '-m', message])}")


def oddities(path: Path) -> list[str]:
    """What is unusual about the bytes of a file, though Kaggle takes it."""
    text = path.read_bytes()
    notes = []
    if text.startswith(codecs.BOM_UTF8):
        notes.append("the file starts with a byte-order mark, which is sent as it is.")
    if b"\r\n" in text:
        notes.append("the lines end in CRLF, as the course's own files do.")
    return notes


def wilson_interval(fraction: float, samples: int, z: float = 1.96) -> tuple[float, float]:
    """Interval for the probability behind an observed fraction (Wilson, JASA 22, 1927).

    Args:
        fraction: Observed share of successes.
        samples: How many were observed.
        z: Quantile of the normal distribution; 1.96 gives 95 %.
    """
    center = fraction + z**2 / (2 * samples)
    half = z * math.sqrt(fraction * (1 - fraction) / samples + (z / (2 * samples)) ** 2)
    scale = 1 + z**2 / samples
    return (center - half) / scale, (center + half) / scale


# ---- sending, and waiting for the score


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


# ---- the list of all


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


def show_records(records: list[Record]) -> None:
    if not records:
        print("Nothing was sent yet.")
        return
    table = Table(box=None)
    for name in ("sent", "run or file", "competition", "ref", "validation", "public", "status"):
        table.add_column(name, overflow="fold", no_wrap=name not in ("run or file", "status"))
    for record in records:
        table.add_row(
            record.time[:16].replace("T", " "),
            record.run or record.file,
            record.competition,
            record.ref,
            record.val_accuracy,
            record.public_score,
            f"{record.status} {record.error}".strip(),
        )
    Console(markup=False, highlight=False).print(table)


if __name__ == "__main__":
    main()
