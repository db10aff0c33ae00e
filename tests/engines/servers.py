"""Servers of OpenAI's protocol for tests: what they answer, and what they were asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ARMED = {"engine": 200, "steering": {"armed": True, "program": "abc"}}


def reply(body: dict[str, Any]) -> tuple[int, Any]:
    content = body["messages"][-1]["content"]
    text = content if isinstance(content, str) else next(p["text"] for p in content if "text" in p)
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": f" to {text} "},
    }
    return 200, {
        "id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice],
        "usage": {"prompt_tokens": 3, "completion_tokens": 7, "total_tokens": 10},
    }  # fmt: skip


@dataclass
class Fake:
    """A server of the tests, and what it was asked."""

    health: Any = "ok"
    answer: Callable[[dict[str, Any]], tuple[int, Any]] = reply
    bodies: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""


@contextmanager
def serving(**options: Any) -> Iterator[Fake]:
    fake = Fake(**options)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/v1/models":
                self.send(200, {"object": "list", "data": [{"id": "m", "object": "model"}]})
            else:
                self.send(200, fake.health)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fake.bodies.append(body)
            self.send(*fake.answer(body))

        def send(self, status: int, document: Any) -> None:
            content = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    fake.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
