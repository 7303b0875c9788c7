"""Beam search: what it finds on a tree, on all trees small enough to search, and by networks."""

import itertools
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from token_tree import BERKELEY, NETWORK, NEURAL, Prefix, TokenTree
from torch import Tensor, nn

from lit_models.networks import Transformer, beam_search, with_copy_bias


@pytest.mark.parametrize(
    ("beam_width", "length", "expected"),
    [
        (2, 1, {(NEURAL,): -0.65, (NETWORK,): -0.73}),  # (a)
        (2, 2, {(NEURAL, NETWORK): -1.25, (NETWORK, NEURAL): -1.33}),  # (b)
        (2, 3, {(NEURAL, NETWORK, NETWORK): -1.85, (NETWORK, NEURAL, NETWORK): -1.93}),  # (c)
        (1, 3, {(NEURAL, NETWORK, NETWORK): -1.85}),
    ],
)
def test_answers_to_the_question_of_the_course(
    beam_width: int, length: int, expected: dict[Prefix, float]
) -> None:
    found = TokenTree(BERKELEY).search(beam_width, length)
    assert [tokens for tokens, _ in found] == [*expected]
    assert dict(found) == pytest.approx(expected, abs=1e-6)


def test_two_hypotheses_miss_the_best_sequence_and_three_find_it() -> None:
    """(d): its first two tokens are third best."""
    tree = TokenTree(BERKELEY)
    best = ((NEURAL,) * 3, pytest.approx(-1.46, abs=1e-6))
    assert tree.best() == best
    assert tree.search(3)[0] == best
    assert best[0] not in dict(tree.search(2))
    assert tree.search(3, 2)[2] == ((NEURAL,) * 2, pytest.approx(-1.45, abs=1e-6))
    every = tree.search(8)
    assert every[:2] == [best, ((NETWORK,) * 3, pytest.approx(-1.54, abs=1e-6))]
    assert len(dict(every)) == 8


# Networks. Token 0 begins and token 1 ends a sequence.

BEGIN, END, VOCAB = 0, 1, 5


class RNN(nn.Module):
    """A network whose state is a tuple of tensors."""

    def __init__(self, vocab_size: int = VOCAB, scale: float = 3.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 6)
        self.cell = nn.LSTMCell(6, 6)
        self.output = nn.Linear(6, vocab_size)
        self.scale = scale

    def start(self, source: Tensor) -> tuple[Tensor, Tensor]:
        h = self.embedding(source).sum(1)
        return h, h.tanh()

    def step(
        self, tokens: Tensor, state: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        state = self.cell(self.embedding(tokens), state)
        return (self.scale * self.output(state[0])).log_softmax(1), state


def transformer(vocab_size: int = VOCAB, **options: Any) -> Transformer:
    network = Transformer(vocab_size, 16, 2, 2, 2, 16, dropout=0.0, **options)
    network.output.weight = nn.Parameter(0.5 * torch.randn(vocab_size, 16))  # not the embedding
    return network.eval()


NETWORKS = {
    "transformer": transformer,
    "copying": partial(transformer, copy=True),
    "rnn": RNN,
}
EACH_NETWORK = pytest.mark.parametrize("make_network", NETWORKS.values(), ids=NETWORKS)


def search(network: Any, source: Tensor, **options: Any) -> Any:
    begin = torch.full((len(source),), BEGIN)
    options = {"end": END, "beam_width": 3, "max_length": 6, **options}
    return beam_search(network.step, network.start(source), begin, **options)


@torch.no_grad()
def log_probability(network: Any, source: Tensor, tokens: Sequence[int]) -> float:
    """Of a sequence given one source (S,), from the start."""
    if isinstance(network, Transformer):
        target_in = torch.tensor([[BEGIN, *tokens[:-1]]])
        rows = network(source[None], target_in)[0].log_softmax(1)
        return sum(row[token].item() for row, token in zip(rows, tokens, strict=True))
    total, state = 0.0, network.start(source[None])
    for last, token in itertools.pairwise([BEGIN, *tokens]):
        log_probabilities, state = network.step(torch.tensor([last]), state)
        total += log_probabilities[0, token].item()
    return total


def sequences(max_length: int, vocab_size: int) -> list[tuple[int, ...]]:
    """All that end, and those of full length that do not."""
    every = []
    for length in range(1, max_length + 1):
        for tokens in itertools.product(range(vocab_size), repeat=length):
            if END not in tokens[:-1] and (tokens[-1] == END or length == max_length):
                every.append(tokens)
    return every


def found_in(hypotheses: Any, b: int) -> list[tuple[int, ...]]:
    rows = zip(hypotheses.tokens[b].tolist(), hypotheses.lengths[b].tolist(), strict=True)
    return [tuple(tokens[:length]) for tokens, length in rows]


@EACH_NETWORK
def test_full_width_equals_exhaustive_search(make_network: Any) -> None:
    torch.manual_seed(0)
    vocab_size, max_length = 3, 4
    network, source = make_network(vocab_size), torch.randint(vocab_size, (2, 4))
    width = vocab_size**max_length
    options = {"max_length": max_length}
    some = search(network, source, beam_width=width, n_best=5, **options)
    every = search(network, source, beam_width=width, n_best=width, **options)
    for b in range(2):
        expected = {
            tokens: log_probability(network, source[b], tokens)
            for tokens in sequences(max_length, vocab_size)
        }
        ranked = sorted(expected, key=lambda tokens: -expected[tokens])
        assert found_in(some, b) == ranked[:5]
        assert found_in(every, b)[: len(ranked)] == ranked
        assert (every.scores[b, len(ranked) :] == -torch.inf).all()
        right = torch.tensor([expected[tokens] for tokens in ranked])
        torch.testing.assert_close(every.scores[b, : len(ranked)], right, rtol=0, atol=1e-5)


@EACH_NETWORK
def test_width_one_is_greedy(make_network: Any) -> None:
    torch.manual_seed(3)
    network, source = make_network(), torch.randint(VOCAB, (8, 4))
    found = search(network, source, beam_width=1, max_length=9)
    lengths = set()
    for b in range(8):
        tokens: list[int] = []
        state, last = network.start(source[b : b + 1]), BEGIN
        while len(tokens) < 9 and last != END:
            log_probabilities, state = network.step(torch.tensor([last]), state)
            last = int(log_probabilities.argmax())
            tokens.append(last)
        assert found_in(found, b) == [tuple(tokens)]
        lengths.add(len(tokens))
    assert len(lengths) > 1  # the sentences end at different steps


@EACH_NETWORK
def test_scores_are_those_of_the_whole_sequence(make_network: Any) -> None:
    torch.manual_seed(2)
    network, source = make_network(), torch.randint(VOCAB, (4, 4))
    found = search(network, source, n_best=3)
    assert (found.scores.diff(dim=1) <= 0).all()
    for b in range(4):
        assert len(set(found_in(found, b))) == 3
        for tokens, score in zip(found_in(found, b), found.scores[b].tolist(), strict=True):
            right = log_probability(network, source[b], tokens)
            assert score == pytest.approx(right, abs=1e-5)


@EACH_NETWORK
def test_batch_equals_one_by_one(make_network: Any) -> None:
    torch.manual_seed(2)
    network, source = make_network(), torch.randint(VOCAB, (6, 4))
    options = {"n_best": 2, "max_length": 9}
    together = search(network, source, **options)
    for b in range(6):
        alone = search(network, source[b : b + 1], **options)
        assert found_in(together, b) == found_in(alone, 0)
        torch.testing.assert_close(together.scores[b], alone.scores[0], rtol=0, atol=1e-5)


def test_padded_batch_equals_one_by_one() -> None:
    torch.manual_seed(2)
    network, source, lengths = transformer(), torch.randint(VOCAB, (3, 7)), [7, 2, 4]
    begin = torch.full((3,), BEGIN)
    state = network.start(source, torch.tensor(lengths))
    together = beam_search(network.step, state, begin, END, beam_width=3, max_length=6, n_best=3)
    for b, length in enumerate(lengths):
        alone = search(network, source[b : b + 1, :length], n_best=3)
        assert found_in(together, b) == found_in(alone, 0)
        torch.testing.assert_close(together.scores[b], alone.scores[0], rtol=0, atol=1e-5)


def test_reports_an_unfinished_hypothesis_as_it_is() -> None:
    torch.manual_seed(0)
    network = RNN()
    nn.init.zeros_(network.output.weight)
    network.output.bias.data = torch.tensor([0.0, -50.0, 1.0, 0.0, 0.0])
    found = search(network, torch.randint(VOCAB, (1, 4)))
    assert found_in(found, 0) == [(2,) * 6]


# When it stops


@pytest.mark.parametrize("n_best", [1, 3])
def test_stopping_early_changes_no_result(n_best: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network, source = RNN(scale=5.0), torch.randint(VOCAB, (20, 4))
    network.output.bias.data[END] += 0.2  # some sentences end soon, others go on
    options = {"max_length": 12, "n_best": n_best}
    early = [search(network, row[None], **options) for row in source]
    module = import_module("lit_models.networks.beam_search")  # the package's name is the function
    monkeypatch.setattr(module, "_is_final", lambda *_: False)
    late = search(network, source, **options)
    for b, found in enumerate(early):
        assert found_in(found, 0) == found_in(late, b)
        torch.testing.assert_close(found.scores[0], late.scores[b], rtol=0, atol=1e-5)
    steps = [found.tokens.shape[2] for found in early]
    assert min(steps) < 5 <= max(steps)


# Keeping to the source


def test_a_change_costs_its_penalty() -> None:
    """A token is a change unless it follows its predecessor somewhere in the source."""
    uniform = torch.full((2, VOCAB), 1 / VOCAB).log()
    step = with_copy_bias(lambda token, state: (uniform, state + 1), change_penalty=2.0)
    source = torch.tensor([[BEGIN, 2, 3, 2, 4, END], [BEGIN, 4, 4, END, 0, 0]])
    log_probabilities, (state, same) = step(torch.tensor([2, 4]), (torch.zeros(2), source))
    kept = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 0, 0, 1]])
    torch.testing.assert_close(log_probabilities, uniform - 2 * (1 - kept))
    assert torch.equal(state, torch.ones(2))
    assert same is source


def test_a_high_penalty_keeps_every_source() -> None:
    torch.manual_seed(0)
    network = transformer(vocab_size=9)
    # of different tokens, so that there is one way through
    body = torch.stack([torch.randperm(7)[:5] + 2 for _ in range(8)])
    source = torch.cat([body, torch.full((8, 1), END)], 1)
    state = network.start(source), torch.cat([torch.full((8, 1), BEGIN), source], 1)
    begin = torch.full((8,), BEGIN)
    step = with_copy_bias(network.step, change_penalty=100.0)
    found = beam_search(step, state, begin, END, beam_width=3, max_length=9)
    assert torch.equal(found.tokens[:, 0, :6], source)
    free = beam_search(network.step, network.start(source), begin, END, 3, 9)
    assert not torch.equal(free.tokens[:, 0], found.tokens[:, 0])
    # without a change, the penalty took nothing from the score
    expected = [log_probability(network, source[b], source[b].tolist()) for b in range(8)]
    torch.testing.assert_close(found.scores[:, 0], torch.tensor(expected), rtol=0, atol=1e-4)


def counted_steps(probabilities: Sequence[float], **options: Any) -> int:
    """Steps taken where each token has the same probabilities whatever came before."""
    row, steps = torch.tensor(probabilities).log(), []

    def step(tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        steps.append(len(tokens))
        return row.expand(len(tokens), -1), state

    begin = torch.zeros(1, dtype=torch.long)
    beam_search(step, begin, begin, END, max_length=50, **options)
    return len(steps)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"beam_width": 1}, 1),
        ({"beam_width": 2}, 1),  # .6 has ended, and .3 can only become less
        ({"beam_width": 2, "n_best": 2}, 2),  # .3 * .6 is the second best
        ({"beam_width": 4, "n_best": 3}, 3),  # .3 * .3 * .6 the third
    ],
)
def test_stops_as_soon_as_nothing_can_change(options: dict[str, Any], steps: int) -> None:
    assert counted_steps([0.3, 0.6, 0.1], **options) == steps


def test_keeps_no_graph() -> None:
    torch.manual_seed(0)
    network = RNN()
    assert not search(network, torch.randint(VOCAB, (2, 4))).scores.requires_grad


# What is refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beam_width": 0}, "beam_width must be at least 1, got 0; use 1 for greedy decoding"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"n_best": 0}, "n_best must be from 1 to beam_width, 3, got 0"),
        ({"n_best": 4}, "n_best must be from 1 to beam_width, 3, got 4"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        search(RNN(), torch.zeros(2, 4, dtype=torch.long), **options)


def test_begin_is_one_token_for_each_sentence() -> None:
    begin = torch.zeros(2, 1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"begin must be one token .* got the shape \(2, 1\)"):
        beam_search(RNN().step, RNN().start(begin), begin, END, beam_width=1, max_length=2)
