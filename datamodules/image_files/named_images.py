"""Folders of images that are named by their ids, as competitions hand them out."""

import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from lzma import LZMAError
from pathlib import Path, PurePosixPath
from typing import IO, Any

import rich.progress
from rich.console import Console

from core.errors import UserError, needed
from core.files import temporary
from datamodules.image_files.decode_images import SUFFIXES
from datamodules.image_files.image_cache import derived_folder, digest_of
from datamodules.image_files.layouts import image_files


def find_competition(data_dir: Path, names: tuple[str, ...], signs: tuple[str, ...]) -> Path:
    """The folder of a competition: one of its names in ``data_dir``, or ``data_dir`` itself.

    It is the first that holds a file such as one of ``signs``, which are patterns.
    Kaggle mounts it as ``/kaggle/input/NAME`` or one or two folders further down.
    """
    inside = [data_dir / name for name in names]
    mounted = [path for name in names for path in data_dir.glob(f"*/{name}")]
    for place in (*inside, data_dir, *mounted):
        if any(path for sign in signs for path in place.glob(sign)):
            return place
    return inside[0]


def find_images(folder: Path, cache_dir: Path | None) -> Path | None:
    """A folder of images, unpacked if there is its archive alone; None if there is neither."""
    archives = [folder.with_name(f"{folder.name}{end}") for end in (".7z", ".zip")]
    archive = next((path for path in archives if path.is_file()), None)
    if folder.is_dir() or archive is None:
        return folder if folder.is_dir() else None
    place = derived_folder(folder.parent, cache_dir)
    if cache_dir is not None:  # sets may share it
        place /= f"{folder.parent.name}-{digest_of(folder.parent.resolve())}"
    if not (place / folder.name).is_dir():
        unpack(archive, place / folder.name)
    return place / folder.name


def images_by_id(folder: Path) -> dict[str, str]:
    """Paths of images below ``folder`` by their ids, which are their names without the ending.

    Raises:
        UserError: There are none, or two of one id.
    """
    files, others = image_files(folder)
    ids = [PurePosixPath(file).stem for file in files]
    if not files:
        found = f"the first of other files is {others[0]}" if others else "it is empty"
        raise UserError(f"{folder} holds no images ({', '.join(SUFFIXES)}): {found}.")
    (name, count), *_ = Counter(ids).most_common(1)
    if count > 1:
        first, second, *_ = (file for file, i in zip(files, ids, strict=True) if i == name)
        raise UserError(
            f"{folder} holds two images of the id {name}, {first} and {second}; move one of them "
            "away."
        )
    return dict(zip(ids, files, strict=True))


def unpack(archive: Path, folder: Path) -> None:
    """Unpack ``<name>.7z`` or ``<name>.zip`` into ``folder``, called ``<name>``, whole or not.

    Raises:
        UserError: The archive is broken or holds anything but images ``<name>/<id>.png``, or the
            disk is full; nothing is left of it then.
    """
    endings = "|".join(map(re.escape, SUFFIXES))
    expected = re.compile(rf"{re.escape(folder.name)}(/|/[^/\\\0]+({endings}))?", re.IGNORECASE)
    title, console = f"Unpacking {archive.name}", Console(stderr=True)
    try:
        with (
            temporary(folder, folder=True) as place,
            rich.progress.open(archive, "rb", description=title, console=console) as file,
            _opened(archive, file) as bundle,
        ):
            for name in bundle.namelist():
                if not expected.fullmatch(name):
                    raise UserError(
                        f"{archive} holds {name!r}, which is no {folder.name}/<id>.png; "
                        "nothing was unpacked, download it again."
                    )
            bundle.extractall(place)
            if not folder.is_dir():  # another process may have been faster
                (place / folder.name).rename(folder)
    except (LZMAError, OSError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{archive} could not be unpacked to {folder} ({error}); free space or download it "
            "again."
        ) from error


@contextmanager
def _opened(archive: Path, file: IO[bytes]) -> Iterator[Any]:
    """An archive, with ``namelist`` and ``extractall``, which writes nothing outside its folder."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(file) as bundle:  # links come out as small files
            yield bundle
        return
    py7zr = needed("py7zr", f"unpacking {archive}")
    try:
        with py7zr.SevenZipFile(file) as bundle:
            if link := next((m.filename for m in bundle.list() if m.is_symlink), None):
                raise UserError(f"{archive} holds the link {link!r}; nothing was unpacked.")
            yield bundle
    except py7zr.exceptions.ArchiveError as error:
        raise zipfile.BadZipFile(str(error)) from error
