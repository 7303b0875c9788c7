"""Settings of a run beside their defaults."""

import sys
from typing import Any

import yaml
from lightning import Trainer

from pipeline.continuing import Settings, differences
from pipeline.parser import Parser
from pipeline.studies.grid import DEFAULTS, read_yaml


def unusual(config: Settings) -> list[tuple[str, Any, Any]]:
    """Names of settings with another value than by default, that default, and the value.

    Nothing that the configuration names is imported: a class that is not loaded has no defaults.
    """
    defaults = read_yaml(DEFAULTS)
    trainer = _defaults_of(Trainer) | defaults["trainer"]
    for name, value in trainer.items():
        if isinstance(value, list):  # callbacks, loggers, plugins
            trainer[name] = [
                entry | {"init_args": _defaults_of(_look_up(entry)) | entry.get("init_args", {})}
                for entry in value
            ]
    usual = {
        "seed_everything": defaults["seed_everything"],
        "trainer": trainer,
        "model": _by_default(config["model"]),
        "data": _by_default(config["data"]),
    }
    return differences(usual, config)


def _by_default(entry: Settings) -> Settings:
    """A class with its own default of each setting; classes among these are the chosen ones."""
    known = _defaults_of(_look_up(entry))
    chosen = {
        name: _by_default(value) if isinstance(value, dict) and "class_path" in value else None
        for name, value in entry.get("init_args", {}).items()
    }
    return {
        "class_path": entry["class_path"],
        "init_args": {name: part or known.get(name) for name, part in chosen.items()},
    }


def _look_up(entry: Settings) -> Any:
    module, _, name = str(entry["class_path"]).rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def _defaults_of(found: Any) -> Settings:
    """Defaults of the constructor's arguments, as a configuration has them."""
    if not isinstance(found, type):
        return {}
    parser = Parser()
    parser.add_class_arguments(found, fail_untyped=False)
    text = parser.dump(parser.get_defaults(), skip_unset=False, skip_validation=True)
    return yaml.safe_load(text) or {}
