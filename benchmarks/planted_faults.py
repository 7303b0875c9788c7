"""Bugs that were mended, planted again one at a time: does a test still catch each?

    python -m benchmarks.planted_faults [--only NAME ...] [--list] [--jobs 2]

Each fault undoes what mended one bug, or what keeps a trap of the libraries from being one, as far
as today's code allows, and names the tests that should fail by it. They first have to pass without
a fault. Then each fault is planted in a copy of the checkout, which itself is never touched, and
its tests run there. The exit status is 1 if a fault is not caught. A fault whose old text is not
there exactly once is an error, so that the list stays true when code moves, and so is one with
which no test can be run.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).parents[1]
TIMEOUT = 300  # seconds for the tests of a fault, most of which take ten
TESTS_FAILED = 1  # exit status of pytest; above it, tests could not be run


@dataclass(frozen=True)
class Fault:
    """A bug to plant: in ``file``, ``old`` becomes ``new``.

    Attributes:
        commit: The commit that mended it, or that kept a trap of the libraries from becoming one.
        harm: The effect on a user, one sentence.
        tests: Names of test files, or of tests in them, below ``tests/``.
    """

    name: str
    commit: str
    harm: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of a fault: the test that failed, or None, and how long all took in seconds."""

    fault: Fault
    caught_by: str | None
    seconds: float


FAULTS = (
    # Exact resume
    Fault(
        "loader_position",
        "c7e4991",
        "A run resumed in mid-epoch trains again on the batches with which the epoch began.",
        "lit_models/base.py",
        "        batches = len(self.data.train_dataloader())\n",
        "        return int(self.trainer.estimated_stepping_batches)\n",
        ("test_classification.py::test_a_run_resumed_in_mid_epoch_ends_with_the_same_bits",),
    ),
    Fault(
        "dropout_of_the_process",
        "c7e4991",
        "A resumed run draws other dropout masks than the uninterrupted one.",
        "lit_models/base.py",
        "            torch.default_generator.manual_seed(seed)\n",
        "            pass\n",
        ("test_classification.py::test_a_run_resumed_in_mid_epoch_ends_with_the_same_bits",),
    ),
    Fault(
        "epoch_not_told",
        "c7e4991",
        "Every epoch brings the samples, and draws their augmentation, as the first one did.",
        "datamodules/loaders/resident.py",
        "        self.sampler = self\n",
        "",
        (
            "test_temporal_order.py::"
            "test_training_and_validation_interleave_on_the_notebooks_stream",
        ),
    ),
    # Spikes
    Fault(
        "nan_has_an_order",
        "2750c83",
        "A loss that becomes NaN after a spike does not show in the record of the spike.",
        "steadyfit/watching/spike_log.py",
        "value = loss.value if math.isfinite(loss.value) else math.inf",
        "value = loss.value",
        ("test_gradient_spikes.py::test_without_a_reaction_nan_is_recorded_to_the_end",),
    ),
    Fault(
        "batches_of_other_steps",
        "2750c83",
        "Who saves a checkpoint in mid-step finds the batches of other steps in a spike's record.",
        "steadyfit/_monitor_hooks.py",
        "        if self._stepped or not self._batches:\n"
        "            self._batches, self._stepped = [], False\n",
        "        if self._pending and self._pending[-1].batches[-1:] == [batch_idx - 1]:\n"
        "            self._batches = []\n"
        "        self._stepped = False\n"
        "        if not self._batches:\n",
        ("test_gradient_spikes.py::test_flush_in_the_midst_of_a_step_loses_no_batch",),
    ),
    Fault(
        "ratios_without_their_count",
        "404c47b",
        "When layers are unfrozen, noise of their first steps is reported as spikes.",
        "steadyfit/watching/ratios.py",
        "known = np.flatnonzero(self.uses >= self.REFRESH)",
        "known = np.flatnonzero(self.uses >= 1)",
        (
            "test_gradient_spikes.py::"
            "test_ratios_of_added_parameters_are_taken_from_as_many_steps_as_others",
        ),
    ),
    # Clipping
    Fault(
        "scaled_loss",
        "7e71372",
        "In float16 update clipping goes by the loss times the scale, and limits nothing.",
        "steadyfit/_hooks.py",
        "return value if scaler is None else value / scaler.scale(torch.ones_like(value))",
        "return value",
        ("test_clipping.py::test_no_step_promises_more_than_a_share_of_the_loss",),
    ),
    Fault(
        "gradients_of_the_first_step",
        "2750c83",
        "Update clipping moves a parameter that has no gradient any more.",
        "steadyfit/probe.py",
        "        if active != self.layout.active:\n",
        "        if not self.layout.active:\n",
        ("test_clipping.py::test_parameter_without_gradient_stays",),
    ),
    Fault(
        "clipping_rounds",
        "7e71372",
        "Update clipping that never acts changes the last bits of the weights all the same.",
        "steadyfit/probe.py",
        "self.layout.lerp_(before, self.layout.gather(active), factors)",
        "self.layout.lerp_(before, list(torch._foreach_sub(before, self.back)), factors)",
        ("test_clipping.py::test_limits_that_are_not_reached_change_no_bit",),
    ),
    # The run folder
    Fault(
        "checkpoint_in_place",
        "c7e4991",
        "A full disk or a crash destroys the last checkpoint while the next one is written.",
        "callbacks/run/checkpoints.py",
        "        with atomic_write(Path(path)) as file:\n",
        '        with Path(path).open("wb") as file:\n',
        ("test_run_folder.py::test_checkpoint_that_cannot_be_written_leaves_the_old_one",),
    ),
    Fault(
        "metrics_begin_anew",
        "c7e4991",
        "A resumed run overwrites metrics.csv, and the curves lose all that was before.",
        "callbacks/run/run_folder.py",
        "        if self.path.exists():\n",
        "        if False:\n",
        ("test_run_folder.py::test_metrics_go_on_behind_the_checkpoint",),
    ),
    Fault(
        "best_epoch_forgotten",
        "b3f5497",
        "A run whose folder was moved replaces its best checkpoint by a worse one.",
        "callbacks/run/checkpoints.py",
        "        if best.is_file():\n",
        '        if str(best) == state_dict["best_model_path"]:\n',
        ("test_run_folder.py::test_best_epoch_is_remembered_when_the_run_has_moved",),
    ),
    # Prediction and submission
    Fault(
        "leftover_predictions",
        "8b00b74",
        "After a killed prediction the next one fails: an id was predicted twice.",
        "pipeline/prediction.py",
        "[folder / _shard_name(number, rank) for rank in range(trainer.world_size)], names\n",
        'sorted(folder.glob(f"member{number}-rank*")), names\n',
        ("test_predict.py::test_what_a_killed_prediction_left_behind_is_not_read",),
    ),
    Fault(
        "sent_twice",
        "c7e4991",
        "The same file goes to Kaggle again, and one of the day's few submissions is gone.",
        "pipeline/kaggle/ledger.py",
        "    return same[-1] if same else None\n",
        "    return None\n",
        ("test_submit.py::test_same_bytes_are_sent_once",),
    ),
    # Data
    Fault(
        "pickle_runs_code",
        "c7e4991",
        "A pickled data set from a stranger runs any code it likes.",
        "datamodules/image_files/safe_pickle.py",
        "            return ArrayUnpickler(file, ",
        "            return pickle.Unpickler(file, ",
        ("test_cifar10.py::test_a_pickle_that_runs_code_is_refused_before_it_runs",),
    ),
    Fault(
        "split_by_seed",
        "c7e4991",
        "Another seed has other validation images, so seeds cannot be compared.",
        "datamodules/base.py",
        "order = torch.randperm(samples, generator=torch.Generator().manual_seed(0))",
        "order = torch.randperm(samples, generator=torch.Generator().manual_seed(self.seed))",
        ("test_cifar10.py::test_the_validation_images_are_the_same_for_every_seed",),
    ),
    # Metrics and schedules
    Fault(
        "metrics_share_counts",
        "ee92728",
        "If the first batch of a validation has no mistake, top 3 equals accuracy ever after.",
        "lit_models/classification.py",
        "MetricCollection(metrics, compute_groups=False)",
        "MetricCollection(metrics)",
        ("test_classification.py::test_metrics_that_agree_on_the_first_batch_stay_apart",),
    ),
    Fault(
        "one_rate_for_all",
        "8b00b74",
        "OneCycleLR gives biases the learning rate of the filters, and says nothing.",
        "lit_models/schedules.py",
        "    if own != rates and not recorded:\n",
        "    if False:\n",
        ("test_muon_sgd.py::test_a_schedule_that_knows_one_rate_alone_is_refused",),
    ),
    # Errors and studies
    Fault(
        "bugs_without_traceback",
        "c7e4991",
        "A bug of ours, such as a KeyError, is told as the user's mistake, without a traceback.",
        "core/errors.py",
        'return not names.isdisjoint({"UserError", "MisconfigurationException"})',
        'return "Exception" in names',
        ("test_run_folder.py::test_only_user_errors_are_told_in_a_sentence",),
    ),
    Fault(
        "settings_by_spelling",
        "d18976d",
        "A comment in a config makes a study take its finished runs for those of other settings.",
        "pipeline/studies/grid.py",
        "    contents = [read_yaml(path) for path in (DEFAULTS, *files)]\n",
        "    contents = [path.read_text() for path in (DEFAULTS, *files)]\n",
        ("test_grid.py::test_what_decides_a_run_is_in_its_record",),
    ),
)


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.planted_faults",
        description="Plant bugs that were mended, one at a time, and see which test catches each.",
        allow_abbrev=False,
    )
    names = [fault.name for fault in FAULTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--list", action="store_true", help="show the faults and plant none")
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time (default: 2)")
    options = parser.parse_args(args)
    faults = [fault for fault in FAULTS if fault.name in options.only]
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if options.list:
        for fault in faults:
            console.print(f"{fault.name} ({fault.file}, {fault.commit}): {fault.harm}")
        return
    with tempfile.TemporaryDirectory(prefix="planted_faults.") as folder:
        outcomes = plant_all(faults, Path(folder), options.jobs, console)
    console.print(table_of(outcomes))
    caught = sum(outcome.caught_by is not None for outcome in outcomes)
    console.print(f"{caught} of {len(outcomes)} caught")
    if caught < len(outcomes):
        raise SystemExit(1)


def plant_all(faults: Sequence[Fault], folder: Path, jobs: int, console: Console) -> list[Outcome]:
    """Plant the faults, each in a copy of its own below ``folder``."""
    whole = folder / "whole"
    copy_checkout(whole)
    for fault in faults:
        check_text(fault, whole)
    tests = list(dict.fromkeys(test for fault in faults for test in fault.tests))
    start = time.monotonic()
    status, output = run_tests(whole, tests)
    if status != 0:
        raise SystemExit(f"error: these tests must pass without a fault, and do not:\n{output}")
    console.print(f"Without a fault all tests pass ({time.monotonic() - start:.0f} s).")
    outcomes: dict[Fault, Outcome] = {}
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(plant, fault, whole, folder / fault.name) for fault in faults]
        try:
            for number, future in enumerate(as_completed(futures), start=1):
                outcome = future.result()
                outcomes[outcome.fault] = outcome
                console.print(
                    f"[{number}/{len(faults)}] {outcome.fault.name}: "
                    f"{'caught' if outcome.caught_by else 'NOT CAUGHT'} ({outcome.seconds:.0f} s)"
                )
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return [outcomes[fault] for fault in faults]


def copy_checkout(folder: Path) -> None:
    """Copy the checkout as it is now: the files that git knows, and new ones it does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # a file that was deleted is listed, too
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def check_text(fault: Fault, folder: Path) -> None:
    path = folder / fault.file
    times = path.read_text().count(fault.old) if path.is_file() else 0
    if times != 1:
        raise SystemExit(
            f"error: the old text of {fault.name} must occur once in {fault.file}, got {times} "
            "times; bring the fault up to date."
        )


def plant(fault: Fault, whole: Path, folder: Path) -> Outcome:
    """Run the tests of a fault in a copy of ``whole`` that has it."""
    start = time.monotonic()
    shutil.copytree(whole, folder)
    path = folder / fault.file
    path.write_text(path.read_text().replace(fault.old, fault.new))
    status, output = run_tests(folder, fault.tests)
    if status > TESTS_FAILED:
        raise SystemExit(f"error: with {fault.name} its tests cannot be run:\n{output}")
    failed = re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - .*)?$", output, re.MULTILINE)
    return Outcome(fault, failed[1] if failed else None, time.monotonic() - start)


def run_tests(folder: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Run tests in a copy of the checkout up to the first failure.

    Returns:
        Exit status of pytest and its output; -1 if it did not end in time.
    """
    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "", f"--basetemp={folder}.tests"]
    command = [sys.executable, "-m", "pytest", *options, *(f"tests/{test}" for test in tests)]
    # programs that a test starts must import the copy, too
    environment = os.environ | {"PYTHONPATH": str(folder)}
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return -1, f"no end within {TIMEOUT} seconds"
    return done.returncode, done.stdout


def table_of(outcomes: Sequence[Outcome]) -> str:
    rows = [
        f"| {o.fault.name} | {o.fault.file} | {o.caught_by or 'NONE'} | {o.seconds:.0f} |"
        for o in outcomes
    ]
    return "\n".join(
        ["| fault | file | test that caught it | seconds |", "| --- | --- | --- | ---: |", *rows]
    )


if __name__ == "__main__":
    main()
