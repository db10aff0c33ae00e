"""What stands before a server's own application: which paths clients reach, and what a reply says
of its steering.

`/health` answers 200 only where every worker is armed, and says with what; `/live` is the server's
own health; `/metrics` counts steered tokens.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from types import MappingProxyType
from typing import Any
from uuid import uuid4

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

COUNTERS = {
    "masked": "Tokens at steered positions of image requests (a gate may leave them as they are).",
    "tokens": "Tokens that were run.",
    "steps": "Passes of the model.",
}
"""Name -> help text."""
MOST_BYTES = 64 * 2**20
"""Of a request's body."""
FRESH = 1.0
"""Seconds for which a status is given again."""


class Front(ABC):
    """ASGI middleware around a server's application; each server says what its workers do."""

    asked: Mapping[str, str] = MappingProxyType(
        {"/v1/chat/completions": "POST", "/v1/models": "GET"}
    )
    """Paths that clients may use, with their method."""
    counters: tuple[str, ...] = tuple(COUNTERS)
    """Those of `COUNTERS` that the workers keep."""
    completes = False
    """Whether the end of a stream has to be added to it."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.armed = False
        self.lock = asyncio.Lock()
        self.last: tuple[float, list[dict[str, Any]]] | None = None

    @abstractmethod
    async def workers(self, scope: Scope) -> list[dict[str, Any]]:
        """What every worker says of its steering; an exception where one is not armed, is silent,
        or is armed with something else than this server was started with."""

    @abstractmethod
    async def outcome(self, scope: Scope, name: str) -> dict[str, Any] | None:
        """What was done to the request of a name; None where no worker knows it."""

    def admits(self, scope: Scope) -> bool:
        """Whether a client has shown the key; True where the application looks itself."""
        return True

    def refusal(self, path: str, body: bytes) -> str | None:
        """Why a body is not taken; None where it is."""
        return None

    def abandoned(self, name: str) -> None:
        """The client of a request has gone away, or has its reply."""
        return

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer `/health`, `/live` and `/metrics`; let clients ask, once every worker is armed."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        path, method = scope.get("path", ""), scope.get("method")
        own = path in ("/health", "/live", "/metrics")
        if own and method == "HEAD":
            method = "GET"
            scope = {**scope, "method": method}
        if (own and method != "GET") or (path in self.asked and self.asked[path] != method):
            await refuse(send, 405, f"this path takes {self.asked.get(path, 'GET')} alone")
        elif path == "/health":
            await self._health(scope, receive, send)
        elif path == "/live":
            state = await self._plain_health({**scope, "path": "/health"}, receive)
            await _answer(send, state, b"", "text/plain")
        elif path == "/metrics":
            await self._metrics(scope, receive, send)
        elif path not in self.asked:
            await refuse(send, 404, "there is no such path here")
        elif not self.admits(scope):
            await refuse(send, 401, "the key is missing or wrong")
        else:
            await self._ask(scope, receive, send)

    async def _ask(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Give a request to the application, where it can be steered rightly."""
        if not self.armed:
            try:
                await self._status(scope)
            except Exception as error:  # whatever the engine raises, it is not armed
                await refuse(send, 503, f"steering is not armed: {type(error).__name__}")
                return
        if scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if len(body) > MOST_BYTES:
                await refuse(send, 413, f"a request has at most {MOST_BYTES} bytes")
                return
            if not message.get("more_body", False):
                break
        reason = self.refusal(scope["path"], bytes(body))
        if reason is not None:
            await refuse(send, 400, reason)
            return
        await self._pass_on(scope, receive, send, bytes(body))

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send, body: bytes) -> None:
        """Give a body that was read to the application, and notice when its client goes away."""
        replayed, gone = False, asyncio.Event()

        async def again() -> Message:
            nonlocal replayed
            if replayed:
                await gone.wait()
                return {"type": "http.disconnect"}
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()
            self.abandoned(name)

        name = f"cmrm{uuid4().hex}"
        own = (b"x-request-id", b"content-type")
        headers = [(k, v) for k, v in scope.get("headers", ()) if k.lower() not in own]
        headers += [(own[0], name.encode()), (own[1], b"application/json")]
        teller = Teller(send, lambda: self.outcome(scope, name), completes=self.completes)
        watcher = asyncio.create_task(watch())
        try:
            await self.app({**scope, "headers": headers}, again, teller.send)
        finally:
            watcher.cancel()
            self.abandoned(name)

    async def _status(self, scope: Scope) -> list[dict[str, Any]]:
        """`workers`, for a moment."""
        async with self.lock:
            if self.last is not None and time.monotonic() - self.last[0] < FRESH:
                return self.last[1]
            try:
                workers = await self.workers(scope)
            except BaseException:
                self.armed = False
                raise
            self.armed, self.last = True, (time.monotonic(), workers)
            return workers

    async def _health(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = await self._plain_health(scope, receive)
        body: dict[str, Any] = {"engine": state}
        try:
            workers = await self._status(scope)
            body["steering"] = {
                key: value for key, value in workers[0].items() if key not in COUNTERS
            }
            armed = state == 200
        except Exception as error:  # whatever the engine raises: it is not healthy, and says why
            armed = False
            body["steering"] = {"armed": False, "reason": f"{type(error).__name__}: {error}"[:300]}
        await _answer(send, 200 if armed else 503, json.dumps(body).encode(), "application/json")

    async def _plain_health(self, scope: Scope, receive: Receive) -> int:
        """Status of the application's own `/health`."""
        status = 500

        async def catch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(message["status"])

        await self.app(scope, receive, catch)
        return status

    async def _metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        start: Message = {}
        parts: list[bytes] = []

        async def catch(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
            elif message["type"] == "http.response.body":
                parts.append(message.get("body", b""))

        await self.app(scope, receive, catch)
        status = int(start.get("status", 500))
        if status == 404:  # the application has no metrics of its own
            status, start, parts = 200, {}, []
        kind = next(
            (v.decode() for k, v in start.get("headers", ()) if k.lower() == b"content-type"),
            "text/plain",
        )
        body = b"".join(parts)
        if status == 200:
            body += (await self._counters(scope)).encode()
        await _answer(send, status, body, kind)

    async def _counters(self, scope: Scope) -> str:
        try:
            workers = await self._status(scope)
        except Exception:  # the engine is gone or not armed, which is what this gauge says
            return "# TYPE cmrm_armed gauge\ncmrm_armed 0\n"
        lines = ["# TYPE cmrm_armed gauge", "cmrm_armed 1"]
        for name in self.counters:
            lines += [
                f"# HELP cmrm_{name}_total {COUNTERS[name]}",
                f"# TYPE cmrm_{name}_total counter",
                f"cmrm_{name}_total {workers[0][name]}",
            ]
        return "\n".join(lines) + "\n"


class Teller:
    """Adds to a reply what was done to its request: the field `cmrm` of a whole reply, a comment
    (`: cmrm {...}`) before the end of a stream, which clients pass over."""

    def __init__(
        self,
        send: Send,
        outcome: Callable[[], Awaitable[dict[str, Any] | None]],
        *,
        completes: bool = False,
    ) -> None:
        """`completes`: add the end to a stream that has none."""
        self._send = send
        self._outcome = outcome
        self._completes = completes
        self._start: Message | None = None
        self._body = b""
        self._streams = False

    async def send(self, message: Message) -> None:
        """Take one of the application's messages, and pass it on."""
        if message["type"] == "http.response.start":
            headers = {k.lower(): v for k, v in message.get("headers", ())}
            kind = headers.get(b"content-type", b"")
            self._streams = kind.startswith(b"text/event-stream")
            if message["status"] == 200 and kind.startswith(b"application/json"):
                self._start = message
                return
            await self._send(message)
        elif message["type"] != "http.response.body":
            await self._send(message)
        elif self._start is not None:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._whole(self._start)
        else:
            body = message.get("body", b"")
            if self._streams and self._completes and not message.get("more_body", False):
                body += END + b"\n\n"
            at = _end_of(body) if self._streams else None
            if at is not None:
                comment = b": cmrm " + json.dumps(await self._outcome()).encode() + b"\n\n"
                message = {**message, "body": body[:at] + comment + body[at:]}
            await self._send(message)

    async def _whole(self, start: Message) -> None:
        document = json.loads(self._body)
        if isinstance(document, dict):
            document["cmrm"] = await self._outcome()
        body = json.dumps(document, ensure_ascii=False).encode()
        headers = [(k, v) for k, v in start["headers"] if k.lower() != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        await self._send({**start, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


END = b"data: [DONE]"
"""Last event of a stream."""


def _end_of(body: bytes) -> int | None:
    """Where the last event of a stream begins; a reply that speaks of it has no line break before
    it."""
    if body.startswith(END):
        return 0
    at = body.find(b"\n\n" + END)
    return None if at < 0 else at + 2


def shows_key(scope: Scope, key: str | None) -> bool:
    """Whether a request shows a key as its bearer; always where there is none."""
    if not key:
        return True
    sent = [v for k, v in scope.get("headers", ()) if k.lower() == b"authorization"]
    kind, _, shown = sent[0].partition(b" ") if len(sent) == 1 else (b"", b"", b"")
    return kind.lower() == b"bearer" and secrets.compare_digest(shown, key.encode())


async def _answer(send: Send, status: int, body: bytes, kind: str) -> None:
    headers = [
        (b"content-type", kind.encode()), (b"content-length", str(len(body)).encode()),
    ]  # fmt: skip
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def refuse(send: Send, status: int, reason: str) -> None:
    """Answer with an error."""
    body = json.dumps(error_body(status, reason)).encode()
    await _answer(send, status, body, "application/json")


def error_body(status: int, reason: str) -> dict[str, Any]:
    """An error in the form of OpenAI's protocol."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": f"cmrm: {reason}", "type": kind, "code": status}}
