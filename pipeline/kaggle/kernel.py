"""The script that runs on Kaggle, in the unpacked code; our libraries come by :func:`install`.

``input/``, beside the folder in which Kaggle starts it, holds what is mounted. What it leaves in
its folder is Kaggle's output: the run, packed, and a record of it.
"""

import json
import shutil
import subprocess
import sys
import time
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.files import sha256
from core.kaggle_client import unzip

OUTPUT, RECORD = "run.pack", "run.json"  # a zip; Kaggle may unpack what is called so
KEPT = ("torch", "torchvision", "numpy")  # as the image has them, made for its driver
GRACE = 300.0  # seconds in which a training keeps what it has, after SIGTERM
CODE = Path(__file__).absolute().parents[2]
INPUT = Path.cwd().parent / "input"


def main(job: dict[str, Any]) -> None:
    """Train, and predict where there is something to hand in.

    It ends well whatever train.py does: of a script that fails, the output may not be kept.

    Args:
        job: ``args`` of train.py; ``run``, the config's and the run's name; the source that is
            ``data_dir`` (``data``; ``.`` for all, empty for none), of ``wheels``, of a ``former``
            output; whether to ``predict``; ``seconds`` for training, and until all has to end; and
            the time of this ``start``.
    """
    train_end, end = (time.monotonic() + seconds for seconds in job["seconds"])
    run = CODE / "runs" / job["run"]
    if job["former"]:
        read_output(mounted(job["former"]), run)
    install(job["wheels"])
    args = [*job["args"], f"--trainer.default_root_dir={CODE / 'runs'}"]
    if job["data"]:
        folder = INPUT if job["data"] == "." else mounted(job["data"])
        args.append(f"--data.data_dir={folder}")
    status = call(["train.py", *args], train_end)
    if job["predict"] and status == 0 and call(["predict.py", str(run)], end - 2 * GRACE) == 0:
        made = run / "submission.json"
        record = json.loads(made.read_text())
        record["sample"] = shutil.copy(record["sample"], run)  # submit.py compares with it
        made.write_text(json.dumps(record, indent=2) + "\n")
    with zipfile.ZipFile(OUTPUT, "w") as archive:
        for path in filter(Path.is_file, sorted(run.rglob("*"))):
            archive.write(path, path.relative_to(run))
    left = {"status": status, "sha256": sha256(Path(OUTPUT)), "folder": str(run)}
    Path(RECORD).write_text(json.dumps(left | {"start": job["start"]}))


def mounted(source: str) -> Path:
    """Folder of a source, OWNER/NAME: ``input/NAME`` or, newer, ``input/KIND/OWNER/NAME``."""
    name = source.rpartition("/")[2]
    found = [path for pattern in (name, f"*/{name}", f"*/*/{name}") for path in INPUT.glob(pattern)]
    if not found:
        raise UserError(f"{source} is not mounted in {INPUT}.")
    return found[0]


def install(wheels: str) -> None:
    """Let pip install what the image lacks, from the network or from mounted wheels."""
    pins = CODE / "pins.txt"
    pins.write_text("".join(f"{name}=={version(name)}\n" for name in KEPT))
    source = ["--no-index", f"--find-links={mounted(wheels)}"] if wheels else []
    command = ["-m", "pip", "install", *source, "-r", "requirements.txt", "-c", str(pins)]
    done = subprocess.run([sys.executable, *command], cwd=CODE, stdout=subprocess.PIPE, text=True)
    print(*(x for x in done.stdout.splitlines() if x.startswith("Successfully")), flush=True)
    done.check_returncode()  # pip has said why


def call(command: list[str], end: float) -> int:
    """Run a program, end it by SIGTERM when its time is up, and return its exit status."""
    process = subprocess.Popen([sys.executable, *command], cwd=CODE)
    for send_signal, seconds in (
        (process.terminate, end - time.monotonic()),
        (process.kill, GRACE),
    ):
        try:
            return process.wait(max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            send_signal()
    return process.wait()


def read_output(folder: Path, run: Path) -> dict[str, Any]:
    """Unpack what :func:`main` left in ``folder`` into ``run``; returns the record beside it.

    Raises:
        UserError: It is not what was left, or would be written elsewhere.
    """
    try:
        record = json.loads((folder / RECORD).read_text())
        whole = sha256(folder / OUTPUT) == record["sha256"]
        kinds = {"folder": str, "start": float, "status": int}
        if whole and all(type(record[name]) is kind for name, kind in kinds.items()):
            unzip(folder / OUTPUT, run)
            return dict(record)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        pass
    raise UserError("what the run has left at Kaggle is not whole; run the same command again.")
