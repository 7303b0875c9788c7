"""A run that gets SIGTERM ends in a checkpoint from which it goes on as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import CONFIGS, SMALL
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from processes import by_two
from torch import nn
from torch.optim import Adam

import train
from benchmarks.step_overhead import RandomNumbers
from callbacks import Termination
from callbacks.run.termination import FEWEST, MOST, requeue
from lit_models import LitClassifier

SCRIPT = Path(train.__file__)
RUN = Path("runs", "cifar10_cpu", "x")
TIME_LIMIT = 180  # seconds; busy machines take long to start


# One process: where training stops


class SignalAt(Callback):
    """A signal when a hook is called for the nth time."""

    def __init__(self, hook: str, time: int, number: int = signal.SIGTERM) -> None:
        self.calls = 0

        def count(*_: Any) -> None:
            self.calls += 1
            if self.calls == time:
                os.kill(os.getpid(), number)

        setattr(self, hook, count)


class Small:
    """Three epochs of 12 batches with dropout, and what came of them."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.settings = settings

    def fit(self, *more: Callback, resume: bool = False) -> LightningModule:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 2))
        model = LitClassifier(network, partial(Adam, lr=0.01), num_classes=2)
        data = RandomNumbers(samples=52, batch_size=4, val_size=4)
        folder = self.folder / "checkpoints"
        # epochs are kept as well, so that a lost validation or end of an epoch would show
        save = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        best = ModelCheckpoint(folder, "best", monitor="val/loss", enable_version_counter=False)
        trainer = Trainer(
            max_epochs=3,
            accelerator="cpu",
            logger=False,
            default_root_dir=self.folder,
            callbacks=[*more, best, save, Termination()],
            enable_progress_bar=False,
            enable_model_summary=False,
            **self.settings,
        )
        trainer.fit(model, data, ckpt_path=self.last if resume else None)
        return model

    @property
    def last(self) -> Path:
        return self.folder / "checkpoints" / "last.ckpt"

    def saved(self) -> dict[str, Any]:
        return torch.load(self.last, weights_only=True)


def same(a: LightningModule, b: LightningModule) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return all(torch.equal(one[name], other[name]) for name in one)


Fitted = tuple[Small, LightningModule]


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Fitted]:
    """Uninterrupted runs, one for each setting."""

    @cache
    def fit(**settings: Any) -> Fitted:
        small = Small(tmp_path_factory.mktemp("whole"), **settings)
        return small, small.fit()

    return fit


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:.*could not find the monitored key")
@pytest.mark.parametrize(
    ("hook", "time", "settings", "step"),
    [
        pytest.param("on_train_batch_start", 5, {}, 5, id="in a batch"),
        pytest.param("on_train_batch_start", 12, {}, 12, id="in the last batch of an epoch"),
        pytest.param("on_train_batch_start", 36, {}, 36, id="in the last batch of all"),
        pytest.param("on_train_batch_start", 12, {"limit_val_batches": 0}, 12, id="no validation"),
        pytest.param("on_train_batch_start", 20, {"max_steps": 20}, 20, id="in the last step"),
        pytest.param("on_validation_batch_start", 2, {}, 12, id="in the validation"),
        pytest.param("on_sanity_check_start", 1, {}, 1, id="before the first batch"),
        pytest.param(
            "on_train_batch_start", 6, {"accumulate_grad_batches": 4}, 2, id="while accumulating"
        ),
        pytest.param(
            "on_train_batch_start", 6, {"val_check_interval": 6}, 7, id="in front of a validation"
        ),
    ],
)
def test_stops_where_it_can_go_on(
    hook: str,
    time: int,
    settings: dict[str, Any],
    step: int,
    whole_runs: Callable[..., Fitted],
    tmp_path: Path,
) -> None:
    """No accumulated gradient, no validation and no end of an epoch is lost."""
    whole, expected = whole_runs(**settings)
    parts = Small(tmp_path / "parts", **settings)
    with pytest.raises(SIGTERMException) as stop:
        parts.fit(SignalAt(hook, time))
    assert stop.value.code == 143
    assert parts.saved()["global_step"] == step
    resumed = parts.fit(resume=True)
    assert same(resumed, expected)
    names = {path.name for path in (whole.folder / "checkpoints").iterdir()}
    assert {path.name for path in (parts.folder / "checkpoints").iterdir()} == names | {"last.ckpt"}
    for name in names:
        a, b = (
            torch.load(home.folder / "checkpoints" / name, weights_only=True)
            for home in (whole, parts)
        )
        assert a["metrics"] == b["metrics"], name
        assert a["global_step"] == b["global_step"], name


def test_says_where_it_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SIGTERMException):
        Small(tmp_path).fit(SignalAt("on_train_batch_start", 3))
    assert capsys.readouterr().err.strip() == (
        f"Stopped by SIGTERM after step 3; the same command with --run={tmp_path.name} "
        f"goes on from {tmp_path / 'checkpoints' / 'last.ckpt'}"
    )


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A SLURM job of one task; the file in which its fake ``scontrol`` says what it was told."""
    for name in ("PROCID", "LOCALID", "NODEID"):
        monkeypatch.setenv(f"SLURM_{name}", "0")
    for name in ("NTASKS", "NTASKS_PER_NODE"):
        monkeypatch.setenv(f"SLURM_{name}", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    program, told = tmp_path / "bin" / "scontrol", tmp_path / "told.txt"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho $* >> {told}\nexit ${{SCONTROL_STATUS:-0}}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    return told


def test_slurms_warning_stops_and_requeues(
    scontrol: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Lightning trained on behind its own checkpoint, which no run goes on from."""
    small = Small(tmp_path, plugins=[SLURMEnvironment()])
    with pytest.raises(SIGTERMException):
        small.fit(SignalAt("on_train_batch_start", 3, signal.SIGUSR1))
    assert small.saved()["global_step"] == 3
    assert scontrol.read_text() == "requeue 4711\n"
    assert "4711 is in the queue again" in capfd.readouterr().err
    assert not list(tmp_path.glob("hpc_ckpt*"))


def test_a_part_of_a_job_array_that_is_not_requeued(
    scontrol: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4700")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "11")
    monkeypatch.setenv("SCONTROL_STATUS", "3")
    requeue()
    assert scontrol.read_text() == "requeue 4700_11\n"
    assert "was not requeued (status 3)" in capfd.readouterr().err
    monkeypatch.setenv("PATH", "")
    requeue()
    assert "was not requeued (No such file" in capfd.readouterr().err


def test_other_stages_end_at_once(tmp_path: Path) -> None:
    """Nothing is learned there, so nothing is written."""
    small = Small(tmp_path)
    model = small.fit()
    kept = sorted((tmp_path / "checkpoints").iterdir())
    callbacks = [SignalAt("on_test_batch_start", 1), Termination()]
    data = RandomNumbers(samples=52, batch_size=4, val_size=4)
    data.read_test = data.read_train  # type: ignore[method-assign]
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.callbacks.extend(callbacks)  # type: ignore[attr-defined]
    with pytest.raises(SIGTERMException) as stop:
        trainer.test(model, data)
    assert stop.value.code == 143
    assert sorted((tmp_path / "checkpoints").iterdir()) == kept


# Several processes: how often they exchange a flag


class OneOfTwo:
    """What Termination asks of a trainer of two processes."""

    world_size = 2
    strategy = SimpleNamespace(root_device=torch.device("cpu"))

    def __init__(self, log_every_n_steps: int) -> None:
        self.log_every_n_steps = log_every_n_steps
        self.global_step = 0


@pytest.mark.parametrize(
    ("epoch", "every", "accumulate"),
    [
        *((1, 1, 1), (3, 50, 4), (19, 7, 1), (30, 1000, 4), (49, 50, 1), (50, 50, 1)),
        *((50, 0, 4), (51, 50, 1), (130, 7, 4), (1000, 0, 1), (1000, 1, 4), (1000, 1000, 1)),
    ],
)
def test_flags_are_exchanged_often_enough_and_no_oftener(
    epoch: int, every: int, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback, trainer = Termination(), OneOfTwo(every)
    batch, exchanged = 0, [0]
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: exchanged.append(batch))
    for batch in range(1, 3001):
        last = batch % epoch == 0
        trainer.global_step += last or (batch % epoch) % accumulate == 0
        callback.on_train_batch_end(trainer)  # type: ignore[arg-type]
        if last:
            callback.on_train_epoch_end(trainer, None)  # type: ignore[arg-type]
    gaps = [b - a for a, b in pairwise(exchanged)]
    assert min(gaps) >= FEWEST
    assert max(gaps) <= MOST * accumulate + FEWEST


# Several processes that get the signal

STEPS = 120  # 2 epochs of 960 / 16 steps

# One process gets SIGTERM some time after its 70th step, in whatever it is about.
SIGNALLED = """
import contextlib, os, random, signal, sys, threading, train
from callbacks import RunRecord
from tests.other_names import renamed
stack = contextlib.ExitStack()
for name in {names}:
    stack.enter_context(renamed(name, "lightning"))
def tell(self, trainer, *args):
    if trainer.global_rank == {rank} and trainer.global_step == 70:
        end = os.getpid(), signal.SIGTERM
        threading.Timer(random.Random().uniform(0, 0.1), os.kill, end).start()
RunRecord.on_train_batch_start = tell
train.main(sys.argv[1:])
"""
# without the "--" it takes --run for an option of its own
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node=2",
    "--",
]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Training by two processes, with augmented data."""
    import fake_data

    root = tmp_path_factory.mktemp("data")
    fake_data.write_cifar10(root, batch=200)
    data = [f"--config={CONFIGS / 'cifar10_cpu.yaml'}", f"--data.data_dir={root}"]
    devices = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=8"]
    epochs = ["--trainer.max_epochs=2", "--trainer.log_every_n_steps=7"]
    return ["fit", *data, *SMALL, *devices, *epochs, "--run=x"]


@pytest.fixture(scope="module")
def uninterrupted(both: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("whole")
    assert by_two("train", both, home) == 0
    return home / RUN


def start(command: list[str], home: Path) -> subprocess.Popen[bytes]:
    environment = {"PYTHONPATH": str(SCRIPT.parent), "OMP_NUM_THREADS": "1", "HOME": str(home)}
    with (home / "output.txt").open("ab") as output:
        return subprocess.Popen(command, cwd=home, env=environment, stdout=output, stderr=output)


def assert_goes_on(both: list[str], home: Path, whole: Path) -> None:
    """It stopped within an epoch, and the same command ends like the uninterrupted run."""
    output = (home / "output.txt").read_text()
    assert output.count("Stopped by SIGTERM after step") == 1, output
    stopped = torch.load(home / RUN / "checkpoints" / "last.ckpt", weights_only=True)
    assert STEPS // 2 < stopped["global_step"] < STEPS
    assert by_two("train", both, home) == 0
    for name in ("last.ckpt", "best.ckpt"):
        a, b = (
            torch.load(run / "checkpoints" / name, weights_only=True) for run in (home / RUN, whole)
        )
        assert a["global_step"] == b["global_step"]
        assert all(torch.equal(a["state_dict"][k], b["state_dict"][k]) for k in a["state_dict"])
    assert (home / RUN / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "names"),
    [(1, ()), (0, ("_sigterm_notifier_fn", "_broadcast_sigterm_tensor"))],
    ids=["rank 1", "rank 0, names of Lightning that have changed"],
)
def test_signal_to_one_of_two_processes(
    rank: int, names: tuple[str, ...], both: list[str], uninterrupted: Path, tmp_path: Path
) -> None:
    """Lightning's own handling hangs or crashes, whichever gets it, and writes no checkpoint."""
    program = tmp_path / "signalled.py"  # a file, which Lightning starts again for the second one
    program.write_text(SIGNALLED.format(rank=rank, names=names))
    assert start([sys.executable, str(program), *both], tmp_path).wait(TIME_LIMIT) == 143
    assert_goes_on(both, tmp_path, uninterrupted)


@pytest.mark.slow
def test_signal_to_torchrun(both: list[str], uninterrupted: Path, tmp_path: Path) -> None:
    """It hands the signal to all processes, and kills those that are there after 30 seconds."""
    process = start([*TORCHRUN, str(SCRIPT), *both], tmp_path)
    while not (tmp_path / RUN / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None, "training ended before its first checkpoint"
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIME_LIMIT) != 0
    assert_goes_on(both, tmp_path, uninterrupted)
