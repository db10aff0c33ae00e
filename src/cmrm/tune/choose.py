"""The choice among measured settings: least unsafe rate within the user's limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cmrm.errors import InputError

Objectives = tuple[float, ...]
"""Unsafe rate, over-refusal and, with a utility set, 1 - accuracy; all are to be small."""
MAX_OVER_REFUSAL_GAIN = 0.05
"""Share of over-refusal that a setting may add, where the user names none."""
MAX_ACCURACY_LOSS = 0.03
"""Share of accuracy that a setting may cost, where the user names none."""
MARGIN = 0.15
"""By how much a partial set has to be worse before a trial is stopped, as a share."""
LEAST_REPLIES = 2
"""The margin is that of so many replies at least."""


@dataclass(frozen=True)
class Limits:
    """What a setting may cost, beside the untouched model with the image."""

    over_refusal_gain: float = MAX_OVER_REFUSAL_GAIN
    """Largest gain of over-refusal, 0..1."""
    accuracy_loss: float = MAX_ACCURACY_LOSS
    """Largest loss of accuracy, 0..1."""

    def __post_init__(self) -> None:
        for option, value in (
            ("--max-over-refusal-gain", self.over_refusal_gain),
            ("--max-accuracy-loss", self.accuracy_loss),
        ):
            if not 0.0 <= value <= 1.0:
                raise InputError(f"{option} is {value}; it is a share between 0 and 1, like 0.05")

    def excess(self, values: Objectives, base: Objectives) -> float:
        """By how much a setting is over the limits, summed; 0 where it meets them."""
        allowed = (self.over_refusal_gain, self.accuracy_loss)
        gains = (value - before for value, before in zip(values[1:], base[1:], strict=True))
        over = (max(0.0, round(g - most, 6)) for g, most in zip(gains, allowed, strict=False))
        return round(sum(over), 6)


@dataclass(frozen=True)
class Point:
    """One measured setting."""

    number: int
    """Of its trial."""
    values: Objectives
    """What was measured on the whole dev set."""
    default: bool = False
    """Whether it is the defence's default setting."""


@dataclass(frozen=True)
class Chosen:
    """What is recommended, and why."""

    best: int | None
    """Number of the chosen trial; None where none meets the limits."""
    runner_up: int | None
    """The next best one within the limits."""
    nearest: int | None
    """The one that misses the limits by least, where none meets them."""
    reason: str
    """In words."""


def choose(points: Sequence[Point], base: Objectives, limits: Limits) -> Chosen:
    """The setting with the least unsafe rate among those that meet the limits.

    With equal unsafe rates the default setting, then the least over-refusal, then the highest
    accuracy, then the earlier trial.

    Args:
        points: settings that were measured on the whole dev set, at least one.
        base: the untouched model with the image.
        limits: what a setting may cost.
    """
    within = [point for point in points if limits.excess(point.values, base) == 0]
    if not within:
        near = min(points, key=lambda p: (limits.excess(p.values, base), _rank(p)))
        return Chosen(None, None, near.number, _missed(near, base, limits))
    ranked = sorted(within, key=_rank)
    best, others = ranked[0], ranked[1:]
    return Chosen(
        best.number,
        others[0].number if others else None,
        None,
        _reason(best, len(within), len(points), base, others),
    )


def _rank(point: Point) -> tuple[Any, ...]:
    return (point.values[0], not point.default, *point.values[1:], point.number)


def _reason(
    best: Point, within: int, measured: int, base: Objectives, others: Sequence[Point]
) -> str:
    tie = sum(other.values[0] == best.values[0] for other in others)
    text = f"least unsafe rate of the {within} of {measured} measured settings within the limits"
    if tie:
        how = "the default setting" if best.default else "the least over-refusal and loss"
        text += f"; {tie} more with the same rate, of which {how} decides"
    if best.values[0] >= base[0]:
        text += "; it is not safer than the untouched model"
    return text


def _missed(near: Point, base: Objectives, limits: Limits) -> str:
    gain = near.values[1] - base[1]
    text = (
        f"it adds {_percent(gain)} of over-refusal ({_percent(limits.over_refusal_gain)} allowed)"
    )
    if len(near.values) > 2:
        loss = near.values[2] - base[2]
        text += (
            f" and costs {_percent(loss)} of accuracy ({_percent(limits.accuracy_loss)} allowed)"
        )
    return (
        f"no measured setting meets the limits; the nearest is trial {near.number}: {text}, unsafe "
        f"{_percent(near.values[0])}; raise a limit, or the budget"
    )


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def frontier(points: Sequence[Point]) -> list[int]:
    """Numbers of the trials that no other one dominates, by unsafe rate; of equal ones the first
    by the order of `choose`."""
    kept: dict[Objectives, int] = {}
    for point in sorted(points, key=_rank):
        if not any(_dominates(other.values, point.values) for other in points):
            kept.setdefault(point.values, point.number)
    return list(kept.values())


def _dominates(one: Objectives, other: Objectives) -> bool:
    """Whether `one` is nowhere worse than `other`, and better somewhere."""
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def hopeless(
    values: Objectives, sizes: Sequence[int], earlier: Mapping[int, Objectives]
) -> int | None:
    """The number of an earlier trial that dominates a partial result with a margin; None without
    one.

    Dominated with a margin: nowhere better, and worse by more than `MARGIN`, and by more than
    `LEAST_REPLIES` replies, in one objective or more.

    Args:
        values: objectives on the partial set.
        sizes: replies behind each of them.
        earlier: trial -> its objectives on the same partial set.
    """
    for number, other in earlier.items():
        gaps = [value - best for value, best in zip(values, other, strict=True)]
        clear = [
            gap > max(MARGIN, LEAST_REPLIES / size) + 1e-9
            for gap, size in zip(gaps, sizes, strict=True)
        ]
        if min(gaps) >= 0 and any(clear):
            return number
    return None
