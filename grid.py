"""What a study is: a grid of runs, written as a W&B sweep, so that agents can spread it."""

import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from errors import UserError
from files import atomic_write

DEFAULTS = Path(__file__).parent / "configs" / "defaults.yaml"
KEYS = {"program", "method", "name", "description", "project", "metric", "parameters", "command"}
RECORD = "point.json"
# where a run is made and kept, which changes nothing in it
PLACES = (
    "--run=",
    "--data.data_dir=",
    "--trainer.accelerator=",
    "--trainer.default_root_dir=",
    "--trainer.devices=",
)

Point = dict[str, Any]  # one value for each parameter


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
        parameters = {
            name: values_of(path, name, each)
            for name, each in (sweep.get("parameters") or {}).items()
        }
        if not parameters:
            raise UserError(f"{path} has an empty grid; give it parameters with values.")
        groups_file = path.with_name(f"{path.stem}_groups.yaml")
        groups = read_yaml(groups_file) if groups_file.exists() else {}
        for name, flags in groups.items():
            if missing := [v for v in parameters.get(name, []) if v not in flags]:
                raise UserError(f"{groups_file} does not say what {name} {missing[0]!r} is.")
        template = [str(part) for part in sweep.get("command") or []]
        study = cls(path, parameters, template, groups, (sweep.get("metric") or {}).get("name"))
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
        return ",".join(f"{short(key)}={Path(str(v)).stem if '/' in str(v) else v}"
                        for key, v in point.items())  # fmt: skip

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
        if f"--study={self.path.name}" not in [f"--study={Path(w[8:]).name}" for w in words]:
            raise UserError(f"{self.path}: command must hold --study= and the path of this file.")
        if "${args}" not in words:
            raise UserError(f"{self.path}: command must end with ${{args}}, where the point goes.")

    def split(self, args: list[str]) -> tuple[Point, list[str]]:
        """The point that typed arguments mean, and the arguments with each group spelled out.

        Raises:
            UserError: A parameter is missing or has a value that the grid does not have.
        """
        point: Point = {}
        rest: list[str] = []
        for arg in args:
            key, _, text = arg.removeprefix("--").partition("=")
            if key not in self.parameters:
                rest.append(arg)
                continue
            point[key] = self.value(key, text)
            rest += self.groups[key][point[key]] if key in self.groups else [arg]
        if missing := self.parameters.keys() - point.keys():
            raise UserError(f"a run of {self.path} needs --{min(missing)}=VALUE.")
        return {key: point[key] for key in self.parameters}, rest

    def value(self, key: str, text: str) -> Any:
        """The value of a parameter that was typed as ``text``.

        Raises:
            UserError: The grid has no such value.
        """
        typed = yaml.safe_load(text)  # W&B may write 1.0 as 1
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

    def settings(self, args: list[str]) -> str:
        """SHA-256 of all that decides a run: what was typed behind ``fit``, and the configs."""
        point, flags = self.split(args)
        flags = [flag for flag in flags if not flag.startswith(PLACES)]
        files = [Path(flag.partition("=")[2]) for flag in flags if flag.startswith("--config=")]
        texts = [path.read_text() for path in (DEFAULTS, *files) if path.exists()]
        return hashlib.sha256(json.dumps([point, flags, texts]).encode()).hexdigest()


@dataclass(frozen=True)
class PointRecord:
    """The file ``point.json`` in the folder of a run: which point it is, and whether it is done."""

    folder: Path

    def read(self) -> dict[str, Any] | None:
        try:
            return json.loads((self.folder / RECORD).read_text())
        except FileNotFoundError:
            return None

    def write(self, study: Study, args: list[str], *, finished: bool) -> None:
        """Say what this folder holds: the run that ``fit`` makes of these arguments.

        Raises:
            UserError: It holds a run with other settings.
        """
        settings = study.settings(args)
        self.is_finished(settings)
        record = {"study": study.name, "point": study.split(args)[0], "settings": settings}
        with atomic_write(self.folder / RECORD, "w") as file:
            json.dump(record | {"finished": finished}, file, indent=2)
            file.write("\n")

    def is_finished(self, settings: str) -> bool:
        """Whether the run is finished.

        Raises:
            UserError: It was trained with other settings.
        """
        found = self.read()
        if found and found["settings"] != settings:
            raise UserError(
                f"{self.folder} was trained with other settings than the study has now; delete "
                "this folder to train it again, or give the study another name."
            )
        return bool(found and found["finished"])


def values_of(path: Path, name: str, parameter: Any) -> list[Any]:
    """The values of one parameter of a grid."""
    if isinstance(parameter, Mapping):
        if parameter.keys() == {"value"}:
            return [parameter["value"]]
        values = parameter.get("values")
        if parameter.keys() == {"values"} and isinstance(values, list) and values:
            return values
    raise UserError(
        f"{path}: {name} needs `values` with a list that is not empty, or one `value`, "
        f"got {parameter!r}."
    )


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
