"""Predict with one run or an ensemble:  python predict.py runs/cifar10_cpu/NAME"""

import argparse
import re
import sys
from pathlib import Path

from core.errors import UserError, exit_on_user_error
from core.starting import start

SETTING = re.compile(r"--(data|model)\.")  # settings of the data and the model, on the command line
EXPORTED = (".onnx", ".pt2")
ACTING = {  # the options that act beside these two
    "export": {"runs", "checkpoint", "tta", "data", "data_dir", "trust", "debug"},
    "speller": {"text", "text_file", "json", "output", "data_dir", "debug"},
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="predict.py",
        description="Predict with one run, or average several (ensemble), and write a submission.",
        epilog="Any setting of the data can be given as --data.NAME=VALUE, of the model likewise.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folder or .ckpt file")
    parser.add_argument(
        "--images", metavar="FOLDER", help="photos to predict, for a run on a folder of photos"
    )
    parser.add_argument(
        "--names", nargs="+", metavar="NAME", help="names to predict, for a run on last names"
    )
    parser.add_argument("--names_file", metavar="FILE", help="likewise, a text file of one a line")
    parser.add_argument(
        "--text", nargs="+", metavar="LINE", help="lines to correct, for a run on grammar"
    )
    parser.add_argument(
        "--text_file", metavar="FILE", help="likewise, a text file of one a line; - is stdin"
    )
    parser.add_argument(
        "--speller",
        action="store_true",
        help="instead of a RUN: correct spelling, capitals and articles of lines without training",
    )
    parser.add_argument(
        "--n_best", type=int, metavar="N", help="of each sentence, the N best corrections"
    )
    parser.add_argument(
        "--json", action="store_true", help="print corrections as JSON, an object a line"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="default: submission.csv, predictions.csv (photos, names) or .txt (lines) in RUN, "
        "of several runs beside them",
    )
    parser.add_argument(
        "--export",
        type=Path,
        metavar="FILE",
        help="write the classifier of images itself, as FILE.onnx or FILE.pt2, and predict nothing",
    )
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best")
    parser.add_argument(
        "--tta", metavar="VIEWS", help="none, mirror or mirror_translate; default: as it was tested"
    )
    parser.add_argument("--data", metavar="CLASS", help="predict another set than the run's own")
    parser.add_argument("--data_dir", metavar="DIR", help="root folder of the data sets")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", default="auto", help="number of processes (default: auto)")
    parser.add_argument("--precision", help="default: as the run was trained")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="import whatever the run names: only for runs of people you trust",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    return parser


def parse(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the arguments, and settings of the data and the model.

    Raises:
        UserError: They do not go together.
    """
    options, overrides = make_parser().parse_known_args(_join_values(args))
    if not re.fullmatch(r"auto|-1|\d+(,\d+)*", options.devices):
        raise UserError(f"--devices must be a number of processes, or auto, got {options.devices}.")
    if unknown := [a for a in overrides if not SETTING.match(a)]:
        raise UserError(f"unknown argument {unknown[0]}; see predict.py --help.")
    if options.output and options.output.suffix in (".json", ".npz"):
        raise UserError(
            f"--output {options.output}: beside the predictions lie {options.output.stem}.npz and "
            f"{options.output.stem}.json, which would take their place; choose another ending."
        )
    if options.output and options.output.stem == "oof":
        raise UserError(f"--output {options.output}: oof.npz is for folds; choose another name.")
    if bool(options.runs) == options.speller:
        raise UserError(
            "give a RUN, or --speller without one; --data.speller=true puts it in front of a run."
        )
    if options.export and (options.export.suffix not in EXPORTED or len(options.runs) > 1):
        raise UserError(f"--export writes one run to FILE.onnx or FILE.pt2, not {options.export}.")
    if options.export or options.speller:
        _refuse_idle_options(options, overrides)
    short = {  # the class of the data first: it decides which settings there are
        "--data": options.data,
        "--data.data_dir": options.data_dir,
        "--model.n_best": options.n_best,
        "--model.tta": options.tta,
    }
    typed = [f"{name}={value}" for name, value in short.items() if value is not None]
    return options, [*typed, *overrides]


def _refuse_idle_options(options: argparse.Namespace, overrides: list[str]) -> None:
    """Refuse what has no use where a file is exported, or without a run.

    Raises:
        UserError: Which option.
    """
    mode = "speller" if options.speller else "export"
    idle = sorted(f"--{name}" for name in _given(options) - ACTING[mode] - {mode})
    idle += overrides if options.speller else []
    if idle:
        does = {"speller": "works without a run", "export": "predicts nothing and is in float32"}
        raise UserError(f"--{mode} {does[mode]}; leave out {idle[0]}.")


def _given(options: argparse.Namespace) -> set[str]:
    """Return names of the options that are not as they are by default."""
    defaults = vars(make_parser().parse_args([]))
    return {name for name, value in vars(options).items() if value != defaults[name]}


def _join_values(args: list[str]) -> list[str]:
    """Write ``--data.NAME VALUE`` as ``--data.NAME=VALUE``, lest the value be taken for a run."""
    joined: list[str] = []
    for arg in args:
        if joined and SETTING.match(joined[-1]) and "=" not in joined[-1]:
            joined[-1] += f"={arg}"
        else:
            joined.append(arg)
    return joined


def main(args: list[str] | None = None) -> None:
    args = sys.argv[1:] if args is None else args
    with exit_on_user_error(debug="--debug" in args) as errors:
        options, overrides = parse(args)
        start()
        from pipeline.prediction import run, spell

        if options.speller:
            spell(options)
            return
        errors.setting_up = True  # until the prediction starts
        run(options, overrides, errors)


if __name__ == "__main__":
    main()
