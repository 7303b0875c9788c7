"""From counts to a cause. The order of causes was written down before anything was scored."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from datamodules.loaders.images import ImageLoader
from pipeline.why.changes import Slot
from pipeline.why.experiments import Case, Experiment
from pipeline.why.trials import SEEDS, Tally, Trials

# Causes overlap: half the rate, a fresh second moment and clipping all take the classic spike away.
# The first that counts is the verdict. Samples come early if the spike is in their own loss, and
# late if they only set off the update that made it: a hard sample sets off many a spike that the
# optimizer makes. The order of samples comes late for the same reason.
_PRECEDENCE = (
    *("buffer", "own samples", "precision", "jump"),
    *("moment", "rate", "samples", "order", "dropout"),
)

SAID = {
    "irreproducible": "the machine or a kernel that is not deterministic, not the training",
    "buffer": "a poisoned buffer",
    "samples": "the samples",
    "precision": "the precision",
    "jump": "a jump of the learning rate",
    "moment": "a second moment that is out of date",
    "rate": "a learning rate too high for the curvature",
    "order": "the order of the samples",
    "dropout": "the units that dropout left",
    "unknown": "cannot tell",
}


@dataclass
class Verdict:
    """The cause of a spike, and the counts that say so.

    Attributes:
        cause: A key of ``SAID``.
        why: The evidence, as a sentence.
        samples: Ids of the samples, if it is some.
        images: Those samples, (N, H, W, C) uint8, if they are images.
        tally: The forks that lost the spike.
    """

    cause: str
    why: str
    samples: list[Any] = field(default_factory=list)
    images: Tensor | None = None
    tally: Tally | None = None

    def __str__(self) -> str:
        return f"{SAID[self.cause]}: {self.why}"


def decide(trials: Trials) -> Verdict:
    """Try each cause, the first in order first, and say which it is."""
    case = trials.case
    if trials.neutral.mostly:
        return Verdict("unknown", f"it goes away under any change ({trials.neutral}).")
    experiments = case.experiments()
    found: Verdict | None = None
    for cause in _PRECEDENCE:
        if found is None and cause == ("own samples" if case.spike.is_own else "samples"):
            found = _samples_at_fault(trials)
        for experiment in experiments:
            if experiment.cause == cause and found is None and trials.counts(experiment):
                tally = trials.run(experiment, SEEDS)
                found = Verdict(cause, _gone(experiment.name, tally, trials), tally=tally)
    for experiment in experiments:  # for the table, and for the remedies
        trials.screen(experiment)
    if found:
        return found
    tried = [t for t in trials.tallies if t.cause and t.mostly]
    near = "; ".join(f"gone in {t} with {t.name}" for t in tried) or "no change takes it away"
    return Verdict("unknown", f"{near}, in {trials.neutral} under the neutral change.")


def _gone(name: str, tally: Tally, trials: Trials) -> str:
    sized = next((t for t in trials.tallies if t.name == f"noise as large as: {name}"), None)
    also = f", in {sized} under one as large" if sized else ""
    return f"gone in {tally} with {name}, in {trials.neutral} under the neutral change{also}."


def _samples_at_fault(trials: Trials) -> Verdict | None:
    """The samples without which the spike is gone, and with which it moves to another step.

    That it goes without them says little: a step of other samples is another step. Only samples
    that bring it along to a calm step are at fault.
    """
    case, spike = trials.case, trials.case.spike
    for step in sorted({spike.first, spike.peak}):
        slots = case.slots(step)
        whole = case.replaced(slots, step, f"other samples in step {step}")
        if not trials.screen(whole).mostly:
            continue
        moved = case.follows(slots, step, f"samples of step {step} moved: it comes along")
        if moved is None or not trials.screen(moved).mostly:
            continue

        def without(
            part: Sequence[Slot], step: int = step, slots: list[Slot] = slots
        ) -> Experiment:
            first, last = slots.index(part[0]), slots.index(part[-1])
            return case.replaced(part, step, f"without samples {first} to {last} of step {step}")

        fewest = trials.smallest(slots, without)
        some = describe(case, fewest, step)
        alone = (
            case.replaced(fewest, step, f"without {some}") if len(fewest) < len(slots) else whole
        )
        comes = case.follows(fewest, step, f"{some} moved: it comes along")
        if trials.counts(alone) and comes and trials.counts(comes):
            out, along = trials.run(alone, SEEDS), trials.run(comes, SEEDS)
            why = (
                f"gone in {out} without {some}, in {trials.neutral} under the neutral change; "
                f"it comes along in {along} when moved to step {comes.at}."
            )
            ids, images = _look_up(case, fewest)
            return Verdict("samples", why, ids, images, out)
    return None


def _look_up(case: Case, slots: Sequence[Slot]) -> tuple[list[Any], Tensor | None]:
    """Ids of samples, if they have some, and images (N, H, W, C) uint8, if they are some."""
    loader = case.again.datamodule.train_dataloader()
    loader.set_epoch(slots[0][0])
    loader.batch_indices()  # the order of that epoch
    rows = loader.sample(loader._order[[place for _, place in slots]]).tolist()
    ids = loader.identify(slots[0][0], rows) or [] if loader.identify else []
    return ids, loader.tensors[0][rows].cpu() if isinstance(loader, ImageLoader) else None


def describe(case: Case, slots: Sequence[Slot], step: int) -> str:
    """Samples in words, by their ids or by where they are."""
    ids, _ = _look_up(case, slots)
    if len(slots) == 1:
        if ids:
            return f"sample {ids[0]}"
        epoch, place = slots[0]
        batch, number = divmod(place, case.batch_size)
        return f"sample {number} of batch {batch} in epoch {epoch}"
    return f"{len(slots)} samples of step {step}"
