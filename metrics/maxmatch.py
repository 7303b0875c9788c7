"""MaxMatch (M2): a correction is cut into the edits that agree best with those of an annotator.

Dahlmeier and Ng, "Better Evaluation for Grammatical Error Correction" (NAACL 2012). The same
correction can be one edit or several, and people and programs cut it differently. Here every cut
counts that lies on a shortest alignment, so that no edit is called wrong for its borders.

Dimensions: N source tokens, M tokens of the correction.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from operator import itemgetter

from metrics.edits import CHANGE, Edit, EditScore, compare, costs_to_end
from metrics.m2 import M2Sentence

_MAX_UNCHANGED = 2  # tokens that an edit may leave as they are, the default of the authors' program

# Score of a path to the end: first its gold edits, then few steps and few edits beside them.
# It is one number, for it is compared at every node; there is room for 100,000 steps.
_UNCHANGED = -1  # a token inside an edit: of equal paths the one with the tightest edits
_EDIT = 10**5 * _UNCHANGED
_STEP = 10**5 * _EDIT
_MATCH = -(10**5) * _STEP

_Node = tuple[int, int]  # source tokens and tokens of the correction that were passed
_Lattice = dict[_Node, dict[_Node, bool]]  # the next nodes, and if the step there is a change
_Spans = tuple[_Node, _Node, "_Spans"] | None  # begin and end of an edit, and the edits after it
_Path = tuple[int, _Node, _Spans]  # best way to the end: score, end of the open edit, edits after
_by_score = itemgetter(0)


def m2_scores(corrections: Sequence[str], gold: Sequence[M2Sentence]) -> list[list[EditScore]]:
    """Score each sentence with each annotator; ``best_sum`` of them is what the M2 scorer says.

    Args:
        corrections: A line for each sentence, tokens between spaces.
        gold: The sentences with the edits of their annotators.
    """
    scores = []
    for correction, sentence in zip(corrections, gold, strict=True):
        old, new = sentence.source.split(), correction.split()
        lattice = _shortest_alignments(old, new)
        people = sentence.edits.values()
        scores.append([compare(_best_edits(new, lattice, edits), edits) for edits in people])
    return scores


def _shortest_alignments(old: list[str], new: list[str]) -> _Lattice:
    """All steps of all shortest alignments, where a replaced token costs one change or two."""
    lattice: _Lattice = {}
    for replacement in (CHANGE, 2 * CHANGE):
        costs = costs_to_end(old, new, replacement)
        reached = [(0, 0)]
        seen = {(0, 0)}
        while reached:
            i, j = reached.pop()
            steps = lattice.setdefault((i, j), {})
            for a, b in ((i + 1, j + 1), (i + 1, j), (i, j + 1)):
                if a > len(old) or b > len(new):
                    continue
                diagonal = a > i and b > j
                changed = not diagonal or old[i] != new[j]
                cost = (replacement if diagonal else CHANGE) if changed else 0
                if costs[i][j] == cost + costs[a][b]:
                    steps[a, b] = changed
                    if (a, b) not in seen:
                        seen.add((a, b))
                        reached.append((a, b))
    return lattice


def _best_edits(new: list[str], lattice: _Lattice, gold: Sequence[Edit]) -> list[Edit]:
    """Walk back from the end; at each node the best path onwards is known, in an edit and outside.

    Insertions at one place are right once each, in the order of the annotator: it depends on how
    many of them (``used``) were passed. In an edit it also depends on how many more tokens the edit
    may leave unchanged (``left``).
    """
    outside: dict[tuple[_Node, int], _Path] = {}
    inside: dict[tuple[_Node, int, int], _Path] = {}
    inserted = Counter(edit.start for edit in gold if edit.start == edit.end)
    end = max(lattice)
    for node in sorted(lattice, reverse=True):
        targets = list(_gold_targets(node, new, lattice, gold))
        for used in range(inserted[node[0]] + 1):
            paths: list[_Path] = [(0, node, None)] if node == end else []
            steps = [
                (onward, used if onward[0] == node[0] else 0, not changed)
                for onward, changed in lattice[node].items()
            ]
            for onward, passed, same in steps:
                if same:
                    score, _, spans = outside[onward, passed]
                    paths.append((score + _STEP, node, spans))
                score, stop, spans = inside[onward, passed, _MAX_UNCHANGED - same]
                score += _STEP + _EDIT + _UNCHANGED * same
                paths.append((score, node, (node, stop, spans)))
            for target, place in targets:
                if place is None or place >= used:
                    score, _, spans = outside[target, 0 if place is None else place + 1]
                    paths.append((score + _MATCH, node, (node, target, spans)))
            outside[node, used] = closed = max(paths, key=_by_score)
            for left in range(_MAX_UNCHANGED + 1):
                paths = [closed]
                for onward, passed, same in steps:
                    if left >= same:
                        score, stop, spans = inside[onward, passed, left - same]
                        paths.append((score + _STEP + _UNCHANGED * same, stop, spans))
                inside[node, used, left] = max(paths, key=_by_score)
    return list(_edits_along(new, outside[(0, 0), 0][2]))


def _edits_along(new: list[str], spans: _Spans) -> Iterator[Edit]:
    while spans:
        (start, a), (end, b), spans = spans
        yield Edit(start, end, " ".join(new[a:b]))


def _gold_targets(
    node: _Node, new: list[str], lattice: _Lattice, gold: Sequence[Edit]
) -> Iterator[tuple[_Node, int | None]]:
    """Nodes where the gold edits that begin at ``node`` end, if the alignments allow them.

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
            same = target in lattice and new[j : target[1]] == tokens
            if same and _reachable(node, target, lattice):
                yield target, place


def _reachable(node: _Node, target: _Node, lattice: _Lattice) -> bool:
    """Say if a path with a change has no more than ``_MAX_UNCHANGED`` unchanged tokens."""
    states = {(node, 0, False)}
    while states:
        following = {
            (onward, unchanged + (not changes), changed or changes)
            for here, unchanged, changed in states
            for onward, changes in lattice[here].items()
            if onward[0] <= target[0] and onward[1] <= target[1]
        }
        states = {state for state in following if state[1] <= _MAX_UNCHANGED}
        if any(here == target and changed for here, _, changed in states):
            return True
    return False
