"""What nobody hears is not called, and what somebody hears is."""

from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, LambdaCallback, ModelCheckpoint
from lightning.pytorch.profilers import SimpleProfiler
from test_classification import Points, model, trainer

from pipeline.fast_loop import BATCH_HOOKS, LoaderClock, skip_noop_hooks


class OneHook(Callback):
    def __init__(self) -> None:
        self.batches = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.batches += 1


def test_hooks_of_a_class_and_of_an_instance_are_called(tmp_path: Path) -> None:
    heard: list[int] = []
    own = OneHook()
    given = LambdaCallback(on_train_batch_end=lambda *_: heard.append(1))
    run = trainer(tmp_path, max_epochs=1, callbacks=[own, given])
    skip_noop_hooks(run)
    assert own.on_train_batch_start is None
    run.fit(model(), Points())
    assert own.batches == len(heard) == 10


def test_a_checkpoint_looks_at_steps_if_it_saves_by_them(tmp_path: Path) -> None:
    by_steps = ModelCheckpoint(every_n_train_steps=4, save_top_k=-1, filename="{step}")
    by_time = ModelCheckpoint(train_time_interval=timedelta(hours=1))
    by_epochs = ModelCheckpoint(every_n_epochs=1)
    callbacks = [by_steps, by_time, by_epochs]
    run = trainer(tmp_path, max_epochs=1, callbacks=callbacks, enable_checkpointing=True)
    skip_noop_hooks(run)
    assert by_time.on_train_batch_end is not None
    assert by_epochs.on_train_batch_end is None
    run.fit(model(), Points())
    assert {"step=4.ckpt", "step=8.ckpt"} <= {path.name for path in tmp_path.rglob("*.ckpt")}


def test_they_are_all_hooks_of_lightning() -> None:
    assert all(callable(getattr(Callback, name)) for name in BATCH_HOOKS)


def test_a_profiler_that_was_asked_for_stays(tmp_path: Path) -> None:
    asked, not_asked = trainer(tmp_path, profiler="simple"), trainer(tmp_path)
    for run in (asked, not_asked):
        skip_noop_hooks(run)
    assert isinstance(asked.profiler, SimpleProfiler)  # type: ignore[attr-defined]
    assert isinstance(not_asked.profiler, LoaderClock)  # type: ignore[attr-defined]
