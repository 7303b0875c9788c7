"""The gradient by the state of each step is the true one, and looking at it changes nothing."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import CONFIGS, end_wandb
from torch import Tensor, nn

import train
from benchmarks.step_overhead import Meter
from callbacks.pictures.hidden_gradients import (
    HiddenGradients,
    Trace,
    _scalars,
    heat_maps,
    trace,
)
from core.errors import UserError
from lit_models.networks import (
    GRU,
    LSTM,
    RNN,
    BidirectionalLSTM,
    LeNet5,
    Recurrent,
    VanillaLSTM,
    VanillaRNN,
)

# The gradient


def linear(radius: float, hidden: int = 6) -> tuple[Recurrent, Tensor]:
    """A linear network in float64 whose recurrent matrix has that spectral radius."""
    torch.manual_seed(0)
    network = Recurrent(VanillaRNN(2, hidden, nonlinearity="identity"), 1).double()
    layer: Any = network.rnn.layers[0]  # type: ignore[index]
    matrix = layer.weight_h.data
    matrix *= radius / torch.linalg.eigvals(matrix).abs().max()
    return network, matrix


@pytest.mark.parametrize(("radius", "vanishes"), [(0.5, True), (2.0, False)])
def test_linear_gradients_are_powers_of_the_matrix(radius: float, vanishes: bool) -> None:
    """dL/dh[t] = (W_h^T)^(T-t) dL/dh[T]: smaller and smaller below a radius of 1, else larger."""
    network, matrix = linear(radius)
    x = torch.randn(3, 20, 2, dtype=torch.float64)
    (seen,) = trace(network, lambda: network(x).square().sum()).values()
    by_last = 2 * network(x).detach() @ network.output.weight.detach()  # dL/dh[T], (B, H)
    expected = [by_last @ torch.linalg.matrix_power(matrix, 19 - t) for t in range(20)]
    torch.testing.assert_close(
        seen.gradients, torch.stack(expected).norm(dim=2), rtol=1e-6, atol=1e-6 * radius**19
    )
    torch.testing.assert_close(seen.states[-1], network.rnn(x)[:, -1].detach().norm(dim=1))
    assert seen.radius == pytest.approx(radius)
    first, last = seen.gradients[0], seen.gradients[-1]
    assert (first < 1e-3 * last).all() if vanishes else (first > 1e3 * last).all()


def test_gradients_of_an_lstm_are_those_by_hand() -> None:
    """dL/dc[t] = dL/dh[t] o (1 - tanh^2 c[t]) + dL/dc[t+1] f[t+1], and back through the gates."""
    torch.manual_seed(0)
    network = Recurrent(VanillaLSTM(2, 4), 1).double()
    layer: Any = network.rnn.layers[0]  # type: ignore[index]
    x = torch.randn(3, 7, 2, dtype=torch.float64)
    seen = trace(network, lambda: network(x).square().sum())
    h = c = torch.zeros(3, 4, dtype=torch.float64)
    steps = []
    with torch.no_grad():
        for part in x.unbind(1):
            z = part @ layer.weight_x.T + layer.bias + h @ layer.weight_h.T
            i, f, g, o = z.chunk(4, 1)
            i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
            before, c = c, f * c + i * g
            h = o * c.tanh()
            steps.append((before, c, i, f, g, o))
        by_h = 2 * network.output(h) @ network.output.weight
        by_c = torch.zeros_like(by_h)
        hidden, cells = [], []
        for before, c, i, f, g, o in reversed(steps):
            by_c = by_c + by_h * o * (1 - c.tanh() ** 2)
            hidden.append(by_h.norm(dim=1))
            cells.append(by_c.norm(dim=1))
            by_z = [
                by_c * g * i * (1 - i),
                by_c * before * f * (1 - f),
                by_c * i * (1 - g**2),
                by_h * c.tanh() * o * (1 - o),
            ]
            by_h, by_c = torch.cat(by_z, 1) @ layer.weight_h, by_c * f
    torch.testing.assert_close(seen["0"].gradients, torch.stack(hidden[::-1]))
    torch.testing.assert_close(seen["0.cell"].gradients, torch.stack(cells[::-1]))
    assert math.isnan(seen["0"].radius)  # four matrices, none of which is the recurrence


@pytest.mark.parametrize(
    ("ours", "fused", "names"),
    [
        (VanillaRNN(2, 4, num_layers=2), RNN(2, 4, num_layers=2), ["0", "1"]),
        (VanillaLSTM(2, 4, 2), LSTM(2, 4, 2), ["0", "0.cell", "1", "1.cell"]),
    ],
    ids=["rnn", "lstm"],
)
def test_fused_layers_are_seen_through(ours: Any, fused: Any, names: list[str]) -> None:
    """Networks that hide their states have the same gradients as those that show them."""
    for k, layer in enumerate(ours.layers):
        layer.weight_x.data = getattr(fused, f"weight_ih_l{k}").data
        layer.weight_h.data = getattr(fused, f"weight_hh_l{k}").data
        layer.bias.data = (getattr(fused, f"bias_ih_l{k}") + getattr(fused, f"bias_hh_l{k}")).data
    x = torch.randn(3, 7, 2)
    seen = [trace(core, partial(lambda core: core(x).sin().sum(), core)) for core in (ours, fused)]
    assert [list(layers) for layers in seen] == [names, names]
    for one, other in zip(seen[0].values(), seen[1].values(), strict=True):
        for a, b in zip(one[:2], other[:2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)
        assert one.radius == pytest.approx(other.radius, nan_ok=True)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_networks_of_torch_keep_their_results(kind: Any, batch_first: bool) -> None:
    """What is computed cell by cell starts from the first state and gives the last ones."""
    torch.manual_seed(0)
    rnn = kind(2, 4, num_layers=2, batch_first=batch_first)
    x, first = torch.randn(5, 3, 2), torch.randn(2, 5 if batch_first else 3, 4)
    given = (first, 2 * first) if kind is nn.LSTM else first
    results: list[Any] = []
    for kwargs in ({}, {"hx": given}):

        def loss(kwargs: dict[str, Any] = kwargs) -> Tensor:
            results.append(rnn(x, **kwargs))
            return results[-1][0].sum()

        trace(rnn, loss)
        torch.testing.assert_close(results[-1], rnn(x, **kwargs))


def test_nothing_reaches_back_from_the_padding() -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([7, 4, 1])
    for core in (GRU(2, 4), VanillaRNN(2, 4), BidirectionalLSTM(2, 4)):
        network, x = Recurrent(core, 3, read="every"), torch.randn(3, 7, 2)
        mask = torch.arange(7) < lengths[:, None]

        def loss(network: nn.Module = network, x: Tensor = x, mask: Tensor = mask) -> Tensor:
            return network(x, lengths)[mask].square().sum()

        for seen in trace(network, loss).values():
            for sample, length in enumerate(lengths):
                assert (seen.gradients[length:, sample] == 0).all()
                assert (seen.gradients[:length, sample] > 0).all()


def test_all_is_as_it_was_before() -> None:
    torch.manual_seed(0)
    network = Recurrent(RNN(2, 4, num_layers=2, dropout=0.5), 3, dropout=0.5)
    network.output.eval()
    x = torch.randn(3, 7, 2)
    network(x).sum().backward()
    gradients = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    modes = [part.training for part in network.modules()]
    random = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        seen = trace(network, lambda: network(x).square().sum() + 0 * torch.rand(()))
    torch.testing.assert_close(seen, trace(network, lambda: network(x).square().sum()))
    assert torch.equal(torch.get_rng_state(), random)
    assert [part.training for part in network.modules()] == modes
    assert all(map(torch.equal, gradients, [p.grad for p in network.parameters()]))  # type: ignore[arg-type]
    assert not any(part._forward_hooks for part in network.modules())


def test_frozen_weights_hide_nothing() -> None:
    network = Recurrent(VanillaRNN(2, 4), 3).requires_grad_(False)
    (seen,) = trace(network, lambda: network(torch.ones(1, 5, 2)).sum()).values()
    assert (seen.gradients > 0).all()


def test_tiny_gradients_are_not_zero() -> None:
    network, _ = linear(1e-3)
    network.float()
    (seen,) = trace(network, lambda: network(torch.ones(1, 12, 2)).sum()).values()
    assert 0 < seen.gradients[0] < 1e-25  # the square of which is below float32


def test_a_network_without_recurrence_is_refused() -> None:
    network = LeNet5()
    with pytest.raises(UserError, match="LeNet5 has no recurrent layer whose states can be seen"):
        trace(network, lambda: network(torch.ones(1, 3, 32, 32)).sum())


# The callback


def fit(root: Path, name: str, *flags: str, every: int | None = 4) -> Path:
    """A run of 15 steps on the easiest level of temporal order."""
    callbacks = [
        "{class_path: lightning.pytorch.callbacks.ModelCheckpoint, "
        "init_args: {filename: last, enable_version_counter: false}}"
    ]
    if every:
        callbacks.append(f"{{class_path: HiddenGradients, init_args: {{every_n_steps: {every}}}}}")
    train.main(
        [
            "fit",
            f"--config={CONFIGS / 'temporal_order_lstm.yaml'}",
            "--data.level=easy",
            "--data.epoch_size=160",
            "--data.val_size=32",
            "--trainer.max_epochs=3",
            "--trainer.accelerator=cpu",
            "--trainer.log_every_n_steps=4",
            "--trainer.logger=[{class_path: callbacks.MetricsCSV}]",
            f"--trainer.callbacks=[{', '.join(callbacks)}]",
            "--model.network.dropout=0.2",
            f"--trainer.default_root_dir={root}",
            f"--run={name}",
            *flags,
        ]
    )
    end_wandb()
    return root / "temporal_order_lstm" / name


def weights(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(tmp_path_factory.mktemp("hidden"), "first")


def test_training_is_the_same_with_it(measured: Path, tmp_path: Path) -> None:
    without = fit(tmp_path, "without", every=None)
    ours, other = weights(measured), weights(without)
    assert all(torch.equal(value, other[name]) for name, value in ours.items())
    with_it, bare = (pd.read_csv(folder / "metrics.csv") for folder in (measured, without))
    pd.testing.assert_frame_equal(with_it[bare.columns], bare)


def test_a_run_leaves_table_and_picture(measured: Path) -> None:
    table = pd.read_csv(measured / "hidden_gradients.csv", dtype={"layer": str})
    assert list(table.columns) == ["step", "layer", "t", "gradient", "state"]
    assert sorted(set(table["step"])) == [0, 4, 8, 12, 16][:4]
    assert set(table["layer"]) == {"0", "0.cell"}
    assert len(table) == 4 * 2 * 9  # sequences of the level are padded to 9
    assert (table["gradient"] >= 0).all()
    metrics = pd.read_csv(measured / "metrics.csv").set_index("step")
    start = table[(table["step"] == 0) & (table["layer"] == "0")].set_index("t")["gradient"]
    assert metrics["hidden_gradient/first"][0] == pytest.approx(start[1])
    assert metrics["hidden_gradient/ratio"][0] == pytest.approx(start[1] / start[9])
    assert metrics["hidden_gradient/last"].dropna().index.tolist() == [0, 4, 8, 12]
    assert (measured / "hidden_gradients.png").exists()


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_the_table(measured: Path, tmp_path: Path) -> None:
    fit(tmp_path, "halves", "--trainer.max_epochs=2")
    folder = fit(tmp_path, "halves")
    name = "hidden_gradients.csv"
    assert (folder / name).read_text() == (measured / name).read_text()


def test_steps_that_are_not_due_cost_nothing() -> None:
    class Trainer:
        global_step, is_global_zero = 1, True

    module: Any = nn.Linear(1, 1)
    callback, trainer = HiddenGradients(every_n_steps=2), Trainer()
    meter, batch = Meter(), [torch.ones(1)]
    with meter.counting():
        callback.on_train_batch_start(trainer, module, batch, 0)  # type: ignore[arg-type]
    assert meter.operators == meter.reads == 0
    trainer.global_step, trainer.is_global_zero = 2, False
    callback.on_train_batch_start(trainer, module, batch, 0)  # type: ignore[arg-type]
    assert not callback.measured  # and other ranks than the first do nothing at all


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_every_precision_is_measured(tmp_path: Path, precision: str) -> None:
    core = "--model.network.rnn=lit_models.networks.VanillaRNN"  # oneDNN's LSTM takes no bfloat16
    folder = fit(tmp_path, "first", core, f"--trainer.precision={precision}", every=100)
    table = pd.read_csv(folder / "hidden_gradients.csv")
    assert (table["gradient"] > 0).any()


def test_a_period_below_one_step_is_refused() -> None:
    with pytest.raises(UserError, match="every_n_steps must be at least 1, got 0"):
        HiddenGradients(every_n_steps=0)


# The figures


def made(gradients: list[float], radius: float = math.nan) -> Trace:
    values = torch.tensor(gradients, dtype=torch.float64)
    return Trace(values, 2 * values, radius)


def test_heat_maps_hold_every_measurement() -> None:
    steps = {0: {"0": made([1e-3, 0, 1], 0.5)}, 10: {"0": made([1e-2, math.inf, 2], 1.5)}}
    figure = heat_maps(steps, 13)
    heat, radius, *_ = figure.axes
    (mesh,) = heat.collections
    values: Any = mesh.get_array()
    assert values.shape == (3, 2)
    assert values.mask.tolist() == [[False] * 2, [True, False], [False] * 2]
    assert heat.get_xlim() == (0, 13)  # no further than training went
    assert radius.lines[1].get_ydata().tolist() == [0.5, 1.5]  # type: ignore[union-attr]
    assert len(heat_maps({0: {"0": made([1.0]), "1": made([0.0])}}, 1).axes) == 3  # and the scale


def test_a_gradient_that_is_nowhere_has_no_ratio() -> None:
    values = _scalars({"0": made([0.0, 0.0], 0.9)})
    assert math.isnan(values["hidden_gradient/ratio"])
    assert math.isnan(values["hidden_gradient/decades"])
    assert values["spectral_radius/0"] == 0.9
    assert _scalars({"0": made([1e-3, 1.0])})["hidden_gradient/decades"] == pytest.approx(-3)
