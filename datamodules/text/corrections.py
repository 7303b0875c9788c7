"""Corrected lines: put together from what a network wrote, shown with their changes, and stored."""

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from rich.console import Console
from rich.text import Text

from core.files import atomic_write
from core.submission import Submission
from datamodules.text.subwords import Span, Subwords, sentences, words
from metrics.edits import Edit, extract_edits

_GLUED = re.compile(r"[.,;:!?)\]}]+|\.\.\.|n't|'\w*", re.IGNORECASE)  # no blank in front of these
_ADDRESS = re.compile(r"\S*(?:[@/\\_#]|\w\.\w)\S*")
_STYLES = {"kept": "", "removed": "red strike", "added": "bold green"}
_MARKS = {"kept": "{}", "removed": "[-{}-]", "added": "{{+{}+}}"}  # those of wdiff


class Piece(NamedTuple):
    """The words ``start`` to ``end`` of a line; one that is not readable stays as it is."""

    line: int
    start: int
    end: int
    readable: bool = True


class _Segment(NamedTuple):
    kind: Literal["kept", "removed", "added"]
    text: str


@dataclass(frozen=True)
class Line:
    """A line of text, its words, and the words with which its sentences begin.

    What a correction leaves alone stays as it was written, blanks and all.
    """

    text: str
    spans: tuple[Span, ...]
    beginnings: tuple[int, ...] = (0,)

    @classmethod
    def of_text(cls, text: str) -> "Line":
        """A line as people write it."""
        spans: list[Span] = []
        beginnings = []
        for start, end in sentences(text):
            beginnings.append(len(spans))
            spans += [Span(start + a, start + b) for a, b in words(text[start:end])]
        return cls(text, tuple(spans), tuple(beginnings))

    @classmethod
    def of_words(cls, text: str) -> "Line":
        """One sentence whose words stand between blanks already."""
        return cls(text, tuple(Span(*match.span()) for match in re.finditer(r"\S+", text)))

    @property
    def words(self) -> list[str]:
        return [self.text[start:end] for start, end in self.spans]

    @property
    def addresses(self) -> set[int]:
        """Indices of the words that are part of an address or the like, ``x@y.org``."""
        inside = {i for match in _ADDRESS.finditer(self.text) for i in range(*match.span())}
        return {number for number, span in enumerate(self.spans) if span.start in inside}

    @property
    def apart(self) -> bool:
        """True if there is a blank in front of punctuation, too."""
        return any(
            a.end < b.start and word != "'" and _GLUED.fullmatch(word) is not None
            for a, b, word in zip(self.spans, self.spans[1:], self.words[1:], strict=False)
        )

    def segments(self, edits: Sequence[Edit]) -> Iterator[_Segment]:
        """Cut the line into what stays, goes and comes with edits of the words."""
        done = 0
        for edit in edits:
            new = _joined(edit.correction.split(), self.apart)
            if edit.start < edit.end:
                start, end = self.spans[edit.start].start, self.spans[edit.end - 1].end
                if not new:  # with a word goes the blank on one side of it
                    touching = self.text[start - 1 : start].isalnum() and self.text[end : end + 1]
                    new = " " if touching and touching.isalnum() else ""
                    start, end = self.with_blank(start, end)
            else:
                start = self.spans[edit.start - 1].end if edit.start else len(self.blank)
                end = start
                glued = not self.apart and _GLUED.fullmatch(edit.correction.split()[0])
                touched = self.spans[edit.start : edit.start + 1]  # the next word, if any
                if not edit.start or (touched and touched[0].start == start and not glued):
                    new = f"{new} " if touched else new
                elif not glued:
                    new = f" {new}"
            yield _Segment("kept", self.text[done:start])
            yield _Segment("removed", self.text[start:end])
            yield _Segment("added", new)
            done = end
        yield _Segment("kept", self.text[done:])

    @property
    def blank(self) -> str:
        """Blanks in front of the first word."""
        return self.text[: len(self.text) - len(self.text.lstrip())]

    def with_blank(self, start: int, end: int) -> Span:
        """Span with the blanks before it, or at the start of the line with those after it."""
        before, after = self.text[:start].rstrip(), self.text[end:].lstrip()
        return Span(len(before), end) if before else Span(start, len(self.text) - len(after))

    def corrected(self, edits: Sequence[Edit]) -> str:
        return "".join(s.text for s in self.segments(edits) if s.kind != "removed")


def _joined(tokens: list[str], apart: bool) -> str:
    """Words between blanks, or as they are printed."""
    blanks = ["" if not apart and _GLUED.fullmatch(token) else " " for token in tokens]
    return "".join(blank + token for blank, token in zip(blanks, tokens, strict=True)).lstrip()


@dataclass(frozen=True)
class CorrectedText(Submission):
    """Corrected lines for people: a file of as many lines as were read, in their order.

    Args:
        subwords: What the tokens mean.
        lines: The lines as they were read.
        pieces: What the ids stand for, 0, 1, ...
        as_json: Print a JSON object for each line instead of marking the changes.
    """

    filename: ClassVar[str] = "predictions.txt"
    sendable: ClassVar[bool] = False

    labels: tuple[str, ...] = ()
    subwords: Subwords | None = None
    lines: tuple[Line, ...] = ()
    pieces: tuple[Piece, ...] = ()
    as_json: bool = False

    def check(self, *outputs: np.ndarray) -> None:
        """Tokens are any: every line can be written."""

    def write_predictions(  # type: ignore[override]
        self, path: Path, ids: np.ndarray, tokens: np.ndarray, scores: np.ndarray
    ) -> None:
        """Write the best hypothesis of each line, and print what it changes.

        Args:
            path: The file.
            ids: Pieces (N,), ascending.
            tokens: What was written for each of them (N, n_best, T), the best first.
            scores: (N, n_best); -inf where there was no further hypothesis.
        """
        ranks = range(tokens.shape[1])
        edits = [self.edits(ids, tokens[:, rank]) for rank in ranks]
        sums = [self.sums(ids, scores[:, rank]) for rank in ranks]
        write_lines(path, self.lines, edits[0])
        console = Console(highlight=False, soft_wrap=True)
        for number, line in enumerate(self.lines):
            # the n best of each sentence; where these are few, lines come out alike
            found = {
                line.corrected(of_lines[number]): (of_lines[number], float(score[number]))
                for of_lines, score in reversed(list(zip(edits, sums, strict=True)))
                if np.isfinite(score[number])
            }
            best = sorted(found.values(), key=itemgetter(1), reverse=True)
            if self.as_json:
                sys.stdout.write(json.dumps(as_object(line, best), ensure_ascii=False) + "\n")
                continue
            for those, score in best:
                text = Text(f"{score:8.3f}  " if len(ranks) > 1 else "")
                text.append_text(marked(line, those, console.is_terminal))
                console.print(text)

    def answers(self, ids: np.ndarray, *outputs: np.ndarray) -> tuple[list[str], np.ndarray]:
        """Lines, each as its best hypothesis has it, and their scores (N,)."""
        tokens, scores = outputs
        edits = self.edits(ids, tokens[:, 0])
        corrected = [line.corrected(those) for line, those in zip(self.lines, edits, strict=True)]
        return corrected, self.sums(ids, scores[:, 0])

    def edits(self, ids: np.ndarray, tokens: np.ndarray) -> list[list[Edit]]:
        """Edits of each line, from what was written for its pieces."""
        assert self.subwords is not None
        decoded = [self.subwords.decode(row) for row in tokens.tolist()]
        return edits_of(self.lines, self.pieces, dict(zip(ids.tolist(), decoded, strict=True)))

    def sums(self, ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Score of each line, the sum of those of its pieces that were read."""
        pieces = [self.pieces[i] for i in ids.tolist()]
        counted = np.where([piece.readable for piece in pieces], scores, 0.0)
        owners = [piece.line for piece in pieces]
        return np.bincount(owners, weights=counted, minlength=len(self.lines))

    def count(self, ids: np.ndarray) -> int:
        return len(self.lines)


def edits_of(
    lines: Sequence[Line], pieces: Sequence[Piece], written: Mapping[int, str]
) -> list[list[Edit]]:
    """Edits of each line's words, after its pieces have become what was written.

    A piece for which nothing was written stays as it is: a correction never takes all away.
    """
    edits: list[list[Edit]] = [[] for _ in lines]
    for number, (line, start, end, readable) in enumerate(pieces):
        if readable and (new := written.get(number, "")):
            old = " ".join(lines[line].words[start:end])
            edits[line] += [
                replace(edit, start=start + edit.start, end=start + edit.end)
                for edit in extract_edits(old, new)
            ]
    return edits


def word_edits(old: Sequence[str], new: Sequence[str]) -> list[Edit]:
    """Edits where each word has become one that stands in its place."""
    pairs = enumerate(zip(old, new, strict=True))
    return [Edit(i, i + 1, after) for i, (before, after) in pairs if before != after]


def write_lines(path: Path, lines: Sequence[Line], edits: Sequence[Sequence[Edit]]) -> None:
    with atomic_write(path, "w", encoding="utf-8", newline="") as file:
        for line, those in zip(lines, edits, strict=True):
            file.write(line.corrected(those) + "\n")


def marked(line: Line, edits: Sequence[Edit], styled: bool) -> Text:
    """Mark the changes of a line in colour, or as wdiff does."""
    text = Text()
    for kind, part in line.segments(edits):
        blank = part[: len(part) - len(part.lstrip())]
        text.append(blank)
        if part := part[len(blank) :]:
            text.append(*((part, _STYLES[kind]) if styled else (_MARKS[kind].format(part), "")))
    return text


def as_object(line: Line, found: Sequence[tuple[Sequence[Edit], float]]) -> dict[str, Any]:
    """Describe a line with its hypotheses, the best first, and the edits of the best."""
    hypotheses = [
        {"output": line.corrected(edits), "score": round(score, 4)} for edits, score in found
    ]
    return corrected_object(line, found[0][0]) | {"hypotheses": hypotheses}


def corrected_object(line: Line, edits: Sequence[Edit]) -> dict[str, Any]:
    """Describe a line, what edits make of it, and the edits."""
    words = line.words
    return {
        "input": line.text,
        "output": line.corrected(edits),
        "edits": [
            {
                "start": edit.start,
                "end": edit.end,
                "source": " ".join(words[edit.start : edit.end]),
                "correction": edit.correction,
            }
            for edit in edits
        ],
    }
