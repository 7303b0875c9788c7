"""A W&B logger whose offline runs can be interrupted and resumed without a gap or a double row."""

import _thread
import math
import signal
import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from core.wandb_runs import keeps_artifacts

if TYPE_CHECKING:
    from wandb import Run
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

STEP = "trainer/global_step"


class ResumableWandbLogger(WandbLogger):
    """Lightning's logger, which leaves out what an earlier folder of the same run already holds.

    Offline, W&B continues a run in a second folder with the same id, and a killed process leaves
    the first one with its last seconds missing. Whoever resumes the run logs its metrics again from
    the start; only what is missing is written, so the second folder begins where the first ended.

    Args:
        log_model: Keep the best checkpoint and what is made of it as artifacts; null: online alone,
            since offline W&B copies them. ``all`` has Lightning's meaning, every checkpoint.
        kwargs: What Lightning's logger takes.
    """

    def __init__(self, log_model: Literal["all"] | bool | None = None, **kwargs: Any) -> None:
        super().__init__(log_model="all" if log_model == "all" else False, **kwargs)
        self._artifacts = log_model
        init = getattr(self, "_wandb_init", {})
        # W&B warns of this argument, which Lightning always gives (wandb/wandb#10909)
        init.pop("anonymous", None)
        if isinstance(settings := init.get("settings") or {}, dict):
            init["settings"] = {"stop_fn": _stop_training, **settings}
        self._logged: set[tuple[int | None, str]] | None = None
        self._is_finite = True  # the losses so far

    @property
    def keeps_artifacts(self) -> bool:
        """Whether the W&B run gets artifacts."""
        run = self.experiment
        return not run.disabled and keeps_artifacts(self._artifacts, offline=run.offline)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, which is begun when it is first asked for."""
        if self._experiment is None:
            _skip_job_inputs()
        return super().experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        bad = [k for k, v in metrics.items() if k.endswith("/loss") and not math.isfinite(v)]
        if bad and self._is_finite:
            self._is_finite = False
            text = (
                f"{bad[0]} is {metrics[bad[0]]} at step {step}; metrics.csv has the steps before."
            )
            self.experiment.alert("the loss is not finite", text, level="ERROR", wait_duration=600)
        self._log_missing(metrics, step)

    @rank_zero_only
    def log_history(self, rows: Mapping[int, Mapping[str, float]]) -> None:
        """Log what was measured before an interruption; measured again, as a test, it is left out.

        Otherwise a run that was killed after its test would have the row of the test twice.
        """
        for step, metrics in rows.items():
            self._log_missing(metrics, step)
        if self._logged is not None:
            self._logged |= {(step, name) for step, metrics in rows.items() for name in metrics}

    def _log_missing(self, metrics: Mapping[str, float], step: int | None) -> None:
        if self._logged is None:
            folder = Path(self.save_dir or ".") / "wandb"
            current = Path(self.experiment.dir).parent
            earlier = [f for f in folder.glob(f"*-{escape(self.experiment.id)}") if f != current]
            self._logged = {pair for f in earlier for pair in logged_metrics(f)}
        missing = {k: v for k, v in metrics.items() if (step, k) not in self._logged}
        if missing.keys() - {"epoch"}:
            super().log_metrics(missing, step)

    @rank_zero_only
    def log_rows(self, rows: Mapping[int, Mapping[str, float]]) -> None:
        """Log the metrics of several optimizer steps, and wait once until W&B has them."""
        with batched_publish(self.experiment):
            for step, metrics in sorted(rows.items()):
                self.log_metrics(metrics, step)


@cache
def _skip_job_inputs() -> None:
    """Let a run begin without W&B's job queue, a third as long to load as torch, if nothing has.

    Each run asks it for the inputs of a job, of which there can be none where it is not loaded.
    """
    from wandb.sdk.wandb_run import Run

    name = "_detect_and_apply_job_inputs"  # of 0.26 to 0.31
    if (detect := getattr(Run, name, None)) is None:
        return

    def if_any(run: Run) -> None:
        if "wandb.sdk.launch.inputs.internal" in sys.modules:
            detect(run)

    setattr(Run, name, if_any)


def _stop_training() -> None:
    """Do on "Stop run" what SIGTERM does; W&B's own SIGINT would lose the epoch.

    Called in a thread of W&B's.
    """
    print("\nW&B asks this run to stop.", file=sys.stderr)
    handled = callable(signal.getsignal(signal.SIGTERM))  # else the main thread would not notice
    _thread.interrupt_main(signal.SIGTERM if handled else signal.SIGINT)


@contextmanager
def batched_publish(run: "Run") -> Iterator[None]:
    """Send at the end what the run publishes in here.

    W&B sends from a thread of its own and waits for it in every call, which takes two to three
    times as long as the rest of the call. So it does here too if its parts have other names than
    those of 0.26 to 0.31.
    """
    interface: Any = getattr(run, "_interface", None)  # None if WANDB_MODE=disabled
    parts = ("_assign", "_asyncer", "_client", "_publish")
    try:
        from wandb.proto.wandb_server_pb2 import ServerRequest  # type: ignore[attr-defined]

        known = all(hasattr(interface, part) for part in parts)
    except ImportError:
        known = False
    if not known:
        yield
        return
    records: list[Record] = []

    async def send() -> None:
        for record in records:
            interface._assign(record)
            await interface._client.publish(ServerRequest(record_publish=record))

    interface._publish = lambda record, nowait=False: records.append(record)
    try:
        yield
    finally:
        del interface._publish  # so that it is that of the class again
        interface._asyncer.run(send)


def logged_metrics(folder: Path) -> Iterator[tuple[int, str]]:
    """Pairs (optimizer step, metric) in an offline run's folder, as far as it was written."""
    try:
        from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]
    except ImportError:
        print(f"This W&B cannot read {folder}, so what is logged again is twice in the W&B run.")
        return
    for path in folder.glob("run-*.wandb"):
        for payload in leveldb_records(path.read_bytes()[7:]):  # after ":W&B", magic and version
            record = Record.FromString(payload)
            items = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
            if STEP in items:
                step = int(float(items.pop(STEP)))
                yield from ((step, name) for name in items)


def leveldb_records(log: bytes, offset: int = 7, block: int = 32 * 1024) -> Iterator[bytes]:
    """Records of a LevelDB log, up to the first that a crash cut short.

    Blocks of 32 KiB hold fragments, each with a header of checksum (4 bytes), length (2) and type
    (1: whole, 2: first, 3: middle, 4: last part of a record).

    Args:
        log: The file's bytes after its own header.
        offset: Length of that header; blocks are counted from the start of the file.
        block: Size of a block in bytes.
    """
    record, position = b"", 0
    while position + 7 <= len(log):
        left = block - (position + offset) % block
        if left < 7:  # the rest of a block that has no room for a header
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", log, position)
        fragment = log[position + 7 : position + 7 + length]
        if kind == 0 or len(fragment) < length:
            return
        record = fragment if kind in (1, 2) else record + fragment
        position += 7 + length
        if kind in (1, 4):
            yield record
