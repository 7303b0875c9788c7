"""Filters that are known beforehand, in front of a network.

Dimensions: B batch, C channels, H height, W width, F filters, K classes.
"""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_models.networks.data_dependent import asking_for_data

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
                f"{images.shape[1]}; set --model.network.in_channels={images.shape[1]}."
            )
        padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
        return F.conv2d(padded, self.weight, groups=self.in_channels)


class Filtered(nn.Module):
    """An image network behind fixed filters.

    Args:
        network: Makes a network of images. Its own ``in_channels`` is what the filters leave, and
            its ``num_classes`` that of here, whatever is set for them.
        filters: What it sees; with ``identity`` among them the image as well.
        in_channels: Channels C of the images.
        num_classes: Number of classes K the network is made for.

    Raises:
        ValueError: The images have another number of channels.
    """

    def __init__(
        self,
        network: Callable[[], nn.Module],
        filters: Sequence[Filter] = ("identity", "sobel_x", "sobel_y"),
        in_channels: int = 3,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        self.filters = FixedFilters(filters, in_channels)
        facts = {"in_channels": self.filters.out_channels, "num_classes": num_classes}
        self.network = network(**facts)

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W) -> (B, K)
        return self.network(self.filters(images))

    def init_from_data(self, images: Tensor) -> None:
        """Show the layers that ask for images what the filters make of them."""
        answers = self.filters.to(images.device)(images)  # before training, all may still be apart
        for layer in asking_for_data(self.network):
            layer.init_from_data(answers)
