"""The times of a training, and how they are told on a terminal and in a log."""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from test_classification import Memory, Points, model, trainer

from callbacks import MetricsCSV, ProgressBar, Timing
from callbacks.run import progress
from callbacks.run.wandb_logger import logged_metrics
from callbacks.training import timing
from callbacks.training.timing import memory
from datamodules.loaders.resident import ResidentLoader
from pipeline import fast_loop
from pipeline.fast_loop import skip_noop_hooks

COLUMNS = ["step", *(f"time/{x}" for x in ("data_wait", "elapsed", "left", "memory"))]


def rows_of(folder: Path) -> list[dict[str, float]]:
    with (folder / "timing.csv").open(newline="") as file:
        return [{name: float(x) for name, x in row.items()} for row in csv.DictReader(file)]


def test_a_run_leaves_its_times_beside_its_metrics(trained: Path) -> None:
    rows = rows_of(trained)
    assert list(rows[0]) == [*COLUMNS, "time/samples_per_second"]
    # log steps: the fiftieth, and the last of each epoch of ten
    assert [row["step"] for row in rows] == [9, 19, 29, 39, 49, 59]
    assert "time/" not in (trained / "metrics.csv").read_text()
    assert rows[-1]["time/left"] == 0
    assert sorted(rows, key=lambda row: row["time/elapsed"]) == rows
    assert all(0 < row["time/data_wait"] < 1 for row in rows)
    (folder,) = (trained / "wandb").glob("offline-run-*")
    assert [s for s, name in logged_metrics(folder) if name == "time/memory"] == [
        int(row["step"]) for row in rows
    ]


class Clock:
    """A clock that goes on when it is told to; seconds."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Slow(Callback):
    """A training step takes a second, a validation a hundred."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_before_backward(self, *_: Any) -> None:
        self.clock.now += 1

    def on_validation_epoch_start(self, *_: Any) -> None:
        self.clock.now += 100


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A batch takes three seconds, and where time is measured, this clock is asked."""
    clock, fetch = Clock(), ResidentLoader.__iter__

    def slowly(loader: ResidentLoader) -> Iterator[Any]:
        for batch in fetch(loader):
            clock.now += 3
            yield batch

    monkeypatch.setattr(ResidentLoader, "__iter__", slowly)
    for module in (timing, fast_loop):
        monkeypatch.setattr(module, "perf_counter", clock)
    return clock


def timed(
    folder: Path, clock: Clock, *more: Callback, resume: Path | None = None, **options: Any
) -> tuple[list[dict[str, float]], Memory]:
    memory = Memory()
    logger = MetricsCSV(str(folder))
    settings = {"max_epochs": 2, "log_every_n_steps": 4, **options}
    callbacks = [Timing(), Slow(clock), *more]
    run = trainer(folder, logger=[logger, memory], callbacks=callbacks, **settings)
    skip_noop_hooks(run)
    run.fit(model(), Points(), ckpt_path=resume)
    run.save_checkpoint(folder / "last.ckpt")
    return rows_of(folder), memory


def test_training_is_timed_without_validation(tmp_path: Path, clock: Clock) -> None:
    rows, memory = timed(tmp_path, clock)
    assert [row["step"] for row in rows] == [3, 7, 11, 15, 19]
    fetched = [5, 4, 4, 4, 3]  # a row is written when the next batch has come, if one does
    for row, batches in zip(rows, fetched, strict=True):
        seconds = 3 * batches + 4
        assert row["time/samples_per_second"] == pytest.approx(32 / seconds, abs=1e-4)
        assert row["time/data_wait"] == pytest.approx(3 * batches / seconds, abs=1e-4)
    assert rows[-1]["time/elapsed"] == 20 * 4 + 103  # the last validation comes later
    assert rows[1]["time/left"] == pytest.approx(4.375 * 12)
    times = [(step, values) for step, values in memory.rows if "time/elapsed" in values]
    assert [step for step, _ in times] == [3, 7, 11, 15, 19]
    assert "time/" not in (tmp_path / "metrics.csv").read_text()


@pytest.mark.parametrize(
    ("steps", "ends", "elapsed"), [(20, [7, 15, 19], 20 * 4 + 2 * 103), (3, [2], 3 * 4)]
)
def test_the_last_row_is_of_the_last_step(
    tmp_path: Path, clock: Clock, steps: int, ends: list[int], elapsed: float
) -> None:
    rows, _ = timed(tmp_path, clock, log_every_n_steps=8, max_steps=steps)
    assert [row["step"] for row in rows] == ends
    assert rows[-1]["time/left"] == 0
    assert rows[-1]["time/elapsed"] == elapsed  # validations too


def test_checkpoints_are_no_training(tmp_path: Path, clock: Clock) -> None:
    """Neither those within an epoch nor those after a validation."""

    class SlowCheckpoint(ModelCheckpoint):
        def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
            super()._save_checkpoint(trainer, filepath)
            clock.now += 1000

    for name, options in (("steps", {"every_n_train_steps": 3}), ("best", {"monitor": "val/loss"})):
        saving = SlowCheckpoint(tmp_path / name, save_top_k=-1, **options)
        rows, _ = timed(
            tmp_path / name, clock, saving, val_check_interval=5, enable_checkpointing=True
        )
        assert len(list((tmp_path / name).glob("*.ckpt"))) > 2
        assert all(row["time/samples_per_second"] > 1 for row in rows), rows
        assert rows[-1]["time/elapsed"] > 3000


def test_a_profiler_that_was_asked_for_tells_the_wait_itself(tmp_path: Path, clock: Clock) -> None:
    rows, _ = timed(tmp_path, clock, profiler="simple")
    assert "time/data_wait" not in rows[0]
    assert len(rows) == 5


def test_accumulated_batches_are_one_step(tmp_path: Path, clock: Clock) -> None:
    rows, _ = timed(tmp_path, clock, accumulate_grad_batches=5, log_every_n_steps=1)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row["time/samples_per_second"] for row in rows] == pytest.approx([2] * 4, rel=0.2)


def test_a_resumed_run_goes_on_with_its_times(tmp_path: Path, clock: Clock) -> None:
    """Rows that training repeats are cut, and the batches of its first step make none."""
    options: dict[str, Any] = {"accumulate_grad_batches": 5, "log_every_n_steps": 1}
    whole, _ = timed(tmp_path, clock, **options)
    timed(tmp_path / "half", clock, max_epochs=1, **options)
    path = tmp_path / "half" / "timing.csv"
    path.write_text(path.read_text() + "7,0.5,1,1,1,1\n")
    rows, _ = timed(tmp_path / "half", clock, resume=tmp_path / "half" / "last.ckpt", **options)
    assert [row["step"] for row in rows] == [row["step"] for row in whole] == [0, 1, 2, 3]
    assert rows[2]["time/elapsed"] > rows[1]["time/elapsed"]


def test_memory_is_that_of_the_process_or_the_most_on_a_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = psutil.Process().memory_info().rss
    assert memory(torch.device("cpu")) == pytest.approx(held, rel=0.05)
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(max_memory_allocated=lambda device: 7))
    assert memory(torch.device("cuda")) == 7


# What is told


def told(
    folder: Path, capsys: pytest.CaptureFixture[str], callbacks: list[Callback] | None = None
) -> str:
    bar = [*(callbacks or []), ProgressBar()]
    options = {"max_epochs": 2, "log_every_n_steps": 5, "logger": Memory()}
    trainer(folder, callbacks=bar, enable_progress_bar=True, **options).fit(model(), Points())
    return capsys.readouterr().out


def test_a_short_training_tells_a_log_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bar that is redrawn is thousands of lines in a log."""
    assert told(tmp_path, capsys) == ""


def test_a_log_has_a_line_every_half_minute(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=clock))

    class TenSeconds(Callback):
        def on_before_backward(self, *_: Any) -> None:
            clock.now += 10

    lines = told(tmp_path, capsys, [TenSeconds(), Timing()]).splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        *("Epoch 0, 3/10", "Epoch 0, 6/10", "Epoch 0, 9/10"),
        *("Epoch 1, 2/10", "Epoch 1, 5/10", "Epoch 1, 8/10"),
    ]
    assert lines[0] == "Epoch 0, 3/10"  # nothing was read so far
    assert "\r" not in "".join(lines)
    assert "left=" in lines[-1]
    assert "samples/s=" in lines[-1]
    assert "val/accuracy=" not in lines[0]
    assert "val/accuracy=" in lines[-1]


def test_other_work_has_lines_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LOG_INTERVAL", 0)
    data = Points(eval_batch_size=45)
    run = trainer(tmp_path, callbacks=[ProgressBar()], enable_progress_bar=True)
    run.test(model(), data, verbose=False)
    assert capsys.readouterr().out == "Test 1/2\nTest 2/2\n"


def test_a_terminal_has_a_line_of_each_epoch_and_each_validation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    drawn = told(tmp_path, capsys, [Timing()])
    lines = [line.rpartition("\r")[2] for line in drawn.split("\n")]
    kept = [line for line in lines if line.startswith("Epoch") and "|" not in line]
    assert [line.partition("=")[0] for line in kept] == [
        *("Epoch 0: left", "Epoch 0: val/loss"),
        *("Epoch 1: left", "Epoch 1: val/loss"),
    ]
    assert all("val/accuracy=" in line for line in kept[1::2])
    assert all("loss=" in line and "samples/s=" in line for line in kept[::2])
    assert "10/10" in drawn
