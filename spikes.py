"""Compare the spikes of finished runs:  python spikes.py runs/plain/1 runs/steady/1

Ask one of them why it spiked:  python spikes.py why runs/plain/1
"""

import argparse
import sys
from pathlib import Path

from core.errors import UserError, exit_on_user_error
from core.starting import start


def parse(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="spikes.py",
        description="Draw finished runs side by side and print how spiky they are.",
        epilog="Runs that differ in nothing but the seed belong together: those of equal label, or "
        "by default those of the same config. One of each is drawn; the others are in the table "
        "and in the picture of seeds.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--labels", nargs="+", metavar="LABEL", help="one for each run")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="default: comparison/ in the last run"
    )
    parser.add_argument(
        "--target",
        type=float,
        default=0.95,
        metavar="ACCURACY",
        help="validation accuracy from which on the task counts as learned (default: 0.95)",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    options = parser.parse_args(args)
    if not 0 < options.target <= 1:
        raise UserError(f"--target must be in (0, 1], got {options.target}.")
    return options


def parse_why(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="spikes.py why",
        description="Train a run again up to a spike, change one thing at a time, and say which "
        "change makes the spike go away.",
        epilog="What is found goes to why.json and why.png in the run folder; interrupted, the "
        "same command goes on.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("--step", type=int, help="optimizer step of the spike (default: the worst)")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="import whatever the run names: only for runs you trust",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    return parser.parse_args(args)


def main(args: list[str] | None = None) -> None:
    args = sys.argv[1:] if args is None else args
    with exit_on_user_error(debug="--debug" in args):
        asks_why = args[:1] == ["why"]
        options = parse_why(args[1:]) if asks_why else parse(args)
        start()
        if asks_why:
            from pipeline.why.command import why

            why(options)
        else:
            from pipeline.comparison import compare

            compare(options)


if __name__ == "__main__":
    main()
