"""What fixed filters see in an image of each class: how steep the brightness is, and the Laplacian.

    python -m benchmarks.edges                    # of the demo's digits
    python -m benchmarks.edges data --output docs/edges.png   # of CIFAR-10 in data/

Dimensions: K classes, H height, W width, C channels.
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from callbacks.pictures.sample_sheet import from_each_class, mosaic
from core.errors import exit_on_user_error
from core.files import atomic_write
from datamodules import CIFAR10DataModule, DemoDataModule
from lit_models.networks import FixedFilters


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
