"""``SpikeMonitor`` and ``clip_updates`` where two processes train one model, on the CPU with gloo.

``fully_shard`` (FSDP2) cuts parameters over the processes; ``DistributedDataParallel`` copies them.
"""

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import start, wait
from torch import Tensor, nn
from torch.distributed import device_mesh, fsdp
from torch.nn.functional import mse_loss
from torch.optim import SGD, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from steadyfit import SpikeMonitor, StepProbe, clip_updates, layout
from steadyfit.watching.records import read_records

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow
SPIKE = 45  # the optimizer step whose targets are a thousand times too large


def make_model(size: int = 7) -> nn.Sequential:
    """One bias has fewer elements than there are processes."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(11, 6), nn.Flatten(), nn.Linear(24, size), nn.Tanh(), nn.Linear(size, 1)
    )


def shard(model: nn.Sequential) -> None:
    mesh = device_mesh.init_device_mesh("cpu", (2,))
    for module in (model[0], model[2], model):
        fsdp.fully_shard(module, mesh=mesh)


def train(
    folder: Path,
    rank: int,
    count: int,
    *,
    reaction: Any = "log",
    limited: bool = True,
    max_decrease: float | None = None,
    make: Callable[..., Optimizer] = AdamW,
    every: int = 20,
    around: Callable[[str, Callable[[], Any]], Any] = lambda name, call: call(),
) -> dict[str, Any]:
    """What one process of a training has seen; ``around`` is given each call of the library."""
    model = make_model()
    if count > 1:
        shard(model)
    optimizer = make(model.parameters(), lr=1e-2)
    if limited:
        limit = clip_updates(optimizer, max_rms=0.5, max_decrease=max_decrease, model=model)
    rows: dict[int, Any] = {}
    settings: dict[str, Any] = {"folder": folder, "log": rows.update, "every": every}
    monitor = SpikeMonitor(model, optimizer, reaction=reaction, **settings)
    generator = torch.Generator().manual_seed(1)
    factors = []
    for step in range(60):
        x = torch.randint(0, 11, (8, 4), generator=generator)[rank::count]
        y = torch.randn(8, 1, generator=generator)[rank::count] * (1000 if step == SPIKE else 1)
        loss = mse_loss(model(x), y)
        if limited:
            limit.loss = loss
        optimizer.zero_grad()
        loss.backward()
        around("before_step", partial(monitor.before_step, loss))
        around("step", optimizer.step)
        if (found := StepProbe.of(optimizer).update.factors) is not None:  # a step was taken
            factors.append(found)
    around("flush", monitor.flush)
    monitor.finish()
    history = monitor.monitors[0].history
    return {
        "norms": history.table,  # (steps, 3, P)
        "factors": torch.stack(factors) if limited else None,
        "parameters": [whole(p) for p in model.parameters()],
        "names": history.names,
        "sizes": [p.numel() for p in monitor.monitors[0].params],
        "flags": [(r.step, r.spiked, r.reaction) for r in monitor.records],
        "rows": rows,
    }


def whole(parameter: Tensor) -> Tensor:
    gather = getattr(parameter, "full_tensor", None)
    return (parameter if gather is None else gather()).detach()


def as_process(rank: int, count: int, folder: Path, work: Callable[..., Any]) -> None:
    """One of some processes: its result is left in the folder."""
    torch.set_num_threads(1)
    if count > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count
        )
    torch.save(work(folder, rank, count), folder / f"{rank}.pt")
    if count > 1:
        torch.distributed.destroy_process_group()


def results(folder: Path, work: Callable[..., Any]) -> list[Any]:
    """What two processes have found."""
    started = [start(as_process, rank, 2, folder, work) for rank in (0, 1)]
    assert [wait(process) for process in started] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


# fully_shard in a loop of plain torch

SETTINGS: dict[str, dict[str, Any]] = {
    "log": {},
    "both limits": {"max_decrease": 0.05},
    "skip": {"reaction": "skip"},
    "rollback": {"reaction": "rollback"},
}


def train_each(folder: Path, rank: int, count: int) -> dict[str, Any]:
    return {
        name: train(folder / f"{name} {rank} of {count}", rank, count, **settings)
        for name, settings in SETTINGS.items()
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A folder, and the results of one process alone and of two."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("sharded")
    return folder, train_each(folder, 0, 1), results(folder, train_each)


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_see_and_do_what_one_does(name: str, trained: tuple[Path, Any, Any]) -> None:
    """Rows of an embedding were limited by other factors in each process."""
    folder, alone, ranks = trained
    one, (first, second) = alone[name], [rank[name] for rank in ranks]
    assert one["flags"] == first["flags"] == second["flags"]
    assert SPIKE in [step for step, spiked, _ in one["flags"] if spiked]
    assert (one["names"], one["sizes"]) == (first["names"], first["sizes"])
    assert torch.equal(first["factors"], second["factors"])
    assert one["factors"].amin() < 0.9
    for kind in ("norms", "factors"):
        torch.testing.assert_close(first[kind], one[kind], rtol=2e-3, atol=1e-5)
    for one_parameter, parameter in zip(one["parameters"], first["parameters"], strict=True):
        torch.testing.assert_close(parameter, one_parameter, rtol=1e-4, atol=1e-5)
    assert first["rows"].keys() == one["rows"].keys()
    assert second["rows"] == {}
    records = read_records(folder / f"{name} 0 of 2" / "spikes.jsonl")
    assert [(r.step, r.spiked, r.reaction) for r in records] == first["flags"]
    assert not (folder / f"{name} 1 of 2").exists()


class Collectives(TorchDispatchMode):
    """Counts collectives by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


# Of each setting: collectives and device reads of ``before_step``, of the optimizer's step, and of
# ``flush``. The loss that ``max_decrease`` needs is averaged by itself.
COSTS = {
    "log": ((0, 0), (1, 0), (1, 1)),
    "both limits": ((0, 0), (2, 0), (1, 1)),
    "skip": ((1, 0), (2, 0), (1, 1)),
    "rollback": ((1, 1), (1, 0), (1, 1)),
    "log alone": ((0, 0), (0, 0), (1, 1)),
    "skip alone": ((1, 0), (1, 0), (1, 1)),
}


def count_each(folder: Path, rank: int, count: int) -> dict[str, Any]:
    """Collectives and device reads of each call, by setting and what is called."""
    from benchmarks.step_overhead import Meter

    layout.Layout.on_host = False  # type: ignore[assignment, method-assign]  # as on a GPU
    alone: dict[str, dict[str, Any]] = {
        "log alone": {"limited": False},
        "skip alone": {"limited": False, "reaction": "skip"},
    }
    counts: dict[str, Any] = {}
    for name, options in (SETTINGS | alone).items():
        table = counts[name] = {"before_step": [], "step": [], "flush": []}

        def around(call: str, function: Callable[[], Any], table: Any = table) -> None:
            meter = Meter()
            with meter.counting(), Collectives() as seen:
                function()
            assert seen.found.keys() <= {"allreduce_"}
            table[call].append((seen.found.total(), meter.reads))

        # torch's AdamW reads its count of steps, SGD nothing
        make = partial(SGD, momentum=0.9)
        train(folder, rank, count, make=make, every=1000, around=around, **options)
    return counts


def test_collectives_and_reads_are_few(tmp_path: Path) -> None:
    """One of each for all steps since the last read; a limit and a reaction need some in a step."""
    for counts in results(tmp_path, count_each):
        for name, (before, step, flush) in COSTS.items():
            assert set(counts[name]["before_step"][1:]) == {before}, name
            assert set(counts[name]["step"][10:40]) == {step}, name
            assert counts[name]["flush"] == [flush], name


# Data parallel, with statistics of each process


def train_in_parallel(folder: Path, rank: int, count: int, limited: bool) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    limit = clip_updates(optimizer, max_rms=None, max_decrease=0.05 if limited else 1e9)
    monitor = SpikeMonitor(parallel, optimizer, reaction="skip", every=10)
    generator = torch.Generator().manual_seed(rank)
    seen = []
    for step in range(60):
        x, y = torch.randn(8, 4, generator=generator), torch.randn(8, 1, generator=generator)
        if step == SPIKE and rank == 1:
            x = x * 1000  # its gradient is an ordinary one: the layer normalises
        limit.loss = loss = mse_loss(parallel(x), y)
        optimizer.zero_grad()
        loss.backward()
        monitor.before_step(loss)
        optimizer.step()
        seen.append([p.detach().clone() for p in model.parameters()])
    monitor.flush()
    return seen, [(r.step, r.spiked, r.reaction) for r in monitor.records]


@pytest.mark.parametrize("limited", [False, True])
def test_processes_decide_the_same_about_their_own_buffers_and_losses(
    limited: bool, tmp_path: Path
) -> None:
    """The one whose statistics had grown took its step back, the other did not.

    And an update was limited by the loss of its own process.
    """
    work = partial(train_in_parallel, limited=limited)
    (first, flags), (second, other_flags) = results(tmp_path, work)
    assert flags == other_flags
    assert (SPIKE, "skip") in [(step, reaction) for step, _, reaction in flags]
    for step, pair in enumerate(zip(first, second, strict=True)):
        for one, other in zip(*pair, strict=True):
            assert torch.equal(one, other), step


# Lightning

PROGRAM = """
import json
import sys
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from steadyfit import GradientSpikeMonitor, UpdateClipping

class Model(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 1))

    def configure_model(self):
        if self.device_mesh is not None:
            for module in (self.network[0], self.network):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.network(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self):
        rank, count = self.trainer.global_rank, self.trainer.world_size
        generator = torch.Generator().manual_seed(1)
        x, y = (torch.randn(60, 8, size, generator=generator) for size in (6, 1))
        y[45] *= 1000
        batches = list(zip(x[:, rank::count], y[:, rank::count]))
        return DataLoader(batches, batch_size=None)

count, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
monitor = GradientSpikeMonitor("skip")
trainer = Trainer(
    accelerator="cpu", devices=count, strategy=strategy if count > 1 else "auto", max_epochs=1,
    use_distributed_sampler=False, log_every_n_steps=10,
    logger=CSVLogger(folder, name="", version=""), enable_progress_bar=False,
    enable_model_summary=False,
    callbacks=[monitor, UpdateClipping(0.5, max_decrease=0.05)],
)
trainer.fit(Model())
flags = [[r.step, r.spiked, r.reaction] for r in monitor.records]
with open(f"{folder}/flags{trainer.global_rank}.json", "w") as file:
    json.dump(flags, file)
"""


def test_the_callbacks_under_lightnings_model_parallel_strategy(tmp_path: Path) -> None:
    """Parameters that a module has sharded itself; a checkpoint is a folder of two parts."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    tables, flags = [], []
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, program, str(count), folder],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        with (folder / "metrics.csv").open(newline="") as file:
            tables.append(list(csv.DictReader(file)))
        flags += [json.loads(path.read_text()) for path in sorted(folder.glob("flags*.json"))]
    assert flags[0] == flags[1] == flags[2]
    assert [45, "skip"] in [[step, reaction] for step, _, reaction in flags[0]]
    one, two = tables
    for name in ("grad_norm/total", "update_norm/total", "clip/update_factor"):
        values = [[float(row[name]) for row in table if row[name]] for table in (one, two)]
        assert len(values[0]) == 60
        assert values[1] == pytest.approx(values[0], rel=2e-3, abs=1e-6), name
    (checkpoint,) = (tmp_path / "2" / "checkpoints").iterdir()
    assert len(list(checkpoint.glob("*.distcp"))) == 2
