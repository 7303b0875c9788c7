"""Which errors are a sentence on stderr, and which keep their traceback."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS
from torch import Tensor, nn

import predict
import train
from core.errors import exit_on_user_error

DEMO = [f"--config={CONFIGS / 'demo.yaml'}", "--run=x", "--trainer.accelerator=cpu"]
TINY = ["--trainer.max_epochs=1", "--data.val_size=40", "--trainer.limit_train_batches=2"]


class Refusing(nn.Module):
    """A network that raises where it is told to.

    Args:
        error: Name of a built-in exception.
        where: In the constructor, or in the first forward pass.
    """

    def __init__(self, error: str, where: str = "init", num_classes: int = 10) -> None:
        super().__init__()
        self.error = error
        self.layer = nn.Linear(3 * 32 * 32, num_classes)
        self.where = where
        if where == "init":
            raise self.planted()

    def planted(self) -> Exception:
        return getattr(__import__("builtins"), self.error)(f"{self.error} of ours")

    def forward(self, images: Tensor) -> Tensor:
        if self.where == "forward":
            raise self.planted()
        return self.layer(images.flatten(1))


class Step(torch.optim.SGD):
    """An optimizer whose first step raises a ValueError, as a bug of ours would."""

    def step(self, closure: Any = None) -> Any:
        closure()
        raise ValueError("a bug in a step")


def fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.chdir(tmp_path)
    flags = tuple(flag.replace("HERE", __name__) for flag in flags)
    train.main(["fit", *DEMO, *TINY, "--model.lr_scheduler=null", *flags])


SGD = "--model.optimizer=torch.optim.SGD"
REFUSING = ("--model.network=HERE.Refusing", SGD)
RATE = "--model.optimizer.lr=0.1"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((*REFUSING, RATE, "--model.network.error=ValueError"), "ValueError of ours"),
        ((SGD, "--model.optimizer.lr=-1"), "Invalid learning rate"),
        (("--trainer.limit_val_batches=-1",), "limit_val_batches"),
        (
            ("--trainer.callbacks+=GradientNormClipping",),
            "GradientNormClipping is gone since version 0.1.0; UpdateClipping",
        ),
    ],
    ids=["network", "optimizer", "trainer", "callbacks"],
)  # fmt: skip
def test_what_is_refused_before_the_first_batch_is_a_sentence(
    flags: tuple[str, ...],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A ValueError of torch or of a network was a traceback of 60 lines."""
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path, monkeypatch, *flags)
    assert stop.value.code == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: ")
    assert said in last


@pytest.mark.parametrize(("error", "where"), [("AttributeError", "init"), ("KeyError", "forward")])
def test_other_errors_of_ours_keep_their_traceback(
    error: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = (f"--model.network.error={error}", f"--model.network.where={where}")
    with pytest.raises((KeyError, AttributeError), match="of ours"):
        fit(tmp_path, monkeypatch, *REFUSING, RATE, *flags)


def test_from_the_first_batch_on_a_value_error_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="a bug in a step"):
        fit(tmp_path, monkeypatch, "--model.optimizer=HERE.Step", RATE)


@pytest.mark.parametrize("error", ["ValueError", "RuntimeError"])
def test_what_a_network_says_of_its_first_images_is_a_sentence(
    error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A configuration and data of another kind ended in 36 and 118 lines."""
    flags = (f"--model.network.error={error}", "--model.network.where=forward")
    with pytest.raises(SystemExit):
        fit(tmp_path, monkeypatch, *REFUSING, RATE, *flags)
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: LitClassifier with Refusing cannot be trained on DemoDataModule, whose batches are "
        f"(4, 3, 32, 32) float32, (4,) int64: {error} of ours; --debug shows where."
    )


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("HERE.Nothing", "there is no test_telling.Nothing"),
        ("nowhere.Net", "No module named 'nowhere'"),
    ],
)
def test_an_import_that_fails_says_why(
    path: str,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The sentence ended in a colon."""
    with pytest.raises(SystemExit):
        fit(tmp_path, monkeypatch, f"--model.network={path}")
    assert reason in capsys.readouterr().err.splitlines()[-1]


def test_debug_shows_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        fit(tmp_path, monkeypatch, "--data.batch_size=0", "--debug")
    with pytest.raises(ValueError, match="is not a run folder"):
        predict.main(["runs/nowhere", "--debug"])
    assert "--debug" not in (tmp_path / "runs").as_posix()


def test_an_error_behind_another_is_not_the_mistake() -> None:
    with pytest.raises(KeyError), exit_on_user_error() as errors:
        errors.setting_up = True
        try:
            raise ValueError("handled")
        except ValueError:
            raise KeyError("a bug in the handler") from None


@pytest.mark.parametrize("command", ["train", "predict", "submit", "study", "spikes"])
def test_every_command_has_debug(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = __import__(command)
    arguments = {"train": ["fit", "--help"], "study": ["run", "--help"]}
    with pytest.raises(SystemExit):
        module.main(arguments.get(command, ["--help"]))
    assert "--debug" in capsys.readouterr().out
    assert command in sys.modules
