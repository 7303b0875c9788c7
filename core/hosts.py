"""Processes on several hosts: what they agree on before they train, and which of them was lost."""

import json
import os
import socket
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any, Self

from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from torch.distributed import DistError, PrefixStore, Store, rendezvous

from core.errors import UserError
from core.files import sha256

TIMEOUT = timedelta(minutes=2)  # of each exchange of the processes, unless a strategy says another
_LOSS = ("gloo", "pair closure", "Connection closed", "Connection reset")  # in errors of torch
PATIENCE = 10.0  # seconds in which those that are left report a loss


class Hosts:
    """The processes that torchrun or SLURM has started, here and on other hosts.

    They meet where their process group will meet, before anything is read: there the first one
    says what is trained, and each says to the others why it cannot. A process that was started in
    any other way is on its own here.

    Attributes:
        leads: This process decides, or is on its own.
    """

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self.store: Store | None = None
        self.host = socket.gethostname()
        self.names: list[str] = []  # the host of each rank, once they have agreed

    def __enter__(self) -> Self:
        kinds = (TorchElasticEnvironment, SLURMEnvironment)  # in the order of the Trainer
        environment = next((kind() for kind in kinds if kind.detect()), None)
        if environment is None or environment.world_size() == 1:
            return self
        _refuse_restarts()
        self.rank, self.size = environment.global_rank(), environment.world_size()
        address = f"{environment.main_address}:{environment.main_port}"
        try:  # the environment's two properties have set what env:// reads
            meeting = rendezvous("env://", self.rank, self.size, timeout=TIMEOUT)
            self.store, *_ = next(meeting)
        except DistError as error:
            raise UserError(
                f"{self.host} did not meet all of {self.size} processes at {address} within "
                f"{TIMEOUT.seconds} seconds; start the command on every host, and let them reach "
                "that port."
            ) from error
        self.store = PrefixStore("steadyfit", self.store)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if self.store is None or error is None:
            return
        if not self.names:
            self._refuse_together(error)
        elif isinstance(error, DistError) or any(words in str(error) for words in _LOSS):
            raise UserError(
                f"{self._name_silent_ranks()} ({str(error).splitlines()[0]})"
            ) from error

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def agree(self, run: Path, checkpoint: str | None) -> tuple[Path, str | None]:
        """Return the run and checkpoint that the first process has chosen, if all can read it.

        Raises:
            UserError: A host has no such checkpoint or another one, or a process has ended.
        """
        if self.store is None:
            return run, checkpoint
        if self.leads:
            digest = sha256(Path(checkpoint)) if checkpoint else ""
            self.publish("chosen", {"run": str(run), "checkpoint": checkpoint, "sha256": digest})
            answers = [self._receive(f"answer {rank}") for rank in range(1, self.size)]
            hosts = [self.host, *(answer["host"] for answer in answers)]
            problem = next((x["problem"] for x in answers if x["problem"]), "")
            self.publish("verdict", {"hosts": hosts, "problem": problem})
        else:
            chosen = self._receive("chosen")
            run, checkpoint = Path(chosen["run"]), chosen["checkpoint"]
            self._answer(
                _checkpoint_problem(checkpoint, chosen["sha256"], self.host, chosen["host"])
            )
            verdict = self._receive("verdict")
            hosts, problem = verdict["hosts"], verdict["problem"]
        self.names = hosts
        if problem:
            self._wait_for_readers()
            raise UserError(problem)
        return run, checkpoint

    def _refuse_together(self, error: BaseException) -> None:
        """Let the others end with this process, and say why."""
        said = str(error).splitlines()[0] if isinstance(error, ValueError) else "see its output."
        problem = f"{self.host} cannot begin: {said}"
        if not self.leads:
            problem += " All hosts need the same files, or a folder that they share."
        with suppress(RuntimeError, UserError):  # they are gone
            if self.leads:
                self.publish("chosen", {"problem": problem})
            else:
                self._answer(problem)
            self._wait_for_readers()

    def _answer(self, problem: str) -> None:
        self.publish(f"answer {self.rank}", {"problem": problem})

    def publish(self, what: str, content: dict[str, Any]) -> None:
        assert self.store is not None
        self.store.set(what, json.dumps({"host": self.host} | content))

    def _receive(self, what: str) -> dict[str, Any]:
        assert self.store is not None
        try:
            message: dict[str, Any] = json.loads(self.store.get(what))
        except (DistError, RuntimeError) as error:
            raise UserError(
                f"{self.host} waited {TIMEOUT.seconds} seconds for another process, which says "
                "nothing; see the output of the other hosts."
            ) from error
        if what == "chosen" and "problem" in message:
            self._wait_for_readers()
            raise UserError(message["problem"])
        return message

    def _wait_for_readers(self) -> None:
        """Stay until all have heard what this process said: the store may end with it."""
        assert self.store is not None
        self.store.add("leaving", 1)
        end = time.monotonic() + PATIENCE
        while self.leads and self.store.add("leaving", 0) < self.size and time.monotonic() < end:
            time.sleep(0.05)

    def _name_silent_ranks(self) -> str:
        """Name the processes that do not report the loss, as those do that are left."""
        silent = set(range(self.size))
        end = time.monotonic() + PATIENCE

        def report() -> None:  # a store on a lost host never answers
            assert self.store is not None
            with suppress(RuntimeError):
                self.store.set(f"left {self.rank}", "")
                while silent and time.monotonic() < end:
                    silent.difference_update(
                        {rank for rank in silent if self.store.check([f"left {rank}"])}
                    )
                    time.sleep(0.1)

        thread = Thread(target=report, daemon=True)
        thread.start()
        thread.join(PATIENCE)
        if self.leads:
            time.sleep(1)  # for those that ask as well
        lost = [0] if self.rank in silent else sorted(silent)  # they meet on the host of rank 0
        named = ", ".join(f"rank {rank} on {self.names[rank]}" for rank in lost)
        return (
            f"{named or 'a link between hosts'} does not answer; the same command with --run goes "
            "on from the last checkpoint"
        )


def _checkpoint_problem(checkpoint: str | None, digest: str, host: str, first: str) -> str:
    """Say why a host cannot go on from the checkpoint of the first one; empty if it can."""
    if checkpoint is None:
        return ""
    path = Path(checkpoint)
    if path.is_file() and sha256(path) == digest:
        return ""
    kind = f"another {path.absolute()} than" if path.is_file() else f"no {path.absolute()}, unlike"
    return (
        f"{host} has {kind} {first}, which goes on from it; keep runs in a folder that all hosts "
        f"share (--trainer.default_root_dir), or copy the file from {first} first."
    )


def _refuse_restarts() -> None:
    """Refuse torchrun's restarts where processes would read what former ones have left.

    Raises:
        UserError: How to have torchrun begin each time anew.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise UserError(
            "torchrun --max-restarts would let new processes wait for former ones; set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in front of it, and --rdzv-backend=c10d."
        )


def slurm_job() -> str:
    """Return the id of the SLURM job, or of its part of a job array; empty outside of SLURM."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID", "") for name in ("JOB", "TASK"))
    return f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID", "")


def job_name() -> str | None:
    """Return the name of a run without one: that of the SLURM job, which stays when it is requeued.

    Raises:
        UserError: torchrun is to restart the command, and each time it would begin a new run.
    """
    if SLURMEnvironment.detect() and (job := slurm_job()):
        step = os.environ.get("SLURM_STEP_ID", "0")  # of several srun in one job
        return f"slurm-{job}" if step == "0" else f"slurm-{job}-{step}"
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        raise UserError(
            "torchrun --max-restarts needs --run NAME: without a name a restart begins a new run."
        )
    return None
