"""The run repeated without a change: is it the same, bit for bit, and does it spike again?"""

from dataclasses import dataclass, field
from pathlib import Path

from core.errors import UserError
from core.runs import Run, load_checkpoint
from pipeline.why.again import Again, Course, Rows
from pipeline.why.spike import Spike
from steadyfit.watching.records import FOLLOW

MORE = 10  # steps after a spike that forks may use


@dataclass
class Control:
    """Result of an exact repetition.

    Attributes:
        since: The checkpoint that it began with, in the run folder; None for the start.
        steps: Optimizer steps that it took.
        values: Recorded values that were compared.
        differing: The first of them that was another one, in words.
        spikes: True if the spike came again.
        rates: Learning rates of the steps just before the fork.
    """

    since: str | None
    steps: int
    values: int = 0
    differing: str | None = None
    spikes: bool = True
    rates: list[float] = field(default_factory=list)

    @property
    def is_exact(self) -> bool:
        return not self.differing

    def __str__(self) -> str:
        begin = f"from {self.since}" if self.since else "from the start"
        text = f"{self.steps:,} steps {begin}: {self.values:,} recorded values"
        if self.is_exact:
            return f"{text}, all equal bit for bit"
        return f"{text}; NOT equal: {self.differing}"


def repeat(run: Run, again: Again, spike: Spike, recorded: Rows, snapshot: Path) -> Control:
    """Train the run again up to and past a spike, and keep the state before it.

    Raises:
        UserError: The data have changed, or the run cannot be trained that far.
    """
    states = _checkpoints(run, again)
    since = max((step for step in states if step <= spike.start), default=0)
    path = states.get(since)
    save = None if since == spike.start and path else spike.start
    if save is None and path:
        snapshot.write_bytes(path.read_bytes())
    course = again.train(path, Course(spike.end + MORE, save, snapshot))
    if not snapshot.exists() or max(course.rows, default=0) < spike.peak:
        raise UserError(
            f"the run ends before step {spike.peak} when it is trained again: it has been "
            "continued with other settings, or its data are others."
        )
    since_file = path.relative_to(run.folder).as_posix() if path else None
    control = Control(since_file, len(course.rates))
    control.values, control.differing = compare(course.rows, recorded)
    control.rates = [rate for step, rate in course.rates.items() if step < spike.start][-FOLLOW:]
    control.spikes = spike.is_in(course, spike.onset, spike.end)
    return control


def _checkpoints(run: Run, again: Again) -> dict[int, Path]:
    """Whole states of a run, by optimizer steps; damaged ones are left out.

    Raises:
        UserError: The data have changed since one was written.
    """
    data = again.datamodule
    found: dict[int, Path] = {}
    for path in sorted(run.folder.glob("*/*.ckpt")):  # of checkpoints, of the black box
        try:
            checkpoint = load_checkpoint(path)
        except UserError:
            continue
        if checkpoint.get("data_digest", data.digest) != data.digest:
            raise UserError(
                f"the data have changed since {path} was written (another digest); a spike is "
                "explained with those that made it."
            )
        found[checkpoint["global_step"]] = path
    return found


def compare(rows: Rows, recorded: Rows) -> tuple[int, str | None]:
    """Count the values of training that both have, and name the first that differs."""
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
