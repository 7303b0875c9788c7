"""Base of all data sets: loaders for each stage, a fixed split, and a submission format."""

import hashlib
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any, Self

import torch
from lightning import LightningDataModule
from torch import Tensor

from core.errors import UserError
from core.submission import Submission
from datamodules.exclusion import are_left_in, say_left_out
from datamodules.folds import assign_folds, check_folds, split_digest
from datamodules.loaders.resident import ResidentLoader, SampleId, Stage

IGNORED = -100  # target of a step that counts for nothing, such as padding; a loss leaves it out


Tensors = tuple[Tensor, ...]  # (*inputs, target) or (*inputs, id), each (N, ...)


class BaseDataModule(LightningDataModule):
    """Keeps each split as tensors and serves them from the training device, if they fit there.

    A subclass fills in the three readers ``read_train``, ``read_test`` and ``read_predict``; each
    is called only by the stage that needs it, so the test split is touched by ``test`` alone.

    Args:
        data_dir: Root folder of all data sets.
        batch_size: Samples in a training batch of one process.
        eval_batch_size: Samples in a batch of validation, test and prediction.
        val_size: Training samples kept for validation by one fixed split; 0 trains on all of them.
        exclude: Text file of samples that are not trained on, an id a line, as ``spikes.jsonl``
            names them; the splits stay as they are. In the record of a run, the ids themselves.
        folds: Number of parts of the labelled samples, each with the same share of every class, of
            which one takes the place of ``val_size``.
        fold: The part for validation, counted from 0.
    """

    class_names: tuple[str, ...]
    copies = 1  # training samples side by side that are made of one original
    competition: str | None = None  # Kaggle's name of the competition these predictions are for
    finds_classes = False  # are they those that the data have? A checkpoint knows them then

    def __init__(
        self,
        data_dir: str = "data",
        batch_size: int = 512,
        eval_batch_size: int = 1000,
        val_size: int = 0,
        exclude: str | None = None,
        folds: int | None = None,
        fold: int | None = None,
    ) -> None:
        super().__init__()
        require_at_least(1, batch_size=batch_size, eval_batch_size=eval_batch_size)
        require_at_least(0, val_size=val_size)
        self.data_dir = Path(data_dir)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        check_folds(folds, fold)
        self.folds = folds
        self.fold = fold or 0
        self.val_size = 0 if folds else val_size
        self.exclude = exclude
        self.seed = torch.initial_seed()  # the run's seed, as seed_everything left it
        self.splits: dict[str, Tensors] = {}
        self._train_loader: ResidentLoader | None = None
        if not self.validates:  # an empty loader would be warned of
            setattr(self, "val_dataloader", None)  # noqa: B010  a method, to the type checker
        # with more processes than batches to predict, some have none, which Lightning would refuse
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.digest = ""  # SHA-256 of what the last stage read, for the records
        self.ids: Sequence[SampleId] = ()  # of what was read; where nothing sets them, its numbers
        self.train_ids: list[SampleId] = []  # of the training part; none if it is drawn anew
        self.split_digest = ""  # of all folds, see `folds`
        self.predicts_val = False  # see `held_out`

    def __str__(self) -> str:
        read = ", ".join(f"{len(part[-1]):,} {name}" for name, part in self.splits.items())
        return f"{type(self).__name__}: {read or 'nothing read yet'}"

    @property
    def validates(self) -> bool:
        """True if there is a validation part."""
        return bool(self.val_size or self.folds)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def state_dict(self) -> dict[str, Any]:
        return {"class_names": list(self.class_names)} if self.finds_classes else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["class_names"] != list(self.class_names):
            raise UserError(
                f"the run was trained on {', '.join(state['class_names'])}, but {self.data_dir} "
                f"has {', '.join(self.class_names)}; train a new run."
            )

    def read_train(self) -> Tensors:
        """All training samples with their targets, (*inputs, target)."""
        raise UserError(f"{type(self).__name__} has no training data; train on another set.")

    def read_test(self) -> Tensors:
        """The test samples with their targets, (*inputs, target)."""
        raise UserError(f"{type(self).__name__} has no labelled test set; use predict.py on it.")

    def read_predict(self) -> Tensors:
        """The samples to predict with their ids, (*inputs, id)."""
        raise UserError(f"{type(self).__name__} has nothing to predict.")

    def read_given(self, given: Any) -> Tensors:
        """Samples that somebody has at hand, (*inputs, id), as the network reads them.

        Args:
            given: A tensor (N, ...), or several in a tuple; where a subclass says so, images, names
                or lines of text as people have them.
        """
        inputs = given if isinstance(given, tuple) else (given,)
        if not inputs or not all(isinstance(part, Tensor) for part in inputs):
            raise UserError(
                f"{type(self).__name__} takes the tensors that its network reads, got a "
                f"{type(given).__name__}."
            )
        return *inputs, torch.arange(len(inputs[0]))

    def submission(self) -> Submission:
        """The form in which predictions are handed in."""
        return Submission(labels=self.class_names)

    def setup(self, stage: str) -> None:
        if stage in ("fit", "validate"):
            train, val = self.read_parts()
            parts = self.left_in(self.training_parts(train), self.ids)
            self.train_ids = [self.ids[i] for p in parts.values() for i in p[-1].tolist()]
            self.splits |= {name: p[:-1] for name, p in (parts | {"val": val}).items()}
            self._train_loader = None
        elif stage == "test":
            self.splits["test"] = self.read_test()
        elif self.predicts_val:
            _, (*inputs, target, numbers) = self.read_parts()
            self.splits |= {"val": (*inputs, target), "predict": (*inputs, numbers)}
        else:
            self.splits["predict"] = self.read_predict()

    def held_out(self, folds: int, fold: int) -> Self:
        """A copy that predicts the samples of a fold, by their numbers."""
        part = copy(self)
        part.splits, part.folds, part.fold = {}, folds, fold
        part.predicts_val = True
        return part

    def read_parts(self) -> tuple[Tensors, Tensors]:
        """The training and the validation part, and last which sample is which, by its number."""
        read = self.read_train()
        numbers = torch.arange(len(read[-1]))
        self.ids = self.ids or range(len(numbers))
        return self.split((*read, numbers))

    def split(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        """The training and the validation part of tensors (N, ...); numbers follow the targets."""
        if self.folds:
            fold_of = assign_folds(tensors[-2], self.folds, self.copies)
            self.split_digest = split_digest(self.ids, tensors[-2], fold_of)
            train, val = fold_of != self.fold, fold_of == self.fold
        else:
            train, val = self.split_by_size(len(tensors[-1]))
        return tuple(t[train] for t in tensors), tuple(t[val] for t in tensors)

    def split_by_size(self, samples: int) -> tuple[Tensor, Tensor]:
        """Numbers of training and of ``val_size`` validation samples, which no seed changes."""
        if self.val_size >= samples:
            raise UserError(f"val_size is {self.val_size}, but there are {samples} samples in all.")
        order = torch.randperm(samples, generator=torch.Generator().manual_seed(0))
        return order[: samples - self.val_size], order[samples - self.val_size :]

    def training_parts(self, train: Tensors) -> dict[str, Tensors]:
        """Hook: what of the training part is trained on, by split; last are sample numbers."""
        return {"train": train}

    def left_in(self, parts: dict[str, Tensors], ids: Sequence[SampleId]) -> dict[str, Tensors]:
        """The parts without the samples to exclude; all else is chosen as if there were none."""
        if self.exclude is None:
            return parts
        left_in = torch.tensor(are_left_in(self.exclude, ids))
        kept = {name: tuple(t[left_in[p[-1]]] for t in p) for name, p in parts.items()}
        count = sum(len(p[-1]) - len(kept[name][-1]) for name, p in parts.items())
        say_left_out(self.exclude, count, len(kept["train"][-1]))
        return kept

    def identify(self, epoch: int, rows: list[int]) -> list[SampleId] | None:
        """Hook: ids of the training samples at some rows of an epoch; None if there are none."""
        return [self.train_ids[row] for row in rows] if self.train_ids else None

    def loader_arguments(self, stage: Stage) -> dict[str, Any]:
        size = self.batch_size if stage == "train" else self.eval_batch_size
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        return {
            "batch_size": size,
            "stage": stage,
            "seed": self.seed,
            "rank": rank,
            "world_size": world_size,
        }

    def make_loader(self, tensors: Tensors, stage: Stage) -> ResidentLoader:
        """Hook: the loader of one split; it makes batches where its tensors are."""
        return ResidentLoader(tensors, **self.loader_arguments(stage))

    @property
    def device(self) -> torch.device:
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")

    def resident(self, split: str, stage: Stage) -> ResidentLoader:
        return self.make_loader(self.splits[split], stage).to(self.device)

    def training_inputs(self, count: int) -> list[Tensor]:
        """The first ``count`` training inputs as the network sees them, without augmentation."""
        head = tuple(t[:count] for t in self.splits["train"])
        loader = self.make_loader(head, "predict")
        return loader.batch(torch.arange(len(head[-1])))[:-1]

    def training_batch(self, epoch: int, batch_idx: int) -> list[Tensor]:
        """Make a training batch of this process again, ``[*inputs, target]`` with its augmentation.

        Args:
            epoch: Epoch of the batch, counted from 0.
            batch_idx: Its number in the epoch, counted from 0.

        Raises:
            UserError: An epoch has no such batch.
        """
        loader = copy(self.train_dataloader())  # the loader itself may be in the midst of an epoch
        if not 0 <= batch_idx < len(loader):
            raise UserError(
                f"batch_idx must be from 0 to {len(loader) - 1}, the last batch of an epoch, "
                f"got {batch_idx}."
            )
        loader.set_epoch(epoch)
        return loader.batch(loader.batch_indices()[batch_idx])

    def train_dataloader(self) -> ResidentLoader:
        if self._train_loader is None:  # one copy on the device, however often it is asked for
            self._train_loader = self.resident("train", "train")
            overfitting = self.trainer and self.trainer.overfit_batches  # type: ignore[attr-defined]
            self._train_loader.always_the_same = bool(overfitting)
            self._train_loader.identify = self.identify
        return self._train_loader

    def val_dataloader(self) -> ResidentLoader:
        return self.resident("val", "evaluate")

    def test_dataloader(self) -> ResidentLoader:
        return self.resident("test", "evaluate")

    def predict_dataloader(self) -> ResidentLoader:
        return self.resident("predict", "predict")


def require_at_least(least: int, **values: float | None) -> None:
    """Refuse settings, by their names, that are smaller; None is not set.

    Raises:
        UserError: One is.
    """
    for name, value in values.items():
        if value is not None and value < least:
            raise UserError(f"{name} must be at least {least}, got {value}.")


def texts_of(given: Any) -> list[str]:
    """A list of texts as it is.

    Raises:
        UserError: It is none, such as a single text, which would be taken letter by letter.
    """
    texts = [] if isinstance(given, str) else list(given)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"predict takes a list of texts, got {str(given)[:100]!r}.")
    return texts


def digest(*tensors: Tensor) -> str:
    """SHA-256 over the values of tensors."""
    sha256 = hashlib.sha256()
    for tensor in tensors:
        sha256.update(tensor.contiguous().numpy().data)
    return sha256.hexdigest()
