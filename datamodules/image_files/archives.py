"""The archives in which Kaggle hands out folders of images."""

import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from lzma import LZMAError
from pathlib import Path
from typing import IO, Any

import rich.progress
from rich.console import Console

from core.errors import UserError, needed
from core.files import temporary
from datamodules.image_files.decode_images import SUFFIXES


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
            opened(archive, file) as (bundle, members),
        ):
            for name, is_link in members.items():
                if is_link or not expected.fullmatch(name):
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
def opened(archive: Path, file: IO[bytes]) -> Iterator[tuple[Any, dict[str, bool]]]:
    """An archive, and the names of its members with whether each is a link."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(file) as bundle:  # links come out as small files
            yield bundle, dict.fromkeys(bundle.namelist(), False)
        return
    py7zr = needed("py7zr", f"unpacking {archive}")
    try:
        with py7zr.SevenZipFile(file) as bundle:
            yield bundle, {member.filename: member.is_symlink for member in bundle.list()}
    except py7zr.exceptions.ArchiveError as error:
        raise zipfile.BadZipFile(str(error)) from error
