"""Run a study, report on it, compare runs:  python study.py run configs/studies/NAME.yaml"""

import argparse
import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed

from errors import UserError, told_in_one_sentence
from grid import Point, PointRecord, Study
from runs import ROOT, Run

SETTING = re.compile(r"--[\w.]+\+?=")  # what is handed on to train.py
POLL = 0.2  # seconds between two looks at the running jobs
GRACE = 10  # seconds that jobs have to end when they are asked to


@dataclass
class Job:
    """A run of a study: a process of its own, whose output goes to ``log``."""

    point: Point
    command: list[str]
    record: dict[str, Any]  # what point.json will say
    run: Run
    log: Path
    process: subprocess.Popen[bytes] | None = None
    bar: TaskID | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        return self.run.folder.name

    def start(self, gpu: str | None) -> None:
        """Start the process, on a GPU of its own if one is given."""
        own_gpu = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | own_gpu,
            )
        self.started = time.monotonic()

    def is_finished(self) -> bool:
        """Whether the run is done, by whomever.

        Raises:
            UserError: It was trained with other settings.
        """
        return PointRecord(self.run.folder).is_finished(self.record)

    def is_busy(self) -> bool:
        """Whether a process, ours or another's, is training this run."""
        if not self.run.folder.is_dir():
            return False
        try:
            with self.run.lock():
                return False
        except UserError:
            return True

    def doing(self) -> str:
        """How far it is, from the progress bar that it prints."""
        with self.log.open("rb") as output:
            output.seek(max(0, self.log.stat().st_size - 2000))
            bars = re.findall(r"Epoch (\d+):\s+(\d+)%", output.read().decode(errors="replace"))
        return f"epoch {bars[-1][0]}, {bars[-1][1]} %" if bars else "starting"

    def error(self) -> str:
        """The last thing it said: its own sentence, or the end of a traceback."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines()]
        said = [line for line in lines if line.startswith("error: ")] or [x for x in lines if x]
        code = self.process.returncode if self.process else None
        return said[-1].removeprefix("error: ") if said and code != -9 else f"ended with {code}"


def run(study: Study, jobs: int | None, flags: list[str], where: dict[str, Any]) -> None:
    """Run every point that is not finished, ``jobs`` at a time.

    Args:
        study: The study.
        jobs: Runs at a time; by default one for each GPU, or for each core up to 4.
        flags: Settings for every run.
        where: Only the points with these values.

    Raises:
        UserError: A run has been trained with other settings, or some runs failed.
    """
    for flag in flags:
        name = flag.partition("=")[0].removeprefix("--")
        if name in (*study.parameters, "run", "study"):
            raise UserError(f"--{name} is the study's to set; choose points with --where.")
    points = [p for p in study.points if all(p[key] == value for key, value in where.items())]
    every = [make_job(study, point, flags) for point in points]
    waiting = [job for job in every if not job.is_finished()]
    done = len(every) - len(waiting)
    if waiting:
        check_settings(waiting)
    gpus = visible_gpus() if waiting else []
    slots = jobs or len(gpus) or min(4, os.cpu_count() or 1)
    failed: dict[str, str] = {}
    with Display(len(every), done) as display, ended_with_us(slots) as running:
        while waiting or any(running):
            for slot, job in enumerate(running):
                if job is None:
                    if free := next_free(waiting, failed, display):
                        free.start(gpus[slot % len(gpus)] if len(gpus) > 1 else None)
                        running[slot] = free
                        display.show(free)
                elif job.process and job.process.poll() is not None:
                    running[slot] = None
                    if job.process.returncode and job.is_busy():  # another program was faster
                        display.hide(job)
                        waiting.append(job)
                    else:
                        conclude(study, job, failed, display)
            display.refresh([job for job in running if job])
            time.sleep(POLL)
    print(f"{len(every) - len(failed)} of {len(every)} runs of {study.name} are finished.")
    root = root_of(study, flags)
    if failed:
        name, reason = next(iter(failed.items()))
        raise UserError(
            f"{len(failed)} of {len(every)} runs failed, the first is {name} ({reason}); what they "
            f"printed is in {root / study.name / 'logs'}, and the same command tries them again."
        )
    elsewhere = "" if root == ROOT else f" --root {root}"
    print(f"Next: python study.py report {study.path}{elsewhere}")


def next_free(waiting: list[Job], failed: dict[str, str], display: "Display") -> Job | None:
    """The next run that nobody else is training; what others have finished is done."""
    for job in list(waiting):
        if job.is_busy():
            continue
        waiting.remove(job)
        try:
            if not job.is_finished():
                return job
            display.finish(job, f"{job.name}, by another program")
        except UserError as error:
            failed[job.name] = str(error)
            display.finish(job, f"{job.name} FAILED: {error}")
    return None


def conclude(study: Study, job: Job, failed: dict[str, str], display: "Display") -> None:
    """Say what became of a job whose process has ended."""
    try:
        finished = job.is_finished()
        reason = "" if finished else job.error()
    except UserError as error:
        finished, reason = False, str(error)
    if finished:
        display.finish(job, f"{job.name}{value_of(study, job.run)}")
    else:
        failed[job.name] = reason
        display.finish(job, f"{job.name} FAILED: {reason}")


def make_job(study: Study, point: Point, flags: list[str]) -> Job:
    name = study.name_of(point)
    command = study.command(point, flags)
    record = study.record(command[command.index("fit") + 1 :])
    folder = root_of(study, flags) / study.name
    return Job(point, command, record, Run(folder / name), folder / "logs" / f"{name}.txt")


def root_of(study: Study, flags: list[str]) -> Path:
    """The folder of all runs: what is typed last wins."""
    name = "--trainer.default_root_dir="
    named = [f.removeprefix(name) for f in (*study.template, *flags) if f.startswith(name)]
    return Path(named[-1]) if named else ROOT


def check_settings(jobs: list[Job]) -> None:
    """Let train.py read, but not run, a command with each value of each parameter.

    An unknown parameter is told in a second, and not by every run after its imports.
    """
    import train  # seconds of imports

    seen: set[tuple[str, str]] = set()
    for number, job in enumerate(jobs):
        values = {(k, str(v)) for k, v in job.point.items() if k != "seed_everything"}
        if number and values <= seen:
            continue
        seen |= values
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                train.main([*job.command[job.command.index("fit") :], "--print_config"])
        except SystemExit as stop:
            if stop.code:
                raise


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may say to show a process one of the GPUs that we see."""
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(number) for number in range(count)]


def value_of(study: Study, run: Run) -> str:
    """What a finished run has reached, for the display."""
    import study_report

    if study.metric is None:
        return ""
    value = study_report.last_value(run.folder, study.metric)
    return "" if value is None else f": {study.metric} {value:.4f}"


@contextlib.contextmanager
def ended_with_us(slots: int) -> Iterator[list[Job | None]]:
    """Slots for jobs, which end when this program is interrupted."""
    running: list[Job | None] = [None] * slots
    try:
        yield running
    finally:
        processes = [job.process for job in running if job and job.process]
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + GRACE
        for process in processes:
            try:
                process.wait(max(0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does."""

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Display:
    """A bar for the whole study and a line for every running job; bare lines without a terminal."""

    def __init__(self, total: int, done: int) -> None:
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),  # a value may be [6, 16]
            BarColumn(),
            MofNCompleteColumn(),
            Elapsed(),
            TextColumn("{task.fields[state]}"),
            console=Console(stderr=True),
        )
        self.whole = self.progress.add_task("runs", total=total, completed=done, state="")

    def __enter__(self) -> "Display":
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def show(self, job: Job) -> None:
        job.bar = self.progress.add_task(f"  {job.name}", total=None, state="starting")

    def hide(self, job: Job) -> None:
        if job.bar is not None:
            self.progress.remove_task(job.bar)
            job.bar = None

    def finish(self, job: Job, sentence: str) -> None:
        self.hide(job)
        self.progress.advance(self.whole)
        seconds = time.monotonic() - job.started
        line = f"{sentence} ({seconds:.0f} s)"
        self.progress.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def refresh(self, jobs: list[Job]) -> None:
        for job in jobs:
            if job.bar is not None:
                self.progress.update(job.bar, state=job.doing())


def add_run(commands: Any) -> None:
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


def add_report(commands: Any) -> None:
    reporter = commands.add_parser(
        "report",
        help="table and picture of a study",
        description="Make the table (mean, sd, n, 95 % interval) and the picture of a study: "
        "points with error bars, or with --x step curves with bands of one standard deviation.",
        allow_abbrev=False,
    )
    reporter.add_argument("study", metavar="STUDY", help="configs/studies/NAME.yaml")
    reporter.add_argument(
        "--y", metavar="METRIC", help="what is reported, at the end (default: the study's metric)"
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
        level.add_argument(
            f"--{name}",
            type=float,
            metavar="LEVEL",
            help=f"instead of the metric: optimizer steps until it is {name} this",
        )
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
    reporter.add_argument(
        "--output", type=Path, metavar="FOLDER", help="default: runs/STUDY/report"
    )


def add_compare(commands: Any) -> None:
    comparer = commands.add_parser(
        "compare",
        help="learning curves of any runs, side by side",
        description="Draw the learning curves of runs side by side, on the same axes.",
        allow_abbrev=False,
    )
    comparer.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    comparer.add_argument("--labels", nargs="+", metavar="LABEL", help="one for each run")
    comparer.add_argument("--root", default=str(ROOT), help="folder of all runs (default: runs)")
    comparer.add_argument("--output", type=Path, metavar="FILE", help="picture to write")


def parse(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="study.py", description="Many runs that answer one question.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_run(commands)
    add_report(commands)
    add_compare(commands)
    options, flags = parser.parse_known_args(args)
    if unknown := [f for f in flags if options.command != "run" or not SETTING.match(f)]:
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
    with told_in_one_sentence():
        options, flags = parse(sys.argv[1:] if args is None else args)
        if options.command == "run":
            try:
                with terminable():
                    study = Study.load(options.study)
                    run(study, options.jobs, flags, study.where(options.where))
            except KeyboardInterrupt:
                raise UserError("interrupted; the same command goes on with the study.") from None
        else:
            import study_report  # seconds of imports

            {"report": study_report.report, "compare": study_report.compare}[options.command](
                options
            )


if __name__ == "__main__":
    main()
