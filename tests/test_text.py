"""Words, sentences and subwords of any text, and the files they come from."""

from pathlib import Path

import pytest
from fake_data import write_books
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import UserError
from core.files import read_lines
from datamodules.text.corpora import read_books, read_corpus
from datamodules.text.subwords import (
    BEGIN,
    END,
    MASK,
    MIN_VOCAB_SIZE,
    PAD,
    Subwords,
    padded,
    sentences,
    words,
)
from metrics.edits import apply_edits

LINES = ["the cat sat on the mat .", "the dog sat on the cat .", "He didn't see the cats ."]


def split(text: str) -> list[str]:
    return [text[start:end] for start, end in words(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("She goes to school.", "She goes to school ."),
        (
            "Mr. Smith didn't; I'd say \u201cno\u201d!",
            "Mr. Smith did n't ; I 'd say \u201c no \u201d !",
        ),
        ("It's 3.50 o'clock, e.g. to-morrow...", "It 's 3.50 o'clock , e.g. to-morrow ..."),
        ("they 're n't here --now", "they 're n't here -- now"),
        ("a\x00b\u3000\u65e5\u672c\u8a9e", "a \x00 b \u65e5\u672c\u8a9e"),
        ("", ""),
    ],
)
def test_words(text: str, expected: str) -> None:
    assert split(text) == expected.split(" ") if expected else split(text) == []


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_words_hold_all_but_the_blanks(text: str) -> None:
    assert "".join(split(text)) == "".join(text.split())
    assert all(not any(c.isspace() for c in word) for word in split(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two? \u2014 no! (Three.) Four", ["One.", "Two? \u2014 no!", "(Three.)", "Four"]),
        ('He said "Go." Then Mr. J. Smith went.', ['He said "Go."', "Then Mr. J. Smith went."]),
        ("no full stop", ["no full stop"]),
        ("", [""]),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert [text[start:end] for start, end in sentences(text)] == expected


# Subwords


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_nothing_is_unknown(text: str) -> None:
    line = " ".join(text.split())
    (tokens,) = SUBWORDS.encode([line])
    assert all(MASK < token < len(SUBWORDS) for token in tokens)
    assert SUBWORDS.decode(tokens) == line


SUBWORDS = Subwords.train(LINES * 3, MIN_VOCAB_SIZE + 20)


def test_frequent_words_are_one_subword() -> None:
    assert len(SUBWORDS) == MIN_VOCAB_SIZE + 20
    assert [len(tokens) for tokens in SUBWORDS.encode(["the", "cat", "zzz"])] == [1, 1, 4]


def test_merges_are_all_there_is_to_know() -> None:
    again = Subwords(SUBWORDS.merges)
    assert again.encode(LINES) == SUBWORDS.encode(LINES)
    assert len(Subwords("")) == MIN_VOCAB_SIZE


def test_nobody_can_type_a_sign() -> None:
    for text in (" end", "<end>", "end", " mask"):
        (tokens,) = SUBWORDS.encode([text])
        assert not {PAD, BEGIN, END, MASK} & set(tokens)


def test_what_follows_the_end_is_not_read() -> None:
    (tokens,) = SUBWORDS.encode(["the cat"])
    assert SUBWORDS.decode([BEGIN, *tokens, END, *tokens]) == "the cat"


def test_half_a_character_is_no_error() -> None:
    (tokens,) = SUBWORDS.encode(["\u65e5"])
    assert "\ufffd" in SUBWORDS.decode(tokens[:2])


def test_damaged_merges() -> None:
    with pytest.raises(UserError, match="no byte-pair encoding"):
        Subwords("nowhere seen")


def test_padded() -> None:
    assert padded([[1, 2], [], [3]]).tolist() == [[1, 2], [0, 0], [3, 0]]
    assert padded([]).shape == (0, 0)


# Books


def test_sentences_of_books(tmp_path: Path) -> None:
    folder = tmp_path / "gutenberg"
    folder.mkdir()
    text = (
        "[A Book by Nobody]\n\nCHAPTER I\n\n"
        "Mr. _Brown_ went\nhome.  It was late, and he didn't sing.\n\n"
        "Yes.\n\nno capital here, my friend.\n\nTHE END OF THE STORY.\n"
    )
    (folder / "one.txt").write_text(text, encoding="latin-1")
    assert read_books(folder, ["one"]) == [
        ("one.txt:5:1", "Mr. Brown went home ."),
        ("one.txt:6:2", "It was late , and he did n't sing ."),
    ]


def test_books_that_are_missing_or_hold_nothing(tmp_path: Path) -> None:
    folder = write_books(tmp_path, sentences=5)
    with pytest.raises(UserError, match=r"none\.txt cannot be read: .*--data\.data_dir"):
        read_books(folder, ["austen-emma", "none"])
    (folder / "empty.txt").write_text("")
    with pytest.raises(UserError, match="holds no sentence of 4 to 40 words"):
        read_books(folder, ["empty"])


# Corpora of corrections


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def jfleg(tmp_path: Path) -> Path:
    """A folder like JFLEG's."""
    folder = tmp_path / "dev"
    write(folder / "dev.src", "She go home . ", "")
    write(folder / "dev.spellchecked.src", "She go home . ", "")
    write(folder / "dev.ref0", "She goes home . ", "")
    write(folder / "dev.ref1", "She went  home . ", "")
    return folder


def test_folder_of_several_people(jfleg: Path) -> None:
    first, second = read_corpus(jfleg)
    assert first.source == "She go home ."
    assert [apply_edits(first.source, edits) for edits in first.edits.values()] == [
        "She goes home .",
        "She went home .",
    ]
    assert (second.source, second.edits) == ("", {0: [], 1: []})


def test_parallel_files_and_m2(tmp_path: Path) -> None:
    source = write(tmp_path / "a.src", "She go home .")
    write(tmp_path / "a.trg", "She goes home .")
    m2 = write(tmp_path / "a.m2", "S She go home .", "A 1 2|||V|||goes|||REQUIRED|||-NONE-|||0")
    assert read_corpus(source) == read_corpus(m2)


def test_corpora_that_do_not_fit(jfleg: Path, tmp_path: Path) -> None:
    write(jfleg / "dev.ref1", "She goes home .")
    with pytest.raises(UserError, match=r"dev\.src has 2 lines and .*dev\.ref1 has 1; line i of"):
        read_corpus(jfleg)
    for name in ("dev.ref0", "dev.ref1"):
        (jfleg / name).unlink()
    with pytest.raises(UserError, match=r"dev\.src has no corrections beside it; .*dev\.trg"):
        read_corpus(jfleg)
    with pytest.raises(UserError, match=r"must hold one file NAME\.src, found 0"):
        read_corpus(tmp_path)
    with pytest.raises(UserError, match=r"is no \.m2 file, no \.src file, and no folder"):
        read_corpus(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"a\.m2, line 2: an edit has six fields"):
        read_corpus(write(tmp_path / "a.m2", "S She go home .", "A 1 2|||V|||goes"))


def test_damaged_or_empty_corpora(tmp_path: Path) -> None:
    edit = "A 1 3|||V|||goes|||REQUIRED|||-NONE-|||0"
    overlapping = write(tmp_path / "a.m2", "S a b c", edit, edit.replace("1 3", "2 3"))
    with pytest.raises(UserError, match=r"a\.m2, sentence 1: the edit of tokens 2 to 3 overlaps"):
        read_corpus(overlapping)
    with pytest.raises(UserError, match=r"b\.m2 holds no sentence"):
        read_corpus(write(tmp_path / "b.m2"))
    with pytest.raises(UserError, match=r"none\.src cannot be read: No such file"):
        read_corpus(tmp_path / "none.src")


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("one\x0ctwo\u2028three\r\n\nfour".encode())
    assert read_lines(str(path)) == ["one\x0ctwo\u2028three\r", "", "four"]
    path.write_bytes(b"one\n\xff\n")
    with pytest.raises(UserError, match=r"a\.txt, line 2: not UTF-8"):
        read_lines(str(path))
    with pytest.raises(UserError, match=r"none\.txt cannot be read: No such file"):
        read_lines(str(tmp_path / "none.txt"))
