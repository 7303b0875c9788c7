"""CutMix: rectangles change places, and the target is shared as the image is."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import UserError
from lit_models.cutmix import LitCutMix, cutmix

NUM_CLASSES = 5


def model(network: nn.Module, **options: Any) -> LitCutMix:
    return LitCutMix(network, partial(torch.optim.SGD, lr=0.1), num_classes=NUM_CLASSES, **options)


def shares(images: Tensor) -> Tensor:
    """Of each image that came from its partner, where image i is all i + 1 before."""
    own = torch.arange(1, len(images) + 1).view(-1, 1, 1, 1)
    return (images != own).float().mean((1, 2, 3))


def numbered(count: int) -> Tensor:
    return torch.arange(1.0, count + 1).view(-1, 1, 1, 1).expand(count, 3, 32, 24).clone()


def test_cutmix_swaps_one_rectangle_between_partners() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        images, kept = cutmix(numbered(4), 1.0)
        swapped = images[0, 0] != 1
        assert torch.equal(images[0, 0][swapped], torch.full((int(swapped.sum()),), 4.0))
        torch.testing.assert_close(shares(images), (1 - kept).expand(4))
        rows, columns = swapped.any(1), swapped.any(0)
        assert torch.equal(swapped, rows[:, None] & columns)  # a rectangle
        for line in (rows, columns):
            assert line.int().diff().abs().sum() <= 2  # in one piece


def test_cutmix_keeps_every_share_alike_and_leaves_batches_alone() -> None:
    torch.manual_seed(0)
    kept = torch.stack([cutmix(numbered(2), 0.5)[1] for _ in range(1500)])
    untouched = (kept == 1).float().mean().item()
    assert untouched == pytest.approx(0.5, abs=0.04)
    mixed_ones = kept[kept < 1]
    assert mixed_ones.min() < 0.2
    # a side s loses s ** 2 / 4 at the edges, and s ** 2 is even in [0, 1]: 1 - (1/2 - 1/5 + 1/48)
    assert mixed_ones.mean().item() == pytest.approx(0.679, abs=0.025)


def test_cutmix_shares_the_target_as_it_shares_the_image() -> None:
    """The objective equals cross-entropy with the mixed one-hot targets."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, NUM_CLASSES))
    lit = model(network, cutmix=1.0, label_smoothing=0.1)
    lit.record = lambda **values: None  # type: ignore[method-assign]
    images, target = torch.randn(6, 3, 8, 8), torch.arange(6) % NUM_CLASSES
    torch.manual_seed(3)
    objective = lit.training_step([images, target], 0)
    torch.manual_seed(3)
    seen, kept = cutmix(images, 1.0)
    assert 0.1 < kept < 0.9
    one_hot = F.one_hot(target, NUM_CLASSES).float()
    soft = kept * one_hot + (1 - kept) * one_hot.flip(0)
    expected = F.cross_entropy(network(seen), soft, label_smoothing=0.1)
    torch.testing.assert_close(objective, expected)


def test_cutmix_is_for_images_with_one_label() -> None:
    with pytest.raises(UserError, match="LitCutMix needs images with one label each"):
        model(nn.Identity()).training_step([torch.zeros(2, 8), torch.zeros(2).long()], 0)


@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_a_share_of_cutmix_out_of_range_is_refused(value: float) -> None:
    with pytest.raises(UserError, match=r"cutmix must be in \[0, 1\], got"):
        model(nn.Identity(), cutmix=value)
