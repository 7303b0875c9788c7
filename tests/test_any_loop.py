"""``SpikeMonitor`` and ``clip_updates`` in loops of plain torch, of Fabric and of Hugging Face."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_loop import Batch, make_data, make_model, no_scaler, spiked, state_of, training
from small_training import same
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.functional import mse_loss
from torch.optim import SGD, AdamW, Optimizer, RMSprop
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.step_overhead import Meter
from steadyfit import SpikeMonitor, StepProbe, clip_updates
from steadyfit.watching.reactions import Rollback

PAGE = Path(__file__).parent.parent / "docs" / "any_loop.md"
SECTION = re.compile(r"^## ([^\n]*)\n(?:(?!^## ).)*?```python\n(.*?)```", re.DOTALL | re.MULTILINE)
BLOCKS = SECTION.findall(PAGE.read_text())
PLAIN, HUGGING_FACE = BLOCKS[0][1], BLOCKS[-1][1]

# The page


@pytest.mark.parametrize(("title", "block"), BLOCKS[:-1], ids=[title for title, _ in BLOCKS[:-1]])
def test_every_block_runs(
    title: str,
    block: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(PLAIN, names)
    assert StepProbe.of(names["optimizer"]).update.factors is not None
    if block != PLAIN:
        exec(block, names)
    steps = 50 if "scaler" in names else 200
    assert names["monitor"].global_step == steps
    assert f"in {steps} optimizer steps" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.slow
def test_the_trainer_of_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Needs ``pip install transformers accelerate``, which are not among the requirements."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    names: dict[str, Any] = {}
    exec(HUGGING_FACE, names)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    model = transformers.LlamaForCausalLM(config)
    tokens = torch.randint(32, (2 * 4 * 60, 8))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_grad_norm=0,
        max_steps=60,
        learning_rate=1e-3,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    callback = names["SpikeCallback"]()

    class Plant(transformers.TrainerCallback):  # type: ignore[name-defined]
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if state.global_step == 45:
                others["model"].lm_head.weight.grad.mul_(100)

    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=data, callbacks=[Plant(), callback]
    )
    trainer.train()
    monitor = callback.monitor
    assert monitor.global_step == 60
    assert 45 in spiked(monitor)
    (record,) = [r for r in monitor.records if r.step == 45]
    assert record.by_share[0].name == "lm_head.weight"
    assert record.signals["loss"].value == pytest.approx(math.log(32), rel=0.2)
    assert record.update_factor is not None
    assert (tmp_path / "spikes.jsonl").exists()
    assert len(model._forward_hooks) == 0


# Accumulated gradients, and a gradient scaler


def test_accumulation_and_a_scaler_change_no_number() -> None:
    """Norms, losses and factors are those of the whole batch, whatever they are scaled by."""
    seen: list[dict[int, Any]] = []
    data = make_data(steps=160)
    whole = [
        (torch.cat([x for x, _ in data[i : i + 4]]), torch.cat([y for _, y in data[i : i + 4]]))
        for i in range(0, len(data), 4)
    ]
    for batches, accumulate, scaler in (
        (whole, 1, no_scaler()),
        (data, 4, torch.amp.GradScaler("cpu", init_scale=2.0**12)),
    ):
        model = make_model()
        optimizer = RMSprop(model.parameters(), lr=1e-3)
        limit = clip_updates(optimizer, max_rms=0.5)
        rows: dict[int, Any] = {}
        monitor = SpikeMonitor(model, optimizer, log=rows.update, every=7)
        list(training(model, optimizer, monitor, batches, scaler, accumulate))
        assert limit.max_rms == 0.5
        seen.append(rows)
    assert seen[0].keys() == seen[1].keys() == set(range(40))
    for step, row in seen[0].items():
        assert seen[1][step] == pytest.approx(row, rel=1e-3)
        assert row["update_norm/clipped"] < row["update_norm/total"]


@pytest.mark.parametrize("reaction", ["log", "skip", "rollback", "stop"])
def test_an_overflow_is_recorded_and_neither_counted_nor_acted_on(reaction: Any) -> None:
    """The scale is too large at first, and a loss is beyond float32 later."""
    model = make_model(nn.BatchNorm1d(16))
    optimizer = AdamW(model.parameters(), lr=1e-3)
    clip_updates(optimizer)
    monitor = SpikeMonitor(model, optimizer, reaction=reaction, every=10)
    scaler = torch.amp.GradScaler("cpu", init_scale=3e38, backoff_factor=1e-30, growth_factor=2.0)
    before: list[Any] = []
    for _ in training(model, optimizer, monitor, make_data(factors={0: 1e3, 40: 1e36}), scaler):
        before.append([p.detach().clone() for p in model.parameters()])
    overflowed = [r.step for r in monitor.records if not r.spiked]
    assert overflowed == [0, 40]
    assert monitor.counts["overflow"] == 2
    assert monitor.counts["gradient"] == monitor.counts["loss"] == monitor.counts["skipped"] == 0
    assert not monitor.should_stop
    assert all(record.reaction == "log" for record in monitor.records)
    for step in (0, 40):
        assert same(before[step], before[step + 1])
    assert not same(before[41], before[42])


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("reaction", ["skip", "stop", "rollback"])
def test_buffers_go_back_to_those_before_the_step(reaction: Any, scaled: bool) -> None:
    """In a bare loop they went back to the start of training, or to before an overflow."""
    model = make_model(nn.BatchNorm1d(16))
    optimizer = SGD(model.parameters(), lr=0.01)
    chosen = Rollback(every=20) if reaction == "rollback" else reaction
    monitor = SpikeMonitor(model, optimizer, reaction=chosen, every=10)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e10) if scaled else None
    factors = {44: 1e36, 45: 1e4} if scaled else {45: 1e4}
    seen = []
    for _ in training(model, optimizer, monitor, make_data(factors=factors), scaler):
        seen.append([b.clone() for b in model.buffers()])
    assert spiked(monitor)[0] == 45
    assert not same(seen[44], seen[45])
    assert same(seen[46], seen[40 if reaction == "rollback" else 45])


# Skipping


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "AdamW": partial(AdamW, lr=1e-3, weight_decay=0.1),
    "fused AdamW": partial(AdamW, lr=1e-3, fused=True),
    "SGD with momentum": partial(SGD, lr=0.01, momentum=0.9),
    "RMSprop": partial(RMSprop, lr=1e-3),
}


@pytest.mark.parametrize("scaled", [False, True], ids=["float32", "scaled"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_changes_no_bit_and_reads_nothing(name: str, scaled: bool) -> None:
    """A large target, and an input with a NaN, which poisons the statistics of a BatchNorm.

    The loop without a monitor reads as well: the scaler whether it is to step, AdamW its count. A
    scaler throws the NaN away by itself, and leaves the statistics as they are.
    """
    data = make_data(factors={35: 1e4})
    if not scaled:
        data[45][0][0, 0] = math.nan
    reads = []
    for reaction in ("skip", None):
        model = make_model(nn.BatchNorm1d(16))
        optimizer = OPTIMIZERS[name](model.parameters())
        monitor = SpikeMonitor(model, optimizer, reaction="skip", every=10) if reaction else None
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
        meter, states = Meter(), {}
        meter.watch(model)
        with meter.counting():
            for step in training(model, optimizer, monitor, data, scaler):
                if step in (34, 35, 36, 45, 46):
                    states[step] = state_of(model, optimizer)
        # between the reads of the monitor, those two steps among them
        reads.append([meter.per_step(start, start + 8).reads for start in (2, 22, 32, 42)])
        if monitor is None:
            assert not same(states[35], states[36])
            continue
        skipped = [r.step for r in monitor.records if r.reaction == "skip"]
        assert skipped == ([35] if scaled else [35, 45])
        for step in skipped:
            assert same(states[step], states[step + 1])
        assert not same(states[34], states[35])
        assert monitor.counts["skipped"] == len(skipped)
    assert reads[0] == reads[1]
    if not scaled and name in ("fused AdamW", "SGD with momentum"):
        assert reads[0] == [0, 0, 0, 0]


def test_a_first_step_without_a_finite_value_leaves_no_states() -> None:
    model = make_model()
    optimizer = AdamW(model.parameters())
    monitor = SpikeMonitor(model, optimizer, reaction="skip")
    states = [
        state_of(model, optimizer)
        for _ in training(model, optimizer, monitor, make_data(2, {0: math.nan}))
    ]
    assert same(states[0], states[1])
    assert not same(states[1], states[2])


class Counting(Optimizer):
    """Counts the steps of each parameter, as torch's Adam does."""

    def __init__(self, params: Any, device: str) -> None:
        super().__init__(params, {"lr": 0.1})
        for p in self.param_groups[0]["params"]:
            self.state[p] = {"step": torch.zeros((), device=device)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for p, state in self.state.items():
            p.sub_(0.1)
            state["step"] += 1


class Crossings(TorchDispatchMode):
    """Counts the operators that bring something from the device to main memory."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        kinds = {t.device.type for t in args if isinstance(t, Tensor)}
        here = isinstance(out, Tensor) and out.device.type == "cpu"
        self.count += here and "cuda" in kinds
        return out


@pytest.mark.parametrize(("device", "reads"), [("cpu", 1), ("cuda", 0)])
def test_skip_reads_once_for_all_states_in_main_memory(device: str, reads: int) -> None:
    """Each was read by itself. Fake tensors have a device and no values: no GPU is needed."""
    with FakeTensorMode(), Crossings() as seen:
        model = nn.Linear(4, 1, device="cuda")
        optimizer = Counting(model.parameters(), device)
        monitor = SpikeMonitor(model, optimizer, reaction="skip")
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        monitor.before_step(torch.ones((), device="cuda"))
        optimizer.step()
    assert seen.count == reads


# Wrappers


def fabric_loop(fabric: Any, model: Any, optimizer: Any, data: Sequence[Batch]) -> SpikeMonitor:
    model, optimizer = fabric.setup(model, optimizer)
    clip_updates(optimizer, max_rms=0.5, model=model)
    monitor = SpikeMonitor(model, optimizer, reaction="skip", every=10)
    scaled = getattr(fabric.strategy.precision, "scaler", None) is not None
    for x, y in data:
        loss = mse_loss(model(x), y)
        optimizer.zero_grad()
        fabric.backward(loss)
        fabric.strategy.precision.unscale_gradients(optimizer.optimizer)
        monitor.before_step(loss, optimizer, scaled=scaled)
        optimizer.step()
    monitor.flush()
    return monitor


def test_fabric_is_the_bare_loop() -> None:
    """The names of parameters were those of Fabric's wrapper, ``_forward_module.0.weight``."""
    from lightning.fabric import Fabric

    data = make_data(factors={45: 1e4})
    models = [make_model(), make_model()]
    optimizers = [AdamW(model.parameters(), lr=1e-3) for model in models]
    monitor = fabric_loop(Fabric(accelerator="cpu", devices=1), models[0], optimizers[0], data)
    clip_updates(optimizers[1], max_rms=0.5, model=models[1])
    bare = SpikeMonitor(models[1], optimizers[1], reaction="skip", every=10)
    list(training(models[1], optimizers[1], bare, data))
    assert monitor.records == bare.records
    assert [r.step for r in monitor.records if r.reaction == "skip"] == [45]
    assert {p.name for p in monitor.records[0].by_share} <= {
        name for name, _ in models[0].named_parameters()
    }
    assert same(models[0].state_dict(), models[1].state_dict())


def test_fabric_with_a_scaler() -> None:
    from lightning.fabric import Fabric
    from lightning.fabric.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-30)
    fabric = Fabric(accelerator="cpu", devices=1, plugins=MixedPrecision("16-mixed", "cpu", scaler))
    model = make_model()
    optimizer = AdamW(model.parameters(), lr=1e-3)
    monitor = fabric_loop(fabric, model, optimizer, make_data(factors={45: 100}))
    assert monitor.records[0].step == 0
    assert monitor.counts["overflow"] == 1
    assert spiked(monitor) == [45]
    assert 0.1 < monitor.monitors[0].detectors["gradient"].center < 10


@pytest.mark.filterwarnings("ignore")  # of torch, about one process and about itself
def test_the_older_way_of_sharding_is_refused(tmp_path: Path) -> None:
    """Norms were those of the part that a process holds."""
    with one_process(tmp_path):
        model = FullyShardedDataParallel(make_model(), device_id=torch.device("cpu"))
        optimizer = SGD(model.parameters(), lr=0.01)
        for call in (SpikeMonitor, lambda m, o: clip_updates(o, model=m)):
            with pytest.raises(ValueError, match=r"FullyShardedDataParallel .* use .* fully_shard"):
                call(model, optimizer)


@contextmanager
def one_process(folder: Path) -> Iterator[None]:
    """A group of processes with one in it."""
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def test_the_names_are_those_of_the_model_inside(tmp_path: Path) -> None:
    """Of DistributedDataParallel, of Fabric around it, and of torch.compile."""
    from lightning.fabric import Fabric

    model = make_model()
    with one_process(tmp_path):
        parallel = nn.parallel.DistributedDataParallel(model)
        optimizer = SGD(model.parameters(), lr=0.01)
        both, _ = Fabric(accelerator="cpu", devices=1).setup(parallel, optimizer)
        names = [name for name, _ in model.named_parameters()]
        for wrapped in (parallel, both, torch.compile(model)):
            monitor = SpikeMonitor(wrapped, optimizer)  # type: ignore[arg-type]
            assert monitor.monitor_of(0).names == names
