"""Image files decoded once, on every core. Dimensions: N images, H height, W width.

The pixels are kept in ``<name>.npy`` and mapped from there; ``<name>.json`` holds what they were
made from.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.progress import track

from core.files import atomic_write
from datamodules.image_files import decode_images
from datamodules.loaders.ahead import ahead

How = Literal["exact", "fit"]  # a PNG of that very size, or any photo scaled and cropped to it
Chunk = tuple[bytes, dict[int, str]]  # pixels, and why images cannot be read, by position


@dataclass(frozen=True)
class Decoded:
    """Images in the order in which they were asked for."""

    pixels: np.ndarray  # (N, H, W, 3) uint8, one's own: writing to it leaves the cache alone
    sha256: str  # of the pixels
    unreadable: dict[int, str]  # why an image could not be read, by position; its pixels are 0


def load_cache(path: Path, shape: tuple[int, ...], key: str) -> Decoded | None:
    """The images in ``path``, or None where the cache is missing, damaged or has another key."""
    try:
        made = json.loads(path.with_suffix(".json").read_bytes())
        pixels = np.lib.format.open_memmap(path, mode="c")
        unreadable = {int(position): why for position, why in made["unreadable"].items()}
        fits = made["key"] == key and pixels.shape == shape and pixels.dtype == np.uint8
        return Decoded(pixels, made["sha256"], unreadable) if fits else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def make_cache(path: Path, shape: tuple[int, ...], key: str, chunks: Iterable[Chunk]) -> Decoded:
    """Write decoded images to ``path``, whole or not at all."""
    digest = hashlib.sha256()
    unreadable: dict[int, str] = {}
    with atomic_write(path) as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for pixels, reasons in chunks:
            file.write(pixels)
            digest.update(pixels)
            unreadable |= reasons
    record = {"key": key, "sha256": digest.hexdigest(), "unreadable": unreadable}
    with atomic_write(path.with_suffix(".json"), "w") as file:
        json.dump(record, file)
    return Decoded(np.lib.format.open_memmap(path, mode="c"), digest.hexdigest(), unreadable)


def decode_all(
    folder: Path, names: Sequence[str], size: tuple[int, int], how: How, chunk: int, title: str
) -> Iterator[Chunk]:
    """Decode the files ``names`` of a folder in as many processes as there are cores.

    Args:
        folder: Where they are.
        names: Their paths below it.
        size: Height and width of the pixels.
        how: What is done about files of another size, and which formats are read.
        chunk: Files that one process is started for.
        title: What stands beside the progress bar.
    """
    starts = range(0, len(names), chunk)
    parts = [names[start : start + chunk] for start in starts]
    cores = os.cpu_count() or 1
    # the threads only wait for their processes; where the disk is slow, few chunks wait for it
    decoded = ahead(partial(decode_chunk, folder, size, how), parts, 2 * cores, threads=cores)
    shown = track(decoded, title, total=len(parts), console=Console(stderr=True))
    for start, (pixels, reasons) in zip(starts, shown, strict=True):
        yield pixels, {start + position: why for position, why in reasons.items()}


def decode_chunk(folder: Path, size: tuple[int, int], how: How, names: Sequence[str]) -> Chunk:
    height, width = size
    worker = subprocess.run(
        [sys.executable, decode_images.__file__, how, str(height), str(width), str(folder)],
        input=b"".join(os.fsencode(name) + b"\0" for name in names),
        stdout=subprocess.PIPE,
        check=True,
    )
    end = len(names) * height * width * 3
    reasons = json.loads(worker.stdout[end:])
    return worker.stdout[:end], {int(position): why for position, why in reasons.items()}
