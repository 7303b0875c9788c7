"""What a command imports before it does anything."""

import subprocess
import sys

import pytest

HEAVY = {"pandas", "sklearn", "wandb", "kaggle"}  # a quarter of a second or more


def imported(module: str) -> set[str]:
    """Names of all modules after the import of one, in a process of its own."""
    command = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, check=True)
    return set(done.stdout.decode().split())


@pytest.mark.parametrize(
    "module", ["train", "predict", "submit", "study", "spikes", "pipeline.kaggle.remote"]
)
def test_commands_read_their_arguments_before_pytorch_is_loaded(module: str) -> None:
    """``predict.py --help`` took eight seconds. OpenMP's settings are read with PyTorch, too."""
    assert imported(module).isdisjoint({"torch", "lightning", *HEAVY})


@pytest.mark.slow
def test_what_a_command_may_not_need_is_imported_later() -> None:
    assert imported("pipeline.cli").isdisjoint(HEAVY)
    assert imported("pipeline.prediction").isdisjoint(HEAVY)
