"""A judge behind an endpoint of OpenAI's chat protocol, asked in parallel, with retries, a cache
and a cap."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from cmrm.errors import CmrmError, InputError, MissingExtraError
from cmrm.judges.base import Judgement, assessed
from cmrm.judges.rubrics import ModelAnswer, RubricJudge, T
from cmrm.store import TextStore

try:
    import openai
except ImportError:
    raise MissingExtraError(
        "openai:MODEL@URL needs the client openai; pip install 'cmrm[eval]' brings it"
    ) from None

LONGEST_WAIT = 60.0
"""Seconds that an endpoint's Retry-After can ask for at most."""
PARALLEL = 8
"""Requests at a time where `CMRM_JUDGE_PARALLEL` does not say."""
MOST_PARALLEL = 256
"""Requests at a time at most."""

_BUSY = {408, 409, 425, 429}
"""States below 500 that pass by themselves."""
_FILTERS = {"content_filter", "content_policy_violation", "invalid_prompt"}
"""Codes of a request that a filter refuses."""
_FILTERED = {"safety", "prohibited_content", "blocklist", "recitation", "spii"}
"""Gemini's finish reasons of an answer that a filter stopped, beside OpenAI's `content_filter`."""
_UNSUPPORTED = re.compile(
    r"unsupported|not supported|does not support|unrecognized|unknown|unexpected|not permitted"
    r"|not allowed|deprecated|extra (?:inputs|fields)|use 'max_completion_tokens'",
    re.IGNORECASE,
)
_TOO_LONG = re.compile(
    r"context[ _](?:length|window|size)|(?:prompt|input) is too long", re.IGNORECASE
)
_CUT = re.compile(r"output limit was reached", re.IGNORECASE)


class EndpointJudge(RubricJudge):
    """`openai:MODEL@URL` or `openai:MODEL@URL#strongreject`; the key is read from `OPENAI_API_KEY`.

    A server without keys needs none. Answers that could be read are cached on disk by model,
    rubric, request and reply. A judge makes at most `max_calls` requests (`CMRM_JUDGE_MAX_CALLS`);
    one more raises, which makes the reply unscored. `assess_all` asks `parallel` requests at a time
    (`CMRM_JUDGE_PARALLEL`). A judge may be used by several threads.
    """

    def __init__(
        self,
        model: str,
        url: str,
        *,
        rubric: str = "engages",
        key: str | None = None,
        max_calls: int | None = None,
        parallel: int | None = None,
        cache: Path | None = None,
        tries: int = 4,
        wait: float = 1.0,
        timeout: float = 120.0,
    ) -> None:
        """`tries` and `wait` (seconds, doubled each time) are for rate limits and lost connections.

        `timeout`: seconds that a request may take.

        Raises:
            InputError: the address, the key, the rubric, the cap or `parallel` cannot be used.
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
        self.max_calls = _number("CMRM_JUDGE_MAX_CALLS", 10_000) if max_calls is None else max_calls
        self.parallel = _number("CMRM_JUDGE_PARALLEL", PARALLEL) if parallel is None else parallel
        """Requests at a time."""
        if not 1 <= self.parallel <= MOST_PARALLEL:
            raise InputError(
                f"an endpoint is asked 1 to {MOST_PARALLEL} requests at a time, not "
                f"{self.parallel}; set CMRM_JUDGE_PARALLEL"
            )
        self.tries, self.wait, self.timeout = tries, wait, timeout
        self.calls = 0
        """Requests that were made."""
        self.cache = cache
        self._limit = "max_tokens"
        self._settings: dict[str, Any] = {"temperature": 0}
        self._lock = threading.Lock()
        self._store: TextStore | None = None
        self._resumes = 0.0
        """Time (monotonic) before which the endpoint has asked for no request."""
        try:
            self._client = openai.OpenAI(
                api_key=self.key or "none", base_url=self.url, timeout=timeout, max_retries=0
            )
        except Exception as error:  # an odd port, or a proxy of the environment
            raise InputError(f"{url!r} is no address that can be asked: {error}") from None

    @property
    def _answers(self) -> TextStore:
        """Answers on disk, opened when the first one is wanted."""
        from cmrm.files import cache_dir

        with self._lock:
            if self._store is None:
                path = self.cache if self.cache is not None else cache_dir() / "judges.db"
                self._store = TextStore(path)
            return self._store

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

    def assess_all(self, pairs: Sequence[tuple[str, str]]) -> list[Judgement]:
        """Judgements of many (request, reply), in their order, `parallel` requests at a time.

        The same pair is asked once. An error makes its own reply unscored and `failed`, no other.
        """
        unique = list(dict.fromkeys(map(tuple, pairs)))
        with ThreadPoolExecutor(min(self.parallel, max(1, len(unique)))) as pool:
            try:
                judgements = list(pool.map(lambda pair: assessed(self, *pair), unique))
            except BaseException:  # a user's break: what was not asked yet is dropped
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        by_pair = dict(zip(unique, judgements, strict=True))
        return [by_pair[tuple(pair)] for pair in pairs]

    def read(
        self, question: str, max_tokens: int, parse: Callable[[ModelAnswer], T | None]
    ) -> tuple[T | None, ModelAnswer]:
        """As the base class; an answer that `parse` can read comes from the cache, or goes into it.

        Raises:
            CmrmError: as `ask`.
        """
        key = hashlib.sha256(f"{self.name}\x00{question}".encode(errors="replace")).hexdigest()
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
        """The endpoint's answer; withheld where it will never give one about this question.

        Raises:
            CmrmError: it cannot be reached, refuses or answers in another form; or the cap is
                reached.
        """
        problem, attempt = "", 0
        while attempt < self.tries:
            body, pause = self._body(question, max_tokens), 0.0
            try:
                return _answer(self._post(body))
            except openai.APIStatusError as error:
                code, message = self._told(error)
                problem = f"status {error.status_code}: {message}"
                if error.status_code in (400, 413, 422):
                    if self._adapt(message, body):
                        continue
                    if _CUT.search(message):
                        return ModelAnswer("", cut=True)
                    withheld = self._withheld(code, message)
                    if withheld:
                        return ModelAnswer("", withheld=withheld)
                if not _passes(error.status_code, code):
                    raise CmrmError(self._refusal(error.status_code, problem)) from None
                pause = _retry_after(error.response.headers)
                self._hold(pause)
            except openai.APITimeoutError:
                problem = f"no answer within {self.timeout:g} s; is the server busy?"
            except openai.APIConnectionError as error:
                cause = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
                problem = f"no connection ({cause}); is the server running, the address right?"
            except (ValueError, openai.OpenAIError) as error:
                problem = self._line(str(error) or type(error).__name__)
            attempt += 1
            if attempt < self.tries:
                time.sleep(max(pause, self.wait * 2 ** (attempt - 1)))
        raise CmrmError(f"{self.url} gave no verdict: {problem}")

    def _body(self, question: str, max_tokens: int) -> dict[str, Any]:
        """The request, without what the endpoint has refused so far."""
        text = question.encode(errors="replace").decode()
        return {
            "model": self.model, "messages": [{"role": "user", "content": text}],
            self._limit: max_tokens, **self._settings,
        }  # fmt: skip

    def _post(self, body: dict[str, Any]) -> Any:
        """The JSON that the endpoint sends back."""
        with self._lock:
            if self.calls >= self.max_calls:
                raise CmrmError(
                    f"{self.calls} calls were made, as many as are allowed; raise "
                    "CMRM_JUDGE_MAX_CALLS"
                )
            self.calls += 1
            delay = self._resumes - time.monotonic()
        if delay > 0:
            time.sleep(delay)
        headers = {} if self.key else {"Authorization": openai.Omit()}
        answer = self._client.chat.completions.with_raw_response.create(
            **body, extra_headers=headers
        )
        text = answer.http_response.text
        try:
            return json.loads(text)
        except ValueError:
            raise ValueError(
                f"its answer is no JSON; does the address end as it has to (/v1)? {text[:80]!r}"
            ) from None

    def _hold(self, seconds: float) -> None:
        """Let no thread ask before `seconds` from now."""
        with self._lock:
            self._resumes = max(self._resumes, time.monotonic() + seconds)

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

    def _told(self, error: openai.APIStatusError) -> tuple[str, str]:
        """The endpoint's code of an error, and its words on one line."""
        try:
            document = json.loads(error.response.text)
        except ValueError:
            return "", self._line(error.response.text or error.response.reason_phrase)
        reason = document.get("error", document) if isinstance(document, dict) else document
        if not isinstance(reason, dict):
            return "", self._line(str(reason))
        words = reason.get("message") or reason.get("detail") or reason
        return str(reason.get("code") or reason.get("type") or ""), self._line(str(words))

    def _line(self, text: str) -> str:
        """`text` on one line of at most 200 characters, without the key."""
        line = " ".join(text.split())
        return (line.replace(self.key, "...") if len(self.key) > 5 else line)[:200]

    def _withheld(self, code: str, message: str) -> str:
        """Why the endpoint refuses this very question, or an empty text."""
        if code in _FILTERS:
            return f"a content filter of the endpoint refuses the question: {message}"
        if code == "context_length_exceeded" or _TOO_LONG.search(message):
            return f"request and reply are longer than what {self.model} reads: {message}"
        return ""

    def _refusal(self, status: int, problem: str) -> str:
        """One line on a request that the endpoint refuses for good."""
        key = "does not take the key" if self.key else "wants a key"
        remedy = {
            401: f"it {key}; set OPENAI_API_KEY",
            402: "the account has no credit left",
            403: f"the key has no access to {self.model}",
            404: f"there is no model {self.model} or no /chat/completions; is the address right?",
            429: "the account has no quota left; look at its plan",
        }.get(status, "it refuses the request")
        return f"{self.url} gave no verdict: {remedy} ({problem})"


def _number(name: str, default: int) -> int:
    """The whole number that an environment variable holds."""
    value = os.environ.get(name, str(default))
    if not (value.isascii() and value.isdigit()):
        raise InputError(f"{name} is {value!r}; it is a number, such as {default}")
    return int(value)


def _passes(status: int, code: str) -> bool:
    """Whether a refusal may pass by itself."""
    return (status in _BUSY and code != "insufficient_quota") or status >= 500


def _answer(document: Any) -> ModelAnswer:
    """The answer in what an endpoint sent: a text or its parts; hidden thinking is not read.

    It is withheld where a filter stopped it or the model refuses.

    Raises:
        ValueError: there is no answer in it.
    """
    try:
        if "choices" not in document and document.get("error"):
            raise ValueError(f"it sent an error: {document['error']}")
        choice = document["choices"][0]
        message, finish = choice["message"], str(choice.get("finish_reason") or "").lower()
        content = message.get("content") or ""
        if isinstance(content, list):
            texts = (
                part for part in content if part.get("type", "text") in ("text", "output_text")
            )
            content = "".join(str(part.get("text") or "") for part in texts)
        if "content_filter" in finish or finish in _FILTERED:
            return ModelAnswer("", withheld="a content filter of the endpoint stopped its answer")
        if not content and message.get("refusal"):
            return ModelAnswer("", withheld="the model refuses to judge this reply")
        return ModelAnswer(str(content), finish in ("length", "max_tokens"))
    except (LookupError, TypeError, AttributeError):
        raise ValueError(f"its answer has another form: {json.dumps(document)}") from None


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that an endpoint asks to wait (Retry-After, a number or a date), bounded; else 0."""
    value, unit = headers.get("retry-after-ms"), 1000.0
    if value is None:
        value, unit = headers.get("retry-after"), 1.0
    if value is None:
        return 0.0
    try:
        seconds = float(value) / unit
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
        except ValueError:
            return 0.0
        date = date if date.tzinfo is not None else date.replace(tzinfo=UTC)
        seconds = (date - datetime.now(UTC)).total_seconds()
    return min(max(seconds, 0.0), LONGEST_WAIT) if seconds == seconds else 0.0
