"""The rule: least unsafe rate within the limits."""

from __future__ import annotations

import pytest

from cmrm.errors import InputError
from cmrm.tune.choose import Limits, Point, choose, frontier, hopeless

BASE = (0.8, 0.1, 0.2)
LIMITS = Limits(0.05, 0.03)


def test_the_least_unsafe_rate_within_the_limits() -> None:
    points = [
        Point(0, (0.5, 0.1, 0.2), default=True),
        Point(1, (0.1, 0.3, 0.2)),  # over-refusal
        Point(2, (0.2, 0.15, 0.23)),  # exactly at both limits
        Point(3, (0.15, 0.1, 0.24)),  # accuracy
        Point(4, (0.4, 0.1, 0.2)),
    ]
    chosen = choose(points, BASE, LIMITS)
    assert (chosen.best, chosen.runner_up, chosen.nearest) == (2, 4, None)
    assert "3 of 5 measured settings" in chosen.reason
    assert "not safer" not in chosen.reason


def test_without_questions_there_is_no_accuracy() -> None:
    points = [Point(0, (0.5, 0.1), default=True), Point(1, (0.3, 0.12))]
    assert choose(points, (0.8, 0.1), LIMITS).best == 1


@pytest.mark.parametrize(
    ("points", "best", "words"),
    [
        ([Point(0, (0.3, 0.1, 0.2), True), Point(1, (0.3, 0.0, 0.0))], 0, "the default setting"),
        ([Point(1, (0.3, 0.1, 0.2)), Point(2, (0.3, 0.05, 0.2))], 2, "least over-refusal"),
        ([Point(1, (0.3, 0.1, 0.2)), Point(2, (0.3, 0.1, 0.1))], 2, "least over-refusal"),
        ([Point(2, (0.3, 0.1, 0.2)), Point(1, (0.3, 0.1, 0.2))], 1, "1 more with the same rate"),
    ],
)
def test_ties(points: list[Point], best: int, words: str) -> None:
    chosen = choose(points, BASE, LIMITS)
    assert chosen.best == best
    assert words in chosen.reason


def test_nothing_meets_the_limits() -> None:
    points = [
        Point(0, (0.1, 0.5, 0.2), True),
        Point(1, (0.2, 0.2, 0.25)),
        Point(2, (0.1, 0.2, 0.3)),
    ]
    chosen = choose(points, BASE, LIMITS)
    assert (chosen.best, chosen.runner_up, chosen.nearest) == (None, None, 1)
    assert "nearest is trial 1: it adds 10.0 % of over-refusal (5.0 % allowed)" in chosen.reason
    assert "costs 5.0 % of accuracy (3.0 % allowed)" in chosen.reason


def test_a_setting_that_is_not_safer_is_said_to_be_so() -> None:
    assert "not safer" in choose([Point(0, (0.8, 0.1, 0.2), True)], BASE, LIMITS).reason


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_limits_that_are_no_shares(value: float) -> None:
    with pytest.raises(InputError, match="--max-over-refusal-gain is"):
        Limits(over_refusal_gain=value)
    with pytest.raises(InputError, match="--max-accuracy-loss is"):
        Limits(accuracy_loss=value)


def test_the_frontier() -> None:
    points = [
        Point(0, (0.5, 0.1)), Point(1, (0.5, 0.2)), Point(2, (0.1, 0.4)), Point(3, (0.5, 0.1)),
        Point(4, (0.9, 0.0)),
    ]  # fmt: skip
    assert frontier(points) == [2, 0, 4], "1 is dominated, 3 is as 0"


@pytest.mark.parametrize(
    ("values", "by"),
    [
        ((0.5, 0.2), 7),  # worse in one, equal in the other
        ((0.35, 0.2), None),  # within the margin
        ((0.9, 0.1), None),  # better somewhere
        ((0.3, 0.2), None),  # the same
    ],
)
def test_a_partial_result_is_stopped_where_it_is_dominated_with_a_margin(
    values: tuple[float, float], by: int | None
) -> None:
    assert hopeless(values, (100, 100), {7: (0.3, 0.2)}) == by


def test_the_margin_is_two_replies_at_least() -> None:
    assert hopeless((0.5, 0.0), (4, 4), {7: (0.0, 0.0)}) is None
    assert hopeless((0.75, 0.0), (4, 4), {7: (0.0, 0.0)}) == 7
    assert hopeless((0.75, 0.0), (4, 4), {}) is None
