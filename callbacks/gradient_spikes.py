"""Which step spiked, which parameter was behind it, what the update did and what followed.

The file needs torch and lightning alone and works by itself in any Lightning project.
Dimensions: S optimizer steps, P parameters (tensors) of one optimizer.
"""

import io
import itertools
import json
import math
import os
from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

# Is the next value of a signal a spike?

Kind = Literal["normal", "warning", "spike", "level_shift", "nonfinite", "nonpositive"]
EVIDENCE = ("kind", "score", "limit", "threshold", "center", "scale", "raised")

WARM_UP = 8  # values before the first decision
PRIOR_SCALE, PRIOR_WEIGHT, PRIOR_UNTIL = 0.35, 8, 32  # a young stream is taken for a noisy one
MIN_SCALE = 0.05  # a smooth signal may still rise by 25 %: exp(4.5 * 0.05)
NORMAL_Q90, NORMAL_IQR = 1.2816, 1.349  # of the standard normal distribution
TAIL_WINDOW, TAIL_SHARE, TAIL_MIN = 512, 0.05, 64
TAIL_ODDS = math.log(TAIL_SHARE / 1e-4)  # from the edge of the tail to one value in 10 000
TAIL_NORMAL = 4.5  # score so extrapolated that normal noise seldom passes
WARNING = 2 / 3  # of the limit
SHIFT_AFTER = 10  # raised values in a row
STEADY_AFTER, STEADY_RANGE = 6, 3.0  # values, scales
RATE_STEPS, RATE_FACTOR = 10, 2.0


class SortedWindow:
    """The last ``size`` values, in the order they came and in ascending order."""

    def __init__(self, size: int, values: Iterable[float] = ()) -> None:
        self.values = deque(values, maxlen=size)
        self.ordered = sorted(self.values)

    def push(self, value: float) -> None:
        if len(self.values) == self.values.maxlen:
            del self.ordered[bisect_left(self.ordered, self.values[0])]
        self.values.append(value)
        insort(self.ordered, value)

    def quantiles(self, *shares: float) -> list[float]:
        last = len(self.ordered) - 1
        return [self.ordered[int(share * last + 0.5)] for share in shares]

    def median(self) -> float:
        return self.ordered[len(self.ordered) // 2]


class SpikeDetector:
    """Say of every value of a positive signal (gradient norm, loss) whether it is a spike.

    Values are compared on the logarithmic scale, where the noise of such signals is about the same
    at every level. The level is the median of the last 24 values. The height of a value above it
    is compared with the last 64 heights: their median, if positive, is how far the level lags
    behind a rising signal; their quantiles give the scale. A spike is more than 4.5 scales above
    level and lag. Where the last 512 scores have heavier tails than normal noise, that limit rises
    in proportion: the mean excess of their outer 5 %, both sides averaged, is extrapolated to one
    value in 10 000 (peaks over threshold, as in Siffer et al., KDD 2017).

    Spikes are kept out of all these statistics, and drops as large are kept out of scale and tails,
    with two exceptions. Raised values in a row, the first of them a spike, are a new level when
    there are ten, or six as close together as ordinary noise: the last of them is a
    ``level_shift``. What would be a spike on more than 5 % of the last 512 steps is ordinary. NaN
    and infinities are spikes; they, zeros and negative values are never stored.

    These attributes tell how the last value was judged; one that is not finite or not positive
    sets only ``kind`` and ``score``:
        kind: ``spike`` or ``nonfinite`` if it is a spike, else ``normal``, ``warning`` (above two
            thirds of the limit), ``level_shift`` or ``nonpositive``.
        score: Height above level and lag, in scales; 0 for the first 8 values.
        limit: Score above which a value is a spike.
        threshold: The same in the signal's units; infinite for the first 8 values.
        center: Level and lag in the signal's units; NaN before the first value.
        scale: Robust standard deviation of the logarithm.
        raised: Values in a row above the warning line, counted from a spike on. The
            ``level_shift`` is the last of this many steps at the new level, and ``center`` and
            ``threshold`` are those of the new level.

    Args:
        window: Steps the scale is taken from, at least 16; the level takes 3/8 of them.
        threshold: Limit for normal noise, in robust standard deviations.

    Raises:
        ValueError: If ``window`` is below 16, or ``threshold`` is not positive and finite.
    """

    def __init__(self, window: int = 64, threshold: float = 4.5) -> None:
        if window < 16:
            raise ValueError(f"window must be at least 16 steps, got {window}.")
        if not 0 < threshold < math.inf:
            raise ValueError(f"threshold must be positive and finite, got {threshold}.")
        self.window = window
        self.normal_limit = float(threshold)

        self.kind: Kind = "normal"
        self.score = 0.0
        self.limit = self.normal_limit
        self.threshold = math.inf
        self.center = math.nan
        self.scale = PRIOR_SCALE
        self.raised = 0

        self._levels = SortedWindow(window * 3 // 8)  # logarithms
        self._heights = SortedWindow(window)
        self._scores = SortedWindow(TAIL_WINDOW)
        self._run: list[float] = []  # logarithms of the raised values
        self._steps = 0
        self._exceeded: deque[int] = deque(maxlen=int(TAIL_SHARE * TAIL_WINDOW))  # at these steps
        self._rate_steps = 0  # for which the scale stays inflated

    def update(self, value: float) -> bool:
        """Judge the next value of the signal and return whether it is a spike."""
        value = float(value)
        self._steps += 1
        if not math.isfinite(value):
            self.kind, self.score = "nonfinite", math.inf
            return True
        if value <= 0:
            self.kind, self.score = "nonpositive", 0.0
            return False

        log = math.log(value)
        level = self._levels.median() if self._levels.ordered else log
        height = log - level
        if len(self._heights.values) < WARM_UP:
            self.kind, self.score, self.center = "normal", 0.0, exp(level)
            self._levels.push(log)
            self._heights.push(height)
            return False

        lag, self.scale = self._lag_and_scale()
        self.score = (height - lag) / self.scale
        self.limit = self.normal_limit * self._tail_factor()
        self.center = exp(level + lag)
        self.threshold = exp(level + lag + self.limit * self.scale)
        self.kind = self._judge(log)
        if self.kind == "spike":
            return True
        if self.kind == "level_shift":
            self._levels = SortedWindow(self.window * 3 // 8, self._run)
            self._run = []
            level = self._levels.median()  # of the new one, as center and threshold are
            self.center, self.threshold = exp(level), exp(level + self.limit * self.scale)
            self._scores.push(self.score)
            return False
        self._levels.push(log)
        if self.score > -self.limit:  # a drop moves the level and says nothing about the noise
            self._heights.push(height)
            self._scores.push(self.score)
        return False

    def rate_changed(self) -> None:
        """Say that the learning rate has jumped: the scale is doubled for the next ten values."""
        self._rate_steps = RATE_STEPS

    def _lag_and_scale(self) -> tuple[float, float]:
        low, lower, median, upper, high = self._heights.quantiles(0.1, 0.25, 0.5, 0.75, 0.9)
        scale = max(
            (high - median) / NORMAL_Q90,
            (median - low) / NORMAL_Q90,
            (upper - lower) / NORMAL_IQR,
            MIN_SCALE,
        )
        count = len(self._heights.ordered)
        if count < PRIOR_UNTIL:
            squares = count * scale**2 + PRIOR_WEIGHT * PRIOR_SCALE**2
            scale = math.sqrt(squares / (count + PRIOR_WEIGHT))
        if self._rate_steps:
            self._rate_steps -= 1
            scale *= RATE_FACTOR
        return max(0.0, median), scale

    def _tail_factor(self) -> float:
        """How much further the scores reach than those of normal noise, at least 1."""
        scores = self._scores.ordered
        if len(scores) < TAIL_MIN:
            return 1.0
        count = int(TAIL_SHARE * len(scores)) + 1
        low, high = scores[:count], scores[-count:]
        edge = (high[0] - low[-1]) / 2
        excess = (sum(high) - sum(low)) / (2 * count) - edge
        return max(1.0, (edge + excess * TAIL_ODDS) / TAIL_NORMAL)

    def _judge(self, log: float) -> Kind:
        exceeds = self.score > self.limit
        warning = self.score > self.limit * WARNING
        if exceeds or (warning and self._run):
            self._run.append(log)
        else:
            self._run = []
        self.raised = len(self._run)
        if self._at_new_level():
            return "level_shift"
        if exceeds and not self._too_often():
            return "spike"
        return "warning" if warning else "normal"

    def _at_new_level(self) -> bool:
        if len(self._run) < STEADY_AFTER:
            return False
        steady = max(self._run) - min(self._run) < STEADY_RANGE * self.scale
        return steady or len(self._run) >= SHIFT_AFTER

    def _too_often(self) -> bool:
        """Note that this step exceeds the limit; True if more than 5 % of the last 512 did."""
        full = len(self._exceeded) == self._exceeded.maxlen
        oldest = self._exceeded[0] if full else -TAIL_WINDOW
        self._exceeded.append(self._steps)
        return self._steps - oldest < TAIL_WINDOW

    def state_dict(self) -> dict[str, Any]:
        """What was learned from the signal, in lists, numbers and strings."""
        return {name: getattr(self, name) for name in EVIDENCE} | {
            "levels": list(self._levels.values),
            "heights": list(self._heights.values),
            "scores": list(self._scores.values),
            "run": list(self._run),
            "steps": self._steps,
            "exceeded": list(self._exceeded),
            "rate_steps": self._rate_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`, under the arguments of this detector."""
        for name in EVIDENCE:
            setattr(self, name, state[name])
        self._levels = SortedWindow(self.window * 3 // 8, state["levels"])
        self._heights = SortedWindow(self.window, state["heights"])
        self._scores = SortedWindow(TAIL_WINDOW, state["scores"])
        self._run = list(state["run"])
        self._steps = state["steps"]
        self._exceeded = deque(state["exceeded"], self._exceeded.maxlen)
        self._rate_steps = state["rate_steps"]


def exp(log: float) -> float:
    """Exponential that does not overflow: e**709 is just below the largest double."""
    return math.exp(min(log, 709.0))


# What one optimizer step does

DECOUPLED = tuple(
    getattr(torch.optim, name)
    for name in ("AdamW", "Adafactor", "Muon")
    if hasattr(torch.optim, name)
)


@dataclass
class Update:
    """What a step did, on the device; None until the step is taken."""

    norms: Tensor | None = None  # (P,) of the proposed update
    grad_norms: Tensor | None = None  # (P,) as the optimizer used them; None if nobody clips
    factors: Tensor | None = None  # (P,) by which the update was shortened; None if nobody would


class StepProbe:
    """Compares the parameters of one optimizer before and after its step, once for all callbacks.

    ``arm`` copies them on the device before the step, a hook of the optimizer compares after it. A
    gradient scaler that leaves out a step leaves the hook uncalled, so that needs no device read.

    Who wants to shorten updates adds a function to ``limits``: it is given the probe, when
    ``deltas`` and ``update.norms`` are known, and returns a factor for each parameter (P,).
    A step with all factors at 1 is left as it is, bit for bit.

    Parameters that are frozen at the start are taken in only with a new parameter group. An
    optimizer that overwrites its gradients (SGD with nesterov and foreach) shows others in
    ``update.grad_norms``.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._collect()
        self.limits: list[Callable[[StepProbe], Tensor]] = []
        self.gradients_are_clipped = False
        self.deltas: list[Tensor] = []
        self.update = Update()
        self._armed: int | None = None  # the step about to be taken
        optimizer.register_step_post_hook(self._compare)

    @classmethod
    def of(cls, optimizer: Optimizer) -> "StepProbe":
        """The probe of this optimizer."""
        probe = getattr(optimizer, "step_probe", None)
        if probe is None:
            probe = optimizer.step_probe = cls(optimizer)  # type: ignore[attr-defined]
        if len(probe.groups) < len(optimizer.param_groups):  # as in fine-tuning
            probe._collect()
        return probe

    def _collect(self) -> None:
        self.groups = [
            [p for p in group["params"] if p.requires_grad] for group in self.optimizer.param_groups
        ]
        self.params = [p for group in self.groups for p in group]
        self.before = [torch.empty_like(p) for p in self.params]

    def gradients(self) -> list[Tensor]:
        return [dense_gradient(p) for p in self.params]

    def arm(self, step: int) -> Update:
        """Copy the parameters and return what optimizer step ``step``, the next, will fill in."""
        if self._armed != step:  # an earlier one may never have been taken
            self._armed = step
            self.update = Update()
            self.copy()
        return self.update

    def copy(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.before, self.params)

    @torch.no_grad()
    def _compare(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._armed is None:
            return
        self._armed = None
        self._take_decay_off()
        self.deltas = list(torch._foreach_sub(self.params, self.before))
        self.update.norms = norms(self.deltas)
        if self.gradients_are_clipped:
            self.update.grad_norms = norms(self.gradients())
        if self.limits:
            factors = [limit(self) for limit in self.limits]
            self.update.factors = factors[0] if len(factors) == 1 else torch.stack(factors).amin(0)
            pairs = zip(self.update.factors.unbind(), self.params, strict=True)
            weights = [factor.to(parameter.dtype) for factor, parameter in pairs]
            # where the weight is 1 these end at the parameters, bit for bit
            torch._foreach_lerp_(self.before, self.params, weights)
            torch._foreach_copy_(self.params, self.before)
        self.deltas = []

    def _take_decay_off(self) -> None:
        """Decoupled weight decay is not a part of the update."""
        decoupled = isinstance(self.optimizer, DECOUPLED)
        before = iter(self.before)
        for group, params in zip(self.optimizer.param_groups, self.groups, strict=True):
            own = list(itertools.islice(before, len(params)))
            if not (group.get("decoupled_weight_decay", decoupled) and group.get("weight_decay")):
                continue
            pairs = zip(params, own, strict=True)
            decaying = [old for p, old in pairs if p.grad is not None]  # others do not decay
            if decaying:
                torch._foreach_mul_(decaying, 1 - group["lr"] * group["weight_decay"])


def dense_gradient(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros_like(parameter)
    return gradient if gradient.layout is torch.strided else gradient.to_dense()


def norms(tensors: list[Tensor]) -> Tensor:
    """L2 norms (P,) of P tensors; bfloat16 and float16 are summed in float32."""
    is_double = any(tensor.dtype is torch.float64 for tensor in tensors)
    dtype = torch.float64 if is_double else torch.float32
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=dtype))


# Values that wait on the device


class StepCallback(Callback, ABC):
    """A callback whose values of each step wait on the device until a log step.

    A subclass collects in its hooks and writes in ``flush``, which is called every
    ``trainer.log_every_n_steps``, at the end of an epoch, before a checkpoint, and when training
    ends or breaks off.
    """

    trainer: Trainer  # set when training is set up, as are module and folder
    module: LightningModule
    folder: str | None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.trainer, self.module = trainer, pl_module
        self.folder = trainer.log_dir  # Lightning broadcasts the answer: all ranks have to ask
        sharding = type(trainer.strategy).__name__
        if sharding in ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"):
            raise MisconfigurationException(
                f"{type(self).__name__} needs whole gradients, and {sharding} shards them; "
                "use the strategy ddp."
            )
        parameters = list(pl_module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            raise MisconfigurationException(
                f"{type(self).__name__} has nothing to watch: every parameter of "
                f"{type(pl_module).__name__} is frozen; set requires_grad on some."
            )
        if any(p.is_complex() for p in parameters):
            raise MisconfigurationException(
                f"{type(self).__name__} does not take complex parameters; train them as pairs of "
                "real ones with torch.view_as_real."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        watched = [StepProbe.of(optimizer).params for optimizer in trainer.optimizers]
        if not watched or not all(watched):
            raise MisconfigurationException(
                f"{type(self).__name__} has nothing to watch: an optimizer of "
                f"{type(pl_module).__name__} has no parameter to train."
            )

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.is_last_batch or (every and trainer.global_step % every == 0):
            self.flush()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.flush()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.flush()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.flush(alone=True)

    def state_dict(self) -> dict[str, Any]:
        self.flush()  # what the checkpoint has seen, the loggers have seen
        return {}

    @abstractmethod
    def flush(self, *, alone: bool = False) -> None:
        """Read and write what is pending.

        Args:
            alone: The other processes may not be listening, so do not wait for them.
        """

    def log_rows(self, rows: Mapping[int, Mapping[str, float]]) -> None:
        """Give each step its values, in rows that the module writes if it has ``add_to_rows``."""
        if add := getattr(self.module, "add_to_rows", None):
            add(rows)
            return
        for logger in self.trainer.loggers:
            for step, values in rows.items():
                logger.log_metrics(dict(values), step)


# What to do about a spike

ReactionName = Literal["log", "skip", "rollback", "stop"]


class Reaction(ABC):
    """What to do when the gradient or the loss of a step spikes, before the step is taken."""

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: B027  optional
        """Hook: training starts."""

    @abstractmethod
    def react(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Act on the spike whose gradients are in place and whose step is not yet taken."""

    def after_step(  # noqa: B027  optional
        self, trainer: Trainer, pl_module: LightningModule, calm: bool
    ) -> None:
        """Hook: a batch is finished; ``calm`` if the last steps had no spike."""

    @staticmethod
    def leave_out(optimizer: Optimizer) -> None:
        """Make the coming step change nothing.

        Gradients of zero would not do: AdamW and SGD with momentum still move, and second moments
        decay.
        """
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


class Skip(Reaction):
    """Leave the step out: parameters and optimizer state stay as they are."""

    def react(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.leave_out(optimizer)


class Stop(Reaction):
    """Leave the step out and end training, with the evidence on disk."""

    def react(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.leave_out(optimizer)
        trainer.should_stop = True


class Rollback(Reaction):
    """Go back to an earlier state and on with the next batch: the batches between are left out.

    Copies of parameters, buffers and optimizer states are kept in main memory. A spike takes the
    newest of them; further spikes, until there is a new one, take older ones, and then steps are
    only left out. The count of optimizer steps and the learning-rate schedule go on. The copies are
    not in checkpoints: a resumed run starts with none.

    Args:
        every: Optimizer steps between two copies.
        keep: Number of copies.

    Raises:
        MisconfigurationException: The copies do not fit into the free memory.
    """

    def __init__(self, every: int = 50, keep: int = 3) -> None:
        for name, value in (("every", every), ("keep", keep)):
            if value < 1:
                raise MisconfigurationException(
                    f"Rollback: {name} must be at least 1, got {value}."
                )
        self.every = every
        self.keep = keep
        # parameters and buffers, and of each optimizer the state of every parameter
        self.copies: list[tuple[dict[str, Any], list[dict[Tensor, dict[str, Any]]]]] = []
        self.next_copy = 0

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tensors = pl_module.state_dict().values()
        weights = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
        needed, free = 3 * weights * self.keep, free_memory()  # two moments, as Adam has them
        if needed > free:
            raise MisconfigurationException(
                f"rollback needs {needed / 1e9:.1f} GB of main memory for {self.keep} copies and "
                f"{free / 1e9:.1f} GB are free; keep fewer copies or use the reaction skip."
            )
        self.next_copy = trainer.global_step

    def after_step(self, trainer: Trainer, pl_module: LightningModule, calm: bool) -> None:
        if not calm or trainer.global_step < self.next_copy:
            return
        self.next_copy = trainer.global_step + self.every
        state = {k: to_host(v) for k, v in pl_module.state_dict().items()}
        optimizers: list[dict[Tensor, dict[str, Any]]] = [
            {p: {k: to_host(v) for k, v in s.items()} for p, s in o.state.items()}
            for o in trainer.optimizers
        ]
        self.copies = [*self.copies, (state, optimizers)][-self.keep :]

    @torch.no_grad()
    def react(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.leave_out(optimizer)
        if not self.copies:
            return
        state, optimizers = self.copies.pop()
        pl_module.load_state_dict(state)
        for own, saved in zip(trainer.optimizers, optimizers, strict=True):
            StepProbe.of(own).copy()  # going back is not an update
            for parameter in [p for p in own.state if p not in saved]:
                del own.state[parameter]
            for parameter, values in saved.items():
                own_state = own.state[parameter]
                for key, value in values.items():
                    moved = value.to(own_state[key].device) if isinstance(value, Tensor) else value
                    own_state[key] = moved


def to_host(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def free_memory() -> float:
    """Bytes of main memory that are to be had; infinite where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    kilobytes = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return math.inf if kilobytes is None else 1024.0 * int(kilobytes)


REACTIONS: dict[str, type[Reaction]] = {"skip": Skip, "rollback": Rollback, "stop": Stop}


# What is known about the steps of one optimizer

SIGNALS = ("gradient", "parameter", "update", "loss")
SPIKES = ("spike", "nonfinite")
RECORDED = (*SPIKES, "level_shift", "overflow")
LOSS_RATIO = 2.0  # a loss is a spike only above this multiple of its usual level
CONFIRM = 5  # optimizer steps within which the loss must spike too, for a spike to be confirmed
BEFORE = 10  # optimizer steps in which the largest update is looked for
FOLLOW = 20  # optimizer steps over which the outcome of a spike is watched

Numbers = dict[str, list[float]]  # what was read of one step, by name; empty where there was none


@dataclass
class Observation:
    """One optimizer step, as far as it is known without reading the device."""

    step: int
    epoch: int
    batches: list[int]  # indices in the epoch; several when gradients are accumulated
    optimizer: int
    lrs: list[float | Tensor]  # of the parameter groups
    losses: list[Tensor]
    gradient: Tensor  # norms (P,)
    scale: Tensor | None  # (), if a gradient scaler leaves it to the optimizer to unscale
    scaled: bool  # a gradient scaler watches over this step
    update: Update
    weight: Tensor | None  # norms (P,), now and then
    judged: dict[str, dict[str, Any]] = field(default_factory=dict)  # by signal
    reaction: str = "log"

    def tensors(self) -> dict[str, Tensor]:
        """All that is to be read, one-dimensional, by the names of ``Numbers``."""
        found = {
            "gradient": self.gradient,
            "loss": mean(self.losses)[None] if self.losses else None,
            "scale": None if self.scale is None else self.scale[None],
            "update": self.update.norms,
            "clipped": self.update.grad_norms,
            "factor": self.update.factors,
            "weight": self.weight,
        }
        return {name: tensor for name, tensor in found.items() if tensor is not None}


class NormHistory:
    """The largest norms of each parameter in at most ``bins`` equal stretches of training.

    Args:
        names: The parameters (P).
        bins: When so many stretches are full, each two become one.
    """

    KINDS = ("gradient", "update", "weight")

    def __init__(self, names: list[str], bins: int = 512) -> None:
        self.names = names
        self.bins = bins
        self.width = 1  # optimizer steps in a stretch
        self.table = torch.zeros(0, len(self.KINDS), len(names))

    def grow(self, names: list[str]) -> None:
        """Take in more parameters, named behind the ones there are."""
        self.table = nn.functional.pad(self.table, (0, len(names) - len(self.names)))
        self.names = names

    def add(self, steps: list[int], norms: list[list[list[float]]]) -> None:
        """Take in the norms of some steps, for each a list (P,) for each of ``KINDS``."""
        while steps[-1] // self.width >= self.bins:
            self._extend(len(self.table) + len(self.table) % 2)
            self.table = self.table.unflatten(0, (-1, 2)).amax(1)
            self.width *= 2
        self._extend(steps[-1] // self.width + 1)
        stretches = torch.tensor(steps) // self.width
        rows = torch.tensor(norms).nan_to_num(nan=math.inf, posinf=math.inf)
        self.table.scatter_reduce_(0, stretches[:, None, None].expand_as(rows), rows, "amax")

    def _extend(self, length: int) -> None:
        missing = self.table.new_zeros(max(0, length - len(self.table)), *self.table.shape[1:])
        self.table = torch.cat([self.table, missing])

    def state_dict(self) -> dict[str, Any]:
        return {"names": self.names, "width": self.width, "table": self.table}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.names, self.width, self.table = state["names"], state["width"], state["table"]


class ParameterRatios:
    """Finds the parameter whose gradient is out of proportion to that of all the others.

    The logarithm of this ratio is compared with its last values by median and spread. What makes
    all gradients larger leaves it alone, so it is far less noisy than a norm, and a parameter that
    holds little of the whole norm is seen as well.

    Args:
        window: Ordinary steps that are remembered; every ``REFRESH`` of them are looked at anew.
        limit: Robust standard deviations of the logarithm beyond which a ratio is a spike.
    """

    REFRESH = 16
    MIN_SCALE = 0.1
    FLOOR = 1e-6  # of a ratio; a gradient of exactly zero has no logarithm

    def __init__(self, window: int, limit: float) -> None:
        self.window = window
        self.limit = limit
        self.logs: list[list[float]] = []  # of the last ordinary steps, each (P,)
        self.usual: list[tuple[float, float]] = []  # median and spread of each parameter
        self.fresh = 0  # ordinary steps since `usual` was taken
        self.raised = 0  # steps in a row with a spike

    def update(self, gradient: list[float]) -> list[float]:
        """Scores of the parameters (P,) from their norms; zeros until there is a usual ratio."""
        logs = self._log_ratios(gradient)
        if self.logs and len(self.logs[-1]) != len(logs):  # parameters were added
            self.forget()
        scores = [(x - m) / s for x, (m, s) in zip(logs, self.usual, strict=bool(self.usual))]
        if max(scores, default=0.0) > self.limit:
            self.raised += 1
            if self.raised >= SHIFT_AFTER:  # it is no spike but the new proportion
                self.forget()
            return scores
        self.raised = 0
        self.logs.append(logs)
        del self.logs[: -self.window]
        self.fresh += 1
        if self.fresh >= self.REFRESH:
            self.fresh = 0
            self.usual = [
                self._median_and_spread(column) for column in zip(*self.logs, strict=True)
            ]
        return scores or [0.0] * len(logs)

    def forget(self) -> None:
        """Begin anew."""
        self.logs, self.usual, self.fresh, self.raised = [], [], 0, 0

    def _log_ratios(self, gradient: list[float]) -> list[float]:
        squares = [g * g for g in gradient]
        whole = sum(squares)
        others = [math.sqrt(max(whole - square, 0.0)) for square in squares]
        floor, ceiling = self.FLOOR, 1 / self.FLOOR
        return [
            math.log(min(max(g / other, floor), ceiling)) if other else 0.0
            for g, other in zip(gradient, others, strict=True)
        ]

    def _median_and_spread(self, values: Iterable[float]) -> tuple[float, float]:
        ordered = sorted(values)
        median, high = ordered[len(ordered) // 2], ordered[int(0.9 * len(ordered))]
        low = ordered[int(0.1 * len(ordered))]
        return median, max(
            (high - median) / NORMAL_Q90, (median - low) / NORMAL_Q90, self.MIN_SCALE
        )


class Watch:
    """Judges the steps of one optimizer, in plain numbers, and says what is known of a spike.

    Args:
        window: Steps over which a signal's usual level is taken.
        threshold: Robust standard deviations beyond which a value is a spike.
    """

    def __init__(self, window: int, threshold: float) -> None:
        self.names: list[str] = []
        self.sizes: list[int] = []
        self.detectors = {
            "gradient": SpikeDetector(window, threshold),
            "update": SpikeDetector(window, threshold),
            # the loss does not scatter as norms do, and it has to double as well
            "loss": SpikeDetector(window, threshold * 2 / 3),
        }
        # one of many parameters goes further astray by chance than one signal
        self.ratios = ParameterRatios(window, limit=threshold * 4 / 3)
        self.scores: list[float] = []  # of the parameters in the last step
        self.history = NormHistory([])
        self.before: list[dict[str, Any]] = []  # the last steps in brief
        self.lr: float | None = None

    def look_at(self, names: list[str], sizes: list[int]) -> None:
        """Take these parameters (P) from now on; what was there keeps its place."""
        self.names, self.sizes = names, sizes
        self.history.grow(names)

    def judge_gradient_and_loss(self, observation: Observation, numbers: Numbers) -> None:
        """Judge what is known before the step is taken."""
        self._notice_rate(float(max(observation.lrs)))
        gradient, judged = numbers["gradient"], observation.judged
        norm = total(gradient)
        if observation.scaled and not math.isfinite(norm):
            # the scaler throws this step away: no spike, and never in the statistics
            judged["gradient"] = {"value": norm, "kind": "overflow"}
        else:
            judged["gradient"] = self._judge("gradient", norm)
            if math.isfinite(norm) and len(gradient) > 1:
                judged["parameter"] = self._judge_parameters(gradient)
        if numbers["loss"] and judged["gradient"]["kind"] != "overflow":
            loss = judged["loss"] = self._judge("loss", numbers["loss"][0])
            if loss["kind"] == "spike" and loss["value"] <= LOSS_RATIO * loss["center"]:
                loss["kind"] = "warning"

    def judge_update(self, observation: Observation, numbers: Numbers) -> None:
        if numbers["update"] and observation.judged["gradient"]["kind"] != "overflow":
            observation.judged["update"] = self._judge("update", total(numbers["update"]))

    def _notice_rate(self, lr: float) -> None:
        """A jump of the learning rate is no spike of what follows from it."""
        if self.lr is not None and lr != self.lr and not 2 * self.lr < 3 * lr < 4.5 * self.lr:
            for detector in self.detectors.values():
                detector.rate_changed()
        self.lr = lr

    def _judge(self, signal: str, value: float) -> dict[str, Any]:
        detector = self.detectors[signal]
        detector.update(value)
        return {
            "value": value,
            "kind": detector.kind,
            "z": detector.score,
            "threshold": detector.threshold,
            "center": detector.center,
            "scale": detector.scale,
            "raised": detector.raised,
        }

    def _judge_parameters(self, gradient: list[float]) -> dict[str, Any]:
        self.scores = self.ratios.update(gradient)
        first = max(range(len(gradient)), key=self.scores.__getitem__)
        return {
            "value": gradient[first],
            "kind": "spike" if self.scores[first] > self.ratios.limit else "normal",
            "z": self.scores[first],
            "name": self.names[first],
        }

    def brief(self, observation: Observation, numbers: Numbers) -> None:
        """Remember the step as the cause of what may come after it."""
        gradient = numbers["gradient"]
        self.before.append(
            {
                "step": observation.step,
                "batches": observation.batches,
                "grad_norm": observation.judged["gradient"]["value"],
                "update_norm": total(shortened(numbers)),
                "update_z": observation.judged.get("update", {}).get("z", 0.0),
                "parameter": self.names[max(range(len(gradient)), key=gradient.__getitem__)],
            }
        )
        del self.before[:-BEFORE]

    def record(self, observation: Observation, numbers: Numbers, top_k: int) -> dict[str, Any]:
        """The evidence about one step."""
        gradient, update = numbers["gradient"], numbers["update"]
        squares = [g * g if math.isfinite(g) else math.inf for g in gradient]
        whole = sum(squares)
        scores = self.scores if "parameter" in observation.judged else [0.0] * len(gradient)
        spiked = [s for s, verdict in observation.judged.items() if verdict["kind"] in SPIKES]

        def describe(i: int) -> dict[str, Any]:
            share = 1.0 if squares[i] == math.inf else squares[i] / whole if whole else 0.0
            facts = {"name": self.names[i], "grad_norm": gradient[i], "share": share}
            facts["z"] = math.inf if squares[i] == math.inf else scores[i]
            if update:
                facts["update_norm"] = update[i]
                facts["update_rms"] = update[i] / math.sqrt(self.sizes[i])
            return facts

        def largest(by: list[float]) -> list[dict[str, Any]]:
            return [describe(i) for i in sorted(range(len(by)), key=lambda i: -by[i])[:top_k]]

        return {
            "step": observation.step,
            "epoch": observation.epoch,
            "batches": observation.batches,
            "optimizer": observation.optimizer,
            "lr": float(max(observation.lrs)),
            "spiked": spiked,
            "signals": observation.judged,
            "clipped_grad_norm": total(numbers["clipped"]) if numbers["clipped"] else None,
            "update_factor": min(numbers["factor"]) if numbers["factor"] else None,
            "by_share": largest(squares),
            "by_z": largest(
                [d if math.isfinite(g) else math.inf for d, g in zip(scores, gradient, strict=True)]
            ),
            "before": max(self.before, key=out_of_range, default=None),
            "reaction": observation.reaction,
            "confirmed": "loss" in spiked,
            "max_loss_after": None,
            "steps_to_recover": None,
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "detectors": {signal: d.state_dict() for signal, d in self.detectors.items()},
            "logs": self.ratios.logs,
            "usual": [list(pair) for pair in self.ratios.usual],
            "fresh": self.ratios.fresh,
            "raised": self.ratios.raised,
            "history": self.history.state_dict(),
            "before": json.dumps(self.before),
            "lr": self.lr,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for signal, detector in self.detectors.items():
            detector.load_state_dict(state["detectors"][signal])
        self.ratios.logs = [list(row) for row in state["logs"]]
        self.ratios.usual = [(median, spread) for median, spread in state["usual"]]
        self.ratios.fresh, self.ratios.raised = state["fresh"], state["raised"]
        self.history.load_state_dict(state["history"])
        self.names = self.history.names
        self.before = json.loads(state["before"])
        self.lr = state["lr"]


# The monitor


class GradientSpikeMonitor(StepCallback):
    """Watch gradient, update and loss of every optimizer step, and name what spiked.

    Four signals are watched for each optimizer, the first, third and fourth by a
    :class:`SpikeDetector`, the second by :class:`ParameterRatios`:

    - ``gradient``: L2 norm over all parameters, after unscaling and before clipping;
    - ``parameter``: the norm of one parameter's gradient against that of all the others;
    - ``update``: L2 norm of what the optimizer did with it;
    - ``loss``: mean over the batches of the step and over all processes. It has to double, and
      two thirds of the threshold are enough then.

    Every spike becomes a line of ``spikes.jsonl`` in ``trainer.log_dir``: when (step, epoch,
    batches), which signal and how far out, the parameters with the largest share and those furthest
    out of proportion, the largest update just before, and what followed. The norms of each
    parameter over the whole training go to ``norms.pt``, binned over time.

    With the reaction ``log`` nothing is read from the device between log steps. The others read
    once a step, before it is taken, and act on gradient, parameter and loss; they are ``skip``,
    ``rollback``, ``stop``, or an own :class:`Reaction`. Values that a gradient scaler is going to
    throw away (overflow in float16) are recorded and neither counted nor acted upon.

    Put it in front of callbacks that clip gradients.

    Args:
        reaction: What to do about a spike.
        window: Steps over which a signal's usual level is taken.
        threshold: Robust standard deviations of the logarithm beyond which a value is a spike.
        top_k: Parameters named in a record.
        weight_norm_every: Optimizer steps between two readings of the weight norms.
        alert: Send a W&B alert about spikes, at most every ten minutes.
    """

    def __init__(
        self,
        reaction: ReactionName | Reaction = "log",
        window: int = 64,
        threshold: float = 4.5,
        top_k: int = 3,
        weight_norm_every: int = 10,
        alert: bool = True,
    ) -> None:
        for name, value in (("top_k", top_k), ("weight_norm_every", weight_norm_every)):
            if value < 1:
                raise MisconfigurationException(f"{name} must be at least 1, got {value}.")
        try:
            SpikeDetector(window, threshold)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from None
        if isinstance(reaction, str) and reaction not in get_args(ReactionName):
            raise MisconfigurationException(
                f"reaction must be one of {', '.join(get_args(ReactionName))}, got {reaction!r}."
            )
        if isinstance(reaction, str):
            self.reaction = REACTIONS[reaction]() if reaction in REACTIONS else None
        else:
            self.reaction = reaction
        self.window = window
        self.threshold = threshold
        self.top_k = top_k
        self.weight_norm_every = weight_norm_every
        self.alert = alert
        self.watches: dict[int, Watch] = {}  # by optimizer
        self.counts = dict.fromkeys((*SIGNALS, "overflow", "level_shift"), 0)
        self.records: list[dict[str, Any]] = []  # of all spikes, the lines of the file
        self._changed = False  # the records, since they were written
        self._pending: list[Observation] = []
        self._batches: list[int] = []
        self._stepped = False  # an optimizer has, since the last batch began
        self._losses: list[Tensor] = []
        self._last_spike = -math.inf

    @property
    def path(self) -> Path | None:
        return Path(self.folder) / "spikes.jsonl" if self.folder else None

    def watch(self, index: int) -> Watch:
        """What is known of this optimizer's steps."""
        if index not in self.watches:
            self.watches[index] = Watch(self.window, self.threshold)
        watch = self.watches[index]
        parameters = StepProbe.of(self.trainer.optimizers[index]).params
        if len(watch.sizes) != len(parameters):  # at the start, and when parameters were added
            names = [self.names.get(id(p), f"parameter {i}") for i, p in enumerate(parameters)]
            watch.look_at(names, [p.numel() for p in parameters])
        return watch

    # Collecting, without a read from the device

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.names = {id(p): name for name, p in pl_module.named_parameters()}
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        clipping = [c for c in callbacks if getattr(c, "clips_gradients", False)]
        for callback in itertools.takewhile(lambda c: c is not self, callbacks):
            if callback in clipping:
                raise MisconfigurationException(
                    f"GradientSpikeMonitor stands behind {type(callback).__name__} and would see "
                    "clipped gradients; put it first in trainer.callbacks."
                )
        hook = "configure_gradient_clipping"
        own = getattr(type(pl_module), hook) is not getattr(LightningModule, hook)
        for optimizer in trainer.optimizers:
            probe = StepProbe.of(optimizer)
            probe.gradients_are_clipped = bool(clipping or own or trainer.gradient_clip_val)
        if self.reaction:
            self.reaction.start(trainer, pl_module)
        open_since = self.records[0]["step"] if self.records else trainer.global_step
        earlier = [r for r in read_records(self.path) if r["step"] < open_since]
        self.records = [*earlier, *self.records]
        self._changed = bool(self.path and self.path.exists())
        if trainer.is_global_zero:
            self._save(trainer.global_step)  # without what is going to be trained again

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._stepped:
            self._batches, self._stepped = [], False
        self._batches.append(batch_idx)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        self._losses.append(unscaled_loss(trainer, pl_module, loss))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        probe = StepProbe.of(optimizer)
        step = trainer.global_step
        observation = Observation(
            step=step,
            epoch=trainer.current_epoch,
            batches=self._batches,
            optimizer=trainer.optimizers.index(optimizer),
            lrs=[learning_rate(group) for group in optimizer.param_groups],
            losses=self._losses,
            gradient=norms(probe.gradients()),
            scale=scale_left(trainer, pl_module, optimizer),
            scaled=grad_scaler(trainer) is not None,
            update=probe.arm(step),
            weight=norms(probe.before) if step % self.weight_norm_every == 0 else None,
        )
        self._losses, self._stepped = [], True
        self._pending.append(observation)
        if self.reaction:
            self._react(self.reaction, observation, optimizer)

    def _react(self, reaction: Reaction, observation: Observation, optimizer: Optimizer) -> None:
        """Read gradient and loss of the coming step, and act if one of them is a spike."""
        (numbers,) = self._read([observation], alone=False)
        self.watch(observation.optimizer).judge_gradient_and_loss(observation, numbers)
        if any(verdict["kind"] in SPIKES for verdict in observation.judged.values()):
            self._last_spike = observation.step
            observation.reaction = type(reaction).__name__.lower()
            if observation.scale is not None:
                # without gradients, the scaler could not say later that they were finite
                grad_scaler(self.trainer).unscale_(optimizer)
            reaction.react(self.trainer, self.module, optimizer)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self.reaction and self._stepped:
            calm = trainer.global_step - self._last_spike > CONFIRM
            self.reaction.after_step(trainer, pl_module, calm)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    # Reading and judging

    def flush(self, *, alone: bool = False) -> None:
        pending, self._pending = self._pending, []
        if not pending:
            return
        numbers = self._read(pending, alone)
        rows = {o.step: self._digest(o, n) for o, n in zip(pending, numbers, strict=True)}
        self._remember(pending, numbers)
        if self.trainer.is_global_zero:
            self.log_rows(rows)
            self._save(pending[0].step)

    def _read(self, pending: list[Observation], alone: bool) -> list[Numbers]:
        """The numbers of these steps; the one device read for all of them."""
        parts = [observation.tensors() for observation in pending]
        table = torch.cat([tensor for part in parts for tensor in part.values()])
        if not alone:  # gradients are the same everywhere, the loss is not
            table = self.trainer.strategy.reduce(table, reduce_op="mean")
        values, position = table.tolist(), 0
        names = ("loss", "gradient", "scale", "update", "clipped", "factor", "weight")
        read = []
        for part in parts:
            numbers: Numbers = {name: [] for name in names}
            for name, tensor in part.items():
                numbers[name] = values[position : position + len(tensor)]
                position += len(tensor)
            if numbers["scale"]:
                numbers["gradient"] = [norm / numbers["scale"][0] for norm in numbers["gradient"]]
            read.append(numbers)
        return read

    def _digest(self, observation: Observation, numbers: Numbers) -> dict[str, float]:
        """Judge one step and return what the loggers are told of it."""
        watch, judged = self.watch(observation.optimizer), observation.judged
        if not judged:
            watch.judge_gradient_and_loss(observation, numbers)
        watch.judge_update(observation, numbers)
        if "loss" in judged:
            self._follow(observation, judged["loss"])
        if any(verdict["kind"] in RECORDED for verdict in judged.values()):
            self._count(observation)
            self.records.append(watch.record(observation, numbers, self.top_k))
            self._changed = True
        watch.brief(observation, numbers)
        return self._row(observation, numbers)

    def _count(self, observation: Observation) -> None:
        for signal, verdict in observation.judged.items():
            kind = verdict["kind"]
            if kind in RECORDED:
                self.counts[signal if kind in SPIKES else kind] += 1
            if kind == "level_shift" and signal != "loss":  # a loss that stays high did spike
                self._relabel(observation, signal, verdict)

    def _relabel(self, observation: Observation, signal: str, shift: dict[str, Any]) -> None:
        """What looked like spikes were the first steps at a new level."""
        for record in self.records:
            passed = observation.step - record["step"]
            same = record["optimizer"] == observation.optimizer and signal in record["spiked"]
            if same and passed < shift["raised"]:
                verdict = record["signals"][signal]
                if verdict["value"] <= shift["threshold"]:  # else it stands out of that one, too
                    record["spiked"].remove(signal)
                    verdict["kind"] = "level_shift"
                    self.counts[signal] -= 1

    def _follow(self, observation: Observation, loss: dict[str, Any]) -> None:
        """Write what followed into the records of the last steps."""
        value = loss["value"] if math.isfinite(loss["value"]) else math.inf  # NaN has no order
        for record in reversed(self.records):
            passed = observation.step - record["step"]
            if passed > FOLLOW:
                break
            if not record["spiked"] or record["optimizer"] != observation.optimizer:
                continue
            self._changed = True
            worst = record["max_loss_after"]
            record["max_loss_after"] = value if worst is None else max(worst, value)
            if loss["kind"] in SPIKES and passed <= CONFIRM:
                record["confirmed"] = True
            ordinary = record["signals"].get("loss", {}).get("threshold", math.inf)
            if record["steps_to_recover"] is None and loss["value"] <= ordinary:
                record["steps_to_recover"] = passed

    def _remember(self, pending: list[Observation], numbers: list[Numbers]) -> None:
        """Put the norms of each parameter into the histories."""
        for index in {observation.optimizer for observation in pending}:
            steps, rows = [], []
            for observation, read in zip(pending, numbers, strict=True):
                if observation.optimizer == index:
                    none = [0.0] * len(read["gradient"])
                    steps.append(observation.step)
                    rows.append([read["gradient"], shortened(read) or none, read["weight"] or none])
            self.watches[index].history.add(steps, rows)

    def _row(self, observation: Observation, numbers: Numbers) -> dict[str, float]:
        gradient, update = (observation.judged.get(s) for s in ("gradient", "update"))
        assert gradient is not None
        row = {"grad_norm/total": gradient["value"]}
        # there is no threshold while a detector warms up
        if gradient.get("threshold", math.inf) < math.inf:
            row["grad_norm/threshold"] = gradient["threshold"]
        if numbers["clipped"]:
            row["grad_norm/clipped"] = total(numbers["clipped"])
        if update:
            row["update_norm/total"] = update["value"]
            if update["threshold"] < math.inf:
                row["update_norm/threshold"] = update["threshold"]
        if numbers["factor"]:
            row["update_norm/clipped"] = total(shortened(numbers))
        for signal in SIGNALS:
            row[f"spikes/{signal}"] = float(self.counts[signal])
        if len(self.trainer.optimizers) == 1:
            return row
        return {f"{name}/{observation.optimizer}": value for name, value in row.items()}

    # Writing

    def _save(self, since: int) -> None:
        """Bring the file of spikes up to date and say what is new, on the first process."""
        if self.path and self._changed:
            self._changed = False
            lines = [json.dumps(finite(record)) + "\n" for record in self.records]
            replace_file(self.path, "".join(lines).encode())
        fresh = [r for r in self.records if r["step"] >= since and r["spiked"]]
        for logger in self.trainer.loggers if fresh and self.alert else []:
            if isinstance(logger, WandbLogger):
                logger.experiment.alert(
                    title="gradient spikes",  # W&B waits between alerts of one title
                    text=sentence(fresh[0]),
                    wait_duration=600,
                )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._finish()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._finish()

    def _finish(self) -> None:
        """Leave the norms of each parameter and the table of spikes, and say what was seen."""
        if not self.watches or not self.trainer.is_global_zero:
            return
        if self.folder:
            content = io.BytesIO()
            histories = {str(i): watch.history.state_dict() for i, watch in self.watches.items()}
            torch.save(histories, content)
            replace_file(Path(self.folder) / "norms.pt", content.getvalue())
        spikes = [record for record in self.records if record["spiked"]]
        if not spikes:
            return
        table = [
            {
                "step": r["step"],
                "epoch": r["epoch"],
                "batches": str(r["batches"]),
                "spiked": ", ".join(r["spiked"]),
                "parameter": suspect(r)["name"],
                "confirmed": r["confirmed"],
                "max_loss_after": r["max_loss_after"],
            }
            for r in spikes
        ]
        for logger in self.trainer.loggers:
            if isinstance(logger, WandbLogger):
                rows = [list(row.values()) for row in table]
                logger.log_table("spikes", columns=list(table[0]), data=rows)
        confirmed = sum(record["confirmed"] for record in spikes)
        worst = max(spikes, key=lambda record: record["max_loss_after"] or 0.0)
        print(
            f"{len(spikes)} spikes, {confirmed} of them followed by the loss, in {self.path}; the "
            f"worst: {sentence(worst)}"
        )

    # Resuming

    def state_dict(self) -> dict[str, Any]:
        super().state_dict()
        open_since = (self.trainer.global_step if self.watches else 0) - FOLLOW - 1
        return {
            "watches": {str(i): watch.state_dict() for i, watch in self.watches.items()},
            "counts": self.counts,
            "open": json.dumps([r for r in self.records if r["step"] >= open_since]),
            "last_spike": self._last_spike,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, watch in state["watches"].items():
            self.watches[int(key)] = Watch(self.window, self.threshold)
            self.watches[int(key)].load_state_dict(watch)
        self.counts = dict(state["counts"])
        self.records = json.loads(state["open"])
        self._last_spike = state["last_spike"]


def unscaled_loss(trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> Tensor:
    """The loss of a batch () from what ``on_before_backward`` is given."""
    value = loss.detach().float()
    if pl_module.automatic_optimization and trainer.accumulate_grad_batches > 1:
        value = value * trainer.accumulate_grad_batches  # Lightning has divided it
    scaler = grad_scaler(trainer)
    return value if scaler is None else value / scaler.scale(torch.ones_like(value))


def learning_rate(group: Mapping[str, Any]) -> float | Tensor:
    """The learning rate of now; schedulers write new ones into a tensor."""
    rate = group["lr"]
    return rate.clone() if isinstance(rate, Tensor) else rate


def mean(losses: list[Tensor]) -> Tensor:
    return torch.stack(losses).mean() if len(losses) > 1 else losses[0]


def grad_scaler(trainer: Trainer) -> Any:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def scale_left(trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> Tensor | None:
    """The scale () of gradients that the optimizer itself unscales, inside its step."""
    scaler = grad_scaler(trainer)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return None
    return scaler.scale(torch.ones((), device=pl_module.device))


def total(norms: Iterable[float]) -> float:
    """The norm of the whole from the norms of its parts."""
    return math.sqrt(sum(norm * norm for norm in norms))


def shortened(numbers: Numbers) -> list[float]:
    """Norms (P,) of the update as it was applied."""
    update, factor = numbers["update"], numbers["factor"]
    return [n * f for n, f in zip(update, factor, strict=True)] if factor else update


def out_of_range(step: Mapping[str, Any]) -> tuple[float, float]:
    """How far the update of a step was out of the ordinary, then how large it was."""
    return step["update_z"], step["update_norm"]


def suspect(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parameter to look at first: one out of proportion, else the one that holds most."""
    return record["by_z" if "parameter" in record["spiked"] else "by_share"][0]


def sentence(record: Mapping[str, Any]) -> str:
    """One spike in words."""
    words = []
    for signal in record["spiked"]:
        verdict = record["signals"][signal]
        usual = f" (usual {verdict['center']:.3g})" if verdict.get("center") else ""
        words.append(f"{signal} {verdict['value']:.3g}{usual}")
    parameter, before, after = suspect(record), record["before"], record["max_loss_after"]
    text = (
        f"step {record['step']} (epoch {record['epoch']}, batch {record['batches']}): "
        f"{', '.join(words)}; {parameter['name']} holds {parameter['share']:.0%} of the squared "
        "gradient"
    )
    if before and "loss" in record["spiked"]:
        ago = record["step"] - before["step"]
        text += (
            f"; the largest update came {ago} {'step' if ago == 1 else 'steps'} before, from a "
            f"gradient of {before['grad_norm']:.3g}, most of it in {before['parameter']}"
        )
    if after is not None:
        text += f"; highest loss in the {FOLLOW} steps after it: {after:.3g}"
    return f"{text}."


def finite(value: Any) -> Any:
    """The same with infinities and NaN as text, which JSON does not have."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def read_records(path: Path | None) -> list[dict[str, Any]]:
    if path is None or not path.exists():
        return []
    numbers = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}

    def revive(facts: dict[str, Any]) -> dict[str, Any]:
        return {k: numbers.get(v, v) if isinstance(v, str) else v for k, v in facts.items()}

    return [json.loads(line, object_hook=revive) for line in path.read_text().splitlines()]


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
