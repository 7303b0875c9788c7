"""What ``skip``, ``rollback`` and an own reaction bring back, whatever a step has done to it."""

import copy
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_loop import make_data, make_model, spiked, state_of, training
from small_training import same
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import LBFGS, SGD, Adam, Optimizer

from steadyfit import SpikeMonitor, StepProbe, clip_updates
from steadyfit.clipping import overwrites_gradients
from steadyfit.watching.kept import Choice, Kept
from steadyfit.watching.reactions import Reaction

FLAGS = [None, torch.tensor(True), torch.tensor(False)]


def replaced(owner: dict[str, Any]) -> None:
    owner["x"] = owner["x"] + 1


def resized(owner: dict[str, Any]) -> None:
    owner["x"] = torch.ones(7)


def written(owner: dict[str, Any]) -> None:
    owner["x"].add_(1)


def expanded(owner: dict[str, Any]) -> None:
    owner["x"] = torch.ones(1).expand(3)


def inferred(owner: dict[str, Any]) -> None:
    with torch.inference_mode():
        owner["x"] = owner["x"] * 2


def counted(owner: dict[str, Any]) -> None:
    owner["n"] += 1


def filled(owner: dict[str, Any]) -> None:
    owner["list"].append(torch.zeros(1))
    owner["list"][0].add_(1)


def emptied(owner: dict[str, Any]) -> None:
    owner["list"].clear()


def nested(owner: dict[str, Any]) -> None:
    owner["inner"]["y"].mul_(3)


def added(owner: dict[str, Any]) -> None:
    owner["new"] = 1


def removed(owner: dict[str, Any]) -> None:
    del owner["x"]


CHANGES: list[Callable[[dict[str, Any]], None]] = [
    written, replaced, resized, expanded, inferred, counted, filled, emptied, nested, added, removed
]  # fmt: skip


def make_owner() -> dict[str, Any]:
    return {
        "x": torch.arange(3.0),
        "n": 5,
        "list": [torch.ones(2), torch.zeros(2)],
        "inner": {"y": torch.ones(2)},
        "params": [torch.ones(1)],
    }


@pytest.mark.parametrize("flag", FLAGS, ids=["always", "yes", "no"])
@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__ for change in CHANGES])
def test_a_dictionary_goes_back(change: Any, flag: Tensor | None) -> None:
    owner, there, expected = make_owner(), make_owner(), make_owner()
    kept = Kept(owners=[owner])
    change(owner)
    change(there)
    kept.restore(Choice(flag))
    assert same(owner, there if flag is not None and not flag else expected)


@pytest.mark.parametrize("start", [expanded, inferred], ids=["expanded", "inferred"])
def test_tensors_that_cannot_be_written_into_go_back(start: Any) -> None:
    """``copy_`` into them is an error of torch."""
    owner = make_owner()
    start(owner)
    before = owner["x"].clone()
    kept = Kept(owners=[owner])
    kept.restore(Choice(torch.tensor(True)))
    assert torch.equal(owner["x"], before)


# In training


class Running(nn.Module):
    """Keeps a mean in a buffer that each forward pass puts anew, of another shape if asked."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.change = change
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        mean = 0.9 * self.mean.reshape(-1, 8)[0] + 0.1 * x.detach().mean(0)
        if self.change == "expanded":
            self.mean = mean.expand(3, 8)
            return x
        if self.change == "inferred":
            with torch.inference_mode():
                self.mean = mean * 1
            return x
        self.mean = (
            mean.repeat(1 + int(mean.abs().max() > 100)) if self.change == "longer" else mean
        )
        return x


@pytest.mark.parametrize("reaction", ["skip", "stop"])
@pytest.mark.parametrize("change", ["replaced", "longer", "expanded", "inferred"])
def test_buffers_that_are_replaced_go_back(change: str, reaction: Any) -> None:
    model = nn.Sequential(Running(change), make_model())
    optimizer = SGD(model.parameters(), lr=0.01)
    monitor = SpikeMonitor(model, optimizer, reaction=reaction, every=10)
    data = make_data(factors={35: 1e4})
    data[35][0].mul_(1e5)  # in what the buffer sees too
    buffer, states = [], []
    for step in training(model, optimizer, monitor, data[:36]):
        buffer.append(model.get_buffer("0.mean").clone())
        states.append(state_of(model, optimizer))
        if step == 35:
            assert not spiked(monitor)
    assert 35 in spiked(monitor)
    # of the forward pass of the spike nothing is left
    assert torch.equal(buffer[35], buffer[36])
    assert same(states[35], states[36])
    assert "0.mean" in monitor.buffers.names


def test_a_buffer_that_is_replaced_is_watched() -> None:
    """The norm was that of the first tensor, for ever."""
    model = nn.Sequential(Running("replaced"), make_model())
    optimizer = SGD(model.parameters(), lr=0.0)
    monitor = SpikeMonitor(model, optimizer, every=10)
    data = make_data()
    data[40][0].mul_(1e6)
    list(training(model, optimizer, monitor, data))
    [record] = [r for r in monitor.records if "buffer" in r.spiked]
    assert record.step == 40
    assert record.signals["buffer"].name == "0.mean"


class Counting(SGD):
    """Keeps what it knows in its parameter groups, as Prodigy does."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            group.setdefault("norms", []).append(torch.ones(1))
        return super().step(closure)


def test_what_stands_in_parameter_groups_goes_back() -> None:
    model = make_model()
    optimizer = Counting(model.parameters(), lr=0.01)
    monitor = SpikeMonitor(model, optimizer, reaction="skip", every=10)
    list(training(model, optimizer, monitor, make_data(factors={35: 1e4})))
    [group] = optimizer.param_groups
    assert (group["k"], len(group["norms"])) == (59, 59)


def test_the_memory_of_lbfgs_goes_back() -> None:
    """Its lists of directions are filled in place."""
    model = make_model()
    optimizer = LBFGS(model.parameters(), lr=0.1, max_iter=2)
    monitor = SpikeMonitor(model, optimizer, reaction="skip", every=10)
    data = make_data(45, factors={40: 1e4})
    states = []
    for x, y in data:
        states.append(state_of(model, optimizer))

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = mse_loss(model(x), y)
            loss.backward()
            monitor.before_step(loss)
            return loss

        optimizer.step(closure)
    monitor.flush()
    assert [r.step for r in monitor.records if r.reaction == "skip"] == [40]
    assert same(states[40], states[41])


def test_rollback_takes_lazy_modules() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(16), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyLinear(1))
    optimizer = SGD(model.parameters(), lr=0.01)
    monitor = SpikeMonitor(model, optimizer, reaction="rollback", every=10)
    list(training(model, optimizer, monitor, make_data(factors={55: 1e4})))
    assert [r.step for r in monitor.records if r.reaction == "rollback"] == [55]


# What is watched


def test_parameters_that_are_exchanged_are_seen() -> None:
    """As many as before, in the same group: they were neither watched nor clipped."""
    model, other = make_model(), nn.Linear(16, 1)
    optimizer = SGD(model.parameters(), lr=0.01)
    monitor = SpikeMonitor(nn.ModuleList([model, other]), optimizer, every=10)
    for step in training(model, optimizer, monitor, make_data()):
        if step == 25:
            model[2] = other
            optimizer.param_groups[0]["params"][2:] = list(other.parameters())
    assert StepProbe.of(optimizer).params[2] is other.weight
    assert monitor.monitor_of(0).names[2:] == ["0.2.weight", "0.2.bias"]
    assert not spiked(monitor)


@pytest.mark.parametrize("reaction", ["stop", "skip"])
def test_a_layer_that_is_thawed_is_no_spike(reaction: Any) -> None:
    """Its gradient comes on top of those there were, and ended the run."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1))
    model.get_submodule("0").requires_grad_(requires_grad=False)
    with torch.no_grad():
        model.get_parameter("2.weight").mul_(30)
    optimizer = SGD(model.parameters(), lr=1e-4)
    monitor = SpikeMonitor(model, optimizer, reaction=reaction, every=10)
    norms: list[dict[str, float]] = []
    monitor.log_rows = lambda rows: norms.extend(dict(row) for row in rows.values())  # type: ignore[method-assign]
    for step in training(model, optimizer, monitor, make_data(120)):
        if step == 64:
            model.get_submodule("0").requires_grad_()
    totals = [row["grad_norm/total"] for row in norms]
    assert min(totals[64:70]) > 2 * max(totals[40:64])
    assert not monitor.should_stop
    assert not [r for r in monitor.records if r.reaction != "log"]


@pytest.mark.parametrize("scale", [1e25, 1e-28])
def test_norms_that_float32_cannot_square_are_numbers(scale: float) -> None:
    """Of float32 the square of 1e20 is infinite, and that of 1e-23 is zero."""
    seen: dict[int, Any] = {}
    parameters = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))]
    optimizer = SGD(parameters, lr=0.0)
    with SpikeMonitor(nn.ParameterList(parameters), optimizer, log=seen.update) as monitor:
        for p in parameters:
            p.grad = torch.full_like(p, scale)
        monitor.before_step(1.0)
        optimizer.step()
    assert seen[0]["grad_norm/total"] == pytest.approx(scale * 8**0.5)
    assert not monitor.records


def test_two_monitors_that_count_differently() -> None:
    """The second took the update from the first, since its step had another number."""
    model = make_model()
    optimizer = SGD(model.parameters(), lr=0.01)
    rows: list[dict[int, Any]] = [{}, {}]
    first = SpikeMonitor(model, optimizer, log=rows[0].update)
    second = None
    for step in training(model, optimizer, first, make_data(30)):
        if step == 10:
            second = SpikeMonitor(model, optimizer, log=rows[1].update)
            first.before_step = announced_to(first, second)  # type: ignore[method-assign]
    assert second
    second.flush()
    updates = [[rows[0][s]["update_norm/total"] for s in range(10, 30)]]
    updates.append([rows[1][s]["update_norm/total"] for s in range(20)])
    assert updates[0] == updates[1]


def announced_to(first: SpikeMonitor, second: SpikeMonitor) -> Any:
    """Announce a step to both."""
    announce = first.before_step

    def both(*args: Any, **kwargs: Any) -> None:
        announce(*args, **kwargs)
        second.before_step(*args, **kwargs)

    return both


def test_layouts_of_ever_other_parameters_are_forgotten() -> None:
    parameters = [nn.Parameter(torch.ones(1)) for _ in range(12)]
    probe = StepProbe.of(SGD(parameters, lr=0.1))
    for number in range(1, 300):
        for bit, p in enumerate(parameters):
            p.grad = torch.ones(1) if number >> bit & 1 else None
        probe.find_active()
        assert len(probe.layout.active) == number.bit_count()
    assert len(probe._layouts) <= 64


def test_a_state_of_another_model_is_begun_anew() -> None:
    states: list[Any] = []
    for model in (make_model(nn.Linear(16, 16)), make_model()):
        optimizer = SGD(model.parameters(), lr=0.01)
        monitor = SpikeMonitor(model, optimizer, every=10)
        if states:
            monitor.load_state_dict(states[0])
        list(training(model, optimizer, monitor, make_data(30)))
        states.append(monitor.state_dict())
    assert monitor.monitor_of(0).history.names == ["0.weight", "0.bias", "2.weight", "2.bias"]


# What is refused


class Odd(Reaction):
    def react(self, loop: Any, model: nn.Module, optimizer: Optimizer) -> Any:
        return {"done": 1}


def test_an_own_reaction_says_what_it_did_in_words() -> None:
    model = make_model()
    optimizer = SGD(model.parameters(), lr=0.01)
    monitor = SpikeMonitor(model, optimizer, reaction=Odd())
    with pytest.raises(TypeError, match=r"^Odd\.react must return a string or None, got \{'done'"):
        list(training(model, optimizer, monitor, make_data(factors={35: 1e4})))


def test_what_steps_has_to_be_known() -> None:
    model = make_model()
    both = [SGD(model[0].parameters(), lr=0.1), Adam(model[2].parameters(), lr=0.1)]
    for watched in ([], both):
        monitor = SpikeMonitor(model, watched)
        with pytest.raises(ValueError, match=f"which of the {len(watched)} watched .* got None"):
            monitor.before_step(1.0)
        with pytest.raises(ValueError, match="got SGD"):
            monitor.before_step(1.0, SGD(model.parameters(), lr=0.1))


def test_complex_parameters_are_refused() -> None:
    model = nn.ParameterList([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    optimizer = SGD(model.parameters(), lr=0.1)
    for watch in (lambda: SpikeMonitor(model, optimizer), lambda: clip_updates(optimizer)):
        with pytest.raises(ValueError, match="does not take complex parameters; train them as"):
            watch()


@pytest.mark.parametrize("value", [1.5, 0, -1])
def test_whole_numbers_are_asked_for(value: Any) -> None:
    model = make_model()
    with pytest.raises(
        ValueError, match=f"every must be a whole number of at least 1, got {value}"
    ):
        SpikeMonitor(model, SGD(model.parameters(), lr=0.1), every=value)


@pytest.mark.parametrize("foreach", [None, False, True])
def test_whose_gradients_are_overwritten(foreach: bool | None) -> None:
    """By torch itself: what a step leaves in the gradients."""
    parameter = nn.Parameter(torch.ones(3))
    optimizer = SGD([parameter], lr=0.1, momentum=0.9, nesterov=True, foreach=foreach)
    for _ in range(2):
        parameter.grad = torch.ones(3)
        optimizer.step()
    assert parameter.grad is not None
    assert overwrites_gradients(optimizer) == (not torch.equal(parameter.grad, torch.ones(3)))


# What a fresh look has found


def test_a_mask_of_infinities_is_no_spike() -> None:
    """Many transformers register one; it was a spike in every step, and nothing was trained."""
    model = make_model()
    model.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
    optimizer = SGD(model.parameters(), lr=0.01)
    monitor = SpikeMonitor(model, optimizer, reaction="skip", every=10)
    list(training(model, optimizer, monitor, make_data()))
    assert not spiked(monitor)
    assert not monitor.counts["skipped"]


def test_who_comes_behind_a_step_that_was_not_taken_sees_its_own() -> None:
    """The copy was of weights from before a checkpoint was loaded, and the limit went there."""
    parameter = nn.Parameter(torch.ones(4))
    optimizer = SGD([parameter], lr=0.01)
    clip_updates(optimizer)
    parameter.grad = torch.ones(4)
    StepProbe.of(optimizer).snapshot(0, "one that gives up")
    with torch.no_grad():
        parameter.fill_(5.0)
    seen: dict[int, Any] = {}
    monitor = SpikeMonitor(nn.ParameterList([parameter]), optimizer, log=seen.update)
    monitor.before_step(1.0)
    optimizer.step()
    monitor.flush()
    assert parameter.tolist() == pytest.approx([4.99] * 4)
    assert seen[0]["update_norm/total"] == pytest.approx(0.02, rel=1e-3)


def test_rollback_finds_the_states_that_were_loaded() -> None:
    """torch puts new dictionaries into the optimizer; the old ones were brought back."""
    model = make_model()
    optimizer = Adam(model.parameters(), lr=0.001)
    monitor = SpikeMonitor(model, optimizer, reaction="rollback", every=10)
    states = {}
    for step in training(model, optimizer, monitor, make_data(70, factors={66: 1e4})):
        states[step] = state_of(model, optimizer)
        if step == 60:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    [record] = [r for r in monitor.records if r.reaction == "rollback"]
    assert record.step == 66
    assert same(states[67], states[50])


def two_optimizers(every: int = 10) -> tuple[nn.Sequential, list[Optimizer], SpikeMonitor]:
    model = make_model(nn.BatchNorm1d(16))
    both: list[Optimizer] = [
        SGD(model.get_submodule("0").parameters(), lr=0.01),
        SGD([*model.get_submodule("1").parameters(), *model.get_submodule("3").parameters()], 0.01),
    ]
    return model, both, SpikeMonitor(model, both, reaction="skip", every=every)


@pytest.mark.parametrize("between", ["nothing", "a flush", "a new parameter"])
def test_two_optimizers_that_are_announced_together(between: str) -> None:
    """The buffers went back to those behind the forward pass, the NaN stayed in the weights."""
    model, both, monitor = two_optimizers()
    data = make_data(40)
    data[35][0][0, 0] = torch.nan
    for step, (x, y) in enumerate(data):
        before = copy.deepcopy(model.state_dict())
        loss = mse_loss(model(x), y)
        for optimizer in both:
            optimizer.zero_grad()
        loss.backward()
        monitor.before_step(loss, both[0])
        if step == 35 and between == "a new parameter":
            both[1].add_param_group({"params": [nn.Parameter(torch.ones(1))]})
        monitor.before_step(loss, both[1])
        if step == 35 and between == "a flush":
            monitor.flush()
        for optimizer in both:
            optimizer.step()
        if step == 35:
            assert same(dict(model.state_dict()), dict(before))
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_buffers_of_a_checkpoint_are_those_to_go_back_to() -> None:
    """A first step that spikes went back to buffers from before it was loaded."""
    whole, data = make_model(nn.BatchNorm1d(16)), make_data(45, factors={40: 1e4})
    optimizer = SGD(whole.parameters(), lr=0.01)
    first = SpikeMonitor(whole, optimizer, reaction="skip", every=10)
    list(training(whole, optimizer, first, data[:40]))
    model = make_model(nn.BatchNorm1d(16))
    optimizer = SGD(model.parameters(), lr=0.01)
    second = SpikeMonitor(model, optimizer, reaction="skip", every=10)
    model.load_state_dict(whole.state_dict())
    second.load_state_dict(first.state_dict())
    list(training(model, optimizer, second, data[40:41]))
    assert second.counts["skipped"] == 1
    assert same(dict(model.state_dict()), dict(whole.state_dict()))


class Sharing(nn.Module):
    """Two modules with one buffer, which each forward pass puts anew, and a name for it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.mean: Tensor
        self.put(torch.zeros(8))

    def put(self, mean: Tensor) -> None:
        for module in (self, self.inner):
            module.register_buffer("mean", mean)
        self.alias = [mean]

    def forward(self, x: Tensor) -> Tensor:
        self.put(0.9 * self.mean + 0.1 * x.detach().mean(0))
        return x


def test_buffers_that_are_shared_stay_shared() -> None:
    sharing = Sharing()
    model = nn.Sequential(sharing, make_model())
    optimizer = SGD(model.parameters(), lr=0.01)
    monitor = SpikeMonitor(model, optimizer, reaction="skip", every=10)
    for _ in training(model, optimizer, monitor, make_data(40, factors={35: 1e4})):
        assert sharing.mean is sharing.inner.mean is sharing.alias[0]
    assert monitor.counts["skipped"] == 1


def test_parameters_that_move_to_another_group_have_its_rate() -> None:
    parameters = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    optimizer = SGD(parameters, lr=0.001)
    clip_updates(optimizer)
    for _ in range(2):
        for p in parameters:
            p.grad = torch.full_like(p, 100.0)
        optimizer.step()
        last = parameters[1].detach().clone()
        if len(optimizer.param_groups) == 1:
            moved = optimizer.param_groups[0]["params"].pop()
            optimizer.add_param_group({"params": [moved], "lr": 1.0})
            before = last
    assert (before - last).tolist() == pytest.approx([1.0] * 4)


@pytest.mark.parametrize("name", ["params", "step"])
def test_a_buffer_of_any_name_goes_back(name: str) -> None:
    model = make_model()
    model.register_buffer(name, torch.ones(2))
    kept = Kept(owners=[model._buffers])
    model.get_buffer(name).add_(1)
    kept.restore()
    assert model.get_buffer(name).tolist() == [1.0, 1.0]


def test_what_optimizers_remember_of_no_parameter_goes_back() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = SGD([parameter], lr=0.1)
    state: Any = optimizer.state
    known = {"n": 1, "pair": (torch.ones(1), 2), "last": deque([torch.ones(1)])}
    state["count"] = known
    kept = Kept([parameter], [optimizer])
    known["n"] = 2
    state["count"]["pair"][0].add_(1)
    state["count"]["last"].append(torch.ones(1))
    kept.restore()
    known = state["count"]
    assert (known["n"], known["pair"][0].item(), len(known["last"])) == (1, 1.0, 1)


def test_the_memory_of_lbfgs_goes_back_with_a_frozen_parameter_in_front() -> None:
    model = make_model()
    model.get_parameter("0.weight").requires_grad_(False)
    optimizer = LBFGS(model.parameters(), lr=0.1, max_iter=2)
    kept = None
    for step, (x, y) in enumerate(make_data(4)):

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = mse_loss(model(x), y)
            loss.backward()
            return loss

        if step == 3:
            before = state_of(model, optimizer)
            kept = Kept([p for p in model.parameters() if p.grad is not None], [optimizer])
        optimizer.step(closure)
    assert kept
    kept.restore()
    assert same(state_of(model, optimizer), before)


@pytest.mark.parametrize("exact", [False, True], ids=["saved", "resumed"])
def test_a_flush_changes_no_skip(exact: bool) -> None:
    """One for a checkpoint put off the next thresholds."""
    skipped = []
    for other in (False, True):
        model, both, monitor = two_optimizers(every=25)
        for step, (x, y) in enumerate(make_data(60, factors=dict.fromkeys(range(14, 60, 3), 8.0))):
            loss = mse_loss(model(x), y)
            for optimizer in both:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in both:
                monitor.before_step(loss, optimizer)
            for optimizer in both:
                optimizer.step()
            if other and step == 12:  # optimizer step 25 is the second one's
                state = monitor.state_dict()
                if exact:
                    monitor = SpikeMonitor(model, both, reaction="skip", every=25)
                    monitor.load_state_dict(state)
        monitor.flush()
        skipped.append([(r.step, r.optimizer) for r in monitor.records if r.reaction == "skip"])
    assert skipped[0] == skipped[1]
    assert skipped[0]


@pytest.mark.parametrize("reaction", ["stop", "skip"])
def test_a_head_that_is_exchanged_is_no_spike(reaction: Any) -> None:
    model = make_model()
    optimizer = SGD(model.parameters(), lr=1e-3)
    monitor = SpikeMonitor(model, optimizer, reaction=reaction, every=10)
    for step in training(model, optimizer, monitor, make_data(100)):
        if step == 64:
            head = nn.Linear(16, 1)
            with torch.no_grad():
                head.weight.mul_(2)
            model[2] = head
            optimizer.param_groups[0]["params"][2:] = list(head.parameters())
    assert not monitor.should_stop
    assert not monitor.counts["skipped"]
    assert monitor.monitor_of(0).names[2:] == ["2.weight", "2.bias"]


def test_a_graph_that_is_used_again_takes_a_step_between() -> None:
    """As the generator's of a GAN, behind the step of the discriminator."""
    maker, judge = make_model(nn.BatchNorm1d(16)), nn.Linear(1, 1)
    both = [SGD(maker.parameters(), lr=0.01), SGD(judge.parameters(), lr=0.01)]
    monitor = SpikeMonitor(nn.ModuleList([maker, judge]), both, reaction="skip", every=10)
    for x, _ in make_data(30):
        fake = maker(x)
        for net, made, sign in ((1, fake.detach(), 1), (0, fake, -1)):
            loss = sign * judge(made).tanh().mean() + 1
            both[net].zero_grad()
            loss.backward()
            monitor.before_step(loss, both[net])
            both[net].step()
    monitor.flush()
    assert not monitor.counts["skipped"]


def test_buffers_that_come_and_go() -> None:
    model = make_model(nn.BatchNorm1d(16))
    optimizer = SGD(model.parameters(), lr=0.01)
    monitor = SpikeMonitor(model, optimizer, reaction="skip", every=10)
    data = make_data(factors={35: 1e4})
    states = {}
    for step in training(model, optimizer, monitor, data):
        states[step] = state_of(model, optimizer)
        if step == 15:
            model.append(nn.BatchNorm1d(1))
        if step == 24:
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                setattr(model[1], name, None)
    assert same(states[35], states[36])


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", [Tensor.to_sparse, Tensor.to_sparse_csr, "float8"])
def test_buffers_of_other_layouts_are_left_alone(layout: Any) -> None:
    model = make_model()
    dense = torch.eye(4)
    buffer = dense.to(torch.float8_e4m3fn) if layout == "float8" else layout(dense)
    model.register_buffer("other", buffer)
    optimizer = SGD(model.parameters(), lr=0.01)
    monitor = SpikeMonitor(model, optimizer, reaction="skip", every=10)
    list(training(model, optimizer, monitor, make_data(factors={35: 1e4})))
    assert monitor.counts["skipped"] == 1


def test_rollback_behind_a_change_of_the_parameters() -> None:
    """Fewer than at the time of the copy: an error of NumPy."""
    model = make_model()
    optimizer = SGD(model.parameters(), lr=0.01)
    monitor = SpikeMonitor(model, optimizer, reaction="rollback", every=10)
    for step in training(model, optimizer, monitor, make_data(100, factors={95: 1e5})):
        if step == 70:
            del optimizer.param_groups[0]["params"][2:]
    assert [r.step for r in monitor.records if r.reaction == "rollback"] == [95]
    assert len(monitor.monitor_of(0).ratios.uses) == 2


def test_gradients_may_be_looked_at_between() -> None:
    model = make_model()
    optimizer = SGD(model.parameters(), lr=0.01)
    monitor = SpikeMonitor(model, optimizer)
    model(torch.randn(4, 8)).sum().backward()
    monitor.before_step(1.0)
    model.get_parameter("0.weight").grad = None
    StepProbe.of(optimizer).gradient_squares()
    optimizer.step()
    assert StepProbe.of(optimizer).update.squares is not None


def test_a_reaction_takes_no_scaled_gradients() -> None:
    model = make_model()
    optimizer = SGD(model.parameters(), lr=0.01)
    monitor = SpikeMonitor(model, optimizer, reaction="rollback", every=10)
    with pytest.raises(ValueError, match=r"gradients that scaler\.unscale_ has unscaled"):
        for x, y in make_data(factors={35: 1e4}):
            optimizer.zero_grad()
            loss = mse_loss(model(x), y)
            (8 * loss).backward()
            monitor.before_step(loss, scale=torch.tensor(8.0))


@pytest.mark.parametrize("change", ["rate", "thawed"])
def test_where_a_read_falls_changes_no_threshold(change: str) -> None:
    """A jump of the rate was told to the detector of updates before those of the block's begin."""
    rows: list[dict[int, Any]] = []
    for every in (1, 7, 50):
        model = make_model()
        first = model.get_submodule("0")
        first.requires_grad_(change == "rate")
        optimizer = SGD(model.parameters(), lr=0.01)
        rows.append({})
        monitor = SpikeMonitor(model, optimizer, every=every, log=rows[-1].update)
        for step in training(model, optimizer, monitor, make_data(100)):
            if step == 72:
                first.requires_grad_()
                optimizer.param_groups[0]["lr"] = 0.05 if change == "rate" else 0.01
    names = [f"{kind}_norm/threshold" for kind in ("grad", "update")]
    found = [[(s, r.get(n)) for s, r in sorted(own.items()) for n in names] for own in rows]
    assert found[0] == found[1] == found[2]
