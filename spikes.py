"""Compare the spikes of finished runs:  python spikes.py runs/plain/1 runs/steady/1"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from core.errors import UserError
from core.files import atomic_write
from core.runs import Run
from core.telling import told_in_one_sentence
from pipeline.comparison import group, read, replay, sentence, table
from pipeline.seeds_picture import seeds_picture
from pipeline.trainer import quiet_libraries
from steadyfit.measures import SpikeMeasures
from steadyfit.pictures import spike_pictures

COLUMNS = 4  # runs side by side; with more of them nothing could be read


def show(groups: dict[str, dict[int, SpikeMeasures]], target: float) -> None:
    """Print accuracy beside excess for each run, and what became of it against the first label."""
    width = max(len(label) for label in groups)
    print(
        f"{'':{width}}  seed  final accuracy  {f'{target:.0%} in':>9}  lowest after  excess loss"
        "  kinks (last batch/mean/val)  excursions"
    )
    for label, own in groups.items():
        for seed, found in own.items():
            epoch = "never" if found.first_epoch is None else f"epoch {found.first_epoch}"
            lowest = "-" if found.lowest_after is None else f"{found.lowest_after:.1%}"
            kinks = f"{found.kinks_last} / {found.kinks_mean} / {found.kinks_val}"
            print(
                f"{label:{width}}  {seed:4d}  {found.final_accuracy:14.1%}  {epoch:>9}  "
                f"{lowest:>12}  {found.excess:11.2f}  {kinks:>27}  {found.excursions:10d}"
            )
    means = {
        label: pd.DataFrame([asdict(found) for found in own.values()]).mean(numeric_only=True)
        for label, own in groups.items()
    }
    first, *others = means
    for label in others:
        print(sentence(first, label, means, groups[label], target))


def parse(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="spikes.py",
        description="Draw finished runs side by side and print how spiky they are.",
        epilog="Runs that differ in nothing but the seed belong together: those of equal label, or "
        "by default those of the same config. One of each is drawn; the others are in the table "
        "and in the picture of seeds.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--labels", nargs="+", metavar="LABEL", help="one for each run")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="default: comparison/ in the last run"
    )
    parser.add_argument(
        "--target",
        type=float,
        default=0.95,
        metavar="ACCURACY",
        help="validation accuracy from which on the task counts as learned (default: 0.95)",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    options = parser.parse_args(args)
    if not 0 < options.target <= 1:
        raise UserError(f"--target must be in (0, 1], got {options.target}.")
    return options


def main(args: list[str] | None = None) -> None:
    args = sys.argv[1:] if args is None else args
    with told_in_one_sentence(debug="--debug" in args):
        options = parse(args)
        quiet_libraries()
        runs = [Run.find(name) for name in options.runs]
        if len({run.folder.resolve() for run in runs}) < 2:
            raise UserError("a comparison needs two runs or more; name another run folder.")
        groups = group(runs, options.labels)
        found = {
            label: {seed: read(run, label, options.target) for seed, run in own.items()}
            for label, own in groups.items()
        }
        measures = {
            label: {seed: run.measures for seed, run in own.items()} for label, own in found.items()
        }
        show(measures, options.target)
        shown = []
        for label, own in list(groups.items())[:COLUMNS]:
            seed, run = next(iter(own.items()))
            shown.append(found[label][seed])
            try:
                shown[-1].through_time = replay(run)
            except ValueError as error:
                reason = str(error).rstrip(".")
                print(f"No gradient through time of {label}: {reason}.")
        if len(groups) > COLUMNS:
            print(f"Drawn are the first {COLUMNS} of {len(groups)}; the table has all.")
        pictures = spike_pictures(shown)
        if any(len(own) > 1 for own in groups.values()):
            pictures["spikes_seeds"] = seeds_picture(measures, options.target)
        output = options.output or runs[-1].folder / "comparison"
        for name, figure in pictures.items():
            with atomic_write(output / f"{name}.png") as file:
                figure.savefig(file, format="png", dpi=120)
        with atomic_write(output / "spikes.csv", "w") as file:
            table(measures, groups).to_csv(file, index=False)
        print(f"{', '.join(f'{name}.png' for name in pictures)} and spikes.csv are in {output}")


if __name__ == "__main__":
    main()
