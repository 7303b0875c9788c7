"""Run folders, their records, and the files in them."""

import logging
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, full_disk
from test_classification import Points, model, trainer

import study
import train
from callbacks import AtomicCheckpointIO, BestCheckpoint, MetricsCSV, RunRecord, Timing
from callbacks.run import run_folder
from callbacks.run.checkpoints import LastCheckpoint
from callbacks.run.wandb_logger import leveldb_records, logged_metrics
from core.errors import UserError, exit_on_user_error
from core.files import atomic_write, sha256, temporary
from core.provenance import provenance
from core.runs import Run, load_checkpoint
from pipeline.kaggle.ledger import sending
from pipeline.trainer import quiet_libraries


def test_atomic_write_replaces_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    for text in ("first", "second"):
        with atomic_write(path, "w") as file:
            file.write(text)
    assert path.read_text() == "second"
    assert list(path.parent.iterdir()) == [path]


def test_atomic_write_keeps_the_old_file_when_the_block_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(path, "w") as file:
        file.write("new")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_keeps_the_old_file_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(UserError, match=r"a\.bin could not be written .*free space"):
        with full_disk(1000), atomic_write(path) as file:
            file.write(bytes(5000))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


KILLED = """
import os, signal, sys
from pathlib import Path
from core.files import atomic_write, temporary
with temporary(Path("set"), folder=True) as place, atomic_write(Path("a.npy")) as file:
    (place / "part").write_bytes(bytes(1000))
    file.write(bytes(1000))
    file.flush()
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_what_killed_writers_leave_goes_and_what_living_ones_write_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``.a.npy.xxxxxxxx`` of gigabytes stayed for ever; in a cache another process may write."""
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-c", KILLED]
    environment = os.environ | {"PYTHONPATH": str(CONFIGS.parent)}
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        subprocess.Popen(command, env=environment, **pipes) as one,
        subprocess.Popen(command, env=environment, **pipes) as other,
    ):
        for process in (one, other):
            assert process.stdout
            assert process.stdout.readline() == b"writing\n"
        unfinished = set(tmp_path.iterdir())
        assert len(unfinished) == 4
        one.kill()
        one.wait()
        (tmp_path / ".a.npy.original").touch()  # a user's
        with atomic_write(Path("a.npy")) as file, temporary(Path("set"), folder=True) as place:
            file.write(b"whole")
            (place / "whole").touch()
            place.rename("set")
        left = {path for path in tmp_path.iterdir() if path.suffix == ".tmp"}
        assert left < unfinished
        assert len(left) == 2  # of the other one
        other.communicate(b"")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.npy.original", "a.npy", "set"]
    assert Path("a.npy").read_bytes() == bytes(1000)


def test_where_there_are_no_locks_nothing_is_taken_for_abandoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.files.fcntl", None)
    with atomic_write(tmp_path / "a") as one, atomic_write(tmp_path / "a") as other:
        one.write(b"1")
        other.write(b"2")
    assert (tmp_path / "a").read_bytes() == b"1"
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_atomic_files_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("")
    with atomic_write(tmp_path / "atomic", "w") as file:
        file.write("")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_sha256_of_a_known_text(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert sha256(tmp_path / "abc").startswith("ba7816bf8f01cfea414140de5dae2223b00361a3")


def test_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    whole = {"config": "", "state_dict": {}, "metrics": {}, "epoch": 0, "global_step": 1}
    AtomicCheckpointIO().save_checkpoint(whole, path)
    with pytest.raises(RuntimeError, match="enforce fail"), full_disk(2000):  # torch's own words
        AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(9999)}, path)
    assert load_checkpoint(path) == whole
    assert list(tmp_path.iterdir()) == [path]


def test_runs_of_the_same_second_get_their_own_folders(tmp_path: Path) -> None:
    folders = {Run.claim(tmp_path / "demo", None).folder for _ in range(5)}
    assert len(folders) == 5
    assert all(folder.is_dir() for folder in folders)
    named = Run.claim(tmp_path / "demo", "mine").folder
    assert Run.claim(tmp_path / "demo", "mine").folder == named


DEMO = CONFIGS / "demo.yaml"
STUDY = CONFIGS / "studies" / "demo_folds.yaml"


@pytest.mark.parametrize(
    ("command", "link"),
    [
        (lambda: train.main(["fit", f"--config={DEMO}"]), False),
        (lambda: train.main(["fit", f"--config={DEMO}", "--run=x"]), True),
        (lambda: study.main(["run", str(STUDY), f"--config={DEMO}"]), True),
    ],
    ids=["train", "train, named", "study"],
)
def test_where_no_run_folder_can_be_made_a_sentence_says_why(
    command: Callable[[], None],
    link: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It was a traceback."""
    monkeypatch.chdir(tmp_path)
    if link:
        Path("runs").symlink_to("gone")
    else:
        Path("runs").touch()
    shutil.copytree(CONFIGS, "configs")
    with pytest.raises(SystemExit):
        command()
    said = capsys.readouterr().err.splitlines()[-1]
    what = "a link to gone" if link else "a file"
    assert re.fullmatch(
        rf"error: the folder runs/\S+ cannot be made: \S+/runs is {what}, where a folder "
        "should be; mend that, or run the command in another folder.",
        said,
    )
    if link:  # what submit.py does before it sends anything
        with pytest.raises(UserError, match="runs cannot be made"), sending():
            pass


def test_w_and_b_does_not_tell_in_a_traceback_that_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own log came in front of our sentence."""
    monkeypatch.setattr(logging, "raiseExceptions", True)
    log = logging.getLogger("wandb-like")
    log.addHandler(handler := logging.FileHandler(tmp_path / "debug.log"))
    for is_quiet in (False, True):
        if is_quiet:
            quiet_libraries()
        with full_disk(10):
            log.warning("longer than what is left")
        assert ("--- Logging error ---" in capsys.readouterr().err) is not is_quiet
    log.removeHandler(handler)
    handler.close()


def test_unknown_run_lists_the_newest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"demo/x is not a run folder; .*: none yet"):
        Run.find("demo/x", tmp_path)
    run = Run.claim(tmp_path / "demo", "there")
    run.config.write_text("")
    with pytest.raises(UserError, match=r"demo/x is not a run folder; .*: demo/there\."):
        Run.find("demo/x", tmp_path)
    assert Run.find("demo/there", tmp_path) == run
    assert Run.find(run.folder) == run


def test_run_without_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint; train it first"):
        Run(tmp_path).checkpoint()


def test_checkpoints_of_others_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    with pytest.raises(UserError, match=r"x\.ckpt does not exist"):
        load_checkpoint(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        load_checkpoint(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(UserError, match="carries no configuration"):
        load_checkpoint(path)


class Trap:
    """Something that would run a command when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("open('trapped', 'w')",)


def test_checkpoint_that_would_run_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"config": Trap()}, "x.ckpt")
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        load_checkpoint(Path("x.ckpt"))
    assert not Path("trapped").exists()


def test_provenance_names_commit_and_versions() -> None:
    origin = provenance()
    assert origin["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert origin["git"] is None or len(origin["git"]["commit"]) == 40


def test_metrics_of_a_step_share_a_row_and_new_columns_are_added(tmp_path: Path) -> None:
    log = MetricsCSV(str(tmp_path))
    log.log_metrics({"train/loss": 0.5, "epoch": 0}, 0)
    log.log_metrics({"train/loss": 0.25, "epoch": 0}, 1)
    log.log_metrics({"val/loss": 1 / 3}, 1)
    log.finalize("success")
    assert log.path.read_text() == (
        "step,epoch,train/loss,val/loss\n0,0,0.5,\n1,0,0.25,0.333333333\n"
    )


def test_many_saves_write_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save keeps the lines of old rows; one of many rows took half a second, and they memory."""
    monkeypatch.setattr(run_folder, "NEWEST", 5)
    draw, often = random.Random(0), MetricsCSV(str(tmp_path / "often"))
    for number in range(300):
        late = draw.random() < 0.1  # a row that has been written grows
        step, name = (draw.randrange(number + 1) if late else number) // 3, draw.choice("abcdef")
        often.log_metrics({name: draw.random()}, step)
        if draw.random() < 0.7:
            continue
        if draw.random() < 0.3:
            with suppress(UserError, OSError), full_disk(100):
                often.save()
            continue
        often.save()
        assert len(often._open or {}) <= 5
        once = MetricsCSV(str(tmp_path / f"once{number}"))
        for step, row in often.rows.items():
            once.log_metrics(row, step)
        once.save()
        assert often.path.read_bytes() == once.path.read_bytes()


def test_a_file_that_somebody_removes_costs_its_old_rows_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "NEWEST", 2)
    log = MetricsCSV(str(tmp_path))
    for step in range(6):
        log.log_metrics({"train/loss": 1.0}, step)
        log.save()
        if step == 3:
            log.path.unlink()
    assert [int(line.split(",")[0]) for line in log.path.read_text().split()[1:]] == [2, 3, 4, 5]


def test_metrics_go_on_behind_the_checkpoint(tmp_path: Path) -> None:
    first = MetricsCSV(str(tmp_path))
    for step in range(10):
        first.log_metrics({"train/loss": step / 7}, step)
    first.save()
    whole = first.path.read_bytes()
    second = MetricsCSV(str(tmp_path))
    second.restart_from(4)
    for step in range(4, 10):
        second.log_metrics({"train/loss": step / 7}, step)
    second.save()
    assert second.path.read_bytes() == whole


def test_rows_that_are_not_trained_again_are_forgotten(tmp_path: Path) -> None:
    log = MetricsCSV(str(tmp_path))
    for step in range(10):
        log.log_metrics({"train/loss": 1.0}, step)
    log.restart_from(4)
    log.save()
    assert [int(line.split(",")[0]) for line in log.path.read_text().split()[1:]] == [0, 1, 2, 3]


def test_what_a_checkpoint_has_seen_is_in_the_files_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run killed behind the checkpoint of its last step, inside an epoch, lacked that step."""
    found: list[dict[str, list[int]]] = []

    def save(self: AtomicCheckpointIO, *_: Any, **__: Any) -> None:
        texts = {name: (tmp_path / name).read_text() for name in ("metrics.csv", "timing.csv")}
        lines = {name: text.splitlines()[1:] for name, text in texts.items()}
        found.append({n: [int(line.split(",")[0]) for line in x] for n, x in lines.items()})

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", save)
    last = LastCheckpoint()
    last.dirpath = str(tmp_path)
    run = trainer(
        tmp_path,
        max_steps=13,  # an epoch has ten
        logger=MetricsCSV(str(tmp_path)),
        callbacks=[Timing(), last, RunRecord("seed_everything: 0\n")],
        plugins=AtomicCheckpointIO(),
        enable_checkpointing=True,
    )
    run.fit(model(), Points())
    assert [each["metrics.csv"] for each in found] == [list(range(10)), list(range(13))]
    assert [each["timing.csv"] for each in found] == [[9], [9, 12]]


def test_result_of_a_test_joins_the_row_of_its_checkpoint(tmp_path: Path) -> None:
    log = MetricsCSV(str(tmp_path))
    for step in range(3):
        log.log_metrics({"train/loss": 1.0}, step)
    log.save()
    late = MetricsCSV(str(tmp_path))
    late.log_metrics({"test/accuracy": 0.9}, 1)
    late.save()
    assert late.path.read_text().splitlines()[2] == "1,0.9,1"


def test_unfinished_file_is_read_up_to_its_last_whole_record() -> None:
    """Fragments over block borders, a block's unused end, and a record that was cut short."""
    header = 7
    big = bytes(range(256)) * 300  # reaches over three blocks

    def fragment(kind: int, data: bytes) -> bytes:
        return bytes(4) + len(data).to_bytes(2, "little") + bytes([kind]) + data

    log = fragment(1, b"small")
    room = 32768 - header - len(log) - 7
    log += fragment(2, big[:room])
    log += fragment(3, big[room : room + 32761]) + fragment(4, big[room + 32761 :])
    fill = 32768 - (header + len(log)) % 32768 - 7 - 3  # leaves 3 bytes, too few for a header
    log += fragment(1, bytes(fill)) + bytes(3) + fragment(1, b"next block")
    whole = [b"small", big, bytes(fill), b"next block"]
    assert list(leveldb_records(log)) == whole
    assert list(leveldb_records(log + fragment(1, b"cut short")[:-1])) == whole


def test_logged_metrics_of_a_real_offline_run(trained: Path) -> None:
    (folder,) = sorted((trained / "wandb").glob("offline-run-*"))[:1]
    held = set(logged_metrics(folder))
    assert {(step, "train/loss") for step in range(60)} <= held
    assert {(step, "val/accuracy") for step in (9, 19, 29, 39, 49, 59)} <= held


def test_only_user_errors_are_told_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, exit_on_user_error():
        raise UserError("take another file.")
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: take another file.\n"
    with pytest.raises(KeyError), exit_on_user_error():
        raise KeyError("a bug keeps its traceback")
    wrapped = ValueError("a library wrapped it")
    wrapped.__cause__ = UserError("inner.")
    with pytest.raises(SystemExit), exit_on_user_error():
        raise wrapped
    assert capsys.readouterr().err == "error: inner.\n"


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
def test_best_epoch_is_remembered_when_the_run_has_moved(tmp_path: Path) -> None:
    def train(home: Path, epochs: int, resume: Path | None = None) -> None:
        callbacks = [BestCheckpoint()]
        run = trainer(home, max_epochs=epochs, callbacks=callbacks, enable_checkpointing=True)
        run.fit(model(), Points(), ckpt_path=resume)
        run.save_checkpoint(home / "last.ckpt")

    home, moved = tmp_path / "here", tmp_path / "there"
    train(home, epochs=1)
    checkpoint = torch.load(home / "last.ckpt", weights_only=True)
    (state,) = [s for key, s in checkpoint["callbacks"].items() if key.startswith("BestCheckpoint")]
    state["best_k_models"] = dict.fromkeys(state["best_k_models"], torch.tensor(2.0))
    state["best_model_score"] = torch.tensor(2.0)  # as no epoch can be
    state["current_score"] = torch.tensor(-1.0)
    torch.save(checkpoint, home / "last.ckpt")
    shutil.move(home, moved)
    again = BestCheckpoint()
    again.dirpath = state["dirpath"]
    again.load_state_dict(state)
    assert again.state_dict()["current_score"] == -1
    best = (moved / "checkpoints" / "best.ckpt").read_bytes()
    train(moved, epochs=3, resume=moved / "last.ckpt")
    assert (moved / "checkpoints" / "best.ckpt").read_bytes() == best


def test_runs_that_are_listed_are_the_newest(tmp_path: Path) -> None:
    for age, name in enumerate(["a/new", "b/1", "b/2", "b/3", "b/4", "b/5"]):
        config = tmp_path / name / "config.yaml"
        config.parent.mkdir(parents=True)
        config.touch()
        os.utime(config, (1000 - age, 1000 - age))
    with pytest.raises(UserError, match=r"are: b/4, b/3, b/2, b/1, a/new\."):
        Run.find("nothing", tmp_path)
