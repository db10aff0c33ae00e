"""Rates, intervals, worst-case bounds, paired tests."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmrm.judges import Verdict
from cmrm.measure.rates import (
    counts_as,
    gap_closed,
    holm,
    paired,
    rate_of,
    ratio_interval,
    verdict_rate,
)

R, C, S, U, N = (
    Verdict.REFUSED, Verdict.COMPLIED, Verdict.SAFE, Verdict.UNSAFE, Verdict.UNSCORED,
)  # fmt: skip


def test_unscored_is_counted_apart_with_worst_case_bounds() -> None:
    rate = verdict_rate([R, C, N, C], C)
    assert (rate.rate, rate.n, rate.unscored) == (round(2 / 3, 6), 3, 1)
    assert (rate.lowest, rate.highest) == (0.5, 0.75)
    none = verdict_rate([N], C)
    assert (none.rate, none.low, none.n, none.unscored) == (None, None, 0, 1)
    assert (none.lowest, none.highest) == (0.0, 1.0)
    empty = verdict_rate([], C)
    assert (empty.rate, empty.lowest, empty.highest) == (None, None, None)


def test_wilson_interval_of_a_textbook_case() -> None:
    rate = rate_of(10, 50)
    assert rate.low == pytest.approx(0.1124, abs=1e-4)
    assert rate.high == pytest.approx(0.3304, abs=1e-4)


@given(st.lists(st.sampled_from(list(Verdict)), max_size=30))
def test_bounds_enclose_the_rate_whatever_is_unscored(verdicts: list[Verdict]) -> None:
    rate = verdict_rate(verdicts, C)
    assert rate.n + rate.unscored == len(verdicts)
    if rate.rate is not None:
        assert rate.lowest is not None
        assert rate.highest is not None
        assert rate.lowest <= rate.rate + 1e-6
        assert rate.rate <= rate.highest + 1e-6


@pytest.mark.parametrize(
    ("verdict", "unsafe", "refusal"),
    [(R, False, True), (C, True, False), (S, False, None), (U, True, None), (N, None, None)],
)
def test_what_a_verdict_counts_as(
    verdict: Verdict, unsafe: bool | None, refusal: bool | None
) -> None:
    assert counts_as(verdict, C) is unsafe
    assert counts_as(verdict, R) is refusal


def test_paired_differences() -> None:
    before = [True] * 8 + [False] * 4 + [None]
    after = [False] * 6 + [True] * 2 + [False] * 3 + [True] + [True]
    comparison = paired(before, after)
    assert comparison is not None
    assert (comparison.only_before, comparison.only_after, comparison.n) == (6, 1, 12)
    assert comparison.difference == pytest.approx(-5 / 12, abs=1e-6)
    assert comparison.low < comparison.difference < comparison.high
    assert comparison.p_value == pytest.approx(2 * (1 + 7) / 2**7)
    assert paired(before, after) == comparison, "seeded"
    assert paired([None], [True]) is None
    same = paired([True, False], [True, False])
    assert same is not None
    assert (same.low, same.high, same.p_value) == (0, 0, 1)


def test_holms_correction() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_the_share_of_a_loss_that_is_given_back() -> None:
    text, original = [False] * 10, [True] * 8 + [False] * 2
    defended = [True] * 2 + [False] * 8
    gap = gap_closed(text, original, defended)
    assert gap.value == pytest.approx(0.75)
    assert gap.low is not None
    assert gap.high is not None
    assert gap.low <= 0.75 <= gap.high
    assert gap_closed(text, original, defended) == gap, "seeded"
    assert gap_closed(text, text, defended).value is None, "without a loss nothing is closed"
    assert gap_closed([None], [True], [False]).n == 0


def test_a_ratio_of_sums() -> None:
    value, low, high = ratio_interval([1.0, 2.0, 9.0], [2.0, 2.0, 2.0])
    assert value == 2.0
    assert low < value < high
    assert ratio_interval([1.0], [4.0]) == (0.25, 0.25, 0.25)
