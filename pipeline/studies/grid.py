"""What a study is: a grid of runs, written as a W&B sweep, so that agents can spread it."""

import hashlib
import itertools
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from core.errors import UserError
from core.files import atomic_write

DEFAULTS = Path(__file__).parents[2] / "configs" / "defaults.yaml"
KEYS = {"program", "method", "name", "description", "project", "metric", "parameters", "command"}
RECORD = "point.json"
FLOAT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
# where a run finds its data and leaves its folder, which changes nothing in it
PLACES = ("--data.data_dir=", "--data.download=", "--trainer.default_root_dir=")
BARE = ("-h", "--help", "--print_config", "--debug")  # what is typed without a value

Point = dict[str, Any]  # one value for each parameter


class Arguments(NamedTuple):
    """What is typed behind ``fit``, with each group spelled out.

    ``own`` is what the point says, in the order of the grid, whatever the order it was typed in.
    """

    point: Point
    before: list[str]
    own: list[str]
    after: list[str]

    @property
    def all(self) -> list[str]:
        return [*self.before, *self.own, *self.after]


@dataclass(frozen=True)
class Study:
    """A sweep file, ``method: grid``, whose runs are those of ``runs/<study>/<point>/``.

    A run is named by its point, so a point has one run, wherever and by whomever it is started.
    A parameter is a setting of ``train.py``, or a group: the file ``<study>_groups.yaml`` beside
    the study gives each value of a group the flags it stands for.

    Args:
        path: The sweep file.
        parameters: The values of each parameter, in the file's order.
        template: The command of a run, as W&B writes it, with ``${args}`` where the point goes.
        groups: For each group and each of its values, what would be typed instead.
        metric: The metric that the study is about, or None.
    """

    path: Path
    parameters: dict[str, list[Any]]
    template: list[str]
    groups: dict[str, dict[str, list[str]]]
    metric: str | None

    @classmethod
    def load(cls, path: str | Path) -> "Study":
        """Read a study.

        Raises:
            UserError: The file is missing, is no sweep over a grid, or its grid is empty or lists a
                point twice.
        """
        path = Path(path)
        sweep = read_yaml(path)
        if unknown := sorted(sweep.keys() - KEYS):
            known = ", ".join(sorted(KEYS))
            raise UserError(f"{path} has the unknown key {unknown[0]}; known are {known}.")
        if sweep.get("method") != "grid":
            raise UserError(f"{path}: method must be grid, got {sweep.get('method')!r}.")
        if sweep.get("program") != "train.py":
            raise UserError(f"{path}: program must be train.py, got {sweep.get('program')!r}.")
        parameters = sweep.get("parameters") or {}
        metric = sweep.get("metric") or {}
        for key, value in (("parameters", parameters), ("metric", metric)):
            if not isinstance(value, dict):
                raise UserError(f"{path}: {key} must hold keys and values, got {value!r}.")
        if not parameters:
            raise UserError(f"{path} has an empty grid; give it parameters with values.")
        grid = {name: values_of(path, name, each) for name, each in parameters.items()}
        groups = read_groups(path.with_name(f"{path.stem}_groups.yaml"), grid)
        template = [str(part) for part in sweep.get("command") or []]
        study = cls(path, grid, template, groups, metric.get("name"))
        study.check_template()
        names = [study.name_of(point) for point in study.points]
        if doubled := {name for name in names if names.count(name) > 1}:
            raise UserError(f"{path} has two runs of the point {min(doubled)}; list a value once.")
        return study

    @property
    def name(self) -> str:
        return self.path.stem

    @cached_property
    def points(self) -> list[Point]:
        """All points, the last parameter changing first, as W&B goes through a grid."""
        combinations = itertools.product(*self.parameters.values())
        return [dict(zip(self.parameters, values, strict=True)) for values in combinations]

    def name_of(self, point: Point) -> str:
        """What the run of a point is called: ``train_fraction=0.2,seed_everything=0``."""
        texts = {key: str(value) for key, value in point.items()}
        return ",".join(
            f"{short(key)}={Path(text).stem if '/' in text else text}"
            for key, text in texts.items()
        )

    def command(self, point: Point, flags: Iterable[str] = ()) -> list[str]:
        """What W&B's agent runs for a point, and ``flags`` behind it."""
        replaced = {
            "${env}": ["/usr/bin/env"] if os.name == "posix" else [],
            "${interpreter}": [sys.executable],  # the agent says "python"
            "${program}": ["train.py"],
            "${args}": [f"--{key}={value}" for key, value in point.items()],
        }
        parts = itertools.chain.from_iterable(replaced.get(p, [p]) for p in self.template)
        return [*parts, *flags]

    def check_template(self) -> None:
        words = self.template
        after_fit = words[words.index("fit") + 1 :] if "fit" in words else [""]
        if not after_fit[0].startswith("--config="):
            raise UserError(f"{self.path}: command must go on with --config=... behind fit.")
        studies = [Path(word[8:]).name for word in words if word.startswith("--study=")]
        if studies != [self.path.name]:
            raise UserError(f"{self.path}: command must hold --study= and the path of this file.")
        if words.count("${args}") != 1:
            raise UserError(f"{self.path}: command must hold ${{args}} once, for the point.")

    def read(self, args: list[str]) -> Arguments:
        """What arguments behind ``fit`` mean.

        Raises:
            UserError: A parameter is missing or has a value that the grid does not have, or an
                argument is not written as ``--NAME=VALUE``.
        """
        typed: Point = {}
        before: list[str] = []
        after: list[str] = []
        for arg in args:
            name, equals, text = arg.partition("=")
            if name not in BARE and not (equals and name.startswith("--")):
                raise UserError(f"with --study, write {arg} as --NAME=VALUE.")
            key = name.removeprefix("--")
            if key in self.parameters:
                typed[key] = self.value(key, text)
            else:
                (after if typed else before).append(arg)
        if missing := [key for key in self.parameters if key not in typed]:
            raise UserError(f"a run of {self.path} needs --{missing[0]}=VALUE.")
        point = {key: typed[key] for key in self.parameters}
        own = [flag for key, value in point.items() for flag in self.flags_of(key, value)]
        return Arguments(point, before, own, after)

    def flags_of(self, key: str, value: Any) -> list[str]:
        """What a value of a parameter stands for."""
        return self.groups[key][value] if key in self.groups else [f"--{key}={value}"]

    def value(self, key: str, text: str) -> Any:
        """The value of a parameter that was typed as ``text``.

        Raises:
            UserError: The grid has no such value.
        """
        typed = number(yaml.safe_load(text))  # W&B may write 1.0 as 1
        for value in self.parameters[key]:
            if value == typed or str(value) == text:
                return value
        known = ", ".join(map(str, self.parameters[key]))
        raise UserError(f"{self.path} has no {key} {text!r}; its values are {known}.")

    def parameter(self, name: str) -> str:
        """The parameter that goes by a name, whole or its last part.

        Raises:
            UserError: There is none, or more than one.
        """
        found = [key for key in self.parameters if name in (key, short(key))]
        if len(found) != 1:
            known = ", ".join(self.parameters)
            raise UserError(f"{self.path} has no single parameter {name}; it has {known}.")
        return found[0]

    def where(self, pairs: list[str]) -> Point:
        """Values that were typed as ``PARAMETER=VALUE``.

        Raises:
            UserError: There is no such parameter or value.
        """
        typed = [pair.partition("=")[::2] for pair in pairs]
        return {key: self.value(key, v) for n, v in typed if (key := self.parameter(n))}

    def record(self, args: list[str]) -> dict[str, Any]:
        """What ``point.json`` says of a run with these arguments behind ``fit``.

        ``settings`` is a digest of all that decides the run, flags and configs; ``common`` of what
        all points share. Comments in a config, and where data and runs lie, are not in them.
        """
        arguments = self.read(args)
        return {
            "study": self.name,
            "point": arguments.point,
            "common": digest([*arguments.before, *arguments.after]),
            "settings": digest(arguments.all),
        }


def digest(flags: list[str]) -> str:
    """SHA-256 of flags and of what the configs among them, and the defaults, hold."""
    flags = [flag for flag in flags if not flag.startswith(PLACES)]
    files = [Path(flag.partition("=")[2]) for flag in flags if flag.startswith("--config=")]
    contents = [read_yaml(path) for path in (DEFAULTS, *files)]
    text = json.dumps([flags, contents], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class PointRecord:
    """The file ``point.json`` in the folder of a run: which point it is, and whether it is done."""

    folder: Path

    def read(self) -> dict[str, Any] | None:
        try:
            return json.loads((self.folder / RECORD).read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, record: dict[str, Any], *, finished: bool) -> None:
        """Say what this folder holds: a record of :meth:`Study.record`."""
        with atomic_write(self.folder / RECORD, "w") as file:
            json.dump(record | {"finished": finished}, file, indent=2)
            file.write("\n")

    def is_finished(self, record: dict[str, Any]) -> bool:
        """Whether this is a finished run with these settings.

        Raises:
            UserError: It is a run with other settings, finished or with a checkpoint to go on from.
        """
        found = self.read()
        if found is None:
            return False
        if found["settings"] == record["settings"]:
            return found["finished"]
        if found["finished"] or (self.folder / "checkpoints" / "last.ckpt").exists():
            raise UserError(
                f"{self.folder} was trained with other settings than the study has now; delete "
                "this folder to train it again, or give the study another name."
            )
        return False  # nothing came of it


def read_groups(path: Path, grid: dict[str, list[Any]]) -> dict[str, dict[str, list[str]]]:
    """The groups of a study, if it has any.

    Raises:
        UserError: A value of the grid is missing, or does not stand for a list of flags.
    """
    groups = read_yaml(path) if path.exists() else {}
    for name, values in groups.items():
        if not isinstance(values, dict):
            raise UserError(f"{path}: {name} must hold its values, got {values!r}.")
        if missing := [value for value in grid.get(name, []) if value not in values]:
            raise UserError(f"{path} does not say what {name} {missing[0]!r} is.")
        for value, flags in values.items():
            listed = flags if isinstance(flags, list) else [flags]
            if flags is not listed or not all(re.match(r"--\S+=", str(f)) for f in listed):
                raise UserError(
                    f"{path}: {name} {value!r} must be a list of flags --NAME=VALUE, got {flags!r}."
                )
    return groups


def values_of(path: Path, name: str, parameter: Any) -> list[Any]:
    """The values of one parameter of a grid."""
    if isinstance(parameter, Mapping):
        if parameter.keys() == {"value"}:
            return [parameter["value"]]
        values = parameter.get("values")
        if parameter.keys() == {"values"} and isinstance(values, list) and None in values:
            raise UserError(f"{path}: {name} has the value null, which cannot be typed; leave it.")
        if parameter.keys() == {"values"} and isinstance(values, list) and values:
            return [number(value) for value in values]
    raise UserError(
        f"{path}: {name} needs `values` with a list that is not empty, or one `value`, "
        f"got {parameter!r}."
    )


def number(value: Any) -> Any:
    """A value of a grid; YAML 1.1 takes 1e-3 for a text."""
    return float(value) if isinstance(value, str) and FLOAT.fullmatch(value) else value


def short(key: str) -> str:
    """``data.train_fraction`` -> ``train_fraction``."""
    return key.rpartition(".")[2]


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold keys and values.")
    return content
