"""Fixed filters answer where they should."""

import re
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from test_networks import smooth_images
from torch import Tensor

from benchmarks.edges import FILTERS, Filter, FixedFilters

NAMES: tuple[Filter, ...] = get_args(Filter)
EDGES: tuple[Filter, ...] = ("sobel_x", "sobel_y", "laplacian")


def test_a_constant_image_has_no_edges() -> None:
    images = torch.full((2, 3, 5, 6), 0.7)
    answers = FixedFilters(NAMES)(images).unflatten(1, (3, 5))  # channel, filter
    for name, answer in zip(NAMES, answers.unbind(2), strict=True):
        expected = torch.zeros_like(images) if name in EDGES else images
        torch.testing.assert_close(answer, expected)


def test_a_step_answers_at_the_edge_with_its_sign() -> None:
    step = torch.zeros(1, 1, 4, 6)
    step[..., 3:] = 1.0  # brighter to the right
    right, down, around = FixedFilters(EDGES, in_channels=1)(step)[0]
    assert torch.equal(right, torch.tensor([0.0, 0, 4, 4, 0, 0]).expand(4, 6))
    assert torch.equal(around, torch.tensor([0.0, 0, -3, 3, 0, 0]).expand(4, 6))
    assert not down.any()
    turned = FixedFilters(EDGES, in_channels=1)(step.transpose(2, 3))[0]
    assert torch.equal(turned[1], right.T)
    assert torch.equal(FixedFilters(["sobel_x"], 1)(step.flip(3))[0, 0], -right.flip(1))


def test_answers_are_those_of_the_formula_for_each_channel() -> None:
    images = smooth_images(2).double()
    answers = FixedFilters(NAMES).double()(images)
    assert answers.shape == (2, 3 * len(NAMES), 32, 32)
    for c in range(3):
        for f, name in enumerate(NAMES):
            inner = sum(
                FILTERS[name][1 + i][1 + j] * images[:, c, 1 + i : 31 + i, 1 + j : 31 + j]
                for i in (-1, 0, 1)
                for j in (-1, 0, 1)
            )
            torch.testing.assert_close(answers[:, c * len(NAMES) + f, 1:-1, 1:-1], inner)


def gradient_by_formula(gradient: Tensor, kernel: Tensor) -> Tensor:
    """dL/dI[x, y] = sum dL/dO[x - i, y - j] K[i, j], zero beyond the border: the kernel turned."""
    return F.conv2d(gradient, kernel.rot90(2)[None, None], padding=1)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_by_the_image_is_that_of_the_midterm(name: Filter) -> None:
    image = torch.randn(1, 1, 7, 8, requires_grad=True)
    answer = FixedFilters([name], 1)(image)
    gradient = torch.randn_like(answer)
    gradient[..., [0, -1], :] = gradient[..., [0, -1]] = 0.0  # where the border is repeated
    answer.backward(gradient)
    torch.testing.assert_close(
        image.grad, gradient_by_formula(gradient, torch.tensor(FILTERS[name]).float())
    )


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ([], "filters must name at least one of identity, sobel_x, sobel_y, laplacian, sharpen."),
        (
            ["emboss"],
            "filters must be among identity, sobel_x, sobel_y, laplacian, sharpen, got 'emboss'.",
        ),
    ],
    ids=str,
)
def test_filters_that_are_not_there_are_refused(filters: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        FixedFilters(filters)


def test_images_with_other_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="made for 3 channels, the images have 1; set in_channels"):
        FixedFilters()(torch.zeros(2, 1, 8, 8))
