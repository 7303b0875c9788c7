"""Photos of a folder, decoded once, and split. Dimensions: N photos, H x W pixels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from core.errors import UserError
from datamodules.image_files.decode_images import SUFFIXES
from datamodules.image_files.image_cache import Decoded
from datamodules.image_files.layouts import Labelled, Part

_SEED = 42  # of every split; the course notebook's


@dataclass(frozen=True)
class Photos:
    """Photos of a folder that could be read, or some of them."""

    files: list[str]  # N paths below the folder, in alphabetical order
    classes: Tensor  # (N,)
    rows: Tensor  # (N,), where each is in the pixels
    pixels: np.ndarray  # uint8 (M, H, W, 3), M at least N

    def take(self, index: Tensor) -> "Photos":
        """The photos at the positions ``index``."""
        files = [self.files[i] for i in index.tolist()]
        return Photos(files, self.classes[index], self.rows[index], self.pixels)

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Images (N, H, W, 3) uint8 and their classes (N,)."""
        return torch.from_numpy(self.pixels).index_select(0, self.rows), self.classes


def whole_photos(
    folder: Path, labelled: Labelled, class_names: Sequence[str], decoded: Decoded
) -> Photos:
    """All photos of a folder that could be read.

    Args:
        folder: Holds the photos.
        labelled: Which they are.
        class_names: The classes.
        decoded: Their pixels.

    Raises:
        UserError: Nothing of a class could be read.
    """
    files = labelled.files
    if labelled.left_out:
        rank_zero_warn(
            f"files in {folder} that are not named as photos ({', '.join(SUFFIXES)}) or have no "
            f"class are passed over: {len(labelled.left_out)}, the first is {labelled.left_out[0]}."
        )
    if decoded.unreadable:
        first = min(decoded.unreadable)
        rank_zero_warn(
            f"{len(decoded.unreadable)} of {len(files)} photos in {folder} cannot be read and are "
            f"left out; the first is {files[first]}: {decoded.unreadable[first]}."
        )
    classes = torch.tensor([class_names.index(name) for name in labelled.labels])
    every = Photos(files, classes, torch.arange(len(files)), decoded.pixels)
    photos = every.take(readable(len(files), decoded.unreadable))
    if missing := set(range(len(class_names))).difference(photos.classes.tolist()):
        raise UserError(
            f"none of the photos of the class {class_names[min(missing)]} in {folder} can be read; "
            "replace them."
        )
    return photos


def readable(count: int, unreadable: Mapping[int, str]) -> Tensor:
    """Positions of the images that could be read, of ``count``."""
    return torch.tensor([i for i in range(count) if i not in unreadable], dtype=torch.long)


# ---- splits


def halves(count: int) -> tuple[Tensor, Tensor]:
    """Positions of two halves, those of ``random_split(..., [0.5, 0.5])`` with the seed."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(_SEED))
    cut = (count + 1) // 2
    return order[:cut].sort().values, order[cut:].sort().values


def split_off(classes: Tensor, sizes: Mapping[Part, float]) -> dict[Part, Tensor]:
    """Positions of each part: the same share of every class, at least one; the rest for training.

    Args:
        classes: Class of each photo (N,).
        sizes: A number of photos, or a share below 1. Another size of a later part leaves the
            earlier ones as they are.

    Raises:
        UserError: Nothing of a class is left for training.
    """
    generator = torch.Generator().manual_seed(_SEED)
    parts: dict[Part, list[Tensor]] = {part: [] for part in (*sizes, "train")}
    for index in classes.unique():
        members = (classes == index).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        counts = [
            max(1, round(len(members) * (size if size < 1 else size / len(classes)))) if size else 0
            for size in sizes.values()
        ]
        if sum(counts) >= len(members):
            asked = " and ".join(f"{part}_size {size:g}" for part, size in sizes.items())
            raise UserError(
                f"a class has {len(members)} photos only, of which {asked} leave none for "
                "training; add photos, or ask for less with --data.val_size and --data.test_size."
            )
        for part, members_of in zip(
            parts, members.split([*counts, len(members) - sum(counts)]), strict=True
        ):
            parts[part].append(members_of)
    return {part: torch.cat(positions).sort().values for part, positions in parts.items()}
