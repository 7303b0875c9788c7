"""Short names of classes, and the name that was probably meant."""

import difflib
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
import torchvision
from lightning.pytorch.utilities import rank_zero_only

import callbacks
import datamodules
import lit_models
from lit_models import networks, optimizers, schedules

_OURS = (callbacks, datamodules, lit_models, networks, optimizers, schedules)
_OTHERS = (torch.nn, torch.optim, torch.optim.lr_scheduler, torchvision.models)
CLASS_KEYS = ("class_path", "model", "data", "network", "optimizer", "lr_scheduler", "callbacks")


@cache
def own_classes() -> dict[str, str]:
    """Return the import path of each class of this project that a configuration may name."""
    plateau = "torch.optim.lr_scheduler.ReduceLROnPlateau"  # Lightning has one of that name, too
    return {"ReduceLROnPlateau": plateau} | {
        name: f"{module.__name__}.{name}"
        for module in _OURS
        for name, found in vars(module).items()
        if isinstance(found, type) and found.__module__.startswith((module.__name__, "steadyfit"))
    }


def in_full(value: Any, key: str = "") -> Any:
    """Return a configuration, or what is typed for ``key``, with the import paths of our classes.

    A class of this project wins over one of torch or torchvision that has the same name.
    """
    if isinstance(value, dict):
        return {name: in_full(part, str(name)) for name, part in value.items()}
    if isinstance(value, list):
        return [in_full(part, key) for part in value]
    if (
        isinstance(value, str)
        and key.rstrip("+").removesuffix(".help").rpartition(".")[2] in CLASS_KEYS
    ):
        return own_classes().get(value, value)
    return value


def report_ambiguous_class(typed: str) -> None:
    """Say which class a name stands for, if another library has one of that name as well."""
    for module in _OTHERS if typed in own_classes() else ():
        if hasattr(module, typed):
            path = own_classes()[typed]
            rank_zero_only(print)(f"{typed} is {path}; the other is {module.__name__}.{typed}.")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean NAME``, or nothing if none is near."""
    found = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {found[0]}?" if found else ""
