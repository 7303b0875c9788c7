"""Spikes as records: lines of JSON, and in words."""

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

FOLLOW = 20  # optimizer steps over which the outcome of a spike is watched


def last_step(record: Mapping[str, Any]) -> int:
    """The last optimizer step that a record is about."""
    step: int = record.get("until", record["step"])
    return step


def top_parameter(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parameter to look at first: one out of proportion, else the one that holds most."""
    return record["by_z" if "parameter" in record["spiked"] else "by_share"][0]


def format_spike(record: Mapping[str, Any]) -> str:
    """One spike in words."""
    words = []
    for signal in record["spiked"]:
        verdict = record["signals"][signal]
        center = verdict.get("center", math.nan)
        usual = f" (usual {center:.3g})" if math.isfinite(center) else ""
        words.append(f"{signal} {verdict['value']:.3g}{usual}")
    parameter, before, after = top_parameter(record), record["before"], record["max_loss_after"]
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


def json_safe(value: Any) -> Any:
    """The same with infinities and NaN as text, which JSON does not have."""
    if isinstance(value, dict):
        return {k: json_safe(v) for k, v in value.items()}
    if isinstance(value, list):
        return [json_safe(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def read_records(path: Path | None) -> list[dict[str, Any]]:
    """The records in a file, oldest first; a last line that was cut short is left out."""
    if path is None or not path.exists():
        return []
    numbers = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}

    def revive(facts: dict[str, Any]) -> dict[str, Any]:
        return {k: numbers.get(v, v) if isinstance(v, str) else v for k, v in facts.items()}

    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line, object_hook=revive) for line in lines if line.endswith("\n")]


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

    def begin(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Replace what is in the file by these records, whole or not at all."""
        self._settled = self._end = 0
        if self.path and (records or self.path.exists()):
            replace_file(self.path, lines_of(records))

    def write(self, records: Sequence[Mapping[str, Any]], open_since: int) -> None:
        """Bring the file up to date.

        Args:
            records: All of them.
            open_since: The first optimizer step whose record may still change.
        """
        if self.path is None or not records:
            return
        if not self.path.exists():
            self.begin(records[:0])
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
        with self.path.open("r+b") as file:
            file.seek(self._end)
            settled = self._settled
            while settled < len(records) and last_step(records[settled]) < open_since:
                settled += 1
            file.write(lines_of(records[self._settled : settled]))
            self._settled, self._end = settled, file.tell()
            file.write(lines_of(records[settled:]))
            file.truncate()


def lines_of(records: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(f"{json.dumps(json_safe(record))}\n" for record in records).encode()


def save(content: Any, path: Path) -> None:
    """What torch writes of it, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    replace_file(path, buffer.getvalue())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
