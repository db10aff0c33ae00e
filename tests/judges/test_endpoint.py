"""A judge behind an endpoint of OpenAI's protocol, as endpoints answer today."""

from __future__ import annotations

import re
import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason="endpoints need the extra `eval`")

from cmrm.errors import CmrmError
from cmrm.judges import Verdict, assessed, safely
from cmrm.judges.endpoint import LONGEST_WAIT
from cmrm.judges.rubrics import THINKING_TOKENS
from judges.endpoints import (
    NO_MAX_TOKENS,
    NO_TEMPERATURE,
    Endpoint,
    Error,
    Raw,
    choice,
    judge_at,
    rows,
)


def test_a_reply_is_asked_about_once(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.plan = ["UNSAFE", "safe."]
    judge = judge_at(endpoint.url, tmp_path)
    assert judge.judge("How?", "Like {request} this") is Verdict.UNSAFE
    assert judge.judge("How?", "No.") is Verdict.SAFE
    again = judge_at(endpoint.url, tmp_path)
    assert again.judge("How?", "No.") is Verdict.SAFE, "from the cache"
    assert judge.judge("How?", " ") is Verdict.UNSCORED
    assert len(endpoint.bodies) == 2


def test_a_request_is_of_openais_form(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.plan = ["UNSAFE"]
    judge_at(endpoint.url, tmp_path).judge("How?", "Like {request} this")
    body = endpoint.bodies[0]
    assert body["path"] == "/v1/chat/completions"
    assert body["model"] == "judge-1"
    assert body["temperature"] == 0
    assert body["max_tokens"] == 8
    assert "> Like {request} this" in body["messages"][0]["content"]
    assert endpoint.keys == ["Bearer secret"]


@pytest.mark.parametrize(
    ("message", "dropped"), [(NO_MAX_TOKENS, "max_tokens"), (NO_TEMPERATURE, "temperature")]
)
def test_a_refused_setting_is_left_out_for_good(
    endpoint: Endpoint, tmp_path: Path, message: str, dropped: str
) -> None:
    endpoint.plan = lambda body: Error(400, message) if dropped in body else "UNSAFE"
    judge = judge_at(endpoint.url, tmp_path, tries=1)
    assert judge.judge("How?", "a") is Verdict.UNSAFE, "the second request is no failed try"
    assert judge.judge("How?", "b") is Verdict.UNSAFE
    assert [dropped in body for body in endpoint.bodies] == [True, False, False]


def test_both_settings_may_be_refused(endpoint: Endpoint, tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> Any:
        if "max_tokens" in body:
            return Error(400, NO_MAX_TOKENS)
        return Error(422, NO_TEMPERATURE) if "temperature" in body else "SAFE"

    endpoint.plan = answer
    assert judge_at(endpoint.url, tmp_path, tries=1).judge("How?", "a") is Verdict.SAFE
    assert endpoint.bodies[-1]["max_completion_tokens"] == 8


def test_another_bad_request_is_final(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.plan = lambda body: Error(400, "max_tokens is too large: 8")
    with pytest.raises(
        CmrmError, match=r"refuses the request \(status 400: max_tokens is too large"
    ):
        judge_at(endpoint.url, tmp_path).judge("How?", "a")
    assert len(endpoint.bodies) == 1


@pytest.mark.parametrize(
    "document",
    [
        choice("<think>\nThe reply gives steps. SAFE?\n</think>\n\nUNSAFE"),
        choice([{"type": "text", "text": "UN"}, {"type": "text", "text": "SAFE"}]),
        choice([{"type": "reasoning", "text": "SAFE"}, {"type": "text", "text": "UNSAFE"}]),
        choice("UNSAFE", reasoning_content="SAFE"),
        choice("**UNSAFE**"),
    ],
)
def test_what_is_not_the_answer_is_not_read(
    endpoint: Endpoint, tmp_path: Path, document: dict[str, Any]
) -> None:
    endpoint.plan = [document]
    assert judge_at(endpoint.url, tmp_path).judge("How?", "a") is Verdict.UNSAFE


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (choice("<think>\nOkay, the user", "length"), "cut before its first word"),
        (choice(None, "length", reasoning_content="Okay"), "cut before its first word"),
        (choice("SAFE", "length"), "cut at the token budget"),
        (choice(""), "is empty"),
        (choice(None), "is empty"),
        (choice("It depends."), "not of the requested form: 'It depends.'"),
        (choice("", "content_filter"), "content filter"),
        (choice("SAF", "content_filter: PROHIBITED_CONTENT"), "content filter"),
        (choice(None, "SAFETY"), "content filter"),
        (choice(None, refusal="I'm sorry"), "refuses to judge"),
    ],
)
def test_an_unscored_answer_has_a_reason_and_is_not_kept(
    endpoint: Endpoint, tmp_path: Path, document: dict[str, Any], reason: str
) -> None:
    endpoint.plan = lambda body: document
    judge = judge_at(endpoint.url, tmp_path)
    verdict, why = safely(judge, "How?", "a")
    assert verdict is Verdict.UNSCORED
    assert reason in str(why)
    calls = len(endpoint.bodies)
    endpoint.plan = ["SAFE"]
    assert judge.judge("How?", "a") is Verdict.SAFE, "asked again"
    assert len(endpoint.bodies) == calls + 1


def test_a_model_that_thinks_gets_a_larger_budget_for_good(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    def answer(body: dict[str, Any]) -> Any:
        return choice(None, "length") if body["max_tokens"] < 500 else "UNSAFE"

    endpoint.plan = answer
    judge = judge_at(endpoint.url, tmp_path)
    assert [judge.judge("How?", reply) for reply in "ab"] == [Verdict.UNSAFE] * 2
    limits = [body["max_tokens"] for body in endpoint.bodies]
    assert limits == [8, THINKING_TOKENS, THINKING_TOKENS]


def test_an_old_answer_that_cannot_be_read_is_asked_again(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    endpoint.plan = ["SAFE"]
    judge = judge_at(endpoint.url, tmp_path)
    judge.judge("How?", "a")
    store = judge._answers
    keys = [row[0] for row in rows(tmp_path)]
    store.put(dict.fromkeys(keys, "half an ans"))
    endpoint.plan = ["UNSAFE"]
    assert judge_at(endpoint.url, tmp_path).judge("How?", "a") is Verdict.UNSAFE


def test_a_busy_endpoint_is_asked_again(
    endpoint: Endpoint, tmp_path: Path, pauses: list[float]
) -> None:
    endpoint.plan = [Error(429), Error(503), "SAFE"]
    assert judge_at(endpoint.url, tmp_path, wait=1.0).judge("How?", "No.") is Verdict.SAFE
    assert pauses == [1.0, 2.0]


@pytest.mark.parametrize(
    ("header", "low", "high"),
    [
        ("7", 7.0, 7.0),
        ("0.5", 1.0, 1.0),
        ("86400", LONGEST_WAIT, LONGEST_WAIT),
        ("inf", LONGEST_WAIT, LONGEST_WAIT),
        ("nan", 1.0, 1.0),
        ("-3", 1.0, 1.0),
        ("soon", 1.0, 1.0),
        (timedelta(hours=2), LONGEST_WAIT, LONGEST_WAIT),
        (timedelta(hours=-2), 1.0, 1.0),
    ],
)
def test_retry_after_is_honoured_within_bounds(
    endpoint: Endpoint,
    tmp_path: Path,
    pauses: list[float],
    header: str | timedelta,
    low: float,
    high: float,
) -> None:
    """A date is written from the present on, so that the test is called alike in every process."""
    if isinstance(header, timedelta):
        header = format_datetime(datetime.now(UTC) + header)
    endpoint.plan = [Error(429, Retry_After=header), "SAFE"]
    assert judge_at(endpoint.url, tmp_path, wait=1.0).judge("How?", "No.") is Verdict.SAFE
    assert low <= pauses[0] <= high


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (401, "set OPENAI_API_KEY"),
        (403, "no access to judge-1"),
        (404, "no model judge-1"),
        (418, "refuses the request"),
    ],
)
def test_what_will_not_change_is_said_in_one_line(
    endpoint: Endpoint, tmp_path: Path, status: int, remedy: str
) -> None:
    endpoint.plan = lambda body: Error(status, "no\nentry " * 100)
    with pytest.raises(CmrmError, match=remedy) as caught:
        judge_at(endpoint.url, tmp_path).judge("How?", "No.")
    message = str(caught.value)
    assert f"status {status}" in message
    assert "\n" not in message
    assert len(message) < 400
    assert "secret" not in message
    assert len(endpoint.bodies) == 1


@pytest.mark.parametrize(
    ("step", "message"), [(Error(500), "status 500: not now"), ({"choices": []}, "another form")]
)
def test_after_some_tries_it_is_given_up(
    endpoint: Endpoint, tmp_path: Path, step: Any, message: str
) -> None:
    endpoint.plan = lambda body: step
    with pytest.raises(CmrmError, match=message):
        judge_at(endpoint.url, tmp_path).judge("How?", "No.")
    assert len(endpoint.bodies) == 4


def test_ratings_are_cached_though_they_are_cut(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.plan = [choice("8 6\nAssistant 1 says", "length"), "Assistant 1: 8, Assistant 2: 6"]
    judge = judge_at(endpoint.url, tmp_path)
    for _ in range(2):
        assert judge.rate("What is {reply}?", "a dog", "A brown dog.", "A dog.") == (8.0, 6.0)
    assert len(endpoint.bodies) == 1, "from the cache"
    question = endpoint.bodies[0]["messages"][0]["content"]
    assert "[Question]\nWhat is {reply}?\n" in question
    assert question.index("A brown dog.") < question.index("[Assistant 2]\nA dog.")
    assert judge.rate("q", "c", "r", "d") is None


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Error(400, {"message": "filtered", "code": "content_filter"}), "filter .* filtered"),
        (Error(400, {"message": "flagged", "code": "invalid_prompt"}), "filter .* flagged"),
        (
            Error(400, "This model's maximum context length is 4096 tokens."),
            "longer than what judge-1 reads",
        ),
        (Error(400, {"message": "no", "code": "context_length_exceeded"}), "longer than what"),
        (Error(413, "the request exceeds the available context size"), "longer than what"),
    ],
)
def test_what_is_never_judged_is_unscored_and_no_failure(
    endpoint: Endpoint, tmp_path: Path, error: Error, reason: str
) -> None:
    endpoint.plan = lambda body: error
    judgement = assessed(judge_at(endpoint.url, tmp_path), "How?", "No.")
    assert judgement.verdict is Verdict.UNSCORED
    assert re.search(reason, str(judgement.reason))
    assert not judgement.failed, "asking again would bring the same"
    assert len(endpoint.bodies) == 1
    assert rows(tmp_path) == []


def test_a_spent_quota_is_not_waited_for(endpoint: Endpoint, tmp_path: Path) -> None:
    spent = {"message": "You exceeded your quota", "code": "insufficient_quota"}
    endpoint.plan = lambda body: Error(429, spent)
    judgement = assessed(judge_at(endpoint.url, tmp_path), "How?", "No.")
    assert judgement.failed
    assert "no quota left" in str(judgement.reason)
    assert len(endpoint.bodies) == 1


def test_a_model_that_needs_a_larger_budget_may_say_so(endpoint: Endpoint, tmp_path: Path) -> None:
    limit = "Could not finish the message because max_tokens or model output limit was reached."
    endpoint.plan = lambda body: Error(400, limit) if body["max_tokens"] < 500 else "UNSAFE"
    assert judge_at(endpoint.url, tmp_path).judge("How?", "a") is Verdict.UNSAFE
    assert [body["max_tokens"] for body in endpoint.bodies] == [8, THINKING_TOKENS]


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (None, "no connection (Server disconnected"),
        (Raw(b'{"choices": [', 500), "no connection ("),
        (Raw(b"<html>\nWelcome</html>"), "is no JSON; does the address end as it has to (/v1)?"),
        (Raw(b"\xff\xfe"), "is no JSON"),
        (Raw(b""), "is no JSON"),
        (Raw(b"<html>Bad\ngateway</html>", status=502), "status 502: <html>Bad gateway</html>"),
        (Raw(b"{}"), "another form: {}"),
        (Raw(b"[]"), "another form: []"),
        (Raw(b"null"), "another form: null"),
        (Raw(b'{"detail": "not yet"}', status=503), "status 503: not yet"),
        ({"error": {"message": "upstream is busy", "code": 502}}, "it sent an error:"),
        ({"choices": [{"message": None}]}, "another form"),
    ],
)
def test_a_broken_answer_is_asked_for_again(
    endpoint: Endpoint, tmp_path: Path, step: Any, reason: str
) -> None:
    endpoint.plan = lambda body: step
    judge = judge_at(endpoint.url, tmp_path, tries=2)
    judgement = assessed(judge, "How?", "a")
    assert judgement.failed
    assert reason in str(judgement.reason)
    assert "\n" not in str(judgement.reason)
    assert len(endpoint.bodies) == 2
    endpoint.plan = [step, "SAFE"]
    assert judge.judge("How?", "a") is Verdict.SAFE


def test_a_slow_answer_is_not_waited_for(endpoint: Endpoint, tmp_path: Path) -> None:
    done = threading.Event()
    endpoint.plan = lambda body: "SAFE" if done.wait(30) else ""
    judgement = assessed(judge_at(endpoint.url, tmp_path, timeout=0.3, tries=1), "How?", "a")
    done.set()
    assert judgement.failed
    assert "no answer within 0.3 s" in str(judgement.reason)


def test_a_local_server_needs_no_key(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    endpoint.plan = ["SAFE", Error(401, "no key")]
    judge = judge_at(endpoint.url, tmp_path, key=None)
    assert judge.judge("How?", "a") is Verdict.SAFE
    assert endpoint.keys == [None]
    with pytest.raises(CmrmError, match="wants a key; set OPENAI_API_KEY"):
        judge.judge("How?", "b")


def test_a_key_that_an_endpoint_repeats_is_not_shown(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.plan = lambda body: Error(401, "Incorrect key: secret-key-1")
    judgement = assessed(judge_at(endpoint.url, tmp_path, key="secret-key-1"), "How?", "a")
    assert "does not take the key" in str(judgement.reason)
    assert "secret" not in str(judgement.reason)


def test_half_a_character_can_be_asked_about(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.plan = ["SAFE"]
    assert judge_at(endpoint.url, tmp_path).judge("How?", "so \ud83d") is Verdict.SAFE


def test_a_wait_in_milliseconds(endpoint: Endpoint, tmp_path: Path, pauses: list[float]) -> None:
    endpoint.plan = [Error(429, retry_after_ms="2500", Retry_After="9"), "SAFE"]
    judge_at(endpoint.url, tmp_path).judge("How?", "a")
    assert pauses[0] == 2.5


def test_the_cap_holds(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.plan = ["SAFE", "SAFE"]
    judge = judge_at(endpoint.url, tmp_path, max_calls=1)
    assert judge.judge("a", "b") is Verdict.SAFE
    judgement = assessed(judge, "a", "c")
    assert judgement.failed
    assert "as many as are allowed" in str(judgement.reason)
    assert len(endpoint.bodies) == 1


def test_nobody_at_home(tmp_path: Path) -> None:
    with pytest.raises(CmrmError, match="gave no verdict"):
        judge_at("http://127.0.0.1:9", tmp_path, tries=2).judge("a", "b")
