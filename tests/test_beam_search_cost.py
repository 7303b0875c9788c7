"""What a beam search does, in exact counts."""

import pytest

from benchmarks.beam_search_cost import bound, count, main, work

T, K, M = 6, 4, 50


@pytest.mark.parametrize(("t", "k", "m"), [(T, K, M), (1, K, M), (T, 1, M), (T, K, K), (9, 7, 30)])
def test_counts_are_those_of_the_formula(t: int, k: int, m: int) -> None:
    counts = count(t, k, m)
    assert counts.steps == t
    assert counts.logits == counts.compared == m + (t - 1) * k * m
    assert counts.chosen == t * k
    assert counts.copied == k * t * (t + 1) / 2
    assert work(counts, k) <= bound(t, k, m)


def test_each_of_length_width_and_vocabulary_counts_once() -> None:
    """Equal differences: linear, but for the first step, which has one hypothesis."""

    def compared(t: int = T, k: int = K, m: int = M) -> int:
        return count(t, k, m).compared

    assert [compared(t=t + 1) - compared(t=t) for t in (1, 5, 9)] == [K * M] * 3
    assert [compared(k=k + 1) - compared(k=k) for k in (1, 5, 9)] == [(T - 1) * M] * 3
    assert [compared(m=m + 1) - compared(m=m) for m in (20, 50)] == [1 + (T - 1) * K] * 2


def test_no_more_than_the_vocabulary_can_be_chosen_at_first() -> None:
    counts = count(3, 5, 2)  # 1, 2 and 4 hypotheses go on
    assert (counts.logits, counts.chosen) == (2 * (1 + 2 + 4), 2 + 4 + 5)


def test_the_table_of_the_answer_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 + 12
    assert "| 20 | 4 | 1,000 | 20 | 77,000 | 77,000 | 80 | 840 | 80,640 | 0.957 |" in printed
