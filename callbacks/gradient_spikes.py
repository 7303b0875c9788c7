"""Which step spiked, which parameter was behind it, what the update did and what followed.

The file needs torch and lightning alone and works by itself in any Lightning project.
Dimensions: S optimizer steps, P parameters (tensors) of one optimizer.
"""

import io
import itertools
import json
import math
import os
import weakref
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

from callbacks.spike_detector import SpikeDetector

SIGNALS = ("gradient", "update", "loss")
RECORDED = ("spike", "nonfinite", "level_shift", "overflow")
CONFIRM = 5  # optimizer steps within which the loss must spike too, for a spike to be confirmed
BEFORE = 10  # optimizer steps in which the largest update is looked for
FOLLOW = 20  # optimizer steps over which the outcome of a spike is watched
DECOUPLED = (
    torch.optim.AdamW,
    torch.optim.Adafactor,
    *filter(None, [getattr(torch.optim, "Muon", None)]),
)
ReactionName = Literal["log", "skip", "rollback", "stop"]


# What one optimizer step does


@dataclass
class Update:
    """What a step did; the norms are scalars on the device, one for each parameter."""

    norms: list[Tensor] | None = None  # of the proposed update; None until the step is taken
    grad_norms: list[Tensor] | None = None  # as the optimizer used them, clipped if they were
    factors: Tensor | None = None  # (P,) by which the update was shortened; None if nobody would


class StepProbe:
    """Compares the parameters of one optimizer before and after its step, once for all callbacks.

    ``arm`` copies them on the device before the step, a hook of the optimizer compares after it. A
    gradient scaler that leaves out a step leaves the hook uncalled, so that needs no device read.

    Who wants to shorten updates adds a function to ``limits``: it is given the probe, when
    ``deltas`` and ``update.norms`` are known, and returns a factor for each parameter (P,).
    A step with all factors at 1 is left as it is, bit for bit.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._collect()
        self.limits: list[Callable[[StepProbe], Tensor]] = []
        self.deltas: list[Tensor] = []
        self.update = Update()
        self._armed: int | None = None  # the step about to be taken
        optimizer.register_step_post_hook(self._compare)

    @classmethod
    def of(cls, optimizer: Optimizer) -> "StepProbe":
        """The probe of this optimizer."""
        if optimizer not in PROBES:
            PROBES[optimizer] = cls(optimizer)
        probe = PROBES[optimizer]
        if len(probe.groups) < len(optimizer.param_groups):  # as in fine-tuning
            probe._collect()
        return probe

    def _collect(self) -> None:
        self.groups = [
            [p for p in group["params"] if p.requires_grad] for group in self.optimizer.param_groups
        ]
        self.params = [p for group in self.groups for p in group]
        self.before = [torch.empty_like(p) for p in self.params]

    @property
    def optimizer(self) -> Optimizer:
        optimizer = self._optimizer()
        assert optimizer is not None, "the probe is asked while its optimizer steps"
        return optimizer

    def gradients(self) -> list[Tensor]:
        return [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in self.params]

    def arm(self, step: int) -> Update:
        """Copy the parameters and return what optimizer step ``step``, the next, will fill in."""
        if self._armed != step:  # an earlier one may never have been taken
            self._armed = step
            self.update = Update()
            self.copy()
        return self.update

    @torch.no_grad()
    def copy(self) -> None:
        torch._foreach_copy_(self.before, self.params)

    @torch.no_grad()
    def _compare(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._armed is None:
            return
        self._armed = None
        decays = self._decays()
        if any(decays):  # decoupled weight decay is not a part of the update
            torch._foreach_mul_(self.before, [1 - d for d in decays])
        self.deltas = list(torch._foreach_sub(self.params, self.before))
        self.update.norms = norms(self.deltas)
        self.update.grad_norms = norms(self.gradients())
        if self.limits:
            factors = torch.stack([limit(self) for limit in self.limits]).amin(0)
            weights = [w.to(p.dtype) for w, p in zip(factors.unbind(), self.params, strict=True)]
            # end where the weight is 1, bit for bit
            torch._foreach_copy_(
                self.params, torch._foreach_lerp(self.before, self.params, weights)
            )
            self.update.factors = factors
        self.deltas = []

    def _decays(self) -> list[float]:
        """Share of each parameter that decoupled weight decay takes in a step."""
        decoupled = isinstance(self.optimizer, DECOUPLED)
        shares = [
            group["lr"] * group["weight_decay"]
            if group.get("decoupled_weight_decay", decoupled) and group.get("weight_decay")
            else 0.0
            for group in self.optimizer.param_groups
        ]
        return [
            0.0 if p.grad is None else share  # without a gradient nothing decays
            for share, group in zip(shares, self.groups, strict=True)
            for p in group
        ]


PROBES: "weakref.WeakKeyDictionary[Optimizer, StepProbe]" = weakref.WeakKeyDictionary()


def norms(tensors: list[Tensor]) -> list[Tensor]:
    """L2 norm of each tensor, a scalar; bfloat16 and float16 are summed in float32."""
    is_double = any(tensor.dtype == torch.float64 for tensor in tensors)
    dtype = torch.float64 if is_double else torch.float32
    return list(torch._foreach_norm(tensors, 2, dtype=dtype))


# Values that wait on the device


class StepCallback(Callback):
    """A callback whose values of each step wait on the device until a log step.

    A subclass collects in its hooks and writes in ``flush``, which is called every
    ``trainer.log_every_n_steps``, at the end of an epoch, before a checkpoint, and when training
    ends or breaks off.
    """

    trainer: Trainer | None = None
    module: LightningModule | None = None

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

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not any(StepProbe.of(optimizer).params for optimizer in trainer.optimizers):
            raise MisconfigurationException(
                f"{type(self).__name__} has nothing to watch: no optimizer of "
                f"{type(pl_module).__name__} has a parameter to train."
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
        if self.trainer:  # else it broke off before this callback was set up
            self.flush(alone=True)

    def state_dict(self) -> dict[str, Any]:
        self.flush()  # what the checkpoint has seen, the loggers have seen
        return {}

    def flush(self, *, alone: bool = False) -> None:
        """Read and write what is pending.

        Args:
            alone: The other processes may not be listening, so do not wait for them.
        """
        raise NotImplementedError

    def log_rows(self, rows: Mapping[int, Mapping[str, float]]) -> None:
        """Give each step its values, in rows that the module writes if it has ``add_to_rows``."""
        assert self.trainer is not None
        if add := getattr(self.module, "add_to_rows", None):
            add(rows)
            return
        for logger in self.trainer.loggers:
            for step, values in rows.items():
                logger.log_metrics(dict(values), step)


# What to do about a spike


class Reaction:
    """What to do when the gradient or the loss of a step spikes, before the step is taken."""

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook: training starts."""

    def react(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Hook: act on the spike whose gradients are in place and whose step is not yet taken."""
        raise NotImplementedError

    def after_step(self, trainer: Trainer, pl_module: LightningModule, calm: bool) -> None:
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
    only left out. The count of optimizer steps and the learning-rate schedule go on.

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
                state = own.state[parameter]
                for key, value in values.items():
                    moved = value.to(state[key].device) if isinstance(value, Tensor) else value
                    state[key] = moved


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


REACTIONS: dict[str, type[Reaction] | None] = {
    "log": None,
    "skip": Skip,
    "rollback": Rollback,
    "stop": Stop,
}


# The monitor


@dataclass
class Observation:
    """One optimizer step, as far as it is known without reading the device."""

    step: int
    epoch: int
    batches: list[int]  # indices in the epoch; several when gradients are accumulated
    optimizer: int
    lr: float | Tensor
    losses: list[Tensor]
    grad_norms: list[Tensor]
    scale: Tensor | None  # of a gradient scaler, if these gradients are still scaled
    scaled: bool  # a gradient scaler watches over this step
    update: Update
    weight_norms: list[Tensor] | None
    judged: dict[str, dict[str, Any]] = field(default_factory=dict)  # before the step
    reaction: str = "log"


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
        rows = torch.tensor(norms).nan_to_num(math.inf)
        self.table.scatter_reduce_(0, stretches[:, None, None].expand_as(rows), rows, "amax")

    def _extend(self, length: int) -> None:
        missing = self.table.new_zeros(max(0, length - len(self.table)), *self.table.shape[1:])
        self.table = torch.cat([self.table, missing])

    def state_dict(self) -> dict[str, Any]:
        return {"names": self.names, "width": self.width, "table": self.table}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.width, self.table = state["width"], state["table"]


class GradientSpikeMonitor(StepCallback):
    """Watch gradient norm, update norm and loss of every optimizer step, and name what spiked.

    The gradient norm is the L2 norm over all parameters after unscaling and before clipping; the
    update is what the optimizer did with it, ``|delta theta|``. Each has a :class:`SpikeDetector`
    of its own, for each optimizer. Every spike becomes a line of ``spikes.jsonl`` in
    ``trainer.log_dir``: when (step, epoch, batches), which signal and how far out, the parameters
    with the largest share and those furthest out of their own range, and what followed.
    Norms of each parameter over the whole training go to ``norms.pt``, binned over time.

    With the reaction ``log`` nothing is read from the device between log steps. The others read
    once a step, before it is taken, and act on the gradient and the loss; they are ``skip``,
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
        if isinstance(reaction, str) and reaction not in REACTIONS:
            raise MisconfigurationException(
                f"reaction must be one of {', '.join(get_args(ReactionName))}, got {reaction!r}."
            )
        self.reaction = reaction if isinstance(reaction, Reaction) else make(reaction)
        self.window = window
        self.threshold = threshold
        self.top_k = top_k
        self.weight_norm_every = weight_norm_every
        self.alert = alert
        self.counts = dict.fromkeys((*SIGNALS, "overflow", "level_shift", "confirmed"), 0)
        self.records: list[dict[str, Any]] = []  # of all spikes, the lines of the file
        self.detectors: dict[str, SpikeDetector] = {}
        self.histories: dict[str, NormHistory] = {}
        self._recent: dict[str, list[list[float]]] = {}  # gradient norms (P,) of ordinary steps
        self._steps: list[dict[str, Any]] = []  # the last ones in brief
        self._lrs: dict[str, float] = {}
        self._pending: list[Observation] = []
        self._batches: list[int] = []
        self._stepped = False  # an optimizer has, since the last batch began
        self._losses: list[Tensor] = []
        self._last_spike = -math.inf

    # Collecting, without a read from the device

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.names = {id(p): name for name, p in pl_module.named_parameters()}
        clipping = [
            type(c).__name__
            for c in itertools.takewhile(lambda c: c is not self, trainer.callbacks)  # type: ignore[attr-defined]
            if getattr(c, "clips_gradients", False)
        ]
        if clipping:
            raise MisconfigurationException(
                f"GradientSpikeMonitor stands behind {clipping[0]} and would see clipped "
                "gradients; put it first in trainer.callbacks."
            )
        for optimizer in trainer.optimizers:
            StepProbe.of(optimizer)
        if self.reaction:
            self.reaction.start(trainer, pl_module)
        open_since = self.records[0]["step"] if self.records else trainer.global_step
        earlier = [r for r in read_records(self.path) if r["step"] < open_since]
        self.records = [*earlier, *self.records]
        if trainer.is_global_zero:
            self._save(trainer.global_step)  # without what is going to be trained again

    @property
    def path(self) -> Path | None:
        return Path(self.folder) / "spikes.jsonl" if self.folder else None

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
            batches=list(self._batches),
            optimizer=trainer.optimizers.index(optimizer),
            lr=max(group["lr"] for group in optimizer.param_groups),
            losses=self._losses,
            grad_norms=norms(probe.gradients()),
            scale=scale_left(trainer, pl_module, optimizer),
            scaled=grad_scaler(trainer) is not None,
            update=probe.arm(step),
            weight_norms=norms(probe.before) if step % self.weight_norm_every == 0 else None,
        )
        self._losses, self._stepped = [], True
        self._pending.append(observation)
        if self.reaction:
            self._react(observation, optimizer)

    def _react(self, observation: Observation, optimizer: Optimizer) -> None:
        """Read gradient and loss of the coming step, and act if one of them is a spike."""
        assert self.reaction is not None
        assert self.trainer is not None
        assert self.module is not None
        unknown = torch.tensor(math.nan, device=self.module.device)
        loss = torch.stack(observation.losses or [unknown]).mean()
        loss = self.trainer.strategy.reduce(loss, reduce_op="mean")
        scale = [] if observation.scale is None else [observation.scale]
        table = torch.stack([*observation.grad_norms, loss, *scale]).tolist()
        grad_norms, loss = table[: len(observation.grad_norms)], table[len(observation.grad_norms)]
        if scale:
            grad_norms = [norm / table[-1] for norm in grad_norms]
        self._judge_before_step(observation, grad_norms, loss)
        if any(v["kind"] in ("spike", "nonfinite") for v in observation.judged.values()):
            self._last_spike = observation.step
            observation.reaction = type(self.reaction).__name__.lower()
            if scale:  # without gradients, the scaler could not say later that they were finite
                grad_scaler(self.trainer).unscale_(optimizer)
            self.reaction.react(self.trainer, self.module, optimizer)

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
        assert self.trainer is not None
        numbers = self._read(pending, alone)
        rows = {o.step: self._digest(o, v) for o, v in zip(pending, numbers, strict=True)}
        self._remember(pending, numbers)
        if self.trainer.is_global_zero:
            self.log_rows(rows)
            self._save(pending[0].step)

    def _read(self, pending: list[Observation], alone: bool) -> list[dict[str, list[float]]]:
        """All numbers of these steps by name; the one device read for all of them."""
        parts: list[dict[str, list[Tensor]]] = [
            {
                "loss": [torch.stack(o.losses).mean()] if o.losses else [],
                "gradient": o.grad_norms,
                "scale": [] if o.scale is None else [o.scale],
                "clipped": o.update.grad_norms or [],
                "update": o.update.norms or [],
                "factor": [] if o.update.factors is None else list(o.update.factors.unbind()),
                "weight": o.weight_norms or [],
            }
            for o in pending
        ]
        table = torch.stack([x for part in parts for column in part.values() for x in column])
        if not alone:  # gradients are the same everywhere, the loss is not
            assert self.trainer is not None
            table = self.trainer.strategy.reduce(table, reduce_op="mean")
        numbers = iter(table.tolist())
        return [
            {k: [next(numbers) for _ in column] for k, column in part.items()} for part in parts
        ]

    def _digest(self, observation: Observation, values: dict[str, list[float]]) -> dict[str, float]:
        """Judge one step and return what the loggers are told of it."""
        if values["scale"]:
            values["gradient"] = [norm / values["scale"][0] for norm in values["gradient"]]
        if not observation.judged:
            loss = values["loss"][0] if values["loss"] else math.nan
            self._judge_before_step(observation, values["gradient"], loss)
        verdicts = observation.judged
        if values["update"] and verdicts["gradient"]["kind"] != "overflow":
            verdicts["update"] = self._judge(observation, "update", total(values["update"]))
        self._follow(observation, verdicts)
        spiked = [signal for signal, v in verdicts.items() if v["kind"] in ("spike", "nonfinite")]
        for signal in spiked:
            self.counts[signal] += 1
        for signal, verdict in verdicts.items():
            if verdict["kind"] in ("overflow", "level_shift"):
                self.counts[verdict["kind"]] += 1
            if verdict["kind"] == "level_shift":
                self._relabel(observation, signal, verdict["raised"])
        if any(verdict["kind"] in RECORDED for verdict in verdicts.values()):
            self.records.append(self._record(observation, values, spiked))
        elif all(map(math.isfinite, values["gradient"])):
            recent = self._recent.setdefault(str(observation.optimizer), [])
            recent.append(values["gradient"])
            del recent[: -self.window]
        self._steps.append(self._brief(observation, values))
        del self._steps[:-BEFORE]
        return self._row(observation, values)

    def _brief(self, observation: Observation, values: dict[str, list[float]]) -> dict[str, Any]:
        """A step as the cause of what comes after it."""
        update = observation.judged.get("update", {})
        gradient = values["gradient"]
        largest = max(range(len(gradient)), key=gradient.__getitem__)
        return {
            "step": observation.step,
            "batches": observation.batches,
            "optimizer": observation.optimizer,
            "grad_norm": total(gradient),
            "update_norm": total(shortened(values["update"], values["factor"])),
            "update_z": update.get("z", 0.0),
            "parameter": self._names(observation)[largest],
        }

    def _relabel(self, observation: Observation, signal: str, raised: int) -> None:
        """What looked like spikes were the first steps at a new level."""
        for record in self.records:
            passed = observation.step - record["step"]
            same = record["optimizer"] == observation.optimizer
            if same and passed < raised and signal in record["spiked"]:
                record["spiked"].remove(signal)
                record["signals"][signal]["kind"] = "level_shift"
                self.counts[signal] -= 1

    def _remember(self, pending: list[Observation], numbers: list[dict[str, list[float]]]) -> None:
        """Put the norms of each parameter into the histories."""
        for index in {o.optimizer for o in pending}:
            steps, norms = [], []
            names: list[str] = []
            for observation, values in zip(pending, numbers, strict=True):
                if observation.optimizer == index:
                    names = names or self._names(observation)
                    none = [0.0] * len(values["gradient"])
                    update = shortened(values["update"], values["factor"]) or none
                    steps.append(observation.step)
                    norms.append([values["gradient"], update, values["weight"] or none])
            history = self.histories.setdefault(str(index), NormHistory(names))
            history.grow(names)
            history.add(steps, norms)

    def _judge_before_step(
        self, observation: Observation, gradient: list[float], loss: float
    ) -> None:
        grad_norm = total(gradient)
        overflow = observation.scaled and not math.isfinite(grad_norm)
        observation.judged["gradient"] = self._judge(observation, "gradient", grad_norm, overflow)
        if observation.losses:
            observation.judged["loss"] = self._judge(observation, "loss", loss)

    def _judge(
        self, observation: Observation, signal: str, value: float, overflow: bool = False
    ) -> dict[str, Any]:
        """What this signal's detector says about the value, as plain numbers."""
        detector = self._detector(observation, signal)
        if overflow:  # the scaler throws this step away: no spike, and never in the statistics
            return {"value": value, "kind": "overflow"}
        key = f"{observation.optimizer}/{signal}"
        lr = float(observation.lr)
        earlier = self._lrs.get(key, lr)
        if not 2 * earlier < 3 * lr < 4.5 * earlier and lr != earlier:
            detector.rate_changed()
        self._lrs[key] = lr
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

    def _detector(self, observation: Observation, signal: str) -> SpikeDetector:
        key = f"{observation.optimizer}/{signal}"
        if key not in self.detectors:
            self.detectors[key] = SpikeDetector(self.window, self.threshold)
        return self.detectors[key]

    def _names(self, observation: Observation) -> list[str]:
        parameters = self._probe(observation).params
        return [self.names.get(id(p), f"parameter {i}") for i, p in enumerate(parameters)]

    def _probe(self, observation: Observation) -> StepProbe:
        assert self.trainer is not None
        return StepProbe.of(self.trainer.optimizers[observation.optimizer])

    def _record(
        self, observation: Observation, values: dict[str, list[float]], spiked: list[str]
    ) -> dict[str, Any]:
        """The evidence about one step."""
        gradient = values["gradient"]
        squares = [g * g if math.isfinite(g) else math.inf for g in gradient]
        whole = sum(squares)
        recent = self._recent.get(str(observation.optimizer), [])
        own = [
            own_score(g, [row[i] for row in recent if i < len(row)]) for i, g in enumerate(gradient)
        ]
        before = [b for b in self._steps if b["optimizer"] == observation.optimizer]
        names = self._names(observation)
        lr = float(observation.lr)
        sizes = [p.numel() for p in self._probe(observation).params]

        def describe(i: int) -> dict[str, Any]:
            facts = {
                "name": names[i],
                "grad_norm": gradient[i],
                "share": 1.0 if squares[i] == math.inf else squares[i] / whole if whole else 0.0,
                "z": own[i],
            }
            if values["update"]:
                facts["update_norm"] = values["update"][i]
                if lr > 0:  # in learning rates
                    facts["update_rms"] = values["update"][i] / math.sqrt(sizes[i]) / lr
            return facts

        def ranked(by: list[float]) -> list[int]:
            return sorted(range(len(by)), key=lambda i: -by[i])[: self.top_k]

        return {
            "step": observation.step,
            "epoch": observation.epoch,
            "batches": observation.batches,
            "optimizer": observation.optimizer,
            "lr": lr,
            "spiked": spiked,
            "signals": observation.judged,
            "clipped_grad_norm": total(values["clipped"]) if values["clipped"] else None,
            "update_factor": min(values["factor"]) if values["factor"] else None,
            "by_share": [describe(i) for i in ranked(squares)],
            "by_z": [describe(i) for i in ranked(own)],
            "before": max(before, key=lambda b: b["update_z"], default=None),
            "reaction": observation.reaction,
            "confirmed": "loss" in spiked,
            "max_loss_after": None,
            "steps_to_recover": None,
        }

    def _follow(self, observation: Observation, verdicts: dict[str, Any]) -> None:
        """Write what followed into the records of the last steps."""
        if "loss" not in verdicts:
            return
        loss = verdicts["loss"]
        for record in reversed(self.records):
            passed = observation.step - record["step"]
            if passed > FOLLOW:
                break
            if not record["spiked"] or record["optimizer"] != observation.optimizer:
                continue
            value = loss["value"] if math.isfinite(loss["value"]) else math.inf  # NaN has no order
            worst = record["max_loss_after"]
            record["max_loss_after"] = value if worst is None else max(worst, value)
            if (
                loss["kind"] in ("spike", "nonfinite")
                and passed <= CONFIRM
                and not record["confirmed"]
            ):
                record["confirmed"] = True
            ordinary = record["signals"].get("loss", {}).get("threshold", math.inf)
            if record["steps_to_recover"] is None and loss["value"] <= ordinary:
                record["steps_to_recover"] = passed

    def _row(self, observation: Observation, values: dict[str, list[float]]) -> dict[str, float]:
        suffix = f"/{observation.optimizer}" if len(self._all_optimizers()) > 1 else ""
        verdicts = observation.judged
        row = {"grad_norm/total": verdicts["gradient"]["value"]}
        if "threshold" in verdicts["gradient"]:
            row["grad_norm/threshold"] = verdicts["gradient"]["threshold"]
        if values["clipped"]:
            row["grad_norm/clipped"] = total(values["clipped"])
        if "update" in verdicts:
            row["update_norm/total"] = verdicts["update"]["value"]
            row["update_norm/threshold"] = verdicts["update"]["threshold"]
        if values["factor"]:
            row["update_norm/clipped"] = total(shortened(values["update"], values["factor"]))
        for signal in SIGNALS:
            row[f"spikes/{signal}"] = float(self.counts[signal])
        # there is no threshold while a detector warms up
        known = {k: v for k, v in row.items() if not (k.endswith("threshold") and v == math.inf)}
        return {f"{name}{suffix}": value for name, value in known.items()}

    def _all_optimizers(self) -> list[Optimizer]:
        assert self.trainer is not None
        return self.trainer.optimizers

    # Writing

    def _save(self, since: int) -> None:
        """Bring the files up to date and say what is new, on the first process."""
        fresh = [r for r in self.records if r["step"] >= since and r["spiked"]]
        if self.path and (self.records or self.path.exists()):
            lines = [json.dumps(finite(record)) + "\n" for record in self.records]
            replace_file(self.path, "".join(lines).encode())
        if not fresh or not self.alert:
            return
        assert self.trainer is not None
        worst = fresh[0]
        for logger in self.trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.alert(
                    title=f"spike at step {worst['step']}", text=sentence(worst), wait_duration=600
                )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._finish()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        super().on_exception(trainer, pl_module, exception)
        if self.trainer:
            self._finish()

    def _finish(self) -> None:
        """Leave the norms of each parameter and the table of spikes, and say what was seen."""
        assert self.trainer is not None
        if not self.trainer.is_global_zero:
            return
        if self.folder and self.histories:
            state = {name: history.state_dict() for name, history in self.histories.items()}
            content = io.BytesIO()
            torch.save(state, content)
            replace_file(Path(self.folder) / "norms.pt", content.getvalue())
        spikes = [record for record in self.records if record["spiked"]]
        if not spikes:
            return
        columns = ["step", "epoch", "batches", "spiked", "parameter", "confirmed", "max_loss_after"]
        data = [
            [
                r["step"],
                r["epoch"],
                str(r["batches"]),
                ", ".join(r["spiked"]),
                r["by_share"][0]["name"],
                r["confirmed"],
                r["max_loss_after"],
            ]
            for r in spikes
        ]
        for logger in self.trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table("spikes", columns=columns, data=data)
        confirmed = sum(r["confirmed"] for r in spikes)
        worst = max(spikes, key=lambda r: r["max_loss_after"] or 0.0)
        print(
            f"{len(spikes)} spikes, {confirmed} of them followed by the loss, in {self.path}; the "
            f"worst: {sentence(worst)}"
        )

    # Resuming

    def state_dict(self) -> dict[str, Any]:
        super().state_dict()
        open_since = (self.trainer.global_step if self.trainer else 0) - FOLLOW - 1
        return {
            "detectors": {k: d.state_dict() for k, d in self.detectors.items()},
            "histories": {k: h.state_dict() for k, h in self.histories.items()},
            "recent": self._recent,
            "steps": json.dumps(self._steps),
            "lrs": self._lrs,
            "counts": self.counts,
            "open": json.dumps([r for r in self.records if r["step"] >= open_since]),
            "last_spike": self._last_spike,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, detector in state["detectors"].items():
            self.detectors[key] = SpikeDetector(self.window, self.threshold)
            self.detectors[key].load_state_dict(detector)
        for key, history in state["histories"].items():
            self.histories[key] = NormHistory(history["names"])
            self.histories[key].load_state_dict(history)
        self._recent = {k: [list(row) for row in rows] for k, rows in state["recent"].items()}
        self._steps = json.loads(state["steps"])
        self._lrs = dict(state["lrs"])
        self.counts = dict(state["counts"])
        self.records = json.loads(state["open"])
        self._last_spike = state["last_spike"]


def make(reaction: str) -> Reaction | None:
    kind = REACTIONS[reaction]
    return kind() if kind else None


def unscaled_loss(trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> Tensor:
    """The loss of a batch () from what ``on_before_backward`` is given."""
    value = loss.detach().float()
    if pl_module.automatic_optimization and trainer.accumulate_grad_batches > 1:
        value = value * trainer.accumulate_grad_batches  # Lightning has divided it
    scaler = grad_scaler(trainer)
    return value if scaler is None else value / scaler.scale(torch.ones_like(value))


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


def shortened(norms: list[float], factors: list[float]) -> list[float]:
    return [n * f for n, f in zip(norms, factors, strict=True)] if factors else norms


def own_score(value: float, recent: list[float]) -> float:
    """Robust z of the logarithm of a norm among earlier ones of the same parameter."""
    logs = sorted(math.log(x) for x in recent if x > 0)
    if not math.isfinite(value):
        return math.inf
    if value <= 0 or len(logs) < 8:
        return 0.0
    center = logs[len(logs) // 2]
    deviations = sorted(abs(x - center) for x in logs)
    return (math.log(value) - center) / max(1.4826 * deviations[len(logs) // 2], 0.1)


def sentence(record: Mapping[str, Any]) -> str:
    """One spike in words."""
    seen = ", ".join(
        f"{signal} {record['signals'][signal]['value']:.3g}"
        + (
            f" (usual {record['signals'][signal]['center']:.3g})"
            if record["signals"][signal].get("center") is not None
            else ""
        )
        for signal in record["spiked"]
    )
    first, before, after = record["by_share"][0], record["before"], record["max_loss_after"]
    caused = ""
    if before and "loss" in record["spiked"]:
        ago = record["step"] - before["step"]
        caused = (
            f"; the largest update came {ago} {'step' if ago == 1 else 'steps'} before, from a "
            f"gradient of {before['grad_norm']:.3g}, most of it in {before['parameter']}"
        )
    followed = "" if after is None else f"; highest loss within {FOLLOW} steps {after:.3g}"
    return (
        f"step {record['step']} (epoch {record['epoch']}, batch {record['batches']}): {seen}; "
        f"{first['name']} holds {first['share']:.0%} of the squared gradient{caused}{followed}."
    )


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
