"""A judge behind any endpoint of OpenAI's chat protocol, with retries, a cache and a cap on what is spent."""

from __future__ import annotations

import hashlib
import json
import os
import time
import urllib.error
import urllib.request
from functools import cached_property
from pathlib import Path
from typing import Any

from cmrm.errors import CmrmError, InputError
from cmrm.judges.rubrics import RubricJudge
from cmrm.store import TextStore


class EndpointJudge(RubricJudge):
    """`openai:MODEL@URL` or `openai:MODEL@URL#strongreject`; the key is read from `OPENAI_API_KEY`.

    Answers are cached on disk by model, rubric, request and reply. No more than `max_calls` requests are made in a process
    (`CMRM_JUDGE_MAX_CALLS`); what would exceed it raises, and is reported as unscored.
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
        """`tries` and `wait` (seconds, doubled each time) are for rate limits, server errors and lost connections."""
        super().__init__(rubric)
        if not url.startswith(("http://", "https://")):
            raise InputError(f"{url!r} is no address of an endpoint; it begins with http:// or https://")
        self.name = f"openai:{model}@{url}#{rubric}"
        self.model, self.url = model, url.rstrip("/")
        self.key = key if key is not None else os.environ.get("OPENAI_API_KEY", "")
        self.max_calls = max_calls if max_calls is not None else _allowed_calls()
        self.tries, self.wait, self.timeout = tries, wait, timeout
        self.calls = 0
        self.cache = cache

    @cached_property
    def _held(self) -> TextStore:
        """Answers on disk, opened when the first one is wanted."""
        from cmrm.files import cache_dir

        return TextStore(self.cache if self.cache is not None else cache_dir() / "judges.db")

    @classmethod
    def named(cls, rest: str) -> EndpointJudge:
        """From what follows `openai:`.

        Raises:
            InputError: it is no MODEL@URL.
        """
        model, at, url = rest.partition("@")
        if not at or not model:
            raise InputError(f"openai:{rest} is no openai:MODEL@URL")
        address, mark, rubric = url.partition("#")
        return cls(model, address, rubric=rubric if mark else "engages")

    def ask(self, question: str, max_tokens: int) -> str:
        """What the endpoint says, or said before.

        Raises:
            CmrmError: it cannot be reached, refuses, answers in another form, or the cap is reached.
        """
        key = hashlib.sha256(f"{self.name}\x00{question}".encode()).hexdigest()
        answer = self._held.get(key)
        if answer is None:
            answer = self._ask(question, max_tokens)
            self._held.put({key: answer})
        return answer

    def _ask(self, question: str, max_tokens: int) -> str:
        body = {"model": self.model, "messages": [{"role": "user", "content": question}], "temperature": 0,
                "max_tokens": max_tokens}  # fmt: skip
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        call = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        last = ""
        for attempt in range(self.tries):
            if self.calls >= self.max_calls:
                raise CmrmError(f"{self.calls} calls were made, as many as are allowed (CMRM_JUDGE_MAX_CALLS)")
            if attempt:
                time.sleep(self.wait * 2 ** (attempt - 1))
            self.calls += 1
            try:
                with urllib.request.urlopen(call, timeout=self.timeout) as response:
                    return _content(json.loads(response.read()))
            except urllib.error.HTTPError as error:
                last = f"status {error.code}: {error.read()[:200].decode(errors='replace')}"
                if error.code != 429 and error.code < 500:
                    break
            except (OSError, ValueError) as error:
                last = str(error)
        raise CmrmError(f"{self.url} gave no verdict: {last}")


def _allowed_calls() -> int:
    given = os.environ.get("CMRM_JUDGE_MAX_CALLS", "10000")
    if not (given.isascii() and given.isdigit()):
        raise InputError(f"CMRM_JUDGE_MAX_CALLS is {given!r}; it is a number of calls, such as 10000")
    return int(given)


def _content(answer: Any) -> str:
    try:
        return str(answer["choices"][0]["message"]["content"] or "")
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"its answer has another form: {json.dumps(answer)[:200]}") from None
