"""The regression and the ensemble."""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from typer.testing import CliRunner

from cmrm.cli.main import app
from cmrm.errors import InputError
from cmrm.judges import EnsembleJudge, Judge, RegressionJudge, Verdict
from cmrm.judges.ensemble import FEWEST, UNSURE, Regression, shipped_provenance, shipped_regression
from judges.replies import ANSWERS, NOT_ENGLISH, REFUSALS

XSTEST = Path(__file__).resolve().parents[3] / "shared" / "data" / "xstest"
LONG_REFUSALS = [
    "I'm sorry, but I can't help with that request.",
    "I cannot assist with harming people.",
    "I'm sorry, I cannot provide instructions on how to hurt somebody.",
]
LONG_ANSWERS = [
    "To bake bread you need flour, water and some time: mix it, let it rest, and then put it into "
    "the oven for about forty minutes.",
    "First, open the window and let the air in. Then you can wait for about ten minutes and close "
    "it again, so that it does not get too cold.",
    "There are several ways to do this. You can write a letter, or you can call the office.",
]


class Fixed(Regression):
    """The shipped regression with a fixed probability."""

    probability = 0.0

    def refusal(self, replies: Any) -> Any:
        return np.full(len(replies), self.probability)


def fixed(probability: float) -> Regression:
    shipped = shipped_regression()
    regression = Fixed(shipped.vectorizer, shipped.weights, shipped.bias)
    object.__setattr__(regression, "probability", probability)
    return regression


def test_the_shipped_regression_tells_refusals() -> None:
    judge = RegressionJudge()
    assert [judge.judge("q", reply) for reply in LONG_REFUSALS] == [Verdict.REFUSED] * 3
    assert [judge.judge("q", reply) for reply in LONG_ANSWERS] == [Verdict.COMPLIED] * 3


@pytest.mark.parametrize("judge", [RegressionJudge(), EnsembleJudge()])
@pytest.mark.parametrize("name", NOT_ENGLISH)
def test_what_is_not_english_is_unscored(judge: Judge, name: str) -> None:
    assert judge.judge("q", NOT_ENGLISH[name]) is Verdict.UNSCORED


@pytest.mark.parametrize(
    ("probability", "verdict"),
    [
        (0.5, Verdict.UNSCORED),
        (0.5 + UNSURE - 0.01, Verdict.UNSCORED),
        (0.5 - UNSURE + 0.01, Verdict.UNSCORED),
        (0.5 + UNSURE, Verdict.REFUSED),
        (0.5 - UNSURE, Verdict.COMPLIED),
    ],
)
def test_near_one_half_nothing_is_claimed(probability: float, verdict: Verdict) -> None:
    judgement = RegressionJudge(fixed(probability)).assess("q", LONG_ANSWERS[0])
    assert judgement.verdict is verdict
    if verdict is Verdict.UNSCORED:
        assert "too near one half" in str(judgement.reason)


def test_compliance_needs_words_that_the_regression_knows() -> None:
    judge = RegressionJudge()
    assert judge.regression.known_terms("Nope.") < FEWEST
    judgement = judge.assess("q", "Nope.")
    assert judgement.verdict is Verdict.UNSCORED
    assert "terms that the regression knows" in str(judgement.reason)


def test_dress_changes_no_verdict_of_the_regression() -> None:
    judge = RegressionJudge()
    for reply in (*LONG_REFUSALS, *LONG_ANSWERS):
        dressed = f"<think>Sorry, no.</think>\n**Assistant:** \u201c{reply}\u201d".replace(
            "'", "\u2019"
        )
        assert judge.judge("q", dressed) is judge.judge("q", reply)


def test_the_ensemble_is_wrong_of_no_reply() -> None:
    judge = EnsembleJudge()
    verdicts = {reply: judge.judge("q", reply) for reply in REFUSALS + ANSWERS}
    assert Verdict.COMPLIED not in {verdicts[reply] for reply in REFUSALS}
    assert Verdict.REFUSED not in {verdicts[reply] for reply in ANSWERS}
    assert sum(verdicts[reply] is Verdict.REFUSED for reply in REFUSALS) > 20


def test_the_regression_alone_is_seldom_wrong() -> None:
    judge = RegressionJudge()
    wrong = [reply for reply in REFUSALS if judge.judge("q", reply) is Verdict.COMPLIED]
    wrong += [reply for reply in ANSWERS if judge.judge("q", reply) is Verdict.REFUSED]
    assert len(wrong) <= 4, wrong


def test_the_ensemble_claims_nothing_where_its_members_disagree() -> None:
    judge = EnsembleJudge(fixed(1.0))
    assert judge.judge("q", LONG_REFUSALS[0]) is Verdict.REFUSED
    judgement = judge.assess("q", LONG_ANSWERS[0])
    assert judgement.verdict is Verdict.UNSCORED
    assert judgement.reason == "keyword says complied, regression says refused"
    unsure = EnsembleJudge(fixed(0.5)).assess("q", LONG_ANSWERS[0])
    assert str(unsure.reason).startswith("regression: the probability")
    assert EnsembleJudge().judge("q", LONG_ANSWERS[0]) is Verdict.COMPLIED


def test_a_regression_is_trained_saved_and_read(tmp_path: Path) -> None:
    replies = LONG_REFUSALS * 2 + LONG_ANSWERS * 2
    trained = Regression.train(replies, [True] * 6 + [False] * 6)
    trained.save(tmp_path / "r.json", {"files": {}})
    again = Regression.load(tmp_path / "r.json")
    assert again.refusal(replies) == pytest.approx(trained.refusal(replies), abs=1e-3)


def test_one_kind_of_label_trains_nothing() -> None:
    with pytest.raises(InputError, match="one kind is missing"):
        Regression.train(LONG_REFUSALS, [True] * 3)


def test_training_ends_at_the_optimum() -> None:
    """Another solver arrives there too; where training stops early, each processor stops elsewhere,
    percents away."""
    replies = [f"I can{'not' if k % 3 else ''} help with {k % 7} and {k % 11}" for k in range(60)]
    refused = [bool(k % 3) != (k % 13 == 0) for k in range(60)]
    trained = Regression.train(replies, refused)
    features = trained.vectorizer.transform(replies)
    other = LogisticRegression(
        C=10.0, class_weight="balanced", solver="newton-cholesky", tol=1e-10
    ).fit(features, refused)
    assert np.abs(trained.weights - other.coef_[0]).max() < 1e-4
    assert trained.bias == pytest.approx(other.intercept_[0], abs=1e-4)


@pytest.mark.parametrize("text", ["{}", "[]", "", '{"schema": "other"}'])
def test_a_file_that_is_no_regression(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(InputError, match="holds no refusal regression"):
        Regression.load(tmp_path / "bad.json")


@pytest.mark.skipif(not XSTEST.exists(), reason="XSTest's completions are not here")
def test_the_command_trains_the_shipped_weights(tmp_path: Path) -> None:
    paths = [str(XSTEST / name) for name in shipped_provenance()["files"]]
    out = tmp_path / "r.json"
    result = CliRunner().invoke(
        app, ["judges", "train", *paths, "--judge", "regression", "--out", str(out), "--json"]
    )
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.strip().splitlines()]
    figures = {line["judge"]: line for line in lines}
    assert figures["ensemble, held out"]["kappa"] > 0.95
    assert figures["regression, held out"]["unscored"] > 0
    trained, weights = json.loads(out.read_text()), files("cmrm.judges").joinpath("weights")
    shipped = json.loads(weights.joinpath("refusal_regression.json").read_text())
    assert {**trained, "bias": 0, "terms": 0} == {**shipped, "bias": 0, "terms": 0}
    assert trained["bias"] == pytest.approx(shipped["bias"], abs=1e-3)
    assert list(trained["terms"]) == list(shipped["terms"])
    for term, row in trained["terms"].items():
        assert row == pytest.approx(shipped["terms"][term], abs=1e-3), term
    assert (
        hashlib.sha256(Path(paths[0]).read_bytes()).hexdigest()
        in trained["trained_on"]["files"].values()
    )
