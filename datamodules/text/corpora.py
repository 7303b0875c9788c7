"""Sentences to learn correction from: books, M2 files, parallel files and folders like JFLEG."""

from collections.abc import Sequence
from pathlib import Path

from core.errors import UserError
from core.files import read_lines
from datamodules.text.subwords import sentences, words
from metrics.edits import apply_edits, extract_edits
from metrics.m2 import M2Sentence, read_m2

_MAX_WORDS = 40  # of a sentence from a book
_MIN_WORDS = 4


def read_books(folder: Path, names: Sequence[str]) -> list[tuple[str, str]]:
    """Read sentences of books (Latin-1 text, empty lines between paragraphs), words between blanks.

    In front of each is where it begins: ``NAME.txt:LINE:WORD``, both counted from 1. What is no
    sentence of 4 to 40 words, from a capital to a full stop, is left out: headings, verse, tables
    of contents.

    Raises:
        UserError: A book is missing, or none holds a sentence.
    """
    kept = []
    for name in names:
        path = folder / f"{name}.txt"
        try:
            text = path.read_text(encoding="latin-1")
        except OSError as error:
            raise UserError(
                f"{path} cannot be read: {error.strerror}; unpack the books of NLTK's Gutenberg "
                "selection there, or name their folder with --data.data_dir."
            ) from None
        row = 1
        for paragraph in text.replace("_", "").split("\n\n"):
            lines = [line.split() for line in paragraph.split("\n")]
            places = [(row + i, j + 1) for i, line in enumerate(lines) for j in range(len(line))]
            row += len(lines) + 1
            paragraph = " ".join(paragraph.split())
            for start, end in sentences(paragraph):
                sentence = paragraph[start:end]
                line = " ".join(sentence[a:b] for a, b in words(sentence))
                if _is_sentence(line):
                    number, word = places[paragraph.count(" ", 0, start)]
                    kept.append((f"{path.name}:{number}:{word}", line))
    if not kept:
        raise UserError(f"{folder} holds no sentence of {_MIN_WORDS} to {_MAX_WORDS} words.")
    return kept


def _is_sentence(line: str) -> bool:
    tokens = line.split()
    letters = [c for c in line if c.isalpha()]
    first, last = line.lstrip("\"'( ")[:1], line.rstrip("\"') ")[-1:]
    return (
        _MIN_WORDS <= len(tokens) <= _MAX_WORDS
        and first.isupper()
        and last in (".", "!", "?")
        and sum(c.isupper() for c in letters) < len(letters) / 4
    )


def read_corpus(path: Path) -> list[M2Sentence]:
    """Read sentences with the corrections of one or more people.

    Args:
        path: An M2 file; or a file ``NAME.src`` with its corrections beside it, ``NAME.trg`` or
            ``NAME.ref0``, ``NAME.ref1``, ..., a sentence a line; or a folder with one such file.

    Raises:
        UserError: The path is none of these, the numbers of lines differ, or a line is damaged.
    """
    if path.is_dir():
        sources = [file for file in path.glob("*.src") if "." not in file.stem]
        if len(sources) != 1:
            raise UserError(f"{path} must hold one file NAME.src, found {len(sources)}.")
        (path,) = sources
    examples = read_m2(path) if path.suffix == ".m2" else _read_parallel(path)
    if not examples:
        raise UserError(f"{path} holds no sentence.")
    for number, example in enumerate(examples, start=1):
        for edits in example.edits.values():
            try:
                apply_edits(example.source, edits)
            except ValueError as error:
                raise UserError(f"{path}, sentence {number}: {error}") from error
    return examples


def _read_parallel(path: Path) -> list[M2Sentence]:
    """Read the sentences of ``NAME.src`` with the corrections beside it."""
    if path.suffix != ".src":
        raise UserError(f"{path} is no .m2 file, no .src file, and no folder with one.")
    source = token_lines(path)
    numbered = sorted(path.parent.glob(f"{path.stem}.ref[0-9]*"))
    references = [p for p in (path.with_suffix(".trg"), *numbered) if p.is_file()]
    if not references:
        raise UserError(
            f"{path} has no corrections beside it; write them to {path.with_suffix('.trg')}, or "
            f"those of several people to {path.with_suffix('.ref0')} and so on, a sentence a line."
        )
    corrected = [token_lines(reference) for reference in references]
    for reference, lines in zip(references, corrected, strict=True):
        if len(lines) != len(source):
            raise UserError(
                f"{path} has {len(source)} lines and {reference} has {len(lines)}; line i of both "
                "must be the same sentence."
            )
    return [
        M2Sentence(line, {k: extract_edits(line, way) for k, way in enumerate(ways)})
        for line, *ways in zip(source, *corrected, strict=True)
    ]


def token_lines(path: Path) -> list[str]:
    """Read the lines of a text file, words between single blanks."""
    return [" ".join(line.split()) for line in read_lines(str(path))]
