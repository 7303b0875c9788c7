"""M2 files: sentences with the edits of one or more annotators (Dahlmeier and Ng, NAACL 2012).

    S This are a sentence .
    A 1 2|||R:VERB:SVA|||is|||REQUIRED|||-NONE-|||0

A sentence ends at an empty line. ``A -1 -1|||noop|||...`` says that the annotator changes nothing.
"""

from dataclasses import dataclass
from pathlib import Path

from core.errors import UserError
from core.files import read_lines
from metrics.edits import Edit

_NOTHING = "-NONE-"


@dataclass
class M2Sentence:
    """A sentence, tokens between spaces, and the edits of its annotators by their number."""

    source: str
    edits: dict[int, list[Edit]]


def read_m2(path: str | Path) -> list[M2Sentence]:
    """Read an M2 file.

    The annotators of a sentence are those it names: one who changes nothing has a noop line, and a
    sentence without any line was left as it is by annotator 0.

    Raises:
        UserError: The file cannot be read, or a line of it is no M2; the message has its number.
    """
    sentences: list[M2Sentence] = []
    inside = False
    for number, line in enumerate(read_lines(str(path)), start=1):
        line = line.rstrip("\r")
        try:
            if line == "S" or line.startswith("S "):
                sentences.append(M2Sentence(" ".join(line[1:].split()), {}))
                inside = True
            elif line.startswith("A "):
                if not inside:
                    raise ValueError("an edit before the S line of its sentence")
                _add_edit(sentences[-1], line)
            elif line.strip():
                raise ValueError(f"a line begins with 'S ' or 'A ', got {line[:40]!r}")
            else:
                inside = False
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}.") from error
    for sentence in sentences:
        sentence.edits = sentence.edits or {0: []}
    return sentences


def _add_edit(sentence: M2Sentence, line: str) -> None:
    fields = line[2:].split("|||")
    if len(fields) != 6:
        raise ValueError(f"an edit has six fields with ||| between them, got {len(fields)}")
    span, kind, corrections, _, _, annotator = fields
    numbers = [*span.split(), annotator]
    try:
        start, end, person = (int(number) for number in numbers)
    except ValueError:
        raise ValueError(
            "an edit begins with two integers, the first token and the one after the last, and "
            f"ends with the annotator's number, got {span!r} and {annotator!r}"
        ) from None
    edits = sentence.edits.setdefault(person, [])
    if kind == "noop" or (start, end) == (-1, -1):
        return
    length = len(sentence.source.split())
    if not 0 <= start <= end <= length:
        raise ValueError(f"an edit of tokens {start} to {end}, but the sentence has {length}")
    first, *others = (
        "" if words == _NOTHING else " ".join(words.split()) for words in corrections.split("||")
    )
    edits.append(Edit(start, end, first, tuple(others), kind))
