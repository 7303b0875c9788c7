"""A run that is killed and started again ends as if nothing had happened."""

import csv
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, SMALL
from processes import by_two, start_command, wait

import predict
from callbacks.run.wandb_logger import logged_metrics

pytestmark = pytest.mark.slow

STEPS = 240  # 4 epochs of 960 / 16 steps

# Ends the process in the middle of writing its second checkpoint file named last.ckpt.
KILLED_WHILE_SAVING = """
import io, os, signal, torch
save, written = torch.save, []
def dying_save(checkpoint, file, *args, **kwargs):
    name = getattr(file, "name", "")
    written.append(name)
    buffer = io.BytesIO()
    save(checkpoint, buffer)
    if len(written) == 4:
        file.write(buffer.getvalue()[: len(buffer.getvalue()) // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    file.write(buffer.getvalue())
torch.save = dying_save
"""

# Ends the process behind its last checkpoint, while W&B still holds the last seconds in memory.
KILLED_BEHIND_THE_LAST_STEP = """
import os, signal
from callbacks.run import run_folder
def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)
run_folder.RunRecord.on_fit_end = die
"""


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Training with augmented data, long enough to be killed inside an epoch."""
    import fake_data

    root = tmp_path_factory.mktemp("data")
    fake_data.write_cifar10(root, batch=200)
    config = CONFIGS / "cifar10_cpu.yaml"
    flags = ["--trainer.max_epochs=4", "--trainer.log_every_n_steps=7", *SMALL]
    return [f"--config={config}", f"--data.data_dir={root}", *flags]


@pytest.fixture(scope="module")
def uninterrupted(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("whole")
    fit(arguments, home)
    return home / "runs" / "cifar10_cpu" / "x"


def fit(arguments: list[str], home: Path, *, program: str = "") -> int:
    """Train in a process of its own to its end, and give its exit status."""
    return wait(start(arguments, home, program=program))


def start(arguments: list[str], home: Path, *, program: str = "") -> BaseProcess:
    return start_command("train", ["fit", *arguments, "--run=x"], home, program)


def steps_of(folder: Path, name: str = "metrics.csv") -> list[int]:
    with (folder / name).open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def assert_same(resumed: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, optimizer, metrics and submission are those of the uninterrupted run."""
    for name in ("last.ckpt", "best.ckpt"):
        a, b = (
            torch.load(run / "checkpoints" / name, weights_only=True) for run in (resumed, whole)
        )
        assert a["global_step"] == b["global_step"]
        assert a["state_dict"].keys() == b["state_dict"].keys()
        assert all(torch.equal(a["state_dict"][k], b["state_dict"][k]) for k in a["state_dict"])
        assert a["metrics"] == b["metrics"]
    assert steps_of(resumed) == list(range(STEPS))
    assert (resumed / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    assert steps_of(resumed, "timing.csv") == [*range(6, STEPS, 7), STEPS - 1]
    for run in (resumed, whole):
        monkeypatch.chdir(run.parents[2])
        predict.main([str(run)])
    assert (resumed / "submission.csv").read_bytes() == (whole / "submission.csv").read_bytes()


def test_killed_at_a_random_step(
    arguments: list[str],
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process = start(arguments, tmp_path)
    run = tmp_path / "runs" / "cifar10_cpu" / "x"
    while not (run / "checkpoints" / "last.ckpt").exists():
        assert process.exitcode is None, "training ended before its first checkpoint"
        time.sleep(0.02)
    time.sleep(random.Random().uniform(0, 4))
    process.kill()
    wait(process)
    assert fit(arguments, tmp_path) == 0
    assert_same(run, uninterrupted, monkeypatch)
    assert_one_wandb_run(run)


def assert_one_wandb_run(run: Path) -> None:
    """The offline folders are parts of one run, which together hold every step once."""
    folders = sorted((run / "wandb").glob("offline-run-*"))
    recorded = [step for f in folders for step, name in logged_metrics(f) if name == "train/loss"]
    assert sorted(recorded) == list(range(STEPS))
    timed = [step for f in folders for step, name in logged_metrics(f) if name == "time/elapsed"]
    assert sorted(timed) == steps_of(run, "timing.csv")
    assert len({folder.name[-8:] for folder in folders}) == 1


def test_killed_behind_the_last_step(
    arguments: list[str], uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process killed then left a W&B run without its last steps, since nothing was trained."""
    status = fit(arguments, tmp_path, program=KILLED_BEHIND_THE_LAST_STEP)
    assert status == -signal.SIGKILL
    run = tmp_path / "runs" / "cifar10_cpu" / "x"
    assert fit(arguments, tmp_path) == 0
    assert_same(run, uninterrupted, monkeypatch)
    assert_one_wandb_run(run)


def test_killed_while_a_checkpoint_is_written(
    arguments: list[str], uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fit(arguments, tmp_path, program=KILLED_WHILE_SAVING) == -signal.SIGKILL
    run = tmp_path / "runs" / "cifar10_cpu" / "x"
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert fit(arguments, tmp_path) == 0
    assert_same(run, uninterrupted, monkeypatch)


def test_killed_before_the_first_checkpoint(
    arguments: list[str], uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = start(arguments, tmp_path)
    run = tmp_path / "runs" / "cifar10_cpu" / "x"
    while not (run / "config.yaml").exists():
        assert process.exitcode is None
        time.sleep(0.02)
    process.kill()
    wait(process)
    assert not (run / "checkpoints").exists()
    assert fit(arguments, tmp_path) == 0
    assert_same(run, uninterrupted, monkeypatch)


def test_two_processes_train_and_test(arguments: list[str], tmp_path: Path) -> None:
    """DDP over gloo: one run folder, every step once, a checkpoint that one process can use.

    One process validates 39 samples as two do, of which neither sees one twice.
    """
    both = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    # without a name the second process learns the folder from the first
    more = ["--data.batch_size=8", "--trainer.max_epochs=1", "--test=true"]
    more += ["--data.val_size=39", "--model.tta=none"]  # which validation in fit leaves out
    assert by_two("train", ["fit", *arguments, *both, *more], tmp_path) == 0
    (run,) = (tmp_path / "runs" / "cifar10_cpu").glob("*/")
    output = tmp_path / "output.txt"
    assert "sync_dist" not in output.read_text()
    validated = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["metrics"]
    one = start_command("train", ["validate", f"--run={run}", "--trainer.devices=1"], tmp_path)
    assert wait(one) == 0
    shown = output.read_text().rpartition("The run is in")[2]
    for name, value in validated.items():
        assert f"{name}  {value:.4f}" in shown, name
    assert steps_of(run) == list(range(STEPS // 4))
    accuracies = [accuracy_of(run)]
    assert by_two("train", ["test", f"--run={run}", *both], tmp_path) == 0
    accuracies.append(accuracy_of(run))
    one = start_command("train", ["test", f"--run={run}", "--trainer.devices=1"], tmp_path)
    assert wait(one) == 0
    assert [*accuracies, accuracy_of(run)] == [accuracies[0]] * 3


def accuracy_of(run: Path) -> str:
    with (run / "metrics.csv").open(newline="") as file:
        (tested,) = [r["test/accuracy"] for r in csv.DictReader(file) if r["test/accuracy"]]
    return tested
