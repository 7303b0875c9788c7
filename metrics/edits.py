"""Edits that turn a sentence into its correction, and their precision, recall and F0.5.

Dimensions: N source tokens, M tokens of the correction.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

CHANGE = 10_000  # cost of an inserted, deleted or replaced token; room for ties below it
_REPLACEMENT = CHANGE + 1  # of two shortest alignments the one that keeps more tokens


@dataclass(frozen=True, order=True)
class Edit:
    """The source tokens ``start`` to ``end`` (without it) become ``correction``.

    ``start == end`` is an insertion before that token, an empty correction a deletion. Two edits
    are equal when they do the same, whatever their ``kind``.

    Args:
        start: Index of a source token, from 0.
        end: Index after the last source token.
        correction: Tokens between spaces.
        others: Corrections that would do as well; only people give any.
        kind: Type of the error.
    """

    start: int
    end: int
    correction: str
    others: tuple[str, ...] = field(default=(), compare=False)
    kind: str = field(default="UNK", compare=False)


@dataclass(frozen=True)
class EditScore:
    """Edits that were proposed and are right, were proposed, and should have been proposed."""

    correct: int = 0
    proposed: int = 0
    gold: int = 0

    def __add__(self, other: "EditScore") -> "EditScore":
        return EditScore(
            self.correct + other.correct, self.proposed + other.proposed, self.gold + other.gold
        )

    @property
    def precision(self) -> float:
        """Fraction of the proposed edits that are right; 1 if none was proposed."""
        return self.correct / self.proposed if self.proposed else 1.0

    @property
    def recall(self) -> float:
        """Fraction of the gold edits that were proposed; 1 if there are none."""
        return self.correct / self.gold if self.gold else 1.0

    def f(self, beta: float = 0.5) -> float:
        """F-measure; with 0.5 precision weighs twice as much as recall. 1 without any edit."""
        weighted = self.proposed + beta**2 * self.gold
        return (1 + beta**2) * self.correct / weighted if weighted else 1.0


def extract_edits(source: str, correction: str) -> list[Edit]:
    """Edits of a shortest alignment of tokens; changes that touch are one edit.

    Of the alignments with the fewest inserted, deleted and replaced tokens it is one that keeps the
    most tokens, and of several equal tokens it keeps the first.
    """
    old, new = source.split(), correction.split()
    costs = costs_to_end(old, new)
    edits: list[Edit] = []
    i = j = start = new_start = 0  # the change under way began at source[start], new[new_start]
    while i < len(old) or j < len(new):
        if i < len(old) and j < len(new) and old[i] == new[j]:
            edits += _change(start, i, new[new_start:j])
            i, j = i + 1, j + 1
            start, new_start = i, j
        else:
            steps = [(1, 1, _REPLACEMENT), (1, 0, CHANGE), (0, 1, CHANGE)]
            i, j = next(
                (i + a, j + b)
                for a, b, cost in steps
                if i + a <= len(old)
                and j + b <= len(new)
                and costs[i][j] == cost + costs[i + a][j + b]
            )
    return edits + _change(start, i, new[new_start:j])


def _change(start: int, end: int, tokens: list[str]) -> list[Edit]:
    return [Edit(start, end, " ".join(tokens))] if end > start or tokens else []


def costs_to_end(
    old: list[str], new: list[str], replacement: int = _REPLACEMENT
) -> list[list[int]]:
    """Least cost of turning ``old[i:]`` into ``new[j:]``, (N + 1, M + 1)."""
    costs = [[0] * (len(new) + 1) for _ in range(len(old) + 1)]
    costs[-1] = [CHANGE * (len(new) - j) for j in range(len(new) + 1)]
    for i in reversed(range(len(old))):
        row, below = costs[i], costs[i + 1]
        row[-1] = below[-1] + CHANGE
        for j in reversed(range(len(new))):
            if old[i] == new[j]:
                row[j] = below[j + 1]
            else:
                row[j] = min(below[j + 1] + replacement, below[j] + CHANGE, row[j + 1] + CHANGE)
    return costs


def apply_edits(source: str, edits: Sequence[Edit]) -> str:
    """Apply the edits of a sentence; insertions at the same place keep their order.

    Raises:
        ValueError: Two edits overlap, or one reaches beyond the sentence.
    """
    tokens = source.split()
    corrected: list[str] = []
    done = 0
    for edit in sorted(edits, key=lambda edit: (edit.start, edit.end)):
        if not done <= edit.start <= edit.end <= len(tokens):
            raise ValueError(
                f"the edit of tokens {edit.start} to {edit.end} overlaps another one or reaches "
                f"beyond the {len(tokens)} tokens of its sentence."
            )
        corrected += tokens[done : edit.start] + edit.correction.split()
        done = edit.end
    return " ".join(corrected + tokens[done:])


def best_sum(scores: Iterable[Sequence[EditScore]]) -> EditScore:
    """Sum over sentences, of each the score with the annotator with whom F0.5 so far is best.

    So do the scorers of CoNLL-2014 and BEA-2019 where several people annotated a sentence.
    """
    total = EditScore()
    for annotators in scores:
        sums = [total + score for score in annotators]
        # before the first right edit all F0.5 are 0: then the fewest wrong and missed edits
        total = max(sums, key=lambda s: (s.f(), s.correct, -s.proposed - s.gold / 4))
    return total


def compare(edits: Sequence[Edit], gold: Sequence[Edit]) -> EditScore:
    """Count against one annotator; an edit is right once at most."""
    left = Counter((edit.start, edit.end, edit.correction) for edit in edits)
    found = 0
    for edit in gold:
        ways = [(edit.start, edit.end, words) for words in (edit.correction, *edit.others)]
        if way := next((way for way in ways if left[way]), None):
            left[way] -= 1
            found += 1
    return EditScore(found, len(edits), len(gold))
