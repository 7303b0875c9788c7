"""A run trained once for all tests that need one, and a place where nothing leaves the machine.

What takes seconds to import is imported where it is used: with several processes (``make test``)
the one that hands out the tests reads this file too, before it starts the others.
"""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import settings

if TYPE_CHECKING:
    import numpy as np
    from kaggle_place import Refusal
    from kaggle_server import KaggleServer
    from lightning import LightningDataModule, LightningModule

settings.register_profile("slow cores", max_examples=30, deadline=None)
settings.load_profile("slow cores")

CONFIGS = Path(__file__).parent.parent / "configs"
SMALL = [
    "--model.network.widths=[8,8,8]",
    "--model.optimizer=torch.optim.SGD",  # Muon's learning rates are those of large batches
    "--model.optimizer.lr=0.6",
    "--model.optimizer.momentum=0.9",
    "--model.optimizer.nesterov=true",
    "--model.lr_scheduler.peak=0.2",
    "--data.verify=false",
    "--data.val_size=40",
    "--data.batch_size=16",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.precision=32-true",  # bf16 makes small convolutions on a CPU ten times slower
]


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file grows beyond ``limit`` bytes in here: as on a full disk."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


def faults_of_large_tensors() -> int:
    """Page faults of 40 tensors of 64 MiB in turn, twice as large as what glibc keeps by itself."""
    import torch

    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(40):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def fit_quietly(
    model: LightningModule,
    data: LightningDataModule,
    max_steps: int,
    resume: Path | None = None,
) -> None:
    """Train on the CPU up to ``max_steps``, from a checkpoint or not, and leave nothing behind."""
    from lightning import Trainer

    trainer = Trainer(
        max_steps=max_steps,
        enable_checkpointing=False,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data, ckpt_path=resume)


def read_wandb(folder: Path, *options: str) -> list[Any]:
    """What W&B reads back from an offline run, object by object; skips before wandb 0.31."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", *options, "--json", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "No such command 'leet'" in done.stderr:
        pytest.skip("wandb reads offline runs back from 0.31 on")
    assert done.returncode == 0, done.stderr
    text, place, found = done.stdout.rstrip(), 0, []
    while place < len(text):
        value, place = json.JSONDecoder().raw_decode(text, place)
        found.append(value)
        place += len(text[place : place + 1])  # the line's end
    return found


def end_wandb() -> None:
    """End the run, so that the next logger starts its own, and the service process."""
    import wandb

    wandb.finish()
    wandb.teardown()


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The miniature networks of the tests only wait for a second thread, or fight for its core."""
    import torch

    torch.set_num_threads(1)
    if hasattr(os, "sched_getaffinity"):  # predict.py takes as many threads as there are cores
        core = {min(os.sched_getaffinity(0))}
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: core)


@pytest.fixture(autouse=True, scope="session")
def _offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
            patch.setenv(name, str(home))
        patch.setenv("WANDB_MODE", "disabled")  # starting a run takes longer than most tests
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        yield


@pytest.fixture(autouse=True, scope="session")
def _drawn_once() -> Iterator[None]:
    """To draw the digits of the demo takes a second, which thirty tests would."""
    from datamodules.images import demo

    draw = demo.draw
    known: dict[tuple[bytes, int], np.ndarray] = {}

    def draw_once(originals: np.ndarray, seed: int) -> np.ndarray:
        key = originals.tobytes(), seed
        if key not in known:
            known[key] = draw(originals, seed)
        return known[key].copy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "draw", draw_once)
        yield


@pytest.fixture(autouse=True)
def _own_wandb_run() -> Iterator[None]:
    """The next logger starts its own run."""
    yield
    if (wandb := sys.modules.get("wandb")) and wandb.run:
        wandb.finish()


@contextmanager
def offline_wandb() -> Iterator[None]:
    """W&B runs are written to the run's folder, as they are without settings of W&B.

    Its service process resolves relative paths in the folder in which it was started.
    """
    end_wandb()  # a process reads its settings once
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        yield
        end_wandb()


@pytest.fixture
def wandb_offline() -> Iterator[None]:
    with offline_wandb():
        yield


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of the real data sets."""
    if not (folder := os.environ.get("REAL_DATA")):
        pytest.skip("REAL_DATA does not name the folder of the real data sets")
    return Path(folder)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All miniature data sets below one root."""
    import fake_data

    root = tmp_path_factory.mktemp("data")
    fake_data.write_cifar10(root)
    fake_data.write_kaggle_cifar10(root)
    fake_data.write_ucsb(root)
    fake_data.write_digit_recognizer(root)
    fake_data.write_dogs_vs_cats(root)
    fake_data.write_mnist(root)
    fake_data.write_photos(root)
    fake_data.write_names(root)
    fake_data.write_books(root)
    return root


@pytest.fixture(scope="session")
def small(data_dir: Path) -> list[str]:
    """Flags that make ``cifar10_cpu.yaml`` a matter of a second."""
    return [f"--config={CONFIGS / 'cifar10_cpu.yaml'}", f"--data.data_dir={data_dir}", *SMALL]


@pytest.fixture(scope="session")
def trained(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, ``runs/cifar10_cpu/first``, relative to an empty folder."""
    import train

    with pytest.MonkeyPatch.context() as patch, offline_wandb():
        home = tmp_path_factory.mktemp("trained")
        patch.chdir(home)
        train.main(["fit", *small, "--run=first", "--trainer.max_epochs=6"])
        return home / "runs" / "cifar10_cpu" / "first"


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in, without an account and with offline W&B."""
    from kaggle_place import SAMPLE

    from core import kaggle_client
    from pipeline.kaggle import sending

    for name in [name for name in os.environ if name.startswith(("KAGGLE_", "WANDB_"))]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("COLUMNS", "200")  # tables are not folded
    monkeypatch.setattr(sending, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(sending, "SETTLE_SECONDS", 0.1)
    monkeypatch.setattr(kaggle_client, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(kaggle_client, "UPLOAD_SECONDS", 0.05)
    monkeypatch.chdir(tmp_path)
    Path("sample.csv").write_text(SAMPLE)
    return tmp_path


@pytest.fixture
def kaggle(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KaggleServer]:
    """A Kaggle of this machine, and the user's account there."""
    from kaggle_server import KEY, KaggleServer

    for name in [name for name in sys.modules if name.split(".")[0] == "kaggle"]:
        monkeypatch.delitem(sys.modules, name)  # the client reads its settings when imported
    with KaggleServer().running() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server
    for path in workplace.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def resolve_here(args: list[str], code: bytes) -> dict[str, Any]:
    """``parcel.resolve`` in this process, which has the code already."""
    import train

    printed = io.StringIO()
    with tempfile.TemporaryDirectory() as place:
        with tarfile.open(fileobj=io.BytesIO(code), mode="r:bz2") as archive:
            archive.extractall(place, filter="data")
        with redirect_stdout(printed), suppress(SystemExit), chdir(place):
            train.main([*args, "--print_config"])
    return dict(yaml.safe_load(printed.getvalue()))


@pytest.fixture
def quick_push(
    request: pytest.FixtureRequest, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arguments are read in this process, and little code travels; not in slow tests."""
    from pipeline.kaggle import parcel, remote

    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(parcel, "resolve", resolve_here)
        few = [p for p in parcel.code_files() if p.parts[0] in ("train.py", "configs")]
        monkeypatch.setattr(parcel, "code_files", lambda: few)
    monkeypatch.setattr(remote, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(remote, "PATIENCE", 0.05)


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Refusal:
    """The one sentence with which ``submit.py`` refuses."""
    from submit import main

    def run(*args: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(list(args))
        message = capsys.readouterr().err
        assert end.value.code == 1
        assert message.startswith("error: ")
        assert message.count("\n") == 1
        return message

    return run


@pytest.fixture
def decoders_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode image files here: a process started for each of many tests takes minutes in all."""
    from datamodules.image_files import image_cache
    from datamodules.image_files.decode_images import decode

    def decode_here(folder: Path, size: tuple[int, int], names: Sequence[str]) -> image_cache.Chunk:
        pixels, reasons = b"", {}
        for position, name in enumerate(names):
            try:
                pixels += decode(folder / name, size)
            except ValueError as error:
                pixels += bytes(3 * size[0] * size[1])
                reasons[position] = str(error)
        return pixels, reasons

    monkeypatch.setattr(image_cache, "decode_chunk", decode_here)


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The caches of images that were made, one entry each time."""
    from datamodules.image_files import image_cache

    done: list[Path] = []
    make_cache = image_cache.make_cache

    def count(path: Path, *arguments: Any) -> image_cache.Decoded:
        done.append(path)
        return make_cache(path, *arguments)

    monkeypatch.setattr(image_cache, "make_cache", count)
    return done
