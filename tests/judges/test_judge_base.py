"""What every judge owes: a verdict, and a reason where there is none."""

from __future__ import annotations

from typing import Any

import pytest

from cmrm.judges import (
    EnsembleJudge,
    Judge,
    Judgement,
    KeywordJudge,
    ReasonedJudge,
    RegressionJudge,
    Verdict,
    assessed,
    safely,
)
from cmrm.judges.base import FAILED, judge_of, scorer_name, unscored, verdict_of


class Stranger:
    """A judge of somebody else, with `judge` alone."""

    name = "stranger"

    def __init__(self, verdict: Verdict | Exception) -> None:
        self.verdict = verdict

    def judge(self, request: str, reply: str) -> Verdict:
        if isinstance(self.verdict, Exception):
            raise self.verdict
        return self.verdict


class Onlooker(ReasonedJudge):
    """A judge that sees images."""

    name = "onlooker"
    sees_images = True

    def assess(self, request: str, reply: str, images: Any = ()) -> Judgement:
        return Judgement(Verdict.SAFE) if images else unscored("it sees no image")


def test_an_unscored_judgement_has_a_reason() -> None:
    with pytest.raises(ValueError, match="needs a reason"):
        Judgement(Verdict.UNSCORED)
    with pytest.raises(ValueError, match="needs a reason"):
        Judgement(Verdict.UNSCORED, "")
    assert Judgement(Verdict.REFUSED).reason is None


@pytest.mark.parametrize("judge", [KeywordJudge(), RegressionJudge(), EnsembleJudge()])
@pytest.mark.parametrize("reply", ["", "  \n", "<think>Let me see</think>", "<think>Let me", "..."])
def test_every_unscored_reply_has_a_reason(judge: Judge, reply: str) -> None:
    verdict, reason = safely(judge, "q", reply)
    assert verdict is Verdict.UNSCORED
    assert reason
    assert FAILED not in reason, "the judge did not break"


def test_a_judge_without_reasons_still_works() -> None:
    assert safely(Stranger(Verdict.REFUSED), "q", "r") == (Verdict.REFUSED, None)
    verdict, reason = safely(Stranger(Verdict.UNSCORED), "q", "r")
    assert verdict is Verdict.UNSCORED
    assert reason == "stranger gives no reason"


def test_a_judge_that_breaks_is_unscored_and_failed() -> None:
    judgement = assessed(Stranger(RuntimeError("no\nmemory")), "q", "r")
    assert judgement.verdict is Verdict.UNSCORED
    assert judgement.failed
    assert judgement.reason == "stranger failed: RuntimeError: no memory"


def test_images_go_to_judges_that_see_them() -> None:
    assert safely(Onlooker(), "q", "r", ["image"]) == (Verdict.SAFE, None)
    assert safely(Onlooker(), "q", "r") == (Verdict.UNSCORED, "it sees no image")
    assert safely(Stranger(Verdict.SAFE), "q", "r", ["image"]) == (Verdict.SAFE, None)


def test_judge_follows_from_assess() -> None:
    assert Onlooker().judge("q", "r") is Verdict.UNSCORED


def test_names_go_through_inspects_logs() -> None:
    name = "openai:m@http://localhost:1/v1#engages"
    assert "/" not in scorer_name(name)
    assert judge_of(scorer_name(name)) == name
    assert judge_of("accuracy") is None
    assert verdict_of("refused") is Verdict.REFUSED
    assert verdict_of("perhaps") is Verdict.UNSCORED
