"""The progress bar, or lines of a log."""

import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.training.timing import Timing

INTERVAL = 0.2  # seconds between two drawings
LOG_INTERVAL = 30.0  # seconds between two lines where there is no terminal
_TIMES: list[tuple[str, str, Callable[[float], str]]] = [  # in `Timing`, in the bar, and how
    ("time/left", "left", lambda seconds: str(timedelta(seconds=round(seconds)))),
    ("time/samples_per_second", "samples/s", "{:,.0f}".format),
    ("time/data_wait", "wait", "{:.0%}".format),
    ("time/memory", "memory", lambda mib: f"{mib / 1024:.1f}G"),
]


class ProgressBar(TQDMProgressBar):
    """A bar with the last training values that were read from the device anyway.

    A metric logged with ``prog_bar=True`` would be read at every step, bar or not. It is drawn five
    times a second at most, so that steps of seconds are drawn each and those of a millisecond not.
    Above it stands a line for each epoch, and one for each validation. Where there is no terminal,
    as in a log file, there is a line every half minute instead.

    Args:
        refresh_rate: Steps between two drawings, if they take that long; 0 is without a bar.
    """

    BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._next = 0.0
        self._validated: dict[str, str] = {}  # last values of validation, by name
        self._last_line = 0  # optimizer steps at the last line of an epoch

    @property
    def is_disabled(self) -> bool:  # what Lightning asks when it makes a bar
        return super().is_disabled or not sys.stdout.isatty()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._next = time.monotonic() + (LOG_INTERVAL if self.is_disabled else 0)

    def _should_update(self, current: int, total: int | float | None) -> bool:
        now = time.monotonic()
        if now < self._next and (current != total or self.is_disabled):
            return False  # a run resumed within an epoch has no total
        self._next = now + (LOG_INTERVAL if self.is_disabled else INTERVAL)
        if self.is_disabled and self.is_enabled:
            print(self._line(f"{current}/{total or '?'}"), flush=True)
        return not self.is_disabled and super()._should_update(current, total)  # type: ignore[arg-type]

    def _line(self, place: str) -> str:
        trainer, stage = self.trainer, self.trainer.state.stage
        if stage and not trainer.training:
            return f"{stage.value.replace('_', ' ').capitalize()} {place}"
        values = self.get_metrics(trainer, trainer.lightning_module) | self._validated
        # before the first log step there are none
        return f"Epoch {trainer.current_epoch}, {place}: {_join(values)}".removesuffix(": ")

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        latest = getattr(pl_module, "latest", {})
        values: dict[str, Any] = {
            name.removeprefix("train/"): f"{value:.3f}" for name, value in latest.items()
        }
        timing = [c.latest for c in trainer.callbacks if isinstance(c, Timing)]  # type: ignore[attr-defined]
        times = {label: say(t[key]) for t in timing for key, label, say in _TIMES if key in t}
        first = {"left": times.pop("left")} if "left" in times else {}
        return first | values | times  # a narrow terminal cuts off the end

    # A line of each epoch and of each validation, on a terminal

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.train_progress_bar.leave = False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._tell_epoch(trainer, pl_module)
        super().on_validation_start(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            found, names = trainer.callback_metrics, ("val/loss", getattr(pl_module, "monitor", ""))
            self._validated = {n: f"{found[n].item():.4f}" for n in names if n in found}
            self.print(f"Epoch {trainer.current_epoch}: {_join(self._validated)}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self._tell_epoch(trainer, pl_module)

    def _tell_epoch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step > self._last_line:  # not again after the validation
            self._last_line = trainer.global_step
            values = self.get_metrics(trainer, pl_module)
            self.print(f"Epoch {trainer.current_epoch}: {_join(values)}")


def _join(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())
