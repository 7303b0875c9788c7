"""The wide residual network is the one of the paper."""

import pytest
import torch

from lit_models.networks import WideResNet


@pytest.mark.parametrize(
    ("depth", "widen", "millions"), [(40, 1, 0.6), (16, 4, 2.7), (28, 10, 36.5)]
)
def test_parameters_are_those_of_the_paper(depth: int, widen: int, millions: float) -> None:
    """Tables 1 and 4 of arXiv:1605.07146."""
    with torch.device("meta"):
        network = WideResNet(depth=depth, widen=widen)
    count = sum(p.numel() for p in network.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.06)


def test_twenty_eight_ten_has_the_stated_parameters() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in WideResNet().parameters()) == 36_479_194


def test_the_image_is_halved_twice() -> None:
    network = WideResNet(5, depth=10, widen=1, in_channels=1)
    assert network.stages(network.stem(torch.zeros(2, 1, 32, 32))).shape == (2, 64, 8, 8)
    assert network(torch.zeros(2, 1, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize("depth", [4, 9, 27])
def test_a_depth_that_no_stage_can_have(depth: int) -> None:
    with pytest.raises(ValueError, match=f"depth must be 10, 16, 22, 28, ..., got {depth}"):
        WideResNet(depth=depth)
