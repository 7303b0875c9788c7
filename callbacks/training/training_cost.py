"""Cost of a training step: parameters, floating-point operations, and memory.

A copy of model and optimizer takes the first step before training does, and the allocator is asked
what it took. PyTorch chooses how attention is computed, and that decides about the memory: fused
attention keeps its output and one number for each row; plain attention, softmax(Q K^T) V, keeps the
softmax (B, heads, T, S); dropout on it adds a mask of floats and the dropped weights. On a CPU the
fused kernel knows no dropout, and PyTorch goes over to the plain one without a word.
"""

import copy
import json
import os
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import torch
from lightning import LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from callbacks.run.folder import FolderCallback
from core.errors import UserError
from core.files import atomic_write

MIB = 2**20
Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Cost:
    """Cost of a training step; memory in MiB.

    Attributes:
        parameters: Number of parameters, each counted once.
        samples: Samples in the batch.
        unit: ``token`` where the inputs are sequences of tokens (B, T), else ``sample``. Sources,
            targets and padding all count as tokens.
        forward_flops: Floating-point operations per unit in matrix products, convolutions and plain
            attention, two for each multiplication with its addition. The others are few.
        backward_flops: Those of the backward pass.
        weights: Of all parameters.
        gradients: Of the trained parameters.
        optimizer_state: Kept by the optimizer from step to step.
        activations: Kept by the forward pass for the backward pass.
        peak: Most that is allocated at a time, all of the above and the batch included.
    """

    parameters: int
    samples: int
    unit: str
    forward_flops: float
    backward_flops: float
    weights: float
    gradients: float
    optimizer_state: float
    activations: float
    peak: float


def training_cost(
    model: LightningModule,
    optimizer: Optimizer,
    batch: list[Tensor],
    context: Context = nullcontext,
) -> Cost:
    """Measure a step of a copy; model, optimizer and random numbers stay as they were.

    On CUDA, ``torch.cuda.max_memory_allocated`` begins anew.

    Args:
        model: Its ``training_step`` returns the loss.
        optimizer: Of its parameters.
        batch: ``[*inputs, target]`` on the device of the model.
        context: What ``training_step`` runs in, such as autocast.
    """
    device = model.device
    model, optimizer = copy.deepcopy((model, optimizer))

    def forward() -> Tensor:
        with context():
            return model.training_step(batch, 0)  # type: ignore[return-value]

    def step() -> None:
        for p in model.parameters():  # Lightning keeps those of the step before through the forward
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        loss = forward()
        model.zero_grad()
        loss.backward()
        optimizer.step(lambda: 0.0)

    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        forward_flops, backward_flops = _count_flops(forward)
        optimizer.step(lambda: 0.0)  # from the first step on it has what it keeps
        weights = _size(model.parameters())
        gradients = _size(p.grad for p in model.parameters() if p.grad is not None)
        state = _size(x for x in tree_leaves([*optimizer.state.values()]) if isinstance(x, Tensor))
        held = weights + state + _size([*model.buffers(), *batch])
        model.zero_grad()  # a profiler does not see memory go that it did not see come
        activations, _ = _allocated(forward, device)
        _, risen = _allocated(step, device)
    unit, units = units_of(batch)
    return Cost(
        parameters=sum(p.numel() for p in model.parameters()),
        samples=len(batch[-1]),
        unit=unit,
        forward_flops=forward_flops / units,
        backward_flops=backward_flops / units,
        weights=weights / MIB,
        gradients=gradients / MIB,
        optimizer_state=state / MIB,
        activations=activations / MIB,
        peak=(held + risen) / MIB,
    )


def units_of(batch: list[Tensor]) -> tuple[str, int]:
    """Unit that costs are counted per, and how many of it there are."""
    sequences = [x for x in batch[:-1] if x.ndim == 2 and not x.is_floating_point()]
    tokens = sum(x.numel() for x in sequences)
    return ("token", tokens) if tokens else ("sample", len(batch[-1]))


def _count_flops(forward: Callable[[], Tensor]) -> tuple[int, int]:
    """Floating-point operations of a forward pass and of its backward pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # oneDNN's flags speak of GPUs that are not there
        # the counter knows matrix products and convolutions, and of fused kernels only some
        with (
            sdpa_kernel(SDPBackend.MATH),
            torch.backends.mkldnn.flags(enabled=False),
            torch.backends.cudnn.flags(enabled=False),
            FlopCounterMode(display=False) as counter,
        ):
            loss = forward()
            flops = counter.get_total_flops()
            loss.backward()
            return flops, counter.get_total_flops() - flops


def _size(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages, each counted once."""
    storages = {id(x.untyped_storage()): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def _allocated(work: Callable[[], Tensor | None], device: torch.device) -> tuple[int, int]:
    """Bytes that the result of a call keeps alive, and the most that the call took at a time."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = work()
        kept, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        del result
        return kept - before, peak - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it complains where there is no GPU
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:  # torch 2.11 warns without the last
        result = work()
    events = profiler.profiler.kineto_results.events()
    sizes = [
        event.nbytes()
        for event in sorted(events, key=lambda event: event.start_ns())
        if event.name() == "[memory]"
    ]
    return sum(sizes), max(accumulate(sizes, initial=0))


class TrainingCost(FolderCallback):
    """State what a training step costs before training begins.

    It is that of the first training batch of the run, of rank 0, and stands in
    ``training_cost.json`` in the run folder. Training is not slowed down, and its results stay the
    same bit for bit: the measured step is taken by a copy that is thrown away.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        data: Any = getattr(trainer, "datamodule", None)  # an attribute Lightning does not declare
        if not hasattr(data, "training_batch"):
            raise UserError(
                "TrainingCost needs a datamodule that has training_batch, as those of datamodules/ "
                "do; leave callbacks.TrainingCost out."
            )
        precision = trainer.precision_plugin
        batch = precision.convert_input(data.training_batch(0, 0))
        optimizer, context = trainer.optimizers[0], precision.train_step_context
        try:
            cost = training_cost(pl_module, optimizer, batch, context)
        except torch.OutOfMemoryError:
            print(
                "TrainingCost measured nothing: there is no memory for a second copy of the model."
            )
            return
        finally:
            if pl_module.device.type == "cuda":  # the run's own peak begins now
                torch.cuda.reset_peak_memory_stats(pl_module.device)
        if self.folder is not None:
            with atomic_write(self.folder / "training_cost.json", "w") as file:
                json.dump(asdict(cost), file, indent=2)
        print(f"A training step of {cost.samples} samples costs:")
        Console().print(_table(cost))


def _table(cost: Cost) -> Table:
    rows = Table("", "", box=None, show_header=False)
    rows.columns[1].justify = "right"
    rows.add_row("parameters", f"{cost.parameters:,}")
    for name, flops in (("forward", cost.forward_flops), ("backward", cost.backward_flops)):
        rows.add_row(f"FLOPs per {cost.unit}, {name}", f"{flops:,.0f}")
    for name in ("weights", "gradients", "optimizer_state", "activations", "peak"):
        rows.add_row(name.replace("_", " "), f"{getattr(cost, name):,.1f} MiB")
    return rows
