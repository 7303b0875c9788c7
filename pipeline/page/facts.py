"""The files of a run: its numbers, and the result by which it is known."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from core.errors import UserError
from core.provenance import recorded
from core.runs import Run, load_checkpoint
from pipeline.admission import read_config
from pipeline.continuing import Settings
from pipeline.history import update
from pipeline.kaggle.prediction_file import wilson_interval
from pipeline.page.parts import drawable
from pipeline.studies.metrics import SEED, read_metrics
from steadyfit.pictures import SpikeRun, spike_pictures

# metrics that a run is known by, the first that it has; but for the test it is the best value
RESULTS = {
    **{"test/accuracy": max, "val/accuracy": max, "test/r2": max, "val/r2": max, "val/f05": max},
    **{"test/loss": min, "val/loss": min, "train/loss": min},
}
STAGES = {"test": "test", "val": "best validation", "train": "lowest training"}


@dataclass(frozen=True)
class Result:
    """The last value of a test, or the best of a validation.

    Attributes:
        name: Of the metric.
        value: A fraction, if it is an accuracy.
        samples: Number that it was measured on; None if not known, or if it is no accuracy.
    """

    name: str
    value: float
    samples: int | None = None

    @property
    def interval(self) -> str:
        """The 95 % interval of an accuracy."""
        if not self.samples:
            return "not known"
        low, high = wilson_interval(self.value, self.samples)
        return f"{100 * low:.2f} to {100 * high:.2f} % ({self.samples:,} samples)"

    def __str__(self) -> str:
        stage, _, metric = self.name.partition("/")
        value = shown_value(self.name, self.value)
        return f"{value} {STAGES[stage]} {metric}, 95 % interval {self.interval}"


def shown_value(name: str, value: float) -> str:
    return f"{100 * value:.2f} %" if name.endswith("accuracy") else f"{value:.4g}"


class Facts(Run):
    """A run, read as far as it is there; what is not there raises a UserError."""

    @cached_property
    def settings(self) -> Settings:
        return update(read_config(self.config.read_text(errors="replace"), self.config))

    @cached_property
    def origin(self) -> dict[str, Any]:
        return recorded(self.config)

    @property
    def seed(self) -> Any:
        return self.settings.get(SEED)

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """Numbers, a row an optimizer step; NaN where nothing was logged."""
        metrics = read_metrics(self.folder)
        try:
            return metrics.replace("", "nan").astype(float)
        except ValueError as error:
            raise UserError(f"{self.folder}/metrics.csv holds no numbers ({error}).") from None

    @cached_property
    def spikes(self) -> SpikeRun:
        return SpikeRun.read(self.folder, drawable(self.label))

    @cached_property
    def spike_pictures(self) -> dict[str, Figure]:
        return spike_pictures([self.spikes])

    @cached_property
    def best(self) -> dict[str, Any]:
        """The checkpoint that predicts."""
        return load_checkpoint(self.checkpoint())

    def values(self, name: str) -> pd.Series:
        """A metric by optimizer step, without what was not logged; the first of two optimizers."""
        column = next((c for c in (name, f"{name}/0") if c in self.metrics), None)
        return pd.Series(dtype=float) if column is None else self.metrics[column].dropna()

    def result(self, names: tuple[str, ...] = tuple(RESULTS)) -> Result:
        """Its result by the first of some metrics that it has.

        Raises:
            UserError: It has none.
        """
        for name in names:
            if len(values := self.values(name)):
                is_test = name.startswith("test/")
                value = float(values.iloc[-1] if is_test else RESULTS[name](values))
                return Result(name, value, self.samples(name))
        raise UserError(f"{self.folder} has no metric by which it could be judged; train it first.")

    def samples(self, name: str) -> int | None:
        """Number of samples that an accuracy was measured on, if that was recorded."""
        try:
            if name == "test/accuracy":
                return int(self.confusion("test").to_numpy().sum())
            if name == "val/accuracy":
                count = self.settings["data"]["init_args"].get("val_size")
                count = self.best.get("val_samples", count)
                return count if type(count) is int else None  # not a share of them
        except (UserError, ValueError):
            pass
        return None

    def table(self, name: str, hint: str, **options: Any) -> pd.DataFrame:
        """A table that the run has left, as text.

        Raises:
            UserError: There is none.
        """
        path = self.folder / name
        if not path.is_file():
            raise UserError(f"there is no {name}; {hint}.")
        return pd.read_csv(path, dtype=str, keep_default_na=False, **options)

    def confusion(self, part: str) -> pd.DataFrame:
        """Counts (K, K) by true class, in a row, and predicted class.

        Raises:
            UserError: There are none.
        """
        command = f"python train.py {'test' if part == 'test' else 'validate'} --run {self.folder}"
        hint = f"{command} makes it, of data with classes"
        return self.table(f"confusion_matrix_{part}.csv", hint, index_col=0).astype(int)
