"""Predictions of one run, or of several averaged, by any number of processes."""

import argparse
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from callbacks import ProgressBar
from core import wandb_runs
from core.errors import ErrorScope, UserError
from core.files import atomic_write, sha256
from core.locks import locked
from core.provenance import provenance
from core.runs import Run, is_file
from core.submission import Submission
from core.wandb_runs import Piece
from datamodules import GrammarDataModule
from datamodules.text.corrections import Line, corrected_object, marked, word_edits, write_lines
from lit_models.exporting import export
from lit_models.trained import make_predictor
from pipeline.loading import INPUTS, LoadedRun
from pipeline.studies import out_of_fold
from pipeline.trainer import prepare_trainer, quiet_libraries

Outputs = dict[str, Any]  # by the names of LitModel.outputs, arrays (N, ...)
Predicted = tuple[np.ndarray, Outputs]  # ids (N,) in ascending order, and what was predicted


class PredictionShards(Callback):
    """Predictions of this process, written batch by batch.

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


def predict(trainer: Trainer, members: list[LoadedRun], folder: Path) -> list[Predicted]:
    """Return what each member predicts; in the first process alone, elsewhere nothing.

    Every process writes its shares below ``folder``; the first one puts them together.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, member in enumerate(members):
        with PredictionShards(folder / _shard_name(number, trainer.global_rank)) as parts:
            trainer.callbacks.append(parts)  # type: ignore[attr-defined]
            trainer.predict(member.model, member.data, return_predictions=False)
            trainer.callbacks.remove(parts)  # type: ignore[attr-defined]
    trainer.strategy.barrier()
    if not trainer.is_global_zero:
        return []
    names = members[0].model.outputs
    return [
        _join_shards(
            [folder / _shard_name(number, rank) for rank in range(trainer.world_size)], names
        )
        for number in range(len(members))
    ]


def average(members: list[LoadedRun], predictions: list[Predicted]) -> Predicted:
    """Return the mean over the members; only of the whole, as batches and processes may differ.

    Raises:
        UserError: The members did not predict the same samples.
    """
    ids, first = predictions[0]
    for member, (others, _) in zip(members, predictions, strict=True):
        if member.data.digest != members[0].data.digest or not np.array_equal(ids, others):
            raise UserError(
                f"{members[0].source} and {member.source} predict different samples, which have no "
                "average; give all runs the same data with --data_dir, --images, --names "
                "or --data.NAME=VALUE (of photos also test_size and image_size)."
            )
    if len(members) == 1:
        return ids, first
    return ids, {name: np.mean([outputs[name] for _, outputs in predictions], 0) for name in first}


def predict_out_of_fold(
    trainer: Trainer, members: list[LoadedRun], folder: Path
) -> out_of_fold.Columns | None:
    """Predict the held-out fold of each run; a note says why there is no such prediction.

    The average does without: it needs neither labelled samples nor all folds.
    """
    if len(members) == 1 or not any(member.split for member in members):
        return None
    try:
        out_of_fold.refuse_overlap(members)
        held_out = [replace(m, data=m.data.held_out(*m.folds)) for m in members]
        predictions = predict(trainer, held_out, folder)
        return out_of_fold.join(held_out, predictions) if trainer.is_global_zero else None
    except UserError as error:
        rank_zero_only(print)(f"note: no out-of-fold accuracy: {error}")
        return None


def _shard_name(number: int, rank: int) -> str:
    return f"member{number}-rank{rank}"


def _join_shards(parts: list[Path], names: tuple[str, ...]) -> Predicted:
    """Join what all processes have predicted with one member."""
    batches = [batch for path in parts for batch in PredictionShards.read(path, 1 + len(names))]
    ids, *columns = (np.concatenate(column) for column in zip(*batches, strict=True))
    whole: Outputs = dict(zip(names, columns, strict=True))
    if len(np.unique(ids)) != len(ids):
        raise AssertionError("an id was predicted twice")
    order = ids.argsort()
    return ids[order], {name: output[order] for name, output in whole.items()}


def write(
    members: list[LoadedRun], predicted: Predicted, output: Path, oof: out_of_fold.Columns | None
) -> None:
    """Write the predictions, the probabilities and the record of where they came from."""
    data, (ids, outputs) = members[0].data, predicted
    submission = data.submission()
    submission.check(*outputs.values())
    with atomic_write(output.with_suffix(".npz")) as file:
        np.savez(file, ids=ids, **outputs, classes=np.array(data.class_names))
    submission.write_predictions(output, ids, *outputs.values())
    record: dict[str, Any] = {
        "csv": output.name,
        "sha256": sha256(output),
        "rows": submission.count(ids),
        "competition": data.competition,
        "sample": str(submission.sample) if submission.sample else None,
        "labels": list(submission.accepted),
        "sendable": submission.sendable,
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "tta": getattr(members[0].model, "tta", None),
        "data": {"class": type(data).__name__, "digest": data.digest},
        **provenance(),
        "runs": [member.describe() for member in members],
    }
    joined, recorded = output.with_name("oof.npz"), output.with_suffix(".json")
    out_of_fold.remove(joined, recorded)
    if oof:
        record["out_of_fold"] = out_of_fold.save(joined, oof, data.class_names)
    with atomic_write(recorded, "w") as file:
        json.dump(record, file, indent=2)
        file.write("\n")


def _fix_threads() -> None:
    """Use the same number of threads in every process, however many there are.

    A convolution on the CPU rounds differently with another number of threads, and Lightning would
    divide the cores among the processes, as torchrun does by OMP_NUM_THREADS.
    """
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads or 1)


def _refuse_mixed(members: list[LoadedRun], precision: str | None) -> None:
    """Refuse runs that write nothing, or whose average would mean nothing.

    Raises:
        UserError: Which and why.
    """
    if not members[0].model.outputs:
        raise UserError(
            f"{members[0].source} is a regression, which has no classes to write; use the outputs "
            "of its network in Python."
        )
    if len(members) > 1 and len(members[0].model.outputs) > 1:
        raise UserError("what these runs write has no average; give one of them.")
    if len(classes := {member.data.class_names for member in members}) > 1:
        named = " and ".join(", ".join(names) for names in sorted(classes))
        raise UserError(f"runs with different classes have no average: {named}.")
    precisions = {str(member.model.run_precision) for member in members}
    if len(precisions) > 1 and precision is None:
        named = " and ".join(sorted(precisions))
        raise UserError(f"these runs were trained in {named}; choose one with --precision.")


def _leave_out_others(given: list[str]) -> list[str]:
    """Leave out what is no run in a folder (``runs/STUDY/*``), such as its report."""
    there = {name: Path(name) for name in given if not name.endswith(".ckpt")}
    others = [n for n, path in there.items() if path.exists() and not is_file(path / "config.yaml")]
    if len(others) in (0, len(given)):
        return given
    rank_zero_only(print)(f"note: left out, as they are no runs: {', '.join(others)}")
    return [name for name in given if name not in others]


def _choose_output(given: Path | None, members: list[LoadedRun], submission: Submission) -> Path:
    """Return the file of the predictions: the one that was named, or else one beside the runs.

    Raises:
        UserError: Several runs lie apart, or it is no file that can be handed in.
    """
    single = members[0].source
    folder = single.parent if single.is_file() or len(members) > 1 else single
    if given is None and any(member.source.parent != folder for member in members[1:]):
        raise UserError("several runs make one file: name it with --output FILE.")
    output = given or folder / submission.filename
    if submission.sendable and output.suffix != ".csv":
        raise UserError(f"--output {output}: submit.py takes .csv files alone; name it so.")
    _refuse_folder(output)
    return output


def _refuse_folder(output: Path) -> None:
    """Refuse a folder where a file is written.

    Raises:
        UserError: It is one.
    """
    if output.is_dir():
        raise UserError(f"--output {output} is a folder; name a file in it.")


def _link_predictions(members: list[LoadedRun], output: Path) -> None:
    """Put the predictions of a run on W&B; those of an ensemble are of no run alone."""
    source, data = Run(members[0].source), members[0].data
    if len(members) > 1 or not source.folder.is_dir() or (id := source.wandb_id) is None:
        return
    recorded = json.loads(output.with_suffix(".json").read_text())
    facts = {name: recorded[name] for name in ("rows", "sha256", "competition")}
    used = [
        Piece("dataset", type(data).__name__, digest=data.digest),
        Piece("model", id, members[0].path),
    ]
    made = Piece("predictions", id, output, metadata=facts)
    wandb_runs.record(source, "predict", used, [made])


def spell(options: argparse.Namespace) -> None:
    """Correct lines by the speller alone, which knows the words of the training books.

    They are printed with their changes, and written to ``--output`` where it is given.
    """
    data = GrammarDataModule(
        options.data_dir or "data", text=options.text, text_file=options.text_file
    )
    if options.output:
        _refuse_folder(options.output)
    lines = [Line.of_text(text) for text in data.lines_to_correct()]
    edits = [word_edits(line.words, data.spelled(line)) for line in lines]
    if options.output:
        write_lines(options.output, lines, edits)
    console = Console(highlight=False, soft_wrap=True)
    for line, way in zip(lines, edits, strict=True):
        if options.json:
            sys.stdout.write(json.dumps(corrected_object(line, way), ensure_ascii=False) + "\n")
        else:
            console.print(marked(line, way, console.is_terminal))


def _make_trainer(options: argparse.Namespace, member: LoadedRun, *, bar: bool) -> Trainer:
    return make_predictor(
        options.accelerator,
        options.devices,
        options.precision or member.model.run_precision,
        strategy="auto" if options.devices in ("auto", "1") else "ddp",
        callbacks=[ProgressBar()] if bar else [],
        enable_progress_bar=bar,
    )


def _make_parts_folder(output: Path) -> Path:
    """Make the folder in which the processes put the parts of ``output``.

    Raises:
        UserError: It cannot be made.
    """
    parts = output.parent / f".{output.name}.parts"
    try:
        parts.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{output.parent} cannot be written to ({error.strerror}); choose another place with "
            "--output FILE."
        ) from None
    return parts


def run(options: argparse.Namespace, overrides: list[str], errors: ErrorScope) -> None:
    """Predict with runs, write the predictions and say where they are.

    Args:
        options: Its arguments.
        overrides: Settings of the data and the model, as on the command line.
        errors: Knows until when any ValueError is the user's.
    """
    quiet_libraries()
    _fix_threads()
    inputs = {name: vars(options)[name] for name in INPUTS if vars(options)[name]}
    if options.json:
        inputs["as_json"] = True
    members = [
        LoadedRun.load(run, options.checkpoint, overrides, trust=options.trust, **inputs)
        for run in _leave_out_others(options.runs)
    ]
    _refuse_mixed(members, options.precision)
    if options.export:
        export(members[0].model, options.export)
        return
    as_text = not options.json  # standard output is for the objects alone
    trainer = _make_trainer(options, members[0], bar=as_text and not options.text)
    prepare_trainer(trainer, errors, termination=False)
    single, submission = members[0].source, members[0].data.submission()
    output = _choose_output(options.output, members, submission)
    parts = _make_parts_folder(output)
    with ExitStack() as exit_stack:
        if trainer.is_global_zero:
            busy = f"{output} is being written by another predict.py; wait, or choose --output."
            exit_stack.enter_context(locked(parts / "lock", output, busy))
            exit_stack.callback(shutil.rmtree, parts, ignore_errors=True)
        predictions = predict(trainer, members, parts)
        oof = predict_out_of_fold(trainer, members, parts / "out_of_fold")
        if not trainer.is_global_zero:
            return
        write(members, average(members, predictions), output, oof)
        if as_text:
            count = members[0].data.submission().count(predictions[0][0])
            print(f"{count:,} predictions in {output}")
        _link_predictions(members, output)
        if submission.sendable:
            target = single if output.parent == single and options.output is None else output
            print(f"Next: python submit.py {shlex.quote(str(target))} --dry_run")
