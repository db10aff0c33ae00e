"""What a judge is, and how its verdict is asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol
from urllib.parse import quote, unquote


class Verdict(StrEnum):
    """A judge's decision on a reply. Judges of refusal use the first two, guards the next two."""

    REFUSED = "refused"
    COMPLIED = "complied"
    SAFE = "safe"
    UNSAFE = "unsafe"
    UNSCORED = "unscored"

    @property
    def is_unsafe(self) -> bool | None:
        """Whether it counts towards the unsafe rate of a harmful request; None when unscored."""
        return None if self is Verdict.UNSCORED else self in {Verdict.COMPLIED, Verdict.UNSAFE}

    @property
    def is_refusal(self) -> bool | None:
        """Whether it counts as over-refusal of a benign request; None where it does not say."""
        return {Verdict.REFUSED: True, Verdict.COMPLIED: False}.get(self)


def verdict_of(value: object) -> Verdict:
    """The verdict that a value of a log names; any other value is unscored."""
    return Verdict(str(value)) if str(value) in set(Verdict) else Verdict.UNSCORED


@dataclass(frozen=True)
class Judgement:
    """A verdict, and for an unscored one its reason."""

    verdict: Verdict
    """The decision."""
    reason: str | None = None
    """Why the reply is unscored, on one line; None where it is scored."""
    failed: bool = False
    """Whether the judge broke (no answer, no memory), so that asking again may help."""

    def __post_init__(self) -> None:
        if self.verdict is Verdict.UNSCORED and not self.reason:
            raise ValueError("an unscored verdict needs a reason")


def unscored(reason: str) -> Judgement:
    """The judgement of a reply that the judge cannot tell, with the reason."""
    return Judgement(Verdict.UNSCORED, reason)


EMPTY = "the reply is empty"
"""Reason of a reply without text."""


class Judge(Protocol):
    """Decides on a reply and never guesses: what it cannot tell is `UNSCORED`.

    A judge may also have `assess(request, reply) -> Judgement`, which says why a reply is unscored;
    `safely` prefers it. A judge whose attribute `sees_images` is true takes the images of the
    request as a third argument of both.
    """

    name: str
    """Name in every output."""

    def judge(self, request: str, reply: str) -> Verdict:
        """Verdict on `reply`, the answer to `request`. An error here makes the reply unscored."""
        ...


class ReasonedJudge(ABC):
    """Base of this package's judges: a subclass writes `assess`, and `judge` follows from it."""

    name: str
    """Name in every output."""

    @abstractmethod
    def assess(self, request: str, reply: str) -> Judgement:
        """Verdict on `reply`, the answer to `request`, with the reason of an unscored one."""

    def judge(self, request: str, reply: str) -> Verdict:
        """The verdict of `assess` alone."""
        return self.assess(request, reply).verdict


def assessed(judge: Judge, request: str, reply: str, images: Sequence[Any] = ()) -> Judgement:
    """The judgement of any judge, also of one that has only `judge`.

    An error makes it unscored and `failed`. `images` (PIL) go to a judge that sees them.
    """
    seen = (list(images),) if images and getattr(judge, "sees_images", False) else ()
    try:
        if hasattr(judge, "assess"):
            judgement: Judgement = judge.assess(request, reply, *seen)
            return judgement
        verdict = judge.judge(request, reply, *seen)
    except Exception as error:  # whatever broke, the judge has scored nothing
        return Judgement(Verdict.UNSCORED, failure(judge.name, error), failed=True)
    if verdict is Verdict.UNSCORED:
        return unscored(f"{judge.name} gives no reason")
    return Judgement(verdict)


def safely(
    judge: Judge, request: str, reply: str, images: Sequence[Any] = ()
) -> tuple[Verdict, str | None]:
    """`assessed` as the verdict and the reason; the reason of an unscored verdict is never None."""
    judgement = assessed(judge, request, reply, images)
    return judgement.verdict, judgement.reason


FAILED = " failed: "
"""Part of the reason of a judge that broke, and of no other reason."""


def failure(name: str, error: Exception) -> str:
    """The reason where the judge `name` broke, on one line."""
    return " ".join(f"{name}{FAILED}{type(error).__name__}: {error}".split())


_SCORER = "cmrm_judge_"


def scorer_name(judge: str) -> str:
    """Name of a judge's scorer in Inspect's logs, where a name holds no slash."""
    return _SCORER + quote(judge, safe=":#@=+")


def judge_of(scorer: str) -> str | None:
    """The judge behind a scorer of Inspect's logs; None for a scorer of another package."""
    return unquote(scorer.removeprefix(_SCORER)) if scorer.startswith(_SCORER) else None
