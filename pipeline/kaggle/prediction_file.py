"""A prediction file, what it is for, and what is known of its making."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.file_table import FileTable
from core.files import sha256
from core.runs import Run
from core.submission import KNOWN_LABELS, Submission


@dataclass(frozen=True)
class EnsembleMember:
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
    labels: Sequence[str] | None  # None: nobody knows them
    members: list[EnsembleMember]
    all_folds: EnsembleMember | None = (
        None  # the members as one, on the samples that were out of fold
    )

    @property
    def run(self) -> str:
        """The folder of the run, or the folders of an ensemble."""
        return " + ".join(member.run for member in self.members)

    @property
    def val_accuracy(self) -> float | None:
        """Validation accuracy of the one run or of all folds; that of others is not known."""
        if self.all_folds:
            return self.all_folds.val_accuracy
        return self.members[0].val_accuracy if len(self.members) == 1 else None

    def describe(self, message: str | None) -> str:
        """Return what Kaggle shows beside the score: run and validation, or the user's message."""
        accuracy = "" if self.val_accuracy is None else f", validation {self.val_accuracy:.4f}"
        message = message or f"{self.run or self.path.name}{accuracy}"
        return message if mark(self.sha256) in message else f"{message}, {mark(self.sha256)}"


def mark(sha256: str) -> str:
    """Return the part of each message by which a submission is found again at Kaggle."""
    return f"sha256 {sha256[:8]}"


def find_csv(run_or_csv: str) -> Path:
    if run_or_csv.endswith(".csv"):
        return Path(run_or_csv)
    path = Run.find(run_or_csv).folder / Submission.filename
    table = path.with_name(FileTable.filename)
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
    """Read the record that ``predict.py`` wrote beside a file; what the user says goes first.

    Raises:
        UserError: The file is missing, is not the one that was recorded, or it is not known which
            competition and sample file it belongs to.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; make it with predict.py, or name another file.")
    digest = sha256(path)
    origin = path.with_suffix(".json")
    labels: Sequence[str] | None = None
    members: list[EnsembleMember] = []
    all_folds: EnsembleMember | None = None
    competition = competition_name(competition) if competition is not None else None
    if origin.is_file():
        made = _read_record(origin)
        labels = made["labels"]
        competition = competition or made["competition"]
        sample = sample or (Path(made["sample"]) if made["sample"] else None)
        members = [
            EnsembleMember(run["run"], run["validation_accuracy"], run["validation_samples"])
            for run in made["runs"]
        ]
        if found := made.get("out_of_fold"):
            all_folds = EnsembleMember("out of fold", found["accuracy"], found["samples"])
        if not made.get("sendable", True):
            raise UserError(
                f"{path} is a table of photos and their labels, which no competition asks for; "
                "submit.py sends the predictions for a competition's own data set."
            )
        if digest != made["sha256"]:
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
    labels = labels or KNOWN_LABELS.get(competition)
    if not sample.is_file():
        raise UserError(f"{sample} does not exist; name the competition's file: --sample FILE.")
    return Prediction(path, digest, competition, sample, labels, members, all_folds)


def competition_name(name_or_address: str) -> str:
    """Return the name of a competition, which may be given as the address of one of its pages.

    Raises:
        UserError: It is neither.
    """
    name = re.sub(r"(https?://)?(www\.)?kaggle\.com/(competitions|c)/", "", name_or_address)
    name = re.split(r"[/?#]", name)[0] if name != name_or_address else name
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise UserError(
            f"--competition {name_or_address!r} is no competition's name; give the last part of "
            "https://www.kaggle.com/competitions/NAME."
        )
    return name


def _read_record(path: Path) -> dict[str, Any]:
    """Read what ``predict.py`` recorded beside its predictions.

    Raises:
        UserError: Something is missing, of another type or out of range.
    """
    try:
        made = json.loads(path.read_text())
        texts = [made["sha256"], *made["labels"], *(run["run"] for run in made["runs"])]
        texts += [text for text in (made["competition"], made["sample"]) if text is not None]
        whole = all(isinstance(text, str) and "\0" not in text for text in texts)
        sendable = made.get("sendable", True)
        whole &= isinstance(made["labels"], list) and isinstance(made["runs"], list)
        whole &= isinstance(sendable, bool)
        measured = [(x["validation_accuracy"], x["validation_samples"]) for x in made["runs"]]
        if found := made.get("out_of_fold"):
            measured.append((found["accuracy"], found["samples"]))
        for accuracy, samples in measured:
            if sendable and accuracy is not None:
                whole &= type(samples) is int and samples > 0
                whole &= type(accuracy) is float and 0 <= accuracy <= 1
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise UserError(f"{path} is not whole; run predict.py again.")
    return made


def wilson_interval(fraction: float, samples: int) -> tuple[float, float]:
    """Return the 95 % interval (Wilson, 1927) of the probability that gave a share of samples."""
    from scipy.stats import binomtest  # takes a second

    low, high = binomtest(round(fraction * samples), samples).proportion_ci(method="wilson")
    return float(low), float(high)
