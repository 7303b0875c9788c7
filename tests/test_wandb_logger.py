"""Rows on their way to W&B: its own offline files are read back."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import end_wandb

from callbacks.run.wandb_logger import ResumableWandbLogger, batched_publish, logged_metrics

ROWS = {step: {"train/loss": 1 / (step + 1), "grad_norm/total": 2.0} for step in range(50)}


@pytest.fixture
def make_logger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], ResumableWandbLogger]]:
    end_wandb()  # a process reads its settings once

    def make(mode: str) -> ResumableWandbLogger:
        monkeypatch.setenv("WANDB_MODE", mode)
        monkeypatch.setenv("WANDB_SILENT", "true")
        return ResumableWandbLogger(save_dir=str(tmp_path))

    yield make
    end_wandb()


def test_rows_of_many_steps_wait_once_and_arrive_in_order_also_before_a_failure(
    make_logger: Callable[[str], ResumableWandbLogger],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logger = make_logger("offline")
    asyncer = logger.experiment._interface._asyncer
    waits: list[Any] = []
    run = asyncer.run

    def wait(send: Any) -> Any:
        waits.append(send)
        return run(send)

    monkeypatch.setattr(asyncer, "run", wait)
    logger.log_rows(dict(reversed(ROWS.items())))
    assert len(waits) == 1
    logger.log_metrics({"val/loss": 0.5}, step=49)  # by its own way again
    assert len(waits) == 2
    with pytest.raises(ZeroDivisionError), batched_publish(logger.experiment):
        logger.log_metrics({"train/loss": 1.0}, step=50)
        raise ZeroDivisionError
    end_wandb()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    found = list(logged_metrics(folder))
    assert [step for step, name in found if name == "train/loss"] == [*ROWS, 50]
    assert (49, "val/loss") in found


def test_disabled_wandb_takes_rows(
    make_logger: Callable[[str], ResumableWandbLogger], tmp_path: Path
) -> None:
    make_logger("disabled").log_rows(ROWS)
    assert not list(tmp_path.rglob("*.wandb"))
