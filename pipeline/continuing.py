"""Settings that may change when a run goes on. All others make it another run."""

from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from core.errors import UserError

_MAY_CHANGE = (
    # how long: a schedule that is laid over the whole training refuses it itself
    *("trainer.max_epochs", "trainer.max_steps", "trainer.max_time", "trainer.min_*"),
    # where: the samples of an optimizer step are compared when the checkpoint is loaded
    *("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy*"),
    *("trainer.accumulate_grad_batches", "data.batch_size", "data.eval_batch_size"),
    *("trainer.default_root_dir", "trainer.plugins*", "data.data_dir", "data.cache_dir"),
    *("data.verify", "data.download"),
    # what is shown and kept
    *("trainer.logger*", "trainer.log_every_n_steps", "trainer.profiler*"),
    *("trainer.enable_progress_bar", "trainer.enable_model_summary"),
    *("trainer.num_sanity_val_steps", "trainer.limit_test_batches", "trainer.limit_predict_*"),
    # precision is told, see `refuse_changes`
    "trainer.precision",
)
# of callbacks those that only look, keep or end
CALLBACKS_MAY_CHANGE = (
    *("ConfusionMatrix", "CorrectionTable", "HiddenGradients", "LearningCurves", "MaskedAccuracy"),
    *("Mistakes", "SampleSheet", "SpikePictures", "Timing", "TrainingCost"),
    *("DeviceStatsMonitor", "LearningRateMonitor", "ModelSummary", "RichModelSummary"),
    *("ProgressBar", "RichProgressBar", "TQDMProgressBar"),
    *("BestCheckpoint", "ModelCheckpoint", "OnExceptionCheckpoint", "EarlyStopping", "Timer"),
)
# where a new run branches off from a state of another one; a state holds nothing of these
BRANCH_MAY_CHANGE = ("trainer.gradient_clip_*", "trainer.callbacks.*Clipping*")
MONITOR = "GradientSpikeMonitor"  # only looks unless it is told to react
_SHOWN = 4  # differences in a sentence

Settings = dict[str, Any]


def named(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every setting by the name of its flag; a class before its own settings."""
    if isinstance(value, dict) and "class_path" in value:
        yield name, value["class_path"]
        for key, part in (value.get("init_args", {}) | value.get("dict_kwargs", {})).items():
            yield from named(part, f"{name}.{key}")
    elif isinstance(value, dict) and value:
        for key, part in value.items():
            yield from named(part, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list) and all(isinstance(part, dict) for part in value):
        seen: Counter[str] = Counter()  # callbacks, loggers, plugins
        for part in value:
            short = part["class_path"].rpartition(".")[2]
            seen[short] += 1
            yield from named(part, f"{name}.{short}{seen[short] if seen[short] > 1 else ''}")
    else:
        yield name, value


def _may_change(name: str) -> bool:
    if name.startswith("trainer.callbacks."):
        return name.split(".")[2] in CALLBACKS_MAY_CHANGE
    return any(fnmatchcase(name, pattern) for pattern in _MAY_CHANGE)


def reacts(settings: Settings) -> bool:
    """Return true if a monitor of spikes does something about them."""
    reaction = dict(named(settings)).get(f"trainer.callbacks.{MONITOR}.reaction", "log")
    return reaction != "log"


def differences(recorded: Settings, current: Settings) -> list[tuple[str, Any, Any]]:
    """Return settings with another value than recorded; of another class no more than that."""
    before, now = dict(named(recorded)), dict(named(current))
    found: list[tuple[str, Any, Any]] = []
    for name in sorted(before | now):
        old, new = before.get(name), now.get(name)
        below = found and name.startswith(f"{found[-1][0]}.")
        if old != new and not below:
            found.append((name, old, new))
    return found


def refuse_changes(
    recorded: Settings, current: Settings, run: str, *, branches: bool = False
) -> list[str]:
    """Compare the settings that a run was trained with and those it is to go on with.

    Args:
        recorded: Settings of the checkpoint.
        current: Settings that were typed.
        run: What goes on, for the message.
        branches: It is a new run, which may clip what the other did not.

    Returns:
        What is worth a warning.

    Raises:
        UserError: They differ in what may not change.
    """
    found = differences(recorded, current)
    looking = not reacts(recorded) and not reacts(current)
    refused = [
        (name, old, new)
        for name, old, new in found
        if not _may_change(name)
        and not (looking and MONITOR in name)
        and not (branches and any(fnmatchcase(name, pattern) for pattern in BRANCH_MAY_CHANGE))
    ]
    if refused:
        changes = [
            f"--{name} was {shown(old, new)}, not {shown(new, old)}" for name, old, new in refused
        ]
        more = f"; and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
        raise UserError(
            f"{run} cannot go on with other settings: {'; '.join(changes[:_SHOWN])}{more}. To "
            f"train a new run from its weights, add --init_from {run} and another --run."
        )
    return [
        f"{run} goes on with --trainer.precision={new} instead of {old}; its weights will not be "
        "those of a run without this change."
        for name, old, new in found
        if name == "trainer.precision"
    ]


def shown(value: Any, other: Any = None) -> str:
    """Format a value as it is typed, a class by its name, of lines those that ``other`` lacks."""
    if isinstance(value, str) and value.endswith("\n"):
        others = str(other).splitlines()
        lines = sorted(value.splitlines(), key=lambda line: line in others)
        more = f" and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        return ", ".join(lines[:_SHOWN]) + more
    if isinstance(value, str) and value.replace(".", "").replace("_", "").isidentifier():
        return value.rpartition(".")[2]
    return "none" if value is None else str(value)
