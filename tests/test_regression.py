"""Regression: its loss, what it is measured by, and every-step targets in classification."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import CONFIGS, end_wandb
from torch import Tensor, nn

import train
from core.errors import UserError
from core.runs import load_checkpoint
from datamodules.base import IGNORED
from lit_models import LitClassifier, LitRegressor
from lit_models.networks import RNN, Recurrent

READS = pytest.mark.parametrize("read", ["every", "last"])


class Answer(nn.Module):
    """Gives out what it was told, whatever comes in."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.outputs = nn.Parameter(outputs)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.outputs


# The course's test of its loss (Berkeley CS182, homework 6)
PREDS = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
TARGET = torch.tensor([[-1.1, -1.2, -1.3], [-1.4, -1.5, -1.6]])


@pytest.mark.parametrize(
    ("preds", "golden"), [(PREDS[:, :, None], 3.0067), (PREDS[:, -1:], 3.7)], ids=["all", "last"]
)
def test_loss_is_that_of_the_course(preds: Tensor, golden: float) -> None:
    model = LitRegressor(Answer(preds), torch.optim.SGD)
    recorded: dict[str, Tensor] = {}
    model.record = recorded.update  # type: ignore[method-assign]
    batch = [torch.zeros(2, 3, 1), TARGET]
    assert model.training_step(batch, 0).item() == pytest.approx(golden, abs=1e-4)
    assert recorded["loss"].item() == pytest.approx(golden, abs=1e-4)
    assert model.evaluation_step(batch)["loss"].item() == pytest.approx(golden, abs=1e-4)


def test_shapes_that_do_not_fit_are_refused() -> None:
    model = LitRegressor(Answer(torch.zeros(2, 4)), torch.optim.SGD)
    with pytest.raises(UserError, match=r"numbers of shape \(2, 4\) for targets of shape \(2, 3\)"):
        model.evaluation_step([torch.zeros(2, 3, 1), TARGET])


@pytest.mark.slow
def test_it_learns_and_keeps_the_best_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--model.network.read=last", "--data.epoch_size=3200", "--data.val_size=500"]
    flags += ["--model.optimizer.lr=0.01", "--trainer.max_epochs=2", "--run=first"]
    train.main(["fit", f"--config={CONFIGS / 'running_mean_rnn.yaml'}", *flags])
    folder = Path("runs/running_mean_rnn/first")
    best = load_checkpoint(folder / "checkpoints" / "best.ckpt")
    assert best["metrics"]["val/r2"] > 0.8
    loss, mae = best["metrics"]["val/loss"], best["metrics"]["val/mae"]
    assert 0 < mae < loss**0.5
    end_wandb()
    train.main(["test", f"--run={folder}"])
    assert "test/r2" in capsys.readouterr().out


# Classification of every step


def batch_of_steps() -> tuple[Tensor, Tensor, Tensor]:
    """Logits (2, 3, 4), targets with two steps that count for nothing, and which ones count."""
    torch.manual_seed(0)
    target = torch.tensor([[0, 1, 2], [3, IGNORED, IGNORED]])
    return torch.randn(2, 3, 4), target, target != IGNORED


def test_ignored_steps_count_for_nothing() -> None:
    logits, target, counted = batch_of_steps()
    model = LitClassifier(Answer(logits), torch.optim.SGD, num_classes=4)
    recorded: dict[str, Tensor] = {}
    model.record = recorded.update  # type: ignore[method-assign]
    expected = F.cross_entropy(logits[counted], target[counted])
    batch = [torch.zeros(2, 3, 1), target]
    loss = model.training_step(batch, 0)
    torch.testing.assert_close(loss, expected)
    right = (logits[counted].argmax(1) == target[counted]).float().mean()
    torch.testing.assert_close(recorded["accuracy"], right)
    loss.backward()
    gradient = model.network.outputs.grad
    assert isinstance(gradient, Tensor)
    assert (gradient[~counted] == 0).all()

    outputs = model._evaluate(batch, model.val_metrics)
    torch.testing.assert_close(outputs["loss"], expected)
    metrics = model.val_metrics.compute()
    torch.testing.assert_close(metrics["val/accuracy"], right)
    torch.testing.assert_close(metrics["val/loss"], expected.detach())


@pytest.mark.slow
def test_the_echo_is_trained_and_tested_by_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--data.max_delay=2", "--model.network.rnn.input_size=30", "--data.epoch_size=640"]
    flags += ["--data.val_size=100", "--trainer.max_epochs=1", "--run=first"]
    train.main(["fit", f"--config={CONFIGS / 'echo.yaml'}", *flags])
    end_wandb()
    train.main(["test", "--run=runs/echo/first"])
    table = (tmp_path / "runs/echo/first/confusion_matrix_test.csv").read_text()
    counts = [int(x) for row in table.splitlines()[1:] for x in row.split(",")[1:]]
    assert 15 * 10_000 < sum(counts) < 25 * 10_000  # steps behind an end are not counted


@READS
def test_both_readings_of_a_regression_have_one_target(read: Any) -> None:
    model = LitRegressor(Recurrent(RNN(1, 4), 1, read=read), torch.optim.SGD)
    target = torch.randn(5, 7)
    preds, kept = model.predictions([torch.randn(5, 7, 1), target])
    assert preds.shape == kept.shape
    assert torch.equal(kept, target if read == "every" else target[:, -1])
