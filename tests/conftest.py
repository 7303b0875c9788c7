"""A run trained once for all tests that need one, and a place where nothing leaves the machine."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fake_data
import pytest
import torch
import wandb

import train

CONFIGS = Path(__file__).parent.parent / "configs"
SMALL = [
    "--model.network.widths=[8,8,8]",
    "--data.verify=false",
    "--data.val_size=40",
    "--data.batch_size=16",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
]


def on_full_disk(limit: int, program: str) -> subprocess.CompletedProcess[str]:
    """Run a program in which no file grows beyond ``limit`` bytes: as on a full disk."""
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    return subprocess.run(
        [sys.executable, "-c", f"{limited}\n{program}"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(CONFIGS.parent)},
    )


def end_wandb() -> None:
    """End the run, so that the next logger starts its own, and the service process."""
    wandb.finish()
    wandb.teardown()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # the miniature networks of the tests only wait for a second one


@pytest.fixture(autouse=True, scope="session")
def _offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
            patch.setenv(name, str(home))
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        yield


@pytest.fixture(autouse=True)
def _own_wandb_service() -> Iterator[None]:
    """W&B's service process resolves relative paths in the folder in which it was started."""
    yield
    end_wandb()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of the real data sets."""
    if not (folder := os.environ.get("REAL_DATA")):
        pytest.skip("REAL_DATA does not name the folder of the real data sets")
    return Path(folder)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All miniature data sets below one root."""
    root = tmp_path_factory.mktemp("data")
    fake_data.write_cifar10(root)
    fake_data.write_kaggle_cifar10(root)
    fake_data.write_ucsb(root)
    fake_data.write_mnist(root)
    fake_data.write_photos(root)
    fake_data.write_names(root)
    return root


@pytest.fixture(scope="session")
def small(data_dir: Path) -> list[str]:
    """Flags that make ``cifar10_cpu.yaml`` a matter of a second."""
    return [f"--config={CONFIGS / 'cifar10_cpu.yaml'}", f"--data.data_dir={data_dir}", *SMALL]


@pytest.fixture(scope="session")
def trained(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, ``runs/cifar10_cpu/first``, relative to an empty folder."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("trained")
        patch.chdir(home)
        train.main(["fit", *small, "--run=first", "--trainer.max_epochs=6"])
        end_wandb()
        return home / "runs" / "cifar10_cpu" / "first"
