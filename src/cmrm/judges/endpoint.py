"""A judge behind an endpoint of OpenAI's chat protocol, with retries, a cache and a cap."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from http.client import HTTPException
from pathlib import Path
from typing import Any

from cmrm.errors import CmrmError, InputError
from cmrm.judges.rubrics import ModelAnswer, RubricJudge, T
from cmrm.store import TextStore

LONGEST_WAIT = 60.0
"""Seconds that an endpoint's Retry-After can ask for at most."""

_UNSUPPORTED = re.compile(
    r"unsupported|not supported|does not support|unrecognized|unknown|unexpected|not permitted"
    r"|not allowed|deprecated|extra (?:inputs|fields)|use 'max_completion_tokens'",
    re.IGNORECASE,
)


class EndpointJudge(RubricJudge):
    """`openai:MODEL@URL` or `openai:MODEL@URL#strongreject`; the key is read from `OPENAI_API_KEY`.

    Answers that could be read are cached on disk by model, rubric, request and reply. A judge makes
    at most `max_calls` requests (`CMRM_JUDGE_MAX_CALLS`); one more raises, which makes the reply
    unscored.
    """

    def __init__(
        self,
        model: str,
        url: str,
        *,
        rubric: str = "engages",
        key: str | None = None,
        max_calls: int | None = None,
        cache: Path | None = None,
        tries: int = 4,
        wait: float = 1.0,
        timeout: float = 120.0,
    ) -> None:
        """`tries` and `wait` (seconds, doubled each time) are for rate limits and lost connections.

        Raises:
            InputError: the address, the key, the rubric or the cap cannot be used.
        """
        super().__init__(rubric)
        if re.fullmatch(r"https?://[!-~]+", url) is None:
            raise InputError(
                f"{url!r} is no address of an endpoint; it begins with http:// or https://"
            )
        self.name = f"openai:{model}@{url}#{rubric}"
        self.model = model
        self.url = url.rstrip("/").removesuffix("/chat/completions")
        self.key = (key if key is not None else os.environ.get("OPENAI_API_KEY", "")).strip()
        if re.fullmatch("[!-~]*", self.key) is None:
            raise InputError("OPENAI_API_KEY holds blanks or characters that no key has")
        self.max_calls = max_calls if max_calls is not None else _allowed_calls()
        self.tries, self.wait, self.timeout = tries, wait, timeout
        self.calls = 0
        self.cache = cache
        self._limit = "max_tokens"
        self._settings: dict[str, Any] = {"temperature": 0}

    @cached_property
    def _answers(self) -> TextStore:
        """Answers on disk, opened when the first one is wanted."""
        from cmrm.files import cache_dir

        return TextStore(self.cache if self.cache is not None else cache_dir() / "judges.db")

    @classmethod
    def named(cls, rest: str) -> EndpointJudge:
        """The judge that the text behind `openai:` names.

        Raises:
            InputError: it is no MODEL@URL.
        """
        model, _, url = rest.partition("@")
        if not url or not model:
            raise InputError(f"openai:{rest} is no openai:MODEL@URL")
        address, mark, rubric = url.partition("#")
        return cls(model, address, rubric=rubric if mark else "engages")

    def read(
        self, question: str, max_tokens: int, parse: Callable[[ModelAnswer], T | None]
    ) -> tuple[T | None, ModelAnswer]:
        """As the base class; an answer that `parse` can read comes from the cache, or goes into it.

        Raises:
            CmrmError: as `ask`.
        """
        key = hashlib.sha256(f"{self.name}\x00{question}".encode()).hexdigest()
        text = self._answers.get(key)
        if text is not None:
            stored = ModelAnswer(text)
            result = parse(stored)
            if result is not None:
                return result, stored
        result, answer = super().read(question, max_tokens, parse)
        if result is not None:
            self._answers.put({key: answer.text})
        return result, answer

    def needs_more(self, answer: ModelAnswer) -> bool:
        """Whether the answer was cut: some endpoints count hidden thinking."""
        return answer.cut

    def ask(self, question: str, max_tokens: int) -> ModelAnswer:
        """The endpoint's answer.

        Raises:
            CmrmError: it cannot be reached, refuses or answers in another form; or the cap is
                reached.
        """
        problem, attempt = "", 0
        while attempt < self.tries:
            body = self._body(question, max_tokens)
            try:
                return _answer(self._post(body))
            except urllib.error.HTTPError as error:
                message = _message(error)
                problem = f"status {error.code}: {message}"
                if error.code in (400, 422) and self._adapt(message, body):
                    continue
                if error.code != 429 and error.code < 500:
                    raise CmrmError(self._refusal(error.code, problem)) from None
                pause = _retry_after(error.headers.get("Retry-After"))
            except (OSError, ValueError, HTTPException) as error:
                problem, pause = str(error) or type(error).__name__, 0.0
            attempt += 1
            if attempt < self.tries:
                time.sleep(max(pause, self.wait * 2 ** (attempt - 1)))
        raise CmrmError(f"{self.url} gave no verdict: {problem}")

    def _body(self, question: str, max_tokens: int) -> dict[str, Any]:
        """The request, without what the endpoint has refused so far."""
        return {
            "model": self.model, "messages": [{"role": "user", "content": question}],
            self._limit: max_tokens, **self._settings,
        }  # fmt: skip

    def _post(self, body: dict[str, Any]) -> Any:
        """The JSON that the endpoint sends back."""
        if self.calls >= self.max_calls:
            raise CmrmError(
                f"{self.calls} calls were made, as many as are allowed (CMRM_JUDGE_MAX_CALLS)"
            )
        self.calls += 1
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        address = f"{self.url}/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            return json.loads(response.read())

    def _adapt(self, message: str, body: dict[str, Any]) -> bool:
        """Whether the endpoint refused a setting of `body` that later requests do without."""
        if not _UNSUPPORTED.search(message):
            return False
        if "max_tokens" in body and "max_tokens" in message:
            self._limit = "max_completion_tokens"
            return True
        if "temperature" in body and "temperature" in message:
            self._settings = {}
            return True
        return False

    def _refusal(self, status: int, problem: str) -> str:
        """One line on a request that the endpoint refuses for good."""
        remedy = {
            401: "it does not take the key; set OPENAI_API_KEY",
            403: f"the key has no access to {self.model}",
            404: f"there is no model {self.model} or no /chat/completions; is the address right?",
        }.get(status, "it refuses the request")
        return f"{self.url} gave no verdict: {remedy} ({problem})"


def _allowed_calls() -> int:
    calls = os.environ.get("CMRM_JUDGE_MAX_CALLS", "10000")
    if not (calls.isascii() and calls.isdigit()):
        raise InputError(
            f"CMRM_JUDGE_MAX_CALLS is {calls!r}; it is a number of calls, such as 10000"
        )
    return int(calls)


def _answer(document: Any) -> ModelAnswer:
    """The answer in what an endpoint sent: a text or its parts; hidden thinking is not read.

    Raises:
        ValueError: there is no answer in it.
        CmrmError: a filter or the model itself withholds the answer.
    """
    try:
        choice = document["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        content = message.get("content") or ""
        if isinstance(content, list):
            texts = (
                part for part in content if part.get("type", "text") in ("text", "output_text")
            )
            content = "".join(str(part.get("text") or "") for part in texts)
        if finish == "content_filter":
            raise CmrmError("a content filter of the endpoint stopped its answer")
        if not content and message.get("refusal"):
            raise CmrmError("the model refuses to judge this reply")
        return ModelAnswer(str(content), finish == "length")
    except (LookupError, TypeError, AttributeError):
        text = json.dumps(document)[:200]
        raise ValueError(f"its answer has another form: {text}") from None


def _message(error: urllib.error.HTTPError) -> str:
    """The endpoint's own words on an error, on one line of at most 200 characters."""
    try:
        text = error.read(4096).decode(errors="replace")
        document = json.loads(text)
        reason = document.get("error", document) if isinstance(document, dict) else document
        text = str(reason.get("message", reason)) if isinstance(reason, dict) else str(reason)
    except (OSError, ValueError, HTTPException):
        text = str(error.reason)
    return " ".join(text.split())[:200]


def _retry_after(value: str | None) -> float:
    """Seconds of a Retry-After header (a number or a date), bounded; 0 without one."""
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
        except ValueError:
            return 0.0
        date = date if date.tzinfo is not None else date.replace(tzinfo=UTC)
        seconds = (date - datetime.now(UTC)).total_seconds()
    return min(max(seconds, 0.0), LONGEST_WAIT) if seconds == seconds else 0.0
