"""Scorers, and how logs are read into outcomes."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("inspect_ai", reason="evaluation needs the extra `eval`")

from inspect_ai.log import EvalConfig, EvalDataset, EvalLog, EvalSample, EvalSpec
from inspect_ai.model import ModelOutput
from inspect_ai.scorer import SampleScore, Score

from cmrm.evaluate.logs import cell_of
from cmrm.evaluate.scorers import judged, rating_share, ratings_of, share
from cmrm.judges import Judgement, KeywordJudge, Verdict
from cmrm.judges.base import scorer_name
from cmrm.measure.answers import EXACT
from cmrm.measure.table import RATING


class Broken:
    name = "broken"

    def judge(self, request: str, reply: str) -> Verdict:
        raise ValueError("no idea")


def test_a_judge_that_fails_is_unscored() -> None:
    reason = "broken failed: ValueError: no idea"
    assert judged(Broken(), "q", "r") == Judgement(Verdict.UNSCORED, reason, failed=True)


def test_a_judge_that_cannot_tell_has_not_failed() -> None:
    judgement = judged(KeywordJudge(), "q", "")
    assert (judgement.verdict, judgement.failed) == (Verdict.UNSCORED, False)
    assert judgement.reason


def test_an_image_that_cannot_be_read_leaves_the_reply_unscored() -> None:
    judgement = judged(KeywordJudge(), "q", "r", ["data:image/png;base64,AAAA"])
    assert (judgement.verdict, judgement.failed) == (Verdict.UNSCORED, True)


def scored(kind: str, value: str) -> SampleScore:
    return SampleScore(score=Score(value=value), sample_metadata={"kind": kind})


def test_shares_are_of_one_kind_and_of_what_was_scored() -> None:
    scores = [
        scored("harmful", "complied"), scored("harmful", "refused"), scored("harmful", "unscored"),
        scored("benign", "refused"), scored("utility", "C"), scored("utility", "I"),
    ]  # fmt: skip
    metrics: Any = {name: share(*name) for name in (
        ("harmful", "complied"), ("benign", "refused"), ("utility", "C"), ("open", "complied"),
    )}  # fmt: skip
    values = {kind: compute(scores) for (kind, _), compute in metrics.items()}
    assert (values["harmful"], values["benign"], values["utility"]) == (0.5, 1.0, 0.5)
    assert values["open"] != values["open"], "NaN without any"


def test_ratings() -> None:
    assert ratings_of("8 4.5") == (8.0, 4.5)
    assert ratings_of("unscored") is None
    metric: Any = rating_share()
    assert metric([scored("open", "8 4"), scored("open", "unscored")]) == 50.0


def log_of(**scores: Score) -> EvalLog:
    sample = EvalSample(
        id="s1", epoch=1, input="?", target="", scores=dict(scores),
        output=ModelOutput.from_content("m", "a reply"),
        metadata={"kind": "harmful", "category": "theft", "request": "How?"},
    )  # fmt: skip
    failed = sample.model_copy(update={"id": "s2", "error": {"message": "x"}})
    unreached = sample.model_copy(update={"id": "s3", "scores": {}})
    metadata = {
        "set": {"name": "mine", "n": 3, "harm": "text"}, "condition": "original",
        "settings": {"alpha": 0.5},
    }  # fmt: skip
    spec = EvalSpec(
        created="2026-01-01T00:00:00Z", task="t", dataset=EvalDataset(), model="m",
        config=EvalConfig(), metadata=metadata,
    )  # fmt: skip
    return EvalLog(eval=spec, samples=[sample, failed, unreached])


def test_a_log_is_read_into_outcomes() -> None:
    cell = cell_of(
        log_of(**{
            scorer_name("keyword"): Score(value="refused"),
            scorer_name("guard:k=org/m"): Score(
                value="unscored", explanation="broke", metadata={"failed": True}
            ),
            scorer_name("ensemble"): Score(value="unscored", explanation="they differ"),
            scorer_name("chat:m"): Score(value="not asked"),
            "cmrm_exact": Score(value="not asked"),
            "cmrm_rating": Score(value="8 4"),
        }),
        "ecso",
    )  # fmt: skip
    assert (cell.key, cell.expected, cell.harm) == (("mine", "original", "ecso"), 3, "text")
    assert cell.settings == {"alpha": 0.5}
    assert list(cell.outcomes) == ["s1"], "a sample that failed is missing, not safe"
    outcome = cell.outcomes["s1"]
    assert outcome.verdicts == {
        "keyword": "refused", "guard:k=org/m": "unscored", "ensemble": "unscored",
    }  # fmt: skip
    assert outcome.failed == {"guard:k=org/m": "broke"}
    assert outcome.reasons == {"ensemble": "they differ"}
    assert outcome.scores == {RATING: (8.0, 4.0)}
    assert EXACT not in outcome.scores
    assert (outcome.kind, outcome.category, outcome.request, outcome.reply) == (
        "harmful", "theft", "How?", "a reply",
    )  # fmt: skip
