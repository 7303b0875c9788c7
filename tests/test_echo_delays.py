"""The accuracy of an echo run at each delay."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import echo_delays
from datamodules import EchoDataModule
from datamodules.sequences.echo import echo
from lit_models import LitClassifier
from pipeline.loading import LoadedRun


class Perfect(nn.Module):
    """Says the echo, but for sequences of one delay, in which it says nothing."""

    def __init__(self, deaf_to: int) -> None:
        super().__init__()
        self.deaf_to = deaf_to

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        letters, delays = x[:, :, :27].argmax(2), x[:, 0, 27:].argmax(1)
        said = echo(letters, delays, lengths).clamp(min=0)
        said[delays == self.deaf_to] = 0
        return nn.functional.one_hot(said, 27).float()


def test_each_delay_is_counted_alone() -> None:
    data = EchoDataModule(max_delay=3, min_length=6, max_length=6)
    model = LitClassifier(Perfect(deaf_to=2), torch.optim.SGD, num_classes=27)
    found = echo_delays.accuracies(LoadedRun(Path("run"), Path("run"), {}, {}, model, data))
    assert {delay: accuracy for delay, (accuracy, _) in found.items()} == pytest.approx(
        {0: 1.0, 1: 1.0, 2: 2 / 6, 3: 1.0}  # of six letters, two steps without an echo
    )
    assert sum(count for _, count in found.values()) == EchoDataModule.test_size


@pytest.mark.slow
def test_another_run_is_refused(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        echo_delays.main([str(trained)])
    assert stopped.value.code == 1
    assert "was not trained on the echo." in capsys.readouterr().err
