"""Stop on SIGTERM without losing what was learned."""

import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning import LightningModule, Trainer, __version__
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks.run.folder import FolderCallback
from core.hosts import slurm_job
from core.runs import Run

FEWEST = 20  # batches between two exchanges of several processes
MOST = 50  # optimizer steps between them, where epochs are long
_EXIT_STATUS = 143  # 128 + SIGTERM, as a shell reports it
_END, _REQUEUE = 1, 2  # notes: SIGTERM, and the signal before the end of a SLURM job's time


class Termination(FolderCallback, Checkpoint):
    """SIGTERM to any process ends training with the checkpoint that ``fit --run`` goes on from.

    Schedulers and containers send it some seconds before SIGKILL, often to one process alone. Its
    handler only takes note. On log steps, where the loop waits for the device anyway, and at ends
    of epochs, but never within ``FEWEST`` batches, the processes exchange their notes in one
    ``all_reduce``. All of them then stop at the same step: after a batch that another one follows,
    or at the end of the epoch, since a validation that is due must not be lost. A process on its
    own has nobody to ask and stops as soon as it can.

    Outside of training there is nothing to keep, and a signal ends the program at once.

    SLURM's warning, SIGUSR1, is answered likewise, and the job goes into the queue again. Lightning
    would train on meanwhile, and no run goes on from its ``hpc_ckpt_1.ckpt``.

    As a ``Checkpoint`` it comes after all callbacks that learn something from the step.
    """

    def __init__(self) -> None:
        self.noted = 0  # signal of this process: _END or _REQUEUE
        self.agreed = 0  # the largest of all processes
        self.batches = 0  # trained since the processes last exchanged their notes
        self.postponed = False  # to the end of the epoch
        self.handler: Callable[..., Any] | None = None  # None where Lightning installs it
        self.previous_handler: Any = signal.SIG_DFL

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)

        def note(signum: int, *_: object) -> None:
            self.noted = max(self.noted, _END if signum == signal.SIGTERM else _REQUEUE)

        def end(signum: int, *_: object) -> NoReturn:
            if signum != signal.SIGTERM and trainer.is_global_zero:
                requeue()
            if trainer.strategy.launcher is not None:
                trainer.strategy.launcher.kill(signum)
            raise SIGTERMException(_EXIT_STATUS)

        # Lightning broadcasts the first process's flag and reads it in every step, and its handler
        # broadcasts in the midst of other collectives: one signal hangs or crashes all processes.
        # To be dropped when Lightning-AI/pytorch-lightning#20806 (the hang) and #21487 (the cost; a
        # pull request is #21640) are closed.
        handler = note if stage == "fit" else end
        signals: Any = getattr(trainer, "_signal_connector", None)
        if hasattr(signals, "_sigterm_notifier_fn"):
            signals._sigterm_notifier_fn = handler
            signals._slurm_sigusr_handler_fn = handler  # registered under SLURM alone
        else:  # Lightning installs its own after this hook, and ours takes its place later
            self.handler, self.previous_handler = handler, signal.getsignal(signal.SIGTERM)
        loop: Any = trainer.fit_loop.epoch_loop
        if hasattr(loop, "_broadcast_sigterm_tensor"):  # else it costs time: nobody sets the flag
            loop._broadcast_sigterm_tensor = lambda: None

    def install_handler(self, *_: Any, **__: Any) -> None:
        if self.handler and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.handler)

    on_train_start = on_validation_start = on_test_start = on_predict_start = install_handler

    def restore_handler(self, *_: Any, **__: Any) -> None:
        if self.handler and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.previous_handler or signal.SIG_DFL)

    on_exception = teardown = restore_handler

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.batches += 1
        every = min(trainer.log_every_n_steps or MOST, MOST)  # type: ignore[attr-defined]
        self.exchange(trainer, due=trainer.global_step % every == 0)
        if self.agreed and not self.postponed and self.can_stop_here(trainer):
            self.stop(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.exchange(trainer, due=True)
        if self.agreed:
            self.stop(trainer)

    def exchange(self, trainer: Trainer, due: bool) -> None:
        """Find the largest note of all processes; ``due`` is the same on all of them."""
        if trainer.world_size == 1:
            self.agreed = self.noted
        elif due and self.batches >= FEWEST:
            self.batches = 0
            flag = torch.tensor(self.noted, device=trainer.strategy.root_device)
            # strategy.reduce would wait at a barrier first
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            self.agreed = int(flag)

    def can_stop_here(self, trainer: Trainer) -> bool:
        try:
            return another_batch_follows(trainer)
        except (AttributeError, TypeError):  # a Lightning that has other names for what is asked
            self.postponed = True
            if trainer.is_global_zero:
                print(
                    "\nSIGTERM: training stops at the end of this epoch, because Lightning "
                    f"{__version__} does not tell whether it could stop earlier without loss.",
                    file=sys.stderr,
                )
            return False

    def stop(self, trainer: Trainer) -> NoReturn:
        run = Run(self.folder or Path(trainer.default_root_dir))
        # all ranks wait until it is written
        trainer.save_checkpoint(run.last_checkpoint, weights_only=False)
        if trainer.is_global_zero:
            signalled = "SIGTERM" if self.agreed == _END else "SLURM"
            print(
                f"\nStopped by {signalled} after step {trainer.global_step}; the same command with "
                f"--run={shlex.quote(run.folder.name)} goes on from {run.last_checkpoint}",
                file=sys.stderr,
            )
            if self.agreed == _REQUEUE:
                requeue()
        # Lightning's launcher kills the first process of a node when another one fails
        raise SIGTERMException(_EXIT_STATUS if trainer.local_rank == 0 else 0)


def another_batch_follows(trainer: Trainer) -> bool:
    """Return whether a batch comes next, and no gradient waits for it.

    A checkpoint does not hold accumulated gradients, and after one that is written before a
    validation, or of the end of an epoch, Lightning goes on without them.
    """
    loop = trainer.fit_loop.epoch_loop
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return not (
        loop._should_accumulate()
        or loop._is_training_done
        or trainer.should_stop
        or loop._should_check_val_fx(fetcher)
    )


def requeue() -> None:
    """Have SLURM run the job again; its own words say why it does not."""
    try:
        status = subprocess.call(["scontrol", "requeue", slurm_job()])
        problem = f"status {status}" if status else ""
    except OSError as error:
        problem = str(error.strerror)
    again = f"was not requeued ({problem}); submit it" if problem else "is in the queue again"
    print(f"SLURM job {slurm_job()} {again}.", file=sys.stderr)
