"""What is measured of a spiky training, and the pictures that show it."""

import io
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import end_wandb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from torch import Tensor

import train
from callbacks.pictures.hidden_gradients import Trace, heat_maps
from callbacks.pictures.learning_curves import learning_curves
from callbacks.pictures.spike_pictures import SpikePictures
from core.errors import UserError
from datamodules import TemporalOrderDataModule
from lit_models.classification import LitClassifier
from lit_models.networks import LSTM, Recurrent
from pipeline.comparison import seeds_picture
from steadyfit.measures import (
    Curves,
    excess_loss,
    excursions,
    kinks,
    measure,
    rolling_median,
)
from steadyfit.panels import decimate, strip_common_prefix
from steadyfit.pictures import (
    SpikeRun,
    curves_picture,
    layers_picture,
    norms_picture,
    spike_pictures,
    through_time_picture,
)
from steadyfit.through_time import (
    ThroughTime,
    WorstStep,
    is_sequence,
    through_time,
)
from steadyfit.watching.records import RecordFile, SpikeRecord, Verdict

CONFIG = Path(__file__).parent.parent / "configs" / "temporal_order_lstm.yaml"


def metrics_of(loss: np.ndarray, **columns: np.ndarray) -> pd.DataFrame:
    """``metrics.csv`` of a run in epochs of ten steps, each validated with half the loss."""
    steps = np.arange(len(loss))
    ends = steps % 10 == 9
    table = {
        "step": steps,
        "epoch": steps // 10,
        "train/loss": loss,
        "train/accuracy": np.full(len(loss), 0.5),
        "val/loss": np.where(ends, loss / 2, np.nan),
        "val/accuracy": np.where(ends, 0.97, np.nan),
        "grad_norm/total": np.ones(len(loss)),
        "update_norm/total": np.full(len(loss), 0.1),
    }
    return pd.DataFrame(table | columns)


def spiky_run(label: str = "plain", steps: int = 300) -> SpikeRun:
    loss = np.linspace(1, 0.1, steps)
    loss[150:153] = 3
    grad = np.ones(steps)
    grad[149] = 80
    counts = (np.arange(steps) >= 149).astype(float)
    metrics = metrics_of(
        loss,
        **{
            "grad_norm/total": grad,
            "grad_norm/clipped": np.minimum(grad, 1),
            "grad_norm/threshold": np.full(steps, 5.0),
            "spikes/gradient": counts,
            "spikes/loss": counts,
        },
    )
    table = torch.rand(steps // 2, 3, 2).numpy() + 0.1
    table[3::4, 2] = 0  # not read
    return SpikeRun(label, metrics, norms=(["net.a.weight", "net.b.bias"], 2, table))


def values(line: Line2D) -> np.ndarray:
    return np.asarray(line.get_ydata(), float)


def rendered(figure: Figure) -> np.ndarray:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=40)
    return np.asarray(Image.open(file).convert("L"))


# Measures


def test_kinks_in_a_row_are_one() -> None:
    curve = np.array([1.0, 0.5, 0.9, 0.8, 0.5, 0.5, 0.76, 0.5, 0.74])
    assert kinks(curve) == [(2, 3), (6, 6)]


def test_a_level_held_for_ten_epochs_is_no_kink_any_more() -> None:
    assert kinks(np.array([0.1] + [0.5] * 20)) == [(1, 10)]


def test_a_rise_is_counted_once_however_long() -> None:
    loss = np.ones(400)
    loss[200:205] = 2.5
    loss[300] = 2.0  # not more than twice the median
    loss[310] = math.nan
    assert excursions(loss) == [(200, 204), (310, 310)]
    assert excursions(0.1 * loss / np.nanmax(loss)) == [
        (310, 310)
    ]  # twice, and yet next to nothing


def test_excess_is_what_one_finds_by_hand() -> None:
    loss = np.ones(300)
    loss[150], loss[151] = 3.25, 2.25  # 2 and 1 above the median + .25
    loss[200] = 1.2  # within the tolerance
    assert excess_loss(loss, steps_per_epoch=10) == pytest.approx(0.3)


def test_excess_of_a_loss_that_never_comes_back_grows_with_every_step() -> None:
    loss = np.concatenate([np.ones(200), np.full(200, 2.0)])  # the lowest median stays 1
    assert excess_loss(loss, steps_per_epoch=100) == pytest.approx(200 * 0.75 / 100)


def test_the_rolling_median_is_that_of_pandas() -> None:
    values = np.random.default_rng(0).normal(size=400)
    expected = pd.Series(values).rolling(128, min_periods=1).median()
    np.testing.assert_allclose(rolling_median(values), expected)
    np.testing.assert_allclose(rolling_median(values[:5]), expected[:5])


def test_a_run_is_judged_by_its_metrics() -> None:
    loss = np.ones(200)
    loss[59], loss[65] = 9, 9  # the last step of epoch 5, and one that the last steps do not show
    metrics = metrics_of(loss)
    accuracy = np.array([0.2, 0.96, 0.97, 0.99, 0.99, 0.4, *[0.99] * 14])
    metrics.loc[9::10, "val/accuracy"] = accuracy
    found = measure(metrics)
    assert (found.kinks_last, found.kinks_mean, found.kinks_val) == (1, 1, 1)
    assert (found.excursions, found.excess) == (2, pytest.approx(2 * 7.75 / 10))
    assert (found.first_epoch, found.lowest_after, found.final_accuracy) == (2, 0.4, 0.99)
    assert found.learned
    assert not measure(metrics, target=0.995).learned


def test_a_run_without_validation_is_never_said_to_have_learned() -> None:
    metrics = metrics_of(np.ones(40)).drop(columns=["val/loss", "val/accuracy"])
    found = measure(metrics)
    assert (found.learned, found.first_epoch, found.kinks_val) == (False, None, 0)
    assert math.isnan(found.final_accuracy)


def test_a_loss_that_is_not_a_number_is_infinitely_bad() -> None:
    loss = np.ones(200)
    loss[190:] = math.nan
    found = measure(metrics_of(loss))
    assert (found.excess, found.excursions, found.kinks_last) == (math.inf, 1, 1)


def test_metrics_without_epochs_are_refused() -> None:
    with pytest.raises(ValueError, match="no column epoch"):
        Curves.of(pd.DataFrame({"step": [0], "train/loss": [1.0]}))


# Figures


def test_curves_show_last_batches_validation_and_spikes() -> None:
    run = spiky_run()
    epochs, accuracies, steps = curves_picture([run]).axes
    mean, last, val = epochs.lines
    table = run.metrics.set_index("step")
    np.testing.assert_array_equal(last.get_ydata(), table["train/loss"][9::10])
    np.testing.assert_array_equal(last.get_xdata(), np.arange(1, 31))
    np.testing.assert_array_equal(val.get_ydata(), table["val/loss"].dropna())
    np.testing.assert_allclose(values(mean), table["train/loss"].groupby(table["epoch"]).mean())
    assert "97.0%" in accuracies.get_title(loc="right")
    np.testing.assert_allclose(
        np.asarray(steps.collections[0].get_offsets()), [[149, table["train/loss"][149]]]
    )
    assert steps.get_title(loc="right") == f"excess loss {run.measures.excess:.2f}; excursions: 1"


def test_a_single_epoch_is_seen() -> None:
    """One point makes no line."""
    losses, accuracies, _ = curves_picture([SpikeRun("one", metrics_of(np.ones(10)))]).axes
    drawn = [line for axes in (losses, accuracies) for line in axes.lines]
    assert [line.get_marker() for line in drawn] == ["."] * 5
    long = curves_picture([SpikeRun("long", metrics_of(np.ones(300)))]).axes[0].lines
    assert {line.get_marker() for line in long} == {""}


def test_norms_are_shown_before_and_after_clipping() -> None:
    run = spiky_run()
    gradient, beside, update, _ = norms_picture([run]).axes
    before, after, threshold = gradient.lines
    assert (values(before).max(), values(after).max()) == (80, 1)
    assert set(values(threshold)) == {5}
    assert gradient.get_title(loc="right") == "spikes: 1; largest 80"
    np.testing.assert_array_equal(gradient.collections[0].get_offsets(), [[149, 80]])
    assert gradient.get_ylim() == beside.get_ylim()
    assert len(update.lines) == 1  # nobody has clipped it


def test_runs_share_their_axes() -> None:
    short_run = spiky_run("calm", steps=200)
    short_run.metrics["train/loss"] /= 10
    for name, figure in spike_pictures([spiky_run(), short_run]).items():
        drawn = [axes for axes in figure.axes if axes.get_title(loc="left")]
        assert [axes.get_title(loc="left").strip() for axes in drawn] == ["plain", "calm"], name
        one, other = drawn
        assert one.get_xlim() == other.get_xlim()
        assert one.get_ylim() == other.get_ylim()


def test_the_heat_map_has_a_row_for_each_parameter_and_carries_weights_on() -> None:
    run = spiky_run()
    assert run.norms
    run.norms[2][75, 0, 1] = 1e4
    figure = layers_picture([run])
    gradient, relative, weights, *_ = figure.axes
    assert [label.get_text() for label in gradient.get_yticklabels()] == ["a.weight", "b.bias"]
    np.testing.assert_array_equal(gradient.images[0].get_array(), run.norms[2][:, 0].T)
    assert gradient.images[0].get_extent() == [0, 300, 1.5, -0.5]
    assert "largest 1e+04, b.bias, step 150 to 151" in gradient.get_title(loc="right")
    assert np.ma.count_masked(relative.images[0].get_array()) == 0
    line = values(weights.lines[0])
    assert (line > 0).all()
    assert line[3] == line[2]


def test_an_infinite_gradient_stands_out_of_the_heat_map() -> None:
    run = spiky_run()
    assert run.norms
    run.norms[2][10, 0, 0] = np.inf
    figure = layers_picture([run])
    assert (rendered(figure) < 128).any()
    image = figure.axes[0].images[0]
    colour = image.cmap(image.norm(np.ma.asarray(image.get_array())[0, 10]))
    np.testing.assert_allclose(colour, image.cmap.get_over())


def test_names_are_cut_to_what_tells_them_apart() -> None:
    assert strip_common_prefix(["net.core.w", "net.core.b"]) == ["w", "b"]
    assert strip_common_prefix(["net.core.w", "net.head.w"]) == ["core.w", "head.w"]
    assert strip_common_prefix(["weight"]) == ["weight"]


def test_a_long_line_keeps_its_spikes() -> None:
    values = np.random.default_rng(0).random(100_001)
    values[77_777], values[5], values[100_000] = 9, math.nan, 8
    steps, shown = decimate(np.arange(len(values)), values)
    assert len(steps) <= 3000
    assert shown[steps == 77_777] == [9]
    assert shown[-1] == 8
    assert np.isfinite(shown).all()


def test_values_that_are_not_finite_break_no_picture() -> None:
    run = spiky_run()
    columns = ["train/loss", "val/loss", "grad_norm/total", "grad_norm/threshold"]
    run.metrics.loc[200:, columns] = math.nan
    run.metrics.loc[230:250, columns] = math.inf
    run.metrics.loc[200:, "spikes/gradient"] = 2 + np.arange(100)
    for figure in spike_pictures([run]).values():
        assert (rendered(figure) < 128).any()


def test_nothing_finite_or_nothing_watched_breaks_no_picture() -> None:
    nothing = metrics_of(np.full(30, np.nan))
    nothing["grad_norm/total"] = np.inf
    bare = metrics_of(np.ones(5))[["step", "epoch", "train/loss"]]
    pictures = spike_pictures([SpikeRun("nothing", nothing), SpikeRun("bare", bare)])
    assert list(pictures) == ["spikes_curves", "spikes_norms"]
    for figure in pictures.values():
        rendered(figure)
    assert list(spike_pictures([SpikeRun("bare", bare)])) == ["spikes_curves"]


def test_seeds_are_shown_with_their_accuracy() -> None:
    calm = measure(metrics_of(np.ones(50)))
    wild = measure(spiky_run().metrics, target=0.99)
    figure = seeds_picture({"before": {1: wild, 2: calm}, "after": {1: calm}}, 0.99)
    excess, accuracy = figure.axes
    np.testing.assert_allclose(values(excess.lines[0]), [wild.excess, 0])
    labels = [label.get_text() for label in accuracy.get_xticklabels()]
    assert labels == ["before\nmean 97.0%\n1 of 2 at 99%", "after\nmean 97.0%\n1 of 1 at 99%"]
    rendered(figure)


# The gradient through time


def by_hand(network: Recurrent, x: Tensor, target: Tensor) -> np.ndarray:
    """|dL/dx_t| (B, T) of an LSTM written out, each time step a leaf of its own."""
    w_ih, w_hh, b_ih, b_hh = network.rnn.parameters()
    inputs = [part.clone().requires_grad_() for part in x.unbind(1)]
    h = c = torch.zeros(len(x), w_hh.shape[1])
    for part in inputs:
        gates = part @ w_ih.T + b_ih
        i, f, g, o = (gates + h @ w_hh.T + b_hh).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    log_probabilities = network.output(h).log_softmax(1)
    loss = -log_probabilities[torch.arange(len(x)), target].mean()
    return torch.stack(torch.autograd.grad(loss, inputs), 1).norm(dim=2).numpy()


def test_the_gradient_through_time_is_that_of_an_lstm_written_out() -> None:
    torch.manual_seed(0)
    network = Recurrent(LSTM(8, 5), 4)
    module = LitClassifier(network, torch.optim.SGD, num_classes=4)
    x, target = torch.rand(6, 20, 8), torch.randint(4, (6,))
    own = {name: p.detach().clone() for name, p in module.named_parameters()}
    others = {name: 3 * p for name, p in own.items()}
    for weights in (None, others):
        worst = WorstStep(7, 0, [7], grad_norm=1.0, weights=weights)
        seen = through_time(module, [[x, target]], worst)
        for name, p in module.named_parameters():
            assert torch.equal(p, own[name])
            assert p.grad is None
            p.data.copy_((weights or own)[name])
        np.testing.assert_allclose(seen.norms, by_hand(network, x, target), rtol=1e-4, atol=1e-9)
        for name, p in module.named_parameters():
            p.data.copy_(own[name])


def test_accumulated_batches_are_one_gradient() -> None:
    torch.manual_seed(0)
    module = LitClassifier(Recurrent(LSTM(8, 5), 4), torch.optim.SGD, num_classes=4)
    x, target = torch.rand(6, 20, 8), torch.randint(4, (6,))
    worst = WorstStep(0, 0, [0, 1], grad_norm=1.0)
    whole = through_time(module, [[x, target]], worst)
    parts = through_time(module, [[x[:3], target[:3]], [x[3:], target[3:]]], worst)
    np.testing.assert_allclose(whole.norms, parts.norms, rtol=1e-4)
    assert parts.grad_norm == pytest.approx(whole.grad_norm, rel=1e-4)


def test_only_float_sequences_are_differentiated() -> None:
    assert is_sequence([torch.rand(2, 3, 4), torch.zeros(2)])
    assert not is_sequence([torch.rand(2, 3, 4, 4), torch.zeros(2)])
    assert not is_sequence([torch.zeros(2, 3, 4, dtype=torch.long), torch.zeros(2)])
    assert not is_sequence(torch.rand(2, 3, 4))


def test_batches_of_a_step_are_found_in_the_metrics() -> None:
    metrics = metrics_of(np.ones(30))
    found = WorstStep.locate(metrics, 23, 5.0)
    assert found == WorstStep(23, 2, [3], 5.0)
    found = WorstStep.locate(metrics, 23, 5.0, accumulated=4)
    assert found == WorstStep(23, 2, [12, 13, 14, 15], 5.0)
    assert WorstStep.locate(metrics, 30, 5.0) is None


def test_without_kept_weights_the_largest_recorded_spike_is_the_worst(tmp_path: Path) -> None:
    assert WorstStep.read(tmp_path) is None
    seen = ((1, "spike", 5.0), (2, "spike", 9.0), (3, "nonfinite", math.inf), (4, "warning", 99.0))
    file = RecordFile(tmp_path / "spikes.jsonl")
    file.begin(
        [SpikeRecord(s, batches=[s], signals={"gradient": Verdict(v, k)}) for s, k, v in seen]
    )
    assert WorstStep.read(tmp_path) == WorstStep(2, 0, [2], 9.0)


def test_the_picture_says_whether_the_weights_are_those_of_the_step() -> None:
    worst = WorstStep(3, 1, [2], grad_norm=50.0)
    norms = np.full((4, 6), 1e-3)
    norms[2] = 1
    titles = []
    for made, origin in ((50.001, "of that step"), (0.2, "7 steps before")):
        run = SpikeRun("a", metrics_of(np.ones(20)))
        run.through_time = ThroughTime(worst, norms, made, origin)
        (axes,) = through_time_picture([run]).axes
        titles.append(axes.get_title(loc="right"))
    assert titles[0].startswith("step 3 (epoch 1, batch 2): gradient norm 50, reproduced")
    assert "one of the 4 samples makes 100.0% of it" in titles[0]
    assert "gradient norm 50; 0.2 with the weights 7 steps before" in titles[1]


def test_the_line_of_the_batch_is_within_the_picture() -> None:
    """In a calm run, where all samples are alike, it is far above each of them."""
    seen = ThroughTime(WorstStep(3, 1, [2], 1.0), np.full((32, 6), 0.1), 1.0, "of that step")
    run = SpikeRun("calm", metrics_of(np.ones(20)), through_time=seen)
    (axes,) = through_time_picture([run]).axes
    (batch,) = [line for line in axes.lines if line.get_label() == "the batch"]
    assert values(batch) == pytest.approx(np.full(6, 0.1 * 32**0.5))
    assert axes.get_ylim()[1] > values(batch).max()


def test_the_threshold_of_a_calm_run_is_within_the_picture() -> None:
    calm = metrics_of(np.ones(20), **{"grad_norm/threshold": np.full(20, 50.0)})
    gradient = norms_picture([SpikeRun("calm", calm)]).axes[0]
    assert gradient.get_ylim()[1] > 50


@pytest.mark.parametrize("steps", [1, 3, 300])
def test_no_tick_stands_between_two_steps(steps: int) -> None:
    metrics = metrics_of(np.ones(steps), **{"lr-SGD": np.ones(steps)})
    measured = {0: {"0": Trace(torch.ones(2), torch.ones(2), 1.0)}}
    for figure in (
        curves_picture([SpikeRun("short", metrics)]),
        norms_picture([SpikeRun("short", metrics)]),
        learning_curves(metrics),
        heat_maps(measured, steps),
    ):
        figure.canvas.draw()
        lowest = [axes for axes in figure.axes if axes.get_xlabel()]
        assert {axes.get_xlabel() for axes in lowest} <= {"epoch", "optimizer step"}
        ticks = np.concatenate([axes.get_xticks() for axes in lowest])
        assert len(ticks) > 0
        assert (ticks == np.round(ticks)).all()


# The callback


@pytest.fixture(scope="module")
def trained_lstm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of some epochs on the easiest level, with all pictures."""
    root = tmp_path_factory.mktemp("lstm")
    train.main([*FIT, f"--trainer.default_root_dir={root}", "--run=first"])
    end_wandb()
    return root / "temporal_order_lstm" / "first"


FIT = [
    "fit",
    f"--config={CONFIG}",
    "--data.level=easy",
    "--data.epoch_size=160",
    "--data.val_size=32",
    "--trainer.max_epochs=3",
    "--trainer.accelerator=cpu",
    "--trainer.log_every_n_steps=4",
    "--trainer.logger=[{class_path: callbacks.MetricsCSV}]",
    "--trainer.callbacks=[{class_path: callbacks.gradient_spikes.GradientSpikeMonitor}, "
    "{class_path: callbacks.SpikePictures}, {class_path: lightning.pytorch.callbacks."
    "ModelCheckpoint, init_args: {filename: last, enable_version_counter: false}}]",
]


@pytest.mark.slow
def test_a_run_leaves_its_pictures(trained_lstm: Path) -> None:
    names = {path.stem for path in trained_lstm.glob("*.png")}
    assert names == {"spikes_curves", "spikes_norms", "spikes_layers", "spikes_through_time"}


def test_the_kept_weights_are_those_of_the_largest_gradient(trained_lstm: Path) -> None:
    """Made again outside of training, the gradient is the one that was recorded."""
    worst = WorstStep.read(trained_lstm)
    assert worst
    assert worst.weights
    metrics = pd.read_csv(trained_lstm / "metrics.csv").set_index("step")
    assert metrics["grad_norm/total"].idxmax() == worst.step
    torch.manual_seed(1)
    data = TemporalOrderDataModule(level="easy", epoch_size=160, val_size=32)
    data.setup("fit")
    module = LitClassifier(Recurrent(LSTM(8, 12), 4), torch.optim.SGD, num_classes=4)
    seen = through_time(module, worst.remake(data), worst)
    assert seen.grad_norm == pytest.approx(metrics["grad_norm/total"][worst.step], rel=1e-5)
    assert seen.proof.endswith("reproduced")


def test_a_run_killed_behind_its_last_checkpoint_gets_all_its_pictures(
    trained_lstm: Path, tmp_path: Path
) -> None:
    """Started again, it had nothing left to train and never drew the gradient through time."""
    run = shutil.copytree(trained_lstm, tmp_path / "temporal_order_lstm" / "first")
    for name in ("worst_spike.pt", "spikes_through_time.png"):
        (run / name).unlink()
    train.main([*FIT, f"--trainer.default_root_dir={tmp_path}", "--run=first"])
    for name in ("worst_spike.pt", "spikes_through_time.png"):
        assert (run / name).read_bytes() == (trained_lstm / name).read_bytes()


def test_weights_of_parameters_that_are_frozen_meanwhile_stay() -> None:
    """The weights in the checkpoint were more than there were parameters to train."""
    module = LitClassifier(Recurrent(LSTM(8, 12), 4), torch.optim.SGD, num_classes=4)
    first, again = SpikePictures(), SpikePictures()
    first._kept = first.trained(module)
    again.load_state_dict(first.state_dict())
    module.network.rnn.requires_grad_(False)
    assert list(again.trained(module)) == list(first._kept)
    assert len(SpikePictures().trained(module)) < len(first._kept)


@pytest.mark.slow
def test_a_run_that_breaks_off_leaves_its_pictures_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step == 9:
            raise RuntimeError("planted failure")
        return step(self, batch, batch_idx)

    step = LitClassifier.training_step
    monkeypatch.setattr(LitClassifier, "training_step", fail)
    with pytest.raises(RuntimeError, match="planted failure"):
        train.main([*FIT, f"--trainer.default_root_dir={tmp_path}", "--run=first"])
    folder = tmp_path / "temporal_order_lstm" / "first"
    assert {"spikes_curves", "spikes_norms"} <= {path.stem for path in folder.glob("*.png")}
    assert WorstStep.read(folder)


def test_the_worst_step_survives_a_resume(
    trained_lstm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("callbacks.pictures.spike_pictures.spike_pictures", lambda runs: {})
    args = [*FIT, f"--trainer.default_root_dir={tmp_path}", "--run=halves"]
    train.main([*args, "--trainer.max_epochs=2"])
    train.main(args)
    whole = WorstStep.read(trained_lstm)
    halves = WorstStep.read(tmp_path / "temporal_order_lstm" / "halves")
    assert whole
    assert whole.weights
    assert halves
    assert halves.weights
    assert (whole.step, whole.grad_norm) == (halves.step, halves.grad_norm)
    assert all(torch.equal(w, halves.weights[name]) for name, w in whole.weights.items())


def test_a_target_that_no_accuracy_can_reach_is_refused() -> None:
    with pytest.raises(UserError, match=r"target must be in \(0, 1\], got 95"):
        SpikePictures(target=95)
