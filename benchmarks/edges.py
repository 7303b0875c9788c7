"""Edges in an image of each class by fixed filters: steepness of the brightness, and the Laplacian.

    python -m benchmarks.edges                    # of the demo's digits
    python -m benchmarks.edges data --output docs/edges.png   # of CIFAR-10 in data/

Dimensions: B batch, K classes, H height, W width, C channels, F filters.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from callbacks.pictures.sample_sheet import from_each_class, mosaic
from core.errors import exit_on_user_error
from core.files import atomic_write
from datamodules import CIFAR10DataModule, DemoDataModule

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


def edges(images: Tensor) -> tuple[Tensor, Tensor]:
    """Answers to the brightness of images (K, H, W, C), the mean of their channels in [0, 1].

    Returns:
        The length of the gradient by Sobel's filters, and the Laplacian, each (K, H, W).
    """
    brightness = images.float().mean(3)[:, None] / 255  # (K, 1, H, W)
    x, y, laplacian = FixedFilters(["sobel_x", "sobel_y", "laplacian"], 1)(brightness).unbind(1)
    return x.hypot(y), laplacian


def picture(images: Tensor, class_names: list[str]) -> Figure:
    """Draw images uint8 (K, H, W, C), a column for each, and their edges below."""
    steepness, laplacian = edges(images)
    # the strongest few are cut off, so that the others are seen
    limit = laplacian.abs().quantile(0.99)
    rows = {
        "image": images,
        "Sobel": (255 * steepness / steepness.quantile(0.99)).clamp(0, 255)[..., None],
        "Laplacian": (127.5 + 127.5 * laplacian / limit).clamp(0, 255)[..., None],
    }
    figure = Figure(figsize=(1.2 + 0.8 * len(images), 2.9), layout="constrained")
    for axes, (label, row) in zip(figure.subplots(len(rows), 1), rows.items(), strict=True):
        axes.imshow(mosaic(row.byte()[None]), interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([images.shape[1] / 2], [label])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    size = images.shape[2] + 2  # with the gap of the mosaic
    top = figure.axes[0]
    top.set_xticks([size * k + size / 2 for k in range(len(images))], class_names)
    top.xaxis.tick_top()
    return figure


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.edges",
        description="Draw an image of each class with what Sobel's filters and the Laplacian see.",
        allow_abbrev=False,
    )
    parser.add_argument("data_dir", nargs="?", help="where CIFAR-10 is; the demo's digits without")
    parser.add_argument("--output", type=Path, default=Path("edges.png"))
    options = parser.parse_args(args)
    with exit_on_user_error():
        data = (
            CIFAR10DataModule(data_dir=options.data_dir) if options.data_dir else DemoDataModule()
        )
        images, targets = data.read_train()
        classes, index = from_each_class(targets, 1)
        names = [data.class_names[k] for k in classes]
        with atomic_write(options.output) as file:
            picture(images[index[:, 0]], names).savefig(file, format="png", dpi=120)
        print(f"The picture is in {options.output}.")


if __name__ == "__main__":
    main()
