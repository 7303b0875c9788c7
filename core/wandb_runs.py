"""Names of W&B runs, and their artifacts: data -> model -> predictions -> score.

``train.py`` has a W&B run for each run, which a test joins. ``predict.py`` and ``submit.py`` have
runs of their own, since in W&B's graph a run makes something of what it uses; their ids begin with
that of training. Whoever makes a thing and whoever uses it describes it alike: to W&B the same
content is the same version, so nobody has to ask the server for it.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from core.provenance import command
from core.runs import Run

if TYPE_CHECKING:
    from wandb import Artifact
    from wandb import Run as WandbRun

_VARIABLES = {
    "group": "WANDB_RUN_GROUP",
    "job_type": "WANDB_JOB_TYPE",
    "tags": "WANDB_TAGS",
    "notes": "WANDB_NOTES",
}
_LONGEST_TAG = 64


def describe(run: Run, job_type: str, *tags: str | None) -> dict[str, Any]:
    """Return group, job type, tags and notes of a new W&B run that the environment does not set."""
    facts = {
        "group": run.folder.absolute().parent.name,  # the config or the study
        "job_type": job_type,
        "tags": [tag[:_LONGEST_TAG] for tag in dict.fromkeys(tags) if tag],
        "notes": command(),
    }
    return {name: fact for name, fact in facts.items() if _VARIABLES[name] not in os.environ}


def logger_settings(run: Run) -> dict[str, Any]:
    """Return settings of the run's W&B logger; empty if it has none, or its record is damaged."""
    try:
        loggers = yaml.safe_load(run.config.read_text())["trainer"]["logger"]
        found = [x for x in loggers or [] if x["class_path"].endswith("WandbLogger")]
        return dict(found[0]["init_args"])
    except (OSError, yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError):
        return {}


@dataclass(frozen=True)
class Piece:
    """A thing that one command makes and another one uses; W&B's artifact is made when needed.

    Args:
        kind: ``dataset``, ``model``, ``predictions`` or ``score``.
        name: What W&B calls it, below the kind.
        file: What it holds; None if its digest says all.
        digest: SHA-256 of data that stay where they are.
        metadata: Shown beside it.
    """

    kind: str
    name: str
    file: Path | None = None
    digest: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    def artifact(self) -> "Artifact":
        import wandb

        name = re.sub(r"[^A-Za-z0-9_.-]", "-", f"{self.kind}-{self.name}")  # an id may hold others
        made = wandb.Artifact(name, self.kind, metadata=self.metadata)
        if self.file:
            made.add_file(str(self.file), self.file.name, skip_cache=True)
        if self.digest:
            made.add_reference(f"sha256:{self.digest}", "digest", checksum=False)
        return made


def link(wandb_run: "WandbRun", used: Sequence[Piece], made: Sequence[Piece]) -> None:
    """Put artifacts on a W&B run, as its inputs and its outputs; a failure is a printed note."""
    try:
        for piece in used:
            if not wandb_run.offline:
                wandb_run.use_artifact(piece.artifact())
            elif log := getattr(wandb_run, "_log_artifact", None):  # has no public name offline
                log(piece.artifact(), is_user_created=True, use_after_commit=True)
        for piece in made:
            wandb_run.log_artifact(piece.artifact())
    except Exception as error:  # of W&B, of its server, of the disk: what was made is there
        print(f"note: artifacts are missing on the W&B run: {' '.join(str(error).split())}")


def keeps_artifacts(wanted: str | bool | None, *, offline: bool) -> bool:
    """Return true if artifacts are made: by default online alone, as offline files are copied."""
    return not offline if wanted is None else bool(wanted)


def join(run: Run, what: str, job_type: str = "") -> "WandbRun | None":
    """Open the W&B run of a run, to add to it, or the one of a job beside it.

    None if the run has none, W&B is off, or it refuses, which is a printed note.

    Args:
        run: Trained before.
        what: Is missing if W&B refuses, with its verb.
        job_type: Of what is made of the run.
    """
    mode = os.environ.setdefault("WANDB_MODE", "offline")
    if run.wandb_id is None or mode == "disabled":
        return None
    import wandb

    beside: dict[str, Any] = {}
    if job_type:
        beside = {"name": f"{run.label} {job_type}", **describe(run, job_type)}
    try:
        return wandb.init(
            id="-".join(filter(None, (run.wandb_id, job_type))),
            project=logger_settings(run).get("project"),
            dir=run.folder,
            resume="allow",
            settings=wandb.Settings(console="off", silent=True),
            **beside,
        )
    except wandb.Error as error:
        print(f"note: {what} not on the W&B run: {' '.join(str(error).split())}")
        return None


def record(run: Run, job_type: str, used: Sequence[Piece], made: Sequence[Piece]) -> None:
    """Make a W&B run for what is made of a trained run, if that one keeps artifacts.

    Its summary is the metadata of what was made.
    """
    offline = os.environ.get("WANDB_MODE", "offline") == "offline"
    if not keeps_artifacts(logger_settings(run).get("log_model", False), offline=offline):
        return
    if wandb_run := join(run, f"the lineage of the {made[0].kind} is", job_type):
        link(wandb_run, used, made)
        for piece in made:
            wandb_run.summary.update(piece.metadata)
        wandb_run.finish()
