"""The experiments, in one table. Each is a plain change; all of them start from one state."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from lightning.pytorch.callbacks import Callback
from torch import nn

from callbacks import UpdateClipping
from pipeline.why import changes
from pipeline.why.again import Again, Course
from pipeline.why.changes import Slot, StepChange
from pipeline.why.spike import Spike

_JUMP = 1.5  # times the rate of the step before
_RAMP = 3.0  # times what the rate grew by in the step before
CLIPPED = "gradient norm at most "
SHORT = f"second moment of the last {changes.MEMORY} steps"
_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_APART = 5  # optimizer steps by which samples are moved

Make = Callable[[int], Sequence[Callback]]


@dataclass(frozen=True)
class Experiment:
    """A change, and the cause that it speaks for if the spike goes with it.

    Attributes:
        make: The change, by the seed of its random numbers.
        at: The first optimizer step that is another one.
        cause: None if it shows a remedy, or a part of the way.
        options: Of the trainer.
        looks_at: First and last step in which the spike is looked for, if not in its own place.
    """

    name: str
    make: Make
    at: int
    cause: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    looks_at: tuple[int, int] | None = None


@dataclass
class Case:
    """A spike, the run again, and the steps around it."""

    spike: Spike
    again: Again
    course: Course  # of the fork without a change
    states: set[str]  # names of the tensors that the optimizers keep of a parameter

    # Places in the order of the samples

    @property
    def batch_size(self) -> int:
        loader = self.again.datamodule.train_dataloader()
        return int(loader.batch_size * loader.world_size)

    def slots(self, step: int) -> list[Slot]:
        """Places of the samples of an optimizer step."""
        epoch, batches = self.course.places[step]
        size = self.batch_size
        return [(epoch, b * size + i) for b in batches for i in range(size)]

    def others(self, slots: Sequence[Slot], seed: int) -> Callback:
        """Put others of the epoch in the place of samples, from outside of the fork if it can."""
        drawn = random.Random(seed)
        near = {place for step in self.course.places for place in self.slots(step)}
        size = len(self.again.datamodule.train_dataloader()) * self.batch_size
        pools = {}
        for epoch in {epoch for epoch, _ in slots}:
            far = [p for p in range(size) if (epoch, p) not in near]
            pools[epoch] = far or [p for p in range(size) if (epoch, p) not in slots]
        return changes.OtherSamples(
            {(epoch, to): (epoch, drawn.choice(pools[epoch])) for epoch, to in slots}
        )

    def elsewhere(self, step: int) -> int | None:
        """A step of the same epoch to which its samples can be moved."""
        for other in (step - _APART, self.spike.end + 2):
            known = self.course.places.get(other)
            if other >= self.spike.start and known and known[0] == self.course.places[step][0]:
                return other
        return None

    def moved(self, slots: Sequence[Slot], to: int, seed: int) -> Callback:
        """Let samples change places with some of another step."""
        places = random.Random(seed).sample(self.slots(to), len(slots))
        pairs = dict(zip(slots, places, strict=True))
        return changes.OtherSamples(pairs | {there: here for here, there in pairs.items()})

    def reordered(self, seed: int) -> Callback:
        """Spread the samples of the fork over its batches anew, those of an epoch among them."""
        sources: dict[Slot, Slot] = {}
        steps = range(self.spike.start, self.spike.end + 1)
        places = [slot for step in steps for slot in self.slots(step)]
        for epoch in sorted({epoch for epoch, _ in places}):
            own = [slot for slot in places if slot[0] == epoch]
            sources |= zip(own, random.Random(seed).sample(own, len(own)), strict=True)
        return changes.OtherSamples(sources)

    # What is tried

    def replaced(self, slots: Sequence[Slot], step: int, name: str) -> Experiment:
        return Experiment(name, lambda seed: [self.others(slots, seed)], step, "samples")

    def follows(self, slots: Sequence[Slot], step: int, name: str) -> Experiment | None:
        """Move samples to another step, where the spike has to come along."""
        to = self.elsewhere(step)
        if to is None or len(slots) > len(self.slots(to)):
            return None
        first = to + (step == self.spike.first and not self.spike.is_own)
        last = to + min(_APART - 1, self.spike.peak - step + 1)
        return Experiment(name, lambda s: [self.moved(slots, to, s)], to, looks_at=(first, last))

    def experiments(self) -> list[Experiment]:
        """All but those of single samples, without those that cannot matter."""
        spike, module = self.spike, self.again.model
        start, network = spike.start, module.network
        parameter = spike.record.by_share[0].name
        found: list[Experiment] = []

        def add(cause: str | None, name: str, make: Make, at: int = start, **options: Any) -> None:
            found.append(Experiment(name, make, at, cause, options))

        if any(b.is_floating_point() for b in network.buffers()):
            add("buffer", "buffers kept as before", lambda s: [changes.KeptBuffers()])
        if self.again.precision not in ("32-true", "32"):
            add("precision", "float32", lambda s: [], precision="32-true")
        if jump := self.jump():
            step, factor = jump
            kept = f"learning rate as before step {step}"
            at = max(start, step)
            slower = changes.scaled_rate(1 / factor)
            add("jump", kept, lambda s: [StepChange(slower, step)], at)
        if self.states.intersection(changes.SECOND_MOMENTS):
            fresh = StepChange(changes.fresh_moment, start)
            add("moment", "second moment never out of date", lambda s: [fresh])
            add(None, SHORT, lambda s: [StepChange(changes.short_memory, start)])
        half = StepChange(changes.scaled_rate(0.5), start)
        add("rate", "half the learning rate", lambda s: [half])
        add("order", "samples in other orders", lambda s: [self.reordered(s)])
        if _has_dropout(network):
            add("dropout", "other dropout", lambda s: [changes.OtherDropout(1000 + s)])
        if self.states.intersection(changes.MOMENTA):
            cleared = StepChange(changes.no_momentum, start, last=start)
            add(None, "momentum cleared", lambda s: [cleared])
        add(None, "update clipping", lambda s: [UpdateClipping()])
        norms = [row.get("grad_norm/total", 0.0) for row in self.course.rows.values()]
        usual = float(f"{median(norms):.2g}")
        trainer = self.again.config.fit.trainer
        clipped = trainer.gradient_clip_val or any(
            "Clipping" in c.class_path for c in trainer.callbacks
        )
        if usual > 0 and not clipped:
            name = f"{CLIPPED}{usual:g}"
            add(None, name, lambda s: [], gradient_clip_val=usual)
        if parameter in dict(module.named_parameters()):
            first, last = max(start, spike.first - 1), spike.peak
            name = f"{parameter} not updated"
            without = StepChange(changes.left_out(parameter), first, last)
            add(None, name, lambda s: [without], first)
        return found

    def jump(self) -> tuple[int, float] | None:
        """Last step before the peak whose rate is much larger than before, and the factor.

        A warm-up, whose rate grows as much in each step, is none.
        """
        rates = self.course.rates
        for step in range(self.spike.peak, min(rates) + 1, -1):
            earlier, before, now = (rates.get(step - n, 0.0) for n in (2, 1, 0))
            if before > 0 and now > _JUMP * before and now - before > _RAMP * (before - earlier):
                return step, now / before
        return None


def _has_dropout(network: nn.Module) -> bool:
    """Tell whether a layer drops something."""
    rates = [getattr(m, "dropout", 0.0) for m in network.modules()]  # of recurrence, attention
    rates += [m.p for m in network.modules() if isinstance(m, _DROPOUT)]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)
