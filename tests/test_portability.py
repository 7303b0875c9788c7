"""On other machines: without what Linux alone has, and on file systems without locks."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CONFIGS
from filelock import FileLock

from core.errors import UserError
from core.runs import Run

ROOT = CONFIGS.parent

# The libraries know Windows by themselves; this project's own modules see what Windows lacks.
WITHOUT_LINUX = """
import ctypes, os, sys
import filelock, lightning, psutil, wandb
sys.modules["fcntl"] = sys.modules["resource"] = sys.modules["pwd"] = None
for name in ("fchmod", "sched_getaffinity", "getuid", "sysconf"):
    delattr(os, name)
library = ctypes.CDLL
def load(name, *args, **kwargs):
    if name is None:
        raise TypeError("bad argument type for built-in operation")  # as Windows says it
    return library(name, *args, **kwargs)
ctypes.CDLL = load
"""

RUN = """
import predict, submit, train
train.main(["fit", "--config={config}", "--run=x", "--trainer.accelerator=cpu", *{small!r}])
train.main(["test", "--run=runs/demo/x"])
predict.main(["runs/demo/x", "--accelerator=cpu"])
submit.main(["runs/demo/x", "--dry_run"])
"""


@pytest.mark.slow
def test_train_predict_and_submit_do_without_linux(tmp_path: Path) -> None:
    """Every command died on Windows: of fcntl, of os.fchmod, of ctypes.CDLL(None)."""
    small = ["--trainer.max_epochs=1", "--data.val_size=40", "--trainer.limit_train_batches=2"]
    small += ["--model.lr_scheduler=null", "--trainer.callbacks+=GradientSpikeMonitor"]
    code = WITHOUT_LINUX + RUN.format(config=CONFIGS / "demo.yaml", small=small)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "All checks passed" in done.stdout


def test_where_files_cannot_be_locked_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS and Lustre ended in a traceback, and nothing was trained."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    run = Run.claim(tmp_path, "x")
    with pytest.warns(UserWarning, match="cannot be locked .*No locks available"), run.lock():
        pass


def test_a_lock_is_outside_the_run_and_keeps_a_second_program_out(tmp_path: Path) -> None:
    run = Run.claim(tmp_path, "x")
    with run.lock():
        assert list(run.folder.iterdir()) == []
        with pytest.raises(UserError, match="is being trained by another program"), run.lock():
            pass
    with run.lock():
        pass


def test_a_program_that_is_killed_lets_go(tmp_path: Path) -> None:
    run = Run.claim(tmp_path, "x")
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from core.runs import Run
from pathlib import Path
with Run(Path({str(run.folder)!r})).lock():
    print("locked", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(UserError), run.lock():
            pass
        holder.kill()
    with run.lock():
        pass


@pytest.mark.slow
def test_what_one_feature_alone_needs_may_be_missing(tmp_path: Path) -> None:
    """Kaggle's image has no py7zr, and every command ended in a traceback."""
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
sys.modules |= dict.fromkeys(("py7zr", "lemminflect", "tokenizers"))
from pathlib import Path
import datamodules
from core.errors import exit_on_user_error
from datamodules.image_files.named_images import unpack
from datamodules.text.english import lookup
from datamodules.text.subwords import Subwords
for use in (
    lambda: unpack(Path("train.7z"), Path("train")),
    lambda: lookup("house"),
    lambda: Subwords(""),
):
    try:
        with exit_on_user_error():
            use()
    except SystemExit as end:
        assert end.code == 1
"""
    (tmp_path / "train.7z").touch()
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 0, done.stderr
    assert said == [
        f"error: {what}, which is missing: pip install {package}"
        for what, package in (
            ("unpacking train.7z needs py7zr", "py7zr"),
            ("putting errors into sentences needs lemminflect", "lemminflect"),
            ("text needs tokenizers", "tokenizers"),
        )
    ]
    assert "Traceback" not in done.stderr
