"""What a training batch costs before the network sees it, and what decoding a Kaggle folder costs.

    python -m benchmarks.input_pipeline --data_dir data --png_folder data/kaggle-cifar10/test
    python -m benchmarks.input_pipeline --quick  # random images, a few seconds

Three pipelines make the same batches: 512 images, cropped from a border of 4, mirrored at random
and normalised. One is this project's resident loader, two are the torchvision ``DataLoader`` as
people have it, on PIL images and on tensors. They run on one thread and in turns, so that a busy
machine is equally unkind to all. Compared are medians of CPU time; the ratio says how many times
faster the resident loader is. A second table says what each kind of further augmentation adds.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms as v1
from torchvision.transforms import v2

from datamodules.image_files.image_cache import decode_once
from datamodules.image_files.named_images import images_by_id
from datamodules.images.augmentation import Augmentation
from datamodules.images.base import ImageDataModule
from datamodules.images.cifar10 import CIFAR10DataModule

BATCH = 512
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

Batches = Iterator[Sequence[Any]]


class Transformed:
    """A map-style data set whose images go through a transform one by one."""

    def __init__(self, images: Any, labels: Tensor, transform: Callable) -> None:
        self.images = images
        self.labels = labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def resident(images: Tensor, labels: Tensor) -> Batches:
    """This project: a batch is one gather from views of the padded images."""
    datamodule = ImageDataModule(batch_size=BATCH, augmentation=Augmentation(crop=4, flip="random"))
    loader = datamodule.make_loader((images, labels), "train")
    while True:
        yield from loader
        loader.set_epoch(loader.epoch + 1)


def on_pil(images: Tensor, labels: Tensor) -> Batches:
    """The pipeline of most tutorials: PIL images and torchvision's first transforms."""
    augment = v1.Compose(
        [
            v1.RandomCrop(32, padding=4),
            v1.RandomHorizontalFlip(),
            v1.ToTensor(),
            v1.Normalize(MEAN, STD),
        ]
    )
    pictures = [Image.fromarray(image) for image in images.numpy()]
    return forever(Transformed(pictures, labels, augment))


def on_tensors(images: Tensor, labels: Tensor) -> Batches:
    """torchvision's newer transforms on uint8 tensors."""
    augment = v2.Compose(
        [
            v2.RandomCrop(32, padding=4),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    return forever(Transformed(images.permute(0, 3, 1, 2).contiguous(), labels, augment))


def forever(dataset: Any) -> Batches:
    loader = DataLoader(dataset, batch_size=BATCH, shuffle=True, drop_last=True)
    while True:
        yield from loader


PIPELINES = {
    "resident loader": resident,
    "DataLoader, tensors": on_tensors,
    "DataLoader, PIL": on_pil,
}


def rate(batches: Batches, count: int) -> float:
    """Images per CPU second over the next ``count`` batches."""
    start = time.process_time()
    images = sum(len(labels) for _, labels in islice(batches, count))
    return images / (time.process_time() - start)


def compare_pipelines(images: Tensor, labels: Tensor, rounds: int) -> Table:
    running = {name: make(images, labels) for name, make in PIPELINES.items()}
    steps = dict.fromkeys(PIPELINES, 4) | {"resident loader": len(labels) // BATCH}  # an epoch
    rates: dict[str, list[float]] = {name: [] for name in PIPELINES}
    for measured in [False, *[True] * rounds]:  # the first round warms up
        for name, batches in running.items():
            result = rate(batches, steps[name])
            if measured:
                rates[name].append(result)
    ours = statistics.median(rates["resident loader"])
    table = Table("pipeline", "images / CPU s", "lowest to highest", "ratio")
    for name, values in rates.items():
        median, spread = statistics.median(values), f"{min(values):,.0f} to {max(values):,.0f}"
        table.add_row(name, f"{median:,.0f}", spread, f"{ours / median:.1f}")
    return table


EFFECTS = {
    "rotate, scale, shear": Augmentation(rotate=15, scale=0.1, shear=10),
    "the same and elastic": Augmentation(rotate=15, scale=0.1, shear=10, elastic=1),
    "brightness, contrast": Augmentation(brightness=0.2, contrast=0.2),
    "saturation, hue": Augmentation(saturation=0.2, hue=0.05),
    "blur": Augmentation(blur=1),
}


def measure_effects(rounds: int) -> Table:
    """Milliseconds of CPU time by which each kind of augmentation prolongs a batch."""
    shapes = {"64 of 28 x 28, grey": (64, 28, 28, 1), "512 of 32 x 32, colour": (512, 32, 32, 3)}
    table = Table("effects", *shapes)
    for name, augmentation in EFFECTS.items():
        effects = augmentation.effects
        assert effects
        cells = []
        for shape in shapes.values():
            if shape[-1] == 1 and augmentation.hue:
                cells.append("")
                continue
            images = torch.rand(shape).permute(0, 3, 1, 2)
            parameters = effects.parameters(torch.rand(shape[0], effects.draws))
            seconds = []
            for _ in range(10 * rounds):
                start = time.process_time()
                effects(images, parameters)
                seconds.append(time.process_time() - start)
            cells.append(f"{1000 * statistics.median(seconds):.2f} ms")
        table.add_row(name, *cells)
    return table


def compare_decoding(source: Path) -> Table:
    """Seconds to read a folder of PNG files the first and the second time."""
    seconds = []
    with tempfile.TemporaryDirectory() as temporary:
        for _ in range(4):
            start = time.perf_counter()
            files = list(images_by_id(source).values())
            images = decode_once(
                source, files, (32, 32), source.parent, Path(temporary), strict=True
            ).pixels
            seconds.append(time.perf_counter() - start)
    first, second = seconds[0], statistics.median(seconds[1:])
    table = Table("PNG files", "decoded", "from the cache", "ratio")
    table.add_row(f"{len(images):,}", f"{first:.2f} s", f"{second:.4f} s", f"{first / second:.0f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the input pipeline on the CPU.")
    parser.add_argument("--data_dir", default="data", help="root folder of the data sets")
    parser.add_argument("--png_folder", type=Path, help="also decode this folder of <id>.png")
    parser.add_argument("--quick", action="store_true", help="random images and three rounds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.quick:
        images = torch.randint(256, (5120, 32, 32, 3), dtype=torch.uint8)
        labels = torch.arange(5120) % 10
    else:
        images, labels = CIFAR10DataModule(data_dir=args.data_dir).read_train()
    console = Console()
    console.print(f"torch {torch.__version__}, {os.cpu_count()} cores, one thread used")
    console.print(compare_pipelines(images, labels, rounds=3 if args.quick else 9))
    console.print(measure_effects(rounds=3 if args.quick else 9))
    if args.png_folder:
        console.print(compare_decoding(args.png_folder))


if __name__ == "__main__":
    main()
