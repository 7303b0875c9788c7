"""LitModel: metrics, records of each step, optimizer and schedule of any learning problem."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from functools import lru_cache
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import MeanMetric, MetricCollection

from core.errors import UserError
from core.runs import load_checkpoint
from lit_models.own_loaders import first_inputs
from lit_models.records import StepRecords
from lit_models.schedules import make_schedule, wants_total_steps
from lit_models.trained import TrainedModel

SEEDS = 128  # steps whose random seeds are drawn together

_say = rank_zero_only(print)


class LitModel(TrainedModel):
    """A network with its metrics and its optimizer.

    A subclass writes ``training_step`` (with :meth:`record` for what the logger should see) and
    ``evaluation_step``.

    Values of a training step are written every ``trainer.log_every_n_steps``, each with its own
    optimizer step, counted from 0; see :class:`~lit_models.records.StepRecords`.

    Args:
        network: The network to train. A layer of it that has a method ``init_from_data(inputs)`` is
            shown a few thousand training inputs before training.
        optimizer: Makes the optimizer from the trainable parameters.
        lr_scheduler: Makes the schedule from the optimizer. It steps with each optimizer step, and
            an argument ``total_steps`` that is not set is given the length of training.
            ``ReduceLROnPlateau`` acts after each validation.
        metrics: Metrics of validation and test, updated with ``(preds, target)``.

    Attributes:
        monitor: The metric of validation, better the higher, that chooses the best epoch.
        outputs: Names of what ``predict_step`` returns beside the ids, if ``predict.py`` can write
            it. One output alone can be averaged over several models.
    """

    monitor = "val/accuracy"
    outputs: tuple[str, ...] = ("probabilities",)

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        metrics: MetricCollection,
    ) -> None:
        super().__init__()
        if any(isinstance(p, UninitializedParameter) for p in network.parameters()):
            raise UserError(
                f"--model.network: {type(network).__name__} has lazy layers, whose sizes are not "
                "known before the first batch; give their sizes."
            )
        # image batches arrive in channels_last, the faster layout on CPUs and tensor cores
        self.network = network.to(memory_format=torch.channels_last)
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        metrics.add_metrics({"loss": MeanMetric(nan_strategy="disable")})  # others read the device
        self.val_metrics = metrics.clone(prefix="val/")
        self.test_metrics = metrics.clone(prefix="test/")
        self.seed = torch.initial_seed()  # the run's seed, as seed_everything left it
        self.trained_steps = 0  # optimizer steps in the checkpoint this model was read from
        self.continued = False  # training goes on from that checkpoint
        self.validated: dict[str, float] = {}  # in the training that is continued
        self.has_weights = False  # of another run, see `init_from`
        self.records = StepRecords()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if step := vars(cls).get("training_step"):
            # Lightning asks for it at every step, and finding it out is slow
            step.__signature__ = signature(step)

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning sets this one some forty times a step, and a module looks for what it is first
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.network(*inputs)

    def init_from(self, checkpoint: Path) -> None:
        """Begin training with the weights of a checkpoint.

        Raises:
            UserError: It cannot be read, or its network is another one.
        """
        self.load_state_dict(load_checkpoint(checkpoint)["state_dict"])
        self.has_weights = True

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        """Load as torch does.

        Raises:
            UserError: The weights are those of another network.
        """
        try:
            return super().load_state_dict(*args, **options)
        except RuntimeError as error:
            _, first, *_ = [*str(error).splitlines(), str(error)]
            reason = first.strip()
            raise UserError(f"the weights are those of another network: {reason}") from error

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.datamodule:
            self.check_first_loss()
        elif stage == "fit":
            self.init_from_data()

    def init_from_data(self) -> None:
        """Show a few thousand training inputs to the layers that begin from data."""
        modules: Iterable[Any] = self.network.modules()
        layers = [layer for layer in modules if hasattr(layer, "init_from_data")]
        if layers and not self.has_weights:
            device = self.trainer.strategy.root_device  # where the network is not yet
            data = self.datamodule
            inputs = data.training_inputs(5000) if data else first_inputs(self.trainer, 5000)
            inputs = [x.to(device) for x in inputs]
            for layer in layers:
                layer.init_from_data(*inputs)

    def check_first_loss(self) -> None:
        """Compute the loss of a few samples before anything is trained.

        Raises:
            UserError: The network cannot read what the data module gives.
        """
        data, trained = self.data, self.training
        few = max(4, self.trainer.world_size)
        batch = next(iter(data.make_loader(tuple(t[:few] for t in data.splits["train"]), "train")))
        try:
            self.init_from_data()
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                self.eval().training_step(batch, 0)
        except UserError:
            raise
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            shapes = ", ".join(f"{tuple(t.shape)} {str(t.dtype)[6:]}" for t in batch)
            raise UserError(
                f"{type(self).__name__} with {type(self.network).__name__} cannot be trained on "
                f"{type(data).__name__}, whose batches are {shapes}: {str(error).splitlines()[0]}; "
                "--debug shows where."
            ) from error
        finally:
            self.train(trained)
            self.records.pending.clear()

    # Training

    def on_train_batch_start(self, batch: list[Tensor], batch_idx: int) -> None:
        # Dropout is keyed by the step: a resumed run draws what an uninterrupted one would.
        block, place = divmod(batch_idx, SEEDS)
        seed = _step_seeds(self.seed, self.current_epoch, self.global_rank, block)[place]
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index].manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)

    def record(self, **values: Tensor) -> None:
        """Keep scalars of this training step for the loggers, as ``train/<name>``."""
        self.records.pending.append((self.global_step, values))

    def add_to_rows(self, rows: Mapping[int, Mapping[str, float]]) -> None:
        """Let values of optimizer steps go to the loggers together with the records of these steps.

        For callbacks: a row costs a logger about as much as all that is in it.
        """
        self.records.add(rows)

    @property
    def latest(self) -> dict[str, float]:
        """Values of training that were read last."""
        return self.records.latest

    def on_train_batch_end(self, outputs: Any, batch: list[Tensor], batch_idx: int) -> None:
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.trainer.is_last_batch or (every and self.global_step % every == 0):
            self.flush_records()

    def on_train_epoch_end(self) -> None:
        self.flush_records()  # max_steps may end an epoch before its last batch

    def flush_records(self, *, alone: bool = False) -> None:
        """Write the kept values; the one device read of all these steps.

        Args:
            alone: Do not average over the processes, because the others may not be listening.
        """
        self.records.flush(self.trainer, alone=alone)

    # Validation and test

    @abstractmethod
    def evaluation_step(self, batch: list[Tensor]) -> dict[str, Tensor]:
        """Outputs of one batch without gradient.

        ``loss``, ``preds`` and their ``target``, and what callbacks may use.
        """

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, self.val_metrics)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, self.test_metrics)

    def _evaluate(self, batch: list[Tensor], metrics: MetricCollection) -> dict[str, Tensor]:
        outputs = self.evaluation_step(batch)
        target = outputs["target"]
        # MeanMetric ignores weights under nan_strategy="disable": one value for each sample instead
        losses = outputs["loss"].expand(len(target))
        if len(target) == 0:  # a batch of text whose parts have no target of their own
            return outputs
        # each metric takes from these what its update() names
        metrics.update(preds=outputs["preds"], target=target, value=losses)
        return outputs

    def on_validation_epoch_end(self) -> None:
        values = self.compute_metrics(self.val_metrics)
        self.log_dict(values, sync_dist=True, reduce_fx="max")  # of equals: a mean might round
        if self.trainer.state.fn != "fit" or self.trainer.sanity_checking:
            return
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, ReduceLROnPlateau) and config.monitor in values:
                config.scheduler.step(values[config.monitor])

    def on_test_epoch_end(self) -> None:
        values = self.compute_metrics(self.test_metrics)
        # a test has no step of its own: it belongs to the checkpoint's, which rank 0 has read
        if step := self.trainer.strategy.broadcast(self.trained_steps):
            values["step"] = torch.tensor(float(step), device=self.device)
        self.log_dict(values, sync_dist=True, reduce_fx="max")

    def compute_metrics(self, metrics: MetricCollection) -> dict[str, Tensor]:
        """Compute the metrics of an epoch, the same in all processes, and reset them."""
        values = metrics.compute()
        metrics.reset()
        return values

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.flush_records()  # what the checkpoint has seen, the loggers have seen
        metrics = self.trainer.callback_metrics
        fresh = {k: v.item() for k, v in metrics.items() if k.startswith("val/")}
        checkpoint["metrics"] = self.validated | fresh
        if self.datamodule is None:
            return
        checkpoint["samples_per_step"] = self.samples_per_step
        checkpoint["data_digest"] = self.data.digest
        if self.data.split_digest:
            checkpoint["split"] = self.data.split_digest
            checkpoint["val_samples"] = len(self.data.splits["val"][-1])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.trained_steps = max(0, checkpoint["global_step"] - 1)  # steps are counted from 0
        if self.datamodule is None:
            self.continued = self.fitting
            return
        split = self.data.split_digest  # empty in a test, which reads other samples
        if split and split != checkpoint.get("split"):
            raise UserError(
                "the run was trained with other folds than its data have now: samples have come, "
                "gone or changed their class; restore them, or train a new run."
            )
        if not self.fitting:
            return
        self.continued, self.validated = True, checkpoint["metrics"]
        digest = self.data.digest
        if digest and checkpoint.get("data_digest", digest) != digest:
            rank_zero_warn("the data are others than when the checkpoint was written.")
        samples = checkpoint.get("samples_per_step", self.samples_per_step)
        if samples != self.samples_per_step:
            raise UserError(
                f"the run takes optimizer steps of {samples} samples, not of "
                f"{self.samples_per_step}; choose --data.batch_size and "
                "--trainer.accumulate_grad_batches so that the product with the number of "
                "processes stays, or begin a new run with --init_from."
            )
        if self.lr_scheduler is None or not wants_total_steps(self.lr_scheduler):
            return  # its length is typed, or it has none
        for schedule in checkpoint["lr_schedulers"]:
            planned = schedule.get("total_steps", self.total_steps)
            if planned != self.total_steps:
                raise UserError(
                    f"the run's schedule is planned for {planned} steps, not for "
                    f"{self.total_steps}; train a new run, or restore epochs and batch size."
                )

    # Optimizer

    def configure_optimizers(self) -> Any:
        try:
            optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        except (TypeError, ValueError) as error:  # as torch's Muon, which takes matrices alone
            raise UserError(f"--model.optimizer: {error}") from error
        if self.lr_scheduler is None:
            return optimizer
        schedule = make_schedule(
            self.lr_scheduler, optimizer, self.total_steps, recorded=self.continued
        )
        name = type(schedule).__name__
        if isinstance(schedule, ReduceLROnPlateau):
            monitor = getattr(schedule, "monitor", self.monitor)  # Lightning's class has its own
            if monitor == self.monitor and schedule.mode == "min":
                raise UserError(
                    f"{name} would lower the learning rate while {monitor} gets better; set "
                    "--model.lr_scheduler.mode=max."
                )
            _say(f"{name} watches {monitor} of each validation, {schedule.mode}imum is best.")
            # Lightning's turn would come after last.ckpt, and a resumed run would miss it
            turn = {"monitor": monitor, "frequency": 10**9}
            return [optimizer], [{"scheduler": schedule, **turn}]
        if not hasattr(schedule, "total_steps") and self.datamodule:
            _say(f"{name} acts with every optimizer step, {self.steps_of_epoch(0)} in an epoch.")
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training; -1 if it has no end.

        ``trainer.estimated_stepping_batches`` would say the same, but it drops the loader's state
        when a run is resumed (Lightning-AI/pytorch-lightning#20550), and does not know of
        accumulation that changes.
        """
        trainer = self.trainer
        if self.datamodule is None:
            steps = trainer.estimated_stepping_batches
            return -1 if steps == float("inf") else int(steps)
        if trainer.max_epochs in (None, -1):
            return trainer.max_steps
        steps = sum(map(self.steps_of_epoch, range(trainer.max_epochs)))
        return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)

    def steps_of_epoch(self, epoch: int) -> int:
        batches = len(self.data.train_dataloader())
        limit = self.trainer.limit_train_batches  # a number of batches or a share of them
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        return -(-batches // self.accumulated(epoch))

    def accumulated(self, epoch: int) -> int:
        """Batches of an optimizer step."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, GradientAccumulationScheduler):
                return callback.get_accumulate_grad_batches(epoch)
        return self.trainer.accumulate_grad_batches

    @property
    def samples_per_step(self) -> int:
        """Samples of all processes in an optimizer step of the first epoch."""
        loader = self.data.train_dataloader()
        return loader.batch_size * self.trainer.world_size * self.accumulated(0)


@lru_cache(maxsize=1)  # those of the steps that are being trained
def _step_seeds(*key: int) -> list[int]:
    """Seeds of ``SEEDS`` steps: to make one alone takes half as long."""
    return np.random.SeedSequence(key).generate_state(SEEDS).tolist()
