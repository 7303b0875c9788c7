"""Processes of several hosts agree on what they go on from, or refuse it together."""

import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import HashStore

from core import hosts
from core.errors import UserError
from core.hosts import Hosts, job_name

HOSTS = ("first", "second", "third")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "PATIENCE", 1.0)


def together(*work: Callable[[Hosts], object]) -> list[object]:
    """What comes of the work of each rank, a UserError as its text."""
    store = HashStore()
    store.set_timeout(timedelta(seconds=10))

    def process(rank: int) -> object:
        mine = Hosts()
        mine.rank, mine.size, mine.store = rank, len(work), store
        mine.host = HOSTS[rank]
        try:
            with mine:
                return work[rank](mine)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(len(work)) as pool:
        return list(pool.map(process, range(len(work))))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"weights")
    return path


def test_the_first_process_chooses(checkpoint: Path) -> None:
    """Each host went on from what lay in its own folder."""
    chosen = Path("runs/x/y"), str(checkpoint)
    others = [lambda mine: mine.agree(Path("runs/x/unknown"), None)] * 2
    assert together(lambda mine: mine.agree(*chosen), *others) == [chosen] * 3
    new = Path("runs/x/y"), None
    stale = Path("runs/x/y"), str(checkpoint)
    assert together(lambda mine: mine.agree(*new), lambda mine: mine.agree(*stale)) == [new] * 2


@pytest.mark.parametrize(("left", "said"), [(None, "no"), (b"older", "another")])
def test_a_host_without_the_file_ends_all(
    left: bytes | None, said: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    run = Path()

    def second(mine: Hosts) -> object:
        return mine.agree(run, None)

    def first(mine: Hosts) -> object:
        publish = mine.publish

        def publish_and_lose(what: str, content: dict[str, object]) -> None:
            if what == "chosen":  # both hosts are this machine: the file goes in between
                checkpoint.unlink() if left is None else checkpoint.write_bytes(left)
            publish(what, content)

        mine.publish = publish_and_lose  # type: ignore[method-assign]
        return mine.agree(run, checkpoint.name)

    results = together(first, second)
    assert results[0] == results[1]
    assert str(results[0]).startswith(f"second has {said} {checkpoint}")
    assert "copy the file from first" in str(results[0])


@pytest.mark.parametrize(
    ("failing", "error"), [(0, UserError("data is no folder.")), (1, SystemExit(2))]
)
def test_all_end_with_a_process_that_cannot_begin(failing: int, error: BaseException) -> None:
    def fail(mine: Hosts) -> object:
        try:
            with mine:
                raise error
        except BaseException:
            return "failed"

    def agree(mine: Hosts) -> object:
        return mine.agree(Path("run"), None)

    results = together(*(fail if rank == failing else agree for rank in range(3)))
    reason = "data is no folder." if isinstance(error, UserError) else "see its output."
    expected = f"{HOSTS[failing]} cannot begin: {reason}"
    if failing:
        expected += " All hosts need the same files, or a folder that they share."
    assert results == ["failed" if rank == failing else expected for rank in range(3)]


def test_names_the_rank_that_is_silent() -> None:
    """A host that was lost let the others wait for half an hour, and nobody said which."""

    def train(mine: Hosts) -> object:
        mine.agree(Path("run"), None)
        if mine.rank != 1:
            raise RuntimeError("[gloo/transport/tcp/buffer.cc:81] Timed out\nmore")
        return "stopped"

    first, second, third = together(*[train] * 3)
    assert second == "stopped"
    assert first == third
    assert str(first).startswith("rank 1 on second does not answer; ")
    assert "goes on from the last checkpoint" in str(first)
    assert "more" not in str(first)


def test_an_error_of_its_own_is_no_loss() -> None:
    def train(mine: Hosts) -> object:
        mine.agree(Path("run"), None)
        with pytest.raises(RuntimeError, match="shapes"), mine:
            raise RuntimeError("shapes differ")
        return "raised"

    assert together(train, train) == ["raised"] * 2


def test_says_that_others_did_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "TIMEOUT", timedelta(seconds=1))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    alone = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}
    for name, value in (alone | {"MASTER_ADDR": "localhost", "MASTER_PORT": port}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"2 processes at localhost:{port} within 1 s"), Hosts():
        pass


def test_a_process_on_its_own_asks_nobody(checkpoint: Path) -> None:
    with Hosts() as mine, nullcontext():
        assert mine.agree(Path("run"), str(checkpoint)) == (Path("run"), str(checkpoint))
    assert job_name() is None


def test_a_run_is_named_by_its_slurm_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that was requeued began a new run at step 0."""
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert job_name() == "slurm-4711"
    monkeypatch.setenv("SLURM_STEP_ID", "1")
    assert job_name() == "slurm-4711-1"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4700")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "11")
    assert job_name() == "slurm-4700_11-1"
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")  # somebody types commands there
    assert job_name() is None


def test_restarts_that_would_meet_former_processes_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torchrun keeps its store, with the addresses of the lost processes in it."""
    several = {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
    several |= {"TORCHELASTIC_MAX_RESTARTS": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in several.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"), Hosts():
        pass


def test_restarts_need_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    with pytest.raises(UserError, match="--max-restarts needs --run NAME"):
        job_name()
