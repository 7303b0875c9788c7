"""Predict with one run or an ensemble:  python predict.py runs/cifar10_cpu/NAME"""

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self, get_args

import numpy as np
import torch
import yaml
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from callbacks import ProgressBar
from datamodules.base import BaseDataModule
from errors import UserError, told_in_one_sentence
from files import atomic_write, sha256
from lit_models.base import LitModel
from lit_models.classification import TTA
from runs import Run, load_checkpoint, provenance
from train import Parser, equip, link_facts, quiet_libraries

INPUTS = ("images", "names", "names_file", "text", "text_file")  # options that the data know
SETTING = re.compile(r"--(data|model)\.")  # settings of the data and the model, on the command line

# A prediction needs neither; a stranger's checkpoint cannot choose what is imported for them.
UNUSED: dict[str, Any] = {"optimizer": "torch.optim.SGD", "lr_scheduler": None}


@dataclass
class Member:
    """One checkpoint, rebuilt from itself alone."""

    source: Path  # run folder, or the checkpoint itself
    path: Path
    checkpoint: dict[str, Any]
    config: dict[str, Any]
    model: LitModel
    data: BaseDataModule

    @classmethod
    def load(cls, source: str, which: str, overrides: list[str], **inputs: Any) -> "Member":
        """Read a run or a .ckpt file and build its model and data.

        Only a LitModel and a BaseDataModule are built, and nothing in the file is executed.

        Args:
            source: Run folder or checkpoint.
            which: The ``best`` or the ``last`` checkpoint of a run.
            overrides: Settings as on the command line.
            inputs: Settings of the data that are what is to be predicted.

        Raises:
            UserError: The checkpoint is missing or damaged, an override does not fit, or the
                weights are those of another network.
        """
        is_file = Path(source).suffix == ".ckpt"
        path = Path(source) if is_file else Run.find(source).checkpoint(which)
        checkpoint = load_checkpoint(path)
        config = yaml.safe_load(checkpoint["config"])
        model = config["model"] | {"init_args": config["model"]["init_args"] | UNUSED}
        data = config["data"]
        known = checkpoint.get(data["class_path"].rpartition(".")[2], {})  # the data's state_dict
        data = data | {"init_args": data.get("init_args", {}) | known | inputs}
        parser = Parser()
        parser.add_subclass_arguments(LitModel, "model")
        parser.add_subclass_arguments(BaseDataModule, "data")
        link_facts(parser)
        settings = parser.parse_object({"model": model, "data": data})
        built = parser.instantiate(parser.parse_args(overrides, settings))
        try:
            built.model.load_state_dict(checkpoint["state_dict"])
        except RuntimeError as error:
            detail = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
            raise UserError(f"{path} holds the weights of another network: {detail}") from error
        return cls(
            path if is_file else path.parents[1], path, checkpoint, config, built.model, built.data
        )

    def describe(self) -> dict[str, Any]:
        accuracy = self.checkpoint["metrics"].get("val/accuracy")
        val_size = self.config["data"]["init_args"]["val_size"]
        counted = val_size if isinstance(val_size, int) else None  # not a share of them
        return {
            "run": str(self.source),
            "checkpoint": str(self.path),
            "sha256": sha256(self.path),
            "epoch": self.checkpoint["epoch"],
            "validation_accuracy": accuracy,
            "validation_samples": 0 if accuracy is None else counted,
            "config": self.config,
        }


Outputs = dict[str, Any]  # by the names of LitModel.outputs, arrays (N, ...)


class Parts(Callback):
    """What this process predicts, written batch by batch.

    Kept in memory, the small results would lie between the large batches that come and go, whose
    space could not be used again.
    """

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        for output in outputs:
            np.save(self.file, output.cpu().numpy())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    @staticmethod
    def read(path: Path, columns: int) -> Iterator[list[np.ndarray]]:
        """The batches in a file, as arrays of ids and of each output."""
        with path.open("rb") as file:
            while file.peek(1):
                yield [np.load(file) for _ in range(columns)]


def predict(trainer: Trainer, members: list[Member], folder: Path) -> tuple[np.ndarray, Outputs]:
    """Ids (N,) in ascending order and what was predicted, averaged over the members.

    Every process writes its shares below ``folder``; the first one puts them together.

    Raises:
        UserError: The members did not predict the same samples.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = members[0].model.outputs
    for number, member in enumerate(members):
        with Parts(folder / part_name(number, trainer.global_rank)) as parts:
            trainer.callbacks.append(parts)  # type: ignore[attr-defined]
            trainer.predict(member.model, member.data, return_predictions=False)
            trainer.callbacks.remove(parts)  # type: ignore[attr-defined]
    trainer.strategy.barrier()
    if not trainer.is_global_zero:
        return np.empty(0), {}
    # batch sizes may differ, and with them what a process had: only the whole can be averaged
    predictions = [
        assemble([folder / part_name(number, rank) for rank in range(trainer.world_size)], names)
        for number in range(len(members))
    ]
    ids = predictions[0][0]
    for member, (others, _) in zip(members, predictions, strict=True):
        if member.data.digest != members[0].data.digest or not np.array_equal(ids, others):
            raise UserError(
                f"{members[0].source} and {member.source} predict different samples, which have no "
                "average; give all runs the same data with --data_dir, --images, --names "
                "or --data.NAME=VALUE (of photos also test_size and image_size)."
            )
    if len(members) == 1:
        return ids, predictions[0][1]
    return ids, {name: np.mean([outputs[name] for _, outputs in predictions], 0) for name in names}


def part_name(number: int, rank: int) -> str:
    return f"member{number}-rank{rank}"


def assemble(parts: list[Path], names: tuple[str, ...]) -> tuple[np.ndarray, Outputs]:
    """Ids (N,) in ascending order and the outputs of one member, from all processes."""
    batches = [batch for path in parts for batch in Parts.read(path, 1 + len(names))]
    ids, *columns = (np.concatenate(column) for column in zip(*batches, strict=True))
    whole: Outputs = dict(zip(names, columns, strict=True))
    if len(np.unique(ids)) != len(ids):
        raise AssertionError("an id was predicted twice")
    order = ids.argsort()
    return ids[order], {name: output[order] for name, output in whole.items()}


def write(members: list[Member], ids: np.ndarray, outputs: Outputs, output: Path) -> None:
    """The predictions, what they were chosen from, and the record of where they came from."""
    data = members[0].data
    submission = data.submission()
    with atomic_write(output.with_suffix(".npz")) as file:
        np.savez(file, ids=ids, **outputs, classes=np.array(data.class_names))
    submission.write_predictions(output, ids, *outputs.values())
    record = {
        "csv": output.name,
        "sha256": sha256(output),
        "rows": submission.count(ids),
        "competition": data.competition,
        "sample": str(submission.sample) if submission.sample else None,
        "labels": list(submission.labels),
        "sendable": submission.sendable,
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "tta": getattr(members[0].model, "tta", None),
        "data": {"class": type(data).__name__, "digest": data.digest},
        **provenance(),
        "runs": [member.describe() for member in members],
    }
    with atomic_write(output.with_suffix(".json"), "w") as file:
        json.dump(record, file, indent=2)
        file.write("\n")


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
    with told_in_one_sentence():
        options, overrides = parse(sys.argv[1:] if args is None else args)
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
        equip(trainer, termination=False)
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


def fix_threads() -> None:
    """Use the same number of threads in every process, however many there are.

    A convolution on the CPU rounds differently with another number of threads, and Lightning would
    divide the cores among the processes, as torchrun does by OMP_NUM_THREADS.
    """
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads or 1)


if __name__ == "__main__":
    main()
