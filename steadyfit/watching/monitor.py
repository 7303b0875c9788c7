"""The steps of a training judged together: which spiked, and what followed."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import processes
from ..clipping import overwrites_gradients
from ..detector import SpikeDetector
from ..probe import StepProbe, index_of, names_of, refuse_complex, unwrapped, unwrapped_model
from .buffers import Buffers
from .observation import AFTER_STEP, Observation, learning_rate, read, scalar
from .optimizer_monitor import OptimizerMonitor, row_of
from .reactions import Reaction, ReactionName, Rollback, act, reaction_of
from .records import SpikeRecord, save
from .skip import Skip
from .spike_log import CONFIRM, COUNTED, SpikeLog

_WEIGHT_NORM_EVERY = 10  # optimizer steps between two readings of the weight norms

_Rows = Mapping[int, Mapping[str, float]]  # by optimizer step


class SpikeMonitor:
    """Watch gradient, update, loss and buffers of every optimizer step, and record what spiked.

    Six signals are watched for each optimizer, four of them by a :class:`SpikeDetector`:

    - ``gradient``: L2 norm over all parameters, after unscaling and before clipping;
    - ``parameter``: the norm of one parameter's gradient against that of all the others, by
      :class:`ParameterRatios`;
    - ``update``: L2 norm of what the optimizer did with it;
    - ``promise``: how many times its loss the step promises to take off it, to first order; more
      than five times, and thirty times what is usual, announces a spike of the loss;
    - ``loss``: mean over the batches of the step and over all processes;
    - ``buffer``: the largest factor by which the norm of a buffer (a running variance) has grown.

    Every spike becomes a line of ``spikes.jsonl``: when, which signal and how far out, the
    parameters with the largest share and those furthest out of proportion, the largest update just
    before, and what followed. Steps in a row without a finite value are one line; a loss that
    grows slowly is one as well, see :class:`~steadyfit.detector.DriftDetector`. The norms of each
    parameter over the whole training go to ``norms.pt``, binned over time.

    With the reactions ``log`` and ``skip`` the device is read every so many steps, once for all of
    them. ``skip`` takes a step back, see :class:`Skip`; ``rollback``, ``stop`` and an own
    :class:`Reaction` read once a step, before it is taken. Values that a gradient scaler is going
    to throw away (overflow in float16) are recorded and neither counted nor acted upon.

    Example::

        with SpikeMonitor(model, optimizer, folder="runs/mine") as monitor:
            for x, y in batches:
                loss = loss_function(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                monitor.before_step(loss)  # gradients are unscaled, and not yet clipped
                optimizer.step()

    Args:
        model: What is trained; its names are those of the records.
        optimizer: What trains it, or several of them.
        folder: Where ``spikes.jsonl`` and ``norms.pt`` go; None to keep records in memory.
        log: Is given the values of each step, at every read, in the first process.
        every: Optimizer steps between two reads.
        reaction: What to do about a spike.
        window: Steps over which a signal's usual level is taken.
        threshold: Robust standard deviations of the logarithm beyond which a value is a spike.

    Attributes:
        optimizers: Those whose steps are observed.
        spikes: Their records and counts.
        global_step: Optimizer steps so far.
        should_stop: Set by a reaction that wants training to end.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        folder: str | Path | None = None,
        log: Callable[[_Rows], None] | None = None,
        every: int = 50,
        reaction: ReactionName | Reaction = "log",
        window: int = 128,
        threshold: float = 4.5,
    ) -> None:
        if every < 1 or every != int(every):
            raise ValueError(f"every must be a whole number of at least 1, got {every}.")
        SpikeDetector(window, threshold)  # refuses what it does not take
        self.folder = Path(folder) if folder is not None else None
        self._log = log
        self.every = every
        self.window = window
        self.threshold = threshold
        self.skips = reaction == "skip"
        self.reaction = reaction_of(reaction)
        self._hooks: list[tuple[StepProbe, Callable[[], None]]] = []  # of reactions on the device
        self.forget()
        self.attach(model, [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer))

    def forget(self) -> None:
        """Begin anew, as for another training."""
        for probe, function in self._hooks:
            probe.after_step.remove(function)
        self._hooks.clear()
        self.spikes = SpikeLog()
        self.global_step = 0
        self.should_stop = False
        self.monitors: dict[int, OptimizerMonitor] = {}  # by optimizer
        self.skip: dict[int, Skip] = {}
        self._pending: list[Observation] = []
        self._coming: dict[int, Observation] = {}  # the last one of each optimizer
        self._unread: list[Observation] = []  # of these, for a reaction
        self._due = False  # a read, as soon as no step is about to be taken
        self._late = False  # an update has spiked since a reaction could act
        self._last_spike = -math.inf
        self.buffers = Buffers(nn.Module())

    def attach(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Watch these from now on."""
        self.model = model = unwrapped_model(model)
        self.optimizers = [unwrapped(o) for o in optimizers]
        self.spikes.open(self.folder / "spikes.jsonl" if self.folder else None)
        for index, optimizer in enumerate(self.optimizers):
            probe = StepProbe.of(optimizer)
            refuse_complex(type(self).__name__, probe.params)
            probe.asks_products |= not overwrites_gradients(optimizer)
            self._name_parameters(index, probe.params)
            if self.skips or self.reaction:
                self._attach_reaction(index, probe)
        if isinstance(self.reaction, Rollback):
            self.reaction.learned = self._learned, self._unlearn
        if self.reaction and self.optimizers:
            self.reaction.on_skip = self._leave_out
            self.reaction.start(self.loop, model)
        self.buffers = Buffers(model)
        self.keep_buffers()

    @property
    def records(self) -> list[SpikeRecord]:
        return self.spikes.records

    @property
    def counts(self) -> dict[str, int]:
        return self.spikes.counts

    @property
    def loop(self) -> Any:
        """The loop that reactions act on."""
        return self

    def _attach_reaction(self, index: int, probe: StepProbe) -> None:
        skip = self.skip.setdefault(index, Skip()) if self.skips else None

        def after_step() -> None:
            o = self._coming.get(index)
            if skip and o and o.update is probe.update:
                skip.after_step(probe)
                o.skipped = skip.flag
            self.keep_buffers()

        probe.after_step.append(after_step)
        self._hooks.append((probe, after_step))

    def monitor_of(self, index: int) -> OptimizerMonitor:
        """The monitor of this optimizer's steps, made when it is first asked for."""
        if index not in self.monitors:
            self.monitors[index] = OptimizerMonitor(self.window, self.threshold)
        return self.monitors[index]

    def _name_parameters(self, index: int, params: Sequence[Tensor]) -> None:
        """Tell what an optimizer trains, at the start and when that has changed."""
        monitor = self.monitor_of(index)
        if monitor.params is not params:
            if monitor.params:
                self.flush(refresh=self._due)  # what is pending was of those before
            monitor.set_parameters(names_of(params, self.model), params)

    # Collecting, without a read from the device

    @torch.no_grad()
    def before_step(
        self,
        loss: Tensor | float | None = None,
        optimizer: Optimizer | None = None,
        *,
        epoch: int = 0,
        batches: Sequence[Any] = (),
        scale: Tensor | None = None,
        scaled: bool = False,
        earlier: Tensor | None = None,
    ) -> None:
        """Observe the step that is about to be taken, when its gradients are there.

        Call it after gradients are unscaled and before they are clipped.

        Args:
            loss: Whose gradient it is (); of several batches the mean.
            optimizer: Which of them takes the step; the only one by default.
            epoch: For the records.
            batches: What the batches of the step are called in the records.
            scale: What gradients are still multiplied by (), if the optimizer itself unscales them.
            scaled: A gradient scaler leaves out the step if its gradients are not finite.
            earlier: Squared norms (A,) of the gradients before they may have been clipped.

        Raises:
            ValueError: It is not known which optimizer takes the step.
        """
        step, index = self.global_step, index_of(optimizer, self.optimizers)
        optimizer = self.optimizers[index]
        probe = StepProbe.of(optimizer)
        coming = {i for i, o in self._coming.items() if o.is_coming}
        if probe.is_stepping and index in coming:
            return  # a step that evaluates its closure more than once, as L-BFGS does
        self._due |= step % self.every == 0
        if self._due and not coming - {index}:
            self.flush(refresh=True)
        if not self._pending:
            self.buffers.find()
        update = probe.snapshot(step, self)
        gradient = probe.gradient_squares()
        self._name_parameters(index, probe.params)
        if earlier is not None and len(earlier) == len(gradient):  # else some have come or gone
            gradient = torch.maximum(gradient, earlier)
        o = Observation(
            step=step,
            epoch=epoch,
            batches=list(batches),
            optimizer=index,
            probe=probe,
            lrs=[learning_rate(group) for group in optimizer.param_groups],
            loss=scalar(loss),
            gradient=gradient,
            update=update,
            scale=scale,
            scaled=scaled,
            weight=probe.weight_squares() if step % _WEIGHT_NORM_EVERY == 0 else None,
            buffers=self.buffers.norms(),
            is_new=self.monitor_of(index).is_new(probe.layout.active),
        )
        self._pending.append(o)
        self._coming[index] = o
        self.global_step = step + 1
        if self.skips:
            self.skip[index].before_step(o, self.buffers.kept)
        elif self.reaction:
            self._react(self.reaction, o, optimizer)
        if scaled:  # a scaler that throws the step away tells nobody
            self.keep_buffers()

    def keep_buffers(self) -> None:
        """Copy the buffers as they are before a forward pass, for a step that is left out.

        It is done after every step; who writes into buffers elsewhere calls it after that.
        """
        if self.skips or self.reaction:
            self.buffers.keep()

    def _react(self, reaction: Reaction, o: Observation, optimizer: Optimizer) -> None:
        """Read the coming step and the update before it, and act if one of them is a spike."""
        self._unread.append(o)
        read(self._unread, processes.average)
        spiked, self._late = self._late, False
        for each in self._unread:
            known = set(each.judged) if each.reaction == "log" else {*AFTER_STEP, *each.judged}
            self.monitor_of(each.optimizer).judge([each], self.buffers.names)
            if any(each.spiked(signal) for signal in each.judged.keys() - known):
                spiked = True
        self._unread = [o]
        if not spiked:
            if o.step - self._last_spike > CONFIRM:
                reaction.on_calm_step(self.loop, self.model, self.buffers.kept)
            return
        self._last_spike = o.step
        self.before_reaction(o)
        o.reaction = act(reaction, self.loop, self.model, optimizer)

    def _leave_out(self) -> None:
        """A reaction leaves out the step it was called for."""
        o = self._unread[-1]
        o.left_out = True
        self.monitor_of(o.optimizer).forget_buffers()
        self.buffers.kept.restore()

    def before_reaction(self, o: Observation) -> None:
        """Hook: a reaction is about to act on a step."""
        if o.is_left_scaled:
            raise ValueError("a reaction needs gradients that scaler.unscale_ has unscaled.")

    def _learned(self) -> Any:
        """Copy of what is usual by now, for a rollback."""
        return {index: monitor.learned() for index, monitor in self.monitors.items()}

    def _unlearn(self, learned: Mapping[int, Any]) -> None:
        for index, own in learned.items():
            self.monitors[index].unlearn(own)

    # Reading and judging

    def flush(self, *, refresh: bool = False, alone: bool = False) -> None:
        """Read and judge what is pending.

        Args:
            refresh: Let ``skip`` go by what is usual now; at steps that do not depend on how often
                something else wants to know, so that a resumed run skips the same steps.
            alone: The other processes may not be listening, so do not wait for them.
        """
        pending, self._pending, self._unread = self._pending, [], []
        if pending:
            read(pending, None if alone else processes.average)
            for index in {o.optimizer for o in pending}:
                monitor, own = self.monitor_of(index), [o for o in pending if o.optimizer == index]
                late = [o for o in own if o.reaction == "log" and "update" not in o.judged]
                monitor.judge(own, self.buffers.names)
                monitor.remember(own)
                self._late |= any(o.spiked(signal) for o in late for signal in AFTER_STEP)
            before, rows = len(self.records), {}
            for o in pending:
                counts = dict(self.counts)
                self.spikes.add(o, self.monitors[o.optimizer])
                rows[o.step] = row_of(o, len(self.optimizers) > 1)
                if counts != self.counts or o is pending[-1]:  # a step is known by its new count
                    rows[o.step] |= {f"spikes/{s}": float(self.counts[s]) for s in COUNTED}
            if processes.is_first():
                if not self.spikes.begun:  # the file of another training
                    self.spikes.begin()
                self.spikes.write(since=pending[0].step, until=pending[-1].step)
                self.on_records(self.records[before:])
                self.log_rows(rows)
        if refresh:
            self._due = False
            for index, skip in self.skip.items():
                skip.refresh(self.monitor_of(index))

    def log_rows(self, rows: _Rows) -> None:
        """Hook: the values of these steps are known, in the first process."""
        if self._log:
            self._log(rows)

    def on_records(self, fresh: Sequence[SpikeRecord]) -> None:
        """Hook: these records are new, in the first process."""

    # The end, and the state

    def finish(self) -> str:
        """Read what is pending, leave the norms of each parameter, and say what was seen."""
        self.flush()
        if not processes.is_first():
            return ""
        if self.folder and self.monitors:
            states = {str(i): m.history.state_dict() for i, m in self.monitors.items()}
            save(states, self.folder / "norms.pt")
        return self.spikes.summary(self.global_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        print(self.finish())

    def state_dict(self) -> dict[str, Any]:
        """Everything learned from the run, and the records that may still change."""
        self.flush()
        return {
            "watches": {str(i): monitor.state_dict() for i, monitor in self.monitors.items()},
            "thresholds": {str(i): skip.state_dict() for i, skip in self.skip.items()},
            **self.spikes.state_dict(self.global_step),
            "last_spike": self._last_spike,
            "now": self.global_step,
            "due": self._due,
            "late": self._late,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, own in state["watches"].items():
            self.monitors[int(key)] = OptimizerMonitor(self.window, self.threshold)
            self.monitors[int(key)].load_state_dict(own)
        for key, own in state.get("thresholds", {}).items():
            self.skip.setdefault(int(key), Skip()).load_state_dict(own)
        self.spikes.load_state_dict(state)
        self._last_spike = state["last_spike"]
        self._due, self._late = state.get("due", False), state.get("late", False)
        self.global_step = state.get("now", 0)  # callbacks of Lightning learn it from the trainer
        self.spikes.resume(self.global_step)
        self.keep_buffers()  # the model's may have been loaded before
