"""Gradient of the loss by the state at each step of a recurrence: where it vanishes.

Dimensions: B batch, T time steps of a layer, H state, S measurements.
"""

import csv
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor, nn

from callbacks.pictures.base import PictureCallback
from core.errors import UserError
from core.files import atomic_write
from lit_models.base import LitModel
from lit_models.networks.unrolled import State
from steadyfit.panels import (
    GREY,
    LINES,
    VERMILION,
    count_axis,
    log_norm,
    note,
    strip_common_prefix,
    whole_numbers,
)

_CELLS: dict[str, Callable[..., Any]] = {
    "RNN_TANH": torch.rnn_tanh_cell,
    "RNN_RELU": torch.rnn_relu_cell,
    "GRU": torch.gru_cell,
    "LSTM": torch.lstm_cell,
}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)  # SyncBatchNorm would wait for all ranks


# The pure part


class Trace(NamedTuple):
    """Norms at each step of a layer.

    Attributes:
        gradients: Norm of the total dL/dh[t] of each sample (T, B), or of the batch (T,).
        states: Norm of h[t], likewise.
        radius: Largest |eigenvalue| of its recurrent matrix; NaN if that is not square.
    """

    gradients: Tensor
    states: Tensor
    radius: float

    def of_batch(self) -> "Trace":
        return Trace(self.gradients.norm(dim=1), self.states.norm(dim=1), self.radius)


class _Layer(NamedTuple):
    """States (B, ...) of a layer, in the order it computes them, and its recurrent matrix."""

    states: list[Tensor]
    matrix: Tensor | None

    def append(self, state: Tensor) -> None:
        self.states.append(state.requires_grad_())  # so it would not if all weights were frozen


def trace(module: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Trace]:
    """Differentiate a loss by all states on the way to it.

    States are seen where they pass through a :class:`State`, (B, H) or of any other shape. The
    fused networks of PyTorch show none, so their layers are computed once more, cell by cell, and
    what comes out is put in the place of theirs. It all happens without autocast and in eval mode,
    but for batch normalisation, which goes by the batch: with the running statistics of an
    untrained network, 0 and 1, it would not be there. Modes, gradients, running statistics and
    random numbers are left as they were.

    Args:
        module: Has the states.
        loss: Calls it and returns a loss ().

    Returns:
        A trace of each layer, from bottom to top; of LSTMs also of the cell.

    Raises:
        UserError: There is no recurrent layer.
    """
    with _preserve_state(module):
        with _capture_hidden_states(module) as layers:
            value = loss()
        layers = {name: layer for name, layer in layers.items() if layer.states}
        if not layers:
            raise UserError(
                f"{type(module).__name__} has no recurrent layer whose states can be seen; "
                "leave callbacks.HiddenGradients out."
            )
        every = [state for layer in layers.values() for state in layer.states]
        gradients = iter(torch.autograd.grad(value, every, materialize_grads=True))
    return {
        name: Trace(
            _norms([next(gradients) for _ in states]), _norms(states), _spectral_radius(matrix)
        )
        for name, (states, matrix) in zip(
            strip_common_prefix(list(layers)), layers.values(), strict=True
        )
    }


def _norms(states: Sequence[Tensor]) -> Tensor:
    """Norm of each sample at each step, (T, B); in float64, where small squares are not zero."""
    return torch.stack([*states]).detach().flatten(2).cpu().double().norm(dim=2)


def _spectral_radius(matrix: Tensor | None) -> float:
    """Largest |eigenvalue| of a matrix (H, H); NaN if it is not square or not finite."""
    if matrix is None or matrix.shape[0] != matrix.shape[1] or not matrix.isfinite().all():
        return math.nan
    return torch.linalg.eigvals(matrix.detach().cpu().double()).abs().max().item()


@contextmanager
def _preserve_state(module: nn.Module) -> Iterator[None]:
    """Compute in eval mode but for batch norm, as precisely as the weights are; leave no trace."""
    device = next(module.parameters()).device
    modes = {part: part.training for part in module.modules()}
    norms = [p for p in modes if isinstance(p, _NORMS) and p.training and p.track_running_stats]
    module.eval()
    for norm in norms:
        norm.training, norm.track_running_stats = True, False  # by the batch, and averages stay
    try:
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.autocast(device.type, enabled=False),
            torch.enable_grad(),
        ):
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode
        for norm in norms:
            norm.track_running_stats = True


@contextmanager
def _capture_hidden_states(module: nn.Module) -> Iterator[dict[str, _Layer]]:
    """Collect the states of all layers while the module runs."""
    layers: dict[str, _Layer] = {}
    hooks = []
    for name, part in module.named_modules():
        if isinstance(part, State):
            owner = module.get_submodule(name.rpartition(".")[0])
            is_cell = name.endswith("cell")
            layer = _Layer([], None if is_cell else getattr(owner, "weight_h", None))
            layers[name.removesuffix(".state")] = layer
            hooks.append(part.register_forward_hook(lambda m, i, h, append=layer.append: append(h)))
        elif isinstance(part, nn.RNNBase) and not part.bidirectional and not part.proj_size:
            mine: list[list[_Layer]] = []
            for k in range(part.num_layers):
                layers[f"{name}.{k}"] = _Layer([], getattr(part, f"weight_hh_l{k}"))
                mine.append([layers[f"{name}.{k}"]])
                if part.mode == "LSTM":
                    layers[f"{name}.{k}.cell"] = _Layer([], None)
                    mine[-1].append(layers[f"{name}.{k}.cell"])
            hooks.append(part.register_forward_hook(_unroll(mine), with_kwargs=True))
    try:
        yield layers
    finally:
        for hook in hooks:
            hook.remove()


def _unroll(layers: list[list[_Layer]]) -> Callable[..., Any]:
    """A forward hook that computes a fused network again, cell by cell.

    Args:
        layers: For each layer of the network where its states go, and those of its cell.
    """

    def hook(rnn: nn.RNNBase, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        alone = isinstance(output, Tensor)  # our own fused cores return states and take no first
        x = args[0].transpose(0, 1) if rnn.batch_first else args[0]  # (T, B, D)
        first = None if alone else kwargs.get("hx", args[1] if len(args) > 1 else None)
        first = (first,) if isinstance(first, Tensor) else first
        last = []
        for k, (weights, kept) in enumerate(zip(rnn.all_weights, layers, strict=True)):
            zeros = x.new_zeros(x.shape[1], rnn.hidden_size)
            state = tuple(part[k] for part in first) if first else (zeros,) * len(kept)
            states = []
            for step in x:
                new = _CELLS[rnn.mode](step, state if len(kept) > 1 else state[0], *weights)
                state = (new,) if isinstance(new, Tensor) else new
                for layer, part in zip(kept, state, strict=True):
                    layer.append(part)
                states.append(state[0])
            x = torch.stack(states)
            last.append(state)
        x = x.transpose(0, 1) if rnn.batch_first else x
        ends = [torch.stack(parts) for parts in zip(*last, strict=True)]
        return x if alone else (x, tuple(ends) if len(ends) > 1 else ends[0])

    return hook


# The callback


class HiddenGradients(PictureCallback):
    """Follow the gradient of the loss with respect to the state of every step through training.

    Every so many optimizer steps, before the step is taken, one fixed batch goes through the
    network once more: the first training batch of the run. Written are the norms over batch and
    units of dL/dh[t], with all paths from h[t] to the loss, and of h[t], for every layer, to
    ``hidden_gradients.csv`` and as a picture to ``hidden_gradients.png``. The loggers see, of the
    bottom layer, ``hidden_gradient/first`` and ``last`` (its first and last step) and their
    ``ratio``, also as ``decades``: -3 where a thousandth is left at the first step. Of every layer
    with a square recurrent matrix they see its ``spectral_radius/<layer>``.
    On other steps it costs nothing. Steps t are counted from 1, in the order in which a layer
    computes them: from the end of the sequence where it reads backwards.

    The loss is that of ``evaluation_step``, without dropout. Rank 0 measures, on its own batch.

    Args:
        every_n_steps: Optimizer steps between two measurements.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        if every_n_steps < 1:
            raise UserError(f"every_n_steps must be at least 1, got {every_n_steps}.")
        self.every_n_steps = every_n_steps
        self.batch: Any = None
        self.measured: dict[int, dict[str, Trace]] = {}  # of the batch, by optimizer step and layer

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % self.every_n_steps or step in self.measured or not trainer.is_global_zero:
            return
        if self.batch is None:
            remake = getattr(self.data, "training_batch", None)
            self.batch = trainer.precision_plugin.convert_input(remake(0, 0) if remake else batch)
        layers = trace(pl_module, lambda: pl_module.evaluation_step(self.batch)["loss"])  # type: ignore[operator]
        self.measured[step] = {name: layer.of_batch() for name, layer in layers.items()}
        if isinstance(pl_module, LitModel):
            pl_module.add_to_rows({step: _scalars(self.measured[step])})

    def state_dict(self) -> dict[str, Any]:
        plain = {s: {n: tuple(t) for n, t in layers.items()} for s, layers in self.measured.items()}
        return {"measured": plain}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        plain = state["measured"]
        self.measured = {
            s: {n: Trace(*t) for n, t in layers.items()} for s, layers in plain.items()
        }

    def draw(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if trainer.state.fn != TrainerFn.FITTING or not self.measured or self.folder is None:
            return
        _write_csv(self.folder / "hidden_gradients.csv", self.measured)
        self.save(trainer, "hidden_gradients", heat_maps(self.measured, trainer.global_step))

    on_fit_end = on_exception = draw


def _scalars(layers: Mapping[str, Trace]) -> dict[str, float]:
    """Values of a measurement for the loggers."""
    gradients = next(iter(layers.values())).gradients
    first, last = gradients[0].item(), gradients[-1].item()
    ratio = first / last if last else math.nan
    decades = math.log10(ratio) if ratio > 0 else math.nan
    values = {"first": first, "last": last, "ratio": ratio, "decades": decades}
    radii = {f"spectral_radius/{name}": layer.radius for name, layer in layers.items()}
    return {f"hidden_gradient/{name}": value for name, value in values.items()} | {
        name: radius for name, radius in radii.items() if not math.isnan(radius)
    }


def _write_csv(path: Path, measured: Mapping[int, Mapping[str, Trace]]) -> None:
    with atomic_write(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "layer", "t", "gradient", "state"])
        for step, layers in measured.items():
            for name, layer in layers.items():
                rows = zip(layer.gradients.tolist(), layer.states.tolist(), strict=True)
                writer.writerows([step, name, t, *row] for t, row in enumerate(rows, 1))


# The figures


def heat_maps(measured: Mapping[int, Mapping[str, Trace]], end: int) -> Figure:
    """|dL/dh[t]| of each layer, the time step against the training step.

    White is zero, red infinite or not a number. Below are the spectral radii, where there are any.

    Args:
        measured: Norms of the batch (T,) of each layer, by optimizer step.
        end: Number of optimizer steps.
    """
    steps = np.array(sorted(measured))
    edges = np.append(steps, max(end, steps[-1] + 1))
    names = list(measured[int(steps[0])])
    tables = {  # (T, S), zero after the end of a shorter column
        name: nn.utils.rnn.pad_sequence([measured[int(s)][name].gradients for s in steps]).numpy()
        for name in names
    }
    radii = {name: [measured[int(s)][name].radius for s in steps] for name in names}
    radii = {name: line for name, line in radii.items() if not np.isnan(line).all()}
    heights = [2.0] * len(names) + [1.0] * bool(radii)
    figure = Figure(figsize=(8, 1 + 1.2 * sum(heights)), layout="constrained")
    grid = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    scale = log_norm([*tables.values()])
    colours = colormaps["viridis"].with_extremes(over=VERMILION, bad="white")
    for axes, (name, values) in zip(grid, tables.items(), strict=False):
        shown = np.where(np.isfinite(values), values, 10 * (scale.vmax or 1))
        mesh = axes.pcolormesh(
            edges,
            np.arange(len(values) + 1) + 0.5,
            np.ma.masked_where(shown <= 0, shown),
            norm=scale,
            cmap=colours,
        )
        axes.set_ylabel("time step t")
        axes.yaxis.set_major_locator(whole_numbers())
        note(axes, f"layer {name}: |dL / d{'c' if name.endswith('cell') else 'h'}(t)|")
    figure.colorbar(mesh, ax=list(grid[: len(names)]), pad=0.01)
    for colour, (name, line) in zip(LINES, radii.items(), strict=False):
        grid[-1].axhline(1, color=GREY, linewidth=0.8, linestyle=":")
        grid[-1].plot(steps, line, ".-", color=colour, label=f"layer {name}")
        note(grid[-1], "largest |eigenvalue| of the recurrent matrix")
    if len(radii) > 1:
        grid[-1].legend(frameon=False)
    count_axis(grid, "optimizer step")
    return figure
