"""Filters that are known beforehand. Dimensions: B batch, C channels, H, W sides, F filters."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Filter = Literal["identity", "sobel_x", "sobel_y", "laplacian", "sharpen"]

FILTERS: dict[Filter, list[list[float]]] = {
    "identity": [[0, 0, 0], [0, 1, 0], [0, 0, 0]],
    "sobel_x": [[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]],  # positive where it gets brighter to the right
    "sobel_y": [[-1, -2, -1], [0, 0, 0], [1, 2, 1]],  # and downwards
    "laplacian": [[-1, -1, -1], [-1, 8, -1], [-1, -1, -1]],  # where it is brighter than around
    "sharpen": [[0, -1, 0], [-1, 5, -1], [0, -1, 0]],
}


class FixedFilters(nn.Module):
    """3 x 3 filters on each channel of an image, without anything to train.

    As in every convolution layer the filter is not flipped: O[x, y] = sum K[i, j] I[x + i, y + j].
    Beyond the border the image goes on as at the border, where no edge is seen then.

    Args:
        filters: Which ones.
        in_channels: Channels C of the images.

    Raises:
        ValueError: There is no filter, or it is not known.
    """

    weight: Tensor  # (C * F, 1, 3, 3)

    def __init__(
        self, filters: Sequence[Filter] = ("sobel_x", "sobel_y"), in_channels: int = 3
    ) -> None:
        super().__init__()
        known = ", ".join(get_args(Filter))
        if not filters:
            raise ValueError(f"filters must name at least one of {known}.")
        for name in filters:
            if name not in FILTERS:
                raise ValueError(f"filters must be among {known}, got {name!r}.")
        kernels = torch.tensor([FILTERS[name] for name in filters], dtype=torch.float)
        self.in_channels = in_channels
        self.out_channels = in_channels * len(filters)
        self.register_buffer("weight", kernels.repeat(in_channels, 1, 1)[:, None])

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C * F, H, W), all answers of one channel side by side."""
        if images.shape[1] != self.in_channels:
            raise ValueError(
                f"the filters are made for {self.in_channels} channels, the images have "
                f"{images.shape[1]}; set in_channels={images.shape[1]}."
            )
        padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
        return F.conv2d(padded, self.weight, groups=self.in_channels)
