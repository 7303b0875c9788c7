"""Masked language models: what is masked, what the network sees, and how gaps are filled."""

import csv
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import CONFIGS, end_wandb, fit_quietly
from fake_data import write_books
from torch import Tensor, nn

import train
from benchmarks import unmasking
from benchmarks.unmasking import unmask
from core.runs import load_checkpoint
from datamodules import GrammarDataModule, MaskedBooksDataModule
from datamodules.base import IGNORED
from datamodules.text.masked_books import choose
from datamodules.text.subwords import BEGIN, END, IS_NEXT, MASK, NOT_NEXT, PAD, SPECIAL
from lit_models import LitSeq2Seq
from lit_models.networks import MaskedLanguageModel, Transformer
from lit_models.seq2seq import load_matching_weights

VOCAB = 400


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("books")
    write_books(root)
    return root


def data(root: Path, **options: Any) -> MaskedBooksDataModule:
    torch.manual_seed(0)
    sizes = {"batch_size": 8, "epoch_size": 420, "val_size": 20, "vocab_size": VOCAB}
    return MaskedBooksDataModule(str(root), **{**sizes, **options})


def small(**options: Any) -> MaskedLanguageModel:
    torch.manual_seed(0)
    sizes = {"embedding_dim": 16, "num_heads": 4, "hidden_size": 24, "max_length": 20}
    return MaskedLanguageModel(VOCAB, **{**sizes, "dropout": 0.0, **options})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- what is masked -------------------------------------------------------------------------------


def test_shares_are_those_of_bert(root: Path) -> None:
    tokens, lengths, target = data(root, epoch_size=2000).draw("train", 0)
    chosen = target != IGNORED
    subwords = lengths - 2  # but for BEGIN and END
    assert torch.equal(chosen.sum(1), (0.15 * subwords).round().clamp_min(1).long())
    seen, right = tokens[chosen], target[chosen]
    assert (seen == MASK).float().mean().item() == pytest.approx(0.8, abs=0.02)
    # a random one is, now and then, the right one
    assert (seen == right).float().mean().item() == pytest.approx(0.1 + 0.1 / VOCAB, abs=0.02)
    others = seen[(seen != MASK) & (seen != right)]
    assert len(others.unique()) > 100
    assert others.min() >= len(SPECIAL)


def test_15_percent_are_chosen_of_texts_of_any_length() -> None:
    lengths = torch.randint(4, 80, (2000, 1), generator=generator())
    subwords = torch.arange(80) < lengths
    chosen = choose(subwords, 0.15, 1, generator())
    assert not (chosen & ~subwords).any()
    assert (chosen.sum() / subwords.sum()).item() == pytest.approx(0.15, abs=0.003)
    everywhere = chosen[lengths[:, 0] > 70].float().mean(0)[:70]
    assert 0.08 < everywhere.min() < everywhere.max() < 0.25


def test_what_is_not_chosen_stays_and_the_target_is_what_stood_there(root: Path) -> None:
    books = data(root)
    tokens, lengths, target = books.draw("train", 0)
    restored = torch.where(target != IGNORED, target, tokens)
    drawn = books.drawn_sentences("train", 0)
    for row, length, (_, _, sentence) in zip(restored.tolist(), lengths, drawn, strict=True):
        assert row[0] == BEGIN
        assert row[length - 1] == END
        assert set(row[length:]) <= {PAD}
        assert books.subwords.decode(row) == sentence


def test_each_epoch_masks_anew_and_every_machine_alike(root: Path) -> None:
    first, again = data(root).draw("train", 0), data(root).draw("train", 0)
    assert all(map(torch.equal, first, again))
    other = data(root)  # an epoch is one pass
    places = []
    for epoch in (0, 1):
        _, _, target = other.draw("train", epoch)
        order = sorted(
            (index, tuple((row != IGNORED).nonzero()[:, 0].tolist()))
            for (_, index, _), row in zip(
                other.drawn_sentences("train", epoch), target, strict=True
            )
        )
        places.append(order)
    assert [index for index, _ in places[0]] == [index for index, _ in places[1]]
    assert sum(a == b for a, b in zip(*places, strict=True)) < 100
    seeded = data(root)
    seeded.seed = 5
    assert not torch.equal(seeded.draw("train", 0)[1], first[1])
    assert all(map(torch.equal, seeded.draw("val", 0), data(root).draw("val", 0)))


def test_spans_have_their_mean_length_and_the_share_stays() -> None:
    subwords = torch.ones(30, 4000, dtype=torch.bool)
    subwords[:, ::200] = False

    def runs(length: float) -> float:
        chosen = choose(subwords, 0.05, length, generator())
        assert not chosen[~subwords].any()
        assert chosen.sum().item() == pytest.approx(0.05 * subwords.sum().item(), rel=0.03)
        begins = chosen & ~F.pad(chosen, (1, 0))[:, :-1]
        return (chosen.sum() / begins.sum()).item()

    assert runs(1) == pytest.approx(1.05, abs=0.03)  # neighbours are chosen by chance
    assert runs(3) == pytest.approx(3, abs=0.3)


def test_a_short_sentence_has_one_gap_at_least() -> None:
    subwords = torch.tensor([[False, True, False], [True, True, True]])
    assert choose(subwords, 0.01, 1, generator()).sum(1).tolist() == [1, 1]


# --- the next sentence ----------------------------------------------------------------------------


def test_next_sentences_are_the_next_ones_in_half_of_the_samples(root: Path) -> None:
    books = data(root, next_sentence=True, epoch_size=840)
    tokens, lengths, target = books.draw("train", 0)
    everything = books.all_sentences("train")
    labels = target[:, 0]
    assert set(labels.tolist()) == {IS_NEXT, NOT_NEXT}
    assert (labels == IS_NEXT).float().mean().item() == pytest.approx(0.5, abs=0.05)
    restored = torch.where(target != IGNORED, target, tokens)
    restored[:, 0] = BEGIN
    assert (tokens[:, 0] == BEGIN).all()
    for row, length, label, (_, index, sentence) in zip(
        restored.tolist(), lengths, labels, books.drawn_sentences("train", 0), strict=True
    ):
        cut = row.index(END) + 1
        assert books.subwords.decode(row[:cut]) == sentence
        assert row.index(END, cut) == length - 1
        follows = everything[index + 1 : index + 2] == [books.subwords.decode(row[cut:])]
        # the miniature books repeat themselves, so another one may read the same
        assert follows or label == NOT_NEXT
    chosen = (target[:, 1:] != IGNORED).sum(1)
    assert torch.equal(chosen, (0.15 * (lengths - 3)).round().long())


# --- the network ----------------------------------------------------------------------------------


def test_a_token_is_seen_from_both_sides() -> None:
    network, tokens = small(), torch.randint(VOCAB, (1, 7), generator=generator())
    before = network(tokens)
    assert before.shape == (1, 7, VOCAB)
    for t in range(7):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % VOCAB
        assert ((network(changed) - before).abs().amax(2) > 1e-5).all()


def test_padding_changes_nothing() -> None:
    network, tokens = small().double(), torch.randint(VOCAB, (3, 7), generator=generator())
    lengths = torch.tensor([7, 1, 4])
    together = network(tokens, lengths)
    for b, length in enumerate(lengths):
        alone = network(tokens[b : b + 1, :length])[0]
        torch.testing.assert_close(together[b, :length], alone, rtol=1e-10, atol=1e-12)


def test_weights_are_tied_and_named_as_those_of_a_transformer() -> None:
    network = small(num_layers=2)
    assert network.output.weight is network.source_embedding.weight
    other = Transformer(VOCAB, 16, 4, 2, 1, 24, max_length=20)
    shapes = {name: tensor.shape for name, tensor in other.state_dict().items()}
    for name, tensor in network.state_dict().items():
        assert shapes[name] == tensor.shape


def test_loss_at_the_start_is_that_of_a_guess_and_a_batch_can_be_learned(root: Path) -> None:
    tokens, lengths, target = data(root, epoch_size=8).draw("train", 0)
    network = small(embedding_dim=32, hidden_size=64, max_length=60)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(network(tokens, lengths).flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # a token that stays, or none, can be told from its own embedding
    assert 5.5 < losses[0] < 7
    assert losses[-1] < 0.5


# --- filling gaps ---------------------------------------------------------------------------------


class Preferences(nn.Module):
    """Gives the same logits whatever it reads, and remembers the latter."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits  # (T, V)
        self.seen: list[list[int]] = []

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        self.seen.append(tokens[0].tolist())
        return self.logits.expand(len(tokens), *self.logits.shape)


def test_one_at_a_time_fills_in_the_order_of_certainty() -> None:
    logits = torch.zeros(4, 9)
    for place, token, certainty in ((0, 6, 2.0), (1, 7, 9.0), (2, 8, 4.0), (3, 6, 3.0)):
        logits[place, token] = certainty
    network = Preferences(logits)
    _ = MASK
    filled = unmask(network, torch.full((1, 4), MASK), 4)
    assert network.seen == [[_, _, _, _], [_, 7, _, _], [_, 7, 8, _], [_, 7, 8, 6]]
    assert filled.tolist() == [[6, 7, 8, 6]]
    network.seen.clear()
    assert torch.equal(unmask(network, torch.full((1, 4), MASK), 2), filled)
    assert network.seen == [[_, _, _, _], [_, 7, 8, _]]


@pytest.mark.parametrize(("steps", "temperature"), [(1, 1.0), (3, 0.0), (20, 1.0)])
def test_gaps_are_filled_and_what_was_given_stays(steps: int, temperature: float) -> None:
    network = small().eval()
    tokens = torch.randint(len(SPECIAL), VOCAB, (5, 12), generator=generator())
    tokens[torch.rand(5, 12, generator=generator()) < 0.6] = MASK
    tokens[4] = 9  # no gap
    given = tokens != MASK
    before = tokens.clone()

    def fill() -> Tensor:
        return unmask(network, tokens, steps, temperature, generator(3))

    filled = fill()
    assert torch.equal(tokens, before)
    assert torch.equal(filled[given], tokens[given])
    assert filled.min() >= len(SPECIAL)
    assert torch.equal(fill(), filled)


def test_low_temperatures_write_what_is_most_probable() -> None:
    network, tokens = small().eval(), torch.full((3, 8), MASK)
    best = unmask(network, tokens, 2)
    assert torch.equal(unmask(network, tokens, 2, temperature=1e-4), best)
    drawn = unmask(network, tokens, 2, temperature=5.0, generator=generator())
    assert not torch.equal(drawn, best)


# --- a run, and what another one takes over -------------------------------------------------------

SMALL = [
    "--model.network.embedding_dim=32", "--model.network.num_heads=4",
    "--model.network.hidden_size=64", "--data.vocab_size=400", "--data.epoch_size=160",
    "--data.val_size=20", "--data.batch_size=32", "--data.next_sentence=true",
    "--trainer.accelerator=cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with books and a masked language model."""
    home = tmp_path_factory.mktemp("home")
    write_books(home / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        config = f"--config={CONFIGS / 'masked_language.yaml'}"
        train.main(["fit", config, *SMALL, "--run=x", "--trainer.max_epochs=1"])
        end_wandb()
    return home


@pytest.fixture
def run(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    return Path("runs/masked_language/x")


def network_of(path: Path) -> dict[str, Tensor]:
    weights = load_checkpoint(path)["state_dict"]
    return {k.removeprefix("network."): w for k, w in weights.items() if k.startswith("network.")}


@pytest.mark.slow
def test_pretrained_weights_are_taken_over_and_the_rest_is_not_touched(run: Path) -> None:
    merges = data(Path("data")).subwords.merges
    network = Transformer(VOCAB, 32, 4, 1, 1, 64, copy=True)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    theirs = network_of(run / "checkpoints" / "best.ckpt")
    taken = load_matching_weights(network, str(run), merges)
    tied = {"source_embedding.weight", "target_embedding.weight", "output.weight"}
    shared = theirs.keys() & before.keys() | tied
    assert taken == len(shared) - 1  # the target's embedding is the source's
    for name, tensor in network.state_dict().items():
        if name in shared:
            expected = theirs["source_embedding.weight" if name in tied else name]
            assert torch.equal(tensor, expected), name
        else:
            assert torch.equal(tensor, before[name]), name
    assert any(name.startswith("decoder.") for name in before.keys() - shared)
    assert any(name.startswith("encoder.0.") for name in shared)


@pytest.mark.slow
def test_a_correction_starts_from_them_and_goes_on_without(run: Path, tmp_path: Path) -> None:
    def fit(pretrained: str, max_steps: int, resume: Path | None = None) -> LitSeq2Seq:
        torch.manual_seed(0)
        network = Transformer(VOCAB, 32, 4, 1, 1, 64, copy=True)
        still = partial(torch.optim.SGD, lr=0)
        model = LitSeq2Seq(network, still, VOCAB, pretrained=pretrained)
        books = GrammarDataModule("data", batch_size=8, epoch_size=8, val_size=4, vocab_size=VOCAB)
        fit_quietly(model, books, max_steps, resume)
        return model

    theirs = network_of(run / "checkpoints" / "best.ckpt")
    first = fit(str(run), max_steps=1)
    assert first.network.state_dict()["encoder.0.attention.query.weight"].equal(
        theirs["encoder.0.attention.query.weight"]
    )
    first.trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = fit("gone", 2, tmp_path / "last.ckpt")
    for name, tensor in first.network.state_dict().items():
        assert torch.equal(resumed.network.state_dict()[name], tensor)


def test_masked_and_next_sentence_accuracy_are_told_apart(run: Path) -> None:
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    found = {name: float(value) for name, value in rows[-1].items() if name.startswith("val/")}
    _, _, target = data(Path("data"), next_sentence=True).draw("val", 0)
    counted, sentences = int((target != IGNORED).sum()), len(target)
    both = (counted - sentences) * found["val/masked_accuracy"]
    both += sentences * found["val/next_sentence_accuracy"]
    assert found["val/next_sentence_accuracy"] != found["val/masked_accuracy"]
    assert found["val/accuracy"] == pytest.approx(both / counted, abs=1e-6)


def test_writes_from_masks_alone(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(unmasking, "STEPS", (1, 4))
    monkeypatch.setattr(unmasking, "SENTENCES", unmasking.SENTENCES[:1])
    unmasking.main([str(run)])
    printed = capsys.readouterr().out
    assert printed.startswith("from 12 masks\n  temperature 0  steps  1  ")
    assert printed.count("temperature") == 2 * 8
    assert "She _" in printed


# --- mistakes -------------------------------------------------------------------------------------


def test_span_out_of_range(root: Path) -> None:
    with pytest.raises(ValueError, match=r"span_length .* got 0\.5"):
        data(root, span_length=0.5)


def test_nothing_to_predict(root: Path) -> None:
    with pytest.raises(ValueError, match=r"no predictions .* python -m benchmarks.unmasking RUN"):
        data(root).setup("predict")


def test_a_single_sentence_has_no_next(tmp_path: Path) -> None:
    (tmp_path / "gutenberg").mkdir()
    (tmp_path / "gutenberg" / "a.txt").write_text("The old man walked home.")
    alone = data(tmp_path, next_sentence=True)
    alone.books = {"train": ["a"]}
    with pytest.raises(ValueError, match="next_sentence needs books with at least two sentences"):
        alone.draw("train", 0)


def test_network_out_of_range() -> None:
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        small(num_layers=0)
    with pytest.raises(ValueError, match="embedding_dim must be even and a multiple of num_heads"):
        small(num_heads=3)


def test_a_run_that_does_not_fit_is_refused(run: Path) -> None:
    merges = data(Path("data")).subwords.merges
    with pytest.raises(ValueError, match=r"none.ckpt does not exist"):
        load_matching_weights(Transformer(VOCAB, 32, 4), "none.ckpt", merges)
    with pytest.raises(ValueError, match="none is not a run folder"):
        load_matching_weights(Transformer(VOCAB, 32, 4), "none", merges)
    with pytest.raises(ValueError, match=r"best.ckpt reads other subwords .* same vocab_size"):
        load_matching_weights(Transformer(VOCAB, 32, 4), str(run), merges[:-1])
    with pytest.raises(ValueError, match=r"nothing in .*best.ckpt has the name and the shape"):
        load_matching_weights(Transformer(VOCAB, 16, 4, hidden_size=32), str(run), merges)


def test_only_masked_language_models_fill_gaps() -> None:
    other: Any = SimpleNamespace(data=None, source="runs/x/y")
    with pytest.raises(ValueError, match="runs/x/y was not trained on masked books"):
        unmasking.Writer(other, seed=0)
