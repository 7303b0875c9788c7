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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import track

from core.errors import UserError
from core.files import atomic_write
from datamodules.image_files import decode_images
from datamodules.loaders.prefetch import prefetch

How = Literal["exact", "fit"]  # images of that very size, or any photo scaled and cropped to it
CHUNK = {"exact": 3000, "fit": 64}  # that one decoder process is started for: 0.2 to 1 s of work
# files asked for their size and time whenever a cache is used: asking each of very many small ones
# would make each later start four times as long
PROBES = {"exact": 100, "fit": sys.maxsize}

Chunk = tuple[bytes, dict[int, str]]  # pixels, and why images cannot be read, by position


@dataclass(frozen=True)
class Decoded:
    """Images in the order in which they were asked for."""

    pixels: np.ndarray  # (N, H, W, 3) uint8, one's own: writing to it leaves the cache alone
    sha256: str  # of the pixels
    unreadable: dict[int, str]  # why an image could not be read, by position; its pixels are 0


@dataclass(frozen=True)
class Cache:
    """Places of the pixels of one folder.

    Args:
        source: The folder.
        beside: Folder in or beside it where they are kept if it can be written.
        cache_dir: Where they are kept instead; sets may share it.
        end: End of the names of their files, such as the size.
    """

    source: Path
    beside: Path
    cache_dir: Path | None = None
    end: str = ""

    @property
    def path(self) -> Path:
        """Where a new one goes."""
        folder, source = derived_folder(self.beside, self.cache_dir), self.source.resolve()
        # many sets have a folder of that name
        whose = "" if folder == self.beside else f"-{digest_of(source)}"
        return folder / f"{source.name}{whose}{self.end}.npy"

    def paths(self) -> list[Path]:
        """All that may be of these files, made here or elsewhere."""
        name = f"{glob.escape(self.source.resolve().name)}*{self.end}.npy"
        return [path for place in (self.path.parent, self.beside) for path in place.glob(name)]


def derived_folder(beside: Path, cache_dir: Path | None) -> Path:
    """Folder for what is made of a data set: ``cache_dir``, beside the data, or the user's own."""
    existing = next(place for place in (beside, *beside.absolute().parents) if place.exists())
    if cache_dir is not None or os.access(existing, os.W_OK):
        return cache_dir or beside
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = existing.resolve().name
    place = home / "steadyfit" / f"{name}-{digest_of(existing.resolve())}"
    say_where(existing, place)
    return place


def digest_of(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:8]


@cache  # once
def say_where(folder: Path, place: Path) -> None:
    tell(
        f"{folder} is read-only: what is made of it is kept in {place}; choose another place with "
        "--data.cache_dir=FOLDER."
    )


@rank_zero_only
def tell(message: str) -> None:
    print(message, file=sys.stderr)


def decode_once(
    folder: Path, files: Sequence[str], size: tuple[int, int], how: How, cache: Cache
) -> Decoded:
    """Images of a folder, decoded the first time and mapped from a cache afterwards.

    File times only tell that nothing happened. Where they differ, files were touched, or the cache
    was made elsewhere: it counts if the files have the bytes of which it was made.

    Args:
        folder: Where the files are.
        files: Their paths below it, in the order of the images.
        size: Height and width of the pixels.
        how: What is done about files of another size; ``exact`` takes no unreadable ones.
        cache: Where the pixels may be, and where new ones go.

    Raises:
        UserError: With ``exact``, an image is broken or of another size or depth; or the cache
            cannot be written. There is no new cache then.
    """
    key = quick_key(folder, files, size, how)
    shape = (len(files), *size, 3)
    records = [(path, made) for path in cache.paths() if (made := read_record(path))]
    for path, record in records:
        if record["key"] == key and (decoded := load_cache(path, shape, record)):
            return decoded
    content = ""
    for path, record in records:
        if "files" in record and (decoded := load_cache(path, shape, record)):
            content = content or content_digest(folder, files, how)
            if record["files"] == content:
                if os.access(path.parent, os.W_OK):
                    write_record(path, record | {"key": key})
                return decoded
    title = f"Decoding {folder.resolve().name}/, only this time"
    chunks = decode_all(folder, files, size, how, title)
    try:
        if how == "exact":
            chunks = all_readable(folder, chunks)
        return make_cache(
            cache.path, shape, key, chunks, lambda: content or content_digest(folder, files, how)
        )
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            raise UserError(f"{error} Keep it elsewhere: --data.cache_dir=FOLDER.") from error
        raise


def quick_key(folder: Path, files: Sequence[str], size: tuple[int, int], how: How) -> str:
    """A digest that changes when files come, go or are renamed, or when many are overwritten."""
    step = len(files) // PROBES[how] + 1
    probes = [folder / file for file in files[::step]]
    states = [state(path) for path in (probes if step == 1 else [folder, *probes])]
    return hashlib.sha256(repr((size, how, list(files), states)).encode()).hexdigest()


def state(path: Path) -> tuple[int, int] | None:
    """Bytes and time of a file, which tell that it has changed; None for a link to nowhere."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def content_digest(folder: Path, files: Sequence[str], how: How) -> str:
    """SHA-256 of all that the pixels depend on; a file that cannot be read counts as empty."""
    digest = hashlib.sha256(how.encode())
    for file in files:
        try:
            content = (folder / file).read_bytes()
        except OSError:
            content = b""
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def all_readable(folder: Path, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """The chunks as they come, until one has an image that cannot be read."""
    for pixels, reasons in chunks:
        if reasons:
            raise UserError(
                f"{reasons[min(reasons)]}; unpack or download {folder} again and run the same "
                "command."
            )
        yield pixels, reasons


def read_record(path: Path) -> dict[str, Any] | None:
    """What is recorded of a cache, or None where there is no such record."""
    try:
        record = json.loads(path.with_suffix(".json").read_bytes())
        unreadable = {int(position): why for position, why in record["unreadable"].items()}
        return record | {"key": record["key"], "sha256": record["sha256"], "unreadable": unreadable}
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
    chunks: Iterable[Chunk],
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
    folder: Path, names: Sequence[str], size: tuple[int, int], how: How, title: str
) -> Iterator[Chunk]:
    """Decode the files ``names`` of a folder in as many processes as there are cores.

    Args:
        folder: Where they are.
        names: Their paths below it.
        size: Height and width of the pixels.
        how: What is done about files of another size, and which formats are read.
        title: What stands beside the progress bar.
    """
    starts = range(0, len(names), CHUNK[how])
    parts = [names[start : start + CHUNK[how]] for start in starts]
    cores = os.cpu_count() or 1
    # the threads only wait for their processes; where the disk is slow, few chunks wait for it
    decoded = prefetch(partial(decode_chunk, folder, size, how), parts, 2 * cores, threads=cores)
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
