"""What only a GPU can show, in one command of at most twelve minutes, as a record file.

    python -m benchmarks.gpu_check gpu.jsonl --data_dir data --peer airbench94_muon.py
    python -m benchmarks.gpu_check cpu.jsonl --quick    # toys, on a CPU and without data

The speedrun as a whole command and hot, in bf16 and with a gradient scaler, in turns with
``airbench94_muon.py`` (see ``benchmarks.time_to_accuracy``; ``--peer`` is its file); a training
step of it in turns with what is left out of it or added; its operators, and the waits for the
device that CUDA's sync debug mode warns of; a Kaggle folder of 300,000 images predicted twice; two
processes, if there are two devices.

Ways of a part take turns, and each becomes a line of the record when the part ends: of every
measure all values, n, mean and standard deviation, and p of the difference from the first way
(Student's, paired by round). Begun again with the same record, a part that is in it is left out.
What fails is told, the rest goes on, and the exit status is 1. A part that may not end within
``--minutes`` is not begun.
"""

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import nn

from benchmarks import scaling
from benchmarks.predict_throughput import predict_twice
from benchmarks.recorded import RunRecord
from benchmarks.step_overhead import (
    Meter,
    RandomImages,
    Task,
    measure,
    raw_loop,
    steadyfit,
    usual_lightning,
)
from benchmarks.time_to_accuracy import HERE, Peer, cold, hot
from callbacks import Compile
from core.provenance import hardware, provenance
from lit_models.networks import WhitenedCNN
from pipeline.studies.metrics import difference
from pipeline.trainer import quiet_libraries

Way = Callable[[], dict[str, float]]  # of each measure its value

PEER_ONCE = """
import sys, tempfile
from pathlib import Path
sys.argv = sys.argv[1:]  # it reads the file that it takes itself for
from benchmarks.time_to_accuracy import Peer
with tempfile.TemporaryDirectory() as folder:
    print(Peer(Path(sys.argv[0]), sys.argv[1], Path(folder)).run()[1])
"""


class Part(NamedTuple):
    """Ways that take turns.

    Attributes:
        minutes: What they may take on a GPU; without as many left they are not begun.
        ways: By name. The others are compared with the first.
        least: Rounds.
        most: Rounds, as long as there is time.
        warm: Whether there is one more before them, which is not recorded.
    """

    minutes: float
    ways: dict[str, Way]
    least: int = 1
    most: int = 1
    warm: bool = False


class WaitMeter(Meter):
    """A meter that counts as reads what CUDA's sync debug mode warns of."""

    heard: Sequence[warnings.WarningMessage] = ()

    def mark(self, network: nn.Module, inputs: object) -> None:
        self.reads = sum("synchronizing CUDA" in str(said.message) for said in self.heard)
        super().mark(network, inputs)

    @contextmanager
    def counting(self) -> Iterator[None]:
        with warnings.catch_warnings(record=True) as heard, super().counting():
            self.heard = heard
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")


# The parts


def whole_commands(options: argparse.Namespace) -> dict[str, Way]:
    def ours() -> dict[str, float]:
        return of_run(cold(options, seed=0))

    def theirs() -> dict[str, float]:
        start = time.perf_counter()
        command = [sys.executable, "-c", PEER_ONCE, str(options.peer.absolute()), options.data_dir]
        done = subprocess.run(command, cwd=HERE, check=True, stdout=subprocess.PIPE, text=True)
        return of_run((time.perf_counter() - start, float(done.stdout)))

    return {"steadyfit": ours} | ({"airbench94_muon": theirs} if options.peer else {})


def of_run(result: tuple[float, float]) -> dict[str, float]:
    return dict(zip(("seconds", "accuracy in %"), result, strict=True))


def hot_runs(options: argparse.Namespace, folder: Path) -> dict[str, Way]:
    def ours(precision: str) -> Way:
        flags = [*options.settings, f"--trainer.precision={precision}"]
        own, seeds = argparse.Namespace(**vars(options) | {"settings": flags}), itertools.count()
        return lambda: of_run(hot(own, next(seeds)))

    @cache
    def peer() -> Peer:
        return Peer(options.peer, options.data_dir, folder)

    ways = {f"steadyfit, {precision}": ours(precision) for precision in options.precisions}
    return ways | ({"airbench94_muon": lambda: of_run(peer().run())} if options.peer else {})


def trainings(options: argparse.Namespace) -> dict[str, Callable[..., None]]:
    """Ways to train the speedrun's network on noise."""
    devices = {"accelerator": options.accelerator, "devices": 1}
    first, second = ({**devices, "precision": precision} for precision in options.precisions)
    return {
        "steadyfit": partial(steadyfit, devices=first),
        f"in {second['precision']}": partial(steadyfit, devices=second),
        "without spike monitor": partial(steadyfit, devices=first, watched=False),
        "with Compile": partial(steadyfit, devices=first, more_callbacks=lambda: [Compile()]),
        "Trainer() with self.log and bar": partial(usual_lightning, devices=first),
        "raw PyTorch loop": partial(raw_loop, devices=first),
    }


def steps(options: argparse.Namespace, task: Task, count: bool) -> dict[str, Way]:
    number = 20 if options.quick else 100
    meter = WaitMeter if options.accelerator == "gpu" else Meter

    def way(train: Callable[..., None]) -> dict[str, float]:
        cost = measure(train, task, number, count=count, meter=meter())
        if count:
            return {"reads a step": cost.reads, "operators a step": cost.operators}
        return {"ms a step": 1000 * cost.seconds}

    ways = trainings(options)
    if count:
        del ways["with Compile"]  # its operators are no longer torch's
    return {name: partial(way, train) for name, train in ways.items()}


def prediction(options: argparse.Namespace) -> dict[str, float]:
    images = 300 if options.quick else 300_000
    runs = predict_twice(images, "configs/cifar10_lenet.yaml")
    names = {"total": "total, s", "network": "network, s", "input": "input, s", "own": "own bytes"}
    return {
        f"{turn}: {name}": getattr(run, field)
        for turn, run in zip(("first", "second"), runs, strict=True)
        for field, name in names.items()
    }


def processes(options: argparse.Namespace, count: int) -> dict[str, float]:
    found = scaling.measured(count, *((20, 1) if options.quick else (300, 3)))
    cost = scaling.Cost(*found["costs"]["steadyfit"])
    milliseconds = 1000 * statistics.median(found["seconds"]["steadyfit"])
    return {"ms a step": milliseconds, **{f"{k} a step": v for k, v in cost._asdict().items()}}


def parts_of(options: argparse.Namespace, folder: Path) -> dict[str, Part]:
    """All parts, in the order in which they are begun."""
    widths, size = ([8, 16, 16], 16) if options.quick else ([64, 256, 256], 1250)
    task = Task(partial(WhitenedCNN, widths=widths), RandomImages, size)
    rounds, many = ((2, 2), 1) if options.quick else ((10, 60), 3)
    parts = {
        "counts": Part(0.5, steps(options, task, count=True)),
        "cold": Part(2.0, whole_commands(options)),
        "hot": Part(3.5, hot_runs(options, folder), *rounds, warm=not options.quick),
        "steps": Part(2.0, steps(options, task, count=False), many, many),
        "predict": Part(2.5, {"predict.py": partial(prediction, options)}),
    }
    if options.quick or torch.cuda.device_count() > 1:
        counts = (2,) if options.quick else (1, 2)
        parts["processes"] = Part(
            1.0, {f"{n} processes": partial(processes, options, n) for n in counts}
        )
    return parts


# Taking turns


def say(line: str) -> None:
    print(line, flush=True)


def in_turns(part: Part, until: float, end: float) -> tuple[dict[str, list[Any]], set[str]]:
    """What each way measured, and the ways that failed.

    Args:
        part: What is to be run.
        until: Time at which a round has to end that is not one of the least.
        end: Time at which each has to end; the longest so far tells how long one takes.
    """
    found: dict[str, list[Any]] = {way: [] for way in part.ways}
    failed: set[str] = set()
    longest, now = 0.0, time.monotonic()
    for number in range(-part.warm, part.most):
        begin = now
        if begin + longest > (until if number >= part.least else end):
            break
        for way in [way for way in found if way not in failed]:
            try:
                measures = part.ways[way]()
            except (Exception, SystemExit) as error:  # the next way is not to be lost with it
                failed.add(way)
                say(f"{way} failed: {type(error).__name__}: {error}")
                continue
            if number >= 0:
                found[way].append(measures)
        now = time.monotonic()
        longest = max(longest, now - begin)
    return found, failed


def summarize(own: list[dict[str, float]], first: list[dict[str, float]]) -> dict[str, Any]:
    """Of each measure its values, n, mean and standard deviation, and p against the first way."""
    summary: dict[str, Any] = {}
    for name in own[0]:
        values = [measures[name] for measures in own]
        sd = statistics.stdev(values) if len(values) > 1 else None
        summary[name] = {"n": len(values), "mean": statistics.mean(values), "sd": sd}
        if own is not first:
            others = [measures[name] for measures in first]
            p = difference(pd.Series(others, dtype=float), pd.Series(values)).p
            summary[name]["p"] = p if p == p else None  # NaN is no JSON
        summary[name]["values"] = values
    return summary


def check(options: argparse.Namespace, record: RunRecord, folder: Path) -> bool:
    """Run what has no line yet; return whether nothing failed."""
    device = torch.device("cuda" if options.accelerator == "gpu" else "cpu")
    origin = {"hardware": hardware(device, 1), "versions": provenance()["versions"]}
    end, good = time.monotonic() + 60 * options.minutes, True
    parts = parts_of(options, folder)
    for number, (name, part) in enumerate(parts.items()):
        runs = {way: {"part": name, "way": way, **origin} for way in part.ways}
        if all(record.find(run) for run in runs.values()):
            continue
        begin = time.monotonic()
        if begin + 60 * part.minutes > end:
            say(f"{name}: left out, since it may take {part.minutes:g} minutes.")
            continue
        later = sum(part.minutes for part in list(parts.values())[number + 1 :])
        found, failed = in_turns(part, end - 60 * later, end)
        seconds, first = time.monotonic() - begin, next(iter(found.values()))
        for way, measured in found.items():
            if measured:
                line = record.add(runs[way], summarize(measured, first), seconds)
                say(f"{name}, {way}: {in_words(line['measures'])}")
        good = good and not failed
    return good


def in_words(measures: dict[str, Any]) -> str:
    words = []
    for name, found in measures.items():
        spread = "" if found["sd"] is None else f" ± {found['sd']:.3g} (n {found['n']})"
        p = f", p {found['p']:.2g}" if found.get("p") is not None else ""
        words.append(f"{name} {found['mean']:,.4g}{spread}{p}")
    return "; ".join(words)


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path, help="file to which lines are added")
    parser.add_argument("--data_dir", default="data", help="folder with cifar-10-batches-py/")
    parser.add_argument("--peer", type=Path, help="the file airbench94_muon.py")
    parser.add_argument("--minutes", type=float, default=12, help="to be done with all of it")
    parser.add_argument("--quick", action="store_true", help="toys without data: a trial run")
    options = parser.parse_args(args)
    on_gpu = torch.cuda.is_available()
    if not (on_gpu or options.quick):
        parser.error("there is no GPU; try it with --quick.")
    options.config, options.settings = "configs/cifar10_speedrun.yaml", ["--trainer.devices=1"]
    options.accelerator = "gpu" if on_gpu else "cpu"
    options.precisions = ("bf16-mixed", "16-mixed" if on_gpu else "32-true")
    quiet_libraries()
    warnings.simplefilter("ignore")  # of the Trainer as it comes
    with tempfile.TemporaryDirectory() as folder, ExitStack() as held:
        if options.quick:
            options.data_dir = held.enter_context(tempfile.TemporaryDirectory())
            # a batch of each, as a share: 1 may be read as the float 1.0, which is all of them
            few = ["--trainer.limit_train_batches=0.01", "--trainer.limit_test_batches=0.1"]
            sizes = ["--data.batch_size=50", "--data.eval_batch_size=50"]
            options.settings += ["--data=DemoDataModule", *sizes, *few]
        if not on_gpu:
            options.peer = None  # it is written for a GPU
        if not check(options, RunRecord(options.record), Path(folder)):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
