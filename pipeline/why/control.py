"""The run repeated without a change: is it the same, bit for bit, and does it spike again?"""

from dataclasses import dataclass, field
from pathlib import Path

from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from core.errors import UserError
from core.runs import Run, load_checkpoint
from pipeline.why.again import Again, Course, Follow, Rows
from pipeline.why.spike import Spike
from steadyfit.watching.records import FOLLOW

MORE = 10  # steps behind a spike that forks may want to know of


@dataclass
class Control:
    """How an exact repetition went.

    Attributes:
        since: The checkpoint that it began with, in the run folder; None for the start.
        steps: Optimizer steps that it took.
        values: Recorded values that were compared.
        differing: The first of them that was another one, in words.
        checkpoints: Recorded checkpoints whose weights were compared, and those with others.
        spikes: Whether the spike came again.
        rates: Learning rates of the steps just before the fork.
    """

    since: str | None
    steps: int
    values: int = 0
    differing: str | None = None
    checkpoints: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    spikes: bool = True
    rates: list[float] = field(default_factory=list)

    @property
    def is_exact(self) -> bool:
        return not self.differing and not self.changed

    def __str__(self) -> str:
        begin = f"from {self.since}" if self.since else "from the start"
        weights = f" and the weights of {', '.join(self.checkpoints)}" if self.checkpoints else ""
        text = f"{self.steps:,} steps {begin}: {self.values:,} recorded values{weights}"
        if self.is_exact:
            return f"{text}, all equal bit for bit"
        others = [self.differing] if self.differing else []
        return f"{text}; NOT equal: {'; '.join([*others, *self.changed])}"


def repeat(run: Run, again: Again, spike: Spike, recorded: Rows, snapshot: Path) -> Control:
    """Train the run again up to and past a spike, and keep the state before it.

    Raises:
        UserError: The data have changed, or the run cannot be trained that far.
    """
    held = checkpoints(run, again)
    since = max((step for step in held if step <= spike.start), default=0)
    path, _ = held.get(since, (None, {}))
    averaged = any(isinstance(c, WeightAveraging) for c in again.config_init.fit.trainer.callbacks)
    between = {
        step: (p.name, weights)
        for step, (p, weights) in held.items()
        if since < step <= spike.end and not averaged  # else they hold the mean
    }
    names = [name for name, _ in between.values()]
    begin = Course()
    save = None if since == spike.start and path else spike.start
    if save is None and path:
        snapshot.write_bytes(path.read_bytes())
    follow = Follow(begin, spike.end + MORE, save, snapshot, checkpoints=between)
    course = again.train(path, follow)
    if not snapshot.exists() or max(course.rows, default=0) < spike.peak:
        raise UserError(
            f"the run ends before step {spike.peak} when it is trained again: it has been "
            "continued with other settings, or its data are others."
        )
    since_file = path.relative_to(run.folder).as_posix() if path else None
    control = Control(since_file, len(course.rates), checkpoints=names)
    control.values, control.differing = compare(course.rows, recorded)
    control.changed = [f"the weights of {name}" for name in course.differing]
    control.rates = [rate for step, rate in course.rates.items() if step < spike.start][-FOLLOW:]
    control.spikes = spike.is_in(course, spike.onset, spike.end)
    return control


def checkpoints(run: Run, again: Again) -> dict[int, tuple[Path, dict[str, Tensor]]]:
    """States of a run and their weights, by optimizer steps; damaged ones are left out.

    Raises:
        UserError: The data have changed since one was written.
    """
    data = again.datamodule
    found: dict[int, tuple[Path, dict[str, Tensor]]] = {}
    for path in sorted(run.folder.glob("*/*.ckpt")):  # of checkpoints, of the black box
        try:
            checkpoint = load_checkpoint(path)
        except UserError:
            continue
        trained_on = checkpoint.get(type(data).__qualname__, {}).get("digest", data.digest)
        if trained_on != data.digest:
            raise UserError(
                f"the data have changed since {path} was written (another digest); a spike is "
                "explained with those that made it."
            )
        found[checkpoint["global_step"]] = path, checkpoint["state_dict"]
    return found


def compare(rows: Rows, recorded: Rows) -> tuple[int, str | None]:
    """How many values of the training both have, and the first that differs, in words."""
    count, first = 0, None
    for step in sorted(rows.keys() & recorded.keys()):
        names = rows[step].keys() & recorded[step].keys()
        # thresholds and counts are the monitor's, not of the training
        for name in sorted(n for n in names if n.startswith("train/") or n.endswith("/total")):
            count += 1
            was, now = recorded[step][name], float(f"{rows[step][name]:.9g}")
            if was != now and not (was != was and now != now) and first is None:
                first = f"{name} of step {step} is {now:.9g}, was {was:.9g}"
    return count, first
