"""The picture of edges, as a command."""

from pathlib import Path

import pytest
import torch

from benchmarks.edges import edges, main


def test_edges_are_found_whatever_their_direction() -> None:
    """A bright square: steep along its sides, and the Laplacian positive inside of them."""
    images = torch.zeros(1, 12, 12, 3, dtype=torch.uint8)
    images[:, 3:9, 3:9] = 255
    steepness, laplacian = (answer[0] for answer in edges(images))
    for answer in (steepness, laplacian):
        torch.testing.assert_close(answer, answer.T)
        torch.testing.assert_close(answer, answer.flip(0))
    assert steepness[5].tolist() == [0, 0, 4, 4, 0, 0, 0, 0, 4, 4, 0, 0]
    assert laplacian[5].tolist() == [0, 0, -3, 3, 0, 0, 0, 0, 3, -3, 0, 0]


def test_the_command_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "edges.png"
    main([f"--output={path}"])
    assert f"The picture is in {path}." in capsys.readouterr().out
    assert path.read_bytes().startswith(b"\x89PNG")


def test_data_that_are_not_there_are_told_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "cifar-10-batches-py does not exist" in capsys.readouterr().err
