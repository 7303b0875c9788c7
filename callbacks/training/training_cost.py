"""What a training step costs: parameters, floating-point operations, and memory.

The memory of a step is found without taking it. The training step of a copy runs on tensors that
have a shape and a device but no values (``FakeTensorMode``), so PyTorch chooses the same kernels as
ever, asks for the same memory and gets none. What is alive is followed through every operator:

- *Held* all the time are weights, buffers, the batch, and the state of the optimizer. As in
  Lightning's loop, the gradients of the step before are alive in the forward pass too.
- *Activations* are what the forward pass leaves behind: the storages, each counted once, that
  autograd keeps for the backward pass.
- The *peak* comes early in the backward pass. Nearly all activations are still there, and to them
  come the gradient of what the loss was computed from (of logits: as large as these, sometimes
  twice) and, in the last block, the gradient of its attention's weights and of its scores. If the
  optimizer's own step takes more, with copies of all weights, then that is the peak.

How attention is computed decides about the rest. Fused attention keeps its output and one number
for each row; plain attention, softmax(Q K^T) V, keeps the softmax (B, heads, T, S), though not the
scores; dropout on it adds a mask of floats and the dropped weights. On a CPU the fused kernel knows
no dropout, and PyTorch goes over to the plain one without a word: the table names the kernel.

What operators allocate and free inside themselves is not seen, nor what an allocator keeps in
reserve or loses by rounding. It is little, but up to a fifth of the peak for the fused
LSTM of a CPU.
"""

import copy
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any
from weakref import finalize

import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from core.errors import UserError
from core.files import atomic_write

try:
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeCopyMode,
        FakeTensor,
        FakeTensorMode,
        UnsupportedFakeTensorException,
        UnsupportedOperatorException,
        unset_fake_temporarily,
    )
except ImportError:  # torch has other names for them; real steps are followed
    NEEDS_VALUES: tuple[type[Exception], ...] | None = None
else:
    NEEDS_VALUES = (
        DataDependentOutputException,
        DynamicOutputShapeException,
        UnsupportedFakeTensorException,
        UnsupportedOperatorException,
    )

MIB = 2**20
Context = Callable[[], AbstractContextManager[Any]]
WORKSPACE = {"mkldnn_rnn_layer", "_cudnn_rnn"}  # their versions without values leave it out


@dataclass(frozen=True)
class StepMemory:
    """Memory of a step with one way to compute attention.

    Attributes:
        attention: ``fused``, which leaves the choice to PyTorch, ``plain``, or ``none`` at all.
        kernel: What really computes it.
        attention_dropout: Largest share of the attention's weights that is set to zero.
        activations: What is kept for the backward pass, in MiB.
        peak: All that is alive at most, in MiB.
    """

    attention: str
    kernel: str
    attention_dropout: float
    activations: float
    peak: float


@dataclass(frozen=True)
class Cost:
    """What a training step costs.

    Attributes:
        parameters: Number of parameters, each counted once.
        samples: Samples in the batch.
        unit: ``token`` where the inputs are sequences of tokens (B, T), else ``sample``. Sources,
            targets and padding all count as tokens.
        forward_flops: Floating-point operations per unit in matrix products, convolutions and plain
            attention, two for each multiplication with its addition. The others are few.
        backward_flops: Those of the backward pass.
        weights: In MiB, as all that follows.
        gradients: Of the trained weights.
        optimizer_state: What the optimizer keeps from step to step.
        ways: The step as it is trained, and other ways to compute its attention.
        measured_peak: Most memory in a step that was really taken; None before training has ended.
    """

    parameters: int
    samples: int
    unit: str
    forward_flops: float
    backward_flops: float
    weights: float
    gradients: float
    optimizer_state: float
    ways: list[StepMemory]
    measured_peak: float | None = None


# The estimate


def training_cost(
    model: LightningModule,
    optimizer: Optimizer,
    batch: list[Tensor],
    context: Context = nullcontext,
) -> Cost:
    """Estimate the cost of a step; model, optimizer and random numbers stay as they were.

    Some steps cannot run without values: a network may decide by its activations how to go on, and
    the fused recurrent kernels keep more than they tell. Then real steps are followed, on copies.

    Args:
        model: Its ``training_step`` returns the loss, and its copy records what it records.
        optimizer: Of its parameters.
        batch: ``[*inputs, target]`` on the device of the model.
        context: What ``training_step`` runs in, such as autocast.
    """
    with undisturbed(model):
        if NEEDS_VALUES is not None:
            with suppress(*NEEDS_VALUES):
                return followed_cost(model, optimizer, batch, context, fake=True)
        return followed_cost(model, optimizer, batch, context, fake=False)


def followed_cost(
    model: LightningModule, optimizer: Optimizer, batch: list[Tensor], context: Context, fake: bool
) -> Cost:
    weights = list(model.parameters())
    gradients = size_of(p for p in weights if p.requires_grad)
    held = size_of([*weights, *model.buffers(), *batch]) + gradients
    state, optimizer_peak = optimizer_memory(optimizer)

    def way(plain: bool, dropout: bool) -> StepMemory:
        step = step_memory(model, batch, context, fake, plain, dropout)
        peak = max(step.peak + state, held + optimizer_peak)
        return replace(step, activations=step.activations / MIB, peak=peak / MIB)

    def both(dropout: bool) -> list[StepMemory]:
        fused = way(plain=False, dropout=dropout)
        if fused.attention == "none":
            return [fused]
        if fused.kernel == "plain":
            return [fused, replace(fused, attention="plain")]
        return [fused, way(plain=True, dropout=dropout)]

    ways = both(dropout=True)
    if ways[0].attention_dropout:
        ways += both(dropout=False)
    unit, units = units_of(batch)
    forward, backward = flops(model, batch, context, fake)
    return Cost(
        parameters=sum(p.numel() for p in weights),
        samples=len(batch[-1]),
        unit=unit,
        forward_flops=forward / units,
        backward_flops=backward / units,
        weights=size_of(weights) / MIB,
        gradients=gradients / MIB,
        optimizer_state=state / MIB,
        ways=ways,
    )


def units_of(batch: list[Tensor]) -> tuple[str, int]:
    """What costs are counted per, and how many of them there are."""
    sequences = [x for x in batch[:-1] if x.ndim == 2 and not x.is_floating_point()]
    tokens = sum(x.numel() for x in sequences)
    return ("token", tokens) if tokens else ("sample", len(batch[-1]))


def flops(
    model: LightningModule, batch: list[Tensor], context: Context, fake: bool
) -> tuple[int, int]:
    """Floating-point operations of the forward and of the backward pass."""
    with stand_in(model, batch, fake) as (model, batch), ExitStack() as stack:
        # the counter knows matrix products, and of fused kernels only some
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # oneDNN's flags speak of GPUs that are not there
        stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        counter = stack.enter_context(FlopCounterMode(display=False))
        loss = training_loss(model, batch, context)
        forward = counter.get_total_flops()
        loss.backward()
        return forward, counter.get_total_flops() - forward


def step_memory(
    model: LightningModule,
    batch: list[Tensor],
    context: Context,
    fake: bool,
    plain: bool,
    dropout: bool,
) -> StepMemory:
    """Memory of a step, without that of the optimizer, in bytes."""
    way = sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()
    with stand_in(model, batch, fake) as (model, batch), way:
        with AttentionDropout(dropout) as attention, LiveStorages() as storages:
            hold_gradients(model)
            storages.add(*model.parameters(), *model.buffers(), *batch)
            held = storages.now
            loss = training_loss(model, batch, context)
            kept = storages.now - held
            model.zero_grad()
            loss.backward()
    kernel = " ".join(storages.attention_kernels) or "plain"
    name = "plain" if plain else "fused"
    if not attention.seen:
        name = kernel = "none"
    return StepMemory(name, kernel, attention.share, kept, storages.peak)


def training_loss(model: LightningModule, batch: list[Tensor], context: Context) -> Tensor:
    with context():
        return model.training_step(batch, 0)  # type: ignore[return-value]


def hold_gradients(model: LightningModule) -> None:
    """The gradients of the step before, which Lightning drops when the forward pass is over."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None


@contextmanager
def stand_in(
    model: LightningModule, batch: list[Tensor], fake: bool
) -> Iterator[tuple[LightningModule, list[Tensor]]]:
    """A copy to take a step with, by default one without values, and the batch for it.

    The copy has no trainer, so nothing it records goes anywhere. Whole numbers of the batch keep
    their values, because networks check lengths and sort by them.
    """
    if not fake:
        yield copy.deepcopy(model), batch
        return
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(mode):
        model = copy.deepcopy(model)
    batch = [mode.from_tensor(x) if x.is_floating_point() else x for x in batch]
    with mode, RealIntegers():
        yield model, batch


class RealIntegers(TorchDispatchMode):
    """Under a FakeTensorMode, computes what depends on real tensors alone for real.

    Raises:
        UnsupportedOperatorException: A kernel needs more than its version without values says.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "prim":  # asks for the device, thousands of times
            return func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in WORKSPACE:
            raise UnsupportedOperatorException(func)
        given = tensors_in((args, kwargs))
        real = given and not any(isinstance(x, FakeTensor) for x in given)
        with unset_fake_temporarily() if real else nullcontext():
            return func(*args, **(kwargs or {}))


class LiveStorages(TorchDispatchMode):
    """Follows all storages that operators make, whoever keeps them.

    Attributes:
        now: Bytes that are alive.
        peak: Bytes that were alive at most.
        attention_kernels: Names of the fused ones that ran, in the order of the first time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.attention_kernels: dict[str, None] = {}
        self.known: set[int] = set()

    def add(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if id(storage) not in self.known:  # else a view, or changed in place
                self.known.add(id(storage))
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                # it lives as long as C++ needs it, also where Python has no name for it
                finalize(storage, self.forget, id(storage), storage.nbytes()).atexit = False

    def forget(self, key: int, size: int) -> None:
        self.known.remove(key)
        self.now -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        self.add(*tensors_in(outputs))
        name = func.overloadpacket.__name__
        if "scaled_dot_product" in name and not name.endswith("backward"):
            self.attention_kernels[name.removeprefix("_scaled_dot_product_")] = None
        return outputs


class AttentionDropout(TorchFunctionMode):
    """Watches what attention is called with, and can do without its dropout.

    Attributes:
        seen: Whether there was attention.
        share: The largest dropout it was called with, 0 where it is left out.
    """

    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")

    def __init__(self, keep: bool) -> None:
        super().__init__()
        self.keep = keep
        self.seen = False
        self.share = 0.0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        given = dict(zip(self.names, args, strict=False)) | kwargs
        if not self.keep:
            given["dropout_p"] = 0.0
        self.seen = True
        self.share = max(self.share, given.get("dropout_p", 0.0))
        return func(**given)


def optimizer_memory(optimizer: Optimizer) -> tuple[int, int]:
    """Bytes an optimizer keeps, and those its step takes at most beside weights and gradients.

    A copy takes a step with gradients of zero, and what it keeps is counted.
    """
    optimizer = copy.deepcopy(optimizer)
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    for p in weights:
        p.grad = torch.zeros_like(p)
    storages = LiveStorages()
    storages.add(*weights, *(p.grad for p in weights if p.grad is not None))
    held = storages.now
    storages.add(*state_of(optimizer))  # of a resumed run
    with storages:
        optimizer.step(lambda: 0.0)
    return size_of(state_of(optimizer)), storages.peak - held


def state_of(optimizer: Optimizer) -> list[Tensor]:
    return tensors_in(list(optimizer.state.values()))


def tensors_in(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of their storages, each counted once."""
    storages = {id(x.untyped_storage()): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


@contextmanager
def undisturbed(model: LightningModule) -> Iterator[None]:
    """The random numbers are those of before."""
    device = model.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        yield


# The measurement


def measured_peak(
    model: LightningModule,
    optimizer: Optimizer,
    batch: list[Tensor],
    context: Context = nullcontext,
) -> float:
    """Most memory in MiB that a real step has at a time, its weights and all included.

    A copy of model and optimizer takes the step. Asked is the allocator, not the operators: on a
    CPU by PyTorch's profiler. On CUDA ``torch.cuda.max_memory_allocated`` begins anew.
    """
    model, optimizer = copy.deepcopy((model, optimizer))
    hold_gradients(model)
    optimizer.step(lambda: 0.0)  # from the first step on it has what it keeps
    model.zero_grad()
    held = size_of([*model.parameters(), *model.buffers(), *batch, *state_of(optimizer)])

    def step() -> None:
        hold_gradients(model)
        loss = training_loss(model, batch, context)
        model.zero_grad()
        loss.backward()
        optimizer.step(lambda: 0.0)

    with undisturbed(model):
        rise = risen_on_cuda(step) if model.device.type == "cuda" else risen_on_cpu(step)
    return (held + rise) / MIB


def risen_on_cuda(step: Callable[[], None]) -> int:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def risen_on_cpu(step: Callable[[], None]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it complains where there is no GPU
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:  # torch 2.11 warns without the last
        step()
    result = profiler.profiler.kineto_results
    events = sorted((e.start_ns(), e.nbytes()) for e in result.events() if e.name() == "[memory]")
    return max(accumulate((size for _, size in events), initial=0))


# The callback


class TrainingCost(Callback):
    """State what a training step costs before training, and measure its memory when it has ended.

    Both are of the first training batch of the run, of rank 0, and stand in ``training_cost.json``
    in the run folder. Training itself is not slowed down, and its results stay the same bit for
    bit. The measured step is one more, taken by a copy that is thrown away.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None  # none under fast_dev_run, which leaves nothing behind
        self.cost: Cost | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = trainer.log_dir  # asked on all ranks: Lightning broadcasts the answer
        self.folder = None if folder is None else Path(folder)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.cost = training_cost(pl_module, *step_of(trainer))
            self.write()
            print(f"A training step of {self.cost.samples} samples costs:")
            Console().print(table(self.cost))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self.cost is not None:
            peak = measured_peak(pl_module, *step_of(trainer))
            self.cost = replace(self.cost, measured_peak=peak)
            self.write()
            estimate = self.cost.ways[0].peak
            print(f"Memory of a training step: {peak:,.1f} MiB, estimated {estimate:,.1f} MiB.")

    def write(self) -> None:
        if self.folder is not None and self.cost is not None:
            with atomic_write(self.folder / "training_cost.json", "w") as file:
                json.dump(asdict(self.cost), file, indent=2)


def step_of(trainer: Trainer) -> tuple[Optimizer, list[Tensor], Context]:
    """What a step of this trainer consists of, beside the model."""
    data: Any = getattr(trainer, "datamodule", None)  # an attribute Lightning does not declare
    if not hasattr(data, "training_batch"):
        raise UserError(
            "TrainingCost needs a datamodule that has training_batch, as those of datamodules/ do; "
            "leave callbacks.TrainingCost out."
        )
    precision = trainer.precision_plugin
    return (
        trainer.optimizers[0],
        precision.convert_input(data.training_batch(0, 0)),
        precision.train_step_context,
    )


def table(cost: Cost) -> Table:
    rows = Table("", "", box=None, show_header=False)
    rows.columns[1].justify = "right"
    rows.add_row("parameters", f"{cost.parameters:,}")
    for name, flops in (("forward", cost.forward_flops), ("backward", cost.backward_flops)):
        rows.add_row(f"FLOPs per {cost.unit}, {name}", f"{flops:,.0f}")
    for name in ("weights", "gradients", "optimizer_state"):
        rows.add_row(name.replace("_", " "), f"{getattr(cost, name):,.1f} MiB")
    for way in cost.ways:
        how = ""
        if way.attention != "none":
            kernel = "" if way.kernel == way.attention else f" ({way.kernel})"
            how = f", {way.attention} attention{kernel}, dropout {way.attention_dropout:g}"
        rows.add_row(f"activations{how}", f"{way.activations:,.1f} MiB")
        rows.add_row(f"peak{how}", f"{way.peak:,.1f} MiB")
    return rows
