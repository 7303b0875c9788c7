"""Settings and classes that recorded configurations still name: moved, renamed or gone.

A run's ``config.yaml`` and its checkpoints record every setting, so nothing may simply vanish.
Whatever is removed or renamed gets a line here, with the version in which it was.
"""

from dataclasses import dataclass
from typing import Any

from core.errors import UserError
from pipeline.names import own_classes


@dataclass(frozen=True)
class Removed:
    """A setting that there is no more; a recorded one that was left at its default is dropped."""

    class_path: str
    option: str
    default: Any
    since: str
    instead: str  # what to do, as the end of a sentence


@dataclass(frozen=True)
class Renamed:
    """A setting that goes by another name; ``a.b`` is option ``b`` of the nested setting ``a``."""

    class_path: str
    option: str
    name: str
    since: str


# one class, one name: a run goes on under the name that its config had
SAME = {
    f"{package}.{name}": f"callbacks.{name}"
    for package in ("steadyfit", "steadyfit.lightning")
    for name in ("GradientSpikeMonitor", "UpdateClipping")
}
SETTINGS: tuple[Removed | Renamed, ...] = ()


def update(recorded: Any, settings: tuple[Removed | Renamed, ...] = SETTINGS) -> Any:
    """Return a configuration, or a part of one, as this version writes it.

    Raises:
        UserError: It sets something that there is no more.
    """
    if isinstance(recorded, str):
        return current_path(recorded)
    if isinstance(recorded, list):
        return [update(value, settings) for value in recorded]
    if not isinstance(recorded, dict):
        return recorded
    updated = {key: update(value, settings) for key, value in recorded.items()}
    options = updated.get("init_args")
    if isinstance(options, dict):
        for setting in settings:
            if updated["class_path"] == setting.class_path and setting.option in options:
                _apply(setting, options)
    return updated


def current_path(path: str) -> str:
    """Return the import path of a class, which may have been in another module."""
    if path in SAME:
        return SAME[path]
    package, _, rest = path.partition(".")
    _, _, name = rest.partition(".")
    current = f"{package}.{name}"
    # its module went into a room; the package names it as before
    moved = package in ("callbacks", "datamodules") and own_classes().get(name) == current
    return current if moved else path


def _apply(setting: Removed | Renamed, options: dict[str, Any]) -> None:
    value = options.pop(setting.option)
    if isinstance(setting, Renamed):
        *groups, name = setting.name.split(".")
        for group in groups:
            options = options.setdefault(group, {})
        options[name] = value
    elif value != setting.default:
        raise UserError(
            f"{setting.class_path} has no {setting.option} since version {setting.since}, and the "
            f"configuration sets it to {value!r}; {setting.instead}"
        )
