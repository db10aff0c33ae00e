"""What the server's middleware adds to a reply: the field `cmrm`, or a comment in a stream."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from cmrm.engines.serving.front import Teller

TOLD = {"steered_tokens": 3, "gate_open": None}


def passed(status: int, kind: str, *bodies: bytes) -> tuple[dict[bytes, bytes], bytes]:
    """Headers and body of what comes out."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def outcome() -> dict[str, Any]:
        return TOLD

    async def run() -> None:
        teller = Teller(send, outcome)
        headers = [(b"Content-Type", kind.encode()), (b"content-length", b"999")]
        start = {"type": "http.response.start", "status": status, "headers": headers}
        await teller.send(start)
        for k, body in enumerate(bodies):
            more = k + 1 < len(bodies)
            await teller.send({"type": "http.response.body", "body": body, "more_body": more})

    asyncio.run(run())
    return dict(sent[0]["headers"]), b"".join(m.get("body", b"") for m in sent[1:])


def test_a_whole_reply_has_a_field() -> None:
    headers, body = passed(200, "application/json", b'{"a": ', '"é"}'.encode())
    assert json.loads(body) == {"a": "é", "cmrm": TOLD}
    assert headers[b"content-length"] == str(len(body)).encode()
    assert passed(200, "application/json", b"[1]")[1] == b"[1]"


def test_an_error_stays_as_it_is() -> None:
    headers, body = passed(400, "application/json", b'{"error": 1}')
    assert body == b'{"error": 1}'
    assert headers[b"content-length"] == b"999"


def test_a_stream_has_a_comment_before_its_end_and_nowhere_else() -> None:
    words = b'data: {"text": "he wrote data: [DONE]"}\n\n'
    comment = f": cmrm {json.dumps(TOLD)}\n\n".encode()
    end = b"data: [DONE]\n\n"
    assert passed(200, "text/event-stream; charset=utf-8", words, end)[1] == words + comment + end
    assert passed(200, "text/event-stream", words + end)[1] == words + comment + end
    assert passed(200, "text/event-stream", words)[1] == words
