"""The log that homework 6 of Berkeley's CS 182 (last names) hands in."""

import inspect
import json
from collections.abc import Iterable
from itertools import groupby
from statistics import fmean
from typing import Any

import torch
import yaml
from lightning import LightningModule, Trainer
from torch import Tensor, nn

from callbacks.run.folder import FolderCallback
from callbacks.run.run_folder import MetricsCSV, RunRecord
from core.files import atomic_write
from lit_models.base import LitModel

Rows = dict[int, dict[str, float]]


class SubmissionLog(FolderCallback):
    """Write ``submission_log.json`` into the run folder, in the course's format.

    It holds the loss of every step, the training and the evaluation accuracy of every epoch in
    percent, the settings, the names and shapes of the parameters, and the source of the network.
    What concerns training is that of ``metrics.csv``; without one, nothing is written.

    The course evaluates on its evaluation part after every epoch, and so does this callback: it
    reads the ``test`` split. Use it for the course's log alone, and choose nothing by what it says.
    It draws no random numbers and logs no metric, so that training is the same without it.

    Args:
        last_name: The student's.
    """

    def __init__(self, last_name: str = "") -> None:
        self.last_name = last_name
        self.eval_accuracies: list[float] = []  # of each epoch, in percent

    def state_dict(self) -> dict[str, Any]:
        return {"eval_accuracies": self.eval_accuracies}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.eval_accuracies = list(state["eval_accuracies"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        data.setup("test")
        self.evaluation: Iterable[list[Tensor]] = data.test_dataloader()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, LitModel):
            return
        with trainer.precision_plugin.val_step_context():
            counts = _count_right(pl_module, self.evaluation)
        right, samples = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        self.eval_accuracies.append(round(100 * right / samples, 4))
        rows = next((log.rows for log in trainer.loggers if isinstance(log, MetricsCSV)), None)
        record = next((c for c in trainer.callbacks if isinstance(c, RunRecord)), None)  # type: ignore[attr-defined]
        if trainer.is_global_zero and self.folder and rows and record:
            history = {**_history(rows), "eval_accuracies": self.eval_accuracies}
            content = {
                "history": history,
                "hparams": _settings(yaml.safe_load(record.text)),
                "last_name": self.last_name,
                **_description(pl_module.network),
            }
            with atomic_write(self.folder / "submission_log.json", "w") as file:
                json.dump(content, file)


@torch.no_grad()
def _count_right(model: LitModel, batches: Iterable[list[Tensor]]) -> Tensor:
    """Numbers of correctly classified samples and of all samples (2,), on the model's device."""
    counts = torch.zeros(2, device=model.device)
    model.eval()
    for batch in batches:
        outputs = model.evaluation_step(batch)
        right = outputs["preds"].argmax(1) == outputs["target"]
        counts += torch.stack([right.sum(), right.new_tensor(len(right), dtype=torch.long)])
    model.train()
    return counts


def _history(rows: Rows) -> dict[str, list[float]]:
    """The loss of every step and the mean accuracy of every epoch, from ``metrics.csv``."""
    steps = [row for _, row in sorted(rows.items()) if "train/loss" in row]
    epochs = groupby(steps, key=lambda row: row["epoch"])
    return {
        # six digits: those read again after an interruption have nine
        "train_losses": [round(row["train/loss"], 6) for row in steps],
        "train_accuracies": [
            round(100 * fmean(row["train/accuracy"] for row in epoch), 4) for _, epoch in epochs
        ],
    }


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that the course asks for, from a resolved configuration; None is not set."""
    model = config["model"]["init_args"]
    network, optimizer = model["network"].get("init_args", {}), model["optimizer"]
    rnn = network.get("rnn", {}).get("init_args", {})
    return {
        "hidden_size": rnn.get("hidden_size"),
        "num_layers": rnn.get("num_layers"),
        "dropout": network.get("dropout"),
        "optimizer_class": optimizer["class_path"].rpartition(".")[2],
        "lr": optimizer["init_args"]["lr"],
        "batch_size": config["data"]["init_args"]["batch_size"],
        "epochs": config["trainer"]["max_epochs"],
        "seed": config["seed_everything"],
    }


def _description(network: nn.Module) -> dict[str, Any]:
    """Names and shapes of a network's parameters, and the source of what makes and runs it."""
    cls = type(network)
    return {
        "model": [[name, list(p.shape)] for name, p in network.named_parameters()],
        "source_init": inspect.getsource(cls.__init__),
        "source_forward": inspect.getsource(cls.forward),
    }
