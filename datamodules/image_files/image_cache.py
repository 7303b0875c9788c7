"""Image files decoded once, on every core. Dimensions: N images, H height, W width.

The pixels are kept in ``<name>.npy`` and mapped from there; ``<name>.json`` holds what they were
made from. Both may be made elsewhere, and travel with the files or into any ``cache_dir``.
"""

import glob
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import track

from core.errors import UserError
from core.files import atomic_write
from datamodules.image_files import decode_images
from datamodules.loaders.prefetch import prefetch

# files of a set that was handed out as a whole which are asked for their size and time whenever its
# cache is used: asking each of very many small ones would make a later start four times as long
PROBES = 100
_MANY = 50_000  # files, from which on the probes stand for all

Size = tuple[int, int]  # height and width of the pixels
Chunk = tuple[bytes, dict[int, str]]  # pixels, and why images cannot be read, by position


@dataclass(frozen=True)
class Decoded:
    """Images in the order in which they were asked for."""

    pixels: np.ndarray  # (N, H, W, 3) uint8, one's own: writing to it leaves the cache alone
    sha256: str  # of the pixels
    unreadable: dict[int, str]  # why an image could not be read, by position; its pixels are 0


def decode_once(
    folder: Path,
    files: Sequence[str],
    size: Size,
    beside: Path,
    cache_dir: Path | None = None,
    *,
    strict: bool = False,
) -> Decoded:
    """Images of a folder, decoded the first time and mapped from a cache afterwards.

    File times only tell that nothing happened. Where they differ, files were touched, or the cache
    was made elsewhere: it counts if the files have the bytes of which it was made.

    Args:
        folder: Where the files are.
        files: Their paths below it, in the order of the images.
        size: Height and width of the pixels.
        beside: Folder in or beside it where the cache is kept if that can be written.
        cache_dir: Where it is kept instead; sets may share it.
        strict: The files were handed out as a whole: images that cannot be read are refused.

    Raises:
        UserError: The cache cannot be written or, if ``strict``, an image cannot be read. There is
            no new cache then.
    """
    key, shape = _quick_key(folder, files, size, strict), (len(files), *size, 3)
    content = cache(partial(_content_digest, folder, files))
    path = _cache_path(folder, size, beside, cache_dir)
    name = f"{glob.escape(folder.resolve().name)}*.npy"  # of whatever size, made here or elsewhere
    caches = [found for place in (path.parent, beside) for found in place.glob(name)]
    records = [
        (found, record)
        for found in caches
        if (record := read_record(found)) and not (strict and record["unreadable"])
    ]
    for found, record in records:
        if record["key"] == key and (decoded := load_cache(found, shape, record)):
            return decoded
    for found, record in records:
        decoded = load_cache(found, shape, record)
        if decoded and record["files"] == content():
            if os.access(found.parent, os.W_OK):
                write_record(found, record | {"key": key})
            return decoded
    title = f"Decoding {folder.resolve().name}/, only this time"
    chunks = decode_all(folder, files, size, title, strict=strict)
    try:
        return make_cache(path, shape, key, chunks, content)
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            raise UserError(f"{error} Keep it elsewhere: --data.cache_dir=FOLDER.") from error
        raise


def _cache_path(folder: Path, size: Size, beside: Path, cache_dir: Path | None) -> Path:
    """Where a new cache of the pixels of a folder goes."""
    place, source = derived_folder(beside, cache_dir), folder.resolve()
    whose = "" if place == beside else f"-{digest_of(source)}"  # many sets have a folder so named
    return place / f"{source.name}{whose}-{size[0]}x{size[1]}.npy"


def derived_folder(beside: Path, cache_dir: Path | None) -> Path:
    """Folder for what is made of a data set: ``cache_dir``, beside the data, or the user's own."""
    existing = next(place for place in (beside, *beside.absolute().parents) if place.exists())
    if cache_dir is not None or os.access(existing, os.W_OK):
        return cache_dir or beside
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = existing.resolve().name
    place = home / "steadyfit" / f"{name}-{digest_of(existing.resolve())}"
    _say_where(existing, place)
    return place


def digest_of(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:8]


@cache  # once
def _say_where(folder: Path, place: Path) -> None:
    tell(
        f"{folder} is read-only: what is made of it is kept in {place}; choose another place with "
        "--data.cache_dir=FOLDER."
    )


@rank_zero_only
def tell(message: str) -> None:
    print(message, file=sys.stderr)


def _quick_key(folder: Path, files: Sequence[str], size: Size, strict: bool) -> str:
    """A digest that changes when files come, go, are renamed or overwritten.

    Of a competition's many files a few are asked: 300,000 questions take longer than the images.
    """
    step = len(files) // PROBES + 1 if strict and len(files) >= _MANY else 1
    probes = [folder / file for file in files[::step]]
    states = [state(path) for path in (probes if step == 1 else [folder, *probes])]
    return hashlib.sha256(repr((size, list(files), states)).encode()).hexdigest()


def state(path: Path) -> tuple[int, int] | None:
    """Bytes and time of a file, which tell that it has changed; None for a link to nowhere."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _content_digest(folder: Path, files: Sequence[str]) -> str:
    """SHA-256 of the bytes of all files; one that cannot be read counts as empty."""
    digest = hashlib.sha256(b"whole")  # how they are decoded; before, broken ones in part
    for file in files:
        try:
            content = (folder / file).read_bytes()
        except OSError:
            content = b""
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def read_record(path: Path) -> dict[str, Any] | None:
    """The record of a cache, or None where there is none that is whole."""
    try:
        record = json.loads(path.with_suffix(".json").read_bytes())
        unreadable = {int(position): why for position, why in record["unreadable"].items()}
        known = {name: record[name] for name in ("key", "files", "sha256")}
        return known | {"unreadable": unreadable}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_record(path: Path, record: dict[str, Any]) -> None:
    with atomic_write(path.with_suffix(".json"), "w") as file:
        json.dump(record, file)


def load_cache(path: Path, shape: tuple[int, ...], record: dict[str, Any]) -> Decoded | None:
    """The images in ``path``, or None where they are damaged or of another shape."""
    try:
        pixels = np.lib.format.open_memmap(path, mode="c")
    except (OSError, ValueError):
        return None
    fits = pixels.shape == shape and pixels.dtype == np.uint8
    return Decoded(pixels, record["sha256"], record["unreadable"]) if fits else None


def make_cache(
    path: Path,
    shape: tuple[int, ...],
    key: str,
    chunks: Iterator[Chunk],
    content: Callable[[], str],
) -> Decoded:
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
        files = content()  # after the decoders: what they read is in memory
    sha256 = digest.hexdigest()
    record = {"key": key, "files": files, "sha256": sha256, "unreadable": unreadable}
    write_record(path, record)
    return Decoded(np.lib.format.open_memmap(path, mode="c"), sha256, unreadable)


def decode_all(
    folder: Path, names: Sequence[str], size: Size, title: str, *, strict: bool = False
) -> Iterator[Chunk]:
    """Decode the files ``names`` of a folder in as many processes as there are cores.

    Args:
        folder: Where they are.
        names: Their paths below it.
        size: Height and width of the pixels.
        title: What stands beside the progress bar.
        strict: Refuse images that cannot be read.

    Raises:
        UserError: If ``strict``, an image cannot be read.
    """
    cores = os.cpu_count() or 1
    count = chunk_size(len(names), size, cores)
    starts = range(0, len(names), count)
    parts = [names[start : start + count] for start in starts]
    # the threads only wait for their processes; where the disk is slow, few chunks wait for it
    decoded = prefetch(partial(decode_chunk, folder, size), parts, 2 * cores, threads=cores)
    shown = track(decoded, title, total=len(parts), console=Console(stderr=True))
    for start, (pixels, reasons) in zip(starts, shown, strict=True):
        unreadable = {start + position: why for position, why in reasons.items()}
        if strict and unreadable:
            first = min(unreadable)
            raise UserError(
                f"{folder / names[first]} cannot be read: {unreadable[first]}; unpack or download "
                f"{folder} again and run the same command."
            )
        yield pixels, unreadable


def chunk_size(images: int, size: Size, cores: int) -> int:
    """Images for which a process is started: some for each core, of at most 10 MB of pixels."""
    return max(64, min(images // (8 * cores), 10_000_000 // (3 * size[0] * size[1])))


def decode_chunk(folder: Path, size: Size, names: Sequence[str]) -> Chunk:
    height, width = size
    worker = subprocess.run(
        [sys.executable, decode_images.__file__, str(height), str(width), str(folder)],
        input=b"".join(os.fsencode(name) + b"\0" for name in names),
        stdout=subprocess.PIPE,
        check=True,
    )
    end = len(names) * height * width * 3
    reasons = json.loads(worker.stdout[end:])
    return worker.stdout[:end], {int(position): why for position, why in reasons.items()}
