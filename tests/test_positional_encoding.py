"""Positions tell attention the order; tests/test_transformer.py has the numbers of their table."""

from pathlib import Path

import pytest
import torch

from benchmarks.positional_encoding import attention, main, of_table, product, sentence
from lit_models.networks.transformer import sinusoidal_positions


@pytest.mark.parametrize("dim", [2, 64])
def test_formula_and_table_agree(dim: int) -> None:
    lags = torch.arange(600)
    exact = product(lags, dim)
    torch.testing.assert_close(of_table(lags, dim).double(), exact, rtol=0, atol=1e-4)
    assert exact[0] == dim / 2
    assert exact[1:].max() < dim / 2


def seeded(x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(1)  # the same head each time
    return attention(x)


@pytest.mark.parametrize("positions", [False, True])
def test_attention_alone_is_equivariant_to_order_and_with_positions_it_is_not(
    positions: bool,
) -> None:
    torch.manual_seed(0)
    x, order = sentence(64), torch.randperm(24)
    shift = sinusoidal_positions(24, 64) if positions else torch.zeros(24, 64)
    weights, mixed = seeded(x + shift), seeded(x[order] + shift)
    assert torch.allclose(mixed, weights[order][:, order], atol=1e-5) != positions


def test_equal_words_are_told_apart_by_positions_alone() -> None:
    torch.manual_seed(0)
    x = sentence(64, words=6, length=24)
    copies = seeded(x).unflatten(1, (4, 6))  # each word stands in four places
    torch.testing.assert_close(copies, copies[:, :1].expand_as(copies))
    placed = seeded(x + sinusoidal_positions(24, 64))
    assert torch.equal(placed.argmax(1), torch.arange(24))


def test_the_command_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "positions.png"
    main([f"--output={path}"])
    printed = capsys.readouterr().out.splitlines()
    numbers = [[float(text) for text in line.split()] for line in (printed[1], printed[-2])]
    # processors differ in the last bits of these float32 sums
    assert numbers[0] == pytest.approx([0, 32, 32], abs=1e-5)
    assert numbers[1][:2] == pytest.approx([500, 6.418171], abs=1e-5)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_an_odd_number_of_features_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--dim=5"])
    assert "--dim must be even and positive, got 5." in capsys.readouterr().err
