"""Predict with one run or an ensemble:  python predict.py runs/cifar10_cpu/NAME"""

import argparse
import re
import shutil
import sys
from pathlib import Path
from typing import get_args

from lightning import Trainer

from callbacks import ProgressBar
from core.errors import UserError
from core.telling import told_in_one_sentence
from lit_models.classification import TTA
from pipeline.loading import Member
from pipeline.prediction import fix_threads, predict, write
from pipeline.trainer import equip, quiet_libraries

INPUTS = ("images", "names", "names_file", "text", "text_file")  # options that the data know
SETTING = re.compile(r"--(data|model)\.")  # settings of the data and the model, on the command line


def parse(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="predict.py",
        description="Predict with one run, or average several (ensemble), and write a submission.",
        epilog="Any setting of the data can be given as --data.NAME=VALUE, of the model likewise.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder or .ckpt file")
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
        "--n_best", type=int, metavar="N", help="of each sentence, the N best corrections"
    )
    parser.add_argument(
        "--json", action="store_true", help="print corrections as JSON, an object a line"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="default: RUN/submission.csv, predictions.csv (photos, names) or .txt (lines)",
    )
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best")
    parser.add_argument("--tta", choices=get_args(TTA), help="default: as the run was tested")
    parser.add_argument("--data", metavar="CLASS", help="predict another set than the run's own")
    parser.add_argument("--data_dir", metavar="DIR", help="root folder of the data sets")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", default="auto", help="number of processes (default: auto)")
    parser.add_argument("--precision", help="default: as the run was trained")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    options, overrides = parser.parse_known_args(join_values(args))
    if unknown := [a for a in overrides if not SETTING.match(a)]:
        raise UserError(f"unknown argument {unknown[0]}; see predict.py --help.")
    if options.output is None and len(options.runs) > 1:
        raise UserError("several runs make one file: name it with --output FILE.")
    if options.tta:
        overrides = [f"--model.tta={options.tta}", *overrides]
    if options.n_best is not None:
        overrides = [f"--model.n_best={options.n_best}", *overrides]
    if options.data_dir:
        overrides = [f"--data.data_dir={options.data_dir}", *overrides]
    if options.data:  # first: the class decides which settings there are
        overrides = [f"--data={options.data}", *overrides]
    return options, overrides


def join_values(args: list[str]) -> list[str]:
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
    with told_in_one_sentence(debug="--debug" in args) as telling:
        telling.values = True  # until the first batch
        options, overrides = parse(args)
        quiet_libraries()
        fix_threads()
        inputs = {name: vars(options)[name] for name in INPUTS if vars(options)[name]}
        if options.json:
            inputs["as_json"] = True
        members = [
            Member.load(run, options.checkpoint, overrides, **inputs) for run in options.runs
        ]
        if len(members) > 1 and len(members[0].model.outputs) > 1:
            raise UserError("what these runs write has no average; give one of them.")
        if len(classes := {member.data.class_names for member in members}) > 1:
            named = " and ".join(", ".join(names) for names in sorted(classes))
            raise UserError(f"runs with different classes have no average: {named}.")
        precisions = {str(member.config["trainer"]["precision"]) for member in members}
        if len(precisions) > 1 and options.precision is None:
            named = " and ".join(sorted(precisions))
            raise UserError(f"these runs were trained in {named}; choose one with --precision.")
        told = not options.json  # standard output is for the objects alone
        bar = told and not options.text
        trainer = Trainer(
            accelerator=options.accelerator,
            devices=options.devices,
            strategy="auto" if options.devices in ("auto", "1") else "ddp",
            precision=options.precision or members[0].config["trainer"]["precision"],
            callbacks=[ProgressBar()] if bar else [],
            enable_progress_bar=bar,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        equip(trainer, telling, termination=False)
        single = members[0].source
        submission = members[0].data.submission()
        folder = single.parent if single.is_file() else single
        output = options.output or folder / submission.filename
        parts = output.parent / f".{output.name}.parts"
        try:
            ids, outputs = predict(trainer, members, parts)
            if trainer.is_global_zero:
                write(members, ids, outputs, output)
                if told:
                    count = members[0].data.submission().count(ids)
                    print(f"{count:,} predictions in {output}")
                if submission.sendable:
                    target = single if single.is_dir() and options.output is None else output
                    print(f"Next: python submit.py {target} --dry_run")
        finally:
            if trainer.is_global_zero:
                shutil.rmtree(parts, ignore_errors=True)


if __name__ == "__main__":
    main()
