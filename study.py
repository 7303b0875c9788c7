"""Run a study, report on it, compare runs:  python study.py run configs/studies/NAME.yaml"""

import argparse
import re
import signal
import sys
from pathlib import Path
from typing import Any

from core.errors import UserError, exit_on_user_error
from core.runs import ROOT
from pipeline.studies.grid import Study
from pipeline.studies.runner import run

_SETTING = re.compile(r"--[\w.]+\+?=")  # what is handed on to train.py


def _add_run(commands: Any) -> None:
    runner = commands.add_parser(
        "run",
        help="run the grid of a study on this machine",
        description="Run every point of a study that is not finished, a process for each run. An "
        "interrupted study goes on with the same command.",
        epilog="Settings of train.py can follow: --data.data_dir=DIR, --trainer.accelerator=cpu, "
        "... The same file spread over many machines: wandb sweep STUDY, then wandb agent there.",
        allow_abbrev=False,
    )
    runner.add_argument("study", metavar="STUDY", help="configs/studies/NAME.yaml")
    runner.add_argument(
        "--jobs", type=int, metavar="N", help="runs at a time (default: one a GPU; without, 4)"
    )
    runner.add_argument(
        "--where", nargs="+", default=[], metavar="PARAMETER=VALUE", help="only these points"
    )


def _add_report(commands: Any) -> None:
    reporter = commands.add_parser(
        "report",
        help="table and picture of a study",
        description="Make the table (mean, sd, n, 95 % interval) and the picture of a study: "
        "points with error bars, or with --x step curves with bands of one standard deviation.",
        allow_abbrev=False,
    )
    reporter.add_argument("study", metavar="STUDY", help="configs/studies/NAME.yaml")
    reporter.add_argument(
        "--y", metavar="METRIC", help="reported at its end (default: the study's metric)"
    )
    reporter.add_argument(
        "--x", metavar="PARAMETER", help="parameter, or step (default: the first)"
    )
    reporter.add_argument("--hue", metavar="PARAMETER", help="a colour for each of its values")
    reporter.add_argument(
        "--where", nargs="+", default=[], metavar="PARAMETER=VALUE", help="only these runs"
    )
    level = reporter.add_mutually_exclusive_group()
    for name in ("below", "above"):
        text = f"instead of the metric: optimizer steps until it is {name} this"
        level.add_argument(f"--{name}", type=float, metavar="LEVEL", help=text)
    reporter.add_argument(
        "--window",
        type=int,
        default=100,
        metavar="N",
        help="train/... is the mean of so many steps (default: 100)",
    )
    reporter.add_argument("--root", default=str(ROOT), help="folder of all runs (default: runs)")
    reporter.add_argument(
        "--sweep", metavar="ENTITY/PROJECT/ID", help="read the runs of a sweep on the W&B server"
    )
    reporter.add_argument("--html", action="store_true", help="write a page of it as well")
    reporter.add_argument(
        "--output", type=Path, metavar="FOLDER", help="default: runs/STUDY/report"
    )


def _add_page(commands: Any) -> None:
    pager = commands.add_parser(
        "page",
        help="one HTML file of a run, or of several side by side",
        description="Write all that a run has left into one HTML file that needs no network: the "
        "result with its interval, settings, curves, spikes, mistakes, score. Of several runs: "
        "what differs, and whether that is more than the noise of the seeds.",
        allow_abbrev=False,
    )
    pager.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    pager.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="default: page.html in the run, or in comparison/ of the last one",
    )


def parse(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="study.py", description="Many runs that answer one question.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_run(commands)
    _add_report(commands)
    _add_page(commands)
    for command in (parser, *commands.choices.values()):
        command.add_argument(
            "--debug",
            action="store_true",
            default=argparse.SUPPRESS,
            help="show the traceback of a mistake",
        )
    options, flags = parser.parse_known_args(args)
    if unknown := [f for f in flags if options.command != "run" or not _SETTING.match(f)]:
        raise UserError(
            f"unknown argument {unknown[0]}; see study.py {options.command} --help"
            f"{', and write settings as --NAME=VALUE' if options.command == 'run' else ''}."
        )
    for name in ("jobs", "window"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}.")
    return options, flags


def main(args: list[str] | None = None) -> None:
    args = sys.argv[1:] if args is None else args
    with exit_on_user_error(debug="--debug" in args):
        options, flags = parse(args)
        if options.command == "run":
            try:
                study = Study.load(options.study)
                run(study, options.jobs, flags, study.where(options.where))
            except KeyboardInterrupt:
                raise UserError("interrupted; the same command goes on with the study.") from None
        elif options.command == "page":
            from pipeline.page.several import page  # seconds of imports

            page(options)
        else:
            from pipeline.studies.report import report  # likewise

            report(options)


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # it takes the jobs along
    main()
