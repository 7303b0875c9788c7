"""One sequence of tokens in, another one out. Dimensions: B batch, S source, T target tokens."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from core.errors import UserError
from core.runs import Run, load_checkpoint
from datamodules.base import IGNORED
from datamodules.text.subwords import BEGIN, END
from lit_models.base import LitModel
from lit_models.networks import Hypotheses, beam_search, with_copy_bias


class LitSeq2Seq(LitModel):
    """A source in, a target out, learned by predicting each token of the target from those before.

    In validation and test whole targets are written, and the data say how good they are. Inside
    ``fit`` that is done greedily, because a wide beam would cost as much as training.

    Args:
        network: Has ``forward(source, target_in, lengths)``, logits (B, T, V), and ``start`` and
            ``step`` as :class:`~lit_models.networks.Transformer`.
        optimizer: Makes the optimizer from the trainable parameters.
        vocab_size: Number of tokens V.
        lr_scheduler: Makes the schedule from the optimizer.
        change_weight: Factor in the loss on each token that does not follow its predecessor
            anywhere in the source; ``train/loss`` is the loss without it.
        beam_width: Hypotheses kept while a target is written; 1 is greedy.
        change_penalty: Cost of each changed token in log probability, see
            :func:`~lit_models.networks.beam_search.with_copy_bias`.
        n_best: Hypotheses of a prediction.
        pretrained: Run folder or checkpoint, such as that of a masked language model, whose weights
            the network starts from where names and shapes are the same. A run that is continued or
            used does not need it any more.
    """

    monitor = "val/f05"
    outputs = ("tokens", "scores")

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerCallable,
        vocab_size: int,
        lr_scheduler: LRSchedulerCallable | None = None,
        change_weight: float = 1.0,
        beam_width: int = 4,
        change_penalty: float = 0.0,
        n_best: int = 1,
        pretrained: str | None = None,
    ) -> None:
        accuracy = MulticlassAccuracy(vocab_size, average="micro", validate_args=False)
        metrics = MetricCollection({"token_accuracy": accuracy})
        super().__init__(network, optimizer, lr_scheduler, metrics)
        if not change_weight > 0:
            raise UserError(f"change_weight must be positive, got {change_weight}.")
        if change_penalty < 0:
            raise UserError(f"change_penalty must not be negative, got {change_penalty}.")
        for name, value in (("beam_width", beam_width), ("n_best", n_best)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}.")
        self.change_weight = change_weight
        self.beam_width = beam_width
        self.change_penalty = change_penalty
        self.n_best = n_best
        self.pretrained = pretrained
        self._generated: list[tuple[Tensor, Tensor]] = []  # ids (B,) and tokens (B, T) of an epoch

    def on_fit_start(self) -> None:
        if self.pretrained and not self.trainer.ckpt_path:  # a resumed run has its own by now
            merges = self.data.state_dict().get("merges")
            loaded = load_matching_weights(self.network, self.pretrained, merges)
            total = len(self.network.state_dict())
            rank_zero_only(print)(f"{loaded} of {total} weights are those of {self.pretrained}")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        source, lengths, target_in, target = batch
        logits = self(source, target_in, lengths)  # (B, T, V)
        losses = F.cross_entropy(
            logits.flatten(0, 1),
            target.flatten(),
            ignore_index=IGNORED,
            reduction="none",
        ).view_as(target)
        counted = target != IGNORED
        changes = _changes(source, target_in, target) & counted
        right = logits.argmax(2) == target
        count = counted.sum().clamp_min(1)
        loss = losses.sum() / count
        self.record(
            loss=loss.detach(),
            token_accuracy=right.sum() / count,
            # of the tokens that correct something
            change_accuracy=(right & changes).sum() / changes.sum().clamp_min(1),
        )
        if self.change_weight == 1:
            return loss
        weights = torch.where(changes, self.change_weight, 1.0) * counted
        return (losses * weights).sum() / weights.sum().clamp_min(1)

    def evaluation_step(self, batch: list[Tensor]) -> dict[str, Tensor]:
        source, lengths, target_in, ids, target = batch
        counted = target != IGNORED
        logits = self(source, target_in, lengths).float()[counted]
        target = target[counted]
        generated = self.generate(source, lengths, 1 if self.fitting else self.beam_width)
        self._generated.append((ids, generated.tokens[:, 0]))
        return {
            "loss": F.cross_entropy(logits, target),
            "preds": logits.argmax(1),
            "target": target,
        }

    def compute_metrics(self, metrics: MetricCollection) -> dict[str, Tensor]:
        generated = [
            (i, tokens)
            for ids, rows in self._generated
            for i, tokens in zip(ids.tolist(), rows.tolist(), strict=True)
        ]
        self._generated.clear()
        data: Any = self.datamodule
        scores = data.score(dict(_gather(generated))) if data else {}  # they need the texts
        return super().compute_metrics(metrics) | {
            f"{metrics.prefix}{name}": torch.tensor(value) for name, value in scores.items()
        }

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ids (B,), the n best hypotheses (B, n_best, max_length) of tokens, scores (B, n_best)."""
        source, lengths, ids = batch
        found = self.generate(source, lengths, max(self.beam_width, self.n_best), self.n_best)
        network: Any = self.network
        space = network.max_length - found.tokens.shape[2]  # batches are put together
        return ids, F.pad(found.tokens, (0, space), value=END).int(), found.scores

    def generate(
        self, source: Tensor, lengths: Tensor, beam_width: int, n_best: int = 1
    ) -> Hypotheses:
        """Search the best targets of sources (B, S)."""
        begin = torch.full_like(lengths, BEGIN)
        network: Any = self.network
        state, step = network.start(source, lengths), network.step
        if self.change_penalty:
            step = with_copy_bias(step, self.change_penalty)
            state = state, torch.cat([begin[:, None], source], 1)
        longest = min(source.shape[1] * 3 // 2 + 8, network.max_length)
        return beam_search(step, state, begin, END, beam_width, longest, n_best)


def load_matching_weights(network: nn.Module, source: str, merges: str | None) -> int:
    """Load the weights of another run that have the same names and shapes.

    Args:
        network: The network that gets them.
        source: Run folder or checkpoint.
        merges: Subwords of the network, as ``datamodules.text.subwords`` makes them.

    Returns:
        Number of tensors loaded.

    Raises:
        UserError: There is no such run or checkpoint, it reads other subwords, or nothing fits.
    """
    path = Path(source) if Path(source).suffix == ".ckpt" else Run.find(source).checkpoint()
    checkpoint = load_checkpoint(path)
    parts = [part for part in checkpoint.values() if isinstance(part, dict)]
    if [part["merges"] for part in parts if "merges" in part] != [merges]:
        raise UserError(
            f"{path} reads other subwords than these data; train both on the same books with the "
            "same vocab_size."
        )
    theirs = checkpoint["state_dict"]
    fitting = {
        name: theirs[f"network.{name}"]
        for name, own in network.state_dict().items()
        if getattr(theirs.get(f"network.{name}"), "shape", None) == own.shape
    }
    if not fitting:
        raise UserError(
            f"nothing in {path} has the name and the shape of a weight of this network; give it "
            "the sizes of the pretrained one."
        )
    network.load_state_dict(fitting, strict=False)
    return len(fitting)


def _changes(source: Tensor, target_in: Tensor, target: Tensor) -> Tensor:
    """Mask (B, T) of the target's tokens that never follow their predecessor in the source.

    Args:
        source: (B, S), with its end.
        target_in: (B, T), the predecessor of each token of the target.
        target: (B, T).
    """
    before = torch.cat([target_in[:, :1], source[:, :-1]], 1)  # both begin alike
    pairs = (before[:, None] == target_in[:, :, None]) & (source[:, None] == target[:, :, None])
    return ~pairs.any(2)


def _gather(items: list[Any]) -> list[Any]:
    """Gather the items of all processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return items
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]
