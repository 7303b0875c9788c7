"""Shortcuts past what Lightning and malloc do in every step for nothing.

Measured: about 4 microseconds of Python a step for each callback whose six hooks are skipped, and
up to a third of a step on a CPU for memory that malloc keeps (docs/speed.md,
``benchmarks/step_overhead.py``; ``benchmarks/kept_memory.py`` of commit f972244).
"""

import ctypes
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from typing import Any

from lightning import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.profilers import PassThroughProfiler

BATCH_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_batch_start",
    "on_validation_batch_end",
)
_FETCH = "train_dataloader_next"  # Lightning starts and stops its profiler around it
_NO_CONTEXT: AbstractContextManager[Any] = nullcontext()
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def speed_up(trainer: Trainer) -> None:
    """Take every shortcut that this trainer allows."""
    if isinstance(trainer.accelerator, CPUAccelerator):
        disable_malloc_trim()
    skip_noop_hooks(trainer)


class LoaderClock(PassThroughProfiler):
    """Profiler that times the training loader alone, and makes no context for other calls.

    Attributes:
        since: When it last began to wait, by ``perf_counter``.
        waited: Seconds that training has waited for its loader; None before it has.
    """

    waited: float | None = None

    def start(self, action_name: str) -> None:
        if action_name.endswith(_FETCH):
            self.since = perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name.endswith(_FETCH):
            self.waited = (self.waited or 0.0) + perf_counter() - self.since

    def profile(self, action_name: str) -> AbstractContextManager[Any]:  # type: ignore[override]
        return _NO_CONTEXT


def skip_noop_hooks(trainer: Trainer) -> None:
    """Leave out the hooks that callbacks do not have, and the profiler that was not asked for.

    Lightning calls six hooks of every callback in a step and enters the profiler for each, though
    most callbacks act at the end of an epoch. A hook that is None is skipped, and so is the look of
    a ModelCheckpoint at every step when it saves at epochs alone.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for hook in BATCH_HOOKS:
            noop = {getattr(Callback, hook)}
            if isinstance(callback, ModelCheckpoint) and _saves_at_epochs_alone(callback):
                noop.add(getattr(ModelCheckpoint, hook))
            own = hook in vars(callback)  # as a LambdaCallback has them
            if not own and getattr(type(callback), hook) in noop:
                setattr(callback, hook, None)
    if type(trainer.profiler) is PassThroughProfiler:  # type: ignore[attr-defined]
        trainer.profiler = LoaderClock()  # type: ignore[attr-defined]


def _saves_at_epochs_alone(checkpoint: ModelCheckpoint) -> bool:
    # if Lightning has other names for them, the hook stays
    steps = getattr(checkpoint, "_every_n_train_steps", 1)
    return steps < 1 and getattr(checkpoint, "_train_time_interval", "") is None


def disable_malloc_trim() -> None:
    """Let glibc's malloc keep what tensors free, instead of handing it back to the kernel.

    As it comes, it maps each block of more than 32 MiB anew, and the kernel has to zero every page
    of it. See mallopt(3); other C libraries are left as they are.
    """
    try:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    except (OSError, TypeError):  # Windows has no library that goes by no name
        return
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
