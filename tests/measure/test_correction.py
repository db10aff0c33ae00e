"""Rates corrected for the errors of a judge."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pytest

from cmrm.judges import Verdict
from cmrm.measure.agreement import Label, Rated
from cmrm.measure.correction import (
    LEAST,
    LEAST_LOCAL,
    Corrected,
    Correction,
    JudgeError,
    Text,
    rogan_gladen,
    run_corrections,
)
from cmrm.measure.rates import RESAMPLES, rate_of, verdict_rate
from cmrm.measure.sheet import draw

SAFE, UNSAFE, UNSCORED = Verdict.SAFE, Verdict.UNSAFE, Verdict.UNSCORED


def test_a_hand_computation() -> None:
    """9 of 10 unsafe and 8 of 10 safe replies are recognised, and 30 of 100 are called unsafe:
    (0.3 + 0.8 - 1) / (0.9 + 0.8 - 1) = 0.1 / 0.7."""
    error = JudgeError.of_counts("file.csv", tp=9, fn=1, tn=8, fp=2)
    corrected = Correction(error).of(rate_of(30, 100))
    assert (corrected.sensitivity, corrected.specificity) == (0.9, 0.8)
    assert corrected.rate == pytest.approx(1 / 7, abs=1e-6)
    assert corrected.low is not None
    assert corrected.high is not None
    assert 0 <= corrected.low < 1 / 7 < corrected.high <= 1
    assert (corrected.n_labelled, corrected.source, corrected.reason) == (20, "file.csv", None)
    assert corrected.method == "rogan-gladen"


def test_weights_by_hand() -> None:
    """Unsafe: weights 3 (recognised) and 1 (missed) 50 times each, 150 of 200. Safe: 80 of weight 1
    (right) and 20 of weight 4 (wrong), 80 of 160."""
    judged = (True,) * 50 + (False,) * 50 + (False,) * 80 + (True,) * 20
    person = (True,) * 100 + (False,) * 100
    weights = (3.0,) * 50 + (1.0,) * 50 + (1.0,) * 80 + (4.0,) * 20
    corrected = Correction(JudgeError("x", judged, person, weights)).of(rate_of(60, 100))
    assert (corrected.sensitivity, corrected.specificity) == (0.75, 0.5)
    assert corrected.rate == pytest.approx((0.6 + 0.5 - 1) / (0.75 + 0.5 - 1))


def test_a_corrected_rate_is_clipped() -> None:
    error = JudgeError.of_counts("x", tp=18, fn=2, tn=18, fp=2)
    none, every = Correction(error).of(rate_of(0, 50)), Correction(error).of(rate_of(50, 50))
    assert (none.rate, none.low) == (0, 0)
    assert (every.rate, every.high) == (1, 1)
    assert none.high is not None
    assert none.high > 0.01, "no unsafe reply among 50 is no proof of none"
    assert rogan_gladen(0.05, 0.9, 0.9) == 0


def test_few_labels_without_an_error_do_not_prove_a_perfect_judge() -> None:
    few = Correction(JudgeError.of_counts("x", tp=6, fn=0, tn=6, fp=0)).of(rate_of(500, 1000))
    many = Correction(JudgeError.of_counts("x", tp=600, fn=0, tn=600, fp=0)).of(rate_of(500, 1000))
    assert few.rate == many.rate == 0.5
    assert width(few) > 3 * width(many)


def test_the_same_seed_gives_the_same_interval() -> None:
    error = JudgeError.of_counts("x", tp=9, fn=1, tn=8, fp=2)
    first = Correction(error, seed=1).of(rate_of(30, 100))
    assert first == Correction(error, seed=1).of(rate_of(30, 100))
    assert first != Correction(error, seed=2).of(rate_of(30, 100))


def test_unscored_labelled_replies_are_in_neither_figure() -> None:
    error = JudgeError(
        "x", (True,) * 6 + (None,) * 4 + (False,) * 6, (True,) * 8 + (False,) * 8, (1.0,) * 16
    )
    assert (error.n, error.yes, error.rates) == (12, 6, (1.0, 1.0))


@pytest.mark.parametrize(
    ("counts", "hits", "n", "reason"),
    [
        ((4, 0, 20, 1), 10, 100, f"4 are labelled yes and 21 no; label at least {LEAST} of each"),
        ((20, 1, 2, 1), 10, 100, f"21 are labelled yes and 3 no; label at least {LEAST} of each"),
        ((0, 0, 9, 1), 10, 100, "0 are labelled yes and 10 no"),
        ((4, 6, 6, 4), 10, 100, "sensitivity 0.40, specificity 0.60.*use another judge"),
        ((5, 5, 7, 3), 10, 100, "resamples of the labels the judge tells nothing"),
        ((9, 1, 8, 2), 0, 0, "no reply was scored"),
    ],
)
def test_why_there_is_no_corrected_rate(
    counts: tuple[int, int, int, int], hits: int, n: int, reason: str
) -> None:
    tp, fn, tn, fp = counts
    error = JudgeError.of_counts("x", tp=tp, fn=fn, tn=tn, fp=fp)
    corrected = Correction(error).of(rate_of(hits, n, unscored=3))
    assert (corrected.rate, corrected.low, corrected.high) == (None, None, None)
    assert corrected.reason is not None
    assert re.search(reason, corrected.reason)
    assert "\n" not in corrected.reason


def test_degenerate_resamples_are_counted_and_left_out() -> None:
    """A judge that is hardly better than chance on few labels."""
    corrected = Correction(JudgeError.of_counts("x", tp=8, fn=2, tn=7, fp=3)).of(rate_of(50, 100))
    assert 0 < corrected.degenerate < 0.05 * RESAMPLES
    assert corrected.rate is not None
    assert Correction(JudgeError.of_counts("x", tp=99, fn=1, tn=99, fp=1)).of(
        rate_of(50, 100)
    ).degenerate == 0  # fmt: skip


def test_the_difference_estimator_by_hand() -> None:
    """The judge calls 40 of 100 unsafe. Of 20 labelled replies, each standing for 5, it is wrong
    on 4 that it calls safe and on 1 that it calls unsafe: 0.4 + (4 - 1) / 20 = 0.55."""
    judged = [True] * 8 + [False] * 12
    person = [True] * 7 + [False] + [True] * 4 + [False] * 8
    texts: list[Text] = [(True, f"q{k}", "r") for k in range(20)]
    labelled = dict(zip(texts, zip(person, [5.0] * 20, strict=True), strict=True))
    error = JudgeError("x", tuple(judged), tuple(person), (5.0,) * 20, labelled)
    rows = list(zip(texts, judged, strict=True))
    difference = Correction(error).of(rate_of(40, 100), rows).difference
    assert difference is not None
    assert difference.value == pytest.approx(0.55)
    assert difference.n == 20
    assert difference.low < 0.55 < difference.high
    assert Correction(error).of(rate_of(40, 100), rows[1:]).difference is None, (
        f"{LEAST_LOCAL} labels of the very rows are needed"
    )
    unscored = [(text, None) for text in texts]
    share = Correction(error).of(rate_of(40, 100), unscored).difference
    assert share is not None
    assert share.value == pytest.approx(11 / 20), "unscored ones count as the person says"


def rows_of(verdicts: Sequence[Verdict]) -> list[Rated]:
    return [
        Rated(f"r{k:03d}", ("harmful", "none"), f"q{k}", "a", True, {"guard": verdict})
        for k, verdict in enumerate(verdicts)
    ]


def test_a_run_is_corrected_by_its_own_labels() -> None:
    """12 of 20 labelled replies are drawn with probability 0.2, 8 with 0.8: weights 5 and 1.25."""
    rows = rows_of([UNSAFE] * 10 + [SAFE] * 10 + [UNSAFE, SAFE, UNSCORED] * 10)
    people = [True] * 9 + [False] + [True] * 2 + [False] * 8
    labels = {
        row.id: Label(None, person, 0.2 if k < 12 else 0.8, recorded=True)
        for k, (row, person) in enumerate(zip(rows, people, strict=False))
    }
    correction = run_corrections(rows, labels)["guard"]["unsafe"]
    corrected = correction.of(verdict_rate([row.verdicts["guard"] for row in rows], UNSAFE))
    assert corrected.source == "labels of this run"
    assert corrected.sensitivity == pytest.approx(9 * 5 / (9 * 5 + 2 * 5))
    assert corrected.specificity == pytest.approx(8 * 1.25 / (8 * 1.25 + 1 * 5))
    raw, sensitivity, specificity = 0.5, 45 / 55, 10 / 15
    assert corrected.rate == pytest.approx(
        (raw + specificity - 1) / (sensitivity + specificity - 1), abs=1e-6
    )


def test_each_outcome_has_the_labels_of_its_own_question_and_requests() -> None:
    rows = [
        Rated("h", ("harmful",), "q", "r", True, {"small": UNSAFE, "guard": UNSAFE}),
        Rated("b", ("benign",), "q", "r", False, {"small": Verdict.REFUSED, "guard": SAFE}),
    ]
    both = run_corrections(rows, {"h": Label(False, True), "b": Label(True, False)})
    assert {judge: set(outcomes) for judge, outcomes in both.items()} == {
        "small": {"unsafe", "over_refusal"},
        "guard": {"unsafe"},
    }, "a guard does not say whether a reply refuses"
    refusal = run_corrections(rows, {"h": Label(False, None), "b": Label(True, None)})
    assert {judge: set(outcomes) for judge, outcomes in refusal.items()} == {
        "small": {"over_refusal"}
    }
    assert run_corrections(rows, {}) == {}


def width(corrected: Corrected) -> float:
    assert corrected.low is not None
    assert corrected.high is not None
    return corrected.high - corrected.low


def covers(corrected: Corrected, share: float) -> bool:
    assert corrected.low is not None
    assert corrected.high is not None
    return corrected.low <= share <= corrected.high


@pytest.mark.parametrize(
    ("prevalence", "sensitivity", "specificity", "labelled", "n"),
    [(0.2, 0.8, 0.9, 200, 400), (0.05, 0.9, 0.97, 200, 60), (0.5, 0.98, 0.98, 60, 60)],
)
def test_the_interval_covers_the_truth_with_labels_of_another_sample(
    prevalence: float, sensitivity: float, specificity: float, labelled: int, n: int
) -> None:
    """95 % of the time: 400 runs, so 92.5 to 99 % is 2.3 standard errors below, and room for the
    smoothing above. Labels have as many yes as no."""
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(400):
        half = labelled // 2
        tp, tn = rng.binomial(half, sensitivity), rng.binomial(half, specificity)
        error = JudgeError.of_counts("x", tp=tp, fn=half - tp, tn=tn, fp=half - tn)
        said = prevalence * sensitivity + (1 - prevalence) * (1 - specificity)
        corrected = Correction(error, seed=seed).of(rate_of(rng.binomial(n, said), n))
        covered += covers(corrected, prevalence)
    assert 0.925 <= covered / 400 <= 0.99


PREVALENCE = 0.2


def population(rng: np.random.Generator, n: int = 1500) -> tuple[list[Rated], dict[str, bool]]:
    """Replies in four groups, and which are unsafe in truth. Two judges contradict each other on
    15 %, where the first is wrong on 40 %; elsewhere it is wrong on 3 %."""
    unsafe = rng.random(n) < PREVALENCE
    contradicted = rng.random(n) < 0.15
    called = unsafe ^ (rng.random(n) < np.where(contradicted, 0.4, 0.03))
    rows = []
    for k in range(n):
        first = UNSAFE if called[k] else SAFE
        second = (SAFE if called[k] else UNSAFE) if contradicted[k] else first
        group = ("harmful", f"defence {k % 4}")
        rows.append(Rated(f"r{k:04d}", group, f"q{k}", "a", True, {"a": first, "b": second}))
    return rows, {row.id: bool(truth) for row, truth in zip(rows, unsafe, strict=True)}


def test_the_interval_covers_the_truth_with_a_sheet_and_not_without_its_weights() -> None:
    """120 runs with a sheet of 300, drawn more where the judges contradict each other. Without the
    weights the judge looks worse than it is, and the corrected rate is too low. The interval is up
    to a third too wide, since labels and run are resampled as if they were apart."""
    runs = 120
    covered, ignored, local = 0, 0, 0
    rates, unweighted, widths = [], [], []
    for seed in range(runs):
        rows, truth = population(np.random.default_rng(seed))
        drawn, probabilities = draw(rows, 300, seed=seed)
        labels = {
            row.id: Label(None, truth[row.id], probabilities[row.id], recorded=True)
            for row in drawn
        }
        alike = {row.id: Label(None, truth[row.id]) for row in drawn}
        raw = verdict_rate([row.verdicts["a"] for row in rows], UNSAFE)
        answers = [(row.text, row.verdicts["a"].is_unsafe) for row in rows]
        corrected = run_corrections(rows, labels, seed=seed)["a"]["unsafe"].of(raw, answers)
        naive = run_corrections(rows, alike, seed=seed)["a"]["unsafe"].of(raw)
        assert corrected.rate is not None
        assert naive.rate is not None
        assert corrected.difference is not None
        rates.append(corrected.rate)
        unweighted.append(naive.rate)
        widths.append(width(corrected))
        covered += covers(corrected, PREVALENCE)
        ignored += covers(naive, PREVALENCE)
        local += corrected.difference.low <= PREVALENCE <= corrected.difference.high
    assert np.mean(rates) == pytest.approx(PREVALENCE, abs=0.01)
    assert np.mean(unweighted) < PREVALENCE - 0.03
    assert covered / runs >= 0.92
    assert local / runs >= 0.92
    assert 1 <= np.mean(widths) / (2 * 1.96 * np.std(rates)) <= 1.5
    assert ignored / runs < 0.85
