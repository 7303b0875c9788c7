"""Less of what Lightning does in every step for nothing."""

from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.profilers import PassThroughProfiler

OF_A_BATCH = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_batch_start",
    "on_validation_batch_end",
)
FETCH = "train_dataloader_next"  # Lightning starts and stops its profiler around it
NOTHING: AbstractContextManager[Any] = nullcontext()


class LoaderClock(PassThroughProfiler):
    """A profiler that looks at the training loader alone, and makes no context for other calls.

    Attributes:
        since: When it last began to wait, by ``perf_counter``.
        waited: Seconds that training has waited for its loader; None before it has.
    """

    waited: float | None = None

    def start(self, action_name: str) -> None:
        if action_name.endswith(FETCH):
            self.since = perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name.endswith(FETCH):
            self.waited = (self.waited or 0.0) + perf_counter() - self.since

    def profile(self, action_name: str) -> AbstractContextManager[Any]:  # type: ignore[override]
        return NOTHING


def pass_over_idle_hooks(trainer: Trainer) -> None:
    """Leave out the hooks that callbacks do not have, and the profiler that was not asked for.

    Lightning calls six hooks of every callback in a step and enters the profiler for each, about
    4 microseconds of Python, though most callbacks act at the end of an epoch. A hook that is None
    is passed over. So is a ModelCheckpoint's look at every step when it saves at epochs alone.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for hook in OF_A_BATCH:
            idle = {getattr(Callback, hook)}
            if isinstance(callback, ModelCheckpoint) and saves_at_epochs_alone(callback):
                idle.add(getattr(ModelCheckpoint, hook))
            own = hook in vars(callback)  # as a LambdaCallback has them
            if not own and getattr(type(callback), hook) in idle:
                setattr(callback, hook, None)
    if type(trainer.profiler) is PassThroughProfiler:  # type: ignore[attr-defined]
        trainer.profiler = LoaderClock()  # type: ignore[attr-defined]


def saves_at_epochs_alone(checkpoint: ModelCheckpoint) -> bool:
    # if Lightning has other names for them, the hook stays
    steps = getattr(checkpoint, "_every_n_train_steps", 1)
    return steps < 1 and getattr(checkpoint, "_train_time_interval", "") is None
