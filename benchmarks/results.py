"""Published numbers, of which every finished run is a line of a record:

    python -m benchmarks.results configs/studies/NAME.yaml --data.data_dir=data
    python -m benchmarks.results --minutes 60 --write

Runs the points of a study that ``records/NAME.jsonl`` has no line of, one at a time. A line holds
the last value of each metric that is no step's, the number of test samples, the point with a digest
of its settings, seconds and CPU seconds, commit, versions, hardware. Then ``study.py report`` tells
the record, as if the folders of its runs were still there. What was run with settings that the
study no longer has is missing.

Without a study it is ``results.yaml``, that of the README, with a simple baseline of the same data
in the same record. ``--write`` puts what both say into the README's table of tasks; a row that has
no line in the record stays as it is.
"""

import argparse
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.recorded import RECORDS, Line, RunRecord, origin
from core.files import atomic_write
from datamodules import CIFAR10DataModule, DemoDataModule, MNISTDataModule
from datamodules.base import BaseDataModule
from pipeline.loading import LoadedRun
from pipeline.studies import runner
from pipeline.studies.grid import Point, PointRecord, Study
from pipeline.studies.metrics import last_value, read_metrics

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "configs" / "studies" / "results.yaml"
IMAGES = {
    "demo": DemoDataModule,
    "cifar10_lenet": CIFAR10DataModule,
    "mnist_lenet": MNISTDataModule,
}  # the first task of each set
OF_NO_METRIC = ("test_samples", "cpu_seconds")


class Results:
    """A study, its record, and a folder for its runs.

    Args:
        path: The study.
        flags: Settings for every run.
        scratch: The folder.
    """

    def __init__(self, path: Path, flags: list[str], scratch: Path) -> None:
        self.study = Study.load(path)
        self.record = RunRecord(RECORDS / f"{path.stem}.jsonl")
        self.flags = [*flags, f"--trainer.default_root_dir={scratch}"]
        self.jobs = [runner.Job.of(self.study, p, self.flags) for p in self.study.points]

    def complete(self, where: Point, minutes: float | None) -> int:
        """Run what is missing at points with these values, see :meth:`RunRecord.complete`."""
        jobs = {j.name: j for j in self.jobs if where.items() <= j.point.items()}
        runs = [job.record for job in jobs.values()]

        def run(record: dict[str, Any]) -> dict[str, Any]:
            return self.run(jobs[self.study.name_of(record["point"])])

        return self.record.complete(runs, run, minutes)

    def run(self, job: runner.Job) -> dict[str, Any]:
        """Run one point, and return what its line says."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        runner.run(self.study, 1, self.flags, job.point)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        metrics = read_metrics(job.run.folder)
        names = [n for n in metrics.columns if not n.startswith(("train/", "grad_norm/"))]
        values = {name: last_value(job.run.folder, name) for name in names}
        found: dict[str, Any] = {"step": int(metrics.index[-1])}
        found |= {name: value for name, value in values.items() if value is not None}
        data = LoadedRun.load(str(job.run.folder), "best", []).data
        data.setup("test")
        found["test_samples"] = len(data.splits["test"][-1])
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return found | {"cpu_seconds": round(cpu, 1)}

    def lines(self) -> Iterator[tuple[runner.Job, Line]]:
        """The points that the record has a line of."""
        for job in self.jobs:
            if line := self.record.find(job.record):
                yield job, line

    def lay_out(self) -> None:
        """Make of each line what ``study.py report`` reads of a run."""
        for job, line in self.lines():
            values = {k: v for k, v in line["measures"].items() if k not in OF_NO_METRIC}
            job.run.folder.mkdir(parents=True, exist_ok=True)
            texts = [f"{value:.9g}" for value in values.values()]
            (job.run.folder / "metrics.csv").write_text(f"{','.join(values)}\n{','.join(texts)}\n")
            PointRecord(job.run.folder).write(line["run"], finished=True)


def told(lines: list[Line]) -> str:
    """Mean and standard deviation of the test accuracy, with the seeds and the standard error."""
    accuracies = [100 * line["measures"]["test/accuracy"] for line in lines]
    samples, mean = lines[0]["measures"]["test_samples"], float(np.mean(accuracies))
    error = np.sqrt(mean * (100 - mean) / samples)
    spread = f" ± {np.std(accuracies, ddof=1):.2f}" if len(lines) > 1 else ""
    seeds = sorted(line["run"]["point"]["seed_everything"] for line in lines)
    of = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    return f"{mean:.2f}{spread} % ({of}; {samples:,} test samples, standard error {error:.2f})"


def table_of(text: str, results: Results) -> str:
    """The README with the result and the time of each task as the record has them."""
    by_task: dict[str, list[Line]] = {}
    for job, line in results.lines():
        by_task.setdefault(job.point["task"], []).append(line)
    for task, lines in by_task.items():
        result = told(lines)
        if baseline := results.record.find({"baseline": "SVM", "task": task}):
            accuracy = 100 * baseline["measures"]["test/accuracy"]
            result += f"; an SVM on 60 principal components: {accuracy:.1f} %"
        seconds = np.median([line["measures"]["cpu_seconds"] for line in lines])
        row = rf"(\| `{task}\.yaml` \|[^|\n]*\|)[^|\n]*\|[^|\n]*\|"
        text = re.sub(row, lambda row: f"{row[1]} {result} | {seconds:.0f} CPU s |", text)  # noqa: B023
    return text


def svm_baseline(data: BaseDataModule) -> float:
    """Test accuracy (fraction) of a support vector machine on the same pixels.

    With Gaussian kernels, on 60 principal components of the training part; of a few thousand small
    images it takes seconds, of 50,000 minutes.
    """
    from sklearn.decomposition import PCA  # seconds of imports
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    ((images, targets, _), _), (test_images, test_targets) = data.read_parts(), data.read_test()
    inputs, test_inputs = (x.flatten(1).numpy() / np.float32(255) for x in (images, test_images))
    model = make_pipeline(PCA(60, random_state=0), StandardScaler(), SVC(C=10, gamma=0.01))
    return float(model.fit(inputs, targets).score(test_inputs, test_targets))


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", nargs="?", type=Path, default=RESULTS.relative_to(ROOT))
    parser.add_argument("--where", nargs="+", default=[], metavar="PARAMETER=VALUE")
    parser.add_argument("--minutes", type=float, help="begin nothing that would end later")
    parser.add_argument("--write", action="store_true", help="put it into the README")
    parser.add_argument("--report", default="", help='options of study.py report: "--x step"')
    parser.add_argument("--data.data_dir", dest="data_dir", default="data")
    options, flags = parser.parse_known_args(args)
    flags.append(f"--data.data_dir={options.data_dir}")
    with tempfile.TemporaryDirectory() as scratch:
        results = Results(options.study, flags, Path(scratch))
        where = results.study.where(options.where)
        print(f"{results.complete(where, options.minutes)} runs are left")
        if options.study.resolve() == RESULTS:
            tasks = [task for task in IMAGES if where.get("task", task) == task]
            settings = [{"baseline": "SVM", "task": task} for task in tasks]

            def train(setting: dict[str, str]) -> dict[str, float]:
                data = IMAGES[setting["task"]](data_dir=options.data_dir)
                return {"test/accuracy": svm_baseline(data)}

            results.record.complete(settings, train, options.minutes)
        results.lay_out()
        report = ["report", str(options.study), "--root", scratch, *options.report.split()]
        subprocess.run([sys.executable, "study.py", *report], check=True)
        lines = [line for _, line in results.lines()]
        print(RunRecord.origins(lines), flush=True)
        for name in ("torch", "lightning"):
            if other := {line[name] for line in lines} - {origin()[name]}:
                print(f"Here is {name} {origin()[name]}; lines above are of {', '.join(other)}.")
        if options.write:
            readme = ROOT / "README.md"
            with atomic_write(readme, "w") as file:
                file.write(table_of(readme.read_text(), results))


if __name__ == "__main__":
    main()
