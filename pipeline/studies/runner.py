"""The points of a study as processes, as many at a time as the machine takes."""

import io
import os
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import closing, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.files import make_folder
from core.runs import ROOT, Run
from pipeline.studies.grid import Point, PointRecord, Study

_POLL = 0.2  # seconds between two looks at the running jobs
_GRACE = 10  # seconds that jobs have to end when they are asked to


@dataclass(frozen=True)
class Job:
    """A run of a study: ``train.py`` with ``arguments``, whose output goes to ``log``."""

    point: Point
    arguments: list[str]
    environment: dict[str, str]
    record: dict[str, Any]  # content of point.json
    run: Run

    @classmethod
    def of(cls, study: Study, point: Point, flags: list[str]) -> "Job":
        arguments = study.arguments(point, flags)
        run = Run(_root_of(study, flags) / study.name / study.name_of(point))
        record = study.record(arguments)
        return cls(point, ["fit", *arguments], study.environment, record, run)

    @property
    def name(self) -> str:
        return self.run.folder.name

    @property
    def log(self) -> Path:
        return self.run.folder.parent / "logs" / f"{self.name}.txt"

    def is_finished(self) -> bool:
        """Tell whether the run is done, by whomever.

        Raises:
            UserError: It was trained with other settings.
        """
        return PointRecord(self.run.folder).is_finished(self.record)

    def start(self, gpu: str | None) -> subprocess.Popen[bytes]:
        """Start the process, on a GPU of its own if one is given."""
        own_gpu = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        make_folder(self.log.parent)
        with self.log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "train.py", *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | self.environment | own_gpu,
            )

    def failure(self, code: int) -> str:
        """Say why an ended process has not finished the run; empty if it has."""
        try:
            if self.is_finished():
                return ""
        except UserError as error:
            return str(error)
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines()]
        lines = [line for line in lines if line.startswith("error: ")] or [x for x in lines if x]
        return lines[-1].removeprefix("error: ") if lines and code >= 0 else f"ended with {code}"


def run(study: Study, jobs: int | None, flags: list[str], where: Point) -> None:
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
    points = [point for point in study.points if where.items() <= point.items()]
    every = [Job.of(study, point, flags) for point in points]
    left = [job for job in every if not job.is_finished()]
    if left:
        _check_settings(left)
    failed: dict[str, str] = {}
    with closing(_train(left, jobs)) as ended:
        for number, (job, code, seconds) in enumerate(ended, 1):
            reason = job.failure(code)
            if reason:
                failed[job.name] = reason
            said = f" FAILED: {reason}" if reason else _reached(study, job.run)
            line = f"{number} of {len(left)}: {job.name}{said} ({seconds:.0f} s)"
            print(line, file=sys.stderr, flush=True)
    print(f"{len(every) - len(failed)} of {len(every)} runs of {study.name} are finished.")
    if failed:
        name, reason = next(iter(failed.items()))
        raise UserError(
            f"{len(failed)} of {len(every)} runs failed, the first is {name} ({reason}); what they "
            f"printed is in {every[0].log.parent}, and the same command tries them again."
        )
    root = _root_of(study, flags)
    elsewhere = "" if root == ROOT else f" --root {root}"
    print(f"Next: python study.py report {study.path}{elsewhere}")


def _train(waiting: list[Job], jobs: int | None) -> Generator[tuple[Job, int, float], None, None]:
    """Run jobs; yield each that has ended, with its exit code and seconds.

    An interruption ends those that are running.
    """
    gpus = _visible_gpus() if waiting else []
    slots = range(jobs or len(gpus) or min(4, os.cpu_count() or 1))
    running: dict[int, tuple[Job, float, subprocess.Popen[bytes]]] = {}
    waiting = list(waiting)
    if waiting:
        folder = waiting[0].log.parent
        print(f"{len(waiting)} runs to train; their output: {folder}", file=sys.stderr, flush=True)
    try:
        while waiting or running:
            for slot in slots:
                if slot in running and (code := running[slot][2].poll()) is not None:
                    job, start, _ = running.pop(slot)
                    yield job, code, time.monotonic() - start
                if slot not in running and waiting:
                    job = waiting.pop(0)
                    process = job.start(gpus[slot % len(gpus)] if len(gpus) > 1 else None)
                    running[slot] = job, time.monotonic(), process
            time.sleep(_POLL)
    finally:
        _end([process for _, _, process in running.values()])


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _GRACE
    for process in processes:
        try:
            process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _root_of(study: Study, flags: list[str]) -> Path:
    """The folder of all runs: what is typed last wins."""
    name = "--trainer.default_root_dir="
    named = [f.removeprefix(name) for f in (*study.template, *flags) if f.startswith(name)]
    return Path(named[-1]) if named else ROOT


def _check_settings(jobs: list[Job]) -> None:
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
            with redirect_stdout(io.StringIO()):
                cli.run([*job.arguments, "--print_config"])
        except SystemExit as stop:
            if stop.code:
                raise


def _visible_gpus() -> list[str]:
    """Values of CUDA_VISIBLE_DEVICES that each show a process one of the GPUs that we see."""
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(number) for number in range(count)]


def _reached(study: Study, run: Run) -> str:
    """The study's metric at the end of a finished run, as the end of a line."""
    from pipeline.studies import metrics  # seconds of imports

    value = metrics.last_value(run.folder, study.metric) if study.metric else None
    return "" if value is None else f": {study.metric} {value:.4f}"
