"""Folders of numbered PNG files, decoded once. Dimensions: N images, H height, W width."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from core.errors import UserError
from datamodules.image_files.image_cache import Chunk, decode_all, load_cache, make_cache

CHUNK = 3000  # images that one decoder process is started for: 0.2 s of work
PROBES = 100  # files asked for their time whenever the cache is used


def png_ids(folder: Path) -> np.ndarray:
    """Numbers (N,) of the files ``<id>.png``, ascending: a directory has no order of its own."""
    names = [name for name in os.listdir(folder) if name.endswith(".png") and name[0] != "."]
    if not names:
        raise UserError(f"{folder} holds no PNG files; delete it and run the same command again.")
    numbers = [name[:-4] for name in names]
    # another script's digits would be a second file of the same id
    if strange := [n for n in numbers if not (n.isascii() and n.isdecimal()) or n[0] == "0"]:
        raise UserError(f"{folder / min(strange)}.png is not named <id>.png; move it away.")
    return np.sort(np.array(list(map(int, numbers))))


def read_images(folder: Path, ids: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, str]:
    """All images of a folder, decoded the first time and mapped from ``<folder>.npy`` afterwards.

    The cache is made again when it is damaged or when files came, went or changed. A few images
    overwritten in place go unnoticed: asking every file for its time would make each later start
    four times as long.

    Args:
        folder: A folder of ``<id>.png`` files.
        ids: Their numbers (N,), see :func:`png_ids`.
        size: Height and width that all images must have.

    Returns:
        Pixels (N, H, W, 3) uint8 in the order of ``ids``; writing to them leaves the cache alone.
        And their SHA-256.

    Raises:
        UserError: An image is broken or of another size or depth; there is no new cache then.
    """
    shape = (len(ids), *size, 3)
    key = fingerprint(folder, ids)
    cache = folder.with_name(f"{folder.name}.npy")
    images = load_cache(cache, shape, key)
    if images is None:
        names = [f"{i}.png" for i in ids]
        title = f"Decoding {folder.name}/, only this time"
        chunks = decode_all(folder, names, size, "exact", CHUNK, title)
        images = make_cache(cache, shape, key, all_readable(folder, chunks))
    return images.pixels, images.sha256


def fingerprint(folder: Path, ids: np.ndarray) -> str:
    """A digest that changes when files come, go or are renamed, or when many are overwritten."""
    probes = [folder / f"{i}.png" for i in ids[:: len(ids) // PROBES + 1]]
    try:
        times = [path.stat().st_mtime_ns for path in (folder, *probes)]
    except OSError as error:  # a link to what is not there
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}); unpack or download "
            f"{folder} again."
        ) from None
    return hashlib.sha256(ids.tobytes() + repr(times).encode()).hexdigest()


def all_readable(folder: Path, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """The chunks as they come, until one has an image that cannot be read."""
    for pixels, reasons in chunks:
        if reasons:
            raise UserError(
                f"{reasons[min(reasons)]}; unpack or download {folder} again and run the same "
                "command."
            )
        yield pixels, reasons
