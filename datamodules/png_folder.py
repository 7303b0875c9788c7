"""Folders of numbered PNG files, decoded once. Dimensions: N images, H height, W width."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from datamodules import decode_png
from errors import UserError
from files import atomic_write

CHUNK = 3000  # images that one decoder process is started for: 0.2 s of work
PROBES = 100  # files asked for their time whenever the cache is used


def png_ids(folder: Path) -> np.ndarray:
    """Numbers (N,) of the files ``<id>.png``, ascending: a directory has no order of its own."""
    names = [name for name in os.listdir(folder) if name.endswith(".png") and name[0] != "."]
    if not names:
        raise UserError(f"{folder} holds no PNG files; delete it and run the same command again.")
    if strange := [name for name in names if not name[:-4].isdecimal() or name[0] == "0"]:
        raise UserError(f"{folder / min(strange)} is not named <id>.png; move it away.")
    return np.sort(np.array([int(name[:-4]) for name in names]))


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
    return load_cache(folder, shape, key) or make_cache(folder, ids, shape, key)


def fingerprint(folder: Path, ids: np.ndarray) -> str:
    """A digest that changes when files come, go or are renamed, or when many are overwritten."""
    probes = [folder / f"{i}.png" for i in ids[:: len(ids) // PROBES + 1]]
    times = [path.stat().st_mtime_ns for path in (folder, *probes)]
    return hashlib.sha256(ids.tobytes() + repr(times).encode()).hexdigest()


def load_cache(folder: Path, shape: tuple[int, ...], key: str) -> tuple[np.ndarray, str] | None:
    """Images and their SHA-256, or None where the cache is missing, damaged or out of date."""
    pixels, record = cache_files(folder)
    try:
        made = json.loads(record.read_bytes())
        images = np.lib.format.open_memmap(pixels, mode="c")
        fits = made["key"] == key and images.shape == shape and images.dtype == np.uint8
        return (images, made["sha256"]) if fits else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def make_cache(
    folder: Path, ids: np.ndarray, shape: tuple[int, ...], key: str
) -> tuple[np.ndarray, str]:
    """Decode all images into the cache, whole or not at all; returns them and their SHA-256."""
    pixels, record = cache_files(folder)
    digest = hashlib.sha256()
    with atomic_write(pixels) as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in decode_all(folder, ids, shape):
            file.write(chunk)
            digest.update(chunk)
    with atomic_write(record, "w") as file:
        json.dump({"key": key, "sha256": digest.hexdigest()}, file)
    return np.lib.format.open_memmap(pixels, mode="c"), digest.hexdigest()


def cache_files(folder: Path) -> tuple[Path, Path]:
    """Where the pixels are kept, and what they were made from."""
    return folder.with_name(f"{folder.name}.npy"), folder.with_name(f"{folder.name}.json")


def decode_all(folder: Path, ids: np.ndarray, shape: tuple[int, ...]) -> Iterator[bytes]:
    """Pixels of CHUNK images after the other, decoded by as many processes as there are cores."""
    chunks = [ids[start : start + CHUNK] for start in range(0, len(ids), CHUNK)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the threads only wait for their processes
        yield from track(
            pool.map(partial(decode_chunk, folder, shape), chunks),
            f"Decoding {folder.name}/, only this time",
            total=len(chunks),
            console=Console(stderr=True),
        )


def decode_chunk(folder: Path, shape: tuple[int, ...], ids: np.ndarray) -> bytes:
    _, height, width, _ = shape
    worker = subprocess.run(
        [sys.executable, decode_png.__file__, str(folder), str(height), str(width)],
        input="\n".join(map(str, ids)).encode(),
        stdout=subprocess.PIPE,
    )
    if worker.returncode == decode_png.BAD_IMAGE:
        raise UserError(
            f"{worker.stdout.decode()}; unpack or download {folder} again and run the same command."
        )
    worker.check_returncode()
    return worker.stdout
