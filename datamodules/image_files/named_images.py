"""Folders of images that are named by their ids, as competitions hand them out."""

import os
from pathlib import Path

from core.errors import UserError
from datamodules.image_files.archives import unpack
from datamodules.image_files.decode_images import SUFFIXES
from datamodules.image_files.image_cache import derived_folder, digest_of


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

    Where the folder holds no images but one folder, they are looked for in there: unzipping makes
    ``test/test/1.png``.

    Raises:
        UserError: There are none, or two of one id.
    """
    names = sorted(name for name in os.listdir(folder) if name[0] != ".")
    below = ""
    if not any(name.lower().endswith(SUFFIXES) for name in names):
        folders = [name for name in names if (folder / name).is_dir() and name != "__MACOSX"]
        if len(folders) == 1:
            below, names = f"{folders[0]}/", sorted(os.listdir(folder / folders[0]))
    images: dict[str, str] = {}
    for name in names:
        stem, end = os.path.splitext(name)
        if name[0] == "." or end.lower() not in SUFFIXES:
            continue
        if stem in images:
            raise UserError(
                f"{folder} holds two images of the id {stem}, {images[stem]} and {below}{name}; "
                "move one of them away."
            )
        images[stem] = f"{below}{name}"
    if not images:
        found = f"its first entry is {names[0]}" if names else "it is empty"
        raise UserError(f"{folder} holds no images ({', '.join(SUFFIXES)}): {found}.")
    return images
