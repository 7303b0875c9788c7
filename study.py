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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed

from errors import UserError, told_in_one_sentence
from grid import Point, PointRecord, Study
from runs import ROOT, Run

SETTING = re.compile(r"--[\w.]+\+?=")  # what is handed on to train.py
POLL = 0.2  # seconds between two looks at the running jobs


@dataclass
class Job:
    """A run of a study: a process of its own, whose output goes to ``log``."""

    point: Point
    run: Run
    log: Path
    process: subprocess.Popen[bytes] | None = None
    bar: TaskID | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        return self.run.folder.name

    def start(self, command: list[str], slot: int, gpus: int) -> None:
        """Start the process; with several GPUs, each slot has one to itself."""
        own_gpu = {"CUDA_VISIBLE_DEVICES": str(slot % gpus)} if gpus > 1 else {}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | own_gpu,
            )
        self.started = time.monotonic()

    def end(self) -> None:
        """Ask the process to stop, and make sure that it does."""
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

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


def run(study: Study, jobs: int | None, flags: list[str]) -> None:
    """Run every point that is not finished, ``jobs`` at a time.

    Raises:
        UserError: A run has been trained with other settings, or some runs failed.
    """
    root = root_of(flags)
    folder = root / study.name
    every = [make_job(study, point, folder) for point in study.points]
    waiting = [job for job in every if not is_finished(study, job, flags)]
    done = len(every) - len(waiting)
    if waiting:
        check_settings(study, [job.point for job in waiting], flags)
    gpus = count_gpus() if waiting else 0
    slots = jobs or gpus or min(4, os.cpu_count() or 1)
    failed: dict[str, str] = {}
    console = Console(stderr=True)
    with Display(console, len(every), done) as display, ended_with_us(slots) as running:
        while waiting or any(running):
            for slot, job in enumerate(running):
                if job and job.process and job.process.poll() is not None:
                    running[slot] = None
                    if is_finished(study, job, flags):
                        display.finish(job, f"{job.name}{value_of(study, job.run)}")
                    elif job.process.returncode and job.is_busy():  # another program was faster
                        display.hide(job)
                        waiting.append(job)
                    else:
                        failed[job.name] = job.error()
                        display.finish(job, f"{job.name} FAILED: {failed[job.name]}")
                elif job is None and (free := next_free(study, waiting, flags, display)):
                    free.start(study.command(free.point, flags), slot, gpus)
                    running[slot] = free
                    display.show(free)
            display.refresh([job for job in running if job])
            time.sleep(POLL)
    print(f"{len(every) - len(failed)} of {len(every)} runs of {study.name} are finished.")
    if failed:
        name, reason = next(iter(failed.items()))
        raise UserError(
            f"{len(failed)} of {len(every)} runs failed, the first is {name} ({reason}); what they "
            f"printed is in {folder / 'logs'}, and the same command tries them again."
        )
    print(f"Next: python study.py report {study.path}")


def next_free(study: Study, waiting: list[Job], flags: list[str], display: "Display") -> Job | None:
    """The next run that nobody else is training; what others have finished is done."""
    for job in list(waiting):
        if job.is_busy():
            continue
        waiting.remove(job)
        if not is_finished(study, job, flags):
            return job
        display.finish(job, f"{job.name}, by another program")
    return None


def make_job(study: Study, point: Point, folder: Path) -> Job:
    name = study.name_of(point)
    return Job(point, Run(folder / name), folder / "logs" / f"{name}.txt")


def is_finished(study: Study, job: Job, flags: list[str]) -> bool:
    return PointRecord(job.run.folder).is_finished(study.settings(arguments(study, job, flags)))


def arguments(study: Study, job: Job, flags: list[str]) -> list[str]:
    command = study.command(job.point, flags)
    return command[command.index("fit") + 1 :]


def root_of(flags: Iterable[str]) -> Path:
    name = "--trainer.default_root_dir="
    return Path(next((f.removeprefix(name) for f in flags if f.startswith(name)), ROOT))


def check_settings(study: Study, points: list[Point], flags: list[str]) -> None:
    """Let train.py read, but not run, a command with each value of each parameter.

    An unknown parameter is told in a second, and not by every run after its imports.
    """
    import train  # seconds of imports

    seen: set[tuple[str, str]] = set()
    for point in points:
        values = {(k, str(v)) for k, v in point.items() if k != "seed_everything"}
        if values <= seen:
            continue
        seen |= values
        command = study.command(point, flags)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                train.main([*command[command.index("fit") :], "--print_config"])
        except SystemExit as stop:
            if stop.code:
                raise


def count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


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
        for job in running:
            if job:
                job.end()


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

    def __init__(self, console: Console, total: int, done: int) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            Elapsed(),
            TextColumn("{task.fields[state]}"),
            console=console,
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
        self.progress.console.print(f"{sentence} ({seconds:.0f} s)", highlight=False)

    def refresh(self, jobs: list[Job]) -> None:
        for job in jobs:
            if job.bar is not None:
                self.progress.update(job.bar, state=job.doing())


def parse(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="study.py", description="Many runs that answer one question.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
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
    reporter = commands.add_parser(
        "report",
        help="table and picture of a study",
        description="Make the table (mean, sd, n, 95 % interval) and the picture of a study: "
        "points with error bars, or with --x step curves with bands of one standard deviation.",
        allow_abbrev=False,
    )
    reporter.add_argument("study", metavar="STUDY", help="configs/studies/NAME.yaml")
    reporter.add_argument("--y", metavar="METRIC", help="default: the study's metric")
    reporter.add_argument(
        "--x", metavar="PARAMETER", help="parameter, or step (default: the first)"
    )
    reporter.add_argument("--hue", metavar="PARAMETER", help="a colour for each of its values")
    reporter.add_argument(
        "--where", nargs="+", default=[], metavar="PARAMETER=VALUE", help="only these runs"
    )
    reporter.add_argument(
        "--below",
        type=float,
        metavar="LEVEL",
        help="instead of the last value of the metric: optimizer steps until it is below this",
    )
    reporter.add_argument(
        "--window", type=int, default=100, metavar="N", help="mean of so many steps (default: 100)"
    )
    reporter.add_argument("--root", default=str(ROOT), help="folder of all runs (default: runs)")
    reporter.add_argument(
        "--sweep", metavar="ENTITY/PROJECT/ID", help="read the runs of a sweep on the W&B server"
    )
    reporter.add_argument(
        "--output", type=Path, metavar="FOLDER", help="default: runs/STUDY/report"
    )
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
    options, flags = parser.parse_known_args(args)
    if unknown := [f for f in flags if options.command != "run" or not SETTING.match(f)]:
        raise UserError(
            f"unknown argument {unknown[0]}; see study.py {options.command} --help"
            f"{', and write settings as --NAME=VALUE' if options.command == 'run' else ''}."
        )
    if options.command == "run" and options.jobs is not None and options.jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {options.jobs}.")
    return options, flags


def main(args: list[str] | None = None) -> None:
    with told_in_one_sentence():
        options, flags = parse(sys.argv[1:] if args is None else args)
        if options.command == "run":
            try:
                with terminable():
                    run(Study.load(options.study), options.jobs, flags)
            except KeyboardInterrupt:
                raise UserError("interrupted; the same command goes on with the study.") from None
        else:
            import study_report  # seconds of imports

            {"report": study_report.report, "compare": study_report.compare}[options.command](
                options
            )


if __name__ == "__main__":
    main()
