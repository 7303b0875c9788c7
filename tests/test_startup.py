"""What a command imports before it does anything."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent
HEAVY = {"pandas", "sklearn", "wandb", "kaggle"}  # a quarter of a second or more


def imported(statements: str) -> set[str]:
    """Names of all modules after some statements, in a process of its own."""
    command = f"import sys; {statements}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=HERE, capture_output=True, check=True
    )
    return set(done.stdout.decode().split())


@pytest.mark.parametrize(
    "module", ["train", "predict", "submit", "study", "spikes", "pipeline.kaggle.remote"]
)
def test_commands_read_their_arguments_before_pytorch_is_loaded(module: str) -> None:
    """``predict.py --help`` took eight seconds. OpenMP's settings are read with PyTorch, too."""
    assert imported(f"import {module}").isdisjoint({"torch", "lightning", *HEAVY})


@pytest.mark.slow
@pytest.mark.parametrize("module", ["pipeline.cli", "pipeline.prediction"])
def test_what_a_command_may_not_need_is_imported_later(module: str) -> None:
    found = imported(f"from core.starting import start; start(); import {module}")
    assert found.isdisjoint({"scipy.signal", "scipy.stats", *HEAVY})


@pytest.mark.slow
def test_scipy_is_whole_behind_torchmetrics() -> None:
    asking = "import scipy.signal; scipy.signal.windows.hamming(3)"
    assert "scipy.stats" in imported(f"from core.starting import start; start(); {asking}")


@pytest.mark.slow
def test_a_wandb_run_begins_without_the_job_queue(workplace: Path) -> None:
    begin = f"from callbacks import ResumableWandbLogger as L; L(save_dir={str(workplace)!r})"
    begin += ".experiment.finish()"
    assert "wandb.sdk.launch" not in imported(begin)
    loaded = "import wandb.sdk.launch.inputs.internal as queue; asked = []; "
    loaded += "queue.StagedLaunchInputs.apply = lambda self, run: asked.append(run); "
    imported(f"{loaded}{begin}; assert len(asked) == 1")
