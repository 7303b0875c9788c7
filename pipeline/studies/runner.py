"""The points of a study as processes, as many at a time as the machine takes."""

import contextlib
import io
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed

from core.errors import UserError
from core.files import make_folder
from core.runs import ROOT, Run
from pipeline.studies.grid import Point, PointRecord, Study

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
        make_folder(self.log.parent)
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
    from pipeline import cli  # seconds of imports

    seen: set[tuple[str, str]] = set()
    for number, job in enumerate(jobs):
        values = {(k, str(v)) for k, v in job.point.items() if k != "seed_everything"}
        if number and values <= seen:
            continue
        seen |= values
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                cli.run([*job.command[job.command.index("fit") :], "--print_config"])
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
    from pipeline.studies import metrics

    if study.metric is None:
        return ""
    value = metrics.last_value(run.folder, study.metric)
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
