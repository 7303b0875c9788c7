"""Names that the files of a run may hold: they may come from anybody, and a name is an import."""

import collections.abc
import inspect
import math
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any, ForwardRef, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from lightning import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from core.errors import UserError
from core.runs import is_file
from datamodules.base import BaseDataModule
from lit_models.base import LitModel

OURS = ("callbacks", "datamodules", "lit_models", "steadyfit")
PACKAGES = (*OURS, "lightning", "torch", "torchmetrics", "torchvision")
_SECTIONS = {"seed_everything", "init_from", "trainer", "model", "data"}
_MADE_BY = {"optimizer": Optimizer, "lr_scheduler": LRScheduler}  # what a Callable is to make
_CALLS = ("LambdaCallback", "LambdaLR", "MultiplicativeLR")  # made of functions of anybody
PLACES = {"dirpath", "save_dir", "root_dir", "cache_dir"}  # where an object writes
PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", re.ASCII)
WORD = re.compile(r"[\w+ -]*", re.ASCII)  # no path of a file or a module
_LARGEST = 20_000  # values of a configuration, its aliases followed; ours have 300

Config = dict[str, Any]


def read_config(text: str, source: str | Path) -> Config:
    """Read the configuration of a run, before any class of it is looked up.

    Raises:
        UserError: It is not a mapping with a model and a data module, or it is a YAML bomb.
    """
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        if node is not None and _count_values(node, {}, set()) > _LARGEST:
            raise UserError(f"{source}: the configuration grows beyond {_LARGEST:,} values.")
        config = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{source}: the configuration is not valid YAML.") from error
    for _, value in leaves(config):
        unusable = isinstance(value, str) and "\0" in value
        if unusable or (isinstance(value, float) and not math.isfinite(value)):
            raise UserError(f"{source}: the configuration holds {value!r}.")
    if not isinstance(config, dict) or not {"model", "data"} <= config.keys() <= _SECTIONS:
        raise UserError(f"{source}: the configuration is not one of a run.")
    for section in ("model", "data"):
        entry = config[section]
        options = entry.get("init_args", {}) if isinstance(entry, dict) else None
        if not isinstance(options, dict) or not isinstance(entry.get("class_path"), str):
            raise UserError(f"{source}: {section} is not a class with its settings.")
        entry.setdefault("init_args", {})
    if not isinstance(config.setdefault("trainer", {}), dict):
        raise UserError(f"{source}: trainer is not a mapping.")
    return config


def _count_values(node: yaml.Node, sizes: dict[int, int], above: set[int]) -> int:
    """Count the values below a YAML node, those of an alias each time."""
    if id(node) in above:
        raise ValueError("it contains itself")
    if id(node) not in sizes:
        above.add(id(node))
        below: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            below = node.value
        elif isinstance(node, yaml.MappingNode):
            below = [part for pair in node.value for part in pair]
        sizes[id(node)] = 1 + sum(_count_values(part, sizes, above) for part in below)
        above.remove(id(node))
    return sizes[id(node)]


def leaves(part: Any, key: Any = None) -> Iterator[tuple[Any, Any]]:
    """Yield key and value of all that is neither a mapping nor a list in a configuration."""
    if isinstance(part, dict):
        for name, inner in part.items():
            yield from leaves(inner, name)
    elif isinstance(part, list):
        for inner in part:
            yield from leaves(inner, key)
    else:
        yield key, part


def admit(config: Config, source: str | Path, typed: Config | None = None) -> None:
    """Refuse a configuration of a run that imports or calls anything of somebody else's.

    Admitted are classes of this project, torch, torchvision, torchmetrics and lightning that are
    what their place asks for, and functions of ``torchvision.models``. Values that are imported
    because a constructor wants a callable are held to the same; places to write are refused.

    Args:
        config: As :func:`read_config` gives it.
        source: The file that it is from.
        typed: Settings that are admitted, or the user's own; a class or a place of theirs may come
            again.

    Raises:
        UserError: It names something else.
    """
    check = _Admission(source, typed or {})
    check.entry(config["model"], (LitModel,), "model")
    check.entry(config["data"], (BaseDataModule,), "data")
    check.options(config["trainer"], _hints_of(Trainer), "trainer")


def plain_trainer(trainer: Config) -> Config:
    """Return the part of a run's trainer that a test takes: plain values and callbacks of ours."""
    kept = {name: value for name, value in trainer.items() if not isinstance(value, dict | list)}
    callbacks = trainer.get("callbacks")
    own = [
        entry
        for entry in (callbacks if isinstance(callbacks, list) else [])
        if isinstance(entry, dict) and str(entry.get("class_path")).partition(".")[0] == OURS[0]
    ]
    return kept | ({"callbacks": own} if own else {})


class _Admission:
    """The check of one configuration."""

    def __init__(self, source: str | Path, typed: Config) -> None:
        self.source = source
        # of other texts nobody knows that they name a class
        self.classes = {path for key, path in leaves(typed) if key == "class_path"}
        self.places = {place for key, place in leaves(typed) if key in PLACES}

    def refuse(self, name: str, value: Any, reason: str) -> None:
        raise UserError(
            f"{self.source}: {name} is {str(value)[:100]}, {reason}; if you trust whoever made "
            "this run, add --trust, in Python trust=True."
        )

    def entry(self, value: Any, bases: tuple[type, ...], name: str) -> None:
        """A class with its settings, or its name alone."""
        if isinstance(value, str):
            value = {"class_path": value}
        if not isinstance(value, dict) or not isinstance(value.get("class_path"), str):
            self.refuse(name, value, "which is no class with its settings")
        found = self.look_up(value["class_path"], bases, name)
        hints = {} if found is None else _hints_of(found)
        for part in ("init_args", "dict_kwargs"):
            self.options(value.get(part) or {}, hints, name)
        if unknown := value.keys() - {"class_path", "init_args", "dict_kwargs"}:
            self.refuse(name, sorted(map(str, unknown)), "which belong to no class")

    def options(self, options: Any, hints: dict[str, Any], name: str) -> None:
        if not isinstance(options, dict):
            self.refuse(name, options, "which is no mapping")
        for key, value in options.items():
            if not isinstance(key, str) or not key.rstrip("+").isidentifier():
                self.refuse(name, key, "which is no name of a setting")
            self.option(key.rstrip("+"), value, hints, f"{name}.{key}")

    def option(self, key: str, value: Any, hints: dict[str, Any], name: str) -> None:
        if key in PLACES and value not in (None, ".", *self.places):
            self.refuse(name, value, "a place outside the run's folder")
        hint = hints.get(key)
        bases, called = _classes_in(hint)
        if key in _MADE_BY:
            bases, called = (_MADE_BY[key],), True
        if isinstance(value, str) and not (key in PLACES and value in self.places):
            kept_inside = name.startswith("trainer.") and key != "default_root_dir"
            path = PurePosixPath(value)
            if kept_inside and (path.is_absolute() or ".." in path.parts):
                self.refuse(name, value, "a place outside the run's folder")
            word = WORD.fullmatch(value) is not None and not is_file(Path(value))
            text = str in _parts_of(hint)
            if (called or bases) and not (word and text):
                self.entry(value, bases or (nn.Module,), name)
            elif hint is None and not word:
                self.refuse(name, value, "which may be imported or read")
        elif isinstance(value, dict) and "class_path" in value:
            self.entry(value, bases or (nn.Module,), name)
        elif isinstance(value, dict):
            self.options(value, {}, name)
        elif isinstance(value, list):
            for part in value:
                self.option(key, part, hints, name)

    def look_up(self, path: str, bases: tuple[type, ...], name: str) -> Any:
        """The class or function at an import path, if it may be there; None for a short name."""
        if path.rpartition(".")[2] in _CALLS:
            self.refuse(name, path, "which calls what it is given")
        if path.isidentifier() and not is_file(Path(path)):
            return None  # one of the classes that are loaded already, or a complaint of the parser
        module, _, last = path.rpartition(".")
        if path in self.classes and module in sys.modules:  # the user's own has been imported
            return getattr(sys.modules[module], last, None)
        root = path.partition(".")[0]
        if not PATH.fullmatch(path) or root not in PACKAGES:
            known = "this project, torch, torchvision, torchmetrics or lightning"
            self.refuse(name, path, f"which is not of {known}")
        found: Any = import_module(root)
        for part in path.split(".")[1:]:
            # what torch has not loaded itself compiles, downloads or profiles
            if root != "torch" and not hasattr(found, part) and inspect.ismodule(found):
                try:
                    import_module(f"{found.__name__}.{part}")
                except ImportError:
                    self.refuse(name, path, "which there is not")
            found = getattr(found, part, None)
        wanted = " or ".join(base.__name__ for base in bases)
        if inspect.isfunction(found):
            if not found.__module__.startswith("torchvision.models") or nn.Module not in bases:
                self.refuse(name, path, f"a function, where a {wanted} belongs")
        elif not isinstance(found, type) or not issubclass(found, bases):
            self.refuse(name, path, f"which is no {wanted}")
        elif issubclass(found, Dataset) and not _unpickles_nothing(found):
            self.refuse(name, path, "a data set that may run what is in its files")
        return found


def _unpickles_nothing(dataset: type) -> bool:
    """Return true for the data sets of torchvision, of which CIFAR-10 compares digests first."""
    return (
        dataset.__module__.startswith("torchvision.datasets.")
        and dataset.__module__ != "torchvision.datasets.lsun"
    )


def _hints_of(found: Any) -> dict[str, Any]:
    """Annotations of the parameters of a function, or of the constructors of a class."""
    makers = [found] if inspect.isfunction(found) else [c.__init__ for c in found.__mro__[::-1]]
    hints: dict[str, Any] = {}
    for maker in makers:
        try:
            hints |= get_type_hints(maker)
        except (NameError, TypeError):  # names that exist for type checkers alone
            hints |= getattr(maker, "__annotations__", {})
    return hints


def _parts_of(hint: Any) -> set[Any]:
    """All types that an annotation is made of; one that cannot be read is as if there were none."""
    if isinstance(hint, str | ForwardRef | TypeVar):
        return {collections.abc.Callable}
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return {str}
    if origin is collections.abc.Callable and parts:  # of what it makes
        return {origin} | _parts_of(parts[-1])
    if origin in (collections.abc.Callable, type):
        return {origin}
    if origin is not None and parts:
        return set().union(*(_parts_of(part) for part in parts if part is not Ellipsis))
    return {hint}


_PLAIN = (str, int, float, bool, bytes, complex, type(None), Path, Tensor)


def _classes_in(hint: Any) -> tuple[tuple[type, ...], bool]:
    """Classes that a value may be an object of, and whether it may be a callable."""
    parts = _parts_of(hint)
    called = bool(parts & {collections.abc.Callable, type}) or hint is Any
    classes = [p for p in parts if isinstance(p, type) and p not in (*_PLAIN, type)]
    classes = [p for p in classes if p.__module__.partition(".")[0] in PACKAGES]
    return tuple(classes), called and hint is not Any
