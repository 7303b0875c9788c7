"""MaxMatch (M2): a correction is cut into the edits that agree best with those of an annotator.

Dahlmeier and Ng, "Better Evaluation for Grammatical Error Correction" (NAACL 2012). The same
correction can be told as one edit or as several, and people and programs tell it differently. Here
every way of telling it counts that lies on a shortest alignment, so that no edit is called wrong
for its borders.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from operator import itemgetter

from core.errors import UserError
from metrics.edits import CHANGE, Edit, EditScore, best_sum, compare, costs_to_end
from metrics.m2 import M2Sentence

MAX_UNCHANGED = 2  # words that an edit may leave as they are, the default of the authors' program

# What a way to the end is worth: first its gold edits, then few steps and few edits beside them.
# One number tells it all, for it is compared at every node; there is room for 100,000 steps.
UNCHANGED = -1  # a token inside an edit: of equal ways the one with the tightest edits
EDIT = 10**5 * UNCHANGED
STEP = 10**5 * EDIT
MATCH = -(10**5) * STEP

Node = tuple[int, int]  # source tokens and tokens of the correction that lie behind
Lattice = dict[Node, list[tuple[Node, bool]]]  # where to go from there, and if it changes anything
Spans = tuple[Node, Node, "Spans"] | None  # begin and end of an edit, and the edits after it
Rest = tuple[int, Node, Spans]  # best way to the end: worth, end of the edit under way, edits after
by_worth = itemgetter(0)


def m2_score(corrections: Sequence[str], gold: Sequence[M2Sentence]) -> EditScore:
    """Precision, recall and F0.5 of corrected sentences, as the M2 scorer has them.

    Args:
        corrections: A line for each sentence, tokens between spaces.
        gold: The sentences with the edits of their annotators; where there are several, the one
            counts with whom F0.5 of the corpus so far is best.

    Raises:
        UserError: There is not one correction for each sentence.
    """
    return best_sum(m2_scores(corrections, gold))


def m2_scores(corrections: Sequence[str], gold: Sequence[M2Sentence]) -> list[list[EditScore]]:
    """For each sentence its score with each annotator; ``best_sum`` of them is ``m2_score``.

    Raises:
        UserError: There is not one correction for each sentence.
    """
    if len(corrections) != len(gold):
        raise UserError(
            f"There are {len(corrections)} corrections for the {len(gold)} sentences of the gold "
            "edits; line i must be the correction of sentence i."
        )
    scores = []
    for correction, sentence in zip(corrections, gold, strict=True):
        old, new = sentence.source.split(), correction.split()
        lattice = shortest_ways(old, new)
        people = sentence.edits.values()
        scores.append([compare(best_edits(old, new, lattice, edits), edits) for edits in people])
    return scores


def agreeing_edits(source: str, correction: str, gold: Sequence[Edit]) -> list[Edit]:
    """The edits from ``source`` to ``correction``, cut so that most of them are in ``gold``.

    The others are as few as they can be, which may leave up to two unchanged words inside.
    """
    old, new = source.split(), correction.split()
    return best_edits(old, new, shortest_ways(old, new), gold)


def shortest_ways(old: list[str], new: list[str]) -> Lattice:
    """All steps of all shortest alignments, where a replaced token costs one change or two."""
    ways: dict[Node, dict[Node, bool]] = {}
    for replacement in (CHANGE, 2 * CHANGE):
        costs = costs_to_end(old, new, replacement)
        reached = [(0, 0)]
        seen = {(0, 0)}
        while reached:
            i, j = reached.pop()
            onward = ways.setdefault((i, j), {})
            for a, b in ((i + 1, j + 1), (i + 1, j), (i, j + 1)):
                if a > len(old) or b > len(new):
                    continue
                diagonal = a > i and b > j
                changed = not diagonal or old[i] != new[j]
                cost = (replacement if diagonal else CHANGE) if changed else 0
                if costs[i][j] == cost + costs[a][b]:
                    onward[a, b] = changed
                    if (a, b) not in seen:
                        seen.add((a, b))
                        reached.append((a, b))
    return {node: list(onward.items()) for node, onward in ways.items()}


def best_edits(
    old: list[str], new: list[str], lattice: Lattice, gold: Sequence[Edit]
) -> list[Edit]:
    """Walk back from the end; at each node what follows is best known, outside of and in an edit.

    Insertions at one place are right once each, in the order of the annotator: it depends on how
    many of them (``used``) are behind. In an edit it also depends on how many more tokens the edit
    may leave unchanged (``left``).
    """
    outside: dict[tuple[Node, int], Rest] = {}
    inside: dict[tuple[Node, int, int], Rest] = {}
    inserted = Counter(edit.start for edit in gold if edit.start == edit.end)
    end = (len(old), len(new))
    for node in sorted(lattice, reverse=True):
        targets = list(gold_targets(node, new, lattice, gold))
        for used in range(inserted[node[0]] + 1):
            ways: list[Rest] = [(0, node, None)] if node == end else []
            onwards = [
                (onward, used if onward[0] == node[0] else 0, not changed)
                for onward, changed in lattice[node]
            ]
            for onward, behind, same in onwards:
                if same:
                    worth, _, spans = outside[onward, behind]
                    ways.append((worth + STEP, node, spans))
                worth, stop, spans = inside[onward, behind, MAX_UNCHANGED - same]
                ways.append((worth + STEP + EDIT + UNCHANGED * same, node, (node, stop, spans)))
            for target, place in targets:
                if place is None or place >= used:
                    worth, _, spans = outside[target, 0 if place is None else place + 1]
                    ways.append((worth + MATCH, node, (node, target, spans)))
            outside[node, used] = closed = max(ways, key=by_worth)
            for left in range(MAX_UNCHANGED + 1):
                ways = [closed]
                for onward, behind, same in onwards:
                    if left >= same:
                        worth, stop, spans = inside[onward, behind, left - same]
                        ways.append((worth + STEP + UNCHANGED * same, stop, spans))
                inside[node, used, left] = max(ways, key=by_worth)
    return list(told(new, outside[(0, 0), 0][2]))


def told(new: list[str], spans: Spans) -> Iterator[Edit]:
    while spans:
        (start, a), (end, b), spans = spans
        yield Edit(start, end, " ".join(new[a:b]))


def gold_targets(
    node: Node, new: list[str], lattice: Lattice, gold: Sequence[Edit]
) -> Iterator[tuple[Node, int | None]]:
    """Where the gold edits that begin at ``node`` lead to, if the alignments allow them.

    With an insertion comes its number among those at this place.
    """
    i, j = node
    insertions = 0
    for edit in gold:
        if edit.start != i:
            continue
        place = insertions if edit.end == i else None
        insertions += edit.end == i
        for words in (edit.correction, *edit.others):
            tokens = words.split()
            target = (edit.end, j + len(tokens))
            if target in lattice and new[j : target[1]] == tokens and leads(node, target, lattice):
                yield target, place


def leads(node: Node, target: Node, lattice: Lattice) -> bool:
    """Whether there is a way with a change and no more than MAX_UNCHANGED unchanged tokens."""
    states = {(node, 0, False)}
    while states:
        following = {
            (onward, unchanged + (not changes), changed or changes)
            for here, unchanged, changed in states
            for onward, changes in lattice[here]
            if onward[0] <= target[0] and onward[1] <= target[1]
        }
        states = {state for state in following if state[1] <= MAX_UNCHANGED}
        if any(here == target and changed for here, _, changed in states):
            return True
    return False
