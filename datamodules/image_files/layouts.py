"""Contents of a folder of photos: its parts, and the class of each photo.

Three layouts are known: a folder for each class; the same, or its parts, in a folder of the same
name once more, as unzipping makes it; one folder, and the classes in the names of the files or in
a table. Nothing else is guessed.
"""

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from core.errors import UserError
from datamodules.image_files.decode_images import SUFFIXES
from datamodules.image_files.label_table import find_label_table, look_up, read_label_table

Part = Literal["train", "val", "test"]

_PARTS: dict[Part, re.Pattern[str]] = {
    "train": re.compile(r"(seg_)?train(ing)?([ _-]?(set|data|images))?", re.IGNORECASE),
    "val": re.compile(r"(seg_)?val(id(ation)?)?([ _-]?(set|data|images))?", re.IGNORECASE),
    "test": re.compile(r"(seg_)?test(ing)?([ _-]?(set|data|images))?\d?", re.IGNORECASE),
}
_NAMED = re.compile(r"([^\W\d_].*?)[ ._-]*\(?\d+\)?")  # cat.0, great_pyrenees_12, dog (3)


_REMEDY = (
    "Put the photos of each class, two at least, into a folder of its own, or name them "
    "CLASS.NUMBER, or list them in a table id,label (--data.labels=FILE); --data.data_dir=FOLDER "
    "names the folder that holds the classes, or train/ with them."
)


@dataclass(frozen=True)
class Labelled:
    """Photos of a folder and their classes."""

    files: list[str]  # N paths below the folder, by class folder and name
    labels: list[str]  # N names of classes
    source: str  # what tells the classes
    left_out: list[str]  # files that are no photos, or without a class
    missing: Sequence[str] = ()  # names in the table without a photo

    def __str__(self) -> str:
        counts = ", ".join(f"{name} {n:,}" for name, n in sorted(Counter(self.labels).items()))
        return f"{len(set(self.labels))} classes by {self.source}: {counts}"


def find_parts(folder: Path, labels: Path | None) -> tuple[dict[Part, Path], list[str]]:
    """The folders of each part, which may be one and the same, and the folders left out.

    Raises:
        UserError: There is no such folder, or it cannot be told which folders are parts.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder} is no folder; name the folder of your photos: --data.data_dir=FOLDER."
        )
    root = inner(folder)
    names = _subfolders(root)
    found = {part: [name for name in names if _PARTS[part].fullmatch(name)] for part in _PARTS}
    for part, alike in found.items():
        if len(alike) > 1:
            raise UserError(
                f"{root} holds {' and '.join(alike)}, which may both be the {part} part; move one "
                "away, or choose with --data.data_dir=FOLDER."
            )
    parts = {part: inner(root / alike[0]) for part, alike in found.items() if alike}
    classes = [name for name in names if not any(name in alike for alike in found.values())]
    if "train" in parts and _tells_classes(parts["train"], root, labels):
        train, val = parts["train"], parts.get("val", parts["train"])
        test = parts.get("test", val)
        # test photos of a competition have no classes: they are for predict.py --images
        test = test if _tells_classes(test, root, labels) else val
        used = {found[part][0] for part in parts if part != "test" or test == parts[part]}
        return {"train": train, "val": val, "test": test}, [n for n in names if n not in used]
    if parts and not (classes and parts.keys() == {"train"}):  # a class may be called train
        raise UserError(
            f"{root} holds {', '.join(names)}: parts without photos of classes to train on, or "
            f"classes? {_REMEDY}"
        )
    return {"train": root, "val": root, "test": root}, []


def inner(folder: Path) -> Path:
    """The folder, or the one in it of the same name if there is nothing else."""
    names = _subfolders(folder)
    same = [name.lower() for name in names] == [folder.resolve().name.lower()]
    return folder / names[0] if same and not _photos_in(folder) else folder


def _subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, in alphabetical order, without what systems leave there."""
    names = (entry.name for entry in os.scandir(folder) if entry.is_dir())
    return sorted(name for name in names if name[0] != "." and name != "__MACOSX")


def _photos_in(folder: Path) -> list[str]:
    """Names of the photos that lie in a folder itself, in alphabetical order."""
    names = (entry.name for entry in os.scandir(folder) if not entry.is_dir())
    return sorted(name for name in names if name[0] != "." and name.lower().endswith(SUFFIXES))


def image_files(folder: Path) -> tuple[list[str], list[str]]:
    """Paths below a folder, in alphabetical order: those of photos by their suffix, and others.

    Links are followed, but no folder is entered twice. Hidden files and folders are passed over.
    """
    images: list[str] = []
    others: list[str] = []
    entered: set[str] = set()
    for path, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "." and name != "__MACOSX"]
        if (real := os.path.realpath(path)) in entered:
            folders.clear()
            continue
        entered.add(real)
        below = "" if Path(path) == folder else f"{Path(path).relative_to(folder).as_posix()}/"
        for name in files:
            if name[0] != ".":
                kind = images if name.lower().endswith(SUFFIXES) else others
                kind.append(f"{below}{name}")
    return sorted(images), sorted(others)


def _tells_classes(folder: Path, root: Path, labels: Path | None) -> bool:
    return bool(_subfolders(folder)) or _by_name_or_table(folder, root, labels) is not None


def read_labels(folder: Path, root: Path, labels: Path | None) -> Labelled:
    """The photos of a part and their classes.

    Args:
        folder: The folder of the part.
        root: The folder of all parts, where a table may lie too.
        labels: The table, if it is named.

    Raises:
        UserError: It cannot be told which classes there are, or a class has no photos.
    """
    if labels is None and _subfolders(folder):
        return _by_folder(folder)
    labelled = _by_name_or_table(folder, root, labels)
    if labelled is None:
        raise UserError(
            f"{folder} has no folders and {len(_photos_in(folder))} photos, whose classes nothing "
            f"tells. {_REMEDY} Without classes, predict them: predict.py RUN --images FOLDER."
        )
    return labelled


def _by_folder(folder: Path) -> Labelled:
    names = _subfolders(folder)
    if len(names) < 2:
        raise UserError(f"{folder} has only the folder {names[0]}. {_REMEDY}")
    below = {name: set(_subfolders(folder / name)) for name in names}
    for name in names:
        others = set(names).union(*(below[other] for other in names if other != name))
        if below[name] & others and not _photos_in(folder / name):
            raise UserError(
                f"{folder / name} holds no photos but {', '.join(sorted(below[name]))}, as others "
                f"there do: is {name} a class or a part? {_REMEDY}"
            )
    files: list[str] = []
    labels: list[str] = []
    left_out = _photos_in(folder)
    for name in names:
        found, others_there = image_files(folder / name)
        if not found:
            raise UserError(
                f"{folder / name} holds no photos ({', '.join(SUFFIXES)}); put some there or move "
                "it away."
            )
        files += [f"{name}/{file}" for file in found]
        left_out += [f"{name}/{file}" for file in others_there]
        labels += [name] * len(found)
    return Labelled(files, labels, "folder", left_out)


def _by_name_or_table(folder: Path, root: Path, table: Path | None) -> Labelled | None:
    """The photos below a folder by their names or by a table; None if neither has two classes."""
    files, _ = image_files(folder) if table else (_photos_in(folder), [])
    table = table or find_label_table(dict.fromkeys((folder, root)), files)
    missing: list[str] = []
    if table:
        class_of = read_label_table(table)
        names = {PurePosixPath(file).name for file in files}
        names |= {name.rpartition(".")[0] for name in names}
        missing = [name for name in class_of if name not in names]
        classes = [look_up(class_of, file) for file in files]
    else:
        matches = [_NAMED.fullmatch(PurePosixPath(file).stem) for file in files]
        classes = [match and match[1] for match in matches]
        if None in classes or len(files) < 2 * len(set(classes)):
            return None
    known = [(file, name) for file, name in zip(files, classes, strict=True) if name is not None]
    if len({name for _, name in known}) < 2:
        return None
    left_out = [file for file, name in zip(files, classes, strict=True) if name is None]
    source, (photos, labels) = table.name if table else "file name", zip(*known, strict=True)
    return Labelled(list(photos), list(labels), source, left_out, missing)
