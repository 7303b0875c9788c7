"""Predict a folder of PNGs as large as a Kaggle competition's, twice: time and memory.

    python -m benchmarks.predict_throughput [--images 300000] [--tta mirror_translate] [--quick]

A run is made by a short training, then ``predict.py`` runs as a process of its own on a temporary
folder in the shape of Kaggle's CIFAR-10. The first time it decodes the images, the second time it
maps what the first one kept. Input is the time in ``prepare_data`` and ``setup`` of the data,
network the rest of ``Trainer.predict``, total everything from the start of the process to its end.

Memory is that of the predicting process at its peak, as Linux tells it: all of it (``ru_maxrss``),
and of that what is its own (``RssAnon``, sampled); the rest is mapped from files and given back
when others need it.
"""

import argparse
import io
import json
import os
import platform
import resource
import runpy
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

HERE = Path(__file__).parent.parent
DATA = "KaggleCIFAR10DataModule"
LABELLED = 1000  # images to train on, which nobody measures
DISTINCT = 1000  # images drawn; the folder repeats them, for files are decoded one by one anyway
INTERVAL = 0.02  # seconds between two looks at the memory


class Measured(NamedTuple):
    """What one prediction cost: seconds, and bytes at the peak."""

    input: float
    network: float
    total: float
    memory: int
    own: int  # not mapped from files


def draw_pngs(count: int) -> list[bytes]:
    """Random images of 32 x 32 in patches, files of 2 to 3 kB like those of the competition."""
    random = np.random.default_rng(0)
    patches = random.integers(0, 248, (count, 8, 8, 3), dtype=np.uint8)
    images = patches.repeat(4, 1).repeat(4, 2) + random.integers(
        0, 8, (count, 32, 32, 3), dtype=np.uint8
    )
    files = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        files.append(file.getvalue())
    return files


def write_competition(folder: Path, images: int) -> None:
    """``train/``, ``test/`` and their tables, as the competition hands them out."""
    pngs = draw_pngs(DISTINCT)
    tables = {"train": ("trainLabels.csv", LABELLED), "test": ("sampleSubmission.csv", images)}
    for split, (table, count) in tables.items():
        (folder / split).mkdir(parents=True)
        title = f"Writing {split}/"
        for i in track(range(1, count + 1), title, console=Console(stderr=True)):
            (folder / split / f"{i}.png").write_bytes(pngs[i % DISTINCT])
        labels = ("cat", "dog") if split == "train" else ("cat",)
        rows = "".join(f"{i},{labels[i % len(labels)]}\n" for i in range(1, count + 1))
        (folder / table).write_text(f"id,label\n{rows}")


def train_run(config: str, root: Path) -> Path:
    """A run of one short epoch."""
    command = [
        *(sys.executable, "train.py", "fit", f"--config={config}", "--run=first"),
        *(f"--data={DATA}", f"--data.data_dir={root}", "--data.val_size=100"),
        *("--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.logger=false"),
        *("--trainer.accelerator=cpu", f"--trainer.default_root_dir={root / 'runs'}"),
    ]
    subprocess.run(command, cwd=HERE, check=True, stdout=subprocess.DEVNULL)
    return root / "runs" / Path(config).stem / "first"


def measure(arguments: list[str], report: Path) -> Measured:
    """Run predict.py in a process of its own and watch it."""
    command = [sys.executable, "-m", "benchmarks.predict_throughput", "--report", str(report)]
    start = time.perf_counter()
    process = subprocess.Popen([*command, "--", *arguments], cwd=HERE, stdout=subprocess.DEVNULL)
    own = 0
    while process.poll() is None:
        own = max(own, anonymous(process.pid))
        time.sleep(INTERVAL)
    total = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(process.returncode)
    return Measured(total=total, own=own, **json.loads(report.read_text()))


def anonymous(pid: int) -> int:
    """Resident bytes of a process that no file backs, 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(x.split()[1]) for x in lines if x.startswith("RssAnon:")), 0)


def predict_and_report(report: Path, arguments: list[str]) -> None:
    """What ``python predict.py ARGUMENTS`` does, with a clock at the data and at the trainer."""
    from lightning import Trainer  # not in the process that measures

    import datamodules

    seconds = {"prepare_data": 0.0, "setup": 0.0, "predict": 0.0}

    def clock(cls: type, name: str) -> None:
        function = getattr(cls, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            seconds[name] += time.perf_counter() - start
            return result

        setattr(cls, name, timed)

    clock(getattr(datamodules, DATA), "prepare_data")
    clock(getattr(datamodules, DATA), "setup")
    clock(Trainer, "predict")
    sys.argv = ["predict.py", *arguments]
    runpy.run_path(str(HERE / "predict.py"), run_name="__main__")
    reading = seconds["prepare_data"] + seconds["setup"]
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = {"input": reading, "network": seconds["predict"] - reading, "memory": peak}
    report.write_text(json.dumps(result))


def predict_twice(
    images: int, config: str, tta: str = "none", accelerator: str = "auto"
) -> list[Measured]:
    """Train a run of a config, and let it predict a new folder of so many images two times."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_competition(root / "kaggle-cifar10", images)
        run = train_run(config, root)
        arguments = [str(run), f"--tta={tta}", f"--accelerator={accelerator}"]
        return [measure(arguments, root / "report.json") for _ in range(2)]


def tabulate(runs: list[Measured], images: int) -> Table:
    table = Table("", "first run", "second run", title=f"{images:,} images")
    first = runs[0].input

    def row(name: str, cells: list[str]) -> None:
        table.add_row(name, *cells)

    row("input", [f"{run.input:.2f} s" for run in runs])
    row("input, of the first run's", [f"{run.input / first:.2%}" for run in runs])
    row("network", [f"{run.network:.2f} s" for run in runs])
    row("total", [f"{run.total:.2f} s" for run in runs])
    row("images / s, of the network", [f"{images / run.network:,.0f}" for run in runs])
    row("images / s, in total", [f"{images / run.total:,.0f}" for run in runs])
    row("peak memory", [f"{run.memory / 1e6:,.0f} MB" for run in runs])
    row("of it not mapped from files", [f"{run.own / 1e6:,.0f} MB" for run in runs])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--config", default="configs/cifar10_lenet.yaml", help="of the run")
    parser.add_argument("--tta", default="none", help="as predict.py takes it")
    parser.add_argument("--accelerator", default="auto", help="what predict.py runs on")
    parser.add_argument("--quick", action="store_true", help="3,000 images")
    options = parser.parse_args()
    images = 3000 if options.quick else options.images
    runs = predict_twice(images, options.config, options.tta, options.accelerator)
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning"))
    print(f"Python {platform.python_version()}, {libraries}, {os.cpu_count()} cores")
    print(
        f"{Path(options.config).stem}, tta {options.tta}, {images * 3072 / 1e6:,.0f} MB of pixels"
    )
    Console().print(tabulate(runs, images))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--report"]:
        predict_and_report(Path(sys.argv[2]), sys.argv[4:])
    else:
        main()
