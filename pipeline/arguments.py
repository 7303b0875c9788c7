"""The arguments of ``train.py``, put into order for the parser."""

import argparse
import os
from pathlib import Path

import yaml

from core.errors import UserError
from core.runs import ROOT, Run, is_file
from pipeline.admission import admit, plain_trainer, read_config
from pipeline.history import update
from pipeline.studies.grid import Study

_SUBCOMMANDS = ("fit", "validate", "test")


def subcommands(args: list[str]) -> tuple[str, ...]:
    """Return the subcommands whose parsers are needed: the one that is typed, or else all."""
    typed = tuple(args[:1])
    return typed if set(typed) & set(_SUBCOMMANDS) else _SUBCOMMANDS


def normalize_argv(args: list[str]) -> list[str]:
    """Put the configuration files in front, so that every typed flag wins over every file.

    ``--run RUN`` brings the configuration of a run that exists, unless another one is given; the
    run is looked for where ``--trainer.default_root_dir`` says. With ``--study FILE`` the run is
    named by its point, and groups become the flags they stand for.
    """
    if args[:1] != list(subcommands(args)):
        return args
    if "--settings" in args:
        return [args[0], "--help"]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    parser.add_argument("--run")
    parser.add_argument("--study")
    parser.add_argument("--trainer.default_root_dir", dest="root")
    parser.add_argument("--trust", action="store_true")
    known, rest = parser.parse_known_args(args[1:])
    if known.study:
        study = Study.load(known.study)
        arguments = study.read(args[1:])
        known, rest = parser.parse_known_args(arguments.all)
        if known.run:
            raise UserError("a run of a study is named by its point; leave --run out.")
        known.run = study.name_of(arguments.point)
    if known.run is None and args[0] != "fit":
        raise UserError(f"{args[0]} needs a trained run: add --run RUN.")
    if known.run and not known.config:
        run = Run.find(known.run, Path(known.root or ROOT))
        known.config = [str(run.config)]
        folder = run.folder.resolve()  # the path may be a link, or "."
        known.root = known.root or os.path.relpath(folder.parents[1])
        if args[0] == "fit":
            known.run = folder.name
    known.config = [_admitted_config(path, args[0], known.trust) for path in known.config]
    if known.trust:
        rest = ["--trust", *rest]
    if known.root:
        rest = [f"--trainer.default_root_dir={known.root}", *rest]
    configs = [f"--config={path}" for path in known.config]
    named = [
        f"--{key}={vars(known)[key]}" for key in ("run", "study") if vars(known)[key] is not None
    ]
    return [args[0], *configs, *named, *rest]


def _admitted_config(path: str, subcommand: str, trust: bool) -> str:
    """Return a configuration for ``--config``; that of a run names nothing foreign unless trusted.

    A test takes of a run's trainer what is left of it by :func:`plain_trainer`.
    """
    if Path(path).name != "config.yaml" or not is_file(Path(path)):
        return path
    config = update(read_config(Path(path).read_text(), path))
    if subcommand != "fit":
        config["trainer"] = plain_trainer(config["trainer"])
    if not trust:
        admit(config, path)
    return path if subcommand == "fit" else yaml.safe_dump(config)
