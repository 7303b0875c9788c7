"""The course's gradient visualiser, as a command."""

from pathlib import Path

import pytest
from torch import Tensor

from benchmarks.gradient_visualiser import main, untrained


@pytest.mark.parametrize("loss", ["last", "every"])
def test_the_visualiser_prints_and_draws(
    loss: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "curves.png"
    scales = ["--weight_scale", "0.5", "3"]
    main(["--nonlinearity", "identity", "tanh", *scales, f"--loss={loss}", f"--output={path}"])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 5
    assert "x 0.5, |eigenvalue| 0.29" in printed[0]
    assert path.exists()


def gradients(loss: str, scale: float) -> Tensor:
    return untrained("identity", scale, 1.0, 30, loss, seed=0).gradients


def test_a_loss_at_every_step_reaches_early_states_from_nearby_targets() -> None:
    """Of the last loss alone almost nothing is left at the first step."""
    assert gradients("last", 0.5)[0] < 1e-12
    assert gradients("every", 0.5)[0] > 1e-3
    assert gradients("last", 3)[0] > 1e6


def test_lengths_of_the_visualiser_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--steps=0"])
    assert "--steps must be at least 1, got 0" in capsys.readouterr().err
