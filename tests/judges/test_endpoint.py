"""A judge behind an endpoint of OpenAI's protocol, as endpoints answer today."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cmrm.errors import CmrmError
from cmrm.judges import Verdict, assessed, safely
from cmrm.judges.endpoint import LONGEST_WAIT, EndpointJudge
from cmrm.judges.rubrics import THINKING_TOKENS

NO_MAX_TOKENS = (
    "Unsupported parameter: 'max_tokens' is not supported with this model. "
    "Use 'max_completion_tokens' instead."
)
NO_TEMPERATURE = "Unsupported value: 'temperature' does not support 0 with this model."


class Error:
    """An answer with a status, an error message and headers."""

    def __init__(self, status: int, message: str = "not now", **headers: str) -> None:
        self.status, self.message, self.headers = status, message, headers


def choice(content: Any, finish: str = "stop", **message: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"content": content, **message}, "finish_reason": finish}]}


class Endpoint:
    """A server that answers each request by `plan`: an error, a document, or the content of one."""

    def __init__(self) -> None:
        self.plan: list[Any] | Callable[[dict[str, Any]], Any] = []
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.bodies.append({"path": self.path, **body})
                outer.keys.append(str(self.headers["Authorization"]))
                step = outer.plan(body) if callable(outer.plan) else outer.plan.pop(0)
                error = step if isinstance(step, Error) else None
                self.send_response(error.status if error else 200)
                for name, value in (error.headers if error else {}).items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                if error:
                    document: Any = {"error": {"message": error.message}}
                else:
                    document = step if isinstance(step, dict) else choice(step)
                self.wfile.write(json.dumps(document).encode())

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint()
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses that the judge makes, in seconds; none is waited for."""
    seconds: list[float] = []
    monkeypatch.setattr("cmrm.judges.endpoint.time.sleep", seconds.append)
    return seconds


def judge_at(url: str, tmp_path: Path, **options: Any) -> EndpointJudge:
    settings: dict[str, Any] = {"key": "secret", "wait": 0.0, **options}
    return EndpointJudge("judge-1", url, cache=tmp_path / "judge.db", **settings)


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
    keys = [row[0] for row in _rows(tmp_path)]
    store.put(dict.fromkeys(keys, "half an ans"))
    endpoint.plan = ["UNSAFE"]
    assert judge_at(endpoint.url, tmp_path).judge("How?", "a") is Verdict.UNSAFE


def _rows(tmp_path: Path) -> list[tuple[str]]:
    import sqlite3

    with sqlite3.connect(tmp_path / "judge.db") as connection:
        return connection.execute("SELECT key FROM texts").fetchall()


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
        (format_datetime(datetime.now(UTC) + timedelta(hours=2)), LONGEST_WAIT, LONGEST_WAIT),
        (format_datetime(datetime.now(UTC) - timedelta(hours=2)), 1.0, 1.0),
    ],
)
def test_retry_after_is_honoured_within_bounds(
    endpoint: Endpoint,
    tmp_path: Path,
    pauses: list[float],
    header: str,
    low: float,
    high: float,
) -> None:
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
