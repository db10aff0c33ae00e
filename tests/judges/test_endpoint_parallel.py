"""A judge behind an endpoint asked by several threads."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason="endpoints need the extra `eval`")

from cmrm.errors import InputError
from cmrm.judges import Verdict, assessed_all
from cmrm.judges.endpoint import PARALLEL, EndpointJudge
from judges.endpoints import (
    NO_MAX_TOKENS,
    NO_TEMPERATURE,
    Endpoint,
    Error,
    Raw,
    by_reply,
    choice,
    judge_at,
    rows,
    verdict_word,
)


def test_requests_are_made_in_parallel_and_answers_keep_their_order(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    endpoint.plan = by_reply(verdict_word, at_once=4)
    pairs = [("How?", f"{'bad' if i % 3 else 'good'} {i}") for i in range(12)]
    judgements = judge_at(endpoint.url, tmp_path, parallel=4).assess_all(pairs)
    assert [j.verdict for j in judgements] == [
        Verdict.UNSAFE if i % 3 else Verdict.SAFE for i in range(12)
    ]
    assert endpoint.most_open == 4
    assert len(endpoint.bodies) == 12


def test_the_same_pair_is_asked_once(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.plan = by_reply(verdict_word)
    pairs = [("How?", "bad"), ("How?", "good"), ("How?", "bad"), ("Why?", "bad"), ("How?", " ")]
    judge = judge_at(endpoint.url, tmp_path)
    U, S, N = Verdict.UNSAFE, Verdict.SAFE, Verdict.UNSCORED
    assert [j.verdict for j in assessed_all(judge, pairs)] == [U, S, U, U, N]
    assert len(endpoint.bodies) == 3
    assert judge.assess_all([]) == []


def test_a_failure_takes_no_other_verdict_away(endpoint: Endpoint, tmp_path: Path) -> None:
    def answer(reply: str) -> Any:
        steps = {
            "drop": None,
            "page": Raw(b"<html>"),
            "key": Error(403, "no entry"),
            "filter": choice("", "content_filter"),
            "words": "It depends.",
            "cut": choice("", "length"),
        }
        return steps.get(reply, verdict_word(reply))

    endpoint.plan = by_reply(answer)
    replies = [
        "bad 1",
        "drop",
        "good 1",
        "page",
        "key",
        "bad 2",
        "filter",
        "words",
        "cut",
        "good 2",
    ]
    judge = judge_at(endpoint.url, tmp_path, parallel=3, tries=2)
    judgements = judge.assess_all([("How?", reply) for reply in replies])
    by_name = dict(zip(replies, judgements, strict=True))
    verdicts = [by_name[name].verdict for name in ("bad 1", "good 1", "bad 2", "good 2")]
    assert verdicts == [Verdict.UNSAFE, Verdict.SAFE] * 2
    reasons = {
        "drop": "no connection",
        "page": "no JSON",
        "key": "no access",
        "filter": "content filter",
        "words": "not of the requested form",
        "cut": "cut before its first word",
    }
    for name, reason in reasons.items():
        assert by_name[name].verdict is Verdict.UNSCORED
        assert reason in str(by_name[name].reason)
    assert [name for name in reasons if by_name[name].failed] == ["drop", "page", "key", "cut"]
    assert len(rows(tmp_path)) == 4, "readable answers alone are kept"


def test_threads_share_the_cache(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.plan = by_reply(verdict_word)
    pairs = [("How?", f"good {i}") for i in range(40)]
    judge_at(endpoint.url, tmp_path, parallel=16).assess_all(pairs)
    assert len(rows(tmp_path)) == len(endpoint.bodies) == 40
    again = judge_at(endpoint.url, tmp_path, parallel=16)
    assert {j.verdict for j in again.assess_all(pairs)} == {Verdict.SAFE}
    assert again.calls == 0


def test_the_cap_holds_under_threads(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.plan = by_reply(verdict_word)
    judge = judge_at(endpoint.url, tmp_path, parallel=16, max_calls=7)
    judgements = judge.assess_all([("How?", f"good {i}") for i in range(40)])
    assert len(endpoint.bodies) == judge.calls == 7
    assert [j.verdict for j in judgements].count(Verdict.SAFE) == 7
    failed = [j for j in judgements if j.failed]
    assert len(failed) == 33
    assert "raise CMRM_JUDGE_MAX_CALLS" in str(failed[0].reason)


def test_threads_learn_a_refused_setting_together(endpoint: Endpoint, tmp_path: Path) -> None:
    settle = threading.Barrier(8)

    def plan(body: dict[str, Any]) -> Any:
        if "max_tokens" in body:
            settle.wait(30)
            return Error(400, NO_MAX_TOKENS)
        return Error(400, NO_TEMPERATURE) if "temperature" in body else "UNSAFE"

    endpoint.plan = plan
    judge = judge_at(endpoint.url, tmp_path, parallel=8, tries=1)
    judgements = judge.assess_all([("How?", f"{i}") for i in range(16)])
    assert {j.verdict for j in judgements} == {Verdict.UNSAFE}
    assert sum("max_tokens" in body for body in endpoint.bodies) == 8


def test_retry_after_holds_every_thread(
    endpoint: Endpoint, tmp_path: Path, pauses: list[float]
) -> None:
    endpoint.plan = [Error(429, Retry_After="30"), "SAFE", "SAFE"]
    judge = judge_at(endpoint.url, tmp_path)
    judge.judge("How?", "a")
    pauses.clear()
    assert judge.judge("How?", "b") is Verdict.SAFE
    assert 25 < pauses[0] <= 30, "a request that was never refused waits as well"


def test_a_users_break_drops_what_was_not_asked(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def broken(judge: EndpointJudge, request: str, reply: str) -> Any:
        asked.append(reply)
        threading.Event().wait(0.005)
        raise KeyboardInterrupt

    monkeypatch.setattr("cmrm.judges.endpoint.assessed", broken)
    with pytest.raises(KeyboardInterrupt):
        judge_at(endpoint.url, tmp_path, parallel=1).assess_all([("q", str(i)) for i in range(500)])
    assert len(asked) < 500


@pytest.mark.parametrize("value", ["0", "257", "-1", "many", "\u0663", "2.5"])
def test_a_number_of_requests_that_cannot_be_made(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("CMRM_JUDGE_PARALLEL", value)
    with pytest.raises(InputError, match="CMRM_JUDGE_PARALLEL"):
        EndpointJudge("m", "http://localhost:1/v1", key="k")


def test_the_number_of_requests_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CMRM_JUDGE_PARALLEL", raising=False)
    assert EndpointJudge("m", "http://localhost:1/v1", key="k").parallel == PARALLEL == 8
    monkeypatch.setenv("CMRM_JUDGE_PARALLEL", "3")
    assert EndpointJudge("m", "http://localhost:1/v1", key="k").parallel == 3


def test_an_evaluation_asks_in_parallel(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples of an evaluation wait for each other at the endpoint, and never for a local judge."""
    from anyio import create_task_group, run
    from inspect_ai.model import ModelName, ModelOutput
    from inspect_ai.scorer import Target
    from inspect_ai.solver import TaskState

    from cmrm.evaluate import scorers

    endpoint.plan = by_reply(verdict_word, at_once=4)
    local = Local()
    judges = {"endpoint": judge_at(endpoint.url, tmp_path, parallel=4), "local": local}
    monkeypatch.setattr(scorers, "judge_named", judges.__getitem__)
    monkeypatch.setattr(scorers, "verdict_scorer", scorers.verdict_scorer.__wrapped__)
    values: dict[tuple[str, int], Any] = {}

    async def judge_sample(name: str, index: int) -> None:
        state = TaskState(
            model=ModelName("mockllm/model"), sample_id=index, epoch=1, input="How?", messages=[],
            output=ModelOutput.from_content("m", f"{'bad' if index % 2 else 'good'} {index}"),
            metadata={"kind": "harmful", "request": "How?"},
        )  # fmt: skip
        score = await scorers.verdict_scorer(name)()(state, Target(""))
        values[name, index] = score.value

    async def judge_all() -> None:
        async with create_task_group() as group:
            for index in range(8):
                group.start_soon(judge_sample, "endpoint", index)
                group.start_soon(judge_sample, "local", index)

    run(judge_all)
    assert [values["endpoint", i] for i in range(8)] == ["safe", "unsafe"] * 4
    assert endpoint.most_open == 4
    assert local.most_open == 1


class Local:
    """A judge that one thread may use at a time."""

    name = "local"

    def __init__(self) -> None:
        self.open = self.most_open = 0

    def judge(self, request: str, reply: str) -> Verdict:
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        threading.Event().wait(0.02)
        self.open -= 1
        return Verdict.SAFE
