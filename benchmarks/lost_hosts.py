"""Two hosts on one machine, each in a network namespace with a folder of its own; one is lost.

    sudo python -m benchmarks.lost_hosts --losses 10

Both hosts train one run by torchrun. At a random step the link of one goes down, its process is
stopped, or all its processes are killed, in turn. What is printed: the seconds until the process on
the other host has ended, and what that said; then what the run went on by, and to which step. The
link comes back after that; a killed host needs its command again.
Linux alone; needs root, ``ip netns`` and data in the layout of CIFAR-10.
"""

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

TRAIN = Path(__file__).parents[1] / "train.py"
ADDRESSES = {"a": "10.25.0.1", "b": "10.25.0.2"}
KINDS = ("link", "stop", "kill")
SMALL = [
    "--model.network.widths=[8,8,8]",
    *("--data.verify=false", "--data.val_size=40", "--data.batch_size=8"),
    *("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.precision=32-true"),
    *("--trainer.num_nodes=2", "--trainer.strategy=ddp", "--trainer.max_epochs=6"),
    *("--trainer.log_every_n_steps=5", "--trainer.enable_progress_bar=false"),
]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def namespaces(names: dict[str, str]) -> Iterator[None]:
    """Two network namespaces, ``{prefix}a`` and ``{prefix}b``, that see each other."""
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


class Host:
    """A host: a namespace, a folder, and the command that runs there."""

    def __init__(self, name: str, namespace: str, folder: Path) -> None:
        self.name, self.namespace, self.folder = name, namespace, folder
        self.output = folder / "output.txt"
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, args: list[str], rendezvous: list[str]) -> None:
        launcher = [sys.executable, "-m", "torch.distributed.run", *rendezvous]
        launcher += ["--nnodes=2", "--nproc-per-node=1", f"--local-addr={ADDRESSES[self.name]}"]
        environment = os.environ | {
            "GLOO_SOCKET_IFNAME": self.namespace,
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "WANDB_MODE": "disabled",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        names = self.folder / "hosts"  # a name of its own, which each knows of the other
        known = [f"{address} {name}" for name, address in ADDRESSES.items()]
        names.write_text("\n".join(["127.0.0.1 localhost", *known, ""]))
        setting = f'hostname {self.name}; mount --bind "{names}" /etc/hosts; exec "$@"'
        inside = ["unshare", "--uts", "--mount", "sh", "-c", setting, "sh"]
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, *inside, *launcher, "--", str(TRAIN), *args],
            cwd=self.folder,
            env=environment,
            stdout=self.output.open("ab"),
            stderr=subprocess.STDOUT,
        )

    def workers(self) -> list[int]:
        """The processes that train."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=False
        )
        return [pid for pid in map(int, listed.stdout.split()) if is_worker(pid)]

    def link(self, state: str) -> None:
        ip("-n", self.namespace, "link", "set", self.namespace, state)

    def said(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""


def is_worker(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return str(TRAIN).encode() in words and b"torch.distributed.run" not in words


def lose(host: Host, kind: str) -> None:
    if kind == "link":
        host.link("down")
    elif kind == "stop":
        for pid in host.workers():
            os.kill(pid, signal.SIGSTOP)
    else:
        host.process.kill()
        for pid in host.workers():
            os.kill(pid, signal.SIGKILL)


def wait_for(condition: object, seconds: float) -> float:
    """Seconds until a condition holds."""
    assert callable(condition)
    begin = time.monotonic()
    while not condition():
        if time.monotonic() - begin > seconds:
            raise TimeoutError(f"not within {seconds} seconds")
        time.sleep(0.1)
    return time.monotonic() - begin


def torchrun(port: int) -> list[str]:
    """Restart processes up to twice, and wait ten minutes for a link that is down."""
    meet = ["--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES['a']}:{port}", "--rdzv-id=1"]
    return [*meet, "--max-restarts=2", "--rdzv-conf=read_timeout=600"]


def finished(hosts: list[Host]) -> bool:
    return all(host.process.poll() is not None for host in hosts)


def end_all(hosts: list[Host]) -> None:
    for host in hosts:
        host.process.kill()
        for pid in host.workers():
            os.kill(pid, signal.SIGKILL)
        host.process.wait()


def one_loss(number: int, hosts: list[Host], args: list[str], folder: Path) -> None:
    """Lose one host, and print what came of it."""
    kind, lost = KINDS[number % len(KINDS)], hosts[1 - number % 2]
    left = next(host for host in hosts if host is not lost)
    run = folder / "runs" / "cifar10_cpu" / f"loss{number}"
    args = [*args, f"--run=loss{number}"]
    for host in hosts:
        host.output.unlink(missing_ok=True)
        host.start(args, torchrun(29500 + number))
    wait_for((run / "checkpoints" / "last.ckpt").exists, 120)
    time.sleep(random.uniform(0, 5))
    step = last_step(run)
    (alone,) = left.workers()
    lose(lost, kind)
    took = wait_for(lambda: alone not in left.workers(), 300)
    said = re.findall(r"^error: (.*)", left.said(), re.M)
    by = "--max-restarts"
    if kind == "link":
        lost.link("up")
    elif kind == "kill":
        by = f"the command on {lost.name}"
        lost.start(args, torchrun(29500 + number))
    try:
        wait_for(lambda: finished(hosts), 150)
    except TimeoutError:
        end_all(hosts)
    if any(host.process.returncode for host in hosts):
        by = "the command on both"
        for host in hosts:
            host.start(args, torchrun(29600 + number))
        wait_for(lambda: finished(hosts), 150)
    statuses = [host.process.returncode for host in hosts]
    print(f"{number + 1:2} {kind:4} of {lost.name} after step {step}:", end=" ")
    print(f"{left.name} ended after {took:.1f} s; on by {by} to step {last_step(run)}", end=" ")
    print(f"(exit {statuses})\n   {said[-1] if said else left.said()[-300:]}", flush=True)


def last_step(run: Path) -> int:
    """Optimizer steps in the checkpoint that a run goes on from."""
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return int(checkpoint["global_step"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--losses", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--data_dir", type=Path, default=Path("data"))
    parser.add_argument("--folder", type=Path, default=Path("lost_hosts"))
    parser.add_argument("--timeout", type=int, help="seconds; by default that of train.py")
    options = parser.parse_args()
    random.seed(options.first)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and take the namespaces away
    shutil.rmtree(options.folder, ignore_errors=True)
    names = {host: f"sf{os.getpid() % 10000}{host}" for host in ADDRESSES}
    shared = options.folder.resolve() / "shared"
    config = TRAIN.parent / "configs" / "cifar10_cpu.yaml"
    args = ["fit", f"--config={config}", f"--data.data_dir={options.data_dir.resolve()}", *SMALL]
    args += [f"--trainer.default_root_dir={shared / 'runs'}"]
    if options.timeout:
        strategy = "lightning.pytorch.strategies.DDPStrategy"
        args += [
            f"--trainer.strategy={strategy}",
            f"--trainer.strategy.timeout=0:0:{options.timeout}",
        ]
    with namespaces(names):
        hosts = [Host(name, names[name], options.folder.resolve() / name) for name in ADDRESSES]
        try:
            for number in range(options.first, options.first + options.losses):
                one_loss(number, hosts, args, shared)
        finally:
            end_all([host for host in hosts if hasattr(host, "process")])


if __name__ == "__main__":
    main()
