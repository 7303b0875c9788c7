"""A study: a grid of runs, written as a W&B sweep, so that agents can spread it."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from core.errors import UserError
from core.files import atomic_write

DEFAULTS = Path(__file__).parents[2] / "configs" / "defaults.yaml"
_KEYS = {"program", "method", "name", "description", "project", "metric", "parameters", "command"}
_RECORD = "point.json"
_FLOAT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
# where a run finds its data and leaves its folder, which changes nothing in it
_PLACES = ("--data.data_dir=", "--data.download=", "--trainer.default_root_dir=")
_BARE = ("-h", "--help", "--print_config", "--debug")  # flags typed without a value

Point = dict[str, Any]  # one value for each parameter
Groups = dict[str, dict[str, list[str]]]  # flags of each value of each group


@dataclass(frozen=True)
class Arguments:
    """Arguments of ``train.py fit --study``, with each value of a group spelled out.

    Attributes:
        point: The values of the parameters, in the order of the grid.
        own: The flags of the point, in that order, whatever the order they were typed in.
        before: Other flags before these.
        after: Other flags after these.
    """

    point: Point
    own: list[str]
    before: list[str]
    after: list[str]

    @property
    def all(self) -> list[str]:
        return [*self.before, *self.own, *self.after]


@dataclass(frozen=True)
class Study:
    """A sweep file, ``method: grid``, whose runs are those of ``runs/<study>/<point>/``.

    A run is named by its point, so a point has one run, wherever and by whomever it is started.
    A parameter is a setting of ``train.py``, or a group: each of its values is a name, followed by
    the flags that it stands for, as in ``momentum --model.optimizer.momentum=0.9``.

    Args:
        path: The sweep file.
        parameters: The values of each parameter, of groups their names, in the file's order.
        groups: The flags that the values of groups stand for.
        environment: Variables that the command sets.
        template: The flags after ``fit``, with ``${args}`` in the place of the point.
        metric: The metric that the study is about, or None.
    """

    path: Path
    parameters: dict[str, list[Any]]
    groups: Groups
    environment: dict[str, str]
    template: list[str]
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
        if unknown := sorted(sweep.keys() - _KEYS):
            known = ", ".join(sorted(_KEYS))
            raise UserError(f"{path} has the unknown key {unknown[0]}; known are {known}.")
        for key, value in (("method", "grid"), ("program", "train.py")):
            if sweep.get(key) != value:
                raise UserError(f"{path}: {key} must be {value}, got {sweep.get(key)!r}.")
        parameters, metric = sweep.get("parameters") or {}, sweep.get("metric") or {}
        for key, mapping in (("parameters", parameters), ("metric", metric)):
            if not isinstance(mapping, dict):
                raise UserError(f"{path}: {key} must hold keys and values, got {mapping!r}.")
        if not parameters:
            raise UserError(f"{path} has an empty grid; give it parameters with values.")
        if (former := path.with_name(f"{path.stem}_groups.yaml")).exists():
            raise UserError(
                f"the groups of {former} now stand in {path}, each value a name and its flags "
                "(`momentum --model.optimizer.momentum=0.9`); move them and remove that file."
            )
        grid, groups = _read_grid(path, parameters)
        environment, template = _read_command(path, sweep.get("command") or [])
        study = cls(path, grid, groups, environment, template, metric.get("name"))
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
        """Name of the run of a point: ``train_fraction=0.2,seed_everything=0``."""
        texts = {key: str(value) for key, value in point.items()}
        return ",".join(
            f"{last_part(key)}={Path(text).stem if '/' in text else text}"
            for key, text in texts.items()
        )

    def arguments(self, point: Point, flags: Iterable[str] = ()) -> list[str]:
        """Arguments after ``fit`` that W&B's agent types for a point, and ``flags`` after them."""
        place = self.template.index("${args}")
        own = [f"--{key}={value}" for key, value in point.items()]
        return [*self.template[:place], *own, *self.template[place + 1 :], *flags]

    def read(self, args: list[str]) -> Arguments:
        """Find the point in arguments after ``fit``.

        Raises:
            UserError: A parameter is missing or has a value that the grid does not have, or an
                argument is not written as ``--NAME=VALUE``.
        """
        typed: Point = {}
        before: list[str] = []
        after: list[str] = []
        for arg in args:
            name, equals, text = arg.partition("=")
            if name not in _BARE and not (equals and name.startswith("--")):
                raise UserError(f"with --study, write {arg} as --NAME=VALUE.")
            key = name.removeprefix("--")
            if key in self.parameters:
                typed[key] = self.value(key, text)
            else:
                (after if typed else before).append(arg)
        if missing := [key for key in self.parameters if key not in typed]:
            raise UserError(f"a run of {self.path} needs --{missing[0]}=VALUE.")
        point = {key: typed[key] for key in self.parameters}
        own: list[str] = []
        for key, value in point.items():
            own += self.groups[key][value] if key in self.groups else [f"--{key}={value}"]
        return Arguments(point, own, before, after)

    def value(self, key: str, text: str) -> Any:
        """The value of a parameter that was typed as ``text``; of a group its name is enough.

        Raises:
            UserError: The grid has no such value.
        """
        if key in self.groups:
            text = text.partition(" ")[0]
        typed = _number(yaml.safe_load(text))  # W&B may write 1.0 as 1
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
        found = [key for key in self.parameters if name in (key, last_part(key))]
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
        """Content of ``point.json`` for a run with these arguments after ``fit``.

        ``settings`` is a digest of all that decides the run, flags and configs; ``common`` of what
        all points share. Comments in a config, and where data and runs lie, are not in them.
        """
        arguments = self.read(args)
        return {
            "study": self.name,
            "point": arguments.point,
            "common": _digest([*arguments.before, *arguments.after]),
            "settings": _digest(arguments.all),
        }


@dataclass(frozen=True)
class PointRecord:
    """The file ``point.json`` in the folder of a run: which point it is, and whether it is done."""

    folder: Path

    def read(self) -> dict[str, Any] | None:
        try:
            return json.loads((self.folder / _RECORD).read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, record: dict[str, Any], *, finished: bool) -> None:
        """Write a record of :meth:`Study.record`."""
        with atomic_write(self.folder / _RECORD, "w") as file:
            json.dump(record | {"finished": finished}, file, indent=2)
            file.write("\n")

    def is_finished(self, record: dict[str, Any]) -> bool:
        """Tell whether this is a finished run with these settings.

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


def last_part(key: str) -> str:
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


def _read_grid(path: Path, parameters: dict[str, Any]) -> tuple[dict[str, list[Any]], Groups]:
    """The values of each parameter, and the flags of those that are groups."""
    grid: dict[str, list[Any]] = {}
    groups: Groups = {}
    for name, parameter in parameters.items():
        values = parameter.get("values") if isinstance(parameter, dict) else None
        if not isinstance(values, list) or not values or None in values or len(parameter) > 1:
            raise UserError(
                f"{path}: {name} needs `values` alone, a list that is not empty and holds no null, "
                f"which cannot be typed; got {parameter!r}."
            )
        grid[name] = [_number(value) for value in values]
        if any(" --" in str(value) for value in values):
            words = [str(value).split() for value in values]
            if unnamed := [v for v in values if not str(v).strip() or str(v).startswith("--")]:
                raise UserError(f"{path}: {name}: write a name before the flags of {unnamed[0]!r}.")
            grid[name], groups[name] = [w[0] for w in words], {w[0]: w[1:] for w in words}
            for flag in itertools.chain.from_iterable(groups[name].values()):
                if not re.match(r"--\S+=", flag):
                    raise UserError(f"{path}: {name}: write {flag} as --NAME=VALUE.")
    return grid, groups


def _read_command(path: Path, command: list[Any]) -> tuple[dict[str, str], list[str]]:
    """Variables before the program, and flags after ``fit``."""
    words = [str(word) for word in command]
    place = words.index("fit") if "fit" in words else len(words)
    template = words[place + 1 :]
    studies = [Path(word[8:]).name for word in template if word.startswith("--study=")]
    first = next(iter(template), "")
    if (first[:9], studies, template.count("${args}")) != ("--config=", [path.name], 1):
        raise UserError(
            f"{path}: command must hold fit, directly after it --config=..., then --study= with "
            f"the path of this file, and once ${{args}}, for the point; got {' '.join(words)!r}."
        )
    variables = [word for word in words[:place] if re.match(r"[A-Za-z_]\w*=", word)]
    known = {*variables, "${env}", "${interpreter}", "${program}"}
    if unknown := [word for word in words[:place] if word not in known]:
        raise UserError(
            f"{path}: command holds {unknown[0]!r} before fit, which study.py would not run; it "
            "knows NAME=VALUE, ${env}, ${interpreter} and ${program}."
        )
    return dict(variable.split("=", 1) for variable in variables), template


def _number(value: Any) -> Any:
    """A value of a grid; YAML 1.1 takes 1e-3 for a text."""
    return float(value) if isinstance(value, str) and _FLOAT.fullmatch(value) else value


def _digest(flags: list[str]) -> str:
    """SHA-256 of flags and of what the configs among them, and the defaults, hold."""
    flags = [flag for flag in flags if not flag.startswith(_PLACES)]
    files = [Path(flag.partition("=")[2]) for flag in flags if flag.startswith("--config=")]
    contents = [read_yaml(path) for path in (DEFAULTS, *files)]
    text = json.dumps([flags, contents], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
