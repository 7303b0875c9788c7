"""Settings and classes that recorded configurations still name: moved, renamed or gone.

A run's ``config.yaml`` and its checkpoints record every setting, so nothing may simply vanish.
Whatever is removed or renamed gets a line here, with the version in which it was.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import UserError
from pipeline.names import CLASS_KEYS, own_classes


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


@dataclass(frozen=True)
class OwnClass:
    """A setting that has become a class; any other value than the default chooses that one."""

    class_path: str
    option: str
    default: Any
    name: str
    since: str


# one class, one name: a run goes on under the name that its config had
SAME = {
    f"{package}.{name}": f"callbacks.{name}"
    for package in (
        "steadyfit",
        "steadyfit.lightning",
        "callbacks.clipping",
        "callbacks.gradient_spikes",
    )
    for name in ("GradientSpikeMonitor", "UpdateClipping")
}
# classes that are gone, and what to do, as the end of a sentence
GONE = {
    f"{package}{name}": "UpdateClipping removes spikes that it leaves, and with momentum "
    "--trainer.gradient_clip_val does as much; the rule and the comparison are in "
    "benchmarks/spike_rivals.py and benchmarks/spike_fixes.py."
    for package in ("", "callbacks.", "callbacks.clipping.")
    for name in ("GradientNormClipping", "AdaptiveGradientClipping")
} | {
    f"{package}{name}": "put them into a network of your own, see benchmarks/edges.py."
    for package in ("", "networks.", "lit_models.networks.")
    for name in ("Filtered", "FixedFilters")
}
_MONITOR = "callbacks.GradientSpikeMonitor"
_STACK = {"dropout": 0.0}
_MODELS: dict[str, dict[str, Any]] = {
    "LitSeq2Seq": {"label_smoothing": 0.0, "length_penalty": 0.0},
    "networks.AttentionRNN": _STACK,
    "networks.GatedRNN": _STACK,
    "networks.LeNet5": {"padded_size": 32},
    "networks.ResNet9": {"scale": 0.125},
    "networks.Transformer": {
        "positions": "sinusoidal",
        "embeddings": "tied",
        "output_bias": False,
        "bias": True,
        "norm": "final",
    },
    "networks.VanillaLSTM": _STACK,
    "networks.VanillaRNN": _STACK,
    "networks.WhitenedCNN": {"scale": 1 / 9},
    "optimizers.Muon": {"adamw_scale": 0.15, "adamw_betas": [0.9, 0.999], "steps": 5},
    "optimizers.MuonSGD": {"sgd_momentum": 0.85, "decay": 0.004, "steps": 3},
}
_OF_MODELS = tuple(
    Removed(
        f"lit_models.{name}", option, default, "0.1.0", "write a class of your own that has it."
    )
    for name, options in _MODELS.items()
    for option, default in options.items()
)
_NOVELS = ("austen-emma", "austen-sense", "bryant-stories", "chesterton-ball", "chesterton-brown",
           "edgeworth-parents", "melville-moby_dick")  # fmt: skip
_OF_BOOKS = {
    "books": [*_NOVELS],
    "val_books": ["burgess-busterbrown", "carroll-alice"],
    "test_books": ["austen-persuasion", "chesterton-thursday"],
    "max_tokens": 80,
}
_OF_MASKS = {"mask_fraction": 0.15, "random_fraction": 0.1, "kept_fraction": 0.1}
_TEXT = tuple(
    Removed(f"datamodules.{name}", option, default, "0.1.0", f"derive a class that sets {option}.")
    for name, options in {
        "GrammarDataModule": _OF_BOOKS,
        "MaskedBooksDataModule": _OF_BOOKS | _OF_MASKS,
    }.items()
    for option, default in options.items()
)
_PICTURES = tuple(
    Removed(f"callbacks.{name}", option, default, "0.1.0", f"derive a class that sets {option}.")
    for name, option, default in (
        ("LearningCurves", "min_interval", 30.0),
        ("Mistakes", "count", 25),
        ("SampleSheet", "per_class", 6),
    )
)
AUGMENTATION = (
    *("crop", "flip", "cutout", "rotate", "scale", "shear", "elastic"),
    *("brightness", "contrast", "saturation", "hue", "blur", "trivial"),
)
IMAGE_SETS = (
    *("CIFAR10", "Competition", "Demo", "Digits", "ImageFolder", "KaggleCIFAR10"),
    *("MNIST", "TorchDataset", "UCSBCIFAR10"),
)
Setting = Removed | Renamed | OwnClass
SETTINGS: tuple[Setting, ...] = (
    *_OF_MODELS,
    Removed(_MONITOR, "top_k", 3, "0.1.0", "a record names three parameters."),
    Removed(_MONITOR, "weight_norm_every", 10, "0.1.0", "weight norms are read every ten steps."),
    *_PICTURES,
    OwnClass("lit_models.LitClassifier", "cutmix", 0.0, "lit_models.LitCutMix", "0.1.0"),
    Removed("lit_models.LitFixMatch", "cutmix", 0.0, "0.1.0", "it never had an effect there."),
    *_TEXT,
    Removed("callbacks.CorrectionTable", "shown", 100, "0.1.0", "corrections.csv has all rows."),
    *(
        Renamed(f"datamodules.{name}DataModule", option, f"augmentation.{option}", since="0.1.0")
        for name in IMAGE_SETS
        for option in AUGMENTATION
    ),
)
FLAGS = {  # as they may be typed
    f"--data.{place}{option}": f"--data.{place}augmentation.{option}"
    for place in ("", "init_args.")
    for option in AUGMENTATION
}


def update(recorded: Any, settings: tuple[Setting, ...] = SETTINGS) -> Any:
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
    for key, value in recorded.items():
        refuse_gone(key, value)
    updated = {key: update(value, settings) for key, value in recorded.items()}
    data = updated.get("data")
    if isinstance(data, dict) and "class_path" not in data:  # it changes the data of another file
        options = data.get("init_args", data)
        for option in AUGMENTATION:
            if isinstance(options, dict) and option in options:
                _apply(Renamed("data", option, f"augmentation.{option}", "0.1.0"), options)
    options = updated.get("init_args")
    if isinstance(options, dict):
        for setting in settings:
            names = (setting.class_path, setting.class_path.rpartition(".")[2])
            if updated.get("class_path") not in names or setting.option not in options:
                continue
            if isinstance(setting, OwnClass) and options[setting.option] != setting.default:
                updated["class_path"] = setting.name
            else:
                _apply(setting, options)
    return updated


def refuse_gone(key: str, value: Any) -> None:
    """Say what to do where a setting, ``network`` or ``--model.network``, names a class of before.

    Raises:
        UserError: The class is gone.
    """
    if key.rpartition(".")[2].rstrip("+") in CLASS_KEYS:
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, str) and path in GONE:
                raise UserError(f"{path} is gone since version 0.1.0; {GONE[path]}")


def current_path(path: str) -> str:
    """Return the import path of a class, which may have been in another module, or a flag."""
    if path in SAME or path in FLAGS:
        return SAME.get(path) or FLAGS[path]
    package, _, rest = path.partition(".")
    module, _, name = rest.partition(".")
    current = f"{package}.{name}"
    # its module went into a room; the package names it as before
    moved = package in ("callbacks", "datamodules") and own_classes().get(name) == current
    there = Path(__file__).parents[1] / package / f"{module}.py"  # of a user, with a class so named
    return current if moved and not there.is_file() else path


def _apply(setting: Setting, options: dict[str, Any]) -> None:
    value = options.pop(setting.option)
    if isinstance(setting, Renamed):
        *groups, name = setting.name.split(".")
        for group in groups:
            nested = options.get(group)
            if not isinstance(nested, dict | None):
                raise UserError(
                    f"{setting.class_path}: {group} needs names and values, got {nested}."
                )
            options[group] = options = {} if nested is None else nested
        options[name] = value
    elif isinstance(setting, Removed) and value != setting.default:
        raise UserError(
            f"{setting.class_path} has no {setting.option} since version {setting.since}, and the "
            f"configuration sets it to {value!r}; {setting.instead}"
        )
