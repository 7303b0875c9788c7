"""Kills at every place, and many steps:  make soak

A run of each of six tasks is killed at an fsync, an os.replace, in the middle of a torch.save, in a
hook of Lightning's or at a random time, started again with the same command until it ends, and
compared with a run that nobody interrupted: weights, optimizer and all else in the checkpoints,
metrics, the rows of the W&B run as read back from its offline files, the names and contents of all
files. What may differ: the command, versions and commit in the head of ``config.yaml`` and in the
checkpoints, ``code.patch`` (the record grows meanwhile), Lightning's counters of the last
validation, times (not at which steps they are told), digits behind the ninth of a value on W&B, and
of W&B's folder all but the rows, since each start has one of its own.

Then one small run of many steps, with the monitor of spikes, of which are told: memory, open files,
bytes in the folder and time of a thousand steps, and how they grow over its second half.

Finished cases are lines of ``records/soak.jsonl``; delete those that are to be run again.
"""

import argparse
import atexit
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import callbacks as lightning_callbacks

from benchmarks.recorded import RECORDS, RunRecord, Setting
from callbacks.run.wandb_logger import STEP, leveldb_records

CONFIGS = Path(__file__).parents[1] / "configs"
DIGITS = ["--data=DigitsDataModule", "--data.batch_size=50", "--data.train_fraction=0.5"]
TASKS = {
    "mnist_lenet": [*DIGITS, "--model.optimizer=torch.optim.Adam", "--trainer.max_epochs=4"],
    "demo": [
        *("--model.network.widths=[8,8,8]", "--trainer.max_epochs=2", "--data.val_size=40"),
        *("--data.train_fraction=0.3", "--trainer.precision=32-true", "--test=true"),
    ],
    "echo": ["--data.epoch_size=1280", "--model.network.rnn.hidden_size=16"],
    "temporal_order_lstm": [
        *("--trainer.max_epochs=2", "--trainer.callbacks+=HiddenGradients"),
        "--trainer.callbacks.every_n_steps=20",
    ],
    "running_mean_rnn": ["--trainer.max_epochs=-1", "--trainer.max_steps=730"],
    "digits_conv_stack": ["--trainer.max_epochs=3", "--test=true"],
}
KINDS = ("fsync", "replace", "save", "hook", "time")
LONG = ["--trainer.max_epochs=-1", "--model.network.rnn.hidden_size=8"]
# not wandb, whose folder for media is one for all who import it together
OF_THE_PAST = "epoch_loop.val_loop.batch_progress"
PRELOADED = ["pipeline.cli", "pandas", "matplotlib.figure", "sklearn.datasets"]
EVERY = 1000  # steps between two readings of a long run


# A process of its own, which ends itself


class Places:
    """Places where a run may be killed: each is counted, and at one of them the process ends."""

    def __init__(self, place: str | None = None, number: int = 0) -> None:
        self.place, self.number = place, number
        self.counts: Counter[str] = Counter()

    def reached(self, place: str) -> bool:
        """Count a place, and say whether it is the one to end at."""
        self.counts[place] += 1
        return place == self.place and self.counts[place] == self.number

    def watch(self) -> None:
        """Put this process's functions behind ones that count, and may end it."""
        from lightning.pytorch.trainer import call

        for name in ("fsync", "replace"):
            setattr(os, name, self.before_or_after(name, getattr(os, name)))
        torch.save = self.half(torch.save)
        call._call_callback_hooks = self.some_of_all(call._call_callback_hooks)
        for name in ("_call_callbacks_on_save_checkpoint", "_call_lightning_module_hook"):
            setattr(call, name, self.before_or_after("hook", getattr(call, name)))

    def before_or_after(self, place: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.reached(f"before {place}"):
                die()
            result = function(*args, **kwargs)
            if self.reached(f"after {place}"):
                die()
            return result

        return call

    def half(self, save: Callable[..., None]) -> Callable[..., None]:
        def half_save(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
            if self.reached("half a save"):
                with tempfile.TemporaryFile() as whole:
                    save(content, whole, *args, **kwargs)
                    size = whole.tell()
                    whole.seek(0)
                    file.write(whole.read(size // 2))
                file.flush()
                die()
            save(content, file, *args, **kwargs)

        return half_save

    def some_of_all(self, call_hooks: Callable[..., None]) -> Callable[..., None]:
        """A hook that only the first callbacks have."""

        def call(trainer: Any, hook: str, *args: Any, **kwargs: Any) -> None:
            ends = self.reached(f"hook {hook}")
            if ends:
                some = self.counts.total() % (len(trainer.callbacks) + 1)
                trainer.callbacks = trainer.callbacks[:some]
            call_hooks(trainer, hook, *args, **kwargs)
            if ends:
                die()

        return call


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def be_train(args: list[str], home: Path, place: str | None, number: float) -> None:
    """Be one start of ``train.py``, killed at the nth time at a place, or after so many seconds."""
    os.chdir(home)
    with Path("output.txt").open("ab") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    os.environ |= {"HOME": str(home), "WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}
    torch.set_num_threads(1)
    places = Places(place, int(number))
    places.watch()
    if place == "time":
        threading.Timer(number, die).start()
    module = import_module("train")
    sys.argv = [str(module.__file__), *args]
    try:
        module.main(args)
    finally:
        atexit._run_exitfuncs()  # W&B ends its run there; multiprocessing leaves it out
    Path("places.json").write_text(json.dumps(places.counts))
    os._exit(0)  # a timer may be waiting


def start(args: list[str], home: Path, place: str | None = None, number: float = 0) -> int:
    """Exit status of one start of ``train.py``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=be_train, args=(args, home, place, number))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


# Two runs


def facts(run: Path) -> Iterator[tuple[str, str]]:
    """Names and contents of all that has to be the same."""
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        name = path.relative_to(run).as_posix()
        if name.startswith("wandb/") or name == "code.patch":
            continue
        if path.suffix in (".ckpt", ".pt"):
            yield name, ""
            content = torch.load(path, map_location="cpu", weights_only=True)
            yield from (leaf for leaf in leaves(name, content) if OF_THE_PAST not in leaf[0])
        elif name == "timing.csv":
            yield name, str([line.partition(",")[0] for line in path.read_text().splitlines()])
        else:
            yield name, without_origin(path.read_bytes().decode("latin-1"))
    yield from wandb_rows(run / "wandb")


def leaves(name: str, content: Any) -> Iterator[tuple[str, str]]:
    """All values of a nested content by their paths."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from leaves(f"{name} {key}", value)
    elif isinstance(content, (list, tuple)):
        yield f"{name} length", str(len(content))
        for number, value in enumerate(content):
            yield from leaves(f"{name} {number}", value)
    elif isinstance(content, torch.Tensor):
        array = content.detach().contiguous().reshape(-1).view(torch.uint8)
        yield name, f"{content.dtype} {tuple(content.shape)} {array.numpy().tobytes()!r}"
    else:
        yield name, without_origin(repr(content)) if name.endswith(" config") else repr(content)


def without_origin(text: str) -> str:
    """A configuration without the command, versions and commit at its head."""
    return text[text.index("seed_everything:") :] if "seed_everything:" in text else text


def wandb_rows(folder: Path) -> Iterator[tuple[str, str]]:
    """What the W&B run got: each metric of a step, with how often; pictures and tables by name."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    rows: Counter[str] = Counter()
    for path in folder.glob("*run-*/run-*.wandb"):
        for payload in leveldb_records(path.read_bytes()[7:]):
            items = [
                (i.key, *i.nested_key, i.value_json)
                for i in Record.FromString(payload).history.item
            ]
            step = next((value for *_, key, value in items if key == STEP), None)
            for *keys, value in items:
                key, *inside = filter(None, keys)
                if inside:
                    rows[key] = 1
                elif not key.startswith("_") and key != STEP:
                    # as in metrics.csv, which is read again
                    text = "" if key.startswith("time/") else f"{float(json.loads(value)):.9g}"
                    rows[f"{step} {key} {text}"] += (
                        key != "epoch" or 1 - rows[f"{step} epoch {text}"]
                    )
    for key, count in rows.items():
        yield f"W&B {key}", str(count)


def differences(run: Path, whole: Path) -> list[str]:
    one, other = dict(facts(run)), dict(facts(whole))
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


# The cases


class Soak:
    """Uninterrupted runs, and others that are killed, all in one folder so that paths are equal.

    Args:
        scratch: Where.
    """

    def __init__(self, scratch: Path) -> None:
        self.home = scratch / "home"
        self.whole = scratch / "whole"
        self.counts: dict[str, Counter[str]] = {}
        self.seconds: dict[str, float] = {}

    def begin(self) -> Path:
        shutil.rmtree(self.home, ignore_errors=True)
        self.home.mkdir(parents=True)
        return self.home

    def run(self, task: str) -> Path:
        return self.home / "runs" / task / "x"

    def uninterrupted(self, task: str) -> Path:
        """The run that nobody interrupts, and how often and long it came by each place."""
        kept = self.whole / task
        if task not in self.counts:
            home, before = self.begin(), time.monotonic()
            assert start(command(task), home) == 0, (home / "output.txt").read_text()
            self.seconds[task] = time.monotonic() - before
            self.counts[task] = Counter(json.loads((home / "places.json").read_text()))
            shutil.copytree(self.run(task), kept)
        return kept

    def case(self, setting: Setting) -> dict[str, Any]:
        """Kill one run at one place, let it go on, and say what is not as in the other one."""
        task, draw = setting["task"], random.Random(json.dumps(setting))
        whole, status, home = self.uninterrupted(task), 0, self.home
        while status != -signal.SIGKILL:  # a time may come too late
            place, number = self.place(task, setting["kind"], draw)
            home = self.begin()
            status = start(command(task), home, place, number)
        restarts = 0
        while status and restarts < 3:
            status, restarts = start(command(task), home), restarts + 1
        found = differences(self.run(task), whole) if status == 0 else [f"exit status {status}"]
        outside = [str(p.relative_to(home)) for p in home.rglob(".*") if p.suffix == ".tmp"]
        if found or outside:
            print(place, number, found[:5], outside, (home / "output.txt").read_text()[-500:])
        return {
            "place": place,
            "number": round(number, 2),
            "restarts": restarts,
            "differences": len(found) + len(outside),
            "first": (found + outside)[:3],
        }

    def place(self, task: str, kind: str, draw: random.Random) -> tuple[str, float]:
        if kind == "time":
            return kind, draw.uniform(0, self.seconds[task])
        counts = self.counts[task]
        place = draw.choice(sorted(name for name in counts if kind in name.split()))
        return place, draw.randint(1, counts[place])


def command(task: str) -> list[str]:
    flags = ["--run=x", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    return ["fit", f"--config={CONFIGS / f'{task}.yaml'}", *TASKS[task], *flags]


def cases(count: int) -> list[Setting]:
    pairs = itertools.cycle(itertools.product(KINDS, TASKS))
    return [
        {"task": task, "kind": kind, "case": n}
        for n, (kind, task) in enumerate(itertools.islice(pairs, count))
    ]


def show_cases(record: RunRecord, count: int) -> None:
    lines = [line for line in map(record.find, cases(count)) if line]
    print(f"{'killed at':<10} {'equal':>6} {'of':>4}")
    for kind in (*KINDS, ""):
        mine = [line["measures"] for line in lines if kind in ("", line["run"]["kind"])]
        equal = sum(not measures["differences"] for measures in mine)
        print(f"{kind or 'all':<10} {equal:>6} {len(mine):>4}")
    for line in lines:
        if line["measures"]["differences"]:
            print(line["run"], line["measures"])
    print(RunRecord.origins(lines))


# Many steps


class Meter(lightning_callbacks.Callback):
    """Write what the process and its folder are made of, every so many steps, to a file.

    Args:
        path: The file, which gets a line of JSON each time.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.before = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step % EVERY:
            return
        files = [path for path in Path(str(trainer.log_dir)).rglob("*") if path.is_file()]
        now = time.monotonic()
        values = {
            "step": trainer.global_step,
            "memory_MiB": int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20,
            "open_files": len(os.listdir("/proc/self/fd")),
            "folder_MiB": sum(path.stat().st_size for path in files) / 2**20,
            "seconds": now - self.before,
        }
        with Path(self.path).open("a") as file:
            file.write(json.dumps(values) + "\n")
        self.before = time.monotonic()


def long_run(setting: Setting, home: Path) -> dict[str, Any]:
    """Readings of every thousand steps of a long run."""
    home.mkdir()
    path = home / "meter.jsonl"
    meter = ["--trainer.callbacks+=benchmarks.soak.Meter", f"--trainer.callbacks.path={path}"]
    flags = [*LONG, f"--trainer.max_steps={setting['steps']}", *meter]
    assert start([*command(setting["task"]), *flags], home) == 0, (home / "output.txt").read_text()
    readings = [json.loads(line) for line in path.read_text().splitlines()]
    return {name: [round(r[name], 3) for r in readings] for name in readings[0]}


def show_slopes(measures: dict[str, Any]) -> None:
    steps = np.array(measures["step"]) / EVERY
    late = steps > steps[-1] / 2
    print(f"{int(EVERY * steps[-1]):,} steps: first, last, and growth per 1,000 in the second half")
    for name in ("memory_MiB", "open_files", "folder_MiB", "seconds"):
        values = np.array(measures[name])
        slope = np.polyfit(steps[late], values[late], 1)[0]
        print(f"{name:<10} {values[0]:>9.2f} {values[-1]:>9.2f} {slope:>+9.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=50_000, help="of the long run")
    parser.add_argument("--minutes", type=float, help="begin nothing that would end later")
    options = parser.parse_args()
    record = RunRecord(RECORDS / "soak.jsonl")
    end = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as scratch:
        left = record.complete(cases(options.kills), Soak(Path(scratch)).case, options.minutes)
        long: Setting = {"task": "running_mean_rnn", "steps": options.steps}
        if options.steps and (end is None or time.monotonic() < end):
            record.complete([long], lambda setting: long_run(setting, Path(scratch, "long")))
    print(f"{left} of {options.kills} kills are left")
    show_cases(record, options.kills)
    if line := record.find(long):
        show_slopes(line["measures"])


if __name__ == "__main__":
    main()
