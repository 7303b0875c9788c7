"""Spikes as records: what is known of each, as lines of JSON, and in words."""

import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..detector import SpikeDetector

FOLLOW = 20  # optimizer steps over which the outcome of a spike is watched
SPIKES = ("spike", "nonfinite")  # kinds of verdicts
# keys that a line has only where there is something to say
_OPTIONAL = {"name", "update_norm", "update_rms", "until", "samples"}


@dataclass
class Verdict:
    """A detector's judgement of one value; see :class:`SpikeDetector`."""

    value: float
    kind: str
    z: float = 0.0
    threshold: float = math.inf
    center: float = math.nan
    scale: float = math.nan
    raised: int = 0
    name: str | None = None  # of a parameter or buffer

    @classmethod
    def of(cls, detector: SpikeDetector, value: float) -> "Verdict":
        """Judge the next value of a signal."""
        detector.update(value)
        return cls(
            value,
            detector.kind,
            detector.score,
            detector.threshold,
            detector.center,
            detector.scale,
            detector.raised,
        )


@dataclass
class ParameterEvidence:
    """The part of one parameter in a step."""

    name: str
    grad_norm: float
    share: float  # of the squared gradient norm
    z: float  # of its gradient against those of the others
    update_norm: float | None = None
    update_rms: float | None = None


@dataclass
class EarlierStep:
    """A step in brief, as the cause of what may come after it."""

    step: int
    batches: list[int]
    grad_norm: float
    update_norm: float
    update_z: float
    parameter: str  # with the largest gradient

    @property
    def severity(self) -> tuple[float, float]:
        """Score of the update, then its norm."""
        return self.update_z, self.update_norm


def _facts_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    facts = dict(pairs)
    if facts.get("kind") == "overflow":  # nothing else was measured
        return {name: facts[name] for name in ("value", "kind")}
    return {k: value for k, value in pairs if value is not None or k not in _OPTIONAL}


@dataclass
class SpikeRecord:
    """The evidence about one optimizer step, and what followed: a line of ``spikes.jsonl``."""

    step: int
    epoch: int = 0
    # indices in the epoch; several when gradients are accumulated
    batches: list[int] = field(default_factory=list)
    optimizer: int = 0
    lr: float = math.nan  # the largest of the parameter groups
    spiked: list[str] = field(default_factory=list)  # signals
    signals: dict[str, Verdict] = field(default_factory=dict)
    clipped_grad_norm: float | None = None
    update_factor: float | None = None  # the smallest by which an update was shortened
    by_share: list[ParameterEvidence] = field(default_factory=list)  # that hold most of the norm
    by_z: list[ParameterEvidence] = field(default_factory=list)  # furthest out of proportion
    before: EarlierStep | None = None  # the largest update just before
    reaction: str = "log"
    confirmed: bool = False  # the loss has spiked as well
    max_loss_after: float | None = None  # in the next ``FOLLOW`` steps
    steps_to_recover: int | None = None  # until the loss was ordinary again
    until: int | None = None  # the last of several steps in a row without a finite value
    samples: list[Any] | None = None  # ids of those in the batches

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "SpikeRecord":
        """Take what :meth:`facts` has given, here or in an earlier version."""
        record = _take(cls, facts)
        record.signals = {k: _take(Verdict, own) for k, own in facts["signals"].items()}
        record.by_share = [_take(ParameterEvidence, own) for own in facts["by_share"]]
        record.by_z = [_take(ParameterEvidence, own) for own in facts["by_z"]]
        record.before = _take(EarlierStep, facts["before"]) if facts["before"] else None
        return record

    def facts(self) -> dict[str, Any]:
        """Dictionaries, lists, numbers and texts that say the same."""
        return asdict(self, dict_factory=_facts_of)

    @property
    def last_step(self) -> int:
        """The last optimizer step that it is about."""
        return self.step if self.until is None else self.until

    @property
    def top_parameter(self) -> ParameterEvidence:
        """The parameter to look at first: one out of proportion, else the one that holds most."""
        return (self.by_z if "parameter" in self.spiked else self.by_share)[0]

    @property
    def is_nonfinite(self) -> bool:
        """True if nothing but values that are not finite makes it a spike."""
        return {self.signals[signal].kind for signal in self.spiked} == {"nonfinite"}

    @property
    def kinds(self) -> set[str]:
        """Kinds of the verdicts of all signals."""
        return {verdict.kind for verdict in self.signals.values()}


_T = TypeVar("_T")


def _take(kind: Callable[..., _T], facts: Mapping[str, Any]) -> _T:
    """Make a dataclass of the facts that it knows."""
    return kind(**{f.name: facts[f.name] for f in fields(kind) if f.name in facts})  # type: ignore[arg-type]


def format_spike(record: SpikeRecord) -> str:
    """Say one spike in words."""
    words = []
    for signal in record.spiked:
        verdict = record.signals[signal]
        usual = f" (usual {verdict.center:.3g})" if math.isfinite(verdict.center) else ""
        words.append(f"{signal} {verdict.value:.3g}{usual}")
    parameter, before = record.top_parameter, record.before
    text = (
        f"step {record.step} (epoch {record.epoch}, batch {record.batches}): "
        f"{', '.join(words)}; {parameter.name} holds {parameter.share:.0%} of the squared gradient"
    )
    if before and "loss" in record.spiked:
        ago = record.step - before.step
        text += (
            f"; the largest update came {ago} {'step' if ago == 1 else 'steps'} before, from a "
            f"gradient of {before.grad_norm:.3g}, most of it in {before.parameter}"
        )
    if record.max_loss_after is not None:
        text += f"; highest loss in the {FOLLOW} steps after it: {record.max_loss_after:.3g}"
    return f"{text}."


def json_safe(value: Any) -> Any:
    """The same with infinities and NaN as text, which JSON does not have."""
    if isinstance(value, dict):
        return {k: json_safe(v) for k, v in value.items()}
    if isinstance(value, list):
        return [json_safe(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def read_lines(path: Path | None) -> list[dict[str, Any]]:
    """Lines of JSON that :func:`json_safe` was asked for; one that was cut short is left out."""
    if path is None or not path.exists():
        return []
    numbers = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}

    def revive(facts: dict[str, Any]) -> dict[str, Any]:
        return {k: numbers.get(v, v) if isinstance(v, str) else v for k, v in facts.items()}

    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line, object_hook=revive) for line in lines if line.endswith("\n")]


def read_records(path: Path | None) -> list[SpikeRecord]:
    """The records in a ``spikes.jsonl``, oldest first; none if there is no such file."""
    return [SpikeRecord.of(facts) for facts in read_lines(path)]


class RecordFile:
    """Records as lines of a file, of which only the last may still change.

    A write begins at the first line that may: what is older is never written again, so that a
    training which spikes at every step writes each record about twice.

    Args:
        path: The file; None to write nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._settled = 0  # records that do not change any more
        self._end = 0  # of their lines, in bytes

    def begin(self, records: Sequence[SpikeRecord]) -> None:
        """Replace what is in the file by these records, whole or not at all."""
        self._settled = self._end = 0
        if self.path and (records or self.path.exists()):
            _replace_file(self.path, _lines_of(records))

    def write(self, records: Sequence[SpikeRecord], open_since: int) -> None:
        """Bring the file up to date.

        Args:
            records: All of them.
            open_since: The first optimizer step whose record may still change.
        """
        if self.path is None or not records:
            return
        if not self.path.exists():
            self._settled = self._end = 0
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
        with self.path.open("r+b") as file:
            file.seek(self._end)
            settled = self._settled
            while settled < len(records) and records[settled].last_step < open_since:
                settled += 1
            file.write(_lines_of(records[self._settled : settled]))
            self._settled, self._end = settled, file.tell()
            file.write(_lines_of(records[settled:]))
            file.truncate()


def _lines_of(records: Sequence[SpikeRecord]) -> bytes:
    return "".join(f"{json.dumps(json_safe(record.facts()))}\n" for record in records).encode()


def save(content: Any, path: Path) -> None:
    """Write what torch saves of it, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    _replace_file(path, buffer.getvalue())


def _replace_file(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
