"""Check a prediction file, send it to Kaggle and bring the score back.

examples:
  python submit.py runs/cifar10_cpu/first --dry_run   every check; no account, no network
  python submit.py runs/cifar10_cpu/first --wait      send submission.csv, wait for the score
  python submit.py mine.csv --competition cifar-10 --sample data/kaggle-cifar10/sampleSubmission.csv
  python submit.py --list                             all scores beside their validation accuracy
"""

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rich.bar import Bar
from rich.console import Console
from rich.table import Table

from core import kaggle_client, sample_file
from core.errors import exit_on_user_error, visible
from pipeline.kaggle import ledger, sending
from pipeline.kaggle.checks import check_submission
from pipeline.kaggle.ledger import Record
from pipeline.kaggle.prediction_file import Prediction, find_csv, read_prediction


def main(args: list[str] | None = None) -> None:
    args = sys.argv[1:] if args is None else args
    with exit_on_user_error(debug="--debug" in args):
        try:
            run(make_parser().parse_args(args))
        except KeyboardInterrupt:  # nothing is lost
            raise SystemExit(130) from None  # as a shell reports a program ended by Ctrl-C


def run(options: argparse.Namespace) -> None:
    """Check a file and send it, or list what was sent."""
    if options.list:
        show_records(sending.refresh(ledger.read()))
        return
    path = find_csv(options.run_or_csv)
    prediction = read_prediction(path, options.competition, options.sample, options.dry_run)
    message = prediction.describe(options.message)
    table = check_submission(prediction.path, prediction.sample, prediction.labels)
    show(prediction, table, message)

    if not options.again:
        sending.sent_before(prediction, options.wait)
    if options.dry_run:
        print("All checks passed; nothing was sent.")
        return
    api = kaggle_client.authenticate()
    record = sending.send(api, prediction, message, options.again, options.wait)
    if options.wait:
        sending.wait_for_score(api, record)
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
        "--competition",
        metavar="NAME",
        help="Kaggle's name or its address; default: the one predict.py recorded",
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
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    return parser


def show(prediction: Prediction, table: sample_file.Table, message: str) -> None:
    """Print what the file holds, what is known of its making, and the command that sends it."""
    path = prediction.path
    print(f"{path}: {len(table.ids)} rows for {prediction.competition}")
    if not prediction.members:
        print("note: predict.py did not make this file: its validation accuracy is not known.")
    if prediction.labels is None:
        print(f"note: of its labels only the type is checked, that of {prediction.sample}.")
    for member in prediction.members:
        print(member)
    if prediction.all_folds:
        print(prediction.all_folds)
    fractions = any(map(sample_file.is_fraction, table.labels))
    content = ranges(table) if fractions else histogram(table, prediction.labels or ())
    Console(markup=False, highlight=False).print(content)
    command = ["kaggle", "competitions", "submit", "-c", prediction.competition, "-f", str(path)]
    print(f"The same by hand: {shlex.join([*command, '-m', message])}")


def histogram(table: sample_file.Table, labels: Sequence[str]) -> Table:
    """Count each label; a class that is never predicted should be seen."""
    counts = dict.fromkeys(labels, 0) | Counter(table.labels)
    shown = Table("label", "rows", "share", "", box=None)
    for label, count in sorted(counts.items()):
        bar = Bar(max(counts.values()), 0, count, width=30)
        shown.add_row(label, str(count), f"{count / len(table.ids):.1%}", bar)
    return shown


def ranges(table: sample_file.Table) -> Table:
    """Return range and mean of each column of numbers."""
    shown = Table("column", "lowest", "mean", "highest", box=None)
    for name, column in zip(table.header[1:], table.columns, strict=True):
        with suppress(ValueError):  # of texts
            values = list(map(float, column))
            mean = sum(values) / len(values)
            shown.add_row(name, *(f"{x:.4f}" for x in (min(values), mean, max(values))))
    return shown


# ---- the list of all


def show_records(records: list[Record]) -> None:
    if not records:
        print("Nothing was sent yet.")
        return
    table = Table(box=None)
    for name in ("sent", "run or file", "competition", "ref", "validation", "public", "status"):
        table.add_column(name, overflow="fold", no_wrap=name not in ("run or file", "status"))
    for record in records:
        folds = " out-of-fold" if record.val_accuracy and " + " in record.run else ""
        cells = (
            record.minute,
            record.run or record.file,
            record.competition,
            record.ref,
            record.val_accuracy + folds,  # of other ensembles it is not known
            record.public_score,
            f"{record.status} {record.error}".strip(),
        )
        table.add_row(*map(visible, cells))
    Console(markup=False, highlight=False).print(table)


if __name__ == "__main__":
    main()
