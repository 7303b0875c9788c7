"""A run on disk: one folder with its configuration, checkpoints, metrics and results."""

import math
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from core.errors import UserError
from core.files import make_folder
from core.locks import locked

ROOT = Path("runs")
FILE = "config.yaml"  # of a run
CHECKPOINT: dict[str, type] = {
    "state_dict": dict,
    "metrics": dict,
    "epoch": int,
    "global_step": int,
}
OF_TRAINING: dict[str, type] = {
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
}
OF_FOLDS: dict[str, type] = {"split": str, "val_samples": int}
NAME = re.compile(r"(?!\.)[A-Za-z0-9._+=-]{1,100}")


@dataclass(frozen=True)
class Run:
    """The folder ``runs/<config name>/<run name>`` of one training run."""

    folder: Path

    @classmethod
    def find(cls, name: str | Path, root: Path = ROOT) -> Self:
        """Find the run at a path, or at ``root/name``.

        Raises:
            UserError: There is no such run.
        """
        for folder in (Path(name), root / name):
            if is_file(folder / FILE):
                return cls(folder)
        known = sorted(root.glob(f"*/*/{FILE}"), key=lambda path: path.stat().st_mtime)
        listed = ", ".join(str(path.parent.relative_to(root)) for path in known[-5:]) or "none yet"
        raise UserError(f"{name} is not a run folder; the newest in {root}/ are: {listed}.")

    @staticmethod
    def parent(config: Path, root: Path = ROOT) -> Path:
        """Return the folder of the runs of a config; a run's own stands for its origin."""
        return root / (config.resolve().parents[1].name if config.name == FILE else config.stem)

    @classmethod
    def claim(cls, parent: Path, name: str | None) -> Self:
        """Make a folder of that name, new or to be continued; without a name a new one by the time.

        ``mkdir`` is exclusive, so two programs started in the same second get two folders.

        Raises:
            UserError: It cannot be made.
        """
        if name is not None:
            folder = parent / name
            make_folder(folder)
            return cls(folder)
        stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        make_folder(parent)
        for suffix in ("", *(f"-{i}" for i in range(2, 1000))):
            try:
                (parent / f"{stamp}{suffix}").mkdir()
            except FileExistsError:
                continue
            return cls(parent / f"{stamp}{suffix}")
        raise UserError(f"{parent} holds a thousand runs of this second; name yours with --run.")

    @classmethod
    def name(cls, typed: str, parent: Path) -> str:
        """Return the name of a run in ``parent``, typed as NAME, CONFIG/NAME or as the run's path.

        Raises:
            UserError: It cannot be the name of a folder in ``parent``.
        """
        before, _, name = typed.rstrip("/").rpartition("/")
        inside = before in ("", parent.name) or Path(before).absolute() == parent.absolute()
        exists = name not in ("", ".", "..") and is_file(parent / name / FILE)
        if not (inside and (exists or NAME.fullmatch(name))):
            raise UserError(
                f"--run={typed[:100]!r} cannot be the name of a run in {parent}; take up to 100 "
                "letters, digits and ._-+=, not a dot in front."
            )
        return name

    @contextmanager
    def tidy(self) -> Iterator[None]:
        """Take the folder away again if nothing was put into it."""
        try:
            yield
        finally:
            with suppress(OSError):  # it is not empty, or another program has it
                self.folder.rmdir()
                self.lock_file.unlink(missing_ok=True)
                self.folder.parent.rmdir()

    @property
    def lock_file(self) -> Path:
        folder = self.folder.resolve()
        # beside the run, so that nothing but the run is in its folder
        return folder.with_name(f".{folder.name}.lock")

    def lock(self) -> AbstractContextManager[None]:
        """Keep other programs from training the same run.

        Raises:
            UserError: Another one is at it.
        """
        busy = (
            f"{self.folder} is being trained by another program; wait for it, or choose "
            "another name with --run."
        )
        return locked(self.lock_file, self.folder, busy)

    @property
    def label(self) -> str:
        """Its config and its own name."""
        return "/".join(self.folder.resolve().parts[-2:])

    @property
    def config(self) -> Path:
        return self.folder / FILE

    @property
    def last_checkpoint(self) -> Path:
        return self.folder / "checkpoints" / "last.ckpt"

    def checkpoint(self, which: str = "best") -> Path:
        """Return the best checkpoint on the validation part, or the last one.

        A run without a validation part has no best checkpoint; its last one is taken.

        Raises:
            UserError: The run has no checkpoint.
        """
        best = self.folder / "checkpoints" / "best.ckpt"
        path = best if which == "best" and best.is_file() else self.last_checkpoint
        if not path.is_file():
            raise UserError(
                f"{self.folder} holds no checkpoint; train it first with the command in "
                f"{self.config.name}, or name another run."
            )
        return path

    @property
    def wandb_id(self) -> str | None:
        """Id of the W&B run that was started in this folder, if any."""
        names = [folder.name for folder in self.folder.glob("wandb/*run-*-*")]
        found = [re.fullmatch(r"(?:offline-)?run-(\d+_\d+)-(.+)", name) for name in names]
        started = sorted((match[1], match[2]) for match in found if match)
        return started[0][1] if started else None  # later ones may be of what is made of the run

    @property
    def wandb_is_begun(self) -> bool:
        """True if W&B has written anything of it."""
        files = self.folder.glob("wandb/*run-*-*/run-*.wandb")
        return any(file.stat().st_size > 7 for file in files)  # the file's own header


def data_state(checkpoint: dict[str, Any], class_path: str) -> dict[str, Any]:
    """Return what a data module has put into a checkpoint.

    Raises:
        UserError: It is not whole.
    """
    state = checkpoint.get(class_path.rpartition(".")[2], {})
    if not isinstance(state, dict):
        raise UserError("the checkpoint is not whole: the state of its data is of another kind.")
    return state


def is_file(path: Path) -> bool:
    """Return true for a file that exists; the name may be none that a file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or with a null byte
        return False


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint without executing anything in it.

    Raises:
        UserError: The file is missing, damaged, or not one of this project's checkpoints, or its
            weights are not finite.
    """
    import torch  # two seconds, for which study.py and submit.py need not wait

    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give a run folder or a .ckpt file.") from None
    except Exception as error:  # torch raises many types, and advises to load unsafe files unsafely
        raise UserError(
            f"{path} cannot be read as a checkpoint: it is damaged, or holds more than tensors and "
            "plain values."
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("config"), str):
        raise UserError(f"{path} carries no configuration; only runs of train.py can be used.")
    for name, kind in (OF_TRAINING | OF_FOLDS).items():
        if not isinstance(checkpoint.get(name, kind()), kind):
            raise UserError(f"{path} is not whole: its {name} is of another kind.")
    if not all(isinstance(state, dict) for state in checkpoint.get("callbacks", {}).values()):
        raise UserError(f"{path} is not whole: the state of a callback is of another kind.")
    for name, kind in CHECKPOINT.items():
        if not isinstance(checkpoint.get(name), kind) or checkpoint[name] is True:
            raise UserError(f"{path} is not whole: its {name} is missing or of another kind.")
    if min(checkpoint["epoch"], checkpoint["global_step"]) < 0:
        raise UserError(f"{path} is not whole: its epoch or step is negative.")
    for name, weight in checkpoint["state_dict"].items():
        if not isinstance(name, str) or not isinstance(weight, torch.Tensor):
            raise UserError(f"{path} is not whole: {name!r} among its weights is no tensor.")
        if not weight.isfinite().all():
            raise UserError(f"{path}: the weights {name} are not finite; the run has diverged.")
    for name, value in checkpoint["metrics"].items():
        if not isinstance(name, str) or not isinstance(value, float) or not math.isfinite(value):
            raise UserError(f"{path} is not whole: the metric {name!r} is no finite number.")
    return checkpoint
