"""Grammar correction: the data, what is learned from them, and a run that corrects any text."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import CONFIGS, end_wandb
from fake_data import write_books
from processes import by_two
from torch import Tensor, nn

import predict
import train
from benchmarks import jfleg
from core.errors import UserError
from datamodules import GrammarDataModule
from datamodules.base import IGNORED
from datamodules.text.error_synthesis import ErrorSynthesis
from datamodules.text.subwords import BEGIN, END, PAD
from lit_models import LitSeq2Seq
from lit_models.networks import Transformer
from lit_models.seq2seq import _changes
from metrics.edits import apply_edits
from pipeline.history import update


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("books")
    write_books(root)
    return root


def data(root: Path, **options: Any) -> GrammarDataModule:
    torch.manual_seed(0)
    sizes = {"batch_size": 8, "epoch_size": 40, "val_size": 20, "vocab_size": 400}
    return GrammarDataModule(str(root), **{**sizes, **options})


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def rows(tensor: Tensor, filler: int) -> list[list[int]]:
    return [[token for token in row if token != filler] for row in tensor.tolist()]


# --- data -----------------------------------------------------------------------------------------


def test_batch_is_a_sentence_with_errors_and_what_it_should_be(root: Path) -> None:
    books = data(root)
    books.setup("fit")
    source, lengths, target_in, target = next(iter(books.train_dataloader()))
    assert source.shape[0] == 8
    assert source.shape[1] == max(lengths.max(), (target != IGNORED).sum(1).max())
    clean = set(books.all_sentences("train"))
    for read, length, before, after in zip(
        rows(source, PAD), lengths, rows(target_in, PAD), rows(target, IGNORED), strict=True
    ):
        assert len(read) == length
        assert read[-1] == after[-1] == END
        assert before == [BEGIN, *after[:-1]]
        assert books.subwords.decode(after) in clean
    wrong = [books.subwords.decode(row) not in clean for row in rows(source, PAD)]
    assert sum(wrong) >= 3


def test_new_errors_in_each_epoch_and_the_same_on_every_machine(root: Path) -> None:
    def pairs(books: GrammarDataModule, epoch: int) -> list[tuple[str, str]]:
        examples = books.corrected_sentences("train", epoch)
        return [(e.source, apply_edits(e.source, e.edits[0])) for e in examples]

    first = pairs(data(root, epoch_size=420), 0)  # all sentences of the seven books
    assert first == pairs(data(root, epoch_size=420), 0)
    second = pairs(data(root, epoch_size=420), 1)
    assert sorted(clean for _, clean in first) == sorted(clean for _, clean in second)
    assert len(set(first) & set(second)) < 0.5 * len(set(first))
    parts = pairs(data(root, epoch_size=105), 0), pairs(data(root, epoch_size=105), 1)
    assert parts[0] + parts[1] == first[:210]


def test_evaluation_is_the_same_for_all_seeds_and_kinds_are_kept(root: Path) -> None:
    one, two = data(root), data(root)
    two.seed = 7
    assert one.corrected_sentences("test") == two.corrected_sentences("test")
    assert one.corrected_sentences("train") != two.corrected_sentences("train")
    kinds = {e.kind for s in one.corrected_sentences("test") for e in s.edits[0]}
    assert len(kinds) >= 6


def test_rates_can_be_set(root: Path) -> None:
    clean = data(root, errors=ErrorSynthesis(clean=1.0)).corrected_sentences("train")
    assert not any(sentence.edits[0] for sentence in clean)


def test_real_corrections_take_the_place_of_made_ones(root: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.src", "She go home .", "All is well .")
    write(tmp_path / "a.ref0", "She goes home .", "All is well .")
    write(tmp_path / "a.ref1", "She went home .", "All was well .")
    books = data(root, train=str(source), test=str(source))
    for epoch, expected in enumerate(["She goes home .", "She went home .", "She goes home ."]):
        *_, target = books.draw("train", epoch)  # several people take turns
        assert expected in [books.subwords.decode(row) for row in rows(target, IGNORED)]
    books.setup("test")
    batch = next(iter(books.test_dataloader()))
    assert sorted(batch[3].tolist()) == [0, 1]
    right = books.subwords.encode(["She went home .", "All is well ."])
    scores = books.score(dict(enumerate(right)))
    assert (scores["f05"], scores["corrected"]) == (1, 1)


@pytest.mark.parametrize("text", ["One two. Three four.", "a b c d " * 30, "", "x" * 500])
def test_long_lines_are_read_in_pieces(root: Path, text: str) -> None:
    books = data(root, text=[text, "End."])
    books.max_tokens = 10
    source, lengths, ids = books.read_predict()
    assert lengths.max() <= 11
    assert len(source) == len(ids) == len(books.pieces)
    assert books.pieces[-1].line == 1
    covered = [books.lines[p.line].words[p.start : p.end] for p in books.pieces if p.line == 0]
    assert [word for words in covered for word in words] == books.lines[0].words
    readable = [p.readable for p in books.pieces if p.line == 0]
    assert all(readable) == (text not in ("", "x" * 500))


def test_sentence_that_is_cut_has_no_target_and_is_scored_whole(root: Path, tmp_path: Path) -> None:
    long = " ".join(["go"] * 30)
    source = write(tmp_path / "a.src", long, "She go .")
    write(tmp_path / "a.trg", long + " .", "She goes .")
    books = data(root, test=str(source))
    books.max_tokens = 16
    _, _, _, ids, target = books.draw("test", 0)
    assert len(ids) > 2
    ends = (target != IGNORED).sum(1)
    assert (ends[:-1] == 0).all()
    assert ends[-1] > 0
    written = {i: books.subwords.encode(["go"])[0] for i in ids.tolist()}
    assert books.score(written)["precision"] < 1
    assert books.score({int(ids[-1]): books.subwords.encode(["She goes ."])[0]})["f05"] == 1


def test_a_run_reads_any_text_without_its_books(root: Path, tmp_path: Path) -> None:
    merges = data(root).state_dict()["merges"]
    elsewhere = data(tmp_path, merges=merges, text=["She go home ."])
    assert elsewhere.read_predict()[0].shape[0] == 1
    with pytest.raises(UserError, match="subwords are not those of the books"):
        data(root, vocab_size=300).load_state_dict({"merges": merges})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"vocab_size": 100}, "vocab_size must be at least 262"),
        ({"epoch_size": 0}, "epoch_size must be at least 1"),
    ],
)
def test_arguments_out_of_range(root: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        data(root, **options)


def test_text_that_is_not_utf_8(root: Path) -> None:
    with pytest.raises(UserError, match="the text is not UTF-8"):
        data(root, text=["caf\udce9"]).setup("predict")


def test_a_text_of_two_lines_is_two(root: Path) -> None:
    books = data(root, text=["one\ntwo", "three"])
    books.setup("predict")
    assert [line.text for line in books.lines] == ["one", "two", "three"]


def test_a_file_is_read_in_a_new_order_in_each_epoch(root: Path, tmp_path: Path) -> None:
    lines = [f"line {i} ." for i in range(40)]
    source = write(tmp_path / "a.src", *lines)
    write(tmp_path / "a.trg", *lines)
    books = data(root, train=str(source))
    books.setup("fit")
    loader = books.train_dataloader()
    epochs = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        epochs.append(
            [books.subwords.decode(row) for source, *_ in loader for row in source.tolist()]
        )
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(lines)
    together = [{frozenset(e[i : i + 8]) for i in range(0, 40, 8)} for e in epochs]
    assert not together[0] & together[1]


def test_what_is_too_long_counts_for_nothing(root: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.src", "word " * 60, "It is .")
    write(tmp_path / "a.trg", "word " * 60, "It is .")
    books = data(root, train=str(source), test=str(source))
    books.max_tokens = 20
    *_, target = books.draw("train", 0)
    assert sorted((target != IGNORED).sum(1).tolist())[0] == 0
    assert target.shape[1] <= 21


def test_trains_without_validation(root: Path) -> None:
    books = data(root, val_size=0)
    books.setup("fit")
    assert len(books.train_dataloader()) == 5


def test_nothing_to_correct(root: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    for options, said in (
        ({}, "nothing to correct: give --text LINE or --text_file"),
        ({"text_file": str(tmp_path / "empty.txt")}, r"nothing to correct: .*empty\.txt is empty"),
        ({"text_file": "none.txt"}, r"none\.txt cannot be read: No such file or directory"),
    ):
        with pytest.raises(UserError, match=said):
            data(root, **options).setup("predict")


def test_settings_that_are_gone_are_read_at_their_default() -> None:
    recorded = {
        "class_path": "datamodules.GrammarDataModule",
        "init_args": {"val_books": ["burgess-busterbrown", "carroll-alice"], "max_tokens": 80},
    }
    assert update(recorded)["init_args"] == {}
    recorded["init_args"] = {"max_tokens": 100}
    with pytest.raises(UserError, match=r"has no max_tokens .* 100; derive a class"):
        update(recorded)


# --- the loss -------------------------------------------------------------------------------------


def test_changed_tokens() -> None:
    source = torch.tensor([[5, 6, 7, END, PAD]])
    target = torch.tensor([[5, 6, 9, 7, END]])  # 9 comes in before 7
    target_in = torch.tensor([[BEGIN, 5, 6, 9, 7]])
    assert _changes(source, target_in, target).tolist() == [[False, False, True, True, False]]


class Fixed(nn.Module):
    """Says the same of every token."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, source: Tensor, target_in: Tensor, lengths: Tensor) -> Tensor:
        return self.logits.expand(*target_in.shape, -1)


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_tokens_that_change_count_more(weight: float) -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0))
    model = LitSeq2Seq(Fixed(logits), torch.optim.SGD, vocab_size=12, change_weight=weight)
    recorded: dict[str, Tensor] = {}
    model.record = lambda **values: recorded.update(values)  # type: ignore[method-assign]
    source = torch.tensor([[5, 6, 7, END], [5, END, PAD, PAD]])
    target_in = torch.tensor([[BEGIN, 5, 6, 9, 7], [BEGIN, 5, PAD, PAD, PAD]])
    target = torch.tensor([[5, 6, 9, 7, END], [5, END, *[IGNORED] * 3]])
    loss = model.training_step([source, torch.tensor([4, 2]), target_in, target], 0)
    each = -logits.log_softmax(0)
    plain = [each[5], each[6], each[END], each[5], each[END]]
    total = sum(plain) + weight * (each[9] + each[7])
    torch.testing.assert_close(loss, total / (5 + 2 * weight))
    torch.testing.assert_close(recorded["loss"], (sum(plain) + each[9] + each[7]) / 7)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"change_weight": 0.0}, "change_weight must be positive, got 0.0"),
        ({"change_penalty": -1.0}, "change_penalty must not be negative, got -1.0"),
    ],
)
def test_model_arguments_out_of_range(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        LitSeq2Seq(Fixed(torch.zeros(12)), torch.optim.SGD, vocab_size=12, **options)


# --- a run ----------------------------------------------------------------------------------------

SMALL = [
    "--model.network.embedding_dim=32", "--model.network.num_heads=4",
    "--model.network.num_encoder_layers=1", "--model.network.num_decoder_layers=1",
    "--model.network.hidden_size=64", "--model.network.dropout=0", "--data.vocab_size=400",
    "--data.epoch_size=640", "--data.val_size=20", "--data.batch_size=32",
    '--data.errors.weights={"doubled_word": 1000}', "--trainer.accelerator=cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with books and a run that has learned to take out doubled words."""
    home = tmp_path_factory.mktemp("home")
    write_books(home / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(GrammarDataModule, "test_size", 40)
        config = f"--config={CONFIGS / 'grammar.yaml'}"
        flags = ["--trainer.max_epochs=8", "--trainer.check_val_every_n_epoch=4", "--test=true"]
        train.main(["fit", config, *SMALL, "--run=x", *flags])
        end_wandb()
    return home


@pytest.fixture
def run(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    return Path("runs/grammar/x")


def test_learns_the_errors_it_is_shown(run: Path) -> None:
    last = next(row for row in reversed(table(run / "metrics.csv")) if row["test/f05"])
    assert float(last["test/f05"]) > 0.8
    assert float(last["test/left_alone"]) > 0.8
    assert float(last["test/gleu"]) > float(last["test/gleu_of_source"])
    examples = table(run / "corrections_test.csv")
    assert len(examples) == 40
    right = [row["output"] == row["reference"] for row in examples]
    assert sum(right) > 30
    assert table(run / "corrections.csv")[0].keys() == examples[0].keys()


def test_corrects_lines_of_any_kind(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        "My sister walked to the the house every day.",
        "",
        "The old man man walked to the house. My sister walked into the garden .",
        "\u65e5\u672c\u8a9e \U0001f600 \x01\x02",
        "x" * 10_000,
        "a \x0c b\u2028c",
    ]
    file = tmp_path / "lines.txt"
    file.write_bytes(("\n".join(lines) + "\n").encode())
    predict.main([str(run), "--text_file", str(file), "--accelerator=cpu"])
    corrected = (run / "predictions.txt").read_bytes().decode().split("\n")
    assert len(corrected) == len(lines) + 1
    assert corrected[0] == "My sister walked to the house every day."
    assert corrected[1] == ""
    assert corrected[4] == lines[4]
    printed = capsys.readouterr().out
    assert "to the [-the-] house" in printed or "to [-the-] the house" in printed


def test_a_speller_before_a_network_that_has_none(run: Path) -> None:
    lines = ["My sistr walked to the the house every day .", "the old man ."]
    found = jfleg.correctors(GrammarDataModule(), str(run))
    alone, together = found["network"](lines), found["network + speller"](lines)
    assert "sister" not in alone[0]
    assert together[0] == "My sister walked to the house every day ."
    assert found["rules + speller"](lines)[1] == "The old man ."


def test_json_and_several_corrections(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = ["My sister walked to the the house every day.", "- no: [1, 'x']"]
    arguments = ["--n_best=3", "--json", "--accelerator=cpu", f"--text={text[1]}"]
    predict.main([str(run), *arguments])
    (single,) = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert single["input"] == text[1]
    scores = [hypothesis["score"] for hypothesis in single["hypotheses"]]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    assert single["output"] == single["hypotheses"][0]["output"]


def test_reads_standard_input(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b"My sister walked to the the house every day.\n\n"))
    monkeypatch.setattr("sys.stdin", stdin)
    predict.main([str(run), "--text_file=-", "--json", "--accelerator=cpu"])
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["output"] == "My sister walked to the house every day."
    assert second["output"] == ""


def test_tests_on_another_corpus_without_the_books(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    doubled, right = (
        f"My sister walked to {words} house every day ." for words in ("the the", "the")
    )
    source = write(tmp_path / "a.src", doubled, "word " * 60, "It is .")
    write(tmp_path / "a.ref0", right, "word " * 60, "It is .")
    monkeypatch.setattr(GrammarDataModule, "max_tokens", 20)
    # the last batch holds nothing but pieces of the long line, which have no target
    flags = ["--data.data_dir=nowhere", f"--data.test={source}", "--data.eval_batch_size=1"]
    train.main(["test", f"--run={run}", *flags, "--trainer.accelerator=cpu"])
    first, *others = table(run / "corrections_test.csv")
    assert first["output"] == first["reference"] == right
    assert len(others) == 2


def test_two_runs_have_no_average(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        predict.main([str(run), str(run), "--text=a", "--output=x.txt"])
    assert "what these runs write has no average" in capsys.readouterr().err


def test_mistakes_of_the_user(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        predict.main([str(run), "--text=a", "--n_best=0", "--accelerator=cpu"])
    assert "n_best must be at least 1, got 0" in capsys.readouterr().err


def by_processes(count: int, script: Any, *args: str) -> None:
    """Run a script in one process, which is this one, or in several."""
    devices = ["--accelerator=cpu", f"--devices={count}"]
    if script is train:
        devices = [f"--trainer.{flag[2:]}" for flag in devices]
    if count == 1:
        script.main([*args, *devices])
        end_wandb()
        return
    if script is train:
        devices.append("--trainer.strategy=ddp")
    assert by_two(script.__name__, [*args, *devices], Path()) == 0


@pytest.mark.slow
def test_two_processes_score_and_correct_as_one(run: Path, tmp_path: Path) -> None:
    found = []
    for count in (1, 2):
        by_processes(count, train, "test", f"--run={run}", "--data.eval_batch_size=7")
        last = next(row for row in reversed(table(run / "metrics.csv")) if row["test/f05"])
        scores = {key: float(value) for key, value in last.items() if "test/" in key and value}
        lines = tmp_path / "lines.txt"
        lines.write_text("My sister walked to the the house.\n\nIt is is late. The the end.\n" * 9)
        output = tmp_path / f"{count}.txt"
        flags = [f"--text_file={lines}", f"--output={output}", "--data.eval_batch_size=4"]
        by_processes(count, predict, str(run), *flags)
        found.append((scores, output.read_bytes()))
    (one, text), (two, same) = found
    assert two == pytest.approx(one, abs=1e-6)
    assert same == text
    assert len(text.splitlines()) == 27


def test_loss_of_the_first_step_is_that_of_a_guess(root: Path) -> None:
    books = data(root)
    books.setup("fit")
    torch.manual_seed(0)
    network = Transformer(400, 32, 4, 1, 1, 64, copy=True)
    source, lengths, target_in, target = next(iter(books.train_dataloader()))
    logits = network(source, target_in, lengths)
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORED)
    # half is copied: from some thirty tokens, one of them right
    assert 3 < loss < 7
