"""Processes of their own, forked from one that has imported what they need.

To import PyTorch and Lightning takes longer than most of what a test lets them do.
"""

import atexit
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from kaggle_server import KEY, USERNAME

# not wandb, whose folder for media is one for all who import it together
PRELOADED = ["kaggle", "pipeline.cli", "pipeline.prediction", "kaggle_process"]
SECONDS = 300  # a busy machine takes long


def start(target: Callable[..., None], *args: object) -> BaseProcess:
    """Call a function of a module in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, __name__])
    settings = {  # the client reads its own when imported; Python 3.11 forgets where modules are
        "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
        "KAGGLE_USERNAME": USERNAME,
        "KAGGLE_KEY": KEY,
        "KAGGLE_CONFIG_DIR": tempfile.gettempdir(),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        process = context.Process(target=target, args=args)
        process.start()
    return process


def start_command(
    script: str,
    args: Sequence[object],
    folder: Path,
    program: str = "",
    environment: Mapping[str, object] | None = None,
) -> BaseProcess:
    """Start ``train.py`` or ``predict.py`` in a folder, where ``output.txt`` gets what it says.

    Args:
        script: Its name, without the ending.
        args: What is typed.
        folder: Where.
        program: What is done before, in Python.
        environment: Variables that it has besides.
    """
    typed, added = [str(arg) for arg in args], dict(environment or {})
    return start(command, script, typed, folder.resolve(), program, added)


def by_two(
    script: str,
    args: Sequence[object],
    folder: Path,
    other: Path | None = None,
    program: str = "",
) -> int:
    """Run a command in two processes, as torchrun does, and give its exit status: 0 is of both.

    Args:
        script: Its name, without the ending.
        args: What is typed.
        folder: Where.
        other: The folder of the second process, which is on another host then.
        program: What each does before, in Python.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    hosts = 1 if other is None else 2
    both = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": 2}
    both |= {"LOCAL_WORLD_SIZE": 2 // hosts, "TORCHELASTIC_RUN_ID": "x"}
    typed = [str(arg) for arg in args]
    started = []
    for rank, place in enumerate((folder, other or folder)):
        at = {"GROUP_RANK": 0, "LOCAL_RANK": rank} if hosts == 1 else {"GROUP_RANK": rank}
        ranked = both | {"LOCAL_RANK": 0, "RANK": rank} | at
        started.append(start(command, script, typed, place.resolve(), program, ranked))
    return max((wait(process) for process in started), key=abs)


def wait(process: BaseProcess) -> int:
    """Exit status of a process, once it ends."""
    process.join(SECONDS)
    assert process.exitcode is not None, "it has not ended"
    return process.exitcode


def command(
    script: str, args: list[str], folder: Path, program: str, environment: dict[str, object]
) -> None:
    """Be one start of a command."""
    os.chdir(folder)
    with open("output.txt", "ab") as output:
        for number in (1, 2):
            os.dup2(output.fileno(), number)
    for name in [name for name in os.environ if name.startswith(("KAGGLE_", "WANDB_"))]:
        del os.environ[name]
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.environ["HOME"] = str(folder)
    core = {min(os.sched_getaffinity(0))}
    os.sched_getaffinity = lambda pid: core  # predict.py takes as many threads as there are cores
    set_rank(int(os.environ.get("RANK", 0)))
    module = import_module(script)
    sys.argv = [str(module.__file__), *args]
    try:
        exec(program, {})
        module.main(args)
    finally:
        atexit._run_exitfuncs()  # W&B ends its run there; multiprocessing leaves it out


def set_rank(rank: int) -> None:
    """What Lightning reads when it is imported."""
    from lightning.pytorch.utilities import rank_zero_only

    rank_zero_only.rank = rank  # type: ignore[attr-defined]
