"""A run, rebuilt from its checkpoint alone."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from core.errors import UserError
from core.files import sha256
from core.runs import Run, data_state, load_checkpoint
from datamodules.base import BaseDataModule
from lit_models.base import LitModel
from pipeline.admission import admit, read_config
from pipeline.history import update
from pipeline.parser import Parser, instantiating, link_data_arguments

INPUTS = ("images", "names", "names_file", "text", "text_file")  # options of predict.py
# A prediction needs neither; a stranger's checkpoint cannot choose what is imported for them.
_UNUSED: dict[str, Any] = {"optimizer": "torch.optim.SGD", "lr_scheduler": None}


@dataclass
class LoadedRun:
    """One checkpoint, rebuilt from itself alone."""

    source: Path  # run folder, or the checkpoint itself
    path: Path
    checkpoint: dict[str, Any]
    config: dict[str, Any]
    model: LitModel
    data: BaseDataModule

    @classmethod
    def load(
        cls, source: str, which: str, overrides: list[str], *, trust: bool = False, **inputs: Any
    ) -> "LoadedRun":
        """Read a run or a .ckpt file and build its model and data.

        Nothing in the file is executed, and what it names is admitted before it is imported.

        Args:
            source: Run folder or checkpoint.
            which: The ``best`` or the ``last`` checkpoint of a run.
            overrides: Settings as on the command line.
            trust: Import whatever it names.
            inputs: Settings of the data that are what is to be predicted.

        Raises:
            UserError: The checkpoint is missing or damaged, an override or an input does not fit,
                or the weights are those of another network.
        """
        is_file = Path(source).suffix == ".ckpt"
        path = Path(source) if is_file else Run.find(source).checkpoint(which)
        checkpoint = load_checkpoint(path)
        config = update(read_config(checkpoint["config"], path))
        model = config["model"] | {"init_args": config["model"]["init_args"] | _UNUSED}
        data = config["data"]
        known = dict(data_state(checkpoint, data["class_path"]))
        data = data | {"init_args": data.get("init_args", {}) | known}
        if not trust:
            admit({"model": model, "data": data, "trainer": {}}, path)
        elif os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # where an own network may be
        parser = Parser()
        parser.add_subclass_arguments(LitModel, "model")
        parser.add_subclass_arguments(BaseDataModule, "data")
        link_data_arguments(parser)
        settings = parser.parse_object({"model": model, "data": data})
        refuse_inputs(inputs, settings.data, source)
        settings.data.init_args.update(Namespace(**inputs))
        with instantiating():
            built = parser.instantiate(parser.parse_args(overrides, settings))
        try:
            built.model.load_state_dict(checkpoint["state_dict"])
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        built.model.run_data = built.data
        built.model.run_precision = config["trainer"].get("precision")
        built.model.has_weights = True
        return cls(
            path if is_file else path.parents[1], path, checkpoint, config, built.model, built.data
        )

    @property
    def split(self) -> str:
        """Digest of the folds that it was trained with; empty without folds."""
        return self.checkpoint.get("split", "")

    @property
    def folds(self) -> tuple[int, int]:
        """Number of these folds, and the index of the one that it held out."""
        settings = self.config["data"]["init_args"]
        return settings.get("folds") or 0, settings.get("fold") or 0

    def describe(self) -> dict[str, Any]:
        accuracy = self.checkpoint["metrics"].get("val/accuracy")
        val_size = self.config["data"]["init_args"]["val_size"]
        val_size = self.checkpoint.get("val_samples", val_size)  # of a fold
        counted = val_size if isinstance(val_size, int) else None  # not a share of them
        return {
            "run": str(self.source),
            "checkpoint": str(self.path),
            "sha256": sha256(self.path),
            "epoch": self.checkpoint["epoch"],
            "validation_accuracy": accuracy,
            "validation_samples": 0 if accuracy is None else counted,
            "config": self.config,
        }


def refuse_inputs(inputs: dict[str, Any], data: Namespace, source: str) -> None:
    """Refuse inputs of another kind than the run's.

    Args:
        inputs: By the name of their setting.
        data: Class and settings of the run's data.
        source: The run, for the message.

    Raises:
        UserError: What the run predicts instead.
    """
    known = vars(data.init_args)
    for name in (name for name in inputs if name not in known):
        taken = " or ".join(f"--{other}" for other in INPUTS if other in known)
        instead = "that set; leave it out, or predict others in Python (docs/python.md)"
        raise UserError(
            f"--{name.removeprefix('as_')} does not fit {source}: a run on "
            f"{data.class_path.rpartition('.')[2]} predicts {taken or instead}."
        )
