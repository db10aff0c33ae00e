"""Middleware of vLLM's own OpenAI-compatible server: what it says of its steering.

`/health` answers 200 only where every worker is armed, and says with what; `/metrics` counts
steered tokens. vLLM loads it by `--middleware cmrm.engines.vllm.http.Middleware`.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

TIMEOUT = 10.0
"""Seconds in which workers have to say that they are armed."""
COUNTERS = {
    "masked": "Tokens at steered positions of image requests (a gate may leave them as they are).",
    "tokens": "Tokens that were run.",
    "steps": "Passes of the model.",
}
"""Name -> help text."""


class Middleware:
    """ASGI middleware around vLLM's application."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer `/health`, add to `/metrics`, leave everything else to vLLM."""
        path = scope.get("path", "") if scope["type"] == "http" else ""
        if path == "/health":
            await self._health(scope, receive, send)
        elif path == "/metrics":
            await self._metrics(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _status(self, scope: Scope) -> list[dict[str, Any]]:
        """What every worker says; an exception where one is not armed, or silent."""
        client = scope["app"].state.engine_client
        return list(await client.collective_rpc("cmrm_status", timeout=TIMEOUT))

    async def _health(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = await self._plain_health(scope, receive)
        body: dict[str, Any] = {"engine": state}
        try:
            workers = await self._status(scope)
            body["steering"] = {
                key: value for key, value in workers[0].items() if key not in COUNTERS
            }
            armed = state == 200 and all(worker["armed"] for worker in workers)
        except Exception as error:  # whatever the engine raises: it is not healthy, and says why
            armed = False
            body["steering"] = {"armed": False, "reason": f"{type(error).__name__}: {error}"[:300]}
        await _answer(send, 200 if armed else 503, json.dumps(body).encode(), "application/json")

    async def _plain_health(self, scope: Scope, receive: Receive) -> int:
        """Status of vLLM's own `/health`."""
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
        for name, words in COUNTERS.items():
            lines += [
                f"# HELP cmrm_{name}_total {words}",
                f"# TYPE cmrm_{name}_total counter",
                f"cmrm_{name}_total {workers[0][name]}",
            ]
        return "\n".join(lines) + "\n"


async def _answer(send: Send, status: int, body: bytes, kind: str) -> None:
    headers = [
        (b"content-type", kind.encode()), (b"content-length", str(len(body)).encode()),
    ]  # fmt: skip
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
