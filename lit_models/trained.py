"""A trained model in Python, in one line. Dimensions: N samples, K classes."""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from lightning import LightningModule, Trainer

from core.errors import UserError
from core.runs import ROOT, is_file
from datamodules.base import BaseDataModule

if TYPE_CHECKING:
    from lit_models.base import LitModel

CHECKOUT = Path(__file__).parents[1]


class Prediction(NamedTuple):
    """Answers of ``predict.py`` for N samples."""

    labels: list[str]  # N; of lines of text what they are corrected to
    probabilities: np.ndarray  # (N, K); of lines their scores (N,), log probabilities


def load(
    source: str | Path, checkpoint: str = "best", *, trust: bool = False, **settings: Any
) -> "LitModel":
    """Load the model of a run, in evaluation mode, from any folder.

    Args:
        source: Path or name of a run, or a checkpoint; below the folder one is in or, if nothing is
            there, below that of this project.
        checkpoint: The ``best`` or the ``last`` one of a run.
        trust: Import whatever the run names, as ``predict.py --trust``.
        settings: Those of the model that are to be others than the run's, such as ``tta="none"``.

    Raises:
        UserError: There is no such run, its files are damaged, it names a class of somebody else,
            or a setting does not fit.
    """
    places = [Path(source), ROOT / source, CHECKOUT / source, CHECKOUT / ROOT / source]
    found = [place for place in places if is_file(place) or is_file(place / "config.yaml")]
    return _rebuild(found[0] if found else Path(source), checkpoint, trust, settings).eval()


def _rebuild(source: Path, which: str, trust: bool, settings: dict[str, Any]) -> "LitModel":
    """Build the model of a run or a checkpoint as ``predict.py`` does."""
    from pipeline.loading import LoadedRun  # of a room above, which imports this one

    for name, value in settings.items():
        if not isinstance(value, str | int | float | bool | None):
            raise UserError(
                f"{name} is a {type(value).__name__}, but what a checkpoint is rebuilt with are "
                "texts and numbers; leave it out."
            )
    typed = {n: v if isinstance(v, str) else json.dumps(v) for n, v in settings.items()}
    overrides = [f"--model.{name}={value}" for name, value in typed.items()]
    model = LoadedRun.load(str(source), which, overrides, trust=trust).model
    model.optimizer = _no_optimizer
    return model


def _no_optimizer(parameters: Any) -> Any:
    raise UserError(
        "a model that was loaded has no optimizer; set model.optimizer to a function of its "
        "parameters, such as functools.partial(torch.optim.AdamW, lr=1e-3)."
    )


class TrainedModel(LightningModule):
    """A model with what it needs after training.

    Attributes:
        run_data: The data module of the run that the model was loaded from, if it was.
        run_precision: The precision in which that run was trained.
    """

    outputs: tuple[str, ...]
    run_data: BaseDataModule | None = None
    run_precision: Any = None

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: str | torch.device | None = None,
        *,
        trust: bool = False,
        **settings: Any,
    ) -> Self:
        """Rebuild the model of a checkpoint from the configuration in it, in training mode.

        One that a Trainer of the user's own has written has none: given its ``network``, all
        arguments are the user's, as Lightning has it.

        Args:
            checkpoint_path: The file.
            map_location: Device of the model.
            trust: Import whatever the checkpoint names.
            settings: Those of the model that are to be others than the run's.

        Raises:
            UserError: As :func:`load`, or it holds a model of another class.
        """
        if "network" in settings:
            return super().load_from_checkpoint(checkpoint_path, map_location, **settings)
        model = _rebuild(Path(checkpoint_path), "last", trust, settings)
        if not isinstance(model, cls):
            raise UserError(
                f"{checkpoint_path} holds a {type(model).__name__}, no {cls.__name__}; use "
                f"{type(model).__name__}.load_from_checkpoint."
            )
        return model.to(map_location or "cpu")

    @property
    def datamodule(self) -> BaseDataModule | None:
        """The data module of the trainer; None if it has loaders of the user's own."""
        found = getattr(self._trainer, "datamodule", None)
        return found if isinstance(found, BaseDataModule) else None

    @property
    def data(self) -> BaseDataModule:
        """The data module of the trainer, or of the run that the model was loaded from.

        Raises:
            UserError: There is neither.
        """
        found = self.datamodule or self.run_data
        if found is None:
            raise UserError(
                f"this {type(self).__name__} has no data module; train it with one, or load a run."
            )
        return found

    @property
    def fitting(self) -> bool:
        return self._trainer is not None and self._trainer.state.fn == "fit"

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.data.class_names

    def predict(self, inputs: Any, accelerator: str = "auto") -> Prediction:
        """Predict labels and probabilities of inputs, in their order, as ``predict.py`` does.

        Args:
            inputs: Inputs that the data module of the run reads, see its ``read_given``: images,
                paths of images, names, lines of text, or the tensors that its network reads.
            accelerator: As for Lightning's Trainer.

        Raises:
            UserError: They are none of these, or the model has no classes.
        """
        if not self.outputs:
            raise UserError(f"a {type(self).__name__} has no classes; call the model on tensors.")
        data = copy(self.data)  # what it reads here is no concern of others
        data.trainer = None
        loader = data.make_loader(data.read_given(inputs), "predict")
        device, former = self.device, self._trainer
        try:
            with _quiet():
                trainer = make_predictor(accelerator, 1, self.run_precision)
                batches: Any = trainer.predict(self, loader)
        finally:
            self._trainer = former
            self.to(device)
        ids, *outputs = (torch.cat(parts).cpu().numpy() for parts in zip(*batches, strict=True))
        return Prediction(*data.submission().answers(ids, *outputs))


def make_predictor(accelerator: str, devices: str | int, precision: Any, **options: Any) -> Trainer:
    """Make the Trainer of a prediction, which writes nothing."""
    return Trainer(
        accelerator=accelerator,
        devices=devices,
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        **{"enable_progress_bar": False, **options},
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the messages of Lightning about every Trainer."""
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # a call of Lightning 2.6 itself, which torch has renamed
            warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.* is deprecated")
            yield
    finally:
        log.setLevel(level)
