"""Spikes as records: lines of JSON, and in words."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLLOW = 20  # optimizer steps over which the outcome of a spike is watched


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


def finite_line(record: Mapping[str, Any]) -> str:
    """A record as a line of ``spikes.jsonl``."""
    return json.dumps(finite(record)) + "\n"


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
