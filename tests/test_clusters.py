"""The recipes in docs/clusters, and runs on two hosts or in a job of SLURM."""

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from conftest import CONFIGS, SMALL
from processes import by_two, start_command, wait

RECIPES = Path(__file__).parents[1] / "docs" / "clusters"
ADDRESSES = {"a": "10.25.0.1", "b": "10.25.0.2"}
# what a machine without a GPU and a miniature of the data need
HERE = [*(flag for flag in SMALL if not flag.startswith("--model")), "--trainer.max_epochs=1"]
HERE += [
    "--model.network.width=8",
    "--trainer.benchmark=false",
    "--data.batch_size=8",
    "--trainer.limit_train_batches=3",
]

# A job of one task that gets SLURM's warning at the 5th and the 12th step of its run.
WARNED = """
import os, signal
from callbacks import RunRecord
def warn(self, trainer, *args):
    if trainer.global_step in (5, 12):
        os.kill(os.getpid(), signal.SIGUSR1)
RunRecord.on_train_batch_start = warn
"""

# Each process is in a network namespace of its own.
APART = """
import ctypes, os, subprocess
import core.hosts
from callbacks import RunRecord
name = {names}[int(os.environ["RANK"])]
with open(f"/run/netns/{{name}}") as file:
    assert ctypes.CDLL(None).setns(file.fileno(), 0x40000000) == 0  # CLONE_NEWNET
os.environ.update(MASTER_ADDR="{address}", GLOO_SOCKET_IFNAME=name)
core.hosts.PATIENCE = 3.0
"""
# At the 5th step of the second epoch the link of the second host goes down.
LOST = """
def lose(self, trainer, *args):
    if trainer.global_rank == 1 and trainer.global_step == 15:
        subprocess.run(["ip", "link", "set", name, "down"], check=True)
RunRecord.on_train_batch_start = lose
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import fake_data

    root = tmp_path_factory.mktemp("data")
    fake_data.write_cifar10(root, batch=40)
    return root


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Put a program into the path that writes down what it is called with, a call a line."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

    def make(name: str) -> Path:
        calls = tmp_path / f"{name}.txt"
        script = folder / name
        script.write_text(
            f"#!{sys.executable}\nimport json, sys\n"
            f"print(json.dumps(sys.argv[1:]), file=open({str(calls)!r}, 'a'))\n"
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        return calls

    return make


def typed(calls: Path) -> tuple[list[str], list[str]]:
    """The launcher's arguments in its only call, and those of train.py."""
    (call,) = map(json.loads, calls.read_text().splitlines())
    at = call.index("train.py")
    return call[:at], call[at + 1 :]


def run(command: list[str], place: Path, **variables: str) -> None:
    """Run a recipe as in a clone that has a virtual environment."""
    activate = place / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True, exist_ok=True)
    activate.touch()
    subprocess.run(command, cwd=place, env=os.environ | variables, check=True)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def namespaces(names: dict[str, str]) -> Iterator[None]:
    """Two network namespaces that see each other; the names of those of hosts ``a`` and ``b``."""
    left, right = names.values()
    try:
        for name in names.values():
            ip("netns", "add", name)
        ip("link", "add", left, "netns", left, "type", "veth", "peer", right, "netns", right)
        for host, name in names.items():
            ip("-n", name, "address", "add", f"{ADDRESSES[host]}/24", "dev", name)
            for device in ("lo", name):
                ip("-n", name, "link", "set", device, "up")
        yield
    finally:
        for name in names.values():
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def test_recipes_are_short() -> None:
    assert {path.name for path in RECIPES.iterdir()} == {"slurm.sbatch", "sky.yaml", "torchrun.sh"}
    for path in RECIPES.iterdir():
        assert len(path.read_text().splitlines()) <= 20


@pytest.mark.slow
def test_torchrun_on_two_hosts(program: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    """With folders of their own the first fit works; the next one refuses, and does not hang."""
    calls = program("torchrun")
    run(["bash", str(RECIPES / "torchrun.sh"), "10.0.0.1", "mine"], tmp_path, DATA=str(data))
    launcher, args = typed(calls)
    assert {"--nnodes=2", "--rdzv-endpoint=10.0.0.1:29400", "--rdzv-id=mine"} <= set(launcher)
    first, second = tmp_path / "first", tmp_path / "second"
    for host in (first, second):
        host.mkdir()
        (host / "configs").symlink_to(CONFIGS)
    args = [*args, *HERE, "--test=true"]
    assert by_two("train", args, first, second) == 0, said(first)
    folder = Path("runs", "cifar10_resnet9", "mine")
    assert not (second / folder).exists()
    assert "sync_dist" not in said(first)
    assert by_two("train", args, first, second) == 1
    missing = second / folder / "checkpoints" / "last.ckpt"
    for host in (first, second):
        assert f"has no {missing}, unlike" in said(host)
    assert by_two("train", ["test", f"--run={folder}", *args[-1:0]], first, second) == 1
    assert f"{folder} is not a run folder" in said(first)
    shutil.copytree(first / folder, second / folder)
    assert by_two("train", args, first, second) == 0
    assert "was already finished after 3 steps" in said(first)


@pytest.mark.slow
def test_a_lost_link_ends_both_hosts(data: Path, tmp_path: Path) -> None:
    """Both hung for half an hour, and neither said a word."""
    names = {"a": f"sf{os.getpid()}a", "b": f"sf{os.getpid()}b"}
    apart = APART.format(names=[*names.values()], address=ADDRESSES["a"])
    config = CONFIGS / "cifar10_cpu.yaml"
    args = ["fit", f"--config={config}", *SMALL, f"--data.data_dir={data}", "--run=mine"]
    args += ["--data.batch_size=8", "--trainer.max_epochs=2", "--trainer.limit_train_batches=10"]
    args += ["--trainer.num_nodes=2", "--trainer.strategy=DDPStrategy"]
    args += ["--trainer.strategy.timeout=0:0:10", f"--trainer.default_root_dir={tmp_path / 'runs'}"]
    first, second = tmp_path / "first", tmp_path / "second"
    for host in (first, second):
        host.mkdir()
    with ExitStack() as stack:
        try:
            stack.enter_context(namespaces(names))
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces can be made here: {error}")
        assert by_two("train", args, first, second, apart + LOST) == 1
        here = socket.gethostname()
        for host, lost in ((first, 1), (second, 0)):
            assert f"error: rank {lost} on {here} does not answer" in said(host)
        subprocess.run(["ip", "-n", names["b"], "link", "set", names["b"], "up"], check=True)
        assert by_two("train", args, first, second, apart) == 0, said(first)
    last = tmp_path / "runs" / "cifar10_cpu" / "mine" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 20


def said(host: Path) -> str:
    return (host / "output.txt").read_text()


def test_sky(program: Callable[[str], Path], tmp_path: Path) -> None:
    calls = program("torchrun")
    task = yaml.safe_load((RECIPES / "sky.yaml").read_text())
    variables = {
        "SKYPILOT_NUM_NODES": str(task["num_nodes"]),
        "SKYPILOT_NUM_GPUS_PER_NODE": "4",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_TASK_ID": "sky-managed-2026-01-01-00-00-00-000000_cifar_1-0",
    }
    run(["bash", "-c", task["run"]], tmp_path, **variables)
    launcher, args = typed(calls)
    expected = ["--nnodes=2", "--nproc-per-node=4", "--node-rank=1", "--master-addr=10.0.0.1", "--"]
    assert launcher == expected
    assert {"--trainer.num_nodes=2", f"--run={variables['SKYPILOT_TASK_ID']}"} <= set(args)
    assert list(task["file_mounts"]) == ["/shared"]


@pytest.mark.slow
def test_slurm_requeues_at_the_exact_step(
    program: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    """Twice; without ``--run`` it began anew, and with it at the last epoch."""
    calls, scontrol = program("srun"), program("scontrol")
    job = {"SLURM_JOB_ID": "4711", "SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "1"}
    run(["bash", str(RECIPES / "slurm.sbatch")], tmp_path, DATA=str(data), **job)
    launcher, args = typed(calls)
    assert launcher == ["python"]
    args = [*args, *HERE, "--trainer.max_epochs=2", "--trainer.limit_train_batches=10"]
    args += ["--trainer.log_every_n_steps=1"]  # spikes are counted where rows are written
    args = [arg for arg in args if not arg.startswith("--trainer.strategy")]
    task = dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"), "0")
    task |= job | {"SLURM_NTASKS": "1", "PATH": os.environ["PATH"]}

    def start(place: Path, before: str) -> tuple[int, dict[str, object]]:
        place.mkdir(exist_ok=True)
        if not (place / "configs").exists():
            (place / "configs").symlink_to(CONFIGS)
        status = wait(start_command("train", args, place, before, task))
        (checkpoint,) = place.glob("runs/cifar10_resnet9/slurm-4711/checkpoints/last.ckpt")
        return status, torch.load(checkpoint, weights_only=True)

    broken, whole = tmp_path / "broken", tmp_path / "whole"
    stops = [start(broken, WARNED) for _ in range(2)]
    assert [(status, held["global_step"]) for status, held in stops] == [(143, 6), (143, 13)]
    requeues = [json.loads(line) for line in scontrol.read_text().splitlines()]
    assert requeues == [["requeue", "4711"]] * 2
    for status, held in (start(broken, WARNED), start(whole, "")):
        assert (status, held["global_step"]) == (0, 20)
    a, b = (place / "runs/cifar10_resnet9/slurm-4711" for place in (broken, whole))
    assert (a / "metrics.csv").read_bytes() == (b / "metrics.csv").read_bytes()
    states = [torch.load(x / "checkpoints" / "last.ckpt", weights_only=True) for x in (a, b)]
    one, other = (state["state_dict"] for state in states)
    assert all(torch.equal(one[name], other[name]) for name in one)
